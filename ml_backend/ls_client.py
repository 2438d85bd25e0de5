"""The only caller of Label Studio's API: one authenticated connection, shared by label-studio-sdk and by the calls that
the SDK lacks. What Label Studio really answers was observed on 1.23.2."""

import base64
import binascii
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from ml_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailableError

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
_MAX_REQUEST_BYTES = 250_000_000  # DATA_UPLOAD_MAX_MEMORY_SIZE of a stock Label Studio
_LONG_SECONDS = 3600.0  # bulk imports and deletions are one synchronous request


@dataclass(frozen=True, kw_only=True)
class Project:
    """`model_version` is "" when none is chosen. `task_count` and `prediction_count` are Label Studio's own counters.

    There is no counter of annotated tasks here: Label Studio's leaves imported (ground truth) annotations out;
    ask `count_annotated_tasks`.
    """

    id: int
    title: str
    label_config: str
    model_version: str
    sampling: str
    maximum_annotations: int
    shows_predictions: bool
    created_at: datetime
    task_count: int
    annotation_count: int
    prediction_count: int

    @property
    def uid(self) -> str:
        """The name under which Label Studio presents the project to a backend: "<id>.<unix time of its creation>"."""
        return f"{self.id}.{int(self.created_at.timestamp())}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task without its annotations; `data` as it was imported (cloud addresses are not resolved).

    `annotation_count` leaves skipped annotations and drafts out; `updated_at` moves with every annotation that is
    created, changed or deleted.
    """

    id: int
    data: dict[str, Any]
    annotation_count: int
    skip_count: int
    updated_at: datetime

    @property
    def is_annotated(self) -> bool:
        """At least one annotation that is neither skipped nor a draft."""
        return self.annotation_count > 0


@dataclass(frozen=True, kw_only=True)
class MLBackend:
    """A connected backend. `state`: "CO" connected, "DI" disconnected, "ER" error, "TR" training, "PR" predicting."""

    id: int
    url: str
    title: str
    state: str
    error_message: str
    model_version: str
    basic_auth_user: str = ""


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """A project's webhook. Its headers are left out on purpose: they hold the shared secret."""

    id: int
    url: str
    is_active: bool
    sends_all_actions: bool
    actions: tuple[str, ...]


