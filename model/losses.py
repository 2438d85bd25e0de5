"""Eq. 1, 4 and 5: the losses of Mask R-CNN with two IoU branches, on annotated and on pseudo-labelled images.

`weights` (n, 3) say what each anchor or RoI of pseudo-labelled images counts in the classification, box and mask terms
(`model.pseudo_weights`): by eq. 4 (p*, 1, 1), so that an object nobody labelled is never pushed to the background; in
eq. 1 all count alike, None. The IoU branches learn from annotated images alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

SEMI = "semi_"  # prefix of the losses that come from pseudo-labelled images
_IOU_LOSSES = ("loss_box_iou", "loss_mask_iou")
_MASK_RCNN = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
_PSEUDO_OUTLINES = (SEMI + "loss_rpn_box_reg", SEMI + "loss_box_reg", SEMI + "loss_mask")
# All losses there may be; "loss_ranking" is that of `model.loss_prediction`.
NAMES = (*_MASK_RCNN, *_IOU_LOSSES, "loss_ranking", *(SEMI + name for name in _MASK_RCNN))


class Mean(NamedTuple):
    """A loss that is the mean over so many `samples`: anchors, RoIs or, for masks and IoUs, positive RoIs."""

    value: Tensor
    samples: int


def total_loss(losses: Mapping[str, Tensor], *, beta: float, iou_weight: float, pseudo_outlines: bool = True) -> Tensor:
    """Eq. 5, `L = L_sup + beta * L_semi`; inside L_sup the two IoU losses carry lambda (`iou_weight`, eq. 1).

    Without `pseudo_outlines`, beyond the paper, L_semi has no box and mask terms.
    """
    terms = []
    for name, loss in losses.items():
        if name in _PSEUDO_OUTLINES and not pseudo_outlines:
            continue
        weight = beta if name.startswith(SEMI) else iou_weight if name in _IOU_LOSSES else 1.0
        terms.append(weight * loss)
    return torch.stack(terms).sum()


def rpn_losses(
    objectness: Tensor,
    deltas: Tensor,
    *,
    labels: Tensor,
    delta_targets: Tensor,
    sampled: Tensor,
    weights: Tensor | None,
) -> dict[str, Tensor]:
    """Objectness and box losses over the A anchors of a batch.

    objectness (A,) logits; deltas, delta_targets (A, 4); labels (A,) 1 object, 0 background; sampled (n,) indices;
    weights (n, 3) of those.
    """
    logits, labels_sampled = objectness[sampled], labels[sampled]
    entropy = F.binary_cross_entropy_with_logits(logits, labels_sampled, reduction="none")
    is_positive = labels_sampled == 1
    positive = sampled[is_positive]
    return {
        "loss_objectness": _mean(entropy, _column(weights, 0), count=len(sampled)),
        "loss_rpn_box_reg": _mean(
            F.smooth_l1_loss(deltas[positive], delta_targets[positive], beta=1 / 9, reduction="none"),
            _column(weights, 1, is_positive),
            count=len(sampled),
        ),
    }


def box_head_losses(
    class_logits: Tensor,
    box_deltas: Tensor,
    *,
    labels: Tensor,
    delta_targets: Tensor,
    weights: Tensor | None,
    sampled_count: int,
) -> dict[str, Tensor]:
    """Class and box losses over R RoIs: class_logits (R, C), box_deltas (R, 4C), labels (R,), delta_targets (R, 4),
    weights (R, 3). `sampled_count`: R and those that were left out because they weigh nothing."""
    entropy = F.cross_entropy(class_logits, labels, reduction="none")
    positive = torch.nonzero(labels > 0).squeeze(1)
    deltas = box_deltas.reshape(len(labels), box_deltas.shape[1] // 4, 4)[positive, labels[positive]]  # -1 fails at R=0
    return {
        "loss_classifier": _mean(entropy, _column(weights, 0), count=sampled_count),
        "loss_box_reg": _mean(
            F.smooth_l1_loss(deltas, delta_targets[positive], beta=1 / 9, reduction="none"),
            _column(weights, 1, positive),
            count=sampled_count,
        ),
    }


def mask_loss(mask_logits: Tensor, coverage: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Binary cross entropy of P positive RoIs: logits of the true class and ground-truth coverage, both (P, M, M);
    weights (P, 3)."""
    entropy = F.binary_cross_entropy_with_logits(mask_logits, coverage, reduction="none")
    return _mean(entropy, _column(weights, 2), count=entropy.numel())


def iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """The l2 loss of both IoU branches (eq. 1), the mean over P positives; zero, with a gradient, for P = 0."""
    if predicted.numel() == 0:
        return predicted.sum()
    return F.mse_loss(predicted, target)


def box_iou_targets(predicted_xyxy: Tensor, matched_xyxy: Tensor) -> Tensor:
    """What the box IoU branch should say: IoU of each predicted box with its ground truth, (P, 4), (P, 4) -> (P,)."""
    pairwise: Tensor = box_iou(predicted_xyxy, matched_xyxy)
    return pairwise.diagonal()


