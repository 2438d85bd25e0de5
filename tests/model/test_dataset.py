import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from model.config import NetworkConfig, TrainingConfig
from model.dataset import (
    LabeledSet,
    TrainingSteps,
    fitting_anchors,
    image_tensor,
    input_hw,
    load_image,
    read_coco,
    training_sample,
    write_coco,
)
from model.errors import DatasetError, ImageFileError, InvalidInputError
from model.geometry import mask_to_rle, rle_to_box_xyxy, rle_to_mask
from model.types import LabeledImage
from tests.model.examples import TINY, ellipse, labeled_image, rectangle
from tests.real_sets import annotations_of

CONFIG = NetworkConfig.for_profile("efficientnet_lite0_fpn", 3, **TINY)
HW = (20, 30)
PICTURE = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
MASK = rectangle(4, 5, 14, 12, hw=HW)

POLYGON = [[4, 5, 14, 5, 14, 12, 4, 12]]
COMPRESSED = mask_to_rle(MASK)
UNCOMPRESSED = {"size": list(HW), "counts": [4 * 20 + 5, *[7, 13] * 9, 7, 20 * 30 - 13 * 20 - 12]}


def coco(**changes):
    return {
        "images": [PICTURE],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 3, "segmentation": POLYGON, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cell"}],
        **changes,
    }


def annotation(**changes):
    return {**coco()["annotations"][0], **changes}


def written(folder, content):
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def scored(image):
    """The same with triplets and two ignored boxes."""
    triplets = np.linspace(0.5, 0.9, 3 * len(image.labels)).reshape(-1, 3)
    return replace(image, triplets=triplets, ignored_boxes_xyxy=np.array([[4.0, 6, 20, 10], [1 / 3, 0, 2, 64]]))


# --- reading and writing COCO


@pytest.mark.parametrize(
    "segmentation",
    [
        pytest.param(POLYGON, id="polygons"),
        pytest.param([[4, 5, 9, 5, 9, 12, 4, 12], [9, 5, 14, 5, 14, 12, 9, 12]], id="an instance of two polygons"),
        pytest.param(COMPRESSED, id="compressed RLE"),
        pytest.param(UNCOMPRESSED, id="uncompressed RLE"),
    ],
)
def test_every_form_of_a_segmentation_gives_the_same_mask(segmentation, tmp_path):
    dataset = read_coco(written(tmp_path, coco(annotations=[annotation(segmentation=segmentation)])))
    (image,) = dataset.images
    assert np.array_equal(rle_to_mask(image.rles[0]), MASK)
    assert (image.image_id, image.path, image.image_hw) == ("1", tmp_path / "images" / "a.png", HW)
    assert not image.pseudo


def test_labels_follow_the_order_of_the_category_ids(tmp_path):
    content = coco(
        categories=[{"id": 7, "name": "late"}, {"id": 3, "name": "early"}],
        annotations=[annotation(), annotation(category_id=7)],
    )
    dataset = read_coco(written(tmp_path, content))
    assert dataset.class_names == ("early", "late")
    assert dataset.images[0].labels.tolist() == [1, 2]


def test_crowd_regions_are_left_out_and_images_without_annotations_stay(tmp_path):
    content = coco(
        images=[*coco()["images"], {"id": 2, "file_name": "b.png", "height": 8, "width": 9}],
        annotations=[annotation(iscrowd=1), annotation(), {k: v for k, v in annotation().items() if k != "iscrowd"}],
    )
    first, second = read_coco(written(tmp_path, content)).images
    assert len(first.rles) == 2
    assert (len(second.rles), second.labels.tolist(), second.labels.dtype) == (0, [], np.int64)


def test_only_the_images_of_a_split_are_read_if_one_is_named(tmp_path):
    images = [{**coco()["images"][0], "id": i, "split": split} for i, split in enumerate(["train", "test", "train"])]
    path = written(tmp_path, coco(images=images, annotations=[]))
    assert [image.image_id for image in read_coco(path, split="train").images] == ["0", "2"]
    assert [image.image_id for image in read_coco(path, split="test").images] == ["1"]
    assert read_coco(path, split="val").images == ()
    assert len(read_coco(path).images) == 3


