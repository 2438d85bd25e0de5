"""What the IoU branches are taught, against pixels that are counted one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.losses import box_iou_targets, iou_loss, mask_coverage, mask_iou_targets
from tests.model.examples import HW, ellipse, image, rectangle, target, tiny_network

CELLS = 28  # a side of a RoI mask


def boxes(side):
    """Integer boxes inside a square image."""
    starts_and_ends = st.tuples(st.integers(0, side - 1), st.integers(1, side)).filter(lambda pair: pair[0] < pair[1])
    return st.tuples(starts_and_ends, starts_and_ends).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))


# --- box IoU


@given(boxes(24), boxes(24))
def test_box_target_equals_the_iou_of_the_pixels_of_both_boxes(predicted, truth):
    first, second = rectangle(*predicted, hw=(24, 24)), rectangle(*truth, hw=(24, 24))
    counted = (first & second).sum() / (first | second).sum()
    result = box_iou_targets(torch.tensor([predicted]).float(), torch.tensor([truth]).float())
    assert result.item() == pytest.approx(counted, abs=1e-6)


def test_box_target_compares_each_box_with_its_own_ground_truth_only():
    predicted = torch.tensor([[0.5, 0, 2.5, 4], [10, 10, 20, 20]])
    truth = torch.tensor([[1.5, 0, 3.5, 4], [10, 10, 20, 15]])
    # 1 x 4 of 8 + 8 - 4 = 12; 50 of 100
    assert box_iou_targets(predicted, truth).tolist() == pytest.approx([1 / 3, 1 / 2])


# --- mask coverage and mask IoU


def counted_mask_iou(roi_mask, box_xyxy, truth, *, subpixels=1):
    """Paste a binary RoI mask by nearest cell into the full image and count (sub)pixels against the whole truth."""
    x0, y0, x1, y1 = box_xyxy
    height, width = truth.shape
    y, x = ((np.arange(n * subpixels) + 0.5) / subpixels for n in (height, width))
    rows, columns = (np.floor((c - low) / (high - low) * CELLS) for c, low, high in ((y, y0, y1), (x, x0, x1)))
    inside = np.outer((rows >= 0) & (rows < CELLS), (columns >= 0) & (columns < CELLS))
    cells = [np.clip(index, 0, CELLS - 1).astype(int) for index in (rows, columns)]
    pasted = roi_mask[np.ix_(*cells)] & inside
    full = truth.repeat(subpixels, axis=0).repeat(subpixels, axis=1)
    return (pasted & full).sum() / (pasted | full).sum()


def counted_coverage(mask, box_xyxy, size):
    """Sum over all pixels of their overlap with each cell, by the cell's area."""
    y, x = (np.linspace(low, high, size + 1) for low, high in (box_xyxy[1::2], box_xyxy[::2]))
    rows, columns = (
        np.clip(np.minimum(c[1:, None], np.arange(n) + 1) - np.maximum(c[:-1, None], np.arange(n)), 0, None)
        for c, n in ((y, mask.shape[0]), (x, mask.shape[1]))
    )
    return rows @ mask @ columns.T / ((y[1] - y[0]) * (x[1] - x[0]))


def coverage_of(mask, box_xyxy, size=CELLS):
    box = torch.tensor([box_xyxy], dtype=torch.float32)
    masks = torch.from_numpy(mask[None].astype(np.uint8))
    return mask_coverage([masks], [torch.tensor([0])], [box], size)[0].numpy()


def our_mask_iou(logits, box_xyxy, truth, mask_threshold=0.3):
    box = torch.tensor([box_xyxy], dtype=torch.float32)
    coverage = mask_coverage([torch.from_numpy(truth[None].astype(np.uint8))], [torch.tensor([0])], [box], CELLS)
    return mask_iou_targets(
        torch.from_numpy(logits[None].astype(np.float32)),
        coverage,
        boxes_xyxy=box,
        gt_areas=torch.tensor([truth.sum()]),
        mask_threshold=mask_threshold,
    ).item()


