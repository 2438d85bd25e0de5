"""A secret in MODEL_DIR, known to whoever shares the folder or the store: random, and readable by this user alone."""

import errno
import logging
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from ml_backend.errors import SettingsError
from ml_backend.store import Store

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"[0-9a-f]{64}")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # FAT, SMB, and what else has no hard links
_WRITTEN_SECONDS = 3.0  # by whoever has created an empty file


def shared_secret(path: Path, of: str, *, store: Store | None = None) -> str:
    """64 hexadecimal digits, made by whichever process asks first. SettingsError, which says what it is the secret
    `of`, when the file cannot be read or written, is damaged, or stays open to other users; StoreUnavailableError while
    there is no file."""
    try:
        if not path.exists():
            secret = secrets.token_hex(32)
            _create(path, store.create(path, secret.encode()).decode(errors="replace") if store else secret)
        secret = _read(path, of)
    except OSError as error:
        raise SettingsError(
            f"{path}: the secret of {of} cannot be read or written ({error.strerror}): run all processes as the same "
            "user"
        ) from error
    if not _SECRET.fullmatch(secret):
        raise SettingsError(
            f"{path}: expected 64 hexadecimal digits: delete the file, also in the store of TSP_STORE_URL if there is "
            "one, and start all processes again"
        )
    return secret


def _read(path: Path, of: str) -> str:
    """What stands in the file, which is closed to other users if it was open to them."""
    until = time.monotonic() + _WRITTEN_SECONDS
    while not path.stat().st_size and time.monotonic() < until:
        time.sleep(0.05)
    with path.open(encoding="ascii", errors="replace") as file:
        if found := _open_to_others(file.fileno()):
            os.fchmod(file.fileno(), 0o600)
            if still := _open_to_others(file.fileno()):
                raise SettingsError(
                    f"{path}: expected a file that its owner alone may read, since it holds the secret of {of}, got "
                    f"mode {still:o}, which cannot be changed there: mount this folder so that its files have mode 600"
                )
            logger.warning(
                "%s: the secret of %s was open to other users (mode %o, expected 600) and is no longer; if one of them "
                "may have read it, delete the file and start all processes again",
                path, of, found,
            )  # fmt: skip
        return file.read().strip()


def _open_to_others(descriptor: int) -> int:
    """The mode of a file that others than its owner may read or write; 0 when they may not."""
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    return mode if mode & 0o077 else 0


def _create(path: Path, secret: str) -> None:
    """Never over a file that another process has made meanwhile, and in one step where there are hard links. Elsewhere
    the file is empty for a moment."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    _write_new(unfinished, secret)
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with suppress(FileExistsError):
            _write_new(path, secret)
    finally:
        unfinished.unlink()


def _write_new(path: Path, secret: str) -> None:
    """FileExistsError when there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
