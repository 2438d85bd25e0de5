"""What choosing the next batch costs as a pool grows: each strategy, each size in a process of its own.

    python -m scripts.bench_plan [--sizes 1000,10000,100000] [--strategies tsp,core_set] [--out docs/bench] [--json]

or `scripts.bench plan` with the same options. A pool is a synthetic scores file, as the worker writes it; it is read
and chosen from as in a live project. Each line of the answer has CPU seconds and the largest memory of the process
(`empty` is a process that has only started); `growth` is the exponent of the seconds between two sizes: 1 is linear.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ml_backend.batch import candidates
from ml_backend.pool import packed
from ml_backend.pseudo_labels import kept_detections
from model.config import PseudoLabelConfig
from model.files import write_json
from model.strategies import STRATEGIES, Observations
from model.types import Detections
from scripts.arguments import positive
from scripts.bench_label_studio import SIZE, polygons
from scripts.chaos_report import machine
from scripts.make_phantoms import CLASS_NAMES

ANNOTATED, BATCH, FEATURES = 3000, 500, 320  # the paper's budget and batch; features of EfficientNet-lite0
POLYGONS = 15  # that people see in an image
_BODIES = 48
_SMALLEST = BATCH * 5 // 4  # a pool; a tenth of it is for validation
_ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measure every strategy at every size and print what it costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--out", type=Path, help="folder in which the result is kept as plan.json")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_choose(options.one[0], Path(options.one[1]))))
        return
    there = machine()
    result = {"name": "plan", **plan(options), "machine": there}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "plan.json", result)
    if not options.json:
        print("\n".join(sentences(result)))
    print(json.dumps(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of `plan`."""
    parser.add_argument(
        "--sizes", type=_sizes, default="1000,10000,100000", help="tasks of the pool of plan, by commas"
    )
    parser.add_argument(
        "--strategies", type=_strategies, default=",".join(STRATEGIES), help="of plan, by commas; default: all"
    )


def _sizes(text: str) -> list[int]:
    sizes = [positive(size) for size in text.split(",")]
    if min(sizes) < _SMALLEST:
        raise argparse.ArgumentTypeError(
            f"expected at least {_SMALLEST} tasks, of which {BATCH} can be chosen, got {min(sizes)}"
        )
    return sizes


def _strategies(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(STRATEGIES):
        raise argparse.ArgumentTypeError(f"expected {', '.join(STRATEGIES)}, got {', '.join(sorted(unknown))}")
    return names


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """What each of `options.strategies` costs at each of `options.sizes`, and how that grows."""
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in options.strategies}
    for size in options.sizes:
        for features in (False, True):
            names = [name for name in options.strategies if STRATEGIES[name].compares_images is features]
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                path = Path(folder) / "scores.jsonl"
                if names:
                    _write_scores(path, size, features=features)
                for name in names:
                    command = [sys.executable, "-m", "scripts.bench_plan", "--one", name, str(path)]
                    done = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True)
                    line_bytes = path.stat().st_size // size
                    costs[name].append({"tasks": size, "line_bytes": line_bytes, **json.loads(done.stdout)})
    growth = {name: [_exponent(a, b) for a, b in pairwise(c)] for name, c in costs.items()}
    return {"annotated": ANNOTATED, "batch": BATCH, "features": FEATURES, "costs": costs, "growth": growth}


def _exponent(small: dict[str, float], large: dict[str, float]) -> float:
    return round(math.log(large["seconds"] / small["seconds"]) / math.log(large["tasks"] / small["tasks"]), 2)


def _write_scores(path: Path, size: int, *, features: bool) -> None:
    """A scores file of so many tasks, as the worker writes it, perhaps with features, of a few hundred clusters. What
    is seen in an image repeats itself after `_BODIES` tasks, since to make it takes long."""
    rng = np.random.default_rng(size)
    clusters = rng.normal(size=(300, FEATURES)).astype(np.float32)
    seen = [json.dumps({"result": polygons(POLYGONS, i), "detections": _detections(i)}) for i in range(_BODIES)]
    with path.open("w") as lines:
        for task in range(size):
            name = f"{task:064x}"
            about = {"task": task, "image": name, "path": f"/data/images/{name}", "image_hw": [SIZE, SIZE]}
            scores = {"score": rng.random(), "threshold": 0.3, "instances": POLYGONS}
            parts = [json.dumps(about | scores), seen[task % _BODIES]]
            if features:
                feature = packed(clusters[rng.integers(300)] + rng.normal(scale=0.3, size=FEATURES))
                parts.append(json.dumps({"feature": feature}))
            lines.write("{" + ", ".join(part[1:-1] for part in parts) + "}\n")


def _detections(seed: int) -> dict[str, Any]:
    """What is kept of twice as many detections as people see, for pseudo labels: masks of those that are trusted."""
    rng, count = np.random.default_rng(seed), 2 * POLYGONS
    corners = rng.uniform(0, SIZE * 0.8, (count, 2))
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    scores = rng.uniform(0.3, 1.0, (3, count)).astype(np.float32)
    scores[:, : POLYGONS // 3] = 0.95  # trusted
    found = Detections(
        image_hw=(SIZE, SIZE),
        boxes_xyxy=np.concatenate([corners, corners + rng.uniform(10, 100, (count, 2))], axis=1).astype(np.float32),
        labels=rng.integers(1, len(CLASS_NAMES) + 1, count),
        class_scores=scores[0],
        box_scores=scores[1],
        mask_scores=scores[2],
        roi_masks=np.repeat((1 - x**2 - y**2).clip(0, 1)[None], count, axis=0).astype(np.float32),
    )
    return kept_detections(found, PseudoLabelConfig(), class_names=CLASS_NAMES, mask_threshold=0.3)


def _choose(name: str, path: Path) -> dict[str, float]:
    """Read the scores file and choose from it; CPU seconds of both, and the largest memory of this process, in MB."""
    strategy, empty = STRATEGIES[name], _memory_mb()
    rng = np.random.default_rng(0)
    labelled = Observations(ANNOTATED)
    for feature in rng.normal(size=(ANNOTATED, FEATURES)).astype(np.float32):
        labelled.append(None, feature)
    waiting = set(range(sum(1 for _ in path.open("rb"))))
    started = time.process_time()
    tasks, pool = candidates(path, waiting, set(), validation_fraction=0.1)
    read = time.process_time()
    chosen = strategy.choose(pool, labelled, BATCH, seed=0)
    ended = time.process_time()
    if len({tasks[i] for i in chosen}) != BATCH:
        sys.exit(f"{name} did not choose {BATCH} different tasks of {len(waiting)}")
    return {
        "seconds": round(ended - started, 3),
        "reading": round(read - started, 3),
        "choosing": round(ended - read, 3),
        "memory_mb": _memory_mb(),
        "empty_mb": empty,
    }


def _memory_mb() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def sentences(result: dict[str, Any]) -> list[str]:
    """The costs in words."""
    return [
        f"{name}, {cost['tasks']} tasks of {cost['line_bytes'] / 1000:.1f} kB: {cost['seconds']:.2f} s, of which "
        f"reading {cost['reading']:.2f}; {cost['memory_mb']} MB, {cost['empty_mb']} of them before it began"
        for name, costs in result["costs"].items()
        for cost in costs
    ] + [f"{name}: seconds grow with exponents {growth}" for name, growth in result["growth"].items() if growth]


if __name__ == "__main__":
    main()
