"""The only caller of Label Studio's API: one authenticated connection, shared by label-studio-sdk and by the calls that
the SDK lacks. What Label Studio really answers was observed on 1.23.2."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
from pydantic_core import to_json

from ml_backend.errors import LabelStudioError, LabelStudioUnavailableError
from ml_backend.ls_http import (
    Http,
    NotFoundError,
    TooLargeRequestError,
    base_url,
    path_below,
    same_origin,
    without_query,
)
from ml_backend.ls_tokens import read_credentials
from ml_backend.ls_types import AnnotatedTask, MLBackend, Project, Task, Webhook, ml_backend_of, project_of, webhook_of

logger = logging.getLogger(__name__)

UNCERTAINTY_SAMPLING = "Uncertainty sampling"

# Everything a project's webhook can be told (organisation-only actions are refused for projects). A PATCH that leaves
# the list out wipes it, so it is always sent.
WEBHOOK_ACTIONS = (
    "ANNOTATION_CREATED",
    "ANNOTATIONS_CREATED",
    "ANNOTATION_UPDATED",
    "ANNOTATIONS_DELETED",
    "PROJECT_UPDATED",
    "TASKS_CREATED",
    "TASKS_DELETED",
)

_TASKS_A_PAGE = 1000
_IDS_AN_EXPORT = 200  # they travel in the address: 200 stay below the 4 kB that small proxies allow
_TASKS_AN_IMPORT = 5000
_FILES_AN_UPLOAD = 50  # Label Studio refuses more than 100 files in one request
_BYTES_AN_UPLOAD = 64_000_000
_LEAST_BYTES_AN_IMPORT = 2_000_000
_BYTES_AN_IMPORT = 176_000_000  # Label Studio takes 20 times its size as memory (docs/decisions/081)
_QUICKLY_SECONDS = 10.0  # a request that ends sooner without an answer was not too long
_LONG_SECONDS = 3600.0  # bulk imports and deletions are one synchronous request


def counted_annotations(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The annotations of an exported task that count: neither skipped nor drafts (those sit under `drafts`)."""
    return [annotation for annotation in task["annotations"] if not annotation["was_cancelled"]]


