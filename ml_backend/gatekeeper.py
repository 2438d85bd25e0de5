"""The checks that every request passes before anything else is done with it, in one plain ASGI middleware: Starlette's
`@app.middleware` would make two tasks of each request for each check, which is most of what a webhook costs."""

from collections.abc import Callable, Mapping, Sequence

from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Check = Callable[[Request], Response | None]  # None: go on; it may read the request's head, not its body


class Gatekeeper:
    """Asks each check in turn; the first refusal is the answer. `headers` come with every answer."""

    def __init__(self, app: ASGIApp, *, checks: Sequence[Check], headers: Mapping[str, str]) -> None:
        self._app = app
        self._checks = tuple(checks)
        self._headers = dict(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        request = Request(scope)
        for check in self._checks:
            refusal = check(request)
            if refusal is not None:
                return await refusal(scope, receive, send_with_headers)
        return await self._app(scope, receive, send_with_headers)
