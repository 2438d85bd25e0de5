"""The secret by which the web process knows Label Studio's webhooks, with which Label Studio sends no password.

A random one in a file that only this user may read. Label Studio shows the headers of its webhooks to everybody who may
edit the project, so the secret opens /webhook and nothing else, and tells nothing of the password.
"""

import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from ml_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailableError, SettingsError
from ml_backend.ls_client import LabelStudioClient
from ml_backend.settings import Settings

logger = logging.getLogger(__name__)

HEADER = "X-TSP-Webhook-Secret"
_SECRET = re.compile(r"[0-9a-f]{64}")


def webhook_secret(settings: Settings) -> str | None:
    """The secret in MODEL_DIR, made by whichever process asks first; None when no password is asked for either."""
    if settings.basic_auth_pass is None:
        return None
    path = settings.model_dir / "webhook-secret"
    try:
        if not path.exists():
            _create(path)
        secret = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise SettingsError(
            f"{path}: the secret of the webhooks cannot be read or written ({error.strerror}): "
            "run web process and worker as the same user"
        ) from error
    if not _SECRET.fullmatch(secret):
        raise SettingsError(f"{path}: expected 64 hexadecimal digits: delete the file and start web process and worker")
    return secret


def guard_webhooks(settings: Settings, client: LabelStudioClient, project_id: int) -> None:
    """Give the secret to the webhooks that Label Studio has made for this backend: those at the address of a connected
    backend that is sent our user name. Raises only what Label Studio's being away or refusing the token raises."""
    secret = webhook_secret(settings)
    if secret is None:
        return
    try:
        _give_secret(settings, client, project_id, {HEADER: secret})
    except (LabelStudioUnavailableError, LabelStudioAuthError):
        raise
    except LabelStudioError as error:  # webhooks only make things quicker
        logger.warning("project %d: its webhook could not be given the secret: %s", project_id, error)


def _give_secret(settings: Settings, client: LabelStudioClient, project_id: int, headers: Mapping[str, str]) -> None:
    lacking = client.webhooks_without(project_id, headers)
    if not any(hook.url.endswith("/webhook") for hook in lacking):
        return
    ours = {
        f"{backend.url.rstrip('/')}/webhook"
        for backend in client.ml_backends(project_id)
        if backend.basic_auth_user == settings.basic_auth_user
    }
    for hook in lacking:
        if hook.url in ours:
            client.add_webhook_headers(hook.id, headers)
            logger.info("project %d: the webhook to %s sends the secret from now on", project_id, hook.url)


def _create(path: Path) -> None:
    """In one step, and never over one that another process has made meanwhile."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        os.link(unfinished, path)
    except FileExistsError:
        pass
    finally:
        unfinished.unlink()
