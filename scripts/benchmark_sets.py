"""The images of a benchmark: pool and test set of a COCO folder, and the pool at the size that the network sees."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from model.config import NetworkConfig
from model.dataset import LabeledSet, read_coco, training_sample
from model.files import write_json
from model.geometry import mask_to_polygons, mask_to_rle, rle_to_mask
from model.types import LabeledImage
from scripts.crops import cropped
from scripts.shared_files import locked, write_png


@dataclass(frozen=True, kw_only=True)
class Data:
    """The pool, the test set, and by image the vertices of its outlines, where the set has polygons.

    `crop` is the side, in pixels, to which larger images were cut, if they were; `random_split` says that the set's own
    split was not asked.
    """

    name: str
    pool: LabeledSet
    test: LabeledSet
    drawn_vertices: Mapping[str, int] = field(default_factory=dict)
    crop: int | None = None
    random_split: bool = False

    @cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Of the pool and of the test set; every image is read for them, once."""
        return fingerprint(self.pool), fingerprint(self.test)


def read_data(
    folder: Path,
    *,
    pool_size: int | None,
    test_size: int | None,
    crop: int | None = None,
    shared: Path | None = None,
    random_split: bool = False,
) -> Data:
    """The set's own split ("train" and "test" on its images), or a random fourth of the images, for testing.

    With `random_split` always the latter. With sizes, a random subset of that many images, always the same. With
    `crop`, of larger images only the middle, so many pixels square, kept in a folder of `shared`.
    """
    file = folder / "annotations.json"
    pool, test = read_coco(file, split="train"), read_coco(file, split="test")
    if random_split or not pool.images or not test.images:
        everything = read_coco(file)
        order = np.random.default_rng(0).permutation(len(everything.images))
        images = [everything.images[i] for i in order]
        quarter = len(images) // 4
        test, pool = (replace(everything, images=tuple(part)) for part in (images[:quarter], images[quarter:]))
    pool, test = _subset(pool, pool_size), _subset(test, test_size)
    _check_measurable(test, str(file))
    data = Data(
        name=folder.resolve().name + ", split at random" * random_split, pool=pool, test=test, random_split=random_split
    )
    if crop is None or shared is None:
        return replace(data, drawn_vertices=_drawn_vertices(file))
    crops = shared / f"crops-{crop}-{fingerprint(pool)}-{fingerprint(test)}"
    pool, test = _cropped(pool, crops, crop), _cropped(test, crops, crop)
    _check_measurable(test, f"{file}, the middle {crop} px of each image")
    return replace(data, name=f"{data.name}, {crop} px crops", pool=pool, test=test, crop=crop)


def _check_measurable(test: LabeledSet, where: str) -> None:
    if not any(len(image.labels) for image in test.images):
        raise ValueError(
            f"{where}: there is no instance in the {len(test.images)} test images: nothing can be measured"
        )


def fingerprint(dataset: LabeledSet) -> str:
    """Tells one set from another by its labels and by the bytes of its image files."""
    described = [
        [i.image_id, hashlib.sha256(i.path.read_bytes()).hexdigest(), i.labels.tolist(), [r["counts"] for r in i.rles]]
        for i in dataset.images
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def at_input_size(data: Data, network: NetworkConfig, shared: Path) -> tuple[dict[str, LabeledImage], dict[str, int]]:
    """The pool by id, resized once as training does it, and the vertices of each image's outlines.

    A network learns and sees exactly what it would of the originals, but nothing is decoded and shrunk over and over.
    Instances that vanish at that size are left out. The files stay in a folder of `shared`; several processes may ask
    for them at once. Outlines are the set's own polygons or, where it has masks, such as annotators would be shown.
    """
    key = f"{data.fingerprints[0]} {network.min_size} {network.max_size}"
    folder = shared / f"images-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        index = folder / "labels.json"
        if not index.exists():
            write_json(index, [_shrunk(image, data, network, folder, n) for n, image in enumerate(data.pool.images)])
        rows = json.loads(index.read_text())
    images = {
        image.image_id: replace(
            image,
            path=folder / row["file"],
            image_hw=tuple(row["hw"]),
            labels=np.array(row["labels"], dtype=np.int64),
            rles=tuple(row["rles"]),
        )
        for image, row in zip(data.pool.images, rows, strict=True)
    }
    return images, {image_id: row["vertices"] for image_id, row in zip(images, rows, strict=True)}


def _shrunk(image: LabeledImage, data: Data, network: NetworkConfig, folder: Path, number: int) -> dict[str, object]:
    tensor, target = training_sample(image, network, flip=False)
    path = folder / f"{number:06d}.png"
    if not path.exists():  # else somebody was interrupted
        write_png(path, (tensor * 255).round().byte().permute(1, 2, 0).numpy())
    masks = target["masks"].numpy().astype(bool)
    return {
        "file": path.name,
        "hw": list(tensor.shape[-2:]),
        "labels": target["labels"].tolist(),
        "rles": [mask_to_rle(mask) for mask in masks],
        "vertices": data.drawn_vertices.get(image.image_id, _vertices_of_masks(image)),
    }


def _cropped(dataset: LabeledSet, folder: Path, size: int) -> LabeledSet:
    folder.mkdir(parents=True, exist_ok=True)
    images = tuple(
        cropped(image, folder / f"{image.image_id}.png", size=size) if max(image.image_hw) > size else image
        for image in dataset.images
    )
    return replace(dataset, images=images)


def _drawn_vertices(file: Path) -> dict[str, int]:
    coco = json.loads(file.read_text())
    ids = {image["id"]: str(image.get("key", image["id"])) for image in coco["images"]}
    vertices: dict[str, int] = defaultdict(int)
    for annotation in coco["annotations"]:
        if isinstance(annotation["segmentation"], list) and not annotation.get("iscrowd", 0):
            vertices[ids[annotation["image_id"]]] += sum(len(ring) // 2 for ring in annotation["segmentation"])
    return dict(vertices)


def _vertices_of_masks(image: LabeledImage) -> int:
    return sum(len(ring) for rle in image.rles for ring in mask_to_polygons(rle_to_mask(rle)))


def _subset(dataset: LabeledSet, size: int | None) -> LabeledSet:
    if size is None or size >= len(dataset.images):
        return dataset
    order = np.random.default_rng(0).permutation(len(dataset.images))[:size]
    return replace(dataset, images=tuple(dataset.images[i] for i in sorted(order)))
