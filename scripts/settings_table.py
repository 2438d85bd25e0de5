"""The README's table of settings, made from ml_backend/settings.py.

python -m scripts.settings_table            prints it
python -m scripts.settings_table --write    puts it into README.md
"""

import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any

from ml_backend.settings import Settings

README = Path(__file__).resolve().parent.parent / "README.md"
_BETWEEN_MARKERS = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def settings_table() -> str:
    """The whole table; one row for each setting, in the order of settings.py."""
    rows = [
        f"| `{field.validation_alias}` | {_shown(field.default)} | {field.description} |"
        for field in Settings.model_fields.values()
    ]
    return "\n".join(["| name | default | meaning |", "|---|---|---|", *rows]) + "\n"


def table_in(readme: str) -> str:
    """What stands between the markers of a README; ValueError without them."""
    match = _BETWEEN_MARKERS.search(readme)
    if match is None:
        raise ValueError("expected the lines <!-- settings --> and <!-- /settings --> around the table")
    return match[0]


def with_table(readme: str) -> str:
    """The README with the table of today, and everything else as it was."""
    table_in(readme)  # without the markers there is nowhere to put it
    return _BETWEEN_MARKERS.sub(lambda _: settings_table(), readme, count=1)


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(settings_table(), end="")
        return
    README.write_text(with_table(README.read_text()))


def _shown(default: Any) -> str:
    """A default as one writes it into the environment; "none" where there is none."""
    if default is None or default == "":
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    value = default.value if isinstance(default, Enum) else default
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    main()
