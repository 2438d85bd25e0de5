"""Speed, as ratios: ours and what it is compared with, in turn in one run, so that a slow moment hits both.

    python -m scripts.bench train-step [--profile resnet50_fpn] [--size 512] [--rounds 10] [--threads 1] [--json]
    python -m scripts.bench branches [--profile resnet50_fpn] [--size 512] [--detections 100] [--rounds 10] [--json]
    python -m scripts.bench webhook [--requests 2000] [--rate 100] [--out docs/bench] [--json]
    python -m scripts.bench plan [--sizes 1000,10000,100000] [--strategies tsp,core_set] [--out docs/bench] [--json]

The last line is one JSON object with `name`, `ours`, `theirs` (median CPU seconds of one round) and `ratio`, the median
of ours / theirs round by round: lower is better. Without --json it is preceded by the same in words. `webhook` and
`health` are answers of the web process while a cycle trains (bench_web.py): `ours` is the 99th percentile, `theirs` the
time that Label Studio waits. `start`, `publish`, `ingest`, `look` and `score-workers` are wall time, `polygons`
compares sums over all masks, `predict-few` tells the worse of two cases; what they compare stands in their files,
bench_<name>.py. --profile and --size are for train-step, ssl-step, ssl-training, branches and score-workers, --profile
also for start. `ssl-step` has a second ratio, `plan` costs without any other side (bench_plan.py).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.config import PROFILES
from model.errors import TSPError
from model.files import write_json
from scripts.arguments import positive, positive_number
from scripts.bench_evaluate import evaluate
from scripts.bench_ingest import ingest
from scripts.bench_look import look
from scripts.bench_network import branches, ssl_step, train_step
from scripts.bench_plan import add_options, plan, sentences
from scripts.bench_polygons import polygons
from scripts.bench_pool import score_pool
from scripts.bench_predict import predict, predict_few
from scripts.bench_publish import publish
from scripts.bench_ssl import ssl_training
from scripts.bench_start import start
from scripts.bench_web import SOAKS, Load, soak
from scripts.bench_workers import score_workers
from scripts.chaos_report import load_average, machine


def main() -> None:
    """Run one benchmark and print what it measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=[*BENCHMARKS, "plan", *SOAKS], help="what is measured")
    parser.add_argument("--profile", choices=PROFILES, default="resnet50_fpn", help="default: %(default)s")
    parser.add_argument(
        "--size", type=positive, default=512, help="side of the images and of the network's input, pixels"
    )
    parser.add_argument(
        "--detections", type=positive, default=100, help="of branches, in its image; default: %(default)s"
    )
    parser.add_argument("--rounds", type=positive, default=10, help="publish: two at most")
    parser.add_argument("--threads", type=positive, default=1, help="of torch; default: %(default)s")
    parser.add_argument(
        "--line", default="tsp+ssl", help="of ssl-training, as in scripts.benchmark; default: %(default)s"
    )
    parser.add_argument("--requests", type=positive, default=2000, help="of webhook and health")
    parser.add_argument("--rate", type=positive_number, default=100.0, help="requests a second")
    parser.add_argument("--database-url", default="", help="where webhook, health, score-workers keep the state")
    parser.add_argument("--data", nargs="+", default=[], help="COCO folders (annotations.json, images/) of polygons")
    parser.add_argument("--tasks", type=positive, default=10_000, help="of publish, ingest and look")
    parser.add_argument("--regions", type=positive, default=15, help="polygons of each of these tasks")
    parser.add_argument(
        "--label-studio",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the Label Studio of publish",
    )
    parser.add_argument("--images", type=positive, default=10_000, help="of evaluate")
    add_options(parser)
    parser.add_argument("--out", help="folder in which the result is kept as <name>.json")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()
    if options.name == "health" and options.requests < 2:
        parser.error(f"--requests: health asks two things in turn, expected at least 2, got {options.requests}")
    there = machine() | {"load_average_before": load_average()}
    try:
        measured, words = _measure(options)
    except TSPError as error:
        sys.exit(f"{options.name}: {error}")
    result = {"name": options.name, **measured, "machine": there}
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(options.out) / f"{options.name}.json", result)
    if not options.json:
        print(words)
    print(json.dumps(result))


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What was measured, and the same in words."""
    if options.name in SOAKS:
        return _soak(options)
    torch.set_num_threads(options.threads)
    if options.name == "plan":
        result = plan(options)
        return result, "\n".join(sentences(result))
    what, measure = BENCHMARKS[options.name]
    result = measure(options)
    return result, f"{what}: {result['ours']:.3f} s against {result['theirs']:.3f} s, ratio {result['ratio']:.3f}"


def _soak(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    load = Load(requests=options.requests, rate=options.rate)
    result = soak(options.name, load, database_url=options.database_url)
    words = (
        f"{SOAKS[options.name][0]}: half within {result['p50_ms']} ms, 99 % within {result['p99_ms']} ms, all "
        f"within {result['max_ms']} ms; {result['lost']} of {result['requests']} lost"
    )
    return result, words


# Each gets all options; its result has `ours`, `theirs` and `ratio`.
BENCHMARKS: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "train-step": ("training step, ours against torchvision's", train_step),
    "ssl-step": ("training step with a pseudo-labelled image more against torchvision's without", ssl_step),
    "branches": ("inference with both IoU branches against without", branches),
    "ssl-training": ("a training with pseudo labels against one without, for as many steps", ssl_training),
    "predict": ("/predict with 100 detections against torchvision's network alone", predict),
    "predict-few": ("/predict with 5 detections, or at 512 px, against torchvision's network alone", predict_few),
    "score-pool": (
        "a pool, from files to scores and polygons, against torchvision's network image by image",
        score_pool,
    ),
    "polygons": ("masks to polygons against cv2.findContours and approxPolyDP", polygons),
    "score-workers": ("two workers on one pool against one", score_workers),
    "start": ("start of the web process until /health answers, against one that loads torch first", start),
    "publish": ("publishing predictions against Label Studio's bulk import alone", publish),
    "ingest": ("reading annotations again when few have changed against reading all", ingest),
    "look": ("a worker's look at a project when nothing has changed, against the first one", look),
    "evaluate": ("COCO's figures of masks against faster-coco-eval", evaluate),
}


if __name__ == "__main__":
    main()
