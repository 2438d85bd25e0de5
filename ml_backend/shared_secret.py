"""A secret in MODEL_DIR, known to whoever shares the folder or the store: random, and readable by this user alone."""

import re
import secrets
from contextlib import suppress
from pathlib import Path

from ml_backend.errors import SettingsError
from ml_backend.store import Store
from model.files import create_private

_SECRET = re.compile(r"[0-9a-f]{64}")


def shared_secret(path: Path, of: str, *, store: Store | None = None) -> str:
    """64 hexadecimal digits, made by whichever process asks first. SettingsError, which says what it is the secret
    `of`, when the file cannot be read or written, or is damaged; StoreUnavailableError while there is no file."""
    try:
        if not path.exists():
            secret = secrets.token_hex(32)
            with suppress(FileExistsError):  # another process was quicker
                create_private(path, store.create(path, secret.encode()) if store else secret.encode())
        secret = path.read_text(encoding="ascii", errors="replace").strip()
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