def random_shape(rng, hw):
    """A union of up to three ellipses, at least 12 pixels in each direction."""
    mask = np.zeros(hw, dtype=bool)
    for _ in range(rng.integers(1, 4)):
        x0, y0 = rng.integers(0, hw[1] - 20), rng.integers(0, hw[0] - 20)
        width, height = rng.integers(12, hw[1] - x0 + 1), rng.integers(12, hw[0] - y0 + 1)
        mask |= ellipse(x0, y0, x0 + width, y0 + height, hw=hw)
    return mask


def smooth_logits(rng):
    """A blob that fills a part of the RoI."""
    y, x = (np.mgrid[:CELLS, :CELLS] + 0.5) / CELLS
    centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.2, 0.6)
    return 20 * (radius - np.hypot(x - centre[0], y - centre[1]))


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_coverage_is_the_overlap_of_all_pixels_with_each_cell(seed):
    """RoIs of a fiftieth of a pixel to twice the image, anywhere, also where they leave the image."""
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 20, 31)) < rng.uniform(0.05, 0.95)
    masks[:, : rng.integers(0, 15)] = False
    centre, half = rng.uniform(-5, 35, (4, 2)), np.exp(rng.uniform(np.log(0.02), np.log(30), (4, 2)))
    boxes = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    matched = rng.integers(0, 3, 4)
    ours = mask_coverage(
        [torch.from_numpy(masks.astype(np.uint8))], [torch.from_numpy(matched)], [torch.from_numpy(boxes)], 7
    )
    counted = [counted_coverage(masks[i], box.astype(np.float64), 7) for i, box in zip(matched, boxes, strict=True)]
    np.testing.assert_allclose(ours, counted, atol=1e-6)


def test_coverage_stays_exact_for_small_rois_at_the_far_end_of_a_large_image():
    mask = np.ones((1333, 1333), dtype=np.bool_)
    mask[1300:1303, 1290:1297] = False
    box = (1288.3, 1299.1, 1299.7, 1306.4)
    counted = counted_coverage(mask, np.array(box, dtype=np.float32).astype(np.float64), CELLS)
    np.testing.assert_allclose(coverage_of(mask, box), counted, atol=1e-6)


def test_nothing_covers_a_cell_of_an_empty_mask_and_no_roi_gives_no_coverage():
    assert not coverage_of(np.zeros((9, 9), dtype=np.bool_), (1, 1, 5, 5)).any()
    no_roi = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    for masks in (torch.zeros(0, 9, 9, dtype=torch.uint8), torch.ones(2, 9, 9, dtype=torch.uint8)):
        assert mask_coverage([masks], [no_roi[0]], [no_roi[1]], CELLS).shape == (0, CELLS, CELLS)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([28, 56, 84]),
    st.sampled_from([28, 56, 84]),
    st.booleans(),
)
def test_mask_target_is_exact_where_cells_are_whole_pixels(seed, height, width, smooth):
    """RoIs of 28, 56 or 84 pixels at whole pixels: each cell is 1, 4 or 9 of them. Tolerance: rounding only."""
    rng = np.random.default_rng(seed)
    truth = random_shape(rng, (96, 120))
    x0, y0 = rng.integers(0, 120 - width + 1), rng.integers(0, 96 - height + 1)
    box = (x0, y0, x0 + width, y0 + height)
    logits = smooth_logits(rng) if smooth else rng.normal(size=(CELLS, CELLS))
    counted = counted_mask_iou(1 / (1 + np.exp(-logits)) > 0.3, box, truth)
    assert our_mask_iou(logits, box, truth) == pytest.approx(counted, abs=1e-5)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_mask_target_of_any_roi_is_that_of_counted_subpixels(seed):
    """RoIs of 10 to 90 pixels anywhere. Tolerance: the test counts in eighths of a pixel."""
    rng = np.random.default_rng(seed)
    truth = random_shape(rng, (96, 120))
    width, height = rng.uniform(10, 90, 2)
    x0, y0 = rng.uniform(0, 120 - width), rng.uniform(0, 96 - height)
    box = (x0, y0, x0 + width, y0 + height)
    logits = smooth_logits(rng)
    counted = counted_mask_iou(1 / (1 + np.exp(-logits)) > 0.3, box, truth, subpixels=8)
    assert our_mask_iou(logits, box, truth) == pytest.approx(counted, abs=0.005)