def mask_coverage(
    gt_masks: Sequence[Tensor], matched: Sequence[Tensor], boxes_xyxy: Sequence[Tensor], size: int
) -> Tensor:
    """The share of each cell of each RoI that the matched ground-truth mask covers, (P, size, size) in [0, 1]; exact.

    For each image: gt_masks (G, H, W) 0/1, matched (P_i,) indices into them, boxes_xyxy (P_i, 4). What lies outside
    the image is not covered.
    """
    areas = [
        _covered_areas(_AreaTables.of(masks), index, boxes.double(), size)
        for masks, index, boxes in zip(gt_masks, matched, boxes_xyxy, strict=True)
    ]
    boxes = torch.cat(list(boxes_xyxy))
    cell_areas = (boxes[:, 2:] - boxes[:, :2]).double().prod(dim=1) / size**2
    return (torch.cat(areas) / cell_areas.clamp(min=1e-9)[:, None, None]).clamp(0, 1).to(boxes.dtype)


def mask_iou_targets(
    mask_logits: Tensor, coverage: Tensor, *, boxes_xyxy: Tensor, gt_areas: Tensor, mask_threshold: float
) -> Tensor:
    """What the mask IoU branch should say: IoU of the binarised mask with the *whole* ground-truth mask, (P,).

    mask_logits, coverage (P, M, M) of the RoIs; boxes_xyxy (P, 4); gt_areas (P,) in pixels of the whole masks, so that
    ground truth outside the RoI counts in the union.
    """
    cells = mask_logits.shape[1] * mask_logits.shape[2]
    cell_areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1) / cells
    predicted = mask_logits.sigmoid() > mask_threshold
    predicted_areas = predicted.sum(dim=(1, 2)) * cell_areas
    intersections = (predicted * coverage).sum(dim=(1, 2)) * cell_areas
    unions = predicted_areas + gt_areas - intersections
    return (intersections / unions.clamp(min=1e-6)).clamp(0, 1)


def _column(weights: Tensor | None, term: int, chosen: Tensor | None = None) -> Tensor | None:
    """The weights of one of the three terms, of all or some rows."""
    if weights is None:
        return None
    return weights[:, term] if chosen is None else weights[chosen, term]


def _mean(losses: Tensor, weights: Tensor | None, *, count: int) -> Tensor:
    """`1/count sum_i w_i L_i` over losses (n, ...), weights (n,); zero, with a gradient, for n = 0.

    The count is the same N_cls, N_box and N_mask in eq. 1 and in eq. 4: all that were sampled, whatever they weigh.
    """
    if weights is not None:
        losses = losses * weights.reshape(-1, *[1] * (losses.ndim - 1))
    return losses.sum() / max(count, 1)


class _AreaTables(NamedTuple):
    """Summed-area tables of G masks: entry (y, x) counts the pixels above and left of a pixel's corner.

    Each table covers the extent of its mask alone, which is what makes them cheap. They lie behind each other in
    `entries`, int32, which is exact; `first` (G,) says where each starts, `origin_yx` and `size_yx` (G, 2) which pixels
    it is of.
    """

    entries: Tensor
    first: Tensor
    origin_yx: Tensor
    size_yx: Tensor

    @classmethod
    def of(cls, masks: Tensor) -> "_AreaTables":
        """The tables of masks (G, H, W) 0/1."""
        tables, windows = [], []
        for mask, in_row, in_column in zip(masks, masks.any(dim=2), masks.any(dim=1), strict=True):
            (y0, y1), (x0, x1) = _extent(in_row), _extent(in_column)
            counts = mask[y0:y1, x0:x1].cumsum(dim=1, dtype=torch.int32).cumsum(dim=0, dtype=torch.int32)
            tables.append(F.pad(counts, (1, 0, 1, 0)).flatten())
            windows.append((y0, x0, y1 - y0, x1 - x0))
        window = torch.tensor(windows, dtype=torch.int64, device=masks.device).reshape(-1, 4)
        lengths = (window[:, 2] + 1) * (window[:, 3] + 1)
        entries = torch.cat(tables) if tables else masks.new_zeros(0, dtype=torch.int32)
        return cls(entries, lengths.cumsum(0) - lengths, window[:, :2], window[:, 2:])


def _extent(occupied: Tensor) -> tuple[int, int]:
    """The first and one past the last index that is set, in (n,); a single index when none is."""
    indices = occupied.nonzero()
    return (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 1)


def _covered_areas(tables: _AreaTables, matched: Tensor, boxes_xyxy: Tensor, size: int) -> Tensor:
    """The area in pixels that masks cover of each of size x size cells of boxes (P, 4) float64, (P, size, size).

    The area above and left of a point is bilinear inside a pixel, so that the tables interpolated at the corners of the
    cells, and differences of these, are exact. In float64: a cell is the difference of numbers in the millions.
    """
    steps = torch.linspace(0, 1, size + 1, dtype=boxes_xyxy.dtype, device=boxes_xyxy.device)
    corners_xy = boxes_xyxy[:, :2, None] + (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2])[:, :, None] * steps
    size_yx = tables.size_yx[matched][:, :, None]
    position = (corners_xy.flip(1) - tables.origin_yx[matched][:, :, None]).clamp(min=0).minimum(size_yx)
    pixel = position.long().minimum(size_yx - 1)
    low_share, right_share = (position - pixel)[:, 0, :, None], (position - pixel)[:, 1, None, :]

    row = size_yx[:, 1, :, None] + 1  # the length of a table's row
    upper_left = tables.first[matched][:, None, None] + pixel[:, 0, :, None] * row + pixel[:, 1, None, :]
    upper, lower = (
        torch.lerp(tables.entries[corner].double(), tables.entries[corner + 1].double(), right_share)
        for corner in (upper_left, upper_left + row)
    )
    return torch.lerp(upper, lower, low_share).diff(dim=1).diff(dim=2)