def test_images_may_lie_in_another_folder(tmp_path):
    assert read_coco(written(tmp_path, coco()), Path("/pictures")).images[0].path == Path("/pictures/a.png")


def test_what_is_written_is_read_back_the_same(tmp_path, monkeypatch):
    images = (
        labeled_image(tmp_path, "first", (1, rectangle(1, 2, 30, 40)), (2, ellipse(10, 10, 50, 40))),
        labeled_image(tmp_path, "nothing in it"),
        labeled_image(tmp_path, "seen by the model", (2, MASK), pseudo=True),
        scored(labeled_image(tmp_path, "seen and scored", (2, MASK), (1, MASK), pseudo=True)),
        scored(labeled_image(tmp_path, "looked at, nothing trusted", pseudo=True)),
    )
    monkeypatch.chdir(tmp_path)
    no_labels = np.zeros(0, dtype=np.int64)
    relative = LabeledImage(image_id="relative", path=Path("first.png"), image_hw=(64, 64), labels=no_labels, rles=())
    before = LabeledSet(images=(*images, relative), class_names=("cell", "dot"))
    write_coco(tmp_path / "out.json", before)
    after = read_coco(tmp_path / "out.json")
    assert after.class_names == before.class_names
    for a, b in zip(after.images, before.images, strict=True):
        assert (a.image_id, a.path, a.image_hw, a.pseudo) == (b.image_id, tmp_path / b.path, b.image_hw, b.pseudo)
        assert a.labels.tolist() == b.labels.tolist()
        assert a.rles == b.rles
        for ours, theirs in ((a.triplets, b.triplets), (a.ignored_boxes_xyxy, b.ignored_boxes_xyxy)):
            assert (ours is None) == (theirs is None)
            assert ours is None or np.array_equal(ours, theirs)


