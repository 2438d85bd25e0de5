"""The connection to Label Studio: adds the token, repeats what may be repeated, and names the errors."""

import json
import logging
import time
from contextlib import AbstractContextManager, suppress
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from ml_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailableError
from ml_backend.ls_tokens import Credentials

logger = logging.getLogger(__name__)

_PAUSES_SECONDS = (0.5, 1.0, 2.0)
_LONGEST_PAUSE_SECONDS = 30.0  # Retry-After may ask for more, but people may be waiting
_PARSED = "parsed"  # where an answer keeps what its JSON says: large ones take seconds to parse
_REPEATABLE = frozenset({"GET", "HEAD", "PATCH"})  # our PATCHes set values: twice is the same as once


class NotFoundError(LabelStudioError):
    """Label Studio answered 404; `in_json`: its API did, and not whatever else answers at that address."""

    def __init__(self, message: str, *, in_json: bool) -> None:
        super().__init__(message)
        self.in_json = in_json


class TooLargeRequestError(LabelStudioError):
    """Something between us and Label Studio takes no request of this size (413)."""


class Http(httpx.Client):
    """Every request to Label Studio passes `send`. Raises what LabelStudioClient says; NotFoundError for 404,
    TooLargeRequestError for 413."""

    def __init__(self, *, url: str, credentials: Credentials, timeout_seconds: float) -> None:
        base = base_url(url)
        super().__init__(
            base_url=base,
            timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, 10.0)),
            follow_redirects=False,
            # A session cookie would go on to work when the token no longer does.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
        self._credentials = credentials

    def json(self, method: str, path: str, **options: Any) -> Any:
        """What the JSON answer says, None when it is empty."""
        response = self.request(method, path, **options)
        return response.extensions.get(_PARSED)

    def open_file(self, path: str) -> AbstractContextManager[httpx.Response]:
        """An answer that need not be JSON, to be read bit by bit; a redirect is handed back."""
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
                _check_whole(request, response)
            except httpx.RequestError as error:  # also of an answer that cannot be unpacked
                if pause is None or not _may_repeat_after(request, error):
                    raise _broken_off(request, error) from error
                trouble = str(error) or type(error).__name__
            else:
                if pause is None or not (_is_unavailable(response.status_code) and _may_repeat(request)):
                    return response
                response.close()
                trouble = f"status {response.status_code}"
                if authorized:  # all threads wait for an exchange: Label Studio is asked again soon
                    pause = max(pause, _wished_pause(response))
            logger.info("%s: %s, trying again in %s s", _described(request), trouble, pause)
            time.sleep(pause)

    def _authorize(self, request: httpx.Request) -> None:
        if not same_origin(request.url, self.base_url):
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
            raise NotFoundError(f"{what}: {self._excerpt(response)}", in_json=_is_json(response))
        if status == 413:
            size = request.headers.get("content-length", "so many")
            raise TooLargeRequestError(
                f"{what} to {size} bytes: let the proxy before Label Studio take requests of 180 MB "
                "(nginx: client_max_body_size 180m)"
            )
        if response.is_redirect:
            target = without_query(response.headers.get("location", ""))
            raise LabelStudioError(f"{what} with a redirect to {target}: set LABEL_STUDIO_URL to the address behind it")
        if response.is_success:
            raise LabelStudioError(f"{what} but not in JSON; is {self.base_url} really Label Studio's address?")
        raise LabelStudioError(f"{what}: {self._excerpt(response)}")

    def _excerpt(self, response: httpx.Response) -> str:
        """What the answer says, in 500 characters at most, without our token."""
        if "html" in response.headers.get("content-type", ""):
            return "a page of HTML"
        text = response.text
        with suppress(ValueError):  # no JSON, or half of it
            body = response.json()
            if isinstance(body, dict) and "detail" in body:
                text = json.dumps({key: body[key] for key in ("detail", "validation_errors") if body.get(key)})
        return self._credentials.scrub(" ".join(text.split()))[:500]


def base_url(url: str) -> str:
    """Label Studio's address without query, credentials and slash at the end; LabelStudioError when it is none."""
    try:
        base = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise LabelStudioError(
            f"expected Label Studio's address such as http://localhost:8080, got {url!r}: {error}"
        ) from error
    if base.scheme not in ("http", "https") or not base.host:
        raise LabelStudioError(f"expected Label Studio's address such as http://localhost:8080, got {url!r}")
    return str(base.copy_with(query=None, fragment=None, userinfo=b"")).rstrip("/")


def same_origin(url: httpx.URL, other: httpx.URL) -> bool:
    """Whether both have the same scheme, host and port."""
    return (url.scheme, url.host, _port(url)) == (other.scheme, other.host, _port(other))


def _port(url: httpx.URL) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)


def path_below(base: httpx.URL, path: str) -> str | None:
    """What comes after the base's own path ("/label-studio" behind some proxies), None when `path` is not below it."""
    prefix = base.raw_path.decode().rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else None


def without_query(url: str) -> str:
    """For messages: a query may hold secrets."""
    return url.partition("?")[0][:300]


def _may_repeat(request: httpx.Request) -> bool:
    return request.method in _REPEATABLE or "may_repeat" in request.extensions


def _may_repeat_after(request: httpx.Request, error: httpx.RequestError) -> bool:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return True  # nothing was sent
    if isinstance(error, httpx.TimeoutException):
        return False  # more requests would not make it quicker
    return _may_repeat(request)


def _check_whole(request: httpx.Request, response: httpx.Response) -> None:
    """Parse a JSON answer; httpx.ReadError when it ends in the middle, as those of a gateway do that has lost its own
    connection: it says that this is all of it."""
    if not (response.is_success and response.is_closed and response.content and _is_json(response)):
        return  # an error, or a file, which is read later
    try:
        response.extensions[_PARSED] = response.json()
    except ValueError as error:
        raise httpx.ReadError(f"{len(response.content)} bytes that are no whole JSON", request=request) from error


def _wished_pause(response: httpx.Response) -> float:
    """How many seconds Label Studio asks to be left alone, as far as that is bearable; 0 when it does not say. A date,
    which proxies may send instead, counts from the answer's own, so that a clock that differs does no harm."""
    wish = response.headers.get("retry-after", "")
    if wish.isdecimal():
        return min(float(wish), _LONGEST_PAUSE_SECONDS)
    try:
        until, now = (parsedate_to_datetime(date) for date in (wish, response.headers.get("date", "")))
        return min(max((until - now).total_seconds(), 0.0), _LONGEST_PAUSE_SECONDS)
    except (ValueError, TypeError):  # words, no date, or one of the two without a zone
        return 0.0


def _is_unavailable(status: int) -> bool:
    return status == 429 or status >= 500


def _is_json(response: httpx.Response) -> bool:
    return response.status_code == 204 or "json" in response.headers.get("content-type", "")


def _broken_off(request: httpx.Request, error: httpx.RequestError) -> LabelStudioUnavailableError:
    reason = str(error) or type(error).__name__
    changed_nothing = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) or request.method in ("GET", "HEAD")
    doubt = "" if changed_nothing else "; Label Studio may have carried it out all the same"
    return LabelStudioUnavailableError(
        f"{_described(request)}: no answer from Label Studio ({reason}){doubt}; is it running and is the address right?"
    )


def _described(request: httpx.Request) -> str:
    return f"{request.method} {without_query(str(request.url))}"
