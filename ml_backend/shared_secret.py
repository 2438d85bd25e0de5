"""A secret in MODEL_DIR, known to whoever shares the folder or the store: random, and readable by this user alone."""

import re
import secrets
from contextlib import suppress
from pathlib import Path

from ml_backend.errors import SettingsError, StoreUnavailableError
from ml_backend.store import Store
from model.files import create_private

_SECRET = re.compile(r"[0-9a-f]{64}")


def shared_secret(path: Path, of: str, *, store: Store | None = None) -> str:
    """64 hexadecimal digits, made by whichever process asks first; with a store, what that has. SettingsError, which
    says what it is the secret `of`, when the file cannot be read or written, or is damaged; StoreUnavailableError
    while there is no file."""
    try:
        secret = _read(path) if path.exists() else ""
        if store and (not secret or _SECRET.fullmatch(secret)):
            secret = _agreed(path, secret, store)
        elif not secret:
            secret = _created(path, secrets.token_hex(32))
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


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace").strip()


def _agreed(path: Path, here: str, store: Store) -> str:
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
    return kept if kept == here else _created(path, kept)


def _created(path: Path, secret: str) -> str:
    """What the file has afterwards."""
    with suppress(FileExistsError):  # another process was quicker
        create_private(path, secret.encode())
    return _read(path)
