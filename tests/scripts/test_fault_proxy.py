"""The proxy against a real server: what arrives, and what whoever asks gets to see."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from scripts.fault_proxy import Call, Fault, FaultProxy


class Target:
    """A server that answers 201 with a hundred bytes and remembers what arrived."""

    def __init__(self) -> None:
        self.arrived: list[tuple[str, str, bytes]] = []
        arrived = self.arrived

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                arrived.append((self.path, self.headers["Authorization"], body))
                self.send_response(201)
                self.end_headers()
                self.wfile.write(b"x" * 100)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    thread = threading.Thread(target=target.server.serve_forever, args=(0.05,))
    thread.start()
    yield target
    target.server.shutdown()
    target.server.server_close()
    thread.join()


def ask(proxy: FaultProxy) -> httpx.Response:
    return httpx.post(f"{proxy.url}/a?b=c", content=b"body", headers={"Authorization": "Token t"}, timeout=10)


@pytest.mark.parametrize(
    ("fault", "arrivals", "status"),
    [
        (None, 1, 201),
        (Fault(kind="status", status=429), 0, 429),
        (Fault(kind="status_after", status=500), 1, 500),
        (Fault(kind="slow", seconds=0.2), 1, 201),
        (Fault(kind="drop"), 0, 200),
        (Fault(kind="double"), 2, 201),
        (Fault(kind="shorten"), 1, 201),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_arrives_and_what_is_answered(target, fault, arrivals, status):
    with FaultProxy(target.url, lambda call: fault) as proxy:
        started = time.monotonic()
        assert ask(proxy).status_code == status
        assert time.monotonic() - started >= (fault.seconds if fault else 0)
        assert target.arrived == [("/a?b=c", "Token t", b"body")] * arrivals
        assert sum(proxy.counts.values()) == (fault is not None)


@pytest.mark.parametrize(("kind", "arrivals"), [("refuse", 0), ("lose_answer", 1), ("cut", 1)])
def test_broken_connections(target, kind, arrivals):
    with FaultProxy(target.url, lambda call: Fault(kind=kind)) as proxy:
        with pytest.raises(httpx.RemoteProtocolError):
            ask(proxy)
        assert len(target.arrived) == arrivals


def test_an_answer_that_is_shortened_does_not_say_so(target):
    with FaultProxy(target.url, lambda call: Fault(kind="shorten")) as proxy:
        answer = ask(proxy)
    assert (answer.content, answer.headers["Content-Length"]) == (b"x" * 50, "50")


def test_a_refusal_can_say_when_to_come_again_and_to_whom():
    def choose(call: Call) -> Fault | None:
        return Fault(kind="status", status=429, retry_after="7") if call.authorization == "Token t" else None

    with FaultProxy("http://127.0.0.1:9", choose) as proxy:
        assert ask(proxy).headers["Retry-After"] == "7"


def test_a_late_request_is_overtaken(target):
    def first_is_late(call: Call) -> Fault | None:
        return Fault(kind="late", seconds=0.5) if call.body == b"first" else None

    with FaultProxy(target.url, first_is_late) as proxy:
        for body in (b"first", b"second"):
            assert httpx.post(proxy.url, content=body).is_success
        deadline = time.monotonic() + 10
        while len(target.arrived) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [body for *_, body in target.arrived] == [b"second", b"first"]


def test_a_target_that_is_away_is_a_502():
    with FaultProxy("http://127.0.0.1:9", lambda call: None) as proxy:
        assert ask(proxy).status_code == 502
