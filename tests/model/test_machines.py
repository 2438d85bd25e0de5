"""Training on several machines: here each is a process of its own, and they meet at 127.0.0.1."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import TrainingConfig
from model.errors import CheckpointError, InvalidInputError, TrainingProcessError
from model.machines import Connection, Meeting, Roll, end, environment, gathered, messages
from model.together import train_in_processes
from scripts.label_studio_server import free_port
from tests.model.examples import tiny_network
from tests.model.test_distributed import ROOT, TRAINING, images, processes_of, rank_of

__all__ = ["images"]

SECRET = "open sesame"
CONFIG = TrainingConfig(**TRAINING, milestones=(2, 4))


@pytest.fixture
def meeting(tmp_path):
    return Meeting.at(f"127.0.0.1:{free_port()}", machines=2, secret=SECRET.encode(), folder=tmp_path)


@contextmanager
def another_machine(meeting, *, secret=SECRET, folder=None, **environment):
    """Its process and the file with what it says."""
    log = meeting.folder / f"log-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "tests.model.follows", meeting.address, secret, str(folder or meeting.folder)]
    with (
        log.open("w") as words,
        subprocess.Popen(command, cwd=ROOT, stderr=words, env={**os.environ, **environment}) as process,
    ):
        try:
            yield process, log
        finally:
            process.kill()


def wait(until):
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train(images, meeting, *, on_step=None, on_wait=lambda reason: None):
    network = tiny_network(frozen_batch_norm=True)
    options = {"processes": 1, "checkpoint": meeting.folder / "c.safetensors", "meeting": meeting}
    train_in_processes(network, images, CONFIG, on_step=on_step, on_wait=on_wait, **options)
    return network.state_dict()


@pytest.fixture(scope="module")
def on_one_machine(images, tmp_path_factory):
    """The losses by step, the weights and the checkpoint of two processes on one machine."""
    losses, network = [], tiny_network(frozen_batch_norm=True)
    checkpoint = tmp_path_factory.mktemp("one") / "c.safetensors"
    options = {"processes": 2, "checkpoint": checkpoint, "on_step": lambda progress: losses.append(progress.loss)}
    train_in_processes(network, images, CONFIG, **options)
    return losses, network.state_dict(), checkpoint


def test_two_machines_train_as_one_with_two_processes(images, on_one_machine, meeting):
    losses, reasons = [], []
    with another_machine(meeting) as (process, log):
        weights = train(images, meeting, on_step=lambda p: losses.append(p.loss), on_wait=reasons.append)
        wait(lambda: "have ended with 0" in log.read_text())  # and it is there for the next training
        assert process.poll() is None
    assert losses == on_one_machine[0]
    for name, tensor in on_one_machine[1].items():
        assert torch.equal(weights[name], tensor), name
    assert set(reasons) == {f"1 of 2 machines to train together are missing at {meeting.address}"}
    assert processes_of(meeting.folder) == []


def test_when_a_machine_dies_the_training_waits_for_another_and_goes_on(images, on_one_machine, meeting):
    """Checkpoints are at 2, 4 and 6: when we hear of step 3, the processes may be in step 4, or have kept it."""
    steps, reasons = [], []
    with another_machine(meeting) as (victim, _):

        def on_step(progress):
            steps.append(progress.step)
            if steps == [1, 2, 3]:
                children = processes_of(meeting.folder)
                victim.kill()
                wait(lambda: processes_of(meeting.folder) != children)  # it ends them with itself

        def on_wait(reason):
            reasons.append(reason)
            if steps and len(others) == 0:
                others.append(ends.enter_context(another_machine(meeting)))

        others = []
        with ExitStack() as ends:
            weights = train(images, meeting, on_step=on_step, on_wait=on_wait)
    assert steps[:3] == [1, 2, 3]
    assert steps[-2:] == [5, 6]
    assert {step for step in steps if steps.count(step) > 1} <= {3, 4}
    assert any("1 of 2 machines" in reason for reason in reasons)
    for name, tensor in on_one_machine[1].items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("what", ["its process", "all of it"])
def test_a_machine_that_stands_still_is_given_up_and_the_training_goes_on_when_it_is_there_again(
    images, on_one_machine, meeting, caplog, what
):
    """Its process, as when a shared folder hangs, which it ends itself; or all of it, until it is woken. Where it is
    stopped amid a meeting, nobody can say which machine it is."""
    steps, reasons, stopped = [], [], []

    def on_step(progress):
        steps.append(progress.step)
        if steps == [1, 2, 3]:
            trains = next(process for process in processes_of(meeting.folder) if rank_of(process) == 1)
            stopped.extend([trains] if what == "its process" else [machine.pid, parent_of(trains), trains])
            for process in stopped:
                os.kill(process, signal.SIGSTOP)

    def on_wait(reason):
        reasons.append(reason)
        if "stands still" in reason and what == "all of it":
            for process in stopped:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    with another_machine(meeting) as (machine, _):
        weights = train(images, replace(meeting, silent_seconds=8), on_step=on_step, on_wait=on_wait)
        assert stopped[-1] not in processes_of(meeting.folder)
    told = re.search("(the machine at 127.0.0.1|a machine) stands still.*: .* waited for .* for", caplog.text)
    assert any(told[0] in reason for reason in reasons)
    assert "this machine" not in caplog.text
    assert steps[-2:] == [5, 6]
    for name, tensor in on_one_machine[1].items():
        assert torch.equal(weights[name], tensor), name


STOPS_AMID_A_MEETING = """
import os, signal
from pathlib import Path

