"""What a large installation would ask for, from the costs that were measured here: the table of docs/scale.md.

    python -m scripts.scale [--images 10000000] [--annotators 200] [--projects 50] [--seconds 60] [--batch 500]

Measured costs are read from docs/bench; what is assumed is an option, or stands in the table as "assumed".
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from scripts.arguments import positive, positive_number

BENCH = Path(__file__).resolve().parent.parent / "docs" / "bench"
_DAY_SECONDS = 24 * 3600
_STEP_GPU_SECONDS = 0.1  # assumed: a training step of two images at the paper's size; no GPU was tried
# Explored once, in the way of `scripts.bench score-pool`: CPU time of the worker's whole look at images of 1024 px with
# 100 detections, from files to lines of the scores file, loading left out. The network alone would be too little:
# beside such a small one, reading, resizing, duplicates and polygons take most of the time.
_LOOK_SMALL_SECONDS = 0.30
_LOOK_GPU_SECONDS = 0.05  # assumed: a look of ResNet-50 at one image
_EPOCHS, _IMAGES_PER_STEP = 50, 2  # the paper's
_DELETE_SECONDS = 1 / 170  # of Label Studio for one prediction; explored once, on SQLite
_NEXT_TASK_SECONDS = 0.3  # of Label Studio for "next task" in a project of 100,000; explored once, on SQLite
_FILE_MB = 0.5  # assumed, of one image
_PREDICTION_KB = 10  # of 15 polygons of 24 points, as in the benchmark of publications


@dataclass(frozen=True, kw_only=True)
class Measured:
    """CPU seconds for one of each, and how long one prediction waits to be published, from docs/bench."""

    look_resnet50: float
    publish: float  # of Label Studio
    publish_wall: float
    choose: float
    look_small: float = _LOOK_SMALL_SECONDS
    webhook: float = 0.002  # docs/figures.md, "Answers of the web process"

    @classmethod
    def read(cls, pool: float, folder: Path = BENCH) -> Self:
        """From the results of `scripts.bench`; that of publishing is the one whose size is nearest to a pool of so many
        images. Raises FileNotFoundError for one that is missing."""
        looks, plan = (_result(folder / f"{name}.json") for name in ("score-pool", "plan"))
        published = [_result(path) for path in (folder / "publish.json", folder / "100000-tasks" / "publish.json")]
        nearest = min(published, key=lambda result: abs(result["tasks"] - pool))
        ours, largest = [one["ours"] for one in nearest["rounds"]], plan["costs"]["tsp"][-1]
        return cls(
            look_resnet50=looks["ways"]["float32"]["cpu_seconds"] / looks["images"],
            publish=median(one["label_studio_cpu_seconds"] for one in ours) / nearest["tasks"],
            publish_wall=median(one["seconds"] for one in ours) / nearest["tasks"],
            choose=largest["seconds"] / largest["tasks"],
        )


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What is asked of it. People work `hours` a day and need `seconds` for an image."""

    images: int = 10_000_000
    annotators: int = 200
    projects: int = 50
    gpus: int = 32
    seconds: float = 60.0
    hours: float = 7.0
    batch: int = 500
    days: int = 30  # after which the costs are those of the table

    @property
    def annotated_a_day(self) -> float:
        return self.annotators * self.hours * 3600 / self.seconds

    @property
    def cycles_a_day(self) -> float:
        return self.annotated_a_day / self.batch

    @property
    def pool(self) -> float:
        """Unlabelled images of one project."""
        return (self.images - self.days * self.annotated_a_day) / self.projects


def demands(there: Installation, costs: Measured) -> list[tuple[str, float, str, float]]:
    """What each part of the work takes: its name, the amount a day, of what, and how many of the device that does it
    are busy all day."""
    looks = there.cycles_a_day * there.pool
    steps = _EPOCHS * there.days * there.annotated_a_day / there.projects / _IMAGES_PER_STEP * there.cycles_a_day
    work = [
        ("looking, EfficientNet-lite0 at 256 px, CPU cores (explored once)", looks, "images", costs.look_small),
        ("looking, ResNet-50 at 800 px, CPU cores", looks, "images", costs.look_resnet50),
        ("looking, ResNet-50, GPUs (assumed)", looks, "images", _LOOK_GPU_SECONDS),
        ("training, 50 epochs in each cycle, GPUs (assumed)", steps, "steps", _STEP_GPU_SECONDS),
        ("publishing, Label Studio processes", looks, "predictions", costs.publish),
        ("deleting the version before, Label Studio processes (explored once)", looks, "predictions", _DELETE_SECONDS),
        ("serving tasks, Label Studio processes (explored once)", there.annotated_a_day, "tasks", _NEXT_TASK_SECONDS),
        ("choosing, CPU cores", looks, "scores", costs.choose),
        ("webhooks, CPU cores", there.annotated_a_day, "events", costs.webhook),
    ]
    return [(name, amount, unit, amount * cost / _DAY_SECONDS) for name, amount, unit, cost in work]


def table(there: Installation, costs: Measured) -> str:
    """The demands, what is stored, and how long one cycle waits for each part, as Markdown."""
    lines = ["| work | a day | devices busy all day |", "|---|---|---|"]
    lines += [f"| {name} | {amount:.3g} {unit} | {busy:.3g} |" for name, amount, unit, busy in demands(there, costs)]
    pool_gb = there.projects * there.pool * _PREDICTION_KB / 1e6
    stored = [
        ("predictions of one version of each project, in Label Studio's database", f"{pool_gb:.0f} GB"),
        ("image cache, of each machine that sees all (assumed 0.5 MB each)", f"{there.images * _FILE_MB / 1e6:.3g} TB"),
        ("a pool's predictions, until they are published", f"{there.pool * costs.publish_wall / 60:.0f} min"),
        ("a pool seen by one core, EfficientNet-lite0", f"{there.pool * costs.look_small / 3600:.0f} h"),
    ]
    lines += ["", "| once | |", "|---|---|", *(f"| {name} | {amount} |" for name, amount in stored)]
    return "\n".join(lines) + "\n"


def _result(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, kind in Installation.__annotations__.items():
        number = positive if kind is int else positive_number
        parser.add_argument(f"--{name}", type=number, default=getattr(Installation, name), help="default: %(default)s")
    there = Installation(**vars(parser.parse_args()))
    if there.pool <= 0:
        annotated = f"{there.days * there.annotated_a_day:.0f}"
        parser.error(f"--images: expected more than the {annotated} of {there.days} --days of work, got {there.images}")
    print(
        f"{there.annotated_a_day:.3g} images are annotated and {there.cycles_a_day:.3g} cycles start each day; after "
        f"{there.days} days {there.days * there.annotated_a_day / there.projects:.3g} images are annotated and "
        f"{there.pool:.3g} are not, in each project.\n\n{table(there, Measured.read(there.pool))}",
        end="",
    )


if __name__ == "__main__":
    main()
