"""The run.json of a run of the benchmark."""

import json
from pathlib import Path
from typing import Any

_PARTS = {"line": str, "seed": int, "strategy": str, "semi_supervised": bool, "settings": dict, "cycles": list}
_MEND = "delete its folder, and the same `benchmark run` makes it anew"


def read_run(path: Path) -> dict[str, Any]:
    """What a run.json says. ValueError, which says how to mend it, when it is damaged or something else."""
    try:
        run = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected the run.json of a run, got what is no JSON ({error}); {_MEND}") from error
    if not isinstance(run, dict) or not all(isinstance(run.get(name), kind) for name, kind in _PARTS.items()):
        raise ValueError(
            f"{path}: expected the run.json of a run, with {', '.join(_PARTS)}, got something else; {_MEND}"
        )
    return run
