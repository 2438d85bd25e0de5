"""The health checks of containers, quick because nothing is imported: ends with 0 when all is well, else says why not.

python -m ml_backend.health http://127.0.0.1:9090/health    the web process answers
python -m ml_backend.health /tmp/alive                      the worker touched its TSP_ALIVE_FILE a short while ago
"""

import sys
import time
import urllib.request
from pathlib import Path

_ANSWER_SECONDS = 4.0
_SILENT_SECONDS = 30.0  # the worker gives a sign every few seconds


def trouble_with(what: str) -> str:
    """What is wrong with an address or a file; "" when all is well."""
    return _trouble_with_address(what) if what.startswith(("http://", "https://")) else _trouble_with_file(Path(what))


def _trouble_with_address(url: str) -> str:
    try:
        urllib.request.urlopen(url, timeout=_ANSWER_SECONDS).close()  # noqa: S310 - http(s), or it is a file
    except OSError as error:  # also of every answer that is an error
        return f"{url}: {error}"
    return ""


def _trouble_with_file(path: Path) -> str:
    try:
        age = time.time() - path.stat().st_mtime
    except OSError as error:
        return f"{path}: {error.strerror}; TSP_ALIVE_FILE names the file that the worker touches"
    return f"{path}: touched {age:.0f} s ago, expected at most {_SILENT_SECONDS:.0f} s" if age > _SILENT_SECONDS else ""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(str(__doc__))
    sys.exit(trouble_with(sys.argv[1]) or None)


if __name__ == "__main__":
    main()