def test_others_can_read_what_is_written(tmp_path):
    image = labeled_image(tmp_path, "a", (1, MASK))
    write_coco(tmp_path / "out.json", LabeledSet(images=(image,), class_names=("cell",)))
    (entry,) = json.loads((tmp_path / "out.json").read_text())["annotations"]
    assert (entry["area"], entry["bbox"], entry["category_id"]) == (70.0, [4.0, 5.0, 10.0, 7.0], 1)
    assert coco_mask.iou([entry["segmentation"]], [mask_to_rle(MASK)], [0]).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "readable COCO JSON", id="bad JSON"),
        pytest.param("[]", "lists of images", id="a list"),
        pytest.param("null", "lists of images", id="null"),
        pytest.param({}, "'categories' is missing", id="nothing in it"),
        pytest.param({"categories": []}, "'annotations' is missing", id="no annotations"),
        pytest.param(coco(images=None), "lists of images", id="images are null"),
        pytest.param(coco(images=[{"id": 1}]), "'height' is missing", id="no size"),
        pytest.param(coco(images=[{"id": 1, "height": 20, "width": 30}]), "'file_name' is missing", id="no file"),
        pytest.param(coco(images={}), "images: expected a list, got {}", id="images are an object"),
        pytest.param(coco(annotations={"a": 1}), "annotations: expected a list", id="annotations are an object"),
        pytest.param(coco(annotations=[[1, 2]]), "lists of images", id="an annotation is a list"),
        pytest.param(coco(categories=[{"id": 3}]), "'name' is missing", id="a category without a name"),
        pytest.param(coco(images=[{**PICTURE, "height": math.inf}]), "infinity", id="infinitely high"),
        pytest.param("[" * 100_000, "recursion", id="too deep"),
        pytest.param(coco(annotations=[{"image_id": 1, "category_id": 3}]), "'segmentation' is missing", id="no mask"),
        pytest.param(coco(annotations=[annotation(segmentation=[])]), "annotation 5: .*outline", id="empty polygons"),
        pytest.param(coco(annotations=[annotation(segmentation=None)]), "annotation 5: .*outline", id="null mask"),
        pytest.param(
            coco(annotations=[annotation(segmentation=[[1, 1, 5, 5]])]), "annotation 5: .*3 finite points", id="a line"
        ),
        pytest.param(
            coco(annotations=[annotation(segmentation=[[1, 1, None, 5, 7, 7]])]), "annotation 5: .*finite", id="a gap"
        ),
        pytest.param(
            coco(annotations=[annotation(segmentation=[[1, 1, 1e8, 5, 7, 7]])]),
            "1000000 pixels of the image, got 1 to 1e.08",
            id="far away",
        ),
        pytest.param(coco(annotations=[annotation(segmentation=[[1, 1, 5, 5, 7]])]), "annotation 5", id="half a point"),
        pytest.param(
            coco(annotations=[annotation(segmentation={"size": [9, 9], "counts": [81]})]),
            r"image 1: its size is \(20, 30\) .* a mask has \[9, 9\]",
            id="mask of another size",
        ),
        *(
            pytest.param(
                coco(annotations=[annotation(segmentation={"size": list(HW), "counts": counts})]),
                rf"annotation 5: segmentation: .*{message}",
                id=f"counts {counts}",
            )
            for counts, message in [
                ([1, 2], r"fill 20 x 30 pixels, got runs of 3"),
                ([-1, 601], "out of bounds"),
                ([2**33], "out of bounds"),
                ([], "compressed text"),
                ([None], "NoneType"),
                ("abc", "compressed text"),
                ("12", "fill 20 x 30 pixels"),
                ("zzzz", "compressed text"),
                ("", "compressed text"),
                (None, "NoneType"),
                (600, "int"),
            ]
        ),
        *(
            pytest.param(
                coco(annotations=[annotation(segmentation={"size": size, "counts": counts})]),
                "annotation 5: segmentation: ",
                id=f"size {size}, counts {counts}",
            )
            for size in ([20], 20, [20, None], [-20, 30], [20, math.inf])
            for counts in ([600], COMPRESSED["counts"])
        ),
        pytest.param(coco(annotations=[annotation(segmentation="abc")]), "annotation 5: segmentation", id="a text"),
        pytest.param(coco(annotations=[annotation(segmentation=5)]), "annotation 5: segmentation", id="a number"),
    ],
)
def test_a_file_that_is_not_coco_is_refused_by_name(content, message, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_coco(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(coco(images=[PICTURE, PICTURE]), "each image id once, got 1 2 times", id="an image twice"),
        pytest.param(
            coco(images=[PICTURE, {**PICTURE, "id": "1"}]), "each image key once, got '1' 2 times", id="1 and '1'"
        ),
        pytest.param(
            coco(images=[{**PICTURE, "id": i, "key": "a"} for i in (1, 2)]), "image key once, got 'a'", id="a key twice"
        ),
        pytest.param(
            coco(categories=[{"id": 3, "name": name} for name in "ab"]),
            "category id once, got 3",
            id="a category twice",
        ),
        pytest.param(
            coco(annotations=[annotation(), annotation(id=6, image_id="1"), annotation(id=7, image_id="1")]),
            "image_id .*, 2 of 3 are not, the first is '1' of annotation 6; there is 1: write both as numbers",
            id="an image's number as text",
        ),
        pytest.param(
            coco(annotations=[annotation(image_id=2)]), r"image_id .*the first is 2 of annotation 5$", id="no image"
        ),
        pytest.param(
            coco(annotations=[annotation(category_id=9)]),
            r"category_id .*1 of 1 are not, the first is 9 of annotation 5$",
            id="no category",
        ),
        pytest.param(
            coco(annotations=[annotation(category_id="3")]), "'3' of annotation 5; there is 3", id="category as text"
        ),
    ],
)
@pytest.mark.parametrize("split", [None, "train"])
def test_ids_that_lead_nowhere_or_to_two_are_refused(content, message, split, tmp_path):
    with pytest.raises(DatasetError, match=message):
        read_coco(written(tmp_path, content), split=split)


