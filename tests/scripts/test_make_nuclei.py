"""Nuclei from their source folders: the same set as one that was built by the same rules before."""

import json
import sys

import cv2
import numpy as np
import pytest

from model.dataset import load_image, read_coco
from model.errors import DatasetError
from model.geometry import rle_to_mask
from scripts.make_nuclei import main, make_nuclei
from tests.real_sets import annotations_of

ID = "ab" * 32


def write_source(folder, image_id, pixels, masks):
    for name, content in [
        (f"images/{image_id}", pixels),
        *((f"masks/{number:03d}", mask * np.uint8(255)) for number, mask in enumerate(masks)),
    ]:
        path = folder / image_id / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", content)[1].tobytes())


def squares(*corners, size=40):
    masks = np.zeros((len(corners), size, size), dtype=np.uint8)
    for mask, corner in zip(masks, corners, strict=True):
        mask[corner : corner + 5, corner : corner + 5] = 1
    return masks


def test_the_public_nuclei_are_made_again_from_their_source(tmp_path):
    file = annotations_of("dsb2018")
    known = {image.image_id: image for image in read_coco(file).images}
    rows = {row["style"] + row["split"]: row for row in json.loads(file.read_text())["images"]}  # one of each kind
    for row in rows.values():
        image = known[str(row["id"])]
        pixels = cv2.cvtColor(load_image(image.path), cv2.COLOR_RGB2BGRA)
        write_source(tmp_path / "source", row["source_id"], pixels, [rle_to_mask(rle) for rle in image.rles])
    assert make_nuclei(tmp_path / "source", tmp_path / "made") == len(rows) == 5
    made = {
        (image.path.name, split): image
        for split in ("train", "test")
        for image in read_coco(tmp_path / "made" / "annotations.json", split=split).images
    }
    assert set(made) == {(row["file_name"], row["split"]) for row in rows.values()}
    for row in rows.values():
        ours, theirs = made[row["file_name"], row["split"]], known[str(row["id"])]
        assert ours.rles == theirs.rles
        pixels = [cv2.imread(str(image.path), cv2.IMREAD_UNCHANGED) for image in (ours, theirs)]
        assert np.array_equal(*pixels)


def test_a_set_that_is_there_is_left_alone(tmp_path):
    write_source(tmp_path / "source", ID, np.zeros((40, 40, 4), dtype=np.uint8), squares(3, 20))
    assert make_nuclei(tmp_path / "source", tmp_path / "made") == 1
    before = (tmp_path / "made" / "annotations.json").read_bytes()
    with pytest.raises(DatasetError, match="holds a set already"):
        make_nuclei(tmp_path / "source", tmp_path / "made")
    assert (tmp_path / "made" / "annotations.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "images" / f"{ID}.png").unlink(), "expected folders like <id>/images/<id>.png"),
        (lambda folder: (folder / "masks" / "000.png").write_bytes(b"PNG"), "000.png: expected a PNG"),
        (
            lambda folder: write_source(folder.parent, ID, np.zeros((30, 40), dtype=np.uint8), squares(3)),
            "expected a mask of 30 x 40 pixels, got (40, 40)",
        ),
    ],
    ids=["no image", "a damaged mask", "masks of another size"],
)
def test_another_source_is_refused(tmp_path, monkeypatch, change, told):
    write_source(tmp_path / "source", ID, np.zeros((40, 40, 4), dtype=np.uint8), squares(3))
    change(tmp_path / "source" / ID)
    monkeypatch.setattr(sys, "argv", ["make_nuclei", str(tmp_path / "source"), str(tmp_path / "made")])
    with pytest.raises(SystemExit) as end:
        main()
    assert told in str(end.value)
    assert not (tmp_path / "made" / "annotations.json").exists()
