"""Real image sets, which lie beside the repository where they are installed."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1].parent / "shared" / "data"


def annotations_of(name: str) -> Path:
    """The COCO file of a real set; without it the test is skipped, and says so."""
    path = FOLDER / name / "annotations.json"
    if not path.exists():
        pytest.skip(f"the real image sets are not installed here ({path} is missing)")
    return path