def test_crowd_regions_need_no_image_and_the_annotations_of_other_splits_have_theirs(tmp_path):
    images = [{**PICTURE, "split": "train"}, {**PICTURE, "id": 2, "split": "test"}]
    content = coco(images=images, annotations=[annotation(), annotation(image_id=2), {"iscrowd": 1}])
    (image,) = read_coco(written(tmp_path, content), split="train").images
    assert (image.image_id, len(image.rles)) == ("1", 1)


@pytest.mark.parametrize(
    "nothing",
    [
        pytest.param([[40, 5, 50, 5, 50, 12]], id="a polygon beside the image"),
        pytest.param({"size": list(HW), "counts": [600]}, id="an empty mask"),
        pytest.param(mask_to_rle(np.zeros(HW, dtype=bool)), id="an empty compressed mask"),
    ],
)
def test_instances_without_a_pixel_are_left_out(nothing, tmp_path):
    annotations = [annotation(segmentation=nothing, category_id=3), annotation(category_id=4)]
    picture = {**PICTURE, "pseudo": True, "triplets": [[0.1] * 3, [0.9] * 3]}
    categories = [{"id": 3, "name": "cell"}, {"id": 4, "name": "dot"}]
    (image,) = read_coco(
        written(tmp_path, coco(images=[picture], annotations=annotations, categories=categories))
    ).images
    assert [rle_to_mask(rle).sum() for rle in image.rles] == [70]
    assert (image.labels.tolist(), image.triplets.tolist()) == ([2], [[0.9] * 3])


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.json: expected a readable"):
        read_coco(tmp_path / "nowhere.json")


# --- images


def test_a_grey_image_has_three_equal_channels(tmp_path):
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    assert np.array_equal(load_image(tmp_path / "grey.png"), np.stack([grey] * 3, axis=2))


