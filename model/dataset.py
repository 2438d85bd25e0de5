"""COCO files and images in, training batches out."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from model.config import NetworkConfig, TrainingConfig
from model.errors import DatasetError, ImageFileError, InvalidInputError
from model.files import write_json
from model.geometry import polygons_to_rle, rle_area, rle_to_mask
from model.types import LabeledImage, Rle

Batch = tuple[list[Tensor], list[dict[str, Any]]]

_LEAST_OF_16_BITS = 4096  # some pixel reaches it, or at most 16 levels of grey are left of an image in 8 bits

_JPEG_STARTS_WITH = b"\xff\xd8\xff"
_REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
_LEAST_TIMES_INPUT = 4  # what is decoded of a JPEG has at least so many times the rows and columns of the input


@dataclass(frozen=True, kw_only=True)
class LabeledSet:
    """Annotated images and the names of their classes: label i is `class_names[i - 1]`."""

    images: tuple[LabeledImage, ...]
    class_names: tuple[str, ...]


def read_coco(annotations: Path, images_folder: Path | None = None, *, split: str | None = None) -> LabeledSet:
    """Read a COCO instance file; images lie in `images_folder` (default: `images/` beside the file).

    Polygons, compressed and uncompressed RLE are understood; crowd regions are left out, and so are instances without a
    pixel, such as polygons wholly outside the image. Labels follow the order of the category ids. With `split`, only
    images whose own "split" field says so. Raises DatasetError.
    """
    folder = images_folder or annotations.parent / "images"
    try:
        coco = json.loads(annotations.read_text())
        categories = sorted(_listed(coco, "categories"), key=lambda category: category["id"])
        labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        instances = [instance for instance in _listed(coco, "annotations") if not instance.get("iscrowd", 0)]
        _check_ids(_listed(coco, "images"), categories, instances)
        by_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        for instance in instances:
            by_image[instance["image_id"]].append(instance)
        images = tuple(
            _coco_image(image, by_image[image["id"]], folder, labels)
            for image in coco["images"]
            if split is None or image.get("split") == split
        )
        return LabeledSet(images=images, class_names=tuple(str(category["name"]) for category in categories))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{annotations}: expected a readable COCO JSON file: {error}") from error
    except KeyError as error:
        raise DatasetError(
            f"{annotations}: expected COCO instances (images, annotations, categories with ids), {error} is missing"
        ) from error
    except (TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DatasetError(
            f"{annotations}: expected COCO instances (lists of images, annotations and categories): {error}"
        ) from error


def write_coco(path: Path, dataset: LabeledSet) -> None:
    """Write a COCO instance file (compressed RLE); `file_name` is the image's absolute path. `read_coco` reads it.

    What the model said of its own labels stands beside the image, triplets in the order of its annotations.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(dataset.images, start=1):
        height, width = image.image_hw
        images.append(
            {"id": number, "key": image.image_id, "file_name": str(image.path.absolute()),
             "height": height, "width": width, "pseudo": image.pseudo}
        )  # fmt: skip
        if image.ignored_boxes_xyxy is not None:
            images[-1]["ignored_boxes_xyxy"] = image.ignored_boxes_xyxy.tolist()
        if image.triplets is not None:
            images[-1]["triplets"] = image.triplets.tolist()
        for label, rle in zip(image.labels.tolist(), image.rles, strict=True):
            annotations.append(coco_annotation(rle, number=len(annotations) + 1, image_id=number, category_id=label))
    categories = [{"id": label, "name": name} for label, name in enumerate(dataset.class_names, start=1)]
    write_json(path, {"images": images, "annotations": annotations, "categories": categories})


def coco_annotation(rle: Rle, *, number: int, image_id: int, category_id: int) -> dict[str, Any]:
    """An instance as COCO files have it: its mask, and area and box [x, y, width, height] in pixels."""
    area, bbox = float(coco_mask.area(dict(rle))), coco_mask.toBbox(dict(rle)).tolist()
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle,
        "area": area,
        "bbox": bbox,
        "iscrowd": 0,
    }