def counted_annotations(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The annotations of an exported task that count: neither skipped nor drafts (those sit under `drafts`)."""
    return [annotation for annotation in task["annotations"] if not annotation["was_cancelled"]]


class LabelStudioClient:
    """Label Studio at `url`, as the user who owns `api_key` (a personal access token or a legacy token).

    `public_url` is the address that Label Studio writes into absolute links (its LABEL_STUDIO_HOST), where it differs
    from `url`. Safe to share between threads. Every method raises LabelStudioAuthError (the token was refused),
    LabelStudioUnavailableError (not reachable, 429 or 5xx: worth trying again later) or LabelStudioError (any other
    answer that cannot be worked with). What is safe to repeat has been repeated a few times by then.
    """

    def __init__(self, url: str, api_key: str, *, timeout_seconds: float = 60.0, public_url: str | None = None) -> None:
        self._http = _Http(url=url, credentials=_read_credentials(api_key), timeout_seconds=timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self.url = str(self._http.base_url).rstrip("/")
        self._public_url = httpx.URL(_base_url(public_url or url))

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
        """The e-mail address of the token's owner; the cheapest way to try a token."""
        return str(self._sdk.users.whoami().email)

    def project(self, project_id: int) -> Project:
        return _project(self._sdk.projects.get(project_id))

    def projects(self) -> list[Project]:
        answers: Iterator[Any] = iter(self._sdk.projects.list())
        found: list[Project] = []
        with suppress(_NotFoundError):  # the SDK reads on until the page past the end
            found.extend(map(_project, answers))
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

    def tasks(self, project_id: int, *, after_id: int = 0) -> Iterator[Task]:
        """The tasks with an id above `after_id`, by id. Label Studio takes 0.6 to 2.5 ms for each (it loads the
        bodies of all annotations and predictions to leave them out)."""
        fields = "id,data,total_annotations,cancelled_annotations,updated_at"
        for row in self._rows(project_id, filters=[], fields=fields, after_id=after_id):
            yield Task(
                id=row["id"],
                data=row["data"],
                annotation_count=row["total_annotations"],
                skip_count=row["cancelled_annotations"],
                updated_at=datetime.fromisoformat(row["updated_at"]),
            )

    def annotated_task_ids(self, project_id: int) -> frozenset[int]:
        """The tasks with an annotation that is neither skipped nor a draft; imported ground truth does count."""
        return frozenset(row["id"] for row in self._rows(project_id, filters=[_HAS_ANNOTATION], fields="id"))

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
            yield from rows
            if len(rows) >= answer["total"]:
                return
            after_id = rows[-1]["id"]

    def _count(self, project_id: int, *, filters: list[dict[str, Any]]) -> int:
        return int(self._data_manager(project_id, filters=filters, fields="id", page_size=1)["total"])

    def _data_manager(
        self, project_id: int, *, filters: list[dict[str, Any]], fields: str, page_size: int
    ) -> dict[str, Any]:
        query = {"filters": {"conjunction": "and", "items": filters}, "ordering": ["tasks:id"]}
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
        self, project_id: int, predictions: Sequence[dict[str, Any]], *, max_request_bytes: int = 32_000_000
    ) -> int:
        """Import `{"task", "result", "score", "model_version"}` in bulk; returns how many Label Studio says it created.

        Compare that with what was sent: invalid ones (a score outside [0, 1], an unknown label, points beyond 100)
        are dropped without an error. Each request costs Label Studio a count of the whole project (115 s at 100,000
        tasks), so few large ones are quicker than many. A request that broke off is not repeated: Label Studio goes
        on working on it, and a second one would store every prediction twice. Ask `predicted_task_ids` what arrived.
        """
        path = f"/api/projects/{project_id}/import/predictions"
        created = 0
        for body in _json_arrays(predictions, max_bytes=min(max_request_bytes, _MAX_REQUEST_BYTES)):
            answer = self._http.json("POST", path, content=body, headers=_JSON_BODY, timeout=_LONG_SECONDS)
            created += int(answer["created"])
        return created

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
        return [_ml_backend(answer) for answer in self._sdk.ml.list(project=project_id)]

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
                return _ml_backend(self._sdk.ml.update(known.id, **fields))  # without url and project: a 500
        return _ml_backend(self._sdk.ml.create(**fields))

    def webhooks(self, project_id: int) -> list[Webhook]:
        return [_webhook(answer) for answer in self._sdk.webhooks.list(project=str(project_id))]

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
            return _webhook(self._sdk.webhooks.update(known[0].id, **settings))
        return _webhook(self._sdk.webhooks.create(project=project_id, **settings))

    def webhooks_without(self, project_id: int, headers: Mapping[str, str]) -> list[Webhook]:
        """The project's webhooks that do not send these headers."""
        hooks = self._sdk.webhooks.list(project=str(project_id))
        return [_webhook(hook) for hook in hooks if not headers.items() <= (hook.headers or {}).items()]

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
        except _NotFoundError:
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
            return _below(self._http.base_url, path_or_url) or path_or_url
        try:
            url = httpx.URL(path_or_url)
        except httpx.InvalidURL:
            return None
        for base in (self._http.base_url, self._public_url):
            path = _below(base, url.raw_path.decode()) if _same_origin(url, base) else None
            if path is not None:
                return path
        return None

    @contextmanager
    def download(self, path_or_url: str) -> Iterator[httpx.Response]:
        """A file on Label Studio's own host, as an open response: read it by `iter_bytes`. A redirect (presigned cloud
        addresses) is handed back, not followed, so the token cannot travel with it."""
        path = self.own_path(path_or_url)
        if path is None:
            raise LabelStudioError(f"expected an address on {self.url}, got {_without_query(path_or_url)}")
        try:
            with self._http.open_file(path) as response:
                yield response
        except httpx.TransportError as error:
            raise LabelStudioUnavailableError(f"{_without_query(path)}: the download broke off ({error})") from error


_JSON_BODY = {"Content-Type": "application/json"}
_HAS_ANNOTATION = {"filter": "filter:tasks:total_annotations", "operator": "greater", "type": "Number", "value": 0}
_LISTED_VERSIONS_LIMIT = 500 - 50  # the Data Manager cuts the list of versions at 500 characters, then respaces it