def test_the_channels_are_red_green_blue_and_transparency_is_dropped(tmp_path):
    Image.new("RGBA", (3, 2), (250, 120, 10, 0)).save(tmp_path / "rgba.png")
    pixels = load_image(tmp_path / "rgba.png")
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((2, 3, 3), np.uint8, True)
    assert pixels[0, 0].tolist() == [250, 120, 10]


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3), (16, 16, 4)], ids=["grey", "colour", "alpha"])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_twelve_bits_in_sixteen_are_refused_rather_than_cut_off(kind, shape, tmp_path):
    cv2.imwrite(str(tmp_path / f"deep.{kind}"), np.full(shape, 4095, dtype=np.uint16))
    with pytest.raises(ImageFileError, match=rf"deep\.{kind}: .* got uint16 up to 4095: window the image to 8 bits"):
        load_image(tmp_path / f"deep.{kind}")


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_of_sixteen_bits_the_upper_eight_are_seen(kind, tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    cv2.imwrite(str(tmp_path / f"deep.{kind}"), values)
    assert np.array_equal(load_image(tmp_path / f"deep.{kind}")[..., 0], values >> 8)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("png", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        *(("jpg", mode) for mode in ("RGB", "L", "CMYK")),
        *(("tif", mode) for mode in ("RGB", "RGBA", "L", "P", "1")),
        *(("bmp", mode) for mode in ("RGB", "L", "P", "1")),
        *(("webp", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_eight_bits_are_read_as_opencv_reads_colour(kind, mode, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    path = tmp_path / f"a.{kind}"
    noise.convert(mode).save(path)
    assert np.array_equal(load_image(path)[:, :, ::-1], cv2.imread(str(path), cv2.IMREAD_COLOR))


@pytest.mark.parametrize(("orientation", "hw"), [(1, (20, 30)), (3, (20, 30)), (6, (30, 20)), (8, (30, 20))])
def test_orientation_is_applied_before_the_size_is_read(orientation, hw, tmp_path):
    stored = Image.fromarray(np.where(MASK, 255, 0).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=100)
    seen = np.rot90(MASK, {1: 0, 3: 2, 6: 3, 8: 1}[orientation])
    assert load_image(tmp_path / "photo.jpg").shape == (*hw, 3)
    assert np.array_equal(load_image(tmp_path / "photo.jpg")[:, :, 0] > 127, seen)

    config = NetworkConfig.for_profile("efficientnet_lite0_fpn", 3, **{**TINY, "min_size": 20, "max_size": 30})
    labels = np.array([1])
    upright = LabeledImage(
        image_id="p", path=tmp_path / "photo.jpg", image_hw=hw, labels=labels, rles=(mask_to_rle(seen),)
    )
    _, sample = training_sample(upright, config, flip=False)
    assert np.array_equal(sample["masks"][0].numpy(), seen)


@pytest.mark.parametrize("content", [None, b"", b"no image"], ids=["missing", "empty", "damaged"])
def test_a_file_that_is_no_image_is_refused_by_name(content, tmp_path):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.png: expected an image"):
        load_image(tmp_path / "a.png")


def test_an_image_of_another_size_than_its_annotations_is_refused_by_name(tmp_path):
    image = labeled_image(tmp_path, "a", (1, MASK))
    cv2.imwrite(str(image.path), np.zeros((30, 20, 3), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"a\.png: its annotations are for size \(20, 30\), the file has \(30, 20\)"):
        training_sample(image, CONFIG, flip=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"labels": np.array([1, 2])}, r"one label for each of the 1 masks, got .*\(2,\)", id="two labels"),
        pytest.param({"labels": np.array([0])}, "labels start at 1", id="background"),
        pytest.param({"image_hw": (30, 20)}, r"its size is \(30, 20\)", id="another size"),
    ],
)
def test_labels_and_masks_of_an_image_must_agree(changes, message):
    fields = {"image_id": "a", "path": Path("a"), "image_hw": HW, "labels": np.array([1]), "rles": (COMPRESSED,)}
    with pytest.raises(InvalidInputError, match=message):
        LabeledImage(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"pseudo": False}, "only pseudo-labelled images", id="people's"),
        pytest.param({"triplets": np.ones((2, 3))}, r"shape \(1, 3\), got \(2, 3\)", id="two for one"),
        pytest.param({"triplets": np.ones(3)}, r"shape \(1, 3\), got \(3,\)", id="a single row"),
        pytest.param({"triplets": np.array([[0.5, 1.1, 0.5]])}, r"in \[0, 1\]", id="above one"),
        pytest.param({"triplets": np.array([[0.5, np.nan, 0.5]])}, r"in \[0, 1\]", id="no number"),
        pytest.param(
            {"ignored_boxes_xyxy": np.zeros((2, 3))}, r"\(K, 4\), finite, got shape \(2, 3\)", id="boxes of 3"
        ),
        pytest.param({"ignored_boxes_xyxy": np.full((1, 4), np.inf)}, "finite", id="infinite box"),
    ],
)
def test_what_the_model_says_of_its_labels_must_agree_with_them(changes, message):
    fields = {"image_id": "a", "path": Path("a"), "image_hw": HW, "labels": np.array([1]), "rles": (COMPRESSED,),
              "pseudo": True, "triplets": np.full((1, 3), 0.9), "ignored_boxes_xyxy": np.zeros((0, 4))}  # fmt: skip
    LabeledImage(**fields)
    with pytest.raises(InvalidInputError, match=message):
        LabeledImage(**{**fields, **changes})


# --- what the network gets


@pytest.mark.parametrize(
    ("hw", "expected"),
    [
        pytest.param((64, 64), (64, 64), id="as it is"),
        pytest.param((128, 160), (64, 80), id="shrunk"),
        pytest.param((32, 40), (64, 80), id="enlarged"),
        pytest.param((100, 400), (24, 96), id="the longer side rules"),
        pytest.param((1, 1000), (1, 96), id="a line"),
    ],
)
def test_the_input_size_keeps_the_proportions_within_both_limits(hw, expected):
    assert input_hw(hw, CONFIG) == expected


