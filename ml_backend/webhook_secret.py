"""The secret by which the web process knows Label Studio's webhooks, with which Label Studio sends no password.

A random one in a file that only this user may read. Label Studio shows the headers of its webhooks to everybody who may
edit the project, so the secret opens /webhook and nothing else, and tells nothing of the password.
"""

import logging
from collections.abc import Mapping

from ml_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailableError
from ml_backend.ls_client import LabelStudioClient
from ml_backend.settings import Settings
from ml_backend.shared_secret import shared_secret
from ml_backend.store import Store, open_store

logger = logging.getLogger(__name__)

HEADER = "X-TSP-Webhook-Secret"


def webhook_secret(settings: Settings, *, store: Store | None = None) -> str | None:
    """The secret in MODEL_DIR, or in the object store (`store` if that is open already), made by whichever process asks
    first; None when no password is asked for either. Raises SettingsError, and StoreUnavailableError while there is
    none in MODEL_DIR."""
    if settings.basic_auth_pass is None:
        return None
    store = store or open_store(settings)
    return shared_secret(settings.model_dir / "webhook-secret", of="the webhooks", store=store)


def guard_webhooks(
    settings: Settings, client: LabelStudioClient, project_id: int, *, store: Store | None = None
) -> None:
    """Give the secret to the webhooks that Label Studio has made for this backend: those at the address of a connected
    backend that is sent our user name. Raises only what Label Studio's being away or refusing the token raises."""
    secret = webhook_secret(settings, store=store)
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
