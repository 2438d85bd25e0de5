"""Binary masks, polygons, run-length encodings (RLE) and boxes of instances, and the ways from one to another.

Coordinates are pixel corners: pixel (row i, column j) covers [j, j + 1] x [i, i + 1], so an image of width W reaches
from x = 0 to x = W. pycocotools fills polygons in this frame and Label Studio's percents are fractions of it.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.errors import InvalidInputError
from model.types import BoolArray, FloatArray, IntArray, Rle

Point = tuple[int, int]

# Samples for each cell of a RoI mask beyond which a bilinear resize shows no more detail, only more pixels.
SAMPLES_PER_ROI_CELL = 4
# With more multiplications numpy's OpenBLAS wakes a thread for each core, which costs ten times what it saves.
_ONE_THREAD_PRODUCTS = 1 << 18
TOLERANCE_GROWTH = 1.25
# Douglas-Peucker hands over at most this many vertices for each one that may stay.
CULLED_PER_VERTEX = 1.25
# A larger tolerance than this share of its thickness would eat up a thin mask.
MAX_TOLERANCE_BY_THICKNESS = 0.15
# pycocotools keeps each step along the edges of a polygon, outside of the image, too: at most so far from it.
FARTHEST_PX = 1_000_000
# All pairs of edges are compared, this many rows of the table at a time to bound the memory.
EDGES_PER_BLOCK = 256


def mask_to_rle(mask: BoolArray) -> Rle:
    """Encode a mask (H, W) bool as compressed RLE of the same size."""
    _check_mask(mask)
    return _encode(np.asfortranarray(mask).view(np.uint8))


def rle_to_mask(rle: Rle) -> BoolArray:
    """Decode to (H, W) bool. Raises InvalidInputError if the counts do not fill `size`.

    Not by pycocotools, whose `decode` warns on every call with numpy 2 and trusts the counts.
    """
    runs = _run_lengths(rle)
    pixels: BoolArray = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    height, width = rle["size"]
    return pixels.reshape(width, height).T


def rle_area(rle: Rle) -> int:
    """Number of pixels in the mask."""
    return int(_run_lengths(rle)[1::2].sum())


def rle_to_box_xyxy(rle: Rle) -> FloatArray:
    """The tightest box (4,) float32 around the mask, in pixel corners (x1 = x0 + width); all 0 for an empty mask."""
    _check_rle(rle)
    x, y, width, height = coco_mask.toBbox(rle)
    return np.array([x, y, x + width, y + height], dtype=np.float32)


def polygons_to_rle(polygons_xy: Sequence[FloatArray], image_hw: tuple[int, int]) -> Rle:
    """Fill the union of polygons, each (V >= 3, 2) in pixels; what lies outside the image is cut off."""
    height, width = _checked_image_hw(image_hw)
    if not polygons_xy:
        return _encode(np.zeros((height, width), dtype=np.uint8, order="F"))
    for index, polygon_xy in enumerate(polygons_xy):
        points = np.asarray(polygon_xy)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3 or not np.isfinite(points).all():
            raise InvalidInputError(
                f"polygon {index}: expected at least 3 finite points, shape (V, 2), got shape {points.shape}"
            )
        if np.abs(points).max() > FARTHEST_PX + max(height, width):
            raise InvalidInputError(
                f"polygon {index}: expected points within {FARTHEST_PX} pixels of the image, "
                f"got {points.min():.3g} to {points.max():.3g}"
            )
    flat = [np.asarray(polygon_xy, dtype=np.float64).ravel().tolist() for polygon_xy in polygons_xy]
    merged = coco_mask.merge(coco_mask.frPyObjects(flat, height, width))
    return Rle(size=[height, width], counts=merged["counts"].decode("ascii"))


def mask_to_polygons(
    mask: BoolArray, *, max_vertices: int = 40, tolerance_px: float = 0.45, min_area_px: float = 0.0
) -> list[FloatArray]:
    """Outline every connected part of a mask (H, W) bool, largest first: list of (V, 2) float32 in pixels.

    Each ring has at least 3 points and a positive area, never touches or crosses itself, is closed implicitly and lies
    inside the image. A ring has no holes: those of the mask get filled. Pixels that meet at a corner are connected.
    `max_vertices` is the budget of the whole instance, because that is what a person has to edit. Rings deviate from
    the outline by about `tolerance_px` (less in thin masks); where that needs too many vertices, what matters least
    for the area goes, the smallest parts included. Parts below `min_area_px` are left out, but never the largest.
    An empty mask gives an empty list.
    """
    _check_mask(mask)
    _check_budget(max_vertices, tolerance_px)
    rings, origin_xy = _outer_rings(mask)
    rings.sort(key=_area, reverse=True)
    kept = rings[:1] + [ring for ring in rings[1:] if _area(ring) >= 4 * min_area_px]
    simplified = _simplify_to_budget(kept, max_vertices, 2 * tolerance_px)
    return [(ring / 2 + origin_xy).astype(np.float32) for ring in simplified]


def roi_mask_to_polygons(
    roi_mask: FloatArray,
    box_xyxy: FloatArray,
    image_hw: tuple[int, int],
    *,
    mask_threshold: float = 0.3,
    max_vertices: int = 40,
    tolerance_px: float = 0.45,
    min_area_px: float = 0.0,
) -> list[FloatArray]:
    """Outline a predicted mask without pasting it into the image; rings as in `mask_to_polygons`, in image pixels.

    `roi_mask` (M, M) probabilities inside `box_xyxy` (4,) pixels. Pixels above the threshold and inside the image
    count; none gives an empty list. The work is done on a grid over the box of at most SAMPLES_PER_ROI_CELL * M
    cells a side, so its cost does not grow with the image; in larger boxes `tolerance_px` and `min_area_px` count
    cells of this grid instead of pixels.
    """
    box, window_xyxy = _checked_roi(roi_mask, box_xyxy, image_hw)
    limit = SAMPLES_PER_ROI_CELL * len(roi_mask)
    x_px, x_step = _sample_centres(window_xyxy[0], window_xyxy[2], limit)
    y_px, y_step = _sample_centres(window_xyxy[1], window_xyxy[3], limit)
    if not len(x_px) or not len(y_px):
        return []
    mask = _resample_roi(roi_mask, box, x_px, y_px) > mask_threshold
    rings = mask_to_polygons(mask, max_vertices=max_vertices, tolerance_px=tolerance_px, min_area_px=min_area_px)
    step_xy = np.array([x_step, y_step])
    polygons_xy = [ring * step_xy + window_xyxy[:2] for ring in rings]
    return [np.clip(points, window_xyxy[:2], window_xyxy[2:]).astype(np.float32) for points in polygons_xy]


def roi_mask_to_rle(
    roi_mask: FloatArray, box_xyxy: FloatArray, image_hw: tuple[int, int], *, mask_threshold: float = 0.3
) -> Rle:
    """Paste a predicted mask (M, M) of a box into an image of `image_hw`; pixels above the threshold are set.

    Near torchvision's `paste_masks_in_image`, but without its rounding of the box to whole pixels: that shifts masks
    by up to a pixel, which costs small instances a tenth of their IoU.
    """
    box, (x0, y0, x1, y1) = _checked_roi(roi_mask, box_xyxy, image_hw)
    mask = _resample_roi(roi_mask, box, np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5) > mask_threshold
    return _encode_window(mask, (x0, y0), image_hw)


def is_simple_polygon(points_xy: FloatArray | IntArray) -> bool:
    """Whether a closed ring (V, 2) has at least 3 points and no two edges that cross, touch or fold back."""
    points = np.asarray(points_xy, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise InvalidInputError(f"points: expected shape (V, 2), got {points.shape}")
    return len(points) >= 3 and bool(np.isfinite(points).all()) and not len(_meeting_edges(points))


def _encode(pixels: NDArray[np.uint8]) -> Rle:
    """RLE of a 0/1 array (H, W) in Fortran order."""
    encoded: dict[str, Any] = coco_mask.encode(pixels)
    return Rle(size=[int(side) for side in encoded["size"]], counts=encoded["counts"].decode("ascii"))


def _run_lengths(rle: Rle) -> NDArray[np.int64]:
    """Lengths of the runs of 0, 1, 0, ... down the columns, which fill the mask.

    As COCO writes them: each number in groups of 5 bits, the lowest first and one character each, with bit 5 set if
    more follow and bit 4 of the last one as the sign; from the fourth number on as the difference to the last but one.
    """
    _check_rle(rle)
    height, width = rle["size"]
    groups = np.frombuffer(rle["counts"].encode(), dtype=np.uint8).astype(np.int64) - ord("0")
    is_last = groups & 32 == 0
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or not is_last[-1]:
        raise InvalidInputError("RLE: expected counts as COCO's compressed text, got something else or a part of it")
    ends = np.flatnonzero(is_last) + 1
    begins = np.concatenate([[0], ends[:-1]])
    places = np.arange(len(groups)) - np.repeat(begins, ends - begins)
    runs = np.add.reduceat((groups & 31) << (5 * places), begins)
    runs -= ((groups[ends - 1] & 16) >> 4) << (5 * (ends - begins))
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    if runs.min() < 0 or runs.sum() != height * width:
        raise InvalidInputError(f"RLE: expected counts that fill {height} x {width} pixels, got runs of {runs.sum()}")
    return runs


def _encode_window(mask: BoolArray, origin_xy: tuple[int, int], image_hw: tuple[int, int]) -> Rle:
    """RLE of an image that is 0 but for a mask (h, w) at `origin_xy`, without making that image.

    RLE counts down the columns, so pixel (i, j) of the image has the position j * height + i.
    """
    height, width = image_hw
    steps = np.diff(np.pad(mask, ((1, 1), (0, 0))).astype(np.int8), axis=0).T
    first_of_column = (origin_xy[0] + np.arange(steps.shape[0])) * height + origin_xy[1]
    positions = first_of_column[:, None] + np.arange(steps.shape[1])
    changes, times = np.unique(positions[steps != 0], return_counts=True)
    changes = changes[times == 1]  # a run that ends where the next column's begins goes on
    last = [] if len(changes) and changes[-1] == height * width else [height * width]
    counts = np.diff(np.concatenate([changes, last]).astype(np.int64), prepend=0)
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return Rle(size=[height, width], counts=encoded["counts"].decode("ascii"))


def _outer_rings(mask: BoolArray) -> tuple[list[IntArray], NDArray[np.int64]]:
    """Outer boundaries (V, 2) int32 in half pixels from `origin_xy` (2,) pixels.

    cv2.findContours runs through pixel centres and would cut half a pixel off each side. So every pixel becomes a 3 x 3
    block on a grid of half pixels, where blocks of neighbours share the line between them, and of the contour only the
    middles of pixel sides are kept (one even and one odd coordinate). These rings run between inner and outer pixels,
    cut the corners of staircases on both sides alike, and never meet themselves.
    """
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    grid = np.zeros((2 * height + 1, 2 * width + 1), dtype=np.uint8)
    grid[1::2, 1::2] = mask[y : y + height, x : x + width]
    grid = cv2.dilate(grid, np.ones((3, 3), dtype=np.uint8)).astype(np.uint8, copy=False)
    contours, _ = cv2.findContours(grid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    rings = [contour[:, 0] for contour in contours]
    return [ring[ring.sum(axis=1) % 2 == 1] for ring in rings], np.array([x, y])


def _area(ring: IntArray) -> float:
    return float(cv2.contourArea(ring))


def _simplify_to_budget(rings: list[IntArray], max_vertices: int, tolerance: float) -> list[IntArray]:
    """Simplify rings (V, 2) int32, largest first, to `max_vertices` together; half-pixel units throughout.

    Douglas-Peucker is fast but keeps every spike. So it only comes near the budget, and then the vertices go
    whose loss costs the least area.
    """
    rings = rings[: max(max_vertices // 3, 1)]  # more parts than this cannot fit
    if not rings:
        return []
    thickness = 2 * _area(rings[0]) / cv2.arcLength(rings[0], True)  # the width of a strip, the radius of a disc
    tolerance = min(tolerance, MAX_TOLERANCE_BY_THICKNESS * thickness)
    while True:
        coarse = [np.asarray(cv2.approxPolyDP(ring, tolerance, True)[:, 0], dtype=np.int32) for ring in rings]
        if sum(len(points) for points in coarse) <= CULLED_PER_VERTEX * max_vertices:
            simple = [_split_meeting_edges(ring, points) for ring, points in zip(rings, coarse, strict=True)]
            return _cull(simple, max_vertices)
        tolerance *= TOLERANCE_GROWTH


def _split_meeting_edges(ring: IntArray, points: IntArray) -> IntArray:
    """Give edges that meet the farthest point of the ring (R, 2) between their ends, until no two meet.

    `points` (V, 2) are some of the ring's. This ends, because the ring itself does not meet itself.
    """
    meeting = _meeting_edges(points)
    if not len(meeting):
        return points
    picked = np.flatnonzero(np.isin(_keys(ring), _keys(points)))
    while len(meeting):
        farthest = [_farthest_between(ring, picked[edge], picked[(edge + 1) % len(picked)]) for edge in meeting]
        picked = np.union1d(picked, farthest)
        meeting = _meeting_edges(ring[picked])
    return ring[picked]


def _keys(points: IntArray) -> NDArray[np.int64]:
    """One integer for each point (V, 2), so that points can be looked up."""
    return points[:, 0].astype(np.int64) << 32 | points[:, 1].astype(np.int64)


def _farthest_between(ring: IntArray, first: int, last: int) -> int:
    """Index of the point from `first` to before `last` (cyclic) that is farthest from the line between them."""
    between = (first + np.arange((last - first - 1) % len(ring) + 1)) % len(ring)
    offsets, chord = ring[between] - ring[first], ring[last] - ring[first]
    distances = np.abs(_cross(offsets, chord)) if chord.any() else (offsets**2).sum(axis=1)
    return int(between[distances.argmax()])


def _cull(rings: list[IntArray], max_vertices: int) -> list[IntArray]:
    """Drop vertices, or whole parts that are triangles, from simple rings until they fit; the first part stays.

    Each time what changes the area least. A triangle that holds no other vertex can be cut off or filled without
    making the ring meet itself, and every polygon has one (an ear), so this reaches any budget of at least 3.
    """
    points = [[(x, y) for x, y in ring.tolist()] for ring in rings]  # for so few points faster than arrays
    cheapest = [_cheapest_vertex(ring) for ring in points]
    while sum(len(ring) for ring in points) > max_vertices:
        may_shrink = [part for part, ring in enumerate(points) if part > 0 or len(ring) > 3]
        part = min(may_shrink, key=lambda part: cheapest[part][0])
        if len(points[part]) == 3:
            del points[part], cheapest[part]
        else:
            del points[part][cheapest[part][1]]
            cheapest[part] = _cheapest_vertex(points[part])
    return [np.array(ring) for ring in points]


def _cheapest_vertex(ring: list[Point]) -> tuple[int, int]:
    """(doubled area, index) of the smallest triangle of neighbours that holds no other vertex; its middle vertex."""
    triangles = list(zip(ring[-1:] + ring[:-1], ring, ring[1:] + ring[:1], strict=True))
    areas = [abs(_turn(*triangle)) for triangle in triangles]
    order = sorted(range(len(ring)), key=areas.__getitem__)
    return next((areas[index], index) for index in order if not _holds_any(triangles[index], ring))


def _holds_any(triangle: tuple[Point, Point, Point], points: list[Point]) -> bool:
    """Whether a point other than the corners lies in a triangle or on its border."""
    (ax, ay), (bx, by), (cx, cy) = a, b, c = triangle
    low_x, high_x, low_y, high_y = min(ax, bx, cx), max(ax, bx, cx), min(ay, by, cy), max(ay, by, cy)
    for point in points:
        if low_x <= point[0] <= high_x and low_y <= point[1] <= high_y and point not in triangle:
            turns = (_turn(a, b, point), _turn(b, c, point), _turn(c, a, point))
            if min(turns) >= 0 or max(turns) <= 0:
                return True
    return False


def _turn(a: Point, b: Point, c: Point) -> int:
    """Doubled signed area of a triangle."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _sample_centres(low: int, high: int, limit: int) -> tuple[FloatArray, float]:
    """Centres (n,) of n <= limit equal cells between two pixel corners, and the length of a cell (1 if they fit)."""
    count = min(max(high - low, 0), limit)
    step = (high - low) / count if count else 1.0
    return low + (np.arange(count) + 0.5) * step, step


