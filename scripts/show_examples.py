"""The paper's Figure 3 (b): the images of a pool that a network finds hardest and easiest, with all its scores.

    python -m scripts.show_examples --data <COCO folder> --run <folder of a run> --out examples.png
    python -m scripts.show_examples --data <COCO folder> --weights <folder of a version> --out examples.png

Outlines are the network's, with "class: c, b, m" on the instances of the best class scores and S (eq. 3) as the title;
the ground truth is dashed. A run is one of `benchmark run --keep-networks`; of its pool, only images that nobody
annotated are shown. For a version all images of the folder count, also those that it was trained on.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np

from model.dataset import LabeledSet, load_image, read_coco
from model.errors import TSPError
from model.geometry import mask_to_polygons, rle_to_mask, roi_mask_to_polygons
from model.network import MaskRCNNWithScores
from model.predict import detect
from model.registry import ModelCard, Registry
from model.tsp import image_score, instance_scores
from model.types import Detections, LabeledImage
from scripts.arguments import file_called, from_0_to_1, positive
from scripts.kept_network import load_kept

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Polygon

_COLOURS = ("#ffb000", "#4dc3ff", "#ff5f8f", "#6be36b", "#c78bff", "#ff8c4d")
_LABELS = 6  # instances with text; more hide the image
_PANEL = 3.4  # inches
_FONT = 6.5  # points
_LINE, _CHARACTER = 0.055, 0.0165  # height of a label and width of a character of it, by the image's longer side


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image, what counts of what the network sees in it, and S."""

    image: LabeledImage
    detections: Detections
    score: float


def main() -> None:
    """Draw the picture."""
    options = _options()
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        network, card, pool = _from_run(options) if options.run else _from_version(options)
        examples, without = score(network, pool.images, threshold=options.threshold)
        if not examples:
            raise ValueError(f"the network finds nothing with a class score of {options.threshold} in {options.data}")
        draw(examples, card.class_names, options.out, columns=options.columns, network=network)
    except (OSError, TSPError, ValueError) as error:
        sys.exit(f"No picture: {error}")
    print(f"{options.out}: of {len(pool.images)} images{_left_out(without)}")


def score(
    network: MaskRCNNWithScores, images: Sequence[LabeledImage], *, threshold: float
) -> tuple[list[Example], int]:
    """The images by S, the hardest first, and how many have none. Instances count from class score `threshold` on."""
    examples = []
    found = detect(network, (load_image(image.path) for image in images))
    for image, detections in zip(images, found, strict=True):
        counted = detections.select(detections.class_scores >= threshold)
        if len(counted):
            scores = instance_scores(counted.class_scores, counted.box_scores, counted.mask_scores)
            examples.append(Example(image=image, detections=counted, score=image_score(scores)))
    return sorted(examples, key=lambda example: example.score), len(images) - len(examples)


def draw(
    examples: Sequence[Example], class_names: Sequence[str], out: Path, *, columns: int, network: MaskRCNNWithScores
) -> None:
    """The first examples in the upper row, the last ones in the lower row, the easiest leftmost."""
    columns = min(columns, len(examples))
    rows = {"hardest": examples[:columns], "easiest": examples[::-1][:columns]}
    figure, panels = plt.subplots(2, columns, figsize=(_PANEL * columns, 2 * _PANEL + 0.5), squeeze=False)
    for (name, chosen), of_row in zip(rows.items(), panels, strict=True):
        for axes, example in zip(of_row, chosen, strict=True):
            _draw_example(axes, example, class_names, network.config.mask_threshold)
        of_row[0].set_ylabel(name, fontsize=13)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _left_out(without: int) -> str:
    if not without:
        return ""
    verbs = ("has", "is") if without == 1 else ("have", "are")
    return f"; {without} without any detection {verbs[0]} no S and {verbs[1]} left out"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="COCO folder: images/ and annotations.json")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument(
        "--run", type=Path, help="folder of a finished run of the benchmark, made with --keep-networks"
    )
    network.add_argument(
        "--weights", type=Path, help="folder of a version in a registry: weights.safetensors, card.json"
    )
    parser.add_argument("--out", type=file_called(".png"), required=True, help="the PNG")
    parser.add_argument("--columns", type=positive, default=4, help="images of each kind")
    parser.add_argument(
        "--threshold", type=from_0_to_1, default=0.2, help="class score from which an instance counts in S"
    )
    return parser.parse_args()


