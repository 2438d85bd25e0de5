"""Label efficiency: Algorithm 1 with an oracle, over strategies and seeds, on any COCO set; resumable at any moment.

    python -m scripts.benchmark run --data <COCO folder> --out <folder> --lines random,tsp+ssl --seeds 0,1,2 --jobs 2
    python -m scripts.benchmark report [--out <folder>] [--json]

A line is a strategy (`model.strategies.STRATEGIES`), with "+ssl" or another recipe if it also learns from pseudo
labels, or "full": all images annotated at once; options of its own follow, as in "tsp+ssl@beta=0.05"
(`scripts.benchmark_lines`, where the recipes stand). Runs at the same seed start with the same random images. Each run
is one folder with one `run.json`; what is finished is not done again, and several processes may work on one --out, also
under torchrun, each on a GPU of its own. When all its runs are finished, `run` writes the report, too.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import FrameType

import torch

if not __package__:  # started as a file, not by `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.config import PROFILES, PseudoLabelConfig
from model.device import check_device
from model.errors import InvalidInputError, TSPError
from model.registry import Registry
from model.strategies import STRATEGIES
from scripts.active_learning import KEPT, anchors_for, cycles_done, run
from scripts.arguments import folder_to_write, not_negative, positive
from scripts.benchmark_efforts import EFFORTS
from scripts.benchmark_lines import FULL, RECIPES, Experiment, RunName, Selection, parse_line
from scripts.benchmark_report import write_report, write_reports
from scripts.benchmark_sets import Data, read_data
from scripts.shared_files import locked

_OUT = Path("docs/benchmark")
_LINES_HELP = (
    f"by commas, of {', '.join(STRATEGIES)}, each also with {' or '.join(f'+{name}' for name in RECIPES)} (learns from "
    f"pseudo labels), and {FULL} (all images "
    "annotated at once); options follow, as in tsp+ssl@beta=0.05; default: %(default)s"
)


def main() -> None:
    """Run what is missing, or report what is there."""
    options = _options()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    try:
        if options.command == "report":
            _report(options)
        elif options.jobs > 1:
            _share(options)
        else:
            _run(options)
    except (TSPError, ValueError) as error:
        sys.exit(f"The benchmark cannot go on: {error}")
    except KeyboardInterrupt:
        if options.command == "run" and _speaks(options):
            print("Stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="carry out the runs that are not finished")
    runner.add_argument("--data", type=Path, required=True, help="COCO folder: images/ and annotations.json")
    runner.add_argument(
        "--out", type=folder_to_write, help=f"where the runs are kept; default: {_OUT}/<the set's name>"
    )
    runner.add_argument("--lines", default="random,tsp,random+ssl,tsp+ssl,full", help=_LINES_HELP)
    runner.add_argument("--seeds", default="0,1,2", help="by commas; default: %(default)s")
    runner.add_argument("--jobs", type=positive, default=1, help="processes, one thread each")
    runner.add_argument("--max-minutes", type=float, help="start no new cycle after so many minutes")
    runner.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    runner.add_argument(
        "--profile", choices=EFFORTS, default="cpu", help="`paper`: its own settings, for GPUs; default: %(default)s"
    )
    runner.add_argument("--network", choices=PROFILES, help="another network than the profile's")
    runner.add_argument("--weights", help="none, imagenet, coco or a .safetensors file; default: the profile's")
    runner.add_argument("--size", type=positive, help="shorter side the network sees, in pixels")
    runner.add_argument("--pool", type=positive, help=f"random images that the pool has; {_defaults('pool')}")
    runner.add_argument("--test", type=positive, help=f"random images that the test set has; {_defaults('test')}")
    runner.add_argument(
        "--random-split", action="store_true", help="test on a random fourth of the images, not on the set's own split"
    )
    runner.add_argument("--crop", type=positive, help="of larger images only the middle, so many pixels square")
    runner.add_argument(
        "--first-batch", type=positive, help=f"images that a line starts with; {_defaults('first_batch')}"
    )
    runner.add_argument("--batch", type=positive, help=f"images that each later cycle chooses; {_defaults('batch')}")
    runner.add_argument(
        "--cycles",
        type=positive,
        help=f"trainings, each from the start; a benchmark's runs all have as many, {_defaults('cycles')}",
    )
    runner.add_argument("--epochs", type=positive, help=f"passes over the annotated images; {_defaults('epochs')}")
    runner.add_argument(
        "--min-steps", type=not_negative, help=f"more epochs, until there are so many steps; {_defaults('min_steps')}"
    )
    runner.add_argument("--learning-rate", type=float, help=f"peak learning rate; {_defaults('learning_rate')}")
    runner.add_argument("--beta", type=float, help=f"weight of the pseudo-label loss (eq. 5); {_defaults('beta')}")
    runner.add_argument("--thresholds", help="sigma_c,sigma_b,sigma_m of the pseudo labels; default: the paper's")
    runner.add_argument(
        "--queue-threshold",
        type=float,
        help=f"class score from which detections count in the queue; default: {Selection().queue_threshold}",
    )
    runner.add_argument("--keep-networks", action="store_true", help="keep each run's last network in its folder")
    runner.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    reporter = commands.add_parser("report", help="table, curves and statistics of the runs that are there")
    reporter.add_argument("--out", type=Path, default=_OUT, help=f"a benchmark, or a folder of some; default: {_OUT}")
    reporter.add_argument("--json", action="store_true", help="print the results as JSON instead")
    options = parser.parse_args()
    if options.out is None:
        options.out = _OUT / options.data.resolve().name
    return options


def _defaults(name: str) -> str:
    """What a setting is in each profile."""
    values = []
    for profile, effort in EFFORTS.items():
        [owner] = [o for o in (effort, effort.experiment, effort.experiment.training) if hasattr(o, name)]
        value = getattr(owner, name)
        values.append(f"{profile}: {'all' if value is None else value}")
    return ", ".join(values)


def _report(options: argparse.Namespace) -> None:
    reports = write_reports(options.out)
    if options.json:
        print(json.dumps({"reports": {folder.resolve().name: report for folder, report in reports.items()}}))
    else:
        print("\n".join((folder / "report.md").read_text() for folder in reports))


def _run(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * (float("inf") if options.max_minutes is None else options.max_minutes)
    device = _device(options.device)
    torch.set_num_threads(1)
    data, experiment, names = _task(options)
    if _speaks(options):
        _print_what_is_smaller(options, data)
    has_run = False
    for name in names:
        folder = options.out / name.folder
        done, total = cycles_done(name, experiment, data, folder)
        if done >= total and options.keep_networks and _speaks(options) and not Registry(folder).versions(KEPT):
            print(f"{folder} is finished, and its network was not kept: delete it to make the run anew", flush=True)
        if done >= total or time.monotonic() >= deadline:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", wait=False) as free:
            if not free:
                continue  # another process is at it
            print(f"{folder} ...\n", end="", flush=True)  # in one piece: other processes print as well
            has_run = True
            run(
                name,
                experiment,
                data,
                folder,
                options.out / "shared",
                device=device,
                deadline=deadline,
                keep_network=options.keep_networks,
            )
    if not options.worker and (has_run or _speaks(options)):  # of several ranks, the last one finds all finished
        _report_or_say_what_is_left(names, experiment, data, options.out)


def _speaks(options: argparse.Namespace) -> bool:
    """Whether this one of several processes says what concerns all."""
    return not options.worker and os.environ.get("RANK", "0") == "0"


def _task(options: argparse.Namespace) -> tuple[Data, Experiment, list[RunName]]:
    names = _names(options)
    if not (options.data / "annotations.json").exists():
        raise ValueError(f"--data: expected a COCO folder, with annotations.json and images/, got {options.data}")
    effort = EFFORTS[options.profile]
    data = read_data(
        options.data,
        pool_size=options.pool or effort.pool,
        test_size=options.test or effort.test,
        crop=options.crop,
        shared=options.out / "shared",
        random_split=options.random_split,
    )
    experiment = _experiment(options, data)
    if any(name.strategy != FULL for name in names):
        _check_sizes(experiment, len(data.pool.images))
    return data, experiment, names


def _check_sizes(experiment: Experiment, images: int) -> None:
    """ValueError when the pool is used up before the last cycle."""
    needed = experiment.first_batch + (experiment.cycles - 1) * experiment.batch
    if needed > images:
        raise ValueError(
            f"a first batch of {experiment.first_batch} and {experiment.cycles - 1} of {experiment.batch} are {needed} "
            f"images, the pool has {images}: choose smaller ones by --first-batch, --batch and --cycles"
        )


def _print_what_is_smaller(options: argparse.Namespace, data: Data) -> None:
    for option, wanted, part in (("--pool", options.pool, data.pool), ("--test", options.test, data.test)):
        if wanted is not None and wanted > len(part.images):
            print(f"{option} {wanted}: there are only {len(part.images)} images for it, and all are used", flush=True)


def _report_or_say_what_is_left(names: list[RunName], experiment: Experiment, data: Data, out: Path) -> None:
    left = []
    for name in names:
        done, total = cycles_done(name, experiment, data, out / name.folder)
        if done < total:
            left.append(f"  {name.folder}: {done} of {total} cycles")
    if left:
        # Whether another process is at one is not tried out: for a moment, that would take the run from all others.
        unfinished = f"{len(left)} of {len(names)} runs are not finished"
        print("\n".join([f"{unfinished}; the same command goes on with those that no other process is at:", *left]))
    else:
        print(f"All runs are finished. The report: {out / 'report.md'}", flush=True)
        write_report(out)


def _device(wanted: str | None) -> str:
    """Under torchrun each process has a GPU of its own. ValueError when torch cannot use what is wanted."""
    if wanted is not None:
        try:
            check_device(wanted)
        except InvalidInputError as error:
            raise ValueError(f"--device: {error} Leave it out, or choose cpu.") from error
        return wanted
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _share(options: argparse.Namespace) -> None:
    """The same command in several processes; each takes the runs that no other one works on. They end with this one."""
    _device(options.device)  # told once, not by each of them
    data, experiment, names = _task(options)
    if _speaks(options):
        _print_what_is_smaller(options, data)
    command = [sys.executable, __file__, *sys.argv[1:], "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, _stop)
    workers: list[subprocess.Popen[bytes]] = []
    try:
        workers.extend(subprocess.Popen([*command, "--worker"], env=environment) for _ in range(options.jobs))
        failed = [code for code in [worker.wait() for worker in workers] if code]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()
    if failed:
        sys.exit(failed[0])
    if _speaks(options):
        _report_or_say_what_is_left(names, experiment, data, options.out)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


def _names(options: argparse.Namespace) -> list[RunName]:
    """Seeds outermost, so that an unfinished benchmark has all lines at the first seeds."""
    try:
        return [parse_line(line, seed) for seed, line in product(_seeds(options.seeds), options.lines.split(","))]
    except ValueError as error:
        raise ValueError(f"--lines: {error}") from error


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds: expected whole numbers, by commas, got {text!r}") from error


def _thresholds(text: str) -> PseudoLabelConfig:
    try:
        c, b, m = (float(value) for value in text.split(","))
    except ValueError as error:
        raise ValueError(f"--thresholds: expected three numbers, by commas, got {text!r}") from error
    return PseudoLabelConfig(class_threshold=c, box_threshold=b, mask_threshold=m)


def _experiment(options: argparse.Namespace, data: Data) -> Experiment:
    base = EFFORTS[options.profile].experiment
    training = {name: getattr(options, name) for name in ("epochs", "min_steps", "learning_rate", "beta")}
    sizes = {name: getattr(options, name) for name in ("first_batch", "batch", "cycles")}
    experiment = replace(
        base,
        profile=options.network or base.profile,
        weights=options.weights or base.weights,
        training=replace(base.training, **{k: v for k, v in training.items() if v is not None}),
        **{k: v for k, v in sizes.items() if v is not None},
    )
    if options.size:
        sides = {"min_size": options.size, "max_size": 2 * options.size}
        experiment = replace(experiment, network={**experiment.network, **sides})
    if options.thresholds:
        experiment = replace(experiment, pseudo=_thresholds(options.thresholds))
    if options.queue_threshold is not None:
        experiment = replace(experiment, selection=Selection(queue_threshold=options.queue_threshold))
    most = max(len(image.labels) for image in data.pool.images)
    detections = max(experiment.network["detections_per_image"], 2 * most)
    anchors = anchors_for(data.pool, experiment)
    network = {**experiment.network, "anchor_sizes": anchors, "detections_per_image": detections}
    return replace(experiment, network=network)


if __name__ == "__main__":
    main()
