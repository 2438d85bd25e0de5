"""A secret in MODEL_DIR, known to whoever shares the folder or the store: random, and readable by this user alone."""

import logging
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from ml_backend.errors import SettingsError, StoreUnavailableError
from ml_backend.store import Store
from model.files import create_private

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"[0-9a-f]{64}")
_WRITTEN_SECONDS = 3.0  # by whoever has created an empty file


def shared_secret(path: Path, of: str, *, store: Store | None = None) -> str:
    """64 hexadecimal digits, made by whichever process asks first; with a store, what that has. SettingsError, which
    says what it is the secret `of`, when the file cannot be read or written, is damaged, or stays open to other users;
    StoreUnavailableError while there is no file."""
    try:
        secret = _read(path, of) if path.exists() else ""
        if store and (not secret or _SECRET.fullmatch(secret)):
            secret = _agreed(path, of, secret, store)
        elif not secret:
            secret = _created(path, of, secrets.token_hex(32))
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


def _agreed(path: Path, of: str, here: str, store: Store) -> str:
    """The store's secret, from now on also in the file; the store gets the one `here` ("" for none) when it has none.
    While it is away, the one here will do."""
    try:
        kept = store.create(path, (here or secrets.token_hex(32)).encode()).decode(errors="replace").strip()
    except StoreUnavailableError:
        if here:
            return here
        raise
    if here and kept != here:  # of before there was a store
        path.unlink(missing_ok=True)
    return kept if kept == here else _created(path, of, kept)


def _created(path: Path, of: str, secret: str) -> str:
    """What the file has afterwards."""
    with suppress(FileExistsError):  # another process was quicker
        create_private(path, secret.encode())
    return _read(path, of)


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
