"""A server that answers what a test tells it to, for faults that no real one has on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ml_backend.ls_client import LabelStudioClient

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def scripted_server(answers: dict[str, list[Answer]]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives the answers of each path in turn, the last one for ever; yields its address and its log."""
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keeps the test output clean."""

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            path = self.path.partition("?")[0]
            log.append(f"{self.command} {path} {self.headers.get('authorization', '')}".strip())
            script = answers[path]
            (script.pop(0) if len(script) > 1 else script[0])(self)

        do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def scripted(answers: dict[str, list[Answer]], token: str = "t" * 40) -> Iterator[tuple[LabelStudioClient, list[str]]]:
    """A client of such a server, and the server's log."""
    with scripted_server(answers) as (url, log), LabelStudioClient(url, token) as client:
        yield client, log


def says(status: int, body: Any = None, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        handler.send_response(status)
        for name, value in {"content_type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
