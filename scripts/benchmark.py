"""Label efficiency: Algorithm 1 with an oracle, over strategies and seeds, on any COCO set; resumable at any moment.

    python -m scripts.benchmark run --data <COCO folder> --out <folder> --lines random,tsp+ssl --seeds 0,1,2 --jobs 2
    python -m scripts.benchmark report --out <folder> [--json]

A line is a strategy (`model.strategies.STRATEGIES`), with "+ssl" if it also learns from pseudo labels, or "full": all
images annotated at once. Runs at the same seed start with the same random images. Each run is one folder with one
`run.json`; what is finished is not done again, and several processes may work on one --out.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from model.config import PROFILES, PseudoLabelConfig, TrainingConfig
from model.dataset import LabeledSet, read_coco
from model.errors import TSPError
from model.strategies import STRATEGIES
from scripts.active_learning import FULL, Experiment, RunName, anchors_for, is_finished, run
from scripts.benchmark_report import write_report

PROFILES_OF_EFFORT = {
    # The paper's own settings (section 4.2); wants GPUs.
    "paper": Experiment(
        profile="resnet50_fpn",
        weights="coco",
        network={"min_size": 512, "max_size": 512},
        training=TrainingConfig(batch_size=8),
        first_batch=500,
        batch=500,
        cycles=6,
    ),
    # A run of five cycles in a few minutes on one core.
    "cpu": Experiment(
        profile="efficientnet_lite0_fpn",
        weights="imagenet",
        network={"min_size": 160, "max_size": 256},
        training=TrainingConfig.for_cpu(epochs=10, min_steps=200, checkpoint_every_steps=100),
        first_batch=20,
        batch=20,
        cycles=5,
    ),
}


def main() -> None:
    """Run what is missing, or report what is there."""
    options = _options()
    try:
        if options.command == "report":
            report = write_report(options.out)
            if options.json:
                print(json.dumps(report))
            else:
                print((options.out / "report.md").read_text())
        elif options.jobs > 1:
            _share(options.jobs)
        else:
            _run(options)
    except (TSPError, ValueError) as error:
        sys.exit(f"The benchmark cannot go on: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="carry out the runs that are not finished")
    runner.add_argument("--data", type=Path, required=True, help="COCO folder: images/ and annotations.json")
    runner.add_argument("--out", type=Path, required=True, help="where the runs are kept")
    runner.add_argument("--lines", default="random,tsp,random+ssl,tsp+ssl,full", help="by commas")
    runner.add_argument("--seeds", default="0,1,2", help="by commas")
    runner.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    runner.add_argument("--profile", choices=PROFILES_OF_EFFORT, default="cpu")
    runner.add_argument("--network", choices=PROFILES, help="another network than the profile's")
    runner.add_argument("--size", type=int, help="shorter side the network sees, in pixels")
    runner.add_argument("--pool", type=int, help="images of the pool (a fixed random subset); default: all")
    runner.add_argument("--test", type=int, help="images of the test set (a fixed random subset); default: all")
    runner.add_argument("--first-batch", type=int)
    runner.add_argument("--batch", type=int)
    runner.add_argument("--cycles", type=int)
    runner.add_argument("--epochs", type=int)
    runner.add_argument("--min-steps", type=int)
    runner.add_argument("--beta", type=float)
    runner.add_argument("--thresholds", help="sigma_c,sigma_b,sigma_m of the pseudo labels")
    reporter = commands.add_parser("report", help="table, curves and statistics of the runs that are there")
    reporter.add_argument("--out", type=Path, required=True)
    reporter.add_argument("--json", action="store_true", help="print the results as JSON instead")
    return parser.parse_args()


def _run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pool, test = _split(options.data, options.pool, options.test)
    experiment = _experiment(options, pool)
    for name in _names(options):
        folder = options.out / name.folder
        if is_finished(name, experiment, pool, test, folder):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process is at it
            print(f"{folder} ...", flush=True)
            run(name, experiment, pool, test, folder, options.out / "shared")
        # The lock file stays: another process may have it open, and a new one would be a second lock.


def _share(jobs: int) -> None:
    """The same command in several processes; each takes the runs that no other one works on."""
    arguments = [*sys.argv[1:], "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-m", "scripts.benchmark", *arguments], env=environment) for _ in range(jobs)
    ]
    if failed := [code for code in [worker.wait() for worker in workers] if code]:
        sys.exit(failed[0])


def _names(options: argparse.Namespace) -> list[RunName]:
    """Seeds outermost, so that an unfinished benchmark has all lines at the first seeds."""
    names = []
    for seed, line in product(options.seeds.split(","), options.lines.split(",")):
        strategy, plus, ssl = line.partition("+")
        if strategy not in {*STRATEGIES, FULL} or (plus and (ssl != "ssl" or strategy == FULL)):
            known = ", ".join(STRATEGIES)
            raise ValueError(f"--lines: expected {known}, with or without +ssl, or {FULL}, got {line!r}")
        names.append(RunName(strategy=strategy, semi_supervised=bool(plus), seed=int(seed)))
    return names


def _split(data: Path, pool_size: int | None, test_size: int | None) -> tuple[LabeledSet, LabeledSet]:
    """The set's own split ("train" and "test" on its images), or a random fourth of the images, for testing."""
    file = data / "annotations.json"
    pool, test = read_coco(file, split="train"), read_coco(file, split="test")
    if not pool.images or not test.images:
        everything = read_coco(file)
        order = np.random.default_rng(0).permutation(len(everything.images))
        images = [everything.images[i] for i in order]
        quarter = len(images) // 4
        test, pool = (replace(everything, images=tuple(part)) for part in (images[:quarter], images[quarter:]))
    return _subset(pool, pool_size), _subset(test, test_size)


def _subset(dataset: LabeledSet, size: int | None) -> LabeledSet:
    if size is None or size >= len(dataset.images):
        return dataset
    order = np.random.default_rng(0).permutation(len(dataset.images))[:size]
    return replace(dataset, images=tuple(dataset.images[i] for i in sorted(order)))


def _experiment(options: argparse.Namespace, pool: LabeledSet) -> Experiment:
    base = PROFILES_OF_EFFORT[options.profile]
    training = {"epochs": options.epochs, "min_steps": options.min_steps, "beta": options.beta}
    sizes = {"first_batch": options.first_batch, "batch": options.batch, "cycles": options.cycles}
    experiment = replace(
        base,
        profile=options.network or base.profile,
        training=replace(base.training, **{k: v for k, v in training.items() if v is not None}),
        **{k: v for k, v in sizes.items() if v is not None},
    )
    if options.size:
        experiment = replace(experiment, network={"min_size": options.size, "max_size": 2 * options.size})
    if options.thresholds:
        c, b, m = (float(value) for value in options.thresholds.split(","))
        pseudo = PseudoLabelConfig(class_threshold=c, box_threshold=b, mask_threshold=m)
        experiment = replace(experiment, pseudo=pseudo)
    most = max(len(image.labels) for image in pool.images)
    network = {**experiment.network, "anchor_sizes": anchors_for(pool, experiment)}
    return replace(experiment, network={**network, "detections_per_image": max(100, 2 * most)})


if __name__ == "__main__":
    main()