if os.environ.get("RANK") == "1":
    import torch.distributed

    mark, calls, all_reduce = Path(__file__).with_name("mark"), [], torch.distributed.all_reduce

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 8 and not mark.exists():  # in step 4
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return all_reduce(*arguments)

    torch.distributed.all_reduce = stops
"""


def test_a_machine_that_stands_still_when_all_have_come_is_given_up_as_well(
    images, on_one_machine, meeting, caplog, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("customized")
    (folder / "sitecustomize.py").write_text(STOPS_AMID_A_MEETING)
    steps = []
    with another_machine(meeting, PYTHONPATH=str(folder)):
        weights = train(images, replace(meeting, silent_seconds=8), on_step=lambda p: steps.append(p.step))
    assert (folder / "mark").exists()
    assert "a machine stands still, which cannot be told: all have waited for each other for" in caplog.text
    assert steps[-2:] == [5, 6]
    for name, tensor in on_one_machine[1].items():
        assert torch.equal(weights[name], tensor), name


def test_a_machine_that_stands_still_before_a_meeting_is_known_and_one_amid_it_is_noticed():
    roll = Roll(machines=2, processes=2)
    assert (roll.behind(), roll.is_stuck()) == ([], False)  # they start
    for rank in (0, 1, 3):
        roll.comes(rank)
    assert (roll.behind(), roll.is_stuck()) == ([1], False)
    roll.comes(2)
    assert (roll.behind(), roll.is_stuck()) == ([], True)
    roll.goes_on(0)
    assert (roll.behind(), roll.is_stuck()) == ([], False)  # what one has, it may work on for long
    for rank in (1, 2, 3):
        roll.goes_on(rank)
    for rank in (1, 2, 3):
        roll.comes(rank)
    assert (roll.behind(), roll.is_stuck()) == ([0], False)


def test_of_those_amid_one_meeting_none_is_named_when_one_of_them_is_already_at_the_next():
    roll = Roll(machines=3, processes=1)
    for rank in (0, 1, 2):
        roll.comes(rank)
    roll.goes_on(1)
    roll.comes(1)
    assert (roll.behind(), roll.is_stuck()) == ([], True)
    roll.goes_on(0)
    assert (roll.behind(), roll.is_stuck()) == ([0], False)
    roll.comes(0)
    assert (roll.behind(), roll.is_stuck()) == ([2], False)


def parent_of(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_training_that_is_complete_waits_for_nobody(images, on_one_machine, meeting):
    def on_wait(reason):
        raise AssertionError(reason)

    shutil.copy(on_one_machine[2], meeting.folder / "c.safetensors")
    weights = train(images, meeting, on_wait=on_wait)
    for name, tensor in on_one_machine[1].items():
        assert torch.equal(weights[name], tensor), name


def test_a_checkpoint_of_another_training_is_told_before_anybody_is_waited_for(images, on_one_machine, meeting):
    def on_wait(reason):
        raise AssertionError(reason)

    shutil.copy(on_one_machine[2], meeting.folder / "c.safetensors")
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(images[1:], meeting, on_wait=on_wait)


def test_the_processes_meet_on_the_network_card_of_the_meeting_point(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert environment("localhost") == {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    assert environment("192.0.2.1") == dict(os.environ)


def test_a_machine_whose_processes_end_at_once_is_told_and_not_waited_for_for_ever(images, meeting):
    ended = pytest.raises(TrainingProcessError, match="3 times without a step")
    with another_machine(meeting, GLOO_SOCKET_IFNAME="nowhere0"), ended:
        train(images, meeting)


def test_a_machine_with_another_secret_or_another_folder_is_refused_and_told(images, meeting, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with (
        another_machine(meeting, secret="guess") as (_, stranger),
        another_machine(meeting, folder=elsewhere) as (_, mislaid),
    ):

        def on_wait(reason):
            if "refuses" in stranger.read_text() and "refuses" in mislaid.read_text():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(images, meeting, on_wait=on_wait)
    assert "expected the secret of the machine that leads" in stranger.read_text()
    assert str(meeting.folder) not in stranger.read_text()
    assert f"folder: expected '{meeting.folder}', as here, got '{elsewhere}'" in mislaid.read_text()


def test_a_machine_follows_nobody_who_does_not_know_the_secret(meeting):
    with socket.create_server((meeting.host, meeting.port)) as listening, another_machine(meeting) as (_, log):
        impostor = Connection(listening.accept()[0])
        impostor.say({"nonce": "1" * 32})
        impostor.hear()
        impostor.say({"proof": "0" * 64})
        impostor.say({"job": "/tmp", "rank": 1, "machines": 2, "processes": 1, "host": "127.0.0.1", "port": 1})
        wait(lambda: "does not know the secret: nothing it says is followed" in log.read_text())
        impostor.close()


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b'{"proof": 7}\n',
        b"\xff" * 100 + b"\n",
        b"[" * 200_000 + b"\n",
        b'{"nonce": "\\ud800", "proof": "0"}\n',
        b"x" * 5000,
    ],
)
def test_what_strangers_send_disturbs_nobody(meeting, noise):
    def on_wait(reason):
        reasons.append(reason)
        if len(reasons) == 1:
            with socket.create_connection((meeting.host, meeting.port)) as stranger:
                stranger.sendall(noise)
        if len(reasons) == 3:
            raise KeyboardInterrupt

    reasons = []
    with pytest.raises(KeyboardInterrupt), gathered(meeting, on_wait):
        pass
    assert all("1 of 2 machines" in reason for reason in reasons)


def first_asked_then_given_up(meeting, *, meanwhile, afterwards):
    """What somebody hears who asks while something is wrong here, `meanwhile`, until `afterwards`."""
    rounds = []

    def on_wait(reason):
        rounds.append(reason)
        if len(rounds) == 1:
            asking.append(socket.create_connection((meeting.host, meeting.port), timeout=10))
            meanwhile()
        if len(rounds) == 2:
            afterwards()
        if len(rounds) == 4:
            raise KeyboardInterrupt

    asking = []
    with pytest.raises(KeyboardInterrupt), gathered(meeting, on_wait):
        pass
    with asking[0]:
        return asking[0].recv(1 << 16)


def test_a_machine_that_asks_while_no_file_can_be_opened_is_heard_afterwards(meeting, caplog):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def open_no_more():
        os.close(lowest := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))

    def open_again():
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    try:
        heard = first_asked_then_given_up(meeting, meanwhile=open_no_more, afterwards=open_again)
    finally:
        open_again()
    assert b'{"nonce"' in heard
    assert f"somebody who asks at {meeting.address} cannot be answered: Too many open files" in caplog.text


def test_a_connection_that_the_system_refuses_to_set_up_is_closed(meeting, monkeypatch):
    """Some do when the other side is gone already; here, a time that it does not take has the same effect."""
    monkeypatch.setattr("model.machines._KEEP_ALIVE", {"TCP_KEEPIDLE": 0})
    assert first_asked_then_given_up(meeting, meanwhile=lambda: None, afterwards=lambda: None) == b""


def test_what_a_library_prints_is_no_message_and_stops_nothing(tmp_path):
    program = "print('NCCL version 2'); print('{\"step\": 1}'); print('[' * 9)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as started:
        assert list(messages(started)) == [{"step": 1}]


def test_processes_that_do_not_look_at_their_stdin_are_ended(tmp_path):
    program = "import time; time.sleep(600)"
    started = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True)
    assert end(started) == -signal.SIGTERM


def test_an_address_that_another_training_uses_is_waited_for(meeting):
    reasons = []

    def on_wait(reason):
        reasons.append(reason)
        other.close()
        if "missing" in reason:
            raise KeyboardInterrupt

    other = socket.create_server((meeting.host, meeting.port))
    with pytest.raises(KeyboardInterrupt), gathered(meeting, on_wait):
        pass
    assert "another program listens at" in reasons[0]


@pytest.mark.parametrize(
    "address",
    ["", "host", ":1", "host:", "host:x", "host:0", "host:65536", "host:²", "a b:1", "http://host:1", "[::1]:1"],
)
def test_what_is_no_address_is_told(address, tmp_path):
    with pytest.raises(InvalidInputError, match=r"expected host:port, like 10.*got '"):
        Meeting.at(address, machines=2, secret=b"", folder=tmp_path)


def test_an_address_of_another_machine_is_told(tmp_path):
    meeting = Meeting.at("192.0.2.1:29400", machines=2, secret=b"", folder=tmp_path)
    with pytest.raises(InvalidInputError, match="an address of this machine"), gathered(meeting, print):
        pass


def test_there_are_not_more_processes_than_images_in_a_step(images, meeting):
    with pytest.raises(InvalidInputError, match=r"at most batch_size \(4\) on all machines.*got 6"):
        train_in_processes(
            tiny_network(), images, CONFIG, processes=3, checkpoint=meeting.folder / "c.safetensors", meeting=meeting
        )
