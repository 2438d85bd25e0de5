"""The web process: answers Label Studio at once and shows people what goes on. It never trains.

`python -m ml_backend.app` for the settings' host and port, or
`uvicorn --timeout-graceful-shutdown 10 --factory ml_backend.app:create_app`.
"""

import gc
import logging
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader
from pydantic import BaseModel, Field

from ml_backend import inbox
from ml_backend.access import HEADERS, Access, refuse_other_sites
from ml_backend.actions import NO_FRAMES, add_actions, form_token
from ml_backend.errors import (
    DatabaseAwayError,
    LabelConfigError,
    LabelStudioAuthError,
    LabelStudioUnavailableError,
    SettingsError,
    StoreUnavailableError,
    TooManyTasksError,
)
from ml_backend.forget import forgotten_projects
from ml_backend.gatekeeper import Gatekeeper
from ml_backend.inbox import ProjectName
from ml_backend.label_config import parse_label_config
from ml_backend.logs import start_logging
from ml_backend.ls_format import Json
from ml_backend.overview import overview, progress_title, worker_overview
from ml_backend.predictor import UNTRAINED, Predictor
from ml_backend.recorder import EventRecorder
from ml_backend.service import Service
from ml_backend.settings import Settings
from ml_backend.sign_of_life import TokenCheck
from model.config import FEWEST_IMAGES
from model.errors import DiskFullError, InvalidInputError, TSPError

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 100_000_000  # Label Studio sends all selected tasks in one request, or 5000 imported ones
_LAST_ANSWERS_SECONDS = 10  # when the process ends; an event may wait for the database for ever
_REMEMBERS_SECONDS = 2.0  # which version the object store says is the active one
_LABEL_STUDIO = "heartex/"  # how its user agent begins
_LONGEST_REASON = 400  # characters of an address
_MOST_PROBLEMS = 10  # of a malformed request that are told


class SetupRequest(BaseModel):
    """What Label Studio sends when a backend is connected, and often afterwards. Its access token is not read."""

    project: str
    # Named so that it does not hide a method of pydantic's.
    label_config: str = Field("", alias="schema")


class PredictRequest(BaseModel):
    """Tasks to predict; `project` is "<id>.<unix time of its creation>"."""

    tasks: list[dict[str, Any]]
    project: str
    label_config: str = ""
    params: dict[str, Any] | None = None


class WebhookRequest(BaseModel):
    """An event of Label Studio. Only who and what is read: what is true, Label Studio is asked."""

    action: str = Field(max_length=100, pattern="^[A-Z_]+$")
    project: dict[str, Any]


def create_app(settings: Settings | None = None, *, after_first_load: Callable[[], object] = lambda: None) -> FastAPI:
    """The ASGI application, with the settings of the environment unless some are given. Weights, and torch, are loaded
    when somebody first asks for a prediction by a version; `after_first_load` is called then."""
    settings = settings or Settings.from_environment()
    service = Service.connect(settings, remembers_seconds=_REMEMBERS_SECONDS)
    predictor = Predictor(service, after_first_load=after_first_load)
    access = Access(settings)
    recorder = EventRecorder(service.database)
    token = TokenCheck(service.label_studio)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        token.start(every_seconds=settings.reconcile_seconds)
        yield
        token.stop()
        recorder.close()
        service.close()

    app = FastAPI(title="TSP active learning", description=__doc__, version="0.1.0", lifespan=lifespan)
    app.add_middleware(Gatekeeper, checks=(refuse_other_sites, access.check, _refuse_huge_bodies), headers=HEADERS)
    app.add_exception_handler(RequestValidationError, _refuse_malformed)
    for kind, code in _STATUS_OF.items():
        app.add_exception_handler(kind, _answer_with(code))

    _answer_label_studio(app, service, predictor, recorder)
    _answer_people(app, service, access, recorder, token)
    return app


def _answer_label_studio(app: FastAPI, service: Service, predictor: Predictor, recorder: EventRecorder) -> None:
    """Add the routes that Label Studio calls."""

    @app.get("/health")
    def health() -> Json:
        """Alive and the database answers. Label Studio waits one second."""
        service.database.ping()
        return {"status": "UP", "model_class": "TSPBackend"}

    @app.post("/setup")
    def setup(request: SetupRequest) -> Json:
        """Remember the project; refuse a labelling configuration that nothing can be drawn with."""
        name = _project_name(request.project)
        parse_label_config(request.label_config, from_name=service.settings.from_name)
        version = predictor.version(name.key)  # first: where the store is away, nothing is connected
        inbox.remember_project(service.database, name, connected=True)
        return {"model_version": version}

    @app.get("/refused/{reason}")
    def refused(reason: str) -> Json:
        """Where Label Studio is sent when /setup refuses: of an error it shows people nothing but the address."""
        raise LabelConfigError(reason)

    @app.post("/predict")
    def predict(request: PredictRequest, user_agent: Annotated[str, Header()] = "") -> Json:
        """One prediction for each task; empty ones, quickly, before the first cycle.

        Label Studio then gets an empty list for each task: it would keep an empty prediction and show annotators a tab
        "untrained 0.00%" beside the image, also long after.
        """
        name = _project_name(request.project)
        results = predictor.predict(name.key, request.tasks, request.label_config)
        is_interactive = bool((request.params or {}).get("context"))
        if user_agent.startswith(_LABEL_STUDIO) and not is_interactive:
            return {"results": [[] if one["model_version"] == UNTRAINED else one for one in results]}
        return {"results": results}

    @app.post("/webhook")
    async def webhook(request: WebhookRequest, content_length: Annotated[int, Header()]) -> Json:
        """Record and return: Label Studio waits one second and never asks again."""
        project = ProjectName.from_webhook(request.project) or inbox.project_number(request.project)
        if project is None:
            raise InvalidInputError(
                "webhook: expected a project with id and created_at as Label Studio sends it, "
                f"got the keys {sorted(request.project)[:20]}"
            )
        await recorder.record(project, request.action, size=content_length)
        return {}


