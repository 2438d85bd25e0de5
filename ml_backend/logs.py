"""What both processes log."""

import logging

from ml_backend.settings import Settings

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