def _resample_roi(roi_mask: FloatArray, box_xyxy: FloatArray, x_px: FloatArray, y_px: FloatArray) -> FloatArray:
    """Bilinear probabilities (len(y), len(x)) of a RoI mask (M, M) at image positions, 0 beyond its cells.

    Bilinear interpolation is separable, so it is two small matrix products, exact at fractions of a pixel.
    """
    size = len(roi_mask)
    columns = _hat_weights(x_px, box_xyxy[0], box_xyxy[2], size)
    rows = _hat_weights(y_px, box_xyxy[1], box_xyxy[3], size)
    weighted = rows @ roi_mask.astype(np.float32, copy=False)
    resampled = np.empty((len(rows), len(columns)), dtype=np.float32)
    some = max(1, _ONE_THREAD_PRODUCTS // (size * max(1, len(columns))))
    for first in range(0, len(rows), some):
        np.matmul(weighted[first : first + some], columns.T, out=resampled[first : first + some])
    return resampled


def _hat_weights(positions_px: FloatArray, low: float, high: float, size: int) -> NDArray[np.float32]:
    """Weights (n, size) of the cells of a RoI side [low, high] at n positions.

    The inverse of the mask targets, `losses.mask_coverage`: cell k has its centre at (k + 0.5) / size of the side.
    """
    cells = ((positions_px - low) / (high - low) * size - 0.5).astype(np.float32)
    distance = np.abs(cells[:, None] - np.arange(size, dtype=np.float32))
    return np.maximum(np.float32(0), np.float32(1) - distance)


def _meeting_edges(points: FloatArray | IntArray) -> NDArray[np.intp]:
    """Indices (K,), ascending, of the edges of a closed ring (V, 2) that cross, touch or fold back on another one."""
    start = points.astype(np.float64)
    edge = np.concatenate([start[1:], start[:1]]) - start
    after = np.concatenate([edge[1:], edge[:1]])
    # Repeated points make edges of length 0, which are found here as well.
    folds_back = (_cross(edge, after) == 0) & ((edge * after).sum(axis=1) <= 0)
    meets = folds_back | np.roll(folds_back, 1)
    for first in range(0, len(start), EDGES_PER_BLOCK):
        meets[_meeting_edges_in_block(start, edge, first)] = True
    return np.flatnonzero(meets)


def _meeting_edges_in_block(start: FloatArray, edge: FloatArray, first: int) -> NDArray[np.intp]:
    """Those of the edges [first, first + EDGES_PER_BLOCK) that meet an edge which is not their neighbour.

    Two segments meet if each has its ends not strictly on one side of the other and their bounding boxes overlap.
    """
    count = len(start)
    rows = np.arange(first, min(first + EDGES_PER_BLOCK, count))[:, None]
    columns = np.arange(count)
    end = start + edge
    low, high = np.minimum(start, end), np.maximum(start, end)
    gap = (columns - rows) % count
    candidates = (gap > 1) & (gap < count - 1)
    for axis in (0, 1):
        candidates &= low[rows, axis] <= high[columns, axis]
        candidates &= low[columns, axis] <= high[rows, axis]
    i, j = candidates.nonzero()
    i += first
    j_straddles = _cross(edge[i], start[j] - start[i]) * _cross(edge[i], end[j] - start[i]) <= 0
    i_straddles = _cross(edge[j], start[i] - start[j]) * _cross(edge[j], end[i] - start[j]) <= 0
    return i[j_straddles & i_straddles]


def _cross(first: FloatArray | IntArray, second: FloatArray | IntArray) -> FloatArray:
    product: FloatArray = np.asarray(first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0])
    return product