def _id_above(task_id: int) -> dict[str, Any]:
    return {"filter": "filter:tasks:id", "operator": "greater", "type": "Number", "value": task_id}


def _json_arrays(items: Sequence[dict[str, Any]], *, max_bytes: int) -> Iterator[bytes]:
    """JSON arrays of the items in order, none of them longer than `max_bytes`."""
    parts: list[bytes] = []
    size = 2
    for item in items:
        part = json.dumps(item, allow_nan=False, separators=(",", ":")).encode()
        if len(part) + 2 > max_bytes:
            raise LabelStudioError(
                f"the prediction of task {item.get('task')} is {len(part)} bytes long, a request may have {max_bytes}: "
                "give it fewer or simpler polygons"
            )
        if size + len(part) + 1 > max_bytes:
            yield b"[" + b",".join(parts) + b"]"
            parts, size = [], 2
        parts.append(part)
        size += len(part) + 1
    if parts:
        yield b"[" + b",".join(parts) + b"]"


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


def _project(answer: Any) -> Project:
    return Project(
        id=answer.id,
        title=answer.title or "",
        label_config=answer.label_config or "",
        model_version=answer.model_version or "",
        sampling=answer.sampling or "",
        maximum_annotations=answer.maximum_annotations or 1,
        shows_predictions=bool(answer.show_collab_predictions),
        created_at=answer.created_at,
        task_count=answer.task_number or 0,
        annotation_count=answer.total_annotations_number or 0,
        prediction_count=answer.total_predictions_number or 0,
    )


def _ml_backend(answer: Any) -> MLBackend:
    return MLBackend(
        id=answer.id,
        url=answer.url,
        title=answer.title or "",
        state=answer.state or "",
        error_message=answer.error_message or "",
        model_version=answer.model_version or "",
        basic_auth_user=answer.basic_auth_user or "",
    )


def _webhook(answer: Any) -> Webhook:
    return Webhook(
        id=answer.id,
        url=answer.url,
        is_active=bool(answer.is_active),
        sends_all_actions=bool(answer.send_for_all_actions),
        actions=tuple(answer.actions or ()),
    )


def _integer(value: int | None) -> int:
    if value is None:
        raise LabelStudioError("Label Studio answered without an id; is it version 1.20 or later?")
    return value


# The connection

_PAUSES_SECONDS = (0.5, 1.0, 2.0)
_REPEATABLE = frozenset({"GET", "HEAD", "PATCH"})  # our PATCHes set values: twice is the same as once
_RENEW_BEFORE_SECONDS = 30.0


class _NotFoundError(LabelStudioError):
    """Label Studio answered 404."""