def load_image(path: Path) -> NDArray[np.uint8]:
    """The image as (H, W, 3) uint8 RGB; grey becomes three equal channels, EXIF orientation is applied.

    Of 16 bits a channel, the upper 8 are seen, as browsers show them. Raises ImageFileError, also for a scan that fills
    the lower 12 of 16 bits at most: there, next to nothing would be left.
    """
    pixels = _read(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels.dtype == np.uint16 and pixels.max() >= _LEAST_OF_16_BITS:
        pixels = _read(path, cv2.IMREAD_COLOR)
    if pixels.dtype != np.uint8:
        raise ImageFileError(
            f"{path}: expected 8 bits a channel, or 16 with values from {_LEAST_OF_16_BITS} on, got {pixels.dtype} up "
            f"to {pixels.max()}: window the image to 8 bits, so that what people look for can be seen, and save it anew"
        )
    return _rgb(pixels)


def load_seen(path: Path, image_hw: tuple[int, int], config: NetworkConfig) -> NDArray[np.uint8]:
    """What the network sees of an image of size `image_hw`, (*input_hw, 3) uint8 RGB: for looks, not for training.

    A large JPEG is decoded at a half, a quarter or an eighth of its height and width, and then shrunk: nearly the same
    pixels as those of `load_image`, sooner (docs/decisions/086). All other files are read as there. Raises
    ImageFileError, also when the file is not of the stated size.
    """
    hw = input_hw(image_hw, config)
    factor = _reduction(image_hw, hw) if _is_jpeg(path) else 1
    pixels = load_image(path) if factor == 1 else _rgb(_read(path, _REDUCED[factor]))
    got = (pixels.shape[0] * factor, pixels.shape[1] * factor)
    if got != image_hw:
        raise ImageFileError(f"{path}: expected an image of size {image_hw}, the file has about {got}")
    return _resized(pixels, hw)


def _reduction(image_hw: tuple[int, int], hw: tuple[int, int]) -> int:
    """By how much a JPEG's sides are divided when it is decoded, before it is shrunk to `hw`: 8, 4, 2 or 1.

    Without a remainder: the last row and column would be padded, and everything before them shifted.
    """
    most = min(image_hw[0] / hw[0], image_hw[1] / hw[1]) / _LEAST_TIMES_INPUT
    return next((n for n in _REDUCED if n <= most and image_hw[0] % n == image_hw[1] % n == 0), 1)


def _is_jpeg(path: Path) -> bool:
    """By its first bytes, as OpenCV tells; files of other kinds it would decode whole and shrink by neighbours."""
    try:
        with path.open("rb") as file:
            return file.read(len(_JPEG_STARTS_WITH)) == _JPEG_STARTS_WITH
    except OSError:  # told by who reads it
        return False


def _rgb(pixels_bgr: NDArray[Any]) -> NDArray[np.uint8]:
    return cv2.cvtColor(pixels_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def _read(path: Path, flags: int) -> NDArray[Any]:
    pixels = cv2.imread(str(path), flags)
    if pixels is None:
        raise ImageFileError(
            f"{path}: expected an image that OpenCV can read; the file is missing, damaged or of a new kind"
        )
    return pixels


def load_annotated(image: LabeledImage) -> NDArray[np.uint8]:
    """The pixels of an annotated image, `load_image`; ImageFileError also when the file is not of the stated size."""
    pixels = load_image(image.path)
    if pixels.shape[:2] != image.image_hw:
        raise ImageFileError(
            f"{image.path}: its annotations are for size {image.image_hw}, the file has {pixels.shape[:2]}"
        )
    return pixels


def input_hw(image_hw: tuple[int, int], config: NetworkConfig) -> tuple[int, int]:
    """The size at which the network sees an image: the shorter side `min_size`, the longer one at most `max_size`."""
    scale = min(config.min_size / min(image_hw), config.max_size / max(image_hw))
    return max(1, round(image_hw[0] * scale)), max(1, round(image_hw[1] * scale))


def image_tensor(pixels: NDArray[np.uint8], hw: tuple[int, int]) -> Tensor:
    """(H, W, 3) uint8 -> (3, *hw) float32 in [0, 1]; shrinks by area, so that thin structures do not alias."""
    return torch.from_numpy(np.ascontiguousarray(_resized(pixels, hw))).permute(2, 0, 1).float() / 255


def _resized(pixels: NDArray[np.uint8], hw: tuple[int, int]) -> NDArray[np.uint8]:
    if pixels.shape[:2] == hw:
        return pixels
    way = cv2.INTER_AREA if hw[0] < pixels.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(pixels, (hw[1], hw[0]), interpolation=way).astype(np.uint8, copy=False)


def fitting_anchors(images: Sequence[LabeledImage], config: NetworkConfig) -> tuple[int, ...]:
    """Five anchor sizes, doubling, for the instances in these images at the network's input size.

    The smallest is the power of two from 8 to 32 below all but the smallest tenth of the instances. It sits on the
    pyramid's finest level, of stride 4: an anchor of 4 would leave that level to specks and push every object to a
    coarser one (docs/decisions/008).
    """
    sizes = [
        np.sqrt(rle_area(rle)) * input_hw(image.image_hw, config)[0] / image.image_hw[0]
        for image in images
        for rle in image.rles
    ]
    if not sizes:
        return config.anchor_sizes
    smallest = 2 ** int(np.clip(np.floor(np.log2(max(np.quantile(sizes, 0.1), 1))), 3, 5))
    return tuple(smallest * 2**level for level in range(5))


class TrainingSteps(Dataset[Batch]):
    """Item i is the whole batch of training step i: pure in (images, configs, i), so that runs can resume.

    From step `teacher_from` on, a teacher makes the pseudo labels, and images without any may be drawn too. With
    `share`, (k, n), only each n-th image of a batch from the k-th on, for one of n processes that train together; their
    targets say by which `seed` anchors and RoIs are sampled.
    """

    def __init__(
        self,
        images: Sequence[LabeledImage],
        *,
        network: NetworkConfig,
        training: TrainingConfig,
        share: tuple[int, int] | None = None,
    ) -> None:
        self.annotated = [image for image in images if not image.pseudo]
        self.pseudo = [used_fields(image, training) for image in images if image.pseudo]
        self.labeled_pseudo = [image for image in self.pseudo if len(image.labels)]  # D_semi
        if not self.annotated:
            raise DatasetError("training needs at least one annotated image, got none")
        if share and min(training.batch_size, len(self.annotated)) < share[1]:
            raise InvalidInputError(
                f"batch_size: each of {share[1]} processes needs an annotated image in every step, got batch_size "
                f"{training.batch_size} and {len(self.annotated)} annotated images"
            )
        processes = share[1] if share else 1
        if network.learning_loss and training.batch_size <= processes:
            raise InvalidInputError(
                "batch_size: learning_loss learns from images that one process has in the same step, expected at least "
                f"{2 * processes}, two for each of {processes}, got {training.batch_size}"
            )
        self.network, self.training, self.share = network, training, share
        self.steps_per_epoch = -(-len(self.annotated) // training.batch_size)
        steps = len(self)
        self.teacher_from = math.ceil(training.ema_burn_in * steps) if training.ema_decay else steps

    def __len__(self) -> int:
        """Whole epochs: as many as the config says, or more until there are `min_steps`."""
        epochs = max(self.training.epochs, -(-self.training.min_steps // self.steps_per_epoch))
        return epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> Batch:
        chosen = self._chosen(self.annotated, step, self.training.batch_size, stream=0)
        turn, waits = divmod(step, self.training.pseudo_every_steps)
        pseudo = self.pseudo if step >= self.teacher_from else self.labeled_pseudo
        if pseudo and not waits:
            chosen += self._chosen(pseudo, turn, self.training.pseudo_batch_size, stream=1)
        flips = np.random.default_rng((self.training.seed, 2, step)).random(len(chosen)) < self.training.horizontal_flip
        first, stride = self.share or (0, 1)
        images, targets = [], []
        for i in range(first, len(chosen), stride):
            image, target = training_sample(chosen[i], self.network, flip=bool(flips[i]))
            images.append(image)
            targets.append({**target, "seed": self._seed(step, i)} if self.share else target)
        return images, targets

    def _seed(self, step: int, position: int) -> int:
        """Of one image in one step, whoever takes it."""
        return int(np.random.default_rng((self.training.seed, 4, step, position)).integers(2**63))

    def _chosen(self, images: list[LabeledImage], step: int, count: int, *, stream: int) -> list[LabeledImage]:
        """The step's images: epochs of ceil(n / count) steps, each epoch a new order; the last batch wraps around."""
        epoch, position = divmod(step, -(-len(images) // count))
        order = np.random.default_rng((self.training.seed, stream, epoch)).permutation(len(images))
        return [images[order[(position * count + i) % len(images)]] for i in range(min(count, len(images)))]


def used_fields(image: LabeledImage, training: TrainingConfig) -> LabeledImage:
    """A pseudo-labelled image with those of its optional fields that the settings use; DatasetError if one is missing.

    An image without labels waits for its teacher and needs none.
    """
    weighed, ignored = training.soft_weights, training.pseudo_negatives == "outside_ignored"
    for used, name in ((weighed, "triplets"), (ignored, "ignored_boxes_xyxy")):
        if used and len(image.labels) and getattr(image, name) is None:
            raise DatasetError(
                f"image {image.image_id}: soft_weights and pseudo_negatives need pseudo labels with {name}; "
                "make them anew or leave these settings off"
            )
    return replace(
        image,
        triplets=image.triplets if weighed else None,
        ignored_boxes_xyxy=image.ignored_boxes_xyxy if ignored else None,
    )


def training_sample(image: LabeledImage, config: NetworkConfig, *, flip: bool) -> tuple[Tensor, dict[str, Any]]:
    """One image and its target (see MaskRCNNWithScores) at the network's input size.

    Instances that vanish at that size are left out. Raises ImageFileError.
    """
    pixels = load_annotated(image)
    hw = input_hw(image.image_hw, config)
    tensor = image_tensor(pixels, hw)
    return tensor.flip(2) if flip else tensor, training_target(image, hw, flip=flip)


def training_target(image: LabeledImage, hw: tuple[int, int], *, flip: bool) -> dict[str, Any]:
    """The target (see MaskRCNNWithScores) for an image that the network sees at size `hw`.

    With `weights` (N, 3) and `ignored` (K, 4) if the image has triplets and ignored boxes.
    """
    masks = _resized_masks(image.rles, hw)
    if flip:
        masks = np.ascontiguousarray(masks[:, :, ::-1])
    visible = masks.any(axis=(1, 2))
    masks = masks[visible]
    target = {
        "boxes": torch.from_numpy(_boxes_xyxy(masks)),
        "labels": torch.from_numpy(image.labels[visible].astype(np.int64)),
        "masks": torch.from_numpy(masks),
        "pseudo": image.pseudo,
    }
    if image.triplets is not None:
        target["weights"] = torch.from_numpy(image.triplets[visible].astype(np.float32))
    if image.ignored_boxes_xyxy is not None:
        ignored = image.ignored_boxes_xyxy * np.array([hw[1] / image.image_hw[1], hw[0] / image.image_hw[0]] * 2)
        if flip:
            ignored[:, [0, 2]] = hw[1] - ignored[:, [2, 0]]
        target["ignored"] = torch.from_numpy(ignored.astype(np.float32))
    return target


def _resized_masks(rles: Sequence[Rle], hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Masks at another size, (N, *hw) uint8 0/1; a cell belongs to the mask when at least half of it is covered."""
    masks = np.zeros((len(rles), *hw), dtype=np.uint8)
    for target, rle in zip(masks, rles, strict=True):
        mask = rle_to_mask(rle)
        if mask.shape == hw:
            target[:] = mask
        else:
            shrinks = hw[0] < mask.shape[0]
            covered = cv2.resize(
                mask.astype(np.float32), (hw[1], hw[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            )
            target[:] = covered >= 0.5
    return masks


def _boxes_xyxy(masks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The tight boxes of non-empty masks (N, H, W), (N, 4) pixels with x1, y1 just outside."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        x, y, width, height = cv2.boundingRect(mask)
        box[:] = (x, y, x + width, y + height)
    return boxes


def _listed(coco: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    listed = coco[name]
    if not isinstance(listed, list):
        raise TypeError(f"{name}: expected a list, got {listed!r:.50}")
    return listed


def _check_ids(
    images: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
) -> None:
    """InvalidInputError when two images or categories have one id, or when an annotation's id of one leads nowhere."""
    for kind, entries in (("image", images), ("category", categories)):
        ids = [entry["id"] for entry in entries]
        _check_unique(f"{kind} id", ids)
        known, name = set(ids), f"{kind}_id"
        if lost := [annotation for annotation in annotations if annotation[name] not in known]:
            wanted = lost[0][name]
            alike = [known_id for known_id in ids if str(known_id) == str(wanted)]
            hint = f"; there is {alike[0]!r}: write both as numbers or both as text" if alike else ""
            raise InvalidInputError(
                f"expected the {name} of each annotation among the ids of the file, {len(lost)} of {len(annotations)} "
                f"are not, the first is {wanted!r} of annotation {lost[0].get('id')}{hint}"
            )
    _check_unique("image key", [_key(image) for image in images])


def _check_unique(name: str, values: Sequence[Any]) -> None:
    for value, count in Counter(values).most_common(1):
        if count > 1:
            raise InvalidInputError(f"expected each {name} once, got {value!r} {count} times")


def _key(image: Mapping[str, Any]) -> str:
    return str(image.get("key", image["id"]))


def _coco_image(
    image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], folder: Path, labels: Mapping[Any, int]
) -> LabeledImage:
    hw = (int(image["height"]), int(image["width"]))
    whole = LabeledImage(
        image_id=_key(image),
        path=folder / image["file_name"],
        image_hw=hw,
        labels=np.array([labels[annotation["category_id"]] for annotation in annotations], dtype=np.int64),
        rles=tuple(_coco_rle(annotation, hw) for annotation in annotations),
        pseudo=bool(image.get("pseudo", False)),
        triplets=_columns(image.get("triplets"), 3),
        ignored_boxes_xyxy=_columns(image.get("ignored_boxes_xyxy"), 4),
    )
    seen = [i for i, rle in enumerate(whole.rles) if coco_mask.area(dict(rle))]
    return replace(
        whole,
        labels=whole.labels[seen],
        rles=tuple(whole.rles[i] for i in seen),
        triplets=None if whole.triplets is None else whole.triplets[seen],
    )


def _columns(rows: Sequence[Sequence[float]] | None, width: int) -> NDArray[np.float64] | None:
    return None if rows is None else np.array(rows, dtype=np.float64).reshape(-1, width)


def _coco_rle(annotation: Mapping[str, Any], hw: tuple[int, int]) -> Rle:
    """The `segmentation` of an annotation, in any of its three forms, as compressed RLE."""
    segmentation = annotation["segmentation"]
    try:
        if not segmentation:
            raise InvalidInputError(f"expected an outline, got {segmentation!r}")
        if isinstance(segmentation, list):
            return polygons_to_rle([np.array(ring, dtype=np.float64).reshape(-1, 2) for ring in segmentation], hw)
        counts = segmentation["counts"]
        if isinstance(counts, list):
            counts = coco_mask.frPyObjects(segmentation, *hw)["counts"].decode()
        rle = Rle(size=[int(side) for side in segmentation["size"]], counts=counts)
        rle_area(rle)  # nobody else checks the counts
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise InvalidInputError(f"annotation {annotation.get('id')}: segmentation: {error}") from error
    return rle
