"""Several machines for one training: how they meet, and how each finds out that another is gone.

The machine that leads listens at an address while it has something to train. The others run `follow`, which asks there
once a second. Both prove that they know a secret, then each follower starts its processes as it is told. The connection
stays open until the training ends: when a machine dies, the others find it closed, or silent, and end their processes.

Messages are lines of JSON. Nothing is encrypted, neither here nor between the processes: all of it belongs into a
network of these machines' own.
"""

import errno
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, Self

from model.errors import InvalidInputError, TrainingProcessError

logger = logging.getLogger(__name__)

ADDRESS = "expected host:port, like 10.0.0.5:29400, where the machine that leads is reached by the others"

Message = dict[str, Any]
_ADDRESS = re.compile(r"([^\s:/]+):([0-9]{1,5})")
_ASK_EVERY_SECONDS = 1.0
_AFTER_REFUSAL_SECONDS = 15.0
_ANSWER_SECONDS = 3.0  # for each line of the greeting
_SEE_FILES_SECONDS = 60.0  # until a shared folder shows what another machine wrote
_LONGEST_LINE, _LONGEST_GREETING = 1 << 20, 4096  # bytes
_NUMBER = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")  # used once, or a proof
_PATIENCE_SECONDS = 30.0  # of those who follow: others may be greeted first
_GRACE_SECONDS = 5.0
_SIOCGIFADDR = 0x8915  # the address of an interface
# A machine without power or network is gone after 20 s.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """`machines` train together, the one that leads included; they meet at `host`:`port`, an address of that one.

    All share a secret, and a folder, at the same path on each, in which checkpoint and images lie. One that the others
    wait for in vain, for `silent_seconds`, stands still: they begin again when it is there.
    """

    host: str
    port: int
    machines: int
    secret: bytes
    folder: Path
    silent_seconds: float = 480.0  # before torchrun and NCCL give up, after 600 s, and do not say on whom

    @classmethod
    def at(cls, address: str, *, machines: int, secret: bytes, folder: Path) -> Self:
        """With an `address` like "10.0.0.5:29400"; raises InvalidInputError for anything else."""
        if not (place := host_and_port(address)):
            raise InvalidInputError(f"{ADDRESS}, got {address!r}")
        return cls(host=place[0], port=place[1], machines=machines, secret=secret, folder=folder.resolve())

    @property
    def address(self) -> str:
        """As it is written into the settings."""
        return f"{self.host}:{self.port}"


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of a name or an IPv4 address and a port, as in "10.0.0.5:29400"; None when it is something else."""
    found = _ADDRESS.fullmatch(address)
    return (found[1], int(found[2])) if found and 0 < int(found[2]) < 65536 else None


class Connection:
    """Lines of JSON to and from one other machine, of which messages speak by a `name`."""

    def __init__(self, raw: socket.socket, name: str = "another machine") -> None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            if hasattr(socket, option):  # not everywhere; the system's own times are longer
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.raw, self.name = raw, name
        self._heard = b""

    def say(self, message: Message) -> None:
        """OSError when the other one is gone."""
        self.raw.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, *, longest: int = _LONGEST_LINE, within: float | None = None) -> Message:
        """The next message, of so many bytes at most, waited for so many seconds in all; OSError when none comes, or
        what comes is none."""
        until = None if within is None else time.monotonic() + within
        while b"\n" not in self._heard[:longest]:
            if len(self._heard) >= longest:
                raise OSError("what came is no message")
            self.raw.settimeout(None if until is None else max(0.01, until - time.monotonic()))
            if not (more := self.raw.recv(1 << 16)):
                raise OSError("the connection has ended")
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise OSError("what came is no message")
        return message

    def is_open(self) -> bool:
        """Whether the other one is still there, as far as is known. Only while it has nothing to say."""
        return not select.select([self.raw], [], [], 0)[0]

    def close(self) -> None:
        """Also for those who wait for a message in another thread."""
        with suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)
        self.raw.close()