class _Http(httpx.Client):
    """Every request to Label Studio passes `send`: it adds the token, repeats what it may, and names the errors."""

    def __init__(self, *, url: str, credentials: "_Credentials", timeout_seconds: float) -> None:
        base = _base_url(url)
        super().__init__(
            base_url=base,
            timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, 10.0)),
            follow_redirects=False,
            # A session cookie would go on to work when the token no longer does.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
        self._credentials = credentials

    def json(self, method: str, path: str, **options: Any) -> Any:
        response = self.request(method, path, **options)
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise LabelStudioError(
                f"{method} {path}: expected JSON, got {len(response.content)} bytes of something else"
            ) from error

    def open_file(self, path: str) -> AbstractContextManager[httpx.Response]:
        return self.stream("GET", path, extensions={"is_file": True})

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        response = self._send_patiently(request, authorized=True, **options)
        if response.status_code == 401 and self._credentials.renewable:
            response.close()
            self._credentials.forget_access()
            response = self._send_patiently(request, authorized=True, **options)
        self._check(request, response)
        return response

    def _send_patiently(self, request: httpx.Request, *, authorized: bool, **options: Any) -> httpx.Response:
        """The answer, whatever its status; a few tries where a repetition cannot do harm."""
        pauses = iter(_PAUSES_SECONDS)
        while True:
            pause = next(pauses, None)
            try:
                if authorized:
                    self._authorize(request)
                response = super().send(request, **options)
            except httpx.TransportError as error:
                if pause is None or not _may_repeat_after(request, error):
                    raise _broken_off(request, error) from error
                trouble = str(error) or type(error).__name__
            else:
                if pause is None or not (_is_unavailable(response.status_code) and _may_repeat(request)):
                    return response
                response.close()
                trouble = f"status {response.status_code}"
            logger.info("%s: %s, trying again in %s s", _described(request), trouble, pause)
            time.sleep(pause)

    def _authorize(self, request: httpx.Request) -> None:
        if not _same_origin(request.url, self.base_url):
            raise LabelStudioError(f"the token is for {self.base_url} only, not for {request.url.host}")
        request.headers["Authorization"] = self._credentials.header(self._exchange)

    def _exchange(self, refresh_token: str) -> str:
        request = self.build_request("POST", "/api/token/refresh/", json={"refresh": refresh_token})
        request.extensions["may_repeat"] = True
        response = self._send_patiently(request, authorized=False)
        self._check(request, response)
        access = response.json().get("access")
        if not isinstance(access, str):
            raise LabelStudioError(f"{_described(request)}: expected an access token, got {self._excerpt(response)}")
        return access

    def _check(self, request: httpx.Request, response: httpx.Response) -> None:
        """Raise what the status means; an answer of 2xx, and a file's redirect, pass."""
        is_file = "is_file" in request.extensions
        status = response.status_code
        if response.is_success and (is_file or _is_json(response)):
            return
        if response.has_redirect_location and is_file:
            return
        response.read()
        response.close()
        what = f"{_described(request)}: Label Studio answered {status}"
        if status == 401:
            raise LabelStudioAuthError(self._credentials.refusal(str(self.base_url), self._excerpt(response)))
        # A 500 for a file is about that file (Label Studio's answer to an upload that is gone), not about the server.
        if _is_unavailable(status) and not (is_file and status == 500):
            raise LabelStudioUnavailableError(f"{what}: {self._excerpt(response)}")
        if status == 404:
            raise _NotFoundError(f"{what}: {self._excerpt(response)}")
        if response.is_redirect:
            target = _without_query(response.headers.get("location", ""))
            raise LabelStudioError(f"{what} with a redirect to {target}: set LABEL_STUDIO_URL to the address behind it")
        if response.is_success:
            raise LabelStudioError(f"{what} but not in JSON; is {self.base_url} really Label Studio's address?")
        raise LabelStudioError(f"{what}: {self._excerpt(response)}")

    def _excerpt(self, response: httpx.Response) -> str:
        """What the answer says, in 500 characters at most, without our token."""
        text = response.text
        if _is_json(response) and text:
            body = response.json()
            if isinstance(body, dict) and "detail" in body:
                text = json.dumps({key: body[key] for key in ("detail", "validation_errors") if body.get(key)})
        return self._credentials.scrub(" ".join(text.split()))[:500]


def _base_url(url: str) -> str:
    try:
        base = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise LabelStudioError(
            f"expected Label Studio's address such as http://localhost:8080, got {url!r}: {error}"
        ) from error
    if base.scheme not in ("http", "https") or not base.host:
        raise LabelStudioError(f"expected Label Studio's address such as http://localhost:8080, got {url!r}")
    return str(base.copy_with(query=None, fragment=None, userinfo=b"")).rstrip("/")


def _same_origin(url: httpx.URL, other: httpx.URL) -> bool:
    return (url.scheme, url.host, _port(url)) == (other.scheme, other.host, _port(other))


def _port(url: httpx.URL) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)


def _may_repeat(request: httpx.Request) -> bool:
    return request.method in _REPEATABLE or "may_repeat" in request.extensions


def _may_repeat_after(request: httpx.Request, error: httpx.TransportError) -> bool:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return True  # nothing was sent
    if isinstance(error, httpx.TimeoutException):
        return False  # more requests would not make it quicker
    return _may_repeat(request)


def _is_unavailable(status: int) -> bool:
    return status == 429 or status >= 500


def _is_json(response: httpx.Response) -> bool:
    return response.status_code == 204 or "json" in response.headers.get("content-type", "")


def _broken_off(request: httpx.Request, error: httpx.TransportError) -> LabelStudioUnavailableError:
    reason = str(error) or type(error).__name__
    sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) or request.method in ("GET", "HEAD")
    doubt = "" if sent else "; Label Studio may have carried it out all the same"
    return LabelStudioUnavailableError(
        f"{_described(request)}: no answer from Label Studio ({reason}){doubt}; is it running and is the address right?"
    )


