"""The phantoms: reproducible, valid COCO, and safe to write again."""

import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from model.dataset import read_coco
from model.errors import DatasetError, InvalidInputError
from model.geometry import rle_to_mask
from scripts.make_phantoms import CLASS_NAMES, main, make_phantoms, phantom

SMALL = {"images": 6, "size": 96, "seed": 3}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_images(tmp_path):
    make_phantoms(tmp_path / "first", **SMALL)
    make_phantoms(tmp_path / "second", **SMALL)
    make_phantoms(tmp_path / "third", **{**SMALL, "seed": 4})
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    first, third = ((tmp_path / name / "images/phantom_00000.png").read_bytes() for name in ("first", "third"))
    assert first != third


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    make_phantoms(tmp_path / "few", **{**SMALL, "images": 2})
    make_phantoms(tmp_path / "more", **SMALL)
    few, more = contents(tmp_path / "few" / "images"), contents(tmp_path / "more" / "images")
    assert len(few) == 2
    assert few.items() <= more.items()


def test_the_folder_is_coco_that_pycocotools_and_the_dataset_read(tmp_path, capsys):
    make_phantoms(tmp_path / "set", **SMALL)
    coco = COCO(tmp_path / "set" / "annotations.json")
    capsys.readouterr()  # pycocotools prints
    assert {category["id"]: category["name"] for category in coco.cats.values()} == dict(enumerate(CLASS_NAMES, 1))
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    labeled = read_coco(tmp_path / "set" / "annotations.json")
    assert labeled.class_names == CLASS_NAMES
    assert len(labeled.images) == SMALL["images"]
    for index, image in enumerate(labeled.images):
        drawn = phantom((SMALL["seed"], index), SMALL["size"])
        pixels = cv2.imread(str(image.path), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(pixels, drawn.image)
        assert image.labels.tolist() == drawn.labels.tolist()
        assert all(np.array_equal(rle_to_mask(rle), mask) for rle, mask in zip(image.rles, drawn.masks, strict=True))


@pytest.mark.parametrize("size", [64, 192])
def test_a_phantom_has_gray_pixels_and_a_connected_mask_for_each_lesion(size):
    for seed in range(10):
        drawn = phantom(seed, size)
        assert drawn.image.shape == (size, size)
        assert drawn.image.dtype == np.uint8
        assert drawn.masks.shape == (len(drawn.labels), size, size)
        assert drawn.masks.dtype == np.bool_
        assert set(drawn.labels.tolist()) <= {1, 2, 3}
        for mask in drawn.masks:
            assert cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] == 2


def test_all_classes_occur_and_images_without_lesions_at_the_given_rate():
    drawn = [phantom((0, index), 96) for index in range(80)]
    assert set(np.concatenate([one.labels for one in drawn]).tolist()) == {1, 2, 3}
    assert 0.05 < np.mean([len(one.labels) == 0 for one in drawn]) < 0.3
    assert all(len(phantom(seed, 96, empty_fraction=1.0).labels) == 0 for seed in range(5))
    assert all(len(phantom(seed, 96, empty_fraction=0.0).labels) > 0 for seed in range(5))


def test_haemorrhage_is_brighter_than_its_surroundings_and_oedema_darker():
    contrasts = {name: [] for name in CLASS_NAMES}
    for seed in range(40):
        drawn = phantom(seed, 128)
        lesions = drawn.masks.any(axis=0)
        for label, mask in zip(drawn.labels, drawn.masks, strict=True):
            around = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool) & ~lesions
            contrasts[CLASS_NAMES[label - 1]].append(np.median(drawn.image[mask]) - np.median(drawn.image[around]))
    assert np.median(contrasts["calcification"]) > np.median(contrasts["haemorrhage"]) > 15
    assert np.median(contrasts["oedema"]) < -10


def test_some_images_are_much_noisier_than_others():
    brains = [phantom(seed, 96, empty_fraction=1.0).image[35:60, 24:38].astype(float) for seed in range(30)]
    noise = [np.std(np.diff(brain, axis=0)) for brain in brains]
    assert max(noise) > 2 * min(noise)


def test_a_complete_set_is_left_as_it_is(tmp_path):
    make_phantoms(tmp_path, **SMALL)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make_phantoms(tmp_path, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_an_interrupted_run_is_finished_by_the_next_one(tmp_path):
    make_phantoms(tmp_path / "whole", **SMALL)
    make_phantoms(tmp_path / "cut", **SMALL)
    (tmp_path / "cut" / "annotations.json").unlink()
    (tmp_path / "cut" / "images" / "phantom_00001.png").write_bytes(b"half a pi")
    (tmp_path / "cut" / "images" / "phantom_00004.png").unlink()
    make_phantoms(tmp_path / "cut", **SMALL)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="holds other files"):
        make_phantoms(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_set_of_other_parameters_is_refused_and_untouched(tmp_path):
    make_phantoms(tmp_path, **SMALL)
    before = contents(tmp_path)
    with pytest.raises(DatasetError, match=r"'seed': 3.*'seed': 4"):
        make_phantoms(tmp_path, **{**SMALL, "seed": 4})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("wrong", [{"images": 0}, {"size": 10}, {"seed": -1}, {"empty_fraction": 1.5}], ids=str)
def test_impossible_parameters_are_refused(tmp_path, wrong):
    with pytest.raises(InvalidInputError, match="expected images >= 1"):
        make_phantoms(tmp_path / "out", **{**SMALL, **wrong})
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_set_and_reports_what_is_wrong(tmp_path, capsys):
    arguments = [str(tmp_path / "set"), "--images", "2", "--size", "64"]
    assert main(arguments) == 0
    assert len(json.loads((tmp_path / "set" / "annotations.json").read_text())["images"]) == 2
    assert main([*arguments, "--seed", "1"]) == 1
    assert "choose another folder" in capsys.readouterr().err
