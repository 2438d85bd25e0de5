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
from pathlib import Path
from typing import Any, NoReturn, Self

import torch

from model.errors import InvalidInputError, TrainingProcessError

logger = logging.getLogger(__name__)

Message = dict[str, Any]
_ASK_EVERY_SECONDS = 1.0
_AFTER_REFUSAL_SECONDS = 15.0
_ANSWER_SECONDS = 10.0  # for each line of the greeting
_SEE_FILES_SECONDS = 60.0  # until a shared folder shows what another machine wrote
_LONGEST_LINE = 1 << 20
_SIOCGIFADDR = 0x8915  # the address of an interface
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a silent machine is gone after 20 s


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """`machines` train together, the one that leads included; they meet at `host`:`port`, an address of that one.

    All share a secret, and a folder, at the same path on each, in which checkpoint and images lie.
    """

    host: str
    port: int
    machines: int
    secret: bytes
    folder: Path

    @classmethod
    def at(cls, address: str, *, machines: int, secret: bytes, folder: Path) -> Self:
        """With an `address` like "10.0.0.5:29400"; raises InvalidInputError for anything else."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InvalidInputError(f"expected an address like 10.0.0.5:29400, got {address!r}")
        return cls(host=host, port=int(port), machines=machines, secret=secret, folder=folder.resolve())

    @property
    def address(self) -> str:
        """As it is written into the settings."""
        return f"{self.host}:{self.port}"


class Connection:
    """Lines of JSON to and from one other machine."""

    def __init__(self, raw: socket.socket) -> None:
        raw.settimeout(_ANSWER_SECONDS)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            if hasattr(socket, option):  # not everywhere; the system's own times are longer
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.raw = raw
        self._lines = raw.makefile("rb")

    def say(self, message: Message) -> None:
        """OSError when the other one is gone."""
        self.raw.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> Message:
        """The next message; OSError when none comes, or what comes is none."""
        line = self._lines.readline(_LONGEST_LINE)
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise OSError("the connection has ended" if not line else "what came is no message")
        return message

    def is_open(self) -> bool:
        """Whether the other one is still there, as far as is known. Only while it has nothing to say."""
        return not select.select([self.raw], [], [], 0)[0]

    def take_time(self) -> None:
        """From now on, a message may take as long as it likes."""
        self.raw.settimeout(None)

    def close(self) -> None:
        """Also for those who wait for a message in another thread."""
        with suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self.raw.close()


def release() -> str:
    """What must be the same on all machines: torch, and every line of this package."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    return f"torch {torch.__version__.split('+')[0]}, model/ {code[:12]}"


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
    other = Connection(raw)
    try:
        nonce = secrets.token_hex(16)
        other.say({"nonce": nonce})
        greeting = other.hear()
        trouble = _trouble_with(greeting, nonce, meeting)
        if not trouble:
            other.say({"proof": _proof(meeting.secret, "leads", str(greeting.get("nonce")), nonce)})
            return other
        logger.warning("a machine at %s is refused: %s", address, trouble)
        other.say({"refused": trouble})
    except OSError as error:
        logger.debug("somebody at %s asked, and then: %s", address, error)
    other.close()
    return None


def _trouble_with(greeting: Message, nonce: str, meeting: Meeting) -> str:
    """Why a machine cannot take part; "" if it can. Strangers learn nothing but that they are."""
    expected = _proof(meeting.secret, "follows", nonce, str(greeting.get("nonce")))
    if not hmac.compare_digest(str(greeting.get("proof")).encode(), expected.encode()):
        return "expected the secret of the machine that leads, got another: do both share a folder?"
    wanted = {"release": release(), "folder": str(meeting.folder)}
    differing = [
        f"{name}: expected {value!r}, as here, got {greeting.get(name)!r}"
        for name, value in wanted.items()
        if greeting.get(name) != value
    ]
    return "; ".join(differing)


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
                leader.take_time()
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
    try:
        theirs, ours = str(leader.hear().get("nonce")), secrets.token_hex(16)
        proof = _proof(meeting.secret, "follows", theirs, ours)
        leader.say({"nonce": ours, "proof": proof, "release": release(), "folder": str(meeting.folder)})
        answer = leader.hear()
        if "refused" in answer:
            raise TrainingProcessError(f"{meeting.address} refuses this machine: {answer['refused']}")
        expected = _proof(meeting.secret, "leads", ours, theirs)
        if not hmac.compare_digest(str(answer.get("proof")).encode(), expected.encode()):
            raise TrainingProcessError(f"{meeting.address} does not know the secret: nothing it says is followed")
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
        if started.stdin:
            started.stdin.close()  # ends them
        code = started.wait()
        telling.join()
        logger.info("this machine's processes have ended with %d", code)


def _tell(started: "subprocess.Popen[str]", leader: Connection) -> None:
    """Pass on what our processes say."""
    with suppress(OSError), started.stdout or nullcontext(()) as lines:
        for line in lines:
            leader.say(json.loads(line))


def command(order: Message) -> list[str]:
    """How a machine starts its processes."""
    place = (
        ["--standalone"]
        if order["machines"] == 1
        else [
            f"--nnodes={order['machines']}",
            f"--node-rank={order['rank']}",
            f"--master-addr={order['host']}",
            f"--master-port={order['port']}",
        ]
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", *place, f"--nproc-per-node={order['processes']}"]
    return [*torchrun, "-m", "model.together", str(order["job"])]


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
