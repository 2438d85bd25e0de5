"""What the two processes write to their standard error."""

import logging

_TALKATIVE = ("httpx", "httpcore", "PIL", "asyncio", "urllib3")  # at DEBUG, each request and image is many lines


def start_logging(level: str) -> None:
    """Our own lines from this level on, those of libraries from WARNING on."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