class Roll:
    """Which machines stand still, by how often each process has come to where all of them meet, and has gone on."""

    def __init__(self, *, machines: int, processes: int) -> None:
        self._came, self._went = [0] * (machines * processes), [0] * (machines * processes)
        self._processes = processes

    def comes(self, rank: int) -> None:
        """A process has come to a meeting, and goes on when all others have come."""
        self._came[rank] += 1

    def goes_on(self, rank: int) -> None:
        """A process has what it has come for."""
        self._went[rank] += 1

    def behind(self) -> list[int]:
        """The machines, from 0 on, that others wait for. None when it may be any: of those in one meeting, one may have
        what it came for before another, and come to the next."""
        latest = max(self._came)
        awaited = [rank for rank, came in enumerate(self._came) if came < latest]
        absent = [rank for rank in awaited if self._came[rank] == self._went[rank]]
        machines = sorted({rank // self._processes for rank in absent or awaited})
        return machines if absent or len(machines) == 1 else []

    def is_stuck(self) -> bool:
        """Whether one stands still amid a meeting, and no word says which: somebody waits, and for nobody known."""
        return not self.behind() and max(self._went) < max(self._came)


def release() -> str:
    """What must be the same on all machines: what reads and sees images, and every line of this package."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    packages = [f"{name} {version(name).split('+')[0]}" for name in ("torch", "torchvision", "numpy", "pillow")]
    return ", ".join([*packages, f"model/ {code[:12]}"])


# --- the machine that leads


@contextmanager
def gathered(meeting: Meeting, on_wait: Callable[[str], None]) -> Iterator[list[Connection]]:
    """The other machines, once all of them are there; they are let go at the end of the block.

    `on_wait` is told about once a second what is waited for; what it raises ends the waiting. InvalidInputError when
    the address is not one of this machine.
    """
    others: list[Connection] = []
    try:
        with _listening(meeting, on_wait) as listening:
            while len(others) < meeting.machines - 1:
                missing = meeting.machines - 1 - len(others)
                on_wait(f"{missing} of {meeting.machines} machines to train together are missing at {meeting.address}")
                others += filter(None, [_admitted(listening, meeting)])
                for gone in [other for other in others if not other.is_open()]:
                    others.remove(gone)
                    gone.close()
        yield others
    finally:
        for other in others:
            other.close()


@contextmanager
def _listening(meeting: Meeting, on_wait: Callable[[str], None]) -> Iterator[socket.socket]:
    with ExitStack() as stack:
        while True:
            try:
                listening = stack.enter_context(socket.create_server((meeting.host, meeting.port)))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise InvalidInputError(
                        "expected as meeting point an address of this machine, where the others reach it, got "
                        f"{meeting.address}: {error.strerror}"
                    ) from error
            on_wait(f"another program listens at {meeting.address}, perhaps another worker that trains")
            time.sleep(_ASK_EVERY_SECONDS)
        listening.settimeout(_ASK_EVERY_SECONDS)
        yield listening


def _admitted(listening: socket.socket, meeting: Meeting) -> Connection | None:
    """Who asks next, if it is one of ours."""
    try:
        raw, (address, *_) = listening.accept()
    except TimeoutError:
        return None
    except OSError as error:  # who asked is gone again, or this process has too many files open
        logger.warning("somebody who asks at %s cannot be answered: %s", meeting.address, error.strerror)
        time.sleep(_ASK_EVERY_SECONDS)
        return None
    try:
        other = Connection(raw, f"the machine at {address}")
    except OSError as error:  # some systems refuse to set up a connection that has ended again
        logger.debug("somebody at %s asked, and then: %s", address, error)
        raw.close()
        return None
    try:
        if not (trouble := _greeted(other, meeting)):
            return other
        logger.warning("%s is refused: %s", other.name, trouble)
        other.say({"refused": trouble})
    except OSError as error:
        logger.debug("somebody at %s asked, and then: %s", address, error)
    other.close()
    return None


def _greeted(other: Connection, meeting: Meeting) -> str:
    """Why a machine cannot take part; "" if it can. Strangers learn nothing but that they are."""
    ours = secrets.token_hex(16)
    other.say({"nonce": ours})
    greeting = other.hear(longest=_LONGEST_GREETING, within=_ANSWER_SECONDS)
    theirs = _number(greeting, "nonce")
    if not hmac.compare_digest(_number(greeting, "proof"), _proof(meeting.secret, "follows", ours, theirs)):
        return "expected the secret of the machine that leads, got another: do both share a folder?"
    other.say({"proof": _proof(meeting.secret, "leads", theirs, ours)})
    about = other.hear(longest=_LONGEST_GREETING, within=_ANSWER_SECONDS)
    differing = [
        f"{name}: expected {value!r}, as here, got {about.get(name)!r}"
        for name, value in _about(meeting).items()
        if about.get(name) != value
    ]
    if not differing:
        other.say({"welcome": True})
    return "; ".join(differing)


def _about(meeting: Meeting) -> Message:
    """What must be the same on both sides."""
    return {"release": release(), "folder": str(meeting.folder)}


def _number(message: Message, name: str) -> str:
    """A number that a greeting must have; OSError when it has none."""
    number = str(message.get(name))
    if not _NUMBER.fullmatch(number):
        raise OSError("what came is no greeting")
    return number


def _proof(secret: bytes, role: str, *nonces: str) -> str:
    return hmac.new(secret, " ".join([role, *nonces]).encode(), hashlib.sha256).hexdigest()


# --- the others


def follow(meeting: Meeting) -> NoReturn:
    """Take part in one training after the other, whenever the machine at the meeting's address leads one."""
    said = ""
    while True:
        try:
            with _admission(meeting) as leader:
                said = ""
                logger.info("there for the next training at %s", meeting.address)
                _take_part(leader)
        except TrainingProcessError as error:
            logger.error("%s", error)
            time.sleep(_AFTER_REFUSAL_SECONDS)
        except OSError as error:  # nothing is trained at the moment, or the other machine is away
            if str(error) != said:
                logger.info("waiting for a training at %s (%s)", meeting.address, error)
            said = str(error)
        time.sleep(_ASK_EVERY_SECONDS)


@contextmanager
def _admission(meeting: Meeting) -> Iterator[Connection]:
    """A connection to the machine that leads, which knows us and is known; TrainingProcessError when it refuses us."""
    leader = Connection(socket.create_connection((meeting.host, meeting.port), timeout=_ANSWER_SECONDS))

    def answer() -> Message:
        heard = leader.hear(longest=_LONGEST_GREETING, within=_PATIENCE_SECONDS)
        if "refused" in heard:
            raise TrainingProcessError(f"{meeting.address} refuses this machine: {heard['refused']}")
        return heard

    try:
        theirs, ours = _number(answer(), "nonce"), secrets.token_hex(16)
        leader.say({"nonce": ours, "proof": _proof(meeting.secret, "follows", theirs, ours)})
        if not hmac.compare_digest(_number(answer(), "proof"), _proof(meeting.secret, "leads", ours, theirs)):
            raise TrainingProcessError(f"{meeting.address} does not know the secret: nothing it says is followed")
        leader.say(_about(meeting))
        answer()
        yield leader
    finally:
        leader.close()


def _take_part(leader: Connection) -> None:
    """Run this machine's processes as the leader says, until it, or they, come to the end."""
    order = leader.hear()
    job = Path(order["job"])
    logger.info("training with %s, as machine %d of %d", job, order["rank"] + 1, order["machines"])
    until = time.monotonic() + _SEE_FILES_SECONDS
    while not (job / "job.json").exists() and time.monotonic() < until and leader.is_open():
        time.sleep(_ASK_EVERY_SECONDS)
    place = environment(leader.raw.getsockname()[0])
    started = subprocess.Popen(command(order), env=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    telling = threading.Thread(target=_tell, args=(started, leader), daemon=True)
    telling.start()
    try:
        while started.poll() in (None, 0) and leader.is_open():  # after a good end, the leader closes
            time.sleep(0.1)
        if started.returncode and leader.is_open():
            telling.join()
            leader.say({"ended": started.returncode})
    finally:
        code = end(started)
        telling.join()
        logger.info("this machine's processes have ended with %d", code)


def _tell(started: "subprocess.Popen[str]", leader: Connection) -> None:
    """Pass on what our processes say."""
    with suppress(OSError):
        for said in messages(started):
            leader.say(said)


def messages(started: "subprocess.Popen[str]") -> Iterator[Message]:
    """What processes say on their stdout, to the end of it; what a library prints there is logged."""
    with started.stdout or nullcontext(()) as lines:
        for line in lines:
            try:
                said = json.loads(line)
            except ValueError:
                said = None
            if isinstance(said, dict):
                yield said
            else:
                logger.info("a training process says: %s", line.rstrip())


def end(started: "subprocess.Popen[str]") -> int:
    """End processes that we have started, which find that their stdin ends (`model.agent`); their exit code."""
    if started.stdin:
        started.stdin.close()
    for stop in (started.terminate, started.kill):
        with suppress(subprocess.TimeoutExpired):
            return started.wait(timeout=_GRACE_SECONDS)
        stop()
    return started.wait()


def command(order: Message) -> list[str]:
    """How a machine starts its processes."""
    return [sys.executable, "-m", "model.agent", json.dumps(order)]


def environment(host: str) -> dict[str, str]:
    """Of a machine's processes: by gloo and NCCL, too, they meet where the machines do. Torch would go by the name of
    the machine, which may mean 127.0.1.1, or by the first network card."""
    interface = _interface_with(socket.gethostbyname(host))
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {**(dict.fromkeys(names, interface) if interface else {}), **os.environ}


def _interface_with(address: str) -> str | None:
    """The network interface that has this IPv4 address; None when there is none, or nobody can say (not on Linux)."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as some:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(some.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def orders(meeting: Meeting | None, *, job: Path, processes: int) -> list[Message]:
    """What each machine has to do, the one that leads first."""
    machines = meeting.machines if meeting else 1
    place = {"host": meeting.host, "port": _free_port(meeting.host)} if meeting else {}
    return [
        {"job": str(job.absolute()), "machines": machines, "processes": processes, "rank": rank, **place}
        for rank in range(machines)
    ]


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