def _answer_people(app: FastAPI, service: Service, access: Access, recorder: EventRecorder, token: TokenCheck) -> None:
    """Add the dashboard, and what it shows as JSON."""

    @app.get("/")
    def root() -> RedirectResponse:
        return RedirectResponse("/ui")

    @app.get("/versions")
    def versions(project: str | None = None) -> Json:
        """The model versions of a project, the oldest first."""
        name = _project_name(project) if project else None
        return {"versions": service.registry.versions(name.key) if name else []}

    @app.get("/status")
    def status() -> Json:
        """What the dashboard shows, as JSON."""
        return {
            "worker": worker_overview(service),
            "label_studio": {"problem": token.problem},
            "events": {"problem": recorder.problem},
            "refused": access.overview(),
            "projects": overview(service),
        }

    folder = Path(__file__).parent / "ui"
    pages = Environment(loader=FileSystemLoader(folder), autoescape=True)
    add_actions(app, service, pages)

    @app.get("/ui/refresh.js", include_in_schema=False)
    def refresh() -> FileResponse:
        return FileResponse(folder / "refresh.js", media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    @app.get("/ui", response_class=HTMLResponse)
    def ui() -> Response:
        """The dashboard."""
        told = status()
        page = pages.get_template("ui.html").render(
            **told,
            progress=progress_title(told["projects"]) if told["worker"]["living"] else "",
            forgotten=forgotten_projects(service),
            fewest_images=FEWEST_IMAGES,
            token=form_token(service.settings),
        )
        return HTMLResponse(page, headers=NO_FRAMES)


_STATUS_OF: dict[type[Exception], int] = {
    LabelConfigError: 422,
    InvalidInputError: 422,
    LabelStudioUnavailableError: 503,
    LabelStudioAuthError: 502,
    DatabaseAwayError: 503,
    DiskFullError: 503,
    StoreUnavailableError: 503,
    TooManyTasksError: 503,
    TSPError: 500,
}


def _answer_with(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        logger.warning("%s %s: %s", request.method, request.url.path, error)
        if request.scope["path"] == "/setup" and request.headers.get("user-agent", "").startswith(_LABEL_STUDIO):
            return RedirectResponse(f"refused/{_as_address(str(error))}", status_code=303)  # Label Studio follows
        return _refusal(str(error), status)

    return answer


async def _refuse_malformed(request: Request, error: Exception) -> Response:
    """What is wrong where. What came is not repeated: it may be a token, and may have no JSON form (NaN)."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    told = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems[:_MOST_PROBLEMS]]
    return _refusal("; ".join(told), 422)


def _refusal(detail: str, status: int) -> Response:
    """Without lone surrogates, which a request can smuggle into a message and which no answer can hold."""
    return JSONResponse({"detail": detail.encode(errors="replace").decode()}, status_code=status)


def _as_address(message: str) -> str:
    """The first line of a message, readable as a part of an address."""
    return re.sub(r"[^\w.,:;=$()'-]+", "-", message.partition("\n")[0], flags=re.ASCII)[:_LONGEST_REASON].strip("-")


def _refuse_huge_bodies(request: Request) -> Response | None:
    """A body is read into memory as a whole, so its length must be known and bearable before."""
    length = request.headers.get("content-length", "0" if request.method in ("GET", "HEAD") else "")
    if not length.isdecimal():
        return JSONResponse({"detail": "expected a Content-Length header"}, status_code=411)
    if int(length) > _MAX_BODY_BYTES:
        detail = f"expected a body of at most {_MAX_BODY_BYTES} bytes, {length} are announced: send fewer tasks at once"
        return JSONResponse({"detail": detail}, status_code=413)
    return None


def _project_name(uid: str) -> ProjectName:
    name = ProjectName.from_uid(uid)
    if name is None:
        raise InvalidInputError(f"project: expected '<id>.<unix time of its creation>', got {uid!r}")
    return name


def _keep_out_of_collections() -> None:
    """What stays for good, torch above all, is not looked through again while Label Studio waits."""
    gc.collect()
    gc.freeze()


def _refuse_taken_port(settings: Settings) -> None:
    """SettingsError when nobody can listen at TSP_HOST and PORT."""
    host, port = settings.host, settings.port
    try:
        for family, *_ in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise SettingsError(
            f"TSP_HOST and PORT: cannot listen at {host}, port {port} ({error.strerror}): choose others, or stop what "
            "listens there"
        ) from error


def main() -> None:
    """Serve with the settings of the environment."""
    try:
        settings = Settings.from_environment()
        _refuse_taken_port(settings)
        app = create_app(settings, after_first_load=_keep_out_of_collections)
    except TSPError as error:
        sys.exit(str(error))
    start_logging(settings)
    _keep_out_of_collections()
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level.lower(),
        timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
    )


if __name__ == "__main__":
    main()