class _ImportSize:
    """How many bytes a bulk import has, by what became of those before."""

    def __init__(self) -> None:
        self.bytes = self._most = _BYTES_AN_IMPORT
        self._failed_quickly = 0  # in a row

    def refused(self, size: int) -> None:
        """A proxy takes none so large, at any time."""
        self.bytes = self._most = max(size // 2, _LEAST_BYTES_AN_IMPORT)

    def broke_off(self, size: int, seconds: float) -> None:
        """After a while: a proxy or a server gives up on requests that take long, or the memory was not enough. At
        once, a server is away as a rule; time after time, it dies of the request."""
        self._failed_quickly = 0 if seconds > _QUICKLY_SECONDS else self._failed_quickly + 1
        if self._failed_quickly == 0:
            self._most = max(size // 2, _LEAST_BYTES_AN_IMPORT)
        if self._failed_quickly != 1:
            self.bytes = max(size // 4, _LEAST_BYTES_AN_IMPORT)

    def went_well(self, size: int) -> None:
        self._failed_quickly = 0
        if 2 * size > self.bytes:
            self.bytes = min(2 * self.bytes, self._most)


class LabelStudioClient:
    """Label Studio at `url`, as the user who owns `api_key` (a personal access token or a legacy token).

    `public_url` is the address that Label Studio writes into absolute links (its LABEL_STUDIO_HOST), where it differs
    from `url`. Safe to share between threads. Every method raises LabelStudioAuthError (the token was refused),
    LabelStudioUnavailableError (not reachable, 429 or 5xx: worth trying again later) or LabelStudioError (any other
    answer that cannot be worked with). What is safe to repeat has been repeated a few times by then.
    """

    def __init__(self, url: str, api_key: str, *, timeout_seconds: float = 60.0, public_url: str | None = None) -> None:
        self._import_size = _ImportSize()
        self._http = Http(url=url, credentials=read_credentials(api_key), timeout_seconds=timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self.url = str(self._http.base_url).rstrip("/")
        self._public_url = httpx.URL(base_url(public_url or url))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def _sdk(self) -> Any:
        from label_studio_sdk.client import LabelStudio  # brings pandas; to fetch images, it is not needed

        # The SDK may not retry by itself (it would repeat POSTs) nor renew the token: our connection does both.
        return LabelStudio(  # type: ignore[no-untyped-call]
            base_url=self.url,
            api_key="set by the connection",
            httpx_client=self._http,
            timeout=self._timeout_seconds,
            max_retries=0,
        )

    # Projects

    def whoami(self) -> str:
        """The e-mail address of the token's owner; the cheapest way to try address and token."""
        doubt = f"is {self.url} really Label Studio's address?"
        try:
            # Not by the SDK, which the web process never loads.
            user = self._http.json("GET", "/api/current-user/whoami")
        except NotFoundError as error:  # each Label Studio has this page
            raise LabelStudioError(f"{error}; {doubt}") from error
        if not isinstance(user, dict) or "email" not in user:
            raise LabelStudioError(f"GET {self.url}/api/current-user/whoami: expected a user with an e-mail; {doubt}")
        return str(user["email"])

    def project(self, project_id: int) -> Project:
        return project_of(self._sdk.projects.get(project_id))

    def projects(self) -> list[Project]:
        answers: Iterator[Any] = iter(self._sdk.projects.list())
        found: list[Project] = []
        with suppress(NotFoundError):  # the SDK reads on until the page past the end
            found.extend(map(project_of, answers))
        return found

    def create_project(self, *, title: str, label_config: str) -> Project:
        created = self._sdk.projects.create(title=title, label_config=label_config)
        return self.project(_integer(created.id))

    def update_project(self, project_id: int, **fields: Any) -> Project:
        """Set fields by Label Studio's names, such as `sampling`, `maximum_annotations`, `label_config`."""
        self._sdk.projects.update(project_id, **fields)
        return self.project(project_id)

    def set_model_version(self, project_id: int, version: str) -> None:
        """Show the predictions of this version, and queue by their scores. Label Studio refuses (400) a version that
        has no predictions: import them first."""
        self._sdk.projects.update(project_id, model_version=version)
        chosen = self.project(project_id).model_version
        if chosen != version:
            raise LabelStudioError(
                f"project {project_id}: asked for model version {version!r}, Label Studio shows {chosen!r}"
            )

    # Tasks and annotations

    def count_tasks(self, project_id: int) -> int:
        return self._count(project_id, filters=[])

    def count_annotated_tasks(self, project_id: int) -> int:
        """How many tasks have an annotation that is neither skipped nor a draft; 0.1 s at 100,000 tasks."""
        return self._count(project_id, filters=[_HAS_ANNOTATION])

    def tasks(self, project_id: int, *, after_id: int = 0, changed_after: datetime | None = None) -> Iterator[Task]:
        """The tasks with an id above `after_id`, by id, or those of them that changed after a moment. Label Studio
        takes 0.6 to 2.5 ms for each (it loads the bodies of all annotations and predictions to leave them out)."""
        fields = "id,data,total_annotations,cancelled_annotations,updated_at"
        filters = [] if changed_after is None else [_changed_after(changed_after)]
        for row in self._rows(project_id, filters=filters, fields=fields, after_id=after_id):
            yield Task(
                id=row["id"],
                data=row["data"],
                annotation_count=row["total_annotations"],
                skip_count=row["cancelled_annotations"],
                updated_at=datetime.fromisoformat(row["updated_at"]),
            )

    def newest_change(self, project_id: int) -> tuple[datetime, int]:
        """When the last of a project's tasks changed by Label Studio's clock, and how many tasks there are. A project
        without tasks changed in 1970."""
        answer = self._data_manager(
            project_id, filters=[], fields="id,updated_at", page_size=1, ordering="-tasks:updated_at"
        )
        times = [datetime.fromisoformat(row["updated_at"]) for row in answer["tasks"]]
        return max(times, default=datetime.fromtimestamp(0, UTC)), int(answer["total"])

    def annotated_task_ids(self, project_id: int) -> frozenset[int]:
        """The tasks with an annotation that is neither skipped nor a draft; imported ground truth does count."""
        return frozenset(row["id"] for row in self._rows(project_id, filters=[_HAS_ANNOTATION], fields="id"))

    def annotated(
        self, project_id: int, *, changed_after: datetime | None = None, after_id: int = 0, up_to_id: int | None = None
    ) -> Iterator[AnnotatedTask]:
        """The same tasks with what tells whether they have changed, by id: those that changed after a moment, and whose
        ids are in a range. Label Studio takes as long for each as in `tasks`."""
        filters = [_HAS_ANNOTATION, *([] if up_to_id is None else [_id_up_to(up_to_id)])]
        if changed_after is not None:
            filters.append(_changed_after(changed_after))
        fields = "id,total_annotations,updated_at"
        for row in self._rows(project_id, filters=filters, fields=fields, after_id=after_id):
            updated_at = datetime.fromisoformat(row["updated_at"])
            yield AnnotatedTask(id=row["id"], updated_at=updated_at, annotations=row["total_annotations"])

    def count_annotated(self, project_id: int, *, after_id: int = 0, up_to_id: int | None = None) -> tuple[int, int]:
        """How many such tasks there are in a range of ids, and how many annotations they have that count."""
        filters = [_HAS_ANNOTATION, _id_above(after_id), *([] if up_to_id is None else [_id_up_to(up_to_id)])]
        answer = self._data_manager(project_id, filters=filters, fields="id", page_size=1)
        return int(answer["total"]), int(answer["total_annotations"])

    def annotated_tasks(self, project_id: int, task_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The exported tasks of `task_ids`, by id, with all their annotations (skipped ones too, see
        `counted_annotations`). Tasks without an annotation that counts, or deleted meanwhile, are left out."""
        ids = sorted(set(task_ids))
        for start in range(0, len(ids), _IDS_AN_EXPORT):
            chunk = ids[start : start + _IDS_AN_EXPORT]
            exported = self._http.json(
                "GET",
                f"/api/projects/{project_id}/export",
                params={"exportType": "JSON", "ids[]": chunk},
                timeout=_LONG_SECONDS,
            )
            yield from sorted(
                (task for task in exported if counted_annotations(task)), key=lambda task: int(task["id"])
            )

    def _rows(
        self, project_id: int, *, filters: list[dict[str, Any]], fields: str, after_id: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Rows of the Data Manager by id. Each page asks for the ids above the last one seen instead of for a page
        number, so tasks that come or go meanwhile shift nothing, and no page can be past the end (a 404)."""
        while True:
            answer: dict[str, Any] = self._data_manager(
                project_id, filters=[*filters, _id_above(after_id)], fields=fields, page_size=_TASKS_A_PAGE
            )
            rows = answer["tasks"]
            if not rows and answer["total"]:
                raise LabelStudioUnavailableError(
                    f"project {project_id}: Label Studio counts {answer['total']} tasks and lists none of them: were "
                    "they deleted just now?"
                )
            yield from rows
            if len(rows) >= answer["total"]:
                return
            after_id = rows[-1]["id"]

    def _count(self, project_id: int, *, filters: list[dict[str, Any]]) -> int:
        return int(self._data_manager(project_id, filters=filters, fields="id", page_size=1)["total"])

    def _data_manager(
        self,
        project_id: int,
        *,
        filters: list[dict[str, Any]],
        fields: str,
        page_size: int,
        ordering: str = "tasks:id",
    ) -> dict[str, Any]:
        query = {"filters": {"conjunction": "and", "items": filters}, "ordering": [ordering]}
        params = {
            "project": project_id,
            "page_size": page_size,
            "include": fields,
            "resolve_uri": "false",
            "query": quote(json.dumps(query)),  # Label Studio unquotes it once more than HTTP does
        }
        answer: dict[str, Any] = self._http.json("GET", "/api/tasks/", params=params)
        return answer

    # Predictions

    def model_versions(self, project_id: int) -> dict[str, int]:
        """How many predictions each model version has in the project."""
        counts = self._http.json("GET", f"/api/projects/{project_id}/model-versions/")
        return {str(version): int(count) for version, count in counts.items()}

    def predicted_task_ids(self, project_id: int, model_version: str) -> frozenset[int]:
        """The tasks that carry a prediction of exactly this version. Nothing stored is answered in 0.1 s; otherwise
        Label Studio takes about 2.5 ms a task (10 kB of polygons each)."""
        if not self.model_versions(project_id).get(model_version):
            return frozenset()
        holds = {
            "filter": "filter:tasks:predictions_model_versions",
            "operator": "contains",  # a part of the name is enough for it, hence the exact comparison below
            "type": "List",
            "value": [model_version],
        }
        rows = self._rows(project_id, filters=[holds], fields="id,predictions_model_versions")
        return frozenset(
            row["id"] for row in rows if self._carries(row["id"], row["predictions_model_versions"], model_version)
        )

    def _carries(self, task_id: int, listed: str, model_version: str) -> bool:
        if len(listed) < _LISTED_VERSIONS_LIMIT:
            return f",{model_version}," in f",{listed.replace(', ', ',')},"
        predictions = self._http.json("GET", "/api/predictions/", params={"task": task_id})
        return any(prediction["model_version"] == model_version for prediction in predictions)

    def import_predictions(
        self,
        project_id: int,
        predictions: Iterable[Mapping[str, Any]],
        *,
        max_request_bytes: int | None = None,
        on_progress: Callable[[int], None] = lambda _: None,
        turn: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> int:
        """Import `{"task", "result", "score", "model_version"}` in bulk, as they come; returns how many Label Studio
        says it created. `on_progress` is told how many have been sent; a request is sent within `turn` (its bytes).

        Compare that with what was sent: invalid ones (a score outside [0, 1], an unknown label, points beyond 100)
        are dropped without an error. Each request costs Label Studio a count of the whole project (115 s at 100,000
        tasks), so few large ones are quicker than many; where a proxy takes none so large, halves are sent. A request
        that broke off is not repeated: Label Studio goes on working on it, and a second one would store every
        prediction twice. Ask `predicted_task_ids` what arrived.
        """
        sent = created = 0
        for parts in _json_parts(predictions, max_bytes=lambda: max_request_bytes or self._import_size.bytes):
            created += self._import_encoded(project_id, parts, turn)
            sent += len(parts)
            on_progress(sent)
        return created

    def _import_encoded(
        self, project_id: int, parts: Sequence[bytes], turn: Callable[[int], AbstractContextManager[None]]
    ) -> int:
        path, body = f"/api/projects/{project_id}/import/predictions", _json_array(parts)
        began = time.monotonic()
        try:
            with turn(len(body)):
                began = time.monotonic()
                answer = self._http.json("POST", path, content=body, headers=_JSON_BODY, timeout=_LONG_SECONDS)
        except TooLargeRequestError:
            if len(parts) == 1:
                raise
            self._import_size.refused(len(body))
            middle = len(parts) // 2
            return sum(self._import_encoded(project_id, half, turn) for half in (parts[:middle], parts[middle:]))
        except LabelStudioUnavailableError:
            self._import_size.broke_off(len(body), time.monotonic() - began)
            raise
        self._import_size.went_well(len(body))
        return int(answer["created"])

    def delete_model_version(self, project_id: int, version: str) -> None:
        """Delete all predictions of a version: one synchronous request, 150 to 190 predictions a second.

        Label Studio may clear the project's model version with it, which would turn the queue into a random one;
        when the project showed another version, it is put back.
        """
        shown = self.project(project_id).model_version
        self._http.json(
            "DELETE",
            f"/api/projects/{project_id}/model-versions/",
            json={"model_version": version},
            timeout=_LONG_SECONDS,
        )
        if shown not in ("", version) and self.project(project_id).model_version != shown:
            self._sdk.projects.update(project_id, model_version=shown)

    # The ML backend and its webhook

    def ml_backends(self, project_id: int) -> list[MLBackend]:
        """The connected backends; Label Studio asks each for /health and /setup before it answers."""
        return [ml_backend_of(answer) for answer in self._sdk.ml.list(project=project_id)]

    def connect_backend(
        self, project_id: int, *, url: str, title: str, basic_auth: tuple[str, str] | None = None
    ) -> MLBackend:
        """Connect the backend at `url`, or renew the connection that is there. Label Studio calls /health and /setup
        first; a backend that is down or answers an error is a LabelStudioError (400) with the reason.

        When the project shows no model version, Label Studio sets it to `title`.
        """
        fields: dict[str, Any] = {"project": project_id, "url": url, "title": title}
        if basic_auth is not None:
            fields |= {"auth_method": "BASIC_AUTH", "basic_auth_user": basic_auth[0], "basic_auth_pass": basic_auth[1]}
        for known in self.ml_backends(project_id):
            if known.url.rstrip("/") == url.rstrip("/"):
                return ml_backend_of(self._sdk.ml.update(known.id, **fields))  # without url and project: a 500
        return ml_backend_of(self._sdk.ml.create(**fields))

    def webhooks(self, project_id: int) -> list[Webhook]:
        return [webhook_of(answer) for answer in self._sdk.webhooks.list(project=str(project_id))]

    def create_webhook(self, project_id: int, *, url: str, headers: Mapping[str, str] | None = None) -> Webhook:
        """Send all events of the project to `url`, with these headers. A hook to this address that is there already
        (connecting a backend makes one, without headers) is changed instead; further ones are removed, because each
        would deliver every event once more."""
        settings: dict[str, Any] = {
            "url": url,
            "headers": dict(headers or {}),
            "actions": list(WEBHOOK_ACTIONS),
            "send_for_all_actions": True,
            "send_payload": True,
            "is_active": True,
        }
        known = [hook for hook in self.webhooks(project_id) if hook.url.rstrip("/") == url.rstrip("/")]
        for surplus in known[1:]:
            self._sdk.webhooks.delete(surplus.id)
        if known:
            return webhook_of(self._sdk.webhooks.update(known[0].id, **settings))
        return webhook_of(self._sdk.webhooks.create(project=project_id, **settings))

    def webhooks_without(self, project_id: int, headers: Mapping[str, str]) -> list[Webhook]:
        """The project's webhooks that do not send these headers."""
        hooks = self._sdk.webhooks.list(project=str(project_id))
        return [webhook_of(hook) for hook in hooks if not headers.items() <= (hook.headers or {}).items()]

    def add_webhook_headers(self, webhook_id: int, headers: Mapping[str, str]) -> None:
        """From now on the webhook sends these headers, too; everything else about it stays."""
        hook = self._sdk.webhooks.get(webhook_id)
        self._sdk.webhooks.update(
            webhook_id,
            url=hook.url,
            headers={**(hook.headers or {}), **headers},
            actions=hook.actions or [],
            send_for_all_actions=hook.send_for_all_actions,
            send_payload=hook.send_payload,
            is_active=hook.is_active,
        )

    # What an annotator does

    def next_task(self, project_id: int) -> dict[str, Any] | None:
        """The task that "Label All Tasks" opens next for this user, and locks for them; None when none is left."""
        try:
            answer = self._http.json(
                "POST", "/api/dm/actions", params={"id": "next_task", "project": project_id}, json={}
            )
        except NotFoundError:
            self.project(project_id)  # a project that does not exist is a 404 too
            return None
        return dict(answer)

    def submit_annotation(self, task_id: int, *, result: list[dict[str, Any]], lead_time_seconds: float) -> int:
        """Submit an annotation as this user; returns its id."""
        return self._annotate(task_id, {"result": result, "lead_time": lead_time_seconds, "was_cancelled": False})

    def skip(self, task_id: int, *, lead_time_seconds: float = 0.0) -> int:
        """Skip a task as this user: an annotation that says so; returns its id."""
        return self._annotate(task_id, {"result": [], "lead_time": lead_time_seconds, "was_cancelled": True})

    def _annotate(self, task_id: int, annotation: dict[str, Any]) -> int:
        return int(self._http.json("POST", f"/api/tasks/{task_id}/annotations/", json=annotation)["id"])

    # Importing

    def import_tasks(self, project_id: int, tasks: Sequence[dict[str, Any]]) -> list[int]:
        """Import `{"data": {...}}` or plain data dicts, with `annotations` or `predictions` if they have some;
        returns the ids of the new tasks. Not repeated when it breaks off: the tasks may be there."""
        ids: list[int] = []
        for start in range(0, len(tasks), _TASKS_AN_IMPORT):
            chunk = list(tasks[start : start + _TASKS_AN_IMPORT])
            ids += self._import(project_id, json=chunk)
        return ids

    def import_files(self, project_id: int, paths: Sequence[Path]) -> list[int]:
        """Upload images, one task for each; returns the ids of the new tasks, in the order of the paths."""
        ids: list[int] = []
        for chunk in _upload_chunks(paths):
            # Of files under one field name Label Studio keeps only the last, without a word.
            files = {f"file{number}": (path.name, path.read_bytes()) for number, path in enumerate(chunk)}
            made = self._import(project_id, files=files)
            if len(made) != len(chunk):
                raise LabelStudioError(
                    f"project {project_id}: {len(chunk)} images were sent, Label Studio made {len(made)} tasks of them"
                )
            ids += made
        return ids

    def _import(self, project_id: int, **body: Any) -> list[int]:
        path = f"/api/projects/{project_id}/import"
        answer = self._http.json("POST", path, params={"return_task_ids": "true"}, timeout=_LONG_SECONDS, **body)
        return [int(task_id) for task_id in answer["task_ids"]]

    # Files

    def own_path(self, path_or_url: str) -> str | None:
        """The part below Label Studio's address when this lives on Label Studio, None when it lives elsewhere."""
        if path_or_url.startswith("/") and not path_or_url.startswith("//"):
            return path_below(self._http.base_url, path_or_url) or path_or_url
        try:
            url = httpx.URL(path_or_url)
        except httpx.InvalidURL:
            return None
        for base in (self._http.base_url, self._public_url):
            path = path_below(base, url.raw_path.decode()) if same_origin(url, base) else None
            if path is not None:
                return path
        return None

    @contextmanager
    def download(self, path_or_url: str) -> Iterator[httpx.Response]:
        """A file on Label Studio's own host, as an open response: read it by `iter_bytes`. A redirect (presigned cloud
        addresses) is handed back, not followed, so the token cannot travel with it."""
        path = self.own_path(path_or_url)
        if path is None:
            raise LabelStudioError(f"expected an address on {self.url}, got {without_query(path_or_url)}")
        try:
            with self._http.open_file(path) as response:
                yield response
        except httpx.TransportError as error:
            raise LabelStudioUnavailableError(f"{without_query(path)}: the download broke off ({error})") from error


_JSON_BODY = {"Content-Type": "application/json"}
_HAS_ANNOTATION = {"filter": "filter:tasks:total_annotations", "operator": "greater", "type": "Number", "value": 0}
_LISTED_VERSIONS_LIMIT = 500 - 50  # the Data Manager cuts the list of versions at 500 characters, then respaces it


def _id_above(task_id: int) -> dict[str, Any]:
    return {"filter": "filter:tasks:id", "operator": "greater", "type": "Number", "value": task_id}


def _id_up_to(task_id: int) -> dict[str, Any]:
    return {"filter": "filter:tasks:id", "operator": "less_or_equal", "type": "Number", "value": task_id}


def _changed_after(moment: datetime) -> dict[str, Any]:
    text = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {"filter": "filter:tasks:updated_at", "operator": "greater", "type": "Datetime", "value": text}


def _json_parts(items: Iterable[Mapping[str, Any]], *, max_bytes: Callable[[], int]) -> Iterator[list[bytes]]:
    """The items in order, each as JSON, as many together as make an array of at most `max_bytes`, which is asked each
    time."""
    parts: list[bytes] = []
    size = 2
    for item in items:
        part, most = _json(item), max_bytes()
        if len(part) + 2 > most:
            raise LabelStudioError(
                f"the prediction of task {item.get('task')} is {len(part)} bytes long, a request may have {most}: "
                "give it fewer or simpler polygons"
            )
        if parts and size + len(part) + 1 > most:
            yield parts
            parts, size = [], 2
        parts.append(part)
        size += len(part) + 1
    if parts:
        yield parts


def _json(item: Mapping[str, Any]) -> bytes:
    """Without spaces; ValueError when a number is not finite. pydantic's is four times quicker than Python's own."""
    part = to_json(item, inf_nan_mode="constants")
    if b"NaN" in part or b"Infinity" in part:  # numbers or texts
        return json.dumps(item, allow_nan=False, separators=(",", ":")).encode()
    return part


def _json_array(parts: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(parts) + b"]"


def _upload_chunks(paths: Sequence[Path]) -> Iterator[list[Path]]:
    chunk: list[Path] = []
    size = 0
    for path in paths:
        length = path.stat().st_size
        if chunk and (len(chunk) == _FILES_AN_UPLOAD or size + length > _BYTES_AN_UPLOAD):
            yield chunk
            chunk, size = [], 0
        chunk.append(path)
        size += length
    if chunk:
        yield chunk


def _integer(value: int | None) -> int:
    if value is None:
        raise LabelStudioError("Label Studio answered without an id; is it version 1.20 or later?")
    return value