def _check_mask(mask: BoolArray) -> None:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2 or not mask.size:
        got = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise InvalidInputError(f"mask: expected a bool array of shape (H, W), got {got}")


def _check_rle(rle: Rle) -> None:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(counts, str):
        raise InvalidInputError(f"RLE: expected compressed counts as text, got {type(counts).__name__}")
    if not isinstance(size, list | tuple) or len(size) != 2 or min(size) < 1:
        raise InvalidInputError(f"RLE: expected a size of [height, width], got {size}")


def _check_budget(max_vertices: int, tolerance_px: float) -> None:
    if max_vertices < 3:
        raise InvalidInputError(f"max_vertices: expected at least 3, a triangle, got {max_vertices}")
    if not tolerance_px > 0:
        raise InvalidInputError(f"tolerance_px: expected more than 0, got {tolerance_px}")


def _checked_image_hw(image_hw: tuple[int, int]) -> tuple[int, int]:
    if len(image_hw) != 2 or min(image_hw) < 1:
        raise InvalidInputError(f"image_hw: expected (height, width) of at least 1, got {image_hw}")
    return image_hw


def _checked_roi(
    roi_mask: FloatArray, box_xyxy: FloatArray, image_hw: tuple[int, int]
) -> tuple[FloatArray, tuple[int, int, int, int]]:
    """The box (4,) float64, at least a pixel wide and high, and the pixels it may set: xyxy, clamped to the image."""
    height, width = _checked_image_hw(image_hw)
    if roi_mask.ndim != 2 or roi_mask.shape[0] != roi_mask.shape[1] or roi_mask.dtype.kind != "f":
        raise InvalidInputError(
            f"roi_mask: expected float probabilities of shape (M, M), got {roi_mask.dtype} {roi_mask.shape}"
        )
    box = np.asarray(box_xyxy, dtype=np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise InvalidInputError(f"box_xyxy: expected 4 finite numbers x0, y0, x1, y1, got {box_xyxy}")
    box = np.concatenate([box[:2], np.maximum(box[2:], box[:2] + 1.0)])
    margin = 0.5 * (box[2:] - box[:2]) / len(roi_mask)  # interpolation fades out half a cell beyond the box
    limits = (width, height)
    low = np.clip(np.floor(box[:2] - margin), 0, limits).astype(int)
    high = np.clip(np.ceil(box[2:] + margin), 0, limits).astype(int)
    return box, (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
