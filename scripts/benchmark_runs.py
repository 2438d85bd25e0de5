"""The run.json of a run of the benchmark."""

import json
from pathlib import Path
from typing import Any, TypeGuard

_PARTS = {
    "line": str,
    "seed": int,
    "strategy": str,
    "semi_supervised": bool,
    "options": dict,
    "settings": dict,
    "cycles": list,
    "test_instances": dict,
}
_CYCLE = (
    "annotated",
    "annotated_images",
    "annotated_instances",
    "annotated_vertices",
    "new_images",
    "new_empty_images",
    "pseudo_images",
    "pseudo_quality",
    "map_50",
    "map_50_95",
    "rescored_map_50",
    "rescored_map_50_95",
    "ap_50_by_class",
    "box_reliability",
    "mask_reliability",
    "matches",
    "seconds",
)
_SETTINGS = ("cycles", "pool", "test", "pool_images", "test_images")
_MEND = "choose the folder of a run; if `benchmark run` made this one, delete it, and the same command makes it anew"


def read_run(path: Path) -> dict[str, Any]:
    """What a run.json says. ValueError, which says how to mend it, when it cannot be read or is something else."""
    try:
        run = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected the run.json of a run, got what is no JSON ({error}); {_MEND}") from error
    if not _is_run(run):
        raise ValueError(f"{path}: expected the run.json of a run, got other JSON; {_MEND}")
    return run


def _is_run(run: Any) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(run, dict)
        and all(isinstance(run.get(name), kind) for name, kind in _PARTS.items())
        and run["settings"].keys() >= set(_SETTINGS)
        and all(isinstance(cycle, dict) and cycle.keys() >= set(_CYCLE) for cycle in run["cycles"])
    )
