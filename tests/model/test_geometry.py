"""Masks, polygons, RLE and boxes against pycocotools, torchvision and brute force."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from model.errors import InvalidInputError
from model.geometry import (
    is_simple_polygon,
    mask_to_polygons,
    mask_to_rle,
    polygons_to_rle,
    rle_area,
    rle_to_box_xyxy,
    rle_to_mask,
    roi_mask_to_polygons,
    roi_mask_to_rle,
)
from model.losses import mask_coverage


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


def blob(seed, image_hw=(96, 128), smooth=6.0):
    """Level set of smoothed noise: one or several wavy parts, holes, some cut by the border."""
    noise = np.random.default_rng(seed).normal(size=image_hw).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), smooth) > 0.3 / smooth


def disc(radius, image_hw=(96, 96)):
    rows, columns = np.indices(image_hw)
    return (rows - image_hw[0] / 2) ** 2 + (columns - image_hw[1] / 2) ** 2 <= radius**2


def rectangle(rows, columns, image_hw=(20, 30)):
    mask = np.zeros(image_hw, dtype=bool)
    mask[rows, columns] = True
    return mask


def without_holes(mask):
    padded = np.pad(mask, 1).astype(np.uint8)
    cv2.floodFill(padded, None, (0, 0), 2, flags=4)
    return padded[1:-1, 1:-1] != 2


def spiral(size=64):
    mask = np.zeros((size, size), dtype=bool)
    angles = np.linspace(0.0, 8 * np.pi, 4000)
    radii = 4 + angles / (8 * np.pi) * (size / 2 - 8)
    mask[(size / 2 + radii * np.sin(angles)).astype(int), (size / 2 + radii * np.cos(angles)).astype(int)] = True
    return mask


def comb(teeth=30):
    mask = np.zeros((40, 2 * teeth), dtype=bool)
    mask[:, ::2] = True
    mask[:5] = True
    return mask


AWKWARD_MASKS = {
    "one pixel": rectangle(7, 9),
    "one pixel in the corner": rectangle(19, 29),
    "horizontal line": rectangle(7, slice(3, 28)),
    "vertical line": rectangle(slice(0, 20), 4),
    "diagonal line": np.eye(40, dtype=bool),
    "anti-diagonal line": np.eye(40, dtype=bool)[::-1],
    "whole image": rectangle(slice(None), slice(None)),
    "image of one pixel": np.ones((1, 1), dtype=bool),
    "ring": disc(30) & ~disc(20),
    "thin ring": disc(30) & ~disc(29),
    "two squares that meet at a corner": np.kron(np.eye(2, dtype=int), np.ones((8, 8), dtype=int)).astype(bool),
    "checkerboard": np.indices((30, 30)).sum(axis=0) % 2 == 0,
    "spiral": spiral(),
    "comb": comb(),
    "island in a hole": (disc(40) & ~disc(30)) | disc(10),
}

MASKS = st.one_of(
    hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24)),
    st.builds(blob, st.integers(0, 10_000), st.just((48, 64)), st.floats(0.6, 8.0)),
    st.builds(
        lambda seed, keep: np.random.default_rng(seed).random((40, 40)) < keep, st.integers(0, 99), st.floats(0, 1)
    ),
)


def assert_valid(polygons_xy, image_hw, max_vertices):
    assert sum(len(points) for points in polygons_xy) <= max_vertices
    for points in polygons_xy:
        assert points.dtype == np.float32
        assert is_simple_polygon(points)
        assert cv2.contourArea(points) > 0
        assert points.min() >= 0
        assert points[:, 0].max() <= image_hw[1]
        assert points[:, 1].max() <= image_hw[0]


# RLE and boxes


@given(mask=MASKS)
def test_a_mask_survives_the_way_to_rle_and_back(mask):
    rle = mask_to_rle(mask)
    assert isinstance(rle["counts"], str)
    assert rle["size"] == list(mask.shape)
    assert np.array_equal(rle_to_mask(rle), mask)
    assert rle_to_mask(rle).dtype == np.bool_
    assert rle_area(rle) == mask.sum()


@given(mask=MASKS.filter(np.any))
def test_the_box_reaches_from_the_first_pixel_to_behind_the_last(mask):
    rows, columns = mask.nonzero()
    box_xyxy = rle_to_box_xyxy(mask_to_rle(mask))
    assert box_xyxy.dtype == np.float32
    assert box_xyxy.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_an_empty_mask_has_no_area_and_a_box_of_zeros():
    rle = mask_to_rle(np.zeros((5, 6), dtype=bool))
    assert rle_area(rle) == 0
    assert rle_to_box_xyxy(rle).tolist() == [0, 0, 0, 0]


# Polygons to masks


def test_a_polygon_in_pixel_corners_fills_exactly_its_pixels():
    square = np.array([[3, 2], [9, 2], [9, 7], [3, 7]], dtype=np.float32)
    assert np.array_equal(rle_to_mask(polygons_to_rle([square], (20, 30))), rectangle(slice(2, 7), slice(3, 9)))


def test_several_polygons_give_their_union():
    first = np.array([[0, 0], [6, 0], [6, 6], [0, 6]], dtype=np.float64)
    together = rle_to_mask(polygons_to_rle([first, first + 3, first + 12], (20, 30)))
    expected = rectangle(slice(0, 6), slice(0, 6)) | rectangle(slice(3, 9), slice(3, 9))
    assert np.array_equal(together, expected | rectangle(slice(12, 18), slice(12, 18)))


def test_no_polygons_give_an_empty_mask():
    assert not rle_to_mask(polygons_to_rle([], (4, 5))).any()


def test_a_polygon_is_cut_off_at_the_image_border():
    square = np.array([[-4, -4], [50, -4], [50, 5], [-4, 5]], dtype=np.float32)
    assert np.array_equal(rle_to_mask(polygons_to_rle([square], (20, 30))), rectangle(slice(0, 5), slice(None)))


# Masks to polygons


@settings(max_examples=200, deadline=None)
@given(mask=MASKS, max_vertices=st.integers(3, 60))
def test_polygons_of_any_mask_are_valid_and_in_budget(mask, max_vertices):
    polygons_xy = mask_to_polygons(mask, max_vertices=max_vertices)
    assert bool(polygons_xy) == bool(mask.any())
    assert_valid(polygons_xy, mask.shape, max_vertices)


@pytest.mark.parametrize("max_vertices", [3, 4, 8, 40])
@pytest.mark.parametrize("mask", AWKWARD_MASKS.values(), ids=AWKWARD_MASKS.keys())
def test_polygons_of_awkward_masks_are_valid_and_in_budget(mask, max_vertices):
    polygons_xy = mask_to_polygons(mask, max_vertices=max_vertices)
    assert polygons_xy
    assert_valid(polygons_xy, mask.shape, max_vertices)


@given(mask=MASKS.filter(np.any))
@settings(deadline=None)
def test_with_vertices_to_spare_a_polygon_gives_its_mask_back_with_holes_filled(mask):
    polygons_xy = mask_to_polygons(mask, max_vertices=100_000, tolerance_px=0.01)
    back = rle_to_mask(polygons_to_rle(polygons_xy, mask.shape))
    filled = without_holes(mask)
    # pycocotools rounds at five samples a pixel, so at one-pixel necks and tips it may differ by a pixel.
    assert iou(back, filled) >= 0.9


@pytest.mark.parametrize("smooth", [4.0, 8.0, 16.0], ids=["wiggly", "wavy", "smooth"])
def test_forty_vertices_for_each_part_keep_the_shape(smooth):
    parts = []
    for seed in range(8):
        mask = without_holes(blob(seed, smooth=smooth))
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        parts += [labels == index for index in range(1, count)]
    ious = [iou(rle_to_mask(polygons_to_rle(mask_to_polygons(part), part.shape)), part) for part in parts]
    assert np.median(ious) >= 0.97
    assert np.min(ious) >= 0.8


@pytest.mark.parametrize("radius", [3, 5, 10, 20, 40])
def test_a_disc_keeps_its_area_instead_of_shrinking_by_half_a_pixel(radius):
    mask = disc(radius)
    back = rle_to_mask(polygons_to_rle(mask_to_polygons(mask), mask.shape))
    assert iou(back, mask) >= 0.97
    assert back.sum() == pytest.approx(mask.sum(), rel=0.02)


@pytest.mark.parametrize(
    "mask",
    [AWKWARD_MASKS[name] for name in ("one pixel", "horizontal line", "vertical line", "diagonal line", "whole image")],
    ids=["one pixel", "horizontal line", "vertical line", "diagonal line", "whole image"],
)
def test_thin_and_tiny_masks_come_back_whole(mask):
    assert iou(rle_to_mask(polygons_to_rle(mask_to_polygons(mask), mask.shape)), mask) >= 0.95


def test_parts_come_largest_first_and_small_ones_can_be_left_out():
    mask = rectangle(slice(1, 4), slice(1, 4)) | rectangle(slice(6, 19), slice(6, 29)) | rectangle(1, 20)
    areas = [cv2.contourArea(points) for points in mask_to_polygons(mask)]
    assert len(areas) == 3
    assert areas == sorted(areas, reverse=True)
    assert len(mask_to_polygons(mask, min_area_px=4)) == 2
    assert len(mask_to_polygons(mask, min_area_px=10_000)) == 1


def test_an_empty_mask_has_no_polygons():
    assert mask_to_polygons(np.zeros((5, 6), dtype=bool)) == []


def test_a_coarser_tolerance_needs_fewer_vertices():
    counts = [len(mask_to_polygons(disc(40), tolerance_px=tolerance)[0]) for tolerance in (0.3, 1.0, 3.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]


# RoI masks

BOXES_XYXY = {
    "inside": [20.3, 10.7, 100.9, 70.2],
    "small": [20.3, 10.7, 29.8, 22.4],
    "over the left and top border": [-30.5, -20.5, 60.0, 70.0],
    "over the right and bottom border": [90.2, 60.1, 170.0, 130.0],
    "larger than the image": [-50.0, -50.0, 250.0, 200.0],
}


def roi_disc(size=28):
    """A soft disc (M, M) that fills the box."""
    rows, columns = np.indices((size, size)) - (size - 1) / 2
    return (1 / (1 + np.exp(np.hypot(rows, columns) - 0.42 * size))).astype(np.float32)


def torchvision_paste(roi_mask, box_xyxy, image_hw, threshold):
    masks, boxes = torch.from_numpy(roi_mask)[None, None], torch.tensor(box_xyxy, dtype=torch.float32)[None]
    return (paste_masks_in_image(masks, boxes, image_hw)[0, 0] > threshold).numpy()


@pytest.mark.parametrize("threshold", [0.3, 0.5])
@pytest.mark.parametrize("box_xyxy", [box for name, box in BOXES_XYXY.items() if name != "small"])
def test_a_pasted_roi_mask_agrees_with_torchvision(box_xyxy, threshold):
    ours = rle_to_mask(roi_mask_to_rle(roi_disc(), np.array(box_xyxy), (96, 128), mask_threshold=threshold))
    assert iou(ours, torchvision_paste(roi_disc(), box_xyxy, (96, 128), threshold)) >= 0.95


@pytest.mark.parametrize("size_px", [8, 16, 32, 64])
def test_pasting_undoes_the_mask_targets_better_than_torchvisions_paste(size_px):
    ours, theirs = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mask = disc(size_px / 2 + rng.random())
        slack_px = rng.uniform(0, 1, 4).astype(np.float32)
        box_xyxy = rle_to_box_xyxy(mask_to_rle(mask)) + slack_px * np.float32([-1, -1, 1, 1])
        boxes, masks = torch.from_numpy(box_xyxy)[None], torch.from_numpy(mask)[None]
        target = mask_coverage([masks], [torch.tensor([0])], [boxes], 28)[0].numpy()
        pasted = rle_to_mask(roi_mask_to_rle(target, box_xyxy, mask.shape, mask_threshold=0.5))
        ours.append(iou(pasted, mask))
        theirs.append(iou(torchvision_paste(target, box_xyxy.tolist(), mask.shape, 0.5), mask))
    assert np.mean(ours) > np.mean(theirs)
    assert np.mean(ours) >= 0.95


@pytest.mark.parametrize("box_xyxy", BOXES_XYXY.values(), ids=BOXES_XYXY.keys())
def test_polygons_of_a_roi_mask_cover_the_pasted_mask(box_xyxy):
    polygons_xy = roi_mask_to_polygons(roi_disc(), np.array(box_xyxy), (96, 128))
    assert_valid(polygons_xy, (96, 128), max_vertices=40)
    pasted = rle_to_mask(roi_mask_to_rle(roi_disc(), np.array(box_xyxy), (96, 128)))
    assert iou(rle_to_mask(polygons_to_rle(polygons_xy, (96, 128))), pasted) >= 0.96


def test_a_box_larger_than_the_working_grid_gives_the_same_outline():
    box_xyxy, image_hw = np.array([100.0, 200.0, 1900.0, 1300.0]), (1500, 2000)
    polygons_xy = roi_mask_to_polygons(roi_disc(), box_xyxy, image_hw)
    assert_valid(polygons_xy, image_hw, max_vertices=40)
    pasted = rle_to_mask(roi_mask_to_rle(roi_disc(), box_xyxy, image_hw))
    assert iou(rle_to_mask(polygons_to_rle(polygons_xy, image_hw)), pasted) >= 0.98


@settings(max_examples=100, deadline=None)
@given(
    roi_mask=hnp.arrays(np.float32, (14, 14), elements=st.floats(0, 1, width=32)),
    corners=st.tuples(*[st.floats(-300, 400, width=32)] * 4),
)
def test_any_roi_mask_in_any_box_gives_valid_polygons_and_rle(roi_mask, corners):
    box_xyxy = np.array([*np.minimum(corners[:2], corners[2:]), *np.maximum(corners[:2], corners[2:])])
    assert_valid(roi_mask_to_polygons(roi_mask, box_xyxy, (60, 90)), (60, 90), max_vertices=40)
    rle = roi_mask_to_rle(roi_mask, box_xyxy, (60, 90))
    assert rle == mask_to_rle(rle_to_mask(rle))


@pytest.mark.parametrize("box_xyxy", [[10, 10, 40, 40], [500, 500, 600, 600]], ids=["below threshold", "outside"])
def test_nothing_to_outline_gives_an_empty_list_and_an_empty_rle(box_xyxy):
    roi_mask = np.full((28, 28), 0.2, dtype=np.float32)
    if box_xyxy[0] == 500:
        roi_mask += 0.7
    assert roi_mask_to_polygons(roi_mask, np.array(box_xyxy), (96, 128)) == []
    assert rle_area(roi_mask_to_rle(roi_mask, np.array(box_xyxy), (96, 128))) == 0


def test_a_box_without_width_counts_as_one_pixel():
    sure = np.ones((28, 28), dtype=np.float32)
    assert rle_area(roi_mask_to_rle(sure, np.array([10.0, 10.0, 10.0, 30.0]), (96, 128))) > 0


# Simple polygons

POLYGONS = {
    "triangle": ([[0, 0], [4, 0], [0, 4]], True),
    "square": ([[0, 0], [4, 0], [4, 4], [0, 4]], True),
    "square with a point on a side": ([[0, 0], [2, 0], [4, 0], [4, 4], [0, 4]], True),
    "concave": ([[0, 0], [4, 0], [1, 1], [0, 4]], True),
    "two points": ([[0, 0], [4, 0]], False),
    "flat triangle": ([[0, 0], [4, 0], [2, 0]], False),
    "bow tie": ([[0, 0], [4, 4], [4, 0], [0, 4]], False),
    "repeated point": ([[0, 0], [4, 0], [4, 0], [0, 4]], False),
    "closed by its first point": ([[0, 0], [4, 0], [0, 4], [0, 0]], False),
    "vertex on an edge": ([[0, 0], [4, 0], [4, 4], [2, 0], [0, 4]], False),
    "spike": ([[0, 0], [4, 0], [8, 0], [4, 0], [4, 4]], False),
    "the same vertex twice": ([[0, 0], [2, 2], [4, 0], [4, 4], [2, 2], [0, 4]], False),
    "not finite": ([[0, 0], [4, 0], [np.nan, 4]], False),
}


@pytest.mark.parametrize(("points", "simple"), POLYGONS.values(), ids=POLYGONS.keys())
def test_simple_polygons_are_told_from_the_rest(points, simple):
    assert is_simple_polygon(np.array(points, dtype=np.float32)) is simple
    assert is_simple_polygon(np.array(points[::-1], dtype=np.float64)) is simple


def test_a_crossing_is_found_in_a_long_ring():
    angles = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 100
    assert is_simple_polygon(ring)
    ring[[1500, 1501]] = ring[[1501, 1500]]
    assert not is_simple_polygon(ring)


# Errors

ROI, BOX = np.zeros((28, 28), dtype=np.float32), np.array([0.0, 0.0, 9.0, 9.0])
BAD_CALLS = {
    "mask of another type": (lambda: mask_to_rle(np.zeros((4, 4), dtype=np.uint8)), "bool array.*got uint8"),
    "mask with channels": (
        lambda: mask_to_polygons(np.zeros((4, 4, 1), dtype=bool)),
        r"\(H, W\), got bool \(4, 4, 1\)",
    ),
    "mask that is a list": (lambda: mask_to_rle([[True]]), "got list"),
    "mask without pixels": (lambda: mask_to_rle(np.zeros((0, 4), dtype=bool)), r"got bool \(0, 4\)"),
    "budget below a triangle": (lambda: mask_to_polygons(disc(3), max_vertices=2), "at least 3.*got 2"),
    "no tolerance": (lambda: mask_to_polygons(disc(3), tolerance_px=0), "more than 0, got 0"),
    "polygon of two points": (lambda: polygons_to_rle([np.zeros((2, 2))], (4, 4)), r"polygon 0: .*got shape \(2, 2\)"),
    "polygon of triplets": (lambda: polygons_to_rle([np.zeros((4, 3))], (4, 4)), r"got shape \(4, 3\)"),
    "polygon with NaN": (lambda: polygons_to_rle([np.full((4, 2), np.nan)], (4, 4)), "finite"),
    "image without height": (lambda: polygons_to_rle([], (0, 4)), r"image_hw: .*got \(0, 4\)"),
    "ring of triplets": (lambda: is_simple_polygon(np.zeros((4, 3))), r"\(V, 2\), got \(4, 3\)"),
    "RLE that is not compressed": (lambda: rle_area({"size": [2, 2], "counts": [1, 3]}), "text, got list"),
    "RLE without a size": (lambda: rle_to_box_xyxy({"counts": "01"}), "size of"),
    "RLE that does not fill its size": (lambda: rle_to_mask({"size": [9, 9], "counts": "11"}), "fill 9 x 9.*runs of 2"),
    "RLE with a run below zero": (lambda: rle_to_mask({"size": [1, 1], "counts": "1O1"}), "fill 1 x 1"),
    "RLE that is cut off": (lambda: rle_to_mask({"size": [9, 9], "counts": "1Q"}), "a part of it"),
    "RLE of other characters": (lambda: rle_to_mask({"size": [9, 9], "counts": "é"}), "compressed text"),
    "RoI mask that is not square": (lambda: roi_mask_to_rle(ROI[:9], BOX, (9, 9)), r"got float32 \(9, 28\)"),
    "RoI mask of integers": (lambda: roi_mask_to_polygons(ROI.astype(int), BOX, (9, 9)), "float probabilities"),
    "box of three numbers": (lambda: roi_mask_to_rle(ROI, BOX[:3], (9, 9)), "box_xyxy: expected 4"),
    "box with infinity": (lambda: roi_mask_to_rle(ROI, np.full(4, np.inf), (9, 9)), "finite"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_input_is_refused_with_what_was_expected_and_what_came(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()


def test_rle_is_that_of_pycocotools():
    mask = blob(3)
    assert mask_to_rle(mask)["counts"].encode() == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