def _from_run(options: argparse.Namespace) -> tuple[MaskRCNNWithScores, ModelCard, LabeledSet]:
    """The network of a run's last cycle, and the images of its pool that are not annotated after it."""
    kept = load_kept(options.run, options.data)
    annotated = {image_id for cycle in kept.state["cycles"] for image_id in cycle["annotated"]}
    rest = tuple(image for image in kept.data.pool.images if image.image_id not in annotated)
    return kept.network, kept.card, replace(kept.data.pool, images=rest)


def _from_version(options: argparse.Namespace) -> tuple[MaskRCNNWithScores, ModelCard, LabeledSet]:
    folder = options.weights.resolve()
    if not (folder / "card.json").exists():
        raise ValueError(
            f"--weights: expected the folder of a version, with card.json and weights.safetensors, got {folder}"
        )
    network, card = Registry(folder.parent.parent).load(folder.parent.name, folder.name)
    return network, card, read_coco(options.data / "annotations.json")


def _draw_example(axes: Axes, example: Example, class_names: Sequence[str], mask_threshold: float) -> None:
    image, found = example.image, example.detections
    axes.imshow(load_image(image.path))
    for rle in image.rles:
        for ring in mask_to_polygons(rle_to_mask(rle)):
            axes.add_patch(Polygon(ring, fill=False, ec="white", lw=0.8, ls=(0, (2, 2))))
    for i in range(len(found)):
        colour = _COLOURS[(int(found.labels[i]) - 1) % len(_COLOURS)]
        rings = roi_mask_to_polygons(
            found.roi_masks[i], found.boxes_xyxy[i], found.image_hw, mask_threshold=mask_threshold
        )
        for ring in rings:
            axes.add_patch(Polygon(ring, fill=False, ec=colour, lw=1.4))
            axes.add_patch(Polygon(ring, fc=colour, alpha=0.12, lw=0))
    _write_labels(axes, found, class_names)
    instances = "1 instance" if len(found) == 1 else f"{len(found)} instances"
    axes.set_title(f"S = {example.score:.3f}  ({instances})", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    height, width = image.image_hw
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _write_labels(axes: Axes, found: Detections, class_names: Sequence[str]) -> None:
    """Above each box, or as near to that as others leave room; of many instances, those of the best class scores."""
    best = found.select(np.argsort(-found.class_scores, kind="stable")[:_LABELS])
    texts = [
        f"{class_names[label - 1]}: {c:.2f}, {b:.2f}, {m:.2f}"
        for label, c, b, m in zip(best.labels, best.class_scores, best.box_scores, best.mask_scores, strict=True)
    ]
    longer = max(found.image_hw)
    places = _places(best, _LINE * longer, [(len(text) + 1) / 2 * _CHARACTER * longer for text in texts])
    for label, box, text, place in zip(best.labels, best.boxes_xyxy, texts, places, strict=True):
        if place is None:
            continue
        x, y = place
        colour = _COLOURS[(int(label) - 1) % len(_COLOURS)]
        axes.plot([x, (box[0] + box[2]) / 2], [y, box[1]], color=colour, lw=0.7)  # a label may stand far away
        axes.text(
            x,
            y,
            text,
            fontsize=_FONT,
            color="black",
            ha="center",
            va="center",
            clip_on=True,
            bbox={"facecolor": colour, "alpha": 0.85, "pad": 1.2, "linewidth": 0},
        )


def _places(found: Detections, line: float, halves: Sequence[float]) -> Iterator[tuple[float, float] | None]:
    """The middle of each label, inside the image and a line away from every label that it would cover; or no room.

    `line` is the height of a label and `halves` are half of the widths, in pixels of the image.
    """
    height, width = found.image_hw
    taken: list[tuple[float, float, float]] = []
    for box, half in zip(found.boxes_xyxy, halves, strict=True):
        x = float(np.clip((box[0] + box[2]) / 2, half, max(width - half, half)))
        above = float(np.clip(box[1] - line / 2, line / 2, height - line / 2))
        most = int(height / line)
        steps = sorted(range(-most, most + 1), key=abs)
        free = [y for y in (above + step * line for step in steps) if line / 2 <= y <= height - line / 2]
        for other_x, other_y, other_half in taken:
            if abs(x - other_x) < half + other_half:
                free = [y for y in free if abs(y - other_y) >= 0.99 * line]
        if free:
            taken.append((x, free[0], half))
        yield (x, free[0]) if free else None


if __name__ == "__main__":
    main()
