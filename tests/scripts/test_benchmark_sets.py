"""The pool at the network's input size: what a network learns from is exactly what it would get of the originals."""

import json

import cv2
import numpy as np
import pytest
import torch

from model.config import NetworkConfig
from model.dataset import LabeledSet, load_image, training_sample, write_coco
from model.geometry import mask_to_rle, rle_to_mask
from model.types import LabeledImage
from scripts.benchmark_sets import at_input_size, read_data
from tests.model.examples import ellipse

NETWORK = NetworkConfig(profile="efficientnet_lite0_fpn", num_classes=3, min_size=48, max_size=64)


@pytest.fixture
def folder(tmp_path):
    """Eight noisy images of different sizes, each with two ellipses, one of which vanishes when shrunk."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    rng, images = np.random.default_rng(0), []
    for number, hw in enumerate([(100, 131), (48, 48), (97, 201), (40, 30)] * 2):
        path = tmp_path / "set" / "images" / f"{number}.png"
        cv2.imwrite(str(path), rng.integers(0, 256, (*hw, 3), dtype=np.uint8))
        masks = [ellipse(3, 4, hw[1] - 5, hw[0] - 8, hw), ellipse(0, 0, 2, 2, hw)]
        images.append(
            LabeledImage(
                image_id=str(number),
                path=path,
                image_hw=hw,
                labels=np.array([1, 2], dtype=np.int64),
                rles=tuple(mask_to_rle(mask) for mask in masks),
            )
        )
    write_coco(tmp_path / "set" / "annotations.json", LabeledSet(images=tuple(images), class_names=("a", "b")))
    return tmp_path / "set"


def test_a_shrunk_image_is_trained_on_as_the_original_would_be(folder, tmp_path):
    data = read_data(folder, pool_size=None, test_size=None)
    small, _ = at_input_size(data, NETWORK, tmp_path / "shared")
    vanished = 0
    for image in data.pool.images:
        for flip in (False, True):
            tensor, target = training_sample(image, NETWORK, flip=flip)
            small_tensor, small_target = training_sample(small[image.image_id], NETWORK, flip=flip)
            assert torch.equal(tensor, small_tensor)
            for name in ("boxes", "labels", "masks"):
                assert torch.equal(target[name], small_target[name])
        vanished += len(image.labels) - len(target["labels"])
    assert vanished > 0


def test_the_shrunk_images_are_made_once(folder, tmp_path):
    data = read_data(folder, pool_size=None, test_size=None)
    small, vertices = at_input_size(data, NETWORK, tmp_path / "shared")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.*")}
    assert len(before) == len(data.pool.images) + 1  # each image, and the index
    again, vertices_again = at_input_size(data, NETWORK, tmp_path / "shared")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [(i.path, i.rles) for i in again.values()] == [(i.path, i.rles) for i in small.values()]
    assert vertices == vertices_again


def test_other_pixels_under_the_same_labels_are_another_set(folder, tmp_path):
    data = read_data(folder, pool_size=None, test_size=None)
    old, _ = at_input_size(data, NETWORK, tmp_path / "shared")
    changed, same = data.pool.images[:2]
    cv2.imwrite(str(changed.path), 255 - cv2.imread(str(changed.path)))
    other = read_data(folder, pool_size=None, test_size=None)
    assert other.fingerprints[0] != data.fingerprints[0]
    assert other.fingerprints[1] == data.fingerprints[1]
    new, _ = at_input_size(other, NETWORK, tmp_path / "shared")
    inverted = 255 - load_image(old[changed.image_id].path).astype(int)
    assert np.abs(load_image(new[changed.image_id].path) - inverted).max() <= 1  # rounded the other way
    np.testing.assert_array_equal(load_image(new[same.image_id].path), load_image(old[same.image_id].path))


def test_vertices_are_those_of_the_polygons_or_else_of_outlines_of_the_masks(folder, tmp_path):
    coco = json.loads((folder / "annotations.json").read_text())
    for image in coco["images"]:
        image["split"] = "test" if image["id"] > 4 else "train"
    for annotation in coco["annotations"]:
        if annotation["image_id"] == 1:
            annotation["segmentation"] = [[0, 0, 30, 0, 30, 30], [40, 40, 60, 40, 60, 60, 40, 60]]
    (folder / "annotations.json").write_text(json.dumps(coco))
    data = read_data(folder, pool_size=None, test_size=None)
    assert [len(part.images) for part in (data.pool, data.test)] == [4, 4]
    _, vertices = at_input_size(data, NETWORK, tmp_path / "shared")
    assert vertices["0"] == 2 * (3 + 4)
    assert 10 < vertices["1"] <= 2 * 40


def test_on_demand_a_random_fourth_is_for_testing_whatever_the_set_says(folder):
    coco = json.loads((folder / "annotations.json").read_text())
    for image in coco["images"]:
        image["split"] = "test" if image["id"] > 4 else "train"
    (folder / "annotations.json").write_text(json.dumps(coco))
    own, other = (read_data(folder, pool_size=None, test_size=None, random_split=split) for split in (False, True))
    assert [len(part.images) for part in (own.pool, own.test, other.pool, other.test)] == [4, 4, 6, 2]
    everything = {image.image_id for part in (own.pool, own.test) for image in part.images}
    assert {image.image_id for part in (other.pool, other.test) for image in part.images} == everything
    assert (own.name, other.name) == ("set", "set, split at random")


def test_a_part_of_a_set_is_always_the_same(folder):
    one = read_data(folder, pool_size=3, test_size=1)
    other = read_data(folder, pool_size=3, test_size=1)
    assert [image.image_id for image in one.pool.images] == [image.image_id for image in other.pool.images]
    assert (len(one.pool.images), len(one.test.images)) == (3, 1)
    assert not {i.image_id for i in one.pool.images} & {i.image_id for i in one.test.images}


def test_of_larger_images_only_the_middle_is_used(folder, tmp_path):
    whole = {i.image_id: i for part in _parts(read_data(folder, pool_size=None, test_size=None)) for i in part.images}
    for _ in range(2):  # the second time the files are there
        data = read_data(folder, pool_size=None, test_size=None, crop=90, shared=tmp_path / "shared")
        for image in (i for part in _parts(data) for i in part.images):
            original = whole[image.image_id]
            height, width = original.image_hw
            y, x = max(0, (height - 90) // 2), max(0, (width - 90) // 2)
            window = np.s_[y : y + 90, x : x + 90]
            assert image.image_hw == (min(height, 90), min(width, 90))
            np.testing.assert_array_equal(load_image(image.path), load_image(original.path)[window])
            np.testing.assert_array_equal(rle_to_mask(image.rles[0]), rle_to_mask(original.rles[0])[window])
            cut = max(height, width) > 90  # then the speck of three pixels is left out
            assert image.labels.tolist() == ([1] if cut else [1, 2])
    assert (data.name, data.crop) == ("set, 90 px crops", 90)


def _parts(data):
    return data.pool, data.test


def test_a_test_set_without_any_instance_is_refused(folder):
    coco = json.loads((folder / "annotations.json").read_text())
    for image in coco["images"]:
        image["split"] = "test" if image["id"] > 4 else "train"
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] <= 4]
    (folder / "annotations.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="no instance in the 4 test images"):
        read_data(folder, pool_size=None, test_size=None)


def test_a_crop_that_leaves_no_instance_in_the_test_set_is_refused(folder, tmp_path):
    coco = json.loads((folder / "annotations.json").read_text())
    for image in coco["images"]:
        image["split"] = "test" if image["id"] > 4 else "train"
    for annotation in coco["annotations"]:
        if annotation["image_id"] > 4:  # a corner, far from the middle
            annotation |= {"segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]], "bbox": [0, 0, 4, 4], "area": 16}
    (folder / "annotations.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="the middle 30 px of each image: there is no instance in the 4 test images"):
        read_data(folder, pool_size=None, test_size=None, crop=30, shared=tmp_path / "shared")
