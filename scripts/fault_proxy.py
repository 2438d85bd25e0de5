"""An HTTP proxy that spoils requests on purpose, to stand between Label Studio and our processes."""

import http.client
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

HOST = "127.0.0.1"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "expect", "upgrade", "te"}
_TIMEOUT_SECONDS = 600.0

Kind = Literal[
    "status",  # answered with `status`, never passed on
    "status_after",  # passed on and carried out, but answered with `status`
    "slow",  # passed on after `seconds`, or as soon as `until` is set
    "refuse",  # the connection is closed, nothing is passed on
    "lose_answer",  # passed on and carried out, then the connection is closed without an answer
    "cut",  # passed on; the connection is closed in the middle of the answer's body
    "shorten",  # passed on; the answer ends in the middle of its body and says that this is all of it
    "drop",  # answered with 200 {}, never passed on
    "late",  # answered with 200 {}, passed on `seconds` later, so that others overtake it
    "double",  # passed on twice, answered once
]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request as it came; `path` with its query, `authorization` as its header says."""

    method: str
    path: str
    body: bytes
    authorization: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to a request instead of passing it on."""

    kind: Kind
    status: int = 503
    seconds: float = 0.0
    until: threading.Event | None = None
    retry_after: str = ""  # the header of that name, with a status

    @property
    def name(self) -> str:
        """The kind, with the status where there is one."""
        return f"{self.kind} {self.status}" if self.kind in ("status", "status_after") else self.kind


Choice = Callable[[Call], Fault | None]


class FaultProxy:
    """Listens on this machine and passes requests on to `target` ("http://127.0.0.1:8080"), except for those for which
    `choose` names a fault. `with` starts and stops it; `counts` says how often which fault was done. `look` sees each
    call before anything is done to it, and may take its time."""

    def __init__(
        self, target: str, choose: Choice, *, port: int = 0, look: Callable[[Call], None] = lambda call: None
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._target = target
        self._choose = choose
        self._look = look
        self._lock = threading.Lock()
        self._late: list[threading.Timer] = []
        proxy = self

        class Handler(_Handler):
            def handle_call(self) -> None:
                proxy._handle(self)

        self._server = _Server((HOST, port), Handler)
        self.url = f"http://{HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name=f"proxy of {self._target}", daemon=True
        ).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        for timer in self._late:
            timer.cancel()

    def _handle(self, handler: "_Handler") -> None:
        call = Call(
            method=handler.command,
            path=handler.path,
            body=handler.body(),
            authorization=handler.headers.get("Authorization", ""),
        )
        self._look(call)
        with self._lock:  # `choose` may draw from one random generator
            fault = self._choose(call)
            if fault:
                self.counts[fault.name] += 1
        if fault:
            self._spoil(handler, call, fault)
        else:
            handler.give(*self._ask(call, handler.headers))

    def _spoil(self, handler: "_Handler", call: Call, fault: Fault) -> None:
        headers = handler.headers
        match fault.kind:
            case "status":
                handler.give(*_refusal(fault))
            case "status_after":
                self._ask(call, headers)
                handler.give(*_refusal(fault))
            case "slow":
                (fault.until or threading.Event()).wait(fault.seconds)
                handler.give(*self._ask(call, headers))
            case "refuse":
                handler.hang_up()
            case "lose_answer":
                self._ask(call, headers)
                handler.hang_up()
            case "cut":
                handler.give(*self._ask(call, headers), cut=True)
            case "shorten":
                status, names, body = self._ask(call, headers)
                handler.give(status, names, body[: len(body) // 2])
            case "drop":
                handler.give(*_THANKS)
            case "late":
                timer = threading.Timer(fault.seconds, self._ask, (call, headers))
                timer.daemon = True
                self._late.append(timer)
                timer.start()
                handler.give(*_THANKS)
            case "double":
                self._ask(call, headers)
                handler.give(*self._ask(call, headers))

    def _ask(self, call: Call, headers: Message) -> "_Answer":
        """The target's answer; 502 when there is none."""
        parts = urlsplit(self._target)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=_TIMEOUT_SECONDS)
        try:
            kept = {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
            connection.request(call.method, call.path, body=call.body or None, headers=kept)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        except (OSError, http.client.HTTPException) as error:
            return 502, _JSON, f'{{"detail": "the proxy got no answer: {type(error).__name__}"}}'.encode()
        finally:
            connection.close()


_Answer = tuple[int, list[tuple[str, str]], bytes]
_JSON = [("Content-Type", "application/json")]
_THANKS: _Answer = (200, _JSON, b"{}")


def _refusal(fault: Fault) -> _Answer:
    headers = [*_JSON, ("Retry-After", fault.retry_after)] if fault.retry_after else _JSON
    return fault.status, headers, b'{"detail": "injected"}'


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has hung up, as killed processes do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes, and the second would wait for the first

    def handle_call(self) -> None:
        raise NotImplementedError

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = lambda self: self.handle_call()  # noqa: N815

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def give(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """The counts are the log."""
