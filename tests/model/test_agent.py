"""What starts a machine's processes: it listens where it is told to, and ends with whoever started it."""

import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from model.machines import command
from scripts.label_studio_server import free_port
from tests.model.test_distributed import ROOT
from tests.model.test_end_with_parent import runs

PARENT = """
import json, subprocess, sys, time
child = subprocess.Popen(json.loads(sys.argv[1]), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


def listens(host, port):
    with socket.socket() as asking:
        return asking.connect_ex((host, port)) == 0


@contextmanager
def waiting_for_another_machine(folder):
    """What started it, its id and its port."""
    port = free_port()
    order = {"job": str(folder), "machines": 2, "processes": 1, "rank": 0, "host": "127.0.0.1", "port": port}
    program = [sys.executable, "-c", PARENT, json.dumps(command(order))]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        try:
            agent = int(parent.stdout.readline())
            wait(lambda: listens("127.0.0.1", port))
            yield parent, agent, port
        finally:
            parent.kill()


def wait(until):
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one address of this machine's own")
def test_it_ends_with_whoever_started_it_and_listens_at_one_address(tmp_path):
    with waiting_for_another_machine(tmp_path) as (parent, agent, port):
        assert not listens("127.0.0.2", port)
        parent.kill()
        wait(lambda: not runs(agent))