def test_pixels_become_numbers_from_zero_to_one():
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = (255, 51, 0)
    tensor = image_tensor(pixels, (4, 6))
    assert (tensor.shape, tensor.dtype) == ((3, 4, 6), torch.float32)
    assert tensor[:, 0, 0].tolist() == pytest.approx([1.0, 0.2, 0.0])
    checkered = np.indices((64, 64)).sum(axis=0)[:, :, None] % 2 * np.full(3, 255)
    shrunk = image_tensor(checkered.astype(np.uint8), (16, 16))
    assert (shrunk - 0.5).abs().max() < 0.01  # averaged, not aliased


@pytest.mark.parametrize("size", [64, 128, 32], ids=["same size", "shrunk", "enlarged"])
def test_boxes_masks_and_pixels_stay_together_at_the_input_size(size, tmp_path):
    scale = size // 32
    shapes = [rectangle(*(scale * c for c in box), hw=(size, size)) for box in ((4, 5, 20, 17), (18, 20, 30, 28))]
    image = labeled_image(tmp_path, "a", (1, shapes[0]), (2, shapes[1]))
    tensor, sample = training_sample(image, CONFIG, flip=False)
    assert tensor.shape == (3, 64, 64)
    assert sample["boxes"].tolist() == [[8, 10, 40, 34], [36, 40, 60, 56]]
    assert sample["labels"].tolist() == [1, 2]
    assert (sample["masks"].dtype, sample["pseudo"]) == (torch.uint8, False)
    bright = tensor.amax(dim=0) > 0.6
    assert (bright == sample["masks"].any(dim=0)).float().mean() > 0.98


def test_a_flip_mirrors_pixels_masks_and_boxes_alike(tmp_path):
    image = labeled_image(tmp_path, "a", (1, ellipse(4, 8, 30, 60)), (2, rectangle(40, 10, 60, 50)))
    tensor, sample = training_sample(image, CONFIG, flip=False)
    flipped_tensor, flipped = training_sample(image, CONFIG, flip=True)
    assert torch.equal(flipped_tensor, tensor.flip(2))
    assert torch.equal(flipped["masks"], sample["masks"].flip(2))
    assert flipped["boxes"].tolist() == [[34, 8, 60, 60], [4, 10, 24, 50]]
    assert torch.equal(flipped["labels"], sample["labels"])
    for mask, box in zip(flipped["masks"].numpy(), flipped["boxes"].tolist(), strict=True):
        assert rle_to_box_xyxy(mask_to_rle(mask.astype(bool))).tolist() == box


def test_instances_that_vanish_at_the_input_size_are_left_out(tmp_path):
    speck, block = rectangle(100, 100, 101, 101, hw=(256, 256)), rectangle(0, 0, 80, 80, hw=(256, 256))
    image = labeled_image(tmp_path, "a", (1, speck), (2, block))
    _, sample = training_sample(image, CONFIG, flip=False)
    assert sample["labels"].tolist() == [2]
    assert sample["boxes"].tolist() == [[0, 0, 20, 20]]
    _, nothing = training_sample(labeled_image(tmp_path, "b", (1, speck)), CONFIG, flip=True)
    assert (nothing["boxes"].shape, nothing["labels"].shape, nothing["masks"].shape) == ((0, 4), (0,), (0, 64, 64))


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        pytest.param(10, (8, 16, 32, 64, 128), id="small"),
        pytest.param(20, (16, 32, 64, 128, 256), id="middling"),
        pytest.param(60, (32, 64, 128, 256, 512), id="large"),
        pytest.param(1, (8, 16, 32, 64, 128), id="specks"),
        pytest.param(0, (8, 16, 32, 64, 128), id="empty masks"),
    ],
)
def test_anchors_fit_the_instances(side, expected, tmp_path):
    image = labeled_image(tmp_path, "a", (1, rectangle(0, 0, side, side)), (1, rectangle(0, 0, side, side)))
    assert fitting_anchors([image], CONFIG) == expected


def test_without_instances_the_anchors_stay(tmp_path):
    assert fitting_anchors([labeled_image(tmp_path, "a")], CONFIG) == CONFIG.anchor_sizes
    assert fitting_anchors([], CONFIG) == CONFIG.anchor_sizes