def _described(request: httpx.Request) -> str:
    return f"{request.method} {_without_query(str(request.url))}"


def _below(base: httpx.URL, path: str) -> str | None:
    """What comes after the base's own path ("/label-studio" behind some proxies), None when `path` is not below it."""
    prefix = base.raw_path.decode().rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else None


def _without_query(url: str) -> str:
    return url.partition("?")[0][:300]


# The token

_Exchange = Callable[[str], str]  # a refresh token -> an access token


class _Credentials:
    """A legacy token: sent as it is."""

    kind = "legacy token"
    renewable = False

    def __init__(self, token: str) -> None:
        self._token = token

    def header(self, exchange: _Exchange) -> str:
        return f"Token {self._token}"

    def forget_access(self) -> None:
        """Nothing to forget: a legacy token is not exchanged."""

    def refusal(self, url: str, answer: str) -> str:
        if "legacy token authentication has been disabled" in answer:
            return (
                f"{url}: legacy tokens are switched off in this organisation. Make a personal access token (Account & "
                "Settings > Personal Access Token) and set LABEL_STUDIO_API_KEY to it, or switch legacy tokens on "
                "(Organization > API Tokens Settings)."
            )
        return (
            f"{url}: Label Studio refused the token, which looks like a legacy token ({len(self._token)} characters; "
            f"theirs have 40). Copy it again from Account & Settings, or set LABEL_STUDIO_API_KEY to a personal access "
            f"token. Label Studio said: {answer}"
        )

    def scrub(self, text: str) -> str:
        return text.replace(self._token, "[token]")


class _PersonalAccessToken(_Credentials):
    """A JWT refresh token: exchanged for access tokens, which live 5 minutes."""

    kind = "personal access token"
    renewable = True

    def __init__(self, token: str) -> None:
        super().__init__(token)
        self._lock = threading.Lock()
        self._access = ""
        self._renew_at = 0.0

    def header(self, exchange: _Exchange) -> str:
        with self._lock:
            if not self._access or time.monotonic() >= self._renew_at:
                self._access = exchange(self._token)
                self._renew_at = time.monotonic() + _lifetime_seconds(self._access) - _RENEW_BEFORE_SECONDS
            return f"Bearer {self._access}"

    def forget_access(self) -> None:
        with self._lock:
            self._access = ""

    def refusal(self, url: str, answer: str) -> str:
        return (
            f"{url}: Label Studio refused the token, which looks like a personal access token: it was revoked, has "
            "expired or belongs to another server. Make a new one (Account & Settings > Personal Access Token) and set "
            f"LABEL_STUDIO_API_KEY to it. Label Studio said: {answer}"
        )

    def scrub(self, text: str) -> str:
        scrubbed = super().scrub(text)
        return scrubbed.replace(self._access, "[token]") if self._access else scrubbed


def _read_credentials(api_key: str) -> _Credentials:
    token = api_key.strip()
    if not token:
        raise LabelStudioAuthError(
            "no Label Studio token: set LABEL_STUDIO_API_KEY to a personal access token (Label Studio: Account & "
            "Settings > Personal Access Token)"
        )
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise LabelStudioAuthError(
            "the Label Studio token has blanks or characters that no token has: copy it again to LABEL_STUDIO_API_KEY"
        )
    kind = _jwt_payload(token).get("token_type")
    if kind == "access":
        raise LabelStudioAuthError(
            "the Label Studio token is an access token, which dies after 5 minutes: set LABEL_STUDIO_API_KEY to the "
            "personal access token that it was made from"
        )
    return _PersonalAccessToken(token) if kind == "refresh" else _Credentials(token)


def _lifetime_seconds(access_token: str) -> float:
    """From the token's own two times, so that a clock that differs from Label Studio's does no harm."""
    payload = _jwt_payload(access_token)
    issued, expires = payload.get("iat"), payload.get("exp")
    if not isinstance(issued, int | float) or not isinstance(expires, int | float):
        return 0.0  # unreadable: exchange before each request, which is slow but right
    return expires - issued


def _jwt_payload(token: str) -> dict[str, Any]:
    """The unverified payload of a JSON web token (Label Studio verifies it); {} when it is none."""
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        payload = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return {}
    return payload if isinstance(payload, dict) else {}
