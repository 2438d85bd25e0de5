"""This machine takes part in the trainings of a worker on another one. `python -m ml_backend.machine`

It needs the worker's TSP_MEETING_POINT and MODEL_DIR, the same folder at the same path, and no Label Studio: images,
weights and checkpoints come through the folder (docs/decisions/084). Ctrl-C and SIGTERM end it at once; the training
then waits until a machine is there again.
"""

import logging
import os
import signal
import sys
from types import FrameType

from ml_backend.logs import start_logging
from ml_backend.machines import meeting_of
from ml_backend.settings import Settings
from model.errors import TSPError
from model.machines import follow

logger = logging.getLogger(__name__)


def main() -> None:
    """Follow with the settings of the environment."""
    try:
        settings = Settings.from_environment()
        meeting = meeting_of(settings)
    except TSPError as error:
        sys.exit(str(error))
    if meeting is None:
        sys.exit("TSP_MEETING_POINT is not set: expected host:port of the worker that leads the trainings")
    start_logging(settings)
    os.nice(settings.niceness)
    logger.info("ready to train with the worker at %s", meeting.address)

    def stop(number: int, frame: FrameType | None) -> None:
        logging.shutdown()
        os._exit(0)  # our processes end when they find that we have

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    follow(meeting)


if __name__ == "__main__":
    main()
