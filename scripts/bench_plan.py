"""What choosing the next batch costs as a pool grows: each strategy, each size in a process of its own.

    python -m scripts.bench_plan [--sizes 1000,10000,100000] [--strategies tsp,core_set] [--out docs/bench] [--json]

A pool is a synthetic scores file, as the worker writes it; it is read and chosen from as in a live project. Each line
of the answer has CPU seconds and the largest memory of the process (`empty` is a process that has only started);
`growth` is the exponent of the seconds between two sizes: 1 is linear.
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
from ml_backend.pool import append_line, packed
from model.files import write_json
from model.strategies import STRATEGIES, Observations
from scripts.arguments import positive
from scripts.chaos_report import machine

ANNOTATED, BATCH, FEATURES = 3000, 500, 320  # the paper's budget and batch; features of EfficientNet-lite0


def main() -> None:
    """Measure every strategy at every size and print what it costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=_sizes, default="1000,10000,100000", help="tasks of the pool, by commas")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="by commas")
    parser.add_argument("--out", type=Path, help="folder in which the result is kept as plan.json")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_choose(options.one[0], Path(options.one[1]))))
        return
    if min(options.sizes) < BATCH:
        parser.error(f"--sizes: expected pools of at least a batch, {BATCH} tasks, got {min(options.sizes)}")
    strategies = options.strategies.split(",")
    if unknown := set(strategies) - set(STRATEGIES):
        parser.error(f"--strategies: expected {', '.join(STRATEGIES)}, got {', '.join(sorted(unknown))}")
    result = _measure(strategies, options.sizes)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "plan.json", result)
    if not options.json:
        print("\n".join(_sentences(result)))
    print(json.dumps(result))


def _sizes(text: str) -> list[int]:
    return [positive(size) for size in text.split(",")]


def _measure(strategies: list[str], sizes: list[int]) -> dict[str, Any]:
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in strategies}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            paths = {features: Path(folder) / f"{size}-{features}.jsonl" for features in (False, True)}
            for features, path in paths.items():
                _write_scores(path, size, features=features)
            for name in strategies:
                path = paths[STRATEGIES[name].compares_images]
                command = [sys.executable, "-m", "scripts.bench_plan", "--one", name, str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                costs[name].append({"tasks": size, **json.loads(done.stdout)})
            for path in paths.values():
                path.unlink()
    growth = {name: [_exponent(a, b) for a, b in pairwise(c)] for name, c in costs.items()}
    return {
        "name": "plan",
        "annotated": ANNOTATED,
        "batch": BATCH,
        "features": FEATURES,
        "costs": costs,
        "growth": growth,
        "machine": machine(),
    }


def _exponent(small: dict[str, float], large: dict[str, float]) -> float:
    return round(math.log(large["seconds"] / small["seconds"]) / math.log(large["tasks"] / small["tasks"]), 2)


def _write_scores(path: Path, size: int, *, features: bool) -> None:
    """A scores file of so many tasks with one polygon each, perhaps with features, of a few hundred clusters."""
    rng = np.random.default_rng(size)
    clusters = rng.normal(size=(300, FEATURES)).astype(np.float32)
    polygon = [{"type": "polygonlabels", "value": {"points": rng.uniform(0, 100, (30, 2)).round(2).tolist()}}]
    with path.open("w") as lines:
        for task in range(size):
            line = {"task": task, "image": f"{task:064x}", "score": rng.random(), "result": polygon}
            if features:
                line["feature"] = packed(clusters[rng.integers(300)] + rng.normal(scale=0.3, size=FEATURES))
            append_line(lines, line)


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


def _sentences(result: dict[str, Any]) -> list[str]:
    return [
        f"{name}, {cost['tasks']} tasks: {cost['seconds']:.2f} s, of which reading {cost['reading']:.2f}; "
        f"{cost['memory_mb']} MB, {cost['empty_mb']} of them before it began"
        for name, costs in result["costs"].items()
        for cost in costs
    ] + [f"{name}: seconds grow with exponents {growth}" for name, growth in result["growth"].items()]


if __name__ == "__main__":
    main()
