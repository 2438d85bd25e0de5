"""The errors of the service; each message says what was expected, what came and how to mend it."""

from model.errors import TSPError


class LabelConfigError(TSPError):
    """The project's labelling configuration has nothing that this backend can draw."""


class LabelStudioError(TSPError):
    """Label Studio answered something that cannot be worked with."""


class LabelStudioUnavailableError(LabelStudioError):
    """Label Studio could not be reached or answered 429 or 5xx: worth trying again."""


class LabelStudioAuthError(LabelStudioError):
    """Label Studio refused the access token."""


class ProjectGoneError(LabelStudioError):
    """Label Studio does not have the project, or does not show it to the token's owner."""


class ImageError(TSPError):
    """An image of a task cannot be fetched or read."""


class ImageUnavailableError(ImageError):
    """The image's host did not answer, or with 408, 429 or 5xx: worth trying again later."""


class ImageHostSilentError(ImageUnavailableError):
    """The image's host gave no answer, or broke off: others of it may fail, too, in this moment."""


class StoreError(TSPError):
    """The object store has something that cannot be used."""


class StoreUnavailableError(StoreError):
    """The object store of TSP_STORE_URL did not answer, or refused us: worth trying again."""


class DatabaseAwayError(TSPError):
    """The database takes nothing at the moment, so that an event of Label Studio could not be kept."""


class TooManyTasksError(TSPError):
    """More tasks are to be predicted at once than can be while somebody waits."""


class SettingsError(TSPError):
    """A setting is missing or cannot be used."""
