"""Label Studio's two kinds of token: what a request must carry, and what to do when one is refused."""

import base64
import binascii
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from ml_backend.errors import LabelStudioAuthError

_RENEW_BEFORE_SECONDS = 30.0
_LEGACY_LENGTH = 40  # characters

_Exchange = Callable[[str], str]  # a refresh token -> an access token


class Credentials:
    """A legacy token: sent as it is."""

    kind = "legacy token"
    renewable = False

    def __init__(self, token: str) -> None:
        self._token = token

    def header(self, exchange: _Exchange) -> str:
        """The Authorization header; `exchange` asks Label Studio for an access token."""
        return f"Token {self._token}"

    def forget_access(self) -> None:
        """Nothing to forget: a legacy token is not exchanged."""

    def refusal(self, url: str, answer: str) -> str:
        """What to do when Label Studio at `url` has refused the token with this answer."""
        if "legacy token authentication has been disabled" in answer:
            return (
                f"{url}: legacy tokens are switched off in this organisation. Make a personal access token (Account & "
                "Settings > Personal Access Token) and set LABEL_STUDIO_API_KEY to it, or switch legacy tokens on "
                "(Organization > API Tokens Settings)."
            )
        length = len(self._token)
        doubt = "" if length == _LEGACY_LENGTH else f" but has {length} characters instead of {_LEGACY_LENGTH}"
        return (
            f"{url}: Label Studio refused the token, which looks like a legacy token{doubt}. Copy it again from "
            f"Account & Settings, or set LABEL_STUDIO_API_KEY to a personal access token. Label Studio said: {answer}"
        )

    def scrub(self, text: str) -> str:
        """The text without the token."""
        return text.replace(self._token, "[token]")


class PersonalAccessToken(Credentials):
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


def read_credentials(api_key: str) -> Credentials:
    """Whichever kind of token it is; LabelStudioAuthError when it cannot be one."""
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
    return PersonalAccessToken(token) if kind == "refresh" else Credentials(token)


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
