"""Which product of the triplet ranks detections best: mask AP of the same detections by several rankings.

    python -m scripts.compare_rankings --data <COCO folder> --runs <folder of a run> ... [--out rankings.json]

Mask Scoring R-CNN ranks by c x m. The runs are those of `benchmark run --keep-networks`, one line at several seeds;
measured are their test images. The last two lines know the ground truth and say what is at stake: m right wherever a
mask-IoU branch is taught, at boxes that overlap an instance by half, and the true mask IoU everywhere, which also puts
every false positive last.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.comparison import Compared, Ranking, average_precisions, compare, mean_precision
from model.dataset import load_image
from model.errors import TSPError
from model.files import write_json
from model.predict import detect
from model.types import FloatArray
from scripts.arguments import file_called
from scripts.benchmark_statistics import half_width
from scripts.kept_network import KeptNetwork, load_kept

RANKINGS: dict[str, Ranking] = {
    "c": lambda pair: pair.class_scores,
    "c m": lambda pair: pair.class_scores * pair.mask_scores,
    "c sqrt(m)": lambda pair: pair.class_scores * np.sqrt(pair.mask_scores),
    "c m^2": lambda pair: pair.class_scores * pair.mask_scores**2,
    "c b": lambda pair: pair.class_scores * pair.box_scores,
    "c sqrt(b m)": lambda pair: pair.class_scores * np.sqrt(pair.box_scores * pair.mask_scores),
    "c b m": lambda pair: pair.class_scores * pair.box_scores * pair.mask_scores,
    "c m, m right on objects": lambda pair: pair.class_scores * _right_on_objects(pair),
    "c x true mask IoU": lambda pair: pair.class_scores * pair.mask_ious.max(axis=1, initial=0.0),
}


def main() -> None:
    """Print the table, and keep it."""
    options = _options()
    try:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
        kept = {run.name: load_kept(run, options.data) for run in options.runs}
        _check_comparable(options.runs, list(kept.values()))
        by_run = {name: rankings_of(one) for name, one in kept.items()}
    except (OSError, TSPError, ValueError) as error:
        sys.exit(f"Nothing is compared: {error}")
    print(_table(list(by_run.values())))
    if options.out:
        write_json(options.out, by_run)


def _check_comparable(runs: Sequence[Path], kept: Sequence[KeptNetwork]) -> None:
    """ValueError unless the runs are one line at several seeds on the same images: else their mean means nothing."""
    for what in ("line", "settings"):
        if any(one.state[what] != kept[0].state[what] for one in kept):
            raise ValueError(f"--runs: expected one line at several seeds, got runs of different {what}")
    seeds = [one.state["seed"] for one in kept]
    if len(kept) < len(runs) or len(set(seeds)) < len(seeds):
        raise ValueError(f"--runs: expected each seed once, got {', '.join(run.name for run in runs)}: leave one out")


def _right_on_objects(pair: Compared) -> FloatArray:
    """The true mask IoU with the instance whose box overlaps most, where that is 0.5 or more; else m; (D,)."""
    if not pair.instances:
        return pair.mask_scores
    best = pair.box_ious.argmax(axis=1)
    rows = np.arange(len(best))
    return np.where(pair.box_ious[rows, best] >= 0.5, pair.mask_ious[rows, best], pair.mask_scores)


def rankings_of(kept: KeptNetwork) -> dict[str, dict[str, float | None]]:
    """mAP@0.5 and mAP@[.5:.95] of a run's kept network on its test images, by ranking."""
    images, classes = kept.data.test.images, len(kept.data.test.class_names)
    found = detect(kept.network, (load_image(image.path) for image in images))
    by_id = {image.image_id: detections for image, detections in zip(images, found, strict=True)}
    compared = compare(by_id, images, classes, mask_threshold=kept.network.config.mask_threshold)
    precisions = {name: average_precisions(compared, classes, ranking) for name, ranking in RANKINGS.items()}
    return {
        name: {"map_50": mean_precision(by_class[:, 0]), "map_50_95": mean_precision(by_class)}
        for name, by_class in precisions.items()
    }


def _table(runs: Sequence[dict[str, dict[str, float | None]]]) -> str:
    """Means over runs, and what each ranking gains over c, with 95 % intervals, in points."""
    lines = ["| ranked by | mAP@0.5 | gain | mAP@[.5:.95] | gain |", "|---|---|---|---|---|"]
    for name in RANKINGS:
        cells = []
        for measure in ("map_50", "map_50_95"):
            values = _column(runs, name, measure)
            gains = 100 * (values - _column(runs, "c", measure))
            spread = f" ± {half_width(gains):.1f}" if len(runs) > 1 else ""
            cells += [f"{values.mean():.3f}", "" if name == "c" else f"{gains.mean():+.1f}{spread}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _column(runs: Sequence[dict[str, dict[str, float | None]]], name: str, measure: str) -> FloatArray:
    return np.array([run[name][measure] for run in runs], dtype=np.float64)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="COCO folder: images/ and annotations.json")
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="folders of runs that were made with --keep-networks"
    )
    parser.add_argument("--out", type=file_called(".json"), help="where the figures are kept as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
