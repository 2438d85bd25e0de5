"""Where the machines of one training meet, by the settings."""

from ml_backend.errors import SettingsError
from ml_backend.settings import Settings
from ml_backend.shared_secret import shared_secret
from model.errors import InvalidInputError
from model.machines import Meeting


def meeting_of(settings: Settings) -> Meeting | None:
    """The meeting at TSP_MEETING_POINT; None when that is not set. SettingsError when it cannot be one."""
    if not settings.meeting_point:
        return None
    folder = settings.model_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        secret = shared_secret(folder / "machines-secret", of="the machines").encode()
        return Meeting.at(settings.meeting_point, machines=settings.machines, secret=secret, folder=folder)
    except (InvalidInputError, OSError) as error:
        raise SettingsError(f"TSP_MEETING_POINT: {error}") from error