# --- training steps


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five annotated images and three that the model has labelled; their widths tell them apart."""
    folder = tmp_path_factory.mktemp("pictures")
    return [
        labeled_image(folder, str(width), (1, rectangle(2, 2, 30, 30, hw=(64, width))), pseudo=width >= 74)
        for width in (64, 66, 68, 70, 72, 74, 76, 78)
    ]


def widths(batch):
    return [image.shape[2] for image in batch[0]]


def steps(images, **training):
    return TrainingSteps(images, network=CONFIG, training=TrainingConfig(**{"epochs": 3, **training}))


@pytest.mark.parametrize(
    ("batch_size", "steps_per_epoch"), [(1, 5), (2, 3), (5, 1), (9, 1)], ids=lambda value: str(value)
)
def test_an_epoch_shows_each_annotated_image_once_and_fills_its_last_batch(batch_size, steps_per_epoch, pictures):
    batches = steps(pictures[:5], batch_size=batch_size)
    assert (batches.steps_per_epoch, len(batches)) == (steps_per_epoch, 3 * steps_per_epoch)
    for epoch in range(3):
        shown = Counter()
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            batch = widths(batches[step])
            assert len(batch) == len(set(batch)) == min(batch_size, 5)
            shown.update(batch)
        assert set(shown) == {64, 66, 68, 70, 72}
        assert max(shown.values()) <= (1 if 5 % min(batch_size, 5) == 0 else 2)


@pytest.mark.parametrize(("min_steps", "expected"), [(0, 6), (6, 6), (7, 8), (40, 40)], ids=str)
def test_a_small_set_gets_whole_epochs_until_it_has_enough_steps(min_steps, expected, pictures):
    assert len(steps(pictures[:4], batch_size=2, min_steps=min_steps)) == expected


def test_epochs_have_different_orders(pictures):
    batches = steps(pictures[:5], batch_size=5, epochs=10)
    assert len({tuple(widths(batches[step])) for step in range(10)}) > 5


def test_each_step_is_joined_by_pseudo_labelled_images_that_take_turns(pictures):
    batches = steps(pictures, batch_size=2, pseudo_batch_size=1)
    assert len(batches) == 9  # an epoch is one of the annotated images
    seen = []
    for step in range(9):
        _, targets = batch = batches[step]
        assert [target["pseudo"] for target in targets] == [False, False, True]
        seen.append(widths(batch)[-1])
    assert [Counter(seen[i : i + 3]) for i in (0, 3, 6)] == [Counter([74, 76, 78])] * 3


def test_pseudo_labelled_images_may_join_only_some_steps_and_all_have_their_turn(pictures):
    batches = steps(pictures, batch_size=2, pseudo_every_steps=3)
    assert [len(batches[step][1]) for step in range(9)] == [3, 2, 2] * 3
    assert Counter(widths(batches[step])[-1] for step in (0, 3, 6)) == Counter([74, 76, 78])


def test_the_same_step_is_always_the_same_and_another_seed_another(pictures):
    def content(batch):
        return [tensor.numpy().tobytes() for tensor in batch[0]], [t["masks"].numpy().tobytes() for t in batch[1]]

    first, again, other = steps(pictures), steps(pictures), steps(pictures, seed=1)
    order = list(range(len(first)))
    assert [content(first[i]) for i in order] == [content(again[i]) for i in reversed(order)][::-1]
    assert [content(first[i]) for i in order] != [content(other[i]) for i in order]


@pytest.mark.parametrize(("probability", "flipped"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_images_are_flipped_with_the_given_probability(probability, flipped, pictures):
    batches = steps(pictures[:5], horizontal_flip=probability, epochs=4, batch_size=5)
    assert {bool(t["boxes"][0, 0] > 2) for step in range(4) for t in batches[step][1]} == flipped


def test_weights_and_ignored_boxes_follow_flips_sizes_and_vanished_instances(tmp_path):
    speck, block = rectangle(100, 100, 101, 101, hw=(128, 128)), rectangle(0, 0, 80, 80, hw=(128, 128))
    image = scored(labeled_image(tmp_path, "a", (1, speck), (2, block), pseudo=True))
    _, plain = training_sample(image, CONFIG, flip=False)
    _, flipped = training_sample(image, CONFIG, flip=True)
    for sample in (plain, flipped):  # at half the size the speck is gone
        np.testing.assert_allclose(sample["weights"], image.triplets[1:].astype(np.float32))
    np.testing.assert_allclose(plain["ignored"], [[2, 3, 10, 5], [1 / 6, 0, 1, 32]], rtol=1e-6)
    np.testing.assert_allclose(flipped["ignored"], [[54, 3, 62, 5], [63, 0, 64 - 1 / 6, 32]], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, set()),
        ({"soft_weights": True}, {"weights"}),
        ({"pseudo_negatives": "outside_ignored"}, {"ignored"}),
    ],
    ids=["eq. 4", "soft weights", "negatives"],
)
def test_targets_carry_what_the_settings_use(options, fields, pictures):
    batches = steps([*pictures[:5], *map(scored, pictures[5:])], **options)
    for target in batches[0][1]:
        extra = set(target) - {"boxes", "labels", "masks", "pseudo"}
        assert extra == (fields if target["pseudo"] else set())


@pytest.mark.parametrize("options", [{"soft_weights": True}, {"pseudo_negatives": "outside_ignored"}], ids=str)
def test_pseudo_labels_that_lack_what_the_settings_use_are_refused(options, pictures):
    with pytest.raises(DatasetError, match=r"image 74: .* make them anew"):
        steps(pictures, **options)


def test_images_in_which_nothing_was_trusted_wait_for_the_teacher(pictures, tmp_path):
    waiting = labeled_image(tmp_path, "waiting", pseudo=True)  # 64 wide
    without = steps([*pictures[:6], waiting])
    assert {widths(without[step])[-1] for step in range(len(without))} == {74}
    taught = steps([*pictures[:6], waiting], ema_decay=0.9, ema_burn_in=0.5, soft_weights=False, epochs=10)
    first = taught.teacher_from
    assert first == len(taught) // 2
    assert {widths(taught[step])[-1] for step in range(first)} == {74}
    assert {widths(taught[step])[-1] for step in range(first, len(taught))} == {64, 74}
    assert len(steps([*pictures[:5], waiting])[0][0]) == 2  # nobody waits for images that never come


def test_there_is_nothing_to_train_on_without_annotated_images(pictures):
    with pytest.raises(DatasetError, match="at least one annotated image"):
        steps(pictures[5:])


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 1), (2, 2), (3, 3)], ids=str)
def test_learning_loss_needs_two_images_in_a_process_to_compare(processes, batch_size, pictures):
    def made(batch_size, **options):
        network, training = replace(CONFIG, **options), TrainingConfig(batch_size=batch_size)
        return TrainingSteps(pictures, network=network, training=training, share=share)

    share = (0, processes) if processes > 1 else None
    message = f"learning_loss .* at least {2 * processes}, two for each of {processes}, got {batch_size}"
    with pytest.raises(InvalidInputError, match=message):
        made(batch_size, learning_loss=True)
    assert len(made(batch_size))
    assert len(made(batch_size + 1, learning_loss=True))


# --- real sets


@pytest.mark.parametrize("name", ["animals6", "chiu_dme_oct", "dsb2018", "phe_sich_ct"])
def test_real_sets_are_read_whole(name):
    path = annotations_of(name)
    test, everything = read_coco(path, split="test"), read_coco(path)
    assert 0 < len(test.images) < len(everything.images)
    content = json.loads(path.read_text())
    assert sum(len(image.rles) for image in everything.images) == len(content["annotations"])
    config = NetworkConfig.for_profile("efficientnet_lite0_fpn", len(test.class_names) + 1)
    with_instances = next(image for image in test.images if len(image.rles))
    tensor, sample = training_sample(with_instances, config, flip=False)
    assert len(sample["boxes"]) > 0
    assert sample["masks"].shape[1:] == tensor.shape[1:]
