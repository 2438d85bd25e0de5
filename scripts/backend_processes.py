"""Starts and stops our own two processes, as the demo and the end-to-end tests need them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from model.end_with_parent import end_with_parent

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE", "CUDA_VISIBLE_DEVICES")
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0


class BackendProcessError(Exception):
    """The web or the worker process ended, or never answered."""


class BackendProcesses:
    """The web process and the worker, with these settings (environment variables) and a log file each in `log_dir`.

    `end_with_us`: they end when the thread that starts them ends, also when we are killed (on Linux).
    """

    def __init__(self, *, settings: Mapping[str, str], log_dir: Path, end_with_us: bool = False) -> None:
        self.url = f"http://127.0.0.1:{settings['PORT']}"
        self._environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | dict(settings)
        self._log_dir = log_dir
        self._before_exec = end_with_parent if end_with_us else None
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start both and wait until the web process answers."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        answers = False
        try:
            self.start_one("web")
            self.start_one("worker")
            self.wait_until_it_answers()
            answers = True
        finally:
            if not answers:  # Ctrl-C too must not leave them behind
                self.stop()

    def wait_until_it_answers(self) -> None:
        """Until the web process answers; BackendProcessError when it does not."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            self.check()
            if time.monotonic() > deadline:
                raise BackendProcessError(f"the backend did not answer in {_START_SECONDS:.0f} s:\n{self._log('web')}")
            time.sleep(0.2)

    def start_one(self, name: str) -> None:
        """Start "web" or "worker"."""
        module = {"web": "ml_backend.app", "worker": "ml_backend.worker"}[name]
        with (self._log_dir / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", module],
                env=self._environment,
                cwd=Path(__file__).resolve().parent.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=self._before_exec,
                start_new_session=True,  # Ctrl-C goes to the demo alone, which stops them in order
            )

    def pid(self, name: str) -> int:
        """The id of a running process."""
        return self._running[name].pid

    def ended(self, name: str) -> int | None:
        """The exit status of a process that was started and ended by itself; None while it runs."""
        process = self._running.get(name)
        return None if process is None else process.poll()

    def kill(self, name: str) -> None:
        """End a process as a crash would."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def check(self) -> None:
        """BackendProcessError with the end of the log if one of them is not running any more."""
        for name, process in self._running.items():
            if process.poll() is not None:
                self.stop()
                raise BackendProcessError(
                    f"the {name} process {_ended(process.returncode)}. Started again, it goes on where it was. Its log "
                    f"ends so:\n{self._log(name)}"
                )

    def stop(self) -> None:
        """End both; harmless when they do not run."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2.0).is_success
        except httpx.TransportError:
            return False

    def _log(self, name: str) -> str:
        return "\n".join((self._log_dir / f"{name}.log").read_text(errors="replace").splitlines()[-15:])


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    lack = ", as it is for lack of memory" if status == -signal.SIGKILL else ""
    return f"was ended by signal {-status} ({signal.Signals(-status).name}){lack}"
