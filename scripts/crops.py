"""Square crops of a COCO set: small images, in which objects keep their size."""

from pathlib import Path

import numpy as np

from model.dataset import LabeledSet, load_annotated, write_coco
from model.geometry import mask_to_rle, rle_area, rle_to_mask
from model.types import LabeledImage
from scripts.shared_files import write_png

_LEAST_AREA = 16  # pixels; less of an instance is not worth a label


def cropped(image: LabeledImage, path: Path, *, size: int) -> LabeledImage:
    """The middle of an image, at most `size` x `size` pixels, written to `path` (PNG) unless that exists.

    Instances that all but vanish are left out.
    """
    height, width = image.image_hw
    y, x = max(0, (height - size) // 2), max(0, (width - size) // 2)
    window = np.s_[y : y + size, x : x + size]
    if not path.exists():
        write_png(path, load_annotated(image)[window])
    rles = [mask_to_rle(np.ascontiguousarray(rle_to_mask(rle)[window])) for rle in image.rles]
    seen = [i for i, rle in enumerate(rles) if rle_area(rle) >= _LEAST_AREA]
    return LabeledImage(
        image_id=image.image_id,
        path=path,
        image_hw=(min(height, size), min(width, size)),
        labels=image.labels[seen],
        rles=tuple(rles[i] for i in seen),
    )


def write_crops(source: LabeledSet, folder: Path, *, count: int, size: int) -> None:
    """The middle of the first `count` images that are large enough and have an instance there, as a COCO folder."""
    (folder / "images").mkdir(parents=True)
    crops: list[LabeledImage] = []
    for image in source.images:
        if len(crops) < count and min(image.image_hw) >= size:
            crop = cropped(image, folder / "images" / f"{len(crops):03d}.png", size=size)
            if len(crop.labels):
                crops.append(crop)
            else:
                crop.path.unlink()
    if len(crops) < count:
        raise ValueError(f"expected at least {count} images of {size} px or more with instances, found {len(crops)}")
    write_coco(folder / "annotations.json", LabeledSet(images=tuple(crops), class_names=source.class_names))