@pytest.mark.parametrize("sides", [(7, 10), (10, 21), (21, 100)], ids=["7 to 9 px", "10 to 20 px", "21 to 99 px"])
def test_a_perfect_mask_is_taught_as_nearly_perfect_even_for_small_objects(sides):
    """Discs in their tight boxes. What is missing to 1: a cell on the edge is predicted as a whole, covered in part."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        (width, height), (x0, y0) = rng.integers(*sides, 2), rng.integers(0, 20, 2)
        box = (x0, y0, x0 + width, y0 + height)
        truth = ellipse(*box, hw=(120, 120))
        covered = coverage_of(truth, box)
        assert our_mask_iou(np.where(covered >= 0.5, 9.0, -9.0), box, truth) > 0.95


def test_a_perfect_mask_of_a_box_shaped_object_is_taught_as_perfect():
    box = (5, 9, 12, 29)
    assert our_mask_iou(np.full((CELLS, CELLS), 9.0), box, rectangle(*box)) == pytest.approx(1)


def test_ground_truth_outside_the_roi_counts_in_the_union():
    truth = rectangle(0, 0, 56, 28)
    # the mask fills the left half of the truth: 28 * 28 of 56 * 28
    assert our_mask_iou(np.full((CELLS, CELLS), 9.0), (0, 0, 28, 28), truth) == pytest.approx(0.5)


def test_prediction_outside_the_ground_truth_counts_in_the_union():
    assert our_mask_iou(np.full((CELLS, CELLS), 9.0), (0, 0, 56, 56), rectangle(0, 0, 14, 56)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("probability", "threshold", "expected"),
    [(0.31, 0.3, 1.0), (0.29, 0.3, 0.0), (0.49, 0.5, 0.0), (0.51, 0.5, 1.0)],
)
def test_the_mask_is_binarised_at_the_threshold(probability, threshold, expected):
    logits = np.full((CELLS, CELLS), np.log(probability / (1 - probability)))
    truth = rectangle(4, 4, 32, 32)
    assert our_mask_iou(logits, (4, 4, 32, 32), truth, mask_threshold=threshold) == pytest.approx(expected)


def test_instances_of_several_images_keep_to_their_own_masks():
    first, second = rectangle(0, 0, 28, 28), rectangle(28, 28, 56, 56)
    box = torch.tensor([[0.0, 0, 28, 28]])
    coverage = mask_coverage(
        [torch.from_numpy(np.stack([first, second]).astype(np.uint8)), torch.from_numpy(second[None].astype(np.uint8))],
        [torch.tensor([1, 0]), torch.tensor([0])],
        [box.repeat(2, 1), box + 28],
        CELLS,
    )
    assert coverage.mean(dim=(1, 2)).tolist() == [0.0, 1.0, 1.0]


# --- in the network: RoIs that are known, heads that always say the same, branches that always say 0.5

TRUTH = rectangle(0, 0, 56, 56)
ROI = [8.0, 0.0, 64.0, 56.0]  # 48 columns in common, 64 together: IoU 0.75
EVERYTHING, NOTHING = 9.0, -9.0  # mask logits


def network_that_says(*, box_deltas=None, mask_logits=None, **options):
    """A network whose heads give the same for every RoI: box deltas and a mask logit by class (0 if unsaid)."""
    network = tiny_network(**options)
    heads = network.roi_heads
    constant = [
        heads.box_predictor.bbox_pred,
        heads.mask_predictor.mask_fcn_logits,
        heads.box_iou_branch[-3],
        heads.mask_iou_branch[-3],
    ]
    with torch.no_grad():
        for layer in constant:
            layer.weight.zero_()
            layer.bias.zero_()
        for label, deltas in (box_deltas or {}).items():
            heads.box_predictor.bbox_pred.bias[4 * label : 4 * label + 4] = torch.tensor(deltas)
        for label, logit in (mask_logits or {}).items():
            heads.mask_predictor.mask_fcn_logits.bias[label] = logit
    return network


def branch_losses(network, label):
    """The losses of both branches on one image whose RoIs are ROI and, appended in training, the true box."""
    features = network.backbone(image()[None])
    result = network.roi_heads.losses(features, [torch.tensor([ROI])], [HW], [target((label, TRUTH))], pseudo=False)
    return result["loss_box_iou"].value.item(), result["loss_mask_iou"].value.item()


def loss_of_half(*targets):
    return iou_loss(torch.full((len(targets),), 0.5), torch.tensor(targets)).item()


def test_the_box_target_without_regression_is_the_iou_of_the_roi_itself():
    box_loss, _ = branch_losses(network_that_says(), label=1)
    assert box_loss == pytest.approx(loss_of_half(0.75, 1.0), abs=1e-6)  # ROI and the true box


@pytest.mark.parametrize("label", [1, 2])
def test_the_box_target_uses_the_box_decoded_for_the_class_of_the_ground_truth(label):
    # 5 log(0.75), because torchvision weighs width deltas by 5: this class's boxes shrink to 42 of 56 columns about
    # their centre; the other class and the background would move them far away.
    # ROI: columns 15 to 57, 41 in common with the truth, 57 together. True box: columns 7 to 49, 42 of 56
    shrink, away = [0.0, 0.0, 5 * np.log(0.75), 0.0], [50.0, 0.0, 0.0, 0.0]
    network = network_that_says(box_deltas={0: away, label: shrink, 3 - label: away})
    box_loss, _ = branch_losses(network, label)
    assert box_loss == pytest.approx(loss_of_half(41 / 57, 42 / 56), abs=1e-6)


@pytest.mark.parametrize("label", [1, 2])
def test_the_mask_target_uses_the_mask_of_the_class_of_the_ground_truth_and_the_whole_truth(label):
    says = {0: NOTHING, label: EVERYTHING, 3 - label: NOTHING}
    _, mask_loss = branch_losses(network_that_says(mask_logits=says), label)
    assert mask_loss == pytest.approx(loss_of_half(0.75, 1.0), abs=1e-5)
    _, mask_loss = branch_losses(network_that_says(mask_logits={k: -v for k, v in says.items()}), label)
    assert mask_loss == pytest.approx(loss_of_half(0.0, 0.0), abs=1e-6)


@pytest.mark.parametrize(
    ("threshold", "targets"), [(0.3, (0.75, 1.0)), (0.5, (0.0, 0.0))], ids=["default 0.3", "other 0.5"]
)
def test_the_mask_target_is_binarised_at_the_threshold_of_the_network(threshold, targets):
    logit = np.log(0.4 / 0.6)  # probability 0.4
    network = network_that_says(mask_logits={1: logit}, mask_threshold=threshold)
    assert network_that_says().config.mask_threshold == 0.3
    _, mask_loss = branch_losses(network, label=1)
    assert mask_loss == pytest.approx(loss_of_half(*targets), abs=1e-5)


def test_targets_are_not_differentiated():
    network = network_that_says()
    features = network.backbone(image()[None])
    result = network.roi_heads.losses(features, [torch.tensor([ROI])], [HW], [target((1, TRUTH))], pseudo=False)
    (result["loss_box_iou"].value + result["loss_mask_iou"].value).backward()
    assert network.roi_heads.box_predictor.bbox_pred.bias.grad is None
    assert network.roi_heads.mask_predictor.mask_fcn_logits.bias.grad is None
