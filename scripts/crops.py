"""Square crops of a COCO set, small enough for an end-to-end test."""

from pathlib import Path

import cv2
import numpy as np

from model.dataset import LabeledSet, load_image, write_coco
from model.geometry import mask_to_rle, rle_area, rle_to_mask
from model.types import LabeledImage


def write_crops(source: LabeledSet, folder: Path, *, count: int, size: int) -> None:
    """The middle `size` x `size` of the first `count` images that have an instance there, as a COCO folder."""
    (folder / "images").mkdir(parents=True)
    crops: list[LabeledImage] = []
    for image in source.images:
        if len(crops) == count:
            break
        height, width = image.image_hw
        if min(height, width) < size:
            continue
        y, x = (height - size) // 2, (width - size) // 2
        window = np.s_[y : y + size, x : x + size]
        rles = [mask_to_rle(np.ascontiguousarray(rle_to_mask(rle)[window])) for rle in image.rles]
        seen = [i for i, rle in enumerate(rles) if rle_area(rle) >= 16]
        if not seen:
            continue
        path = folder / "images" / f"{len(crops):03d}.png"
        cv2.imwrite(str(path), cv2.cvtColor(load_image(image.path)[window], cv2.COLOR_RGB2BGR))
        crops.append(
            LabeledImage(
                image_id=path.stem,
                path=path,
                image_hw=(size, size),
                labels=image.labels[seen],
                rles=tuple(rles[i] for i in seen),
            )
        )
    if len(crops) < count:
        raise ValueError(f"expected at least {count} images of {size} px or more with instances, found {len(crops)}")
    write_coco(folder / "annotations.json", LabeledSet(images=tuple(crops), class_names=source.class_names))
