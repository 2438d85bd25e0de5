"""A secret in a folder that processes share, on shares of several kinds."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ml_backend.errors import SettingsError
from ml_backend.shared_secret import shared_secret

# A share without hard links, as SMB or FAT are: none can be mounted here, so the system call is refused as there.
WITHOUT_LINKS = """
import os, sys
from pathlib import Path
from ml_backend.shared_secret import shared_secret
def refuse(*args, **options):
    raise OSError({errno}, os.strerror({errno}))
os.link = refuse
sys.stdin.readline()
print(shared_secret(Path(sys.argv[1]), of="the tests"))
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("found", [0o644, 0o640, 0o602])
def test_a_secret_that_others_could_read_or_change_is_closed_to_them_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, found: int
) -> None:
    path = tmp_path / "secret"
    secret = shared_secret(path, of="the tests")
    assert caplog.text == ""
    path.chmod(found)
    assert shared_secret(path, of="the tests") == secret
    assert mode(path) == 0o600
    assert f"{path}: the secret of the tests was open to other users (mode {found:o}, expected 600)" in caplog.text
    assert "delete the file" in caplog.text


def test_a_secret_that_stays_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a share that has one mode for all files: its chmod says yes and does nothing."""
    path = tmp_path / "secret"
    shared_secret(path, of="the tests")
    path.chmod(0o644)
    monkeypatch.setattr(os, "fchmod", lambda descriptor, mode: None)
    with pytest.raises(SettingsError, match=r"expected a file that its owner alone may read.*got mode 644.*mount"):
        shared_secret(path, of="the tests")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_processes_that_start_together_on_a_share_without_hard_links_have_one_secret(
    tmp_path: Path, number: int
) -> None:
    command = [sys.executable, "-c", WITHOUT_LINKS.format(errno=number), str(tmp_path / "secret")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    assert len({secret for secret, _ in said}) == 1
    assert mode(tmp_path / "secret") == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_secret_that_another_process_is_about_to_write_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    program = "import sys, time; time.sleep(0.5); open(sys.argv[1], 'w').write('a' * 64)"
    with subprocess.Popen([sys.executable, "-c", program, str(path)]):
        assert shared_secret(path, of="the tests") == "a" * 64


def test_a_secret_that_nobody_comes_to_write_is_told(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    with pytest.raises(SettingsError, match="expected 64 hexadecimal digits: delete the file"):
        shared_secret(path, of="the tests")


def test_a_damaged_secret_is_told(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("short")
    with pytest.raises(SettingsError, match="expected 64 hexadecimal digits"):
        shared_secret(tmp_path / "secret", of="the tests")
