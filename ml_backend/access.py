"""Who may ask the web process what: a user name and a password for every route but /health, or for /webhook the secret
that the worker gives to Label Studio's webhook. Who is refused is counted, because Label Studio tells nobody."""

import base64
import logging
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ml_backend.db import utc_now
from ml_backend.settings import Settings
from ml_backend.webhook_secret import HEADER, webhook_secret

logger = logging.getLogger(__name__)

_SHOWN_FOR = timedelta(days=1)
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

_ADVICE = {
    "/webhook": (
        "neither user name and password nor the secret of this backend came. The worker gives the secret to the "
        "webhook of a connected backend within TSP_RECONCILE_SECONDS. Compare user name and password in Label Studio "
        "(Settings > Model > Edit) with BASIC_AUTH_USER and BASIC_AUTH_PASS, and delete webhooks made by hand "
        "(Settings > Webhooks). Until then annotations are noticed every TSP_RECONCILE_SECONDS only"
    ),
    "/setup": (
        "user name or password are missing or wrong. Set BASIC_AUTH_USER and BASIC_AUTH_PASS in Label Studio, too "
        "(Settings > Model > Edit)"
    ),
}
_ADVICE["/predict"] = _ADVICE["/setup"]

# No other site may show our pages inside its own.
HEADERS = {"X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff"}


@dataclass
class _Refusals:
    count: int = 0
    last_at: str = ""


class Access:
    """Checks for the gatekeeper. Refusals are counted in memory, a number for each of Label Studio's routes: a
    stranger can make them grow, but nothing else."""

    def __init__(self, settings: Settings) -> None:
        self._password: list[bytes] = []
        if settings.basic_auth_user is not None and settings.basic_auth_pass is not None:
            credentials = f"{settings.basic_auth_user}:{settings.basic_auth_pass.get_secret_value()}"
            # Label Studio sends an "ä" in Latin-1, browsers in UTF-8.
            encoded = (credentials.encode(), credentials.encode("latin-1", errors="backslashreplace"))
            self._password = [b"Basic " + base64.b64encode(one) for one in encoded]
        self._secret = (webhook_secret(settings) or "").encode()
        self._refused = {path: _Refusals() for path in _ADVICE}

    def check(self, request: Request) -> Response | None:
        """401 for whoever brings neither password nor secret, when a password is set."""
        path = request.scope["path"]
        if not self._password or path == "/health" or self._is_known(request, path):
            return None
        self._count(path)
        return JSONResponse(
            {"detail": "user name and password are needed: set them in Label Studio where the backend is connected"},
            status_code=401,
            headers={"WWW-Authenticate": "Basic"},
        )

    def _is_known(self, request: Request, path: str) -> bool:
        given = request.headers.get("authorization", "").encode()
        known = [secrets.compare_digest(given, right) for right in self._password]
        if path == "/webhook":
            known.append(secrets.compare_digest(request.headers.get(HEADER, "").encode(), self._secret))
        return any(known)

    def _count(self, path: str) -> None:
        refused = self._refused.get(path)
        if refused is None:
            return
        if not refused.count:
            logger.warning("a request to %s was refused: %s.", path, _ADVICE[path])
        refused.count += 1
        refused.last_at = utc_now()

    def overview(self) -> dict[str, Any]:
        """How many requests to Label Studio's routes were refused since the start, and what to do about it ("" when the
        last one is long ago)."""
        recent = [
            f"{refused.count} request{'s' if refused.count != 1 else ''} to {path} "
            f"{'were' if refused.count != 1 else 'was'} refused, the last one at {refused.last_at[:19]} UTC: "
            f"{_ADVICE[path]}."
            for path, refused in self._refused.items()
            if refused.count and datetime.now(UTC) - datetime.fromisoformat(refused.last_at) < _SHOWN_FOR
        ]
        counts = {path: {"count": refused.count, "last_at": refused.last_at} for path, refused in self._refused.items()}
        return {"problem": "\n".join(recent), "requests": counts}


def refuse_other_sites(request: Request) -> Response | None:
    """403 for what a page of another site makes a browser send: the browser adds the password by itself."""
    if request.method in _SAFE_METHODS or not _is_from_another_site(request):
        return None
    return JSONResponse({"detail": "expected a request from a page of this backend"}, status_code=403)


def _is_from_another_site(request: Request) -> bool:
    """As browsers tell it; programs such as Label Studio say nothing. Over http, browsers send `Origin` alone."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    if origin is None:
        return False
    hosts = (request.headers.get("host"), request.headers.get("x-forwarded-host"))
    return _netloc(origin) not in hosts


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
