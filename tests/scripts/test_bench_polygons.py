"""Polygons of all masks of a folder, ours and the plain way."""

from argparse import Namespace

import numpy as np
import pytest

from scripts.bench_polygons import plain_polygons, polygons
from scripts.make_phantoms import make_phantoms


def test_all_masks_of_the_folders_that_are_there_are_outlined(tmp_path):
    make_phantoms(tmp_path / "phantoms", images=5, size=96, seed=0, empty_fraction=0.0)
    measured = polygons(Namespace(data=[str(tmp_path / "phantoms"), str(tmp_path / "nowhere")]))
    assert measured["absent"] == ["nowhere"]
    (of_set,) = measured["sets"].values()
    assert of_set["masks"] >= 5
    assert of_set["ours"]["median_iou"] > 0.97 > of_set["theirs"]["median_iou"]
    assert of_set["ours"]["most_vertices"] <= 40
    assert of_set["ours"]["invalid"] == 0
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"])


def test_a_folder_without_instances_counts_as_absent(tmp_path):
    make_phantoms(tmp_path / "phantoms", images=1, size=96, seed=0, empty_fraction=0.0)
    make_phantoms(tmp_path / "empty", images=1, size=96, seed=0, empty_fraction=1.0)
    measured = polygons(Namespace(data=[str(tmp_path / "phantoms"), str(tmp_path / "empty")]))
    assert (list(measured["sets"]), measured["absent"]) == (["phantoms"], ["empty"])
    with pytest.raises(SystemExit, match=r"--data must name a folder .* with instances"):
        polygons(Namespace(data=[str(tmp_path / "empty")]))


def test_without_any_folder_it_says_what_it_needs(tmp_path):
    with pytest.raises(SystemExit, match="--data must name a folder"):
        polygons(Namespace(data=[str(tmp_path / "nowhere")]))


def test_the_plain_way_loses_what_has_no_area_between_pixel_centres():
    mask = np.zeros((20, 20), dtype=bool)
    mask[3:9, 4:12] = True
    mask[15, 2:8] = True
    (ring,) = plain_polygons(mask)
    assert (ring.min(axis=0).tolist(), ring.max(axis=0).tolist()) == ([4.5, 3.5], [11.5, 8.5])
