"""What both processes log, and how errors are told."""

import logging

from sqlalchemy.exc import DBAPIError, OperationalError

from ml_backend.settings import Settings
from model.errors import TSPError

logger = logging.getLogger(__name__)

OUR_OWN = ("__main__", "ml_backend", "model")


def start_logging(settings: Settings) -> None:
    """LOG_LEVEL is about our own packages. Libraries stay at WARNING: at DEBUG some of them print headers, addresses
    with signatures, and every statement with its values."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in OUR_OWN:
        logging.getLogger(name).setLevel(settings.log_level)
    if unknown := Settings.unknown_names():
        logger.warning("there are no settings %s: misspelt? The README lists every setting.", ", ".join(unknown))


def speaks_for_itself(error: Exception) -> bool:
    """Whether the message says enough without the traceback: one of ours, or the database is away, locked or full."""
    return isinstance(error, TSPError | OperationalError)


def in_words(error: Exception) -> str:
    """One line for people: what the database says comes without the statement and its parameters."""
    if isinstance(error, DBAPIError):
        return f"the database does not answer, or refuses this: {str(error.orig).partition(chr(10))[0]}"
    return str(error) if isinstance(error, TSPError) else f"{type(error).__name__}: {error}"
