"""Starts and stops a real Label Studio with a data folder of its own; the demo and the tests stand on it."""

import atexit
import fcntl
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

from model.end_with_parent import end_with_parent

EXECUTABLE = Path(__file__).resolve().parent.parent / ".venv-label-studio" / "bin" / "label-studio"
HOST = "127.0.0.1"

# Label Studio reads even USERNAME and HOST from its environment, so it gets only what it needs.
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE")
_REPORT_EVERY_SECONDS = 5.0
_STOP_SECONDS = 10.0


class LabelStudioServerError(Exception):
    """Label Studio did not start, or an account could not be made."""


class LabelStudioServer:
    """A Label Studio on this machine, for this machine only (it may reach loopback addresses, and nothing is reported
    to its makers). `with` starts and stops it.

    The first start in a new `data_dir` takes about a minute and creates the user; later starts take seconds and keep
    everything, the user's password and token included. `token` is that user's legacy token; without one, a random one
    is made and kept in the folder. `port` None takes a free one. `local_files` is a folder that Label Studio may serve
    (its "local files" storage). `report` receives progress in words. `end_with_us`: it ends when the thread that starts
    it ends, also when we are killed (on Linux).
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        username: str,
        password: str,
        token: str | None = None,
        port: int | None = None,
        executable: Path = EXECUTABLE,
        local_files: Path | None = None,
        environment: Mapping[str, str] | None = None,
        report: Callable[[str], None] = print,
        end_with_us: bool = False,
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.username = username
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log_path = self.data_dir / "label-studio.log"
        self._password = password
        self._given_token = token
        self._executable = executable
        self._local_files = local_files
        self._environment = dict(environment or {})
        self._report = report
        self._before_exec = end_with_parent if end_with_us else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def token(self) -> str:
        """The legacy token of the first user."""
        return (self.data_dir / "token").read_text().strip()

    @property
    def process_id(self) -> int:
        """Of the server that runs."""
        if self._process is None:
            raise LabelStudioServerError("Label Studio does not run: start it first")
        return self._process.pid

    def start(self, *, timeout_seconds: float = 300.0) -> None:
        """Start it and wait until it answers."""
        if not self._executable.exists():
            raise LabelStudioServerError(f"{self._executable} does not exist: run `make install` first")
        is_first_start = not (self.data_dir / "label_studio.sqlite3").exists()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._keep_token()
        with _locked(self.data_dir / "server.lock") as lock, self.log_path.open("ab") as log:
            refuse_taken_port(self.port)  # Label Studio itself would silently take the next free one
            self._process = self._launch(lock, log)
        atexit.register(self.stop)
        answers = False
        try:
            self._wait_until_it_answers(is_first_start=is_first_start, timeout_seconds=timeout_seconds)
            self._check_that_it_is_ours()
            answers = True
        finally:
            if not answers:  # Ctrl-C too must not leave a server behind
                self.stop()

    def stop(self) -> None:
        """Stop it with everything that it started; harmless when it does not run."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, kind)  # its own session, so its group has its own id
            except ProcessLookupError:
                break
            try:
                process.wait(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def create_annotator(self, *, email: str, password: str) -> str:
        """Sign an account up by the organisation's invitation link, as a person would; returns its legacy token.

        An account that is there already is logged in instead.
        """
        invitation = httpx.get(f"{self.url}/api/invite", headers={"Authorization": f"Token {self.token}"})
        invitation.raise_for_status()
        with httpx.Client(base_url=self.url, timeout=60.0) as browser:
            form = {"email": email, "password": password}
            if not _submit(browser, f"/user/signup/?token={invitation.json()['token']}", form):
                self._log_in(browser, email=email, password=password)
            answer = browser.get("/api/current-user/token")
            answer.raise_for_status()
            return str(answer.json()["token"])

    def create_personal_access_token(self, *, email: str, password: str) -> str:
        """Make a personal access token for an account. Each may have one, and its text is shown only now."""
        with httpx.Client(base_url=self.url, timeout=60.0) as browser:
            self._log_in(browser, email=email, password=password)
            answer = browser.post("/api/token/", json={}, headers={"X-CSRFToken": browser.cookies["csrftoken"]})
        if answer.status_code == 409:
            raise LabelStudioServerError(
                f"{email} has a personal access token already: revoke it in Label Studio first"
            )
        answer.raise_for_status()
        return str(answer.json()["token"])

    def _keep_token(self) -> None:
        path = self.data_dir / "token"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(self._given_token or secrets.token_hex(20))
        elif self._given_token not in (None, self.token):
            raise LabelStudioServerError(f"{self.data_dir} was made with another token; it is in {path}")

    def _launch(self, lock: IO[bytes], log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [str(self._executable), "start", "--no-browser", "--internal-host", HOST, "--port", str(self.port)]
        return subprocess.Popen(
            command,
            cwd=self.data_dir,
            env=self._server_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=self._before_exec,
            start_new_session=True,
            pass_fds=(lock.fileno(),),  # holds the folder for as long as the server lives, even without us
        )

    def _server_environment(self) -> dict[str, str]:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= {
            "LABEL_STUDIO_BASE_DATA_DIR": str(self.data_dir),
            "LABEL_STUDIO_HOST": self.url,
            "LABEL_STUDIO_USERNAME": self.username,
            "LABEL_STUDIO_PASSWORD": self._password,
            "LABEL_STUDIO_USER_TOKEN": self.token,
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            "USE_DEFAULT_BANNED_SUBNETS": "0",  # or it refuses a backend on this machine
            "COLLECT_ANALYTICS": "0",
            "LATEST_VERSION_CHECK": "0",
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
        }
        if self._local_files is not None:
            environment |= {
                "LOCAL_FILES_SERVING_ENABLED": "true",
                "LOCAL_FILES_DOCUMENT_ROOT": str(self._local_files.resolve()),
            }
        return environment | self._environment

    def _wait_until_it_answers(self, *, is_first_start: bool, timeout_seconds: float) -> None:
        doing = "prepares its database (about a minute, only once)" if is_first_start else "starts"
        started = reported = time.monotonic()
        self._report(f"Label Studio {doing} ...")
        while not self._answers():
            now = time.monotonic()
            if self._process is None or self._process.poll() is not None:
                raise LabelStudioServerError(f"Label Studio ended while it started:\n{self._end_of_log()}")
            if now - started > timeout_seconds:
                raise LabelStudioServerError(
                    f"Label Studio did not answer within {timeout_seconds:.0f} s:\n{self._end_of_log()}"
                )
            if now - reported >= _REPORT_EVERY_SECONDS:
                reported = now
                self._report(f"Label Studio {doing} ... {now - started:.0f} s")
            time.sleep(0.2)
        self._report(f"Label Studio answers at {self.url} ({time.monotonic() - started:.0f} s)")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2.0).is_success
        except httpx.TransportError:
            return False

    def _check_that_it_is_ours(self) -> None:
        answer = httpx.get(
            f"{self.url}/api/current-user/whoami", headers={"Authorization": f"Token {self.token}"}, timeout=60.0
        )
        if not answer.is_success:
            raise LabelStudioServerError(
                f"the Label Studio at {self.url} does not know the token in {self.data_dir / 'token'} "
                f"({answer.status_code}): the folder was made by something else, choose another one"
            )

    def _end_of_log(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])

    def _log_in(self, browser: httpx.Client, *, email: str, password: str) -> None:
        if not _submit(browser, "/user/login/", {"email": email, "password": password}):
            raise LabelStudioServerError(f"Label Studio refused to log {email} in: wrong password, or no such account?")


def _submit(browser: httpx.Client, path: str, form: dict[str, str]) -> bool:
    """Fill a form of Label Studio's in; it redirects when it likes what it got and shows the form again otherwise."""
    page = browser.get(path)
    page.raise_for_status()
    match = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
    if match is None:
        raise LabelStudioServerError(f"{page.url}: expected a form of Label Studio")
    answer = browser.post(path, data={**form, "csrfmiddlewaretoken": match[1]}, headers={"Referer": str(page.url)})
    return answer.is_redirect


def refuse_taken_port(port: int, *, hint: str = "choose another") -> None:
    """LabelStudioServerError when something listens on a port of this machine, or no such port exists."""
    if not 0 < port < 65536:
        raise LabelStudioServerError(f"port {port}: expected 1 to 65535, {hint}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise LabelStudioServerError(f"port {port} is taken: stop what uses it, or {hint}") from error


def free_port() -> int:
    """A port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _locked(path: Path) -> IO[bytes]:
    """The open file, locked until the last process that holds it ends: two servers on one folder would ruin it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise LabelStudioServerError(
            f"a Label Studio runs on {path.parent} already: stop it (`fuser {path}` names the process)"
        ) from error
    return file
