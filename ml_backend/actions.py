"""What people do on the dashboard: make a version the active one, forget a project. The worker does it.

Browsers send credentials along with a form of any page, so each form carries a token that only our own pages show.
"""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment

from ml_backend.db import ProjectRow
from ml_backend.errors import StoreUnavailableError
from ml_backend.forget import DATA_GOES, FORGOTTEN, forget
from ml_backend.inbox import check_known
from ml_backend.service import Service
from ml_backend.settings import Settings
from ml_backend.versions import request_activation
from model.errors import InvalidInputError, RegistryError

NO_FRAMES = {"Content-Security-Policy": "frame-ancestors 'none'", "X-Frame-Options": "DENY"}  # nobody clicks unseen


async def _fields(request: Request) -> dict[str, str]:
    return dict(parse_qsl((await request.body()).decode(errors="replace")))


Form = Annotated[dict[str, str], Depends(_fields)]


def form_token(settings: Settings) -> str:
    """The same in all web processes and after a restart; nobody can make it who does not know the API key."""
    return hmac.new(settings.require_api_key().encode(), b"forms of the dashboard", hashlib.sha256).hexdigest()


def add_actions(app: FastAPI, service: Service, pages: Environment) -> None:
    """Add the routes."""
    token = form_token(service.settings)

    def answer(title: str, message: str, *, status: int = 200, action: str = "") -> Response:
        page = pages.get_template("message.html").render(title=title, message=message, token=token, action=action)
        return HTMLResponse(page, status_code=status, headers=NO_FRAMES)

    def name_of(project_key: str) -> str:
        """The title, as the dashboard shows it, and the key."""
        with service.database.session() as session:
            row = session.get(ProjectRow, project_key)
        return f'"{row.title}" ({project_key})' if row and row.title else project_key

    def check_token(form: Mapping[str, str]) -> None:
        if not hmac.compare_digest(form.get("token", "").encode(), token.encode()):
            raise InvalidInputError("this form is not from this dashboard: open the dashboard anew and press there")

    @app.post("/projects/{project_key}/activate", response_class=HTMLResponse)
    def activate(project_key: str, form: Form) -> Response:
        """Ask for a version (form fields `version` and `token`) to be the active one."""
        try:
            check_token(form)
            request_activation(service, project_key, form.get("version", ""), "asked for on the dashboard")
        except (InvalidInputError, RegistryError, StoreUnavailableError) as error:
            status = 503 if isinstance(error, StoreUnavailableError) else 422
            return answer("This version cannot be used now", str(error), status=status)
        return RedirectResponse("../../ui", status_code=303)

    @app.get("/projects/{project_key}/forget", response_class=HTMLResponse)
    def ask(project_key: str) -> Response:
        """What forgetting a project means, with the button that does it."""
        try:
            check_known(service.database, project_key)
        except InvalidInputError as error:
            return answer("This project cannot be forgotten", str(error), status=422)
        return answer("Forget this project?", _FORGETTING.format(name=name_of(project_key)), action="forget")

    @app.post("/projects/{project_key}/forget", response_class=HTMLResponse)
    def forget_project(project_key: str, form: Form) -> Response:
        """Forget a project (form fields `token` and, to remove its data too, `delete_data`)."""
        name = name_of(project_key)
        try:
            check_token(form)
            forget(service, project_key, delete_data="delete_data" in form)
        except InvalidInputError as error:
            return answer("This project cannot be forgotten", str(error), status=422)
        told = FORGOTTEN.format(key=name)
        return answer("Forgotten", f"{told} {DATA_GOES}" if "delete_data" in form else told)


_FORGETTING = (
    "Project {name} disappears from the dashboard, what runs for it ends, and the worker leaves it alone. Its versions "
    "and its history stay on the disk unless you tick the box: connected again, the project goes on where it was. "
    "What Label Studio holds stays as it is. Remove the connection there, too (project settings > Model)."
)
