import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from label_studio_sdk.label_interface import LabelInterface

from ml_backend.errors import ImageError
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import (
    choose_annotation,
    empty_prediction,
    for_task,
    image_uri,
    instances_from_annotation,
    prediction,
    regions_from_instances,
)
from model.errors import InvalidInputError
from model.geometry import is_simple_polygon, mask_to_rle, polygons_to_rle, rle_to_mask, roi_mask_to_rle
from model.types import Detections, Rle

XML = """
<View>
  <Image name="image" value="$image"/>
  <PolygonLabels name="label" toName="image"><Label value="Cell" alias="cell"/><Label value="dot"/></PolygonLabels>
  <RectangleLabels name="boxes" toName="image"><Label value="cell"/></RectangleLabels>
</View>
"""
CONFIG = replace(parse_label_config(XML), other_names=("second",))
INTERFACE = LabelInterface(XML)
HW = (80, 100)

Json = dict[str, Any]


def detections(roi_masks: list[Any], boxes: list[list[float]], *, labels: list[int] | None = None) -> Detections:
    count = len(roi_masks)
    return Detections(
        image_hw=HW,
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(count, 4),
        labels=np.array(labels or [1] * count, dtype=np.int64),
        class_scores=np.full(count, 0.93, dtype=np.float32),
        box_scores=np.full(count, 0.88, dtype=np.float32),
        mask_scores=np.full(count, 0.79, dtype=np.float32),
        roi_masks=np.array(roi_masks, dtype=np.float32).reshape(count, 28, 28),
    )


FULL = np.ones((28, 28))
NOTHING = np.zeros((28, 28))
TWO_PARTS = np.ones((28, 28))
TWO_PARTS[:, 12:16] = 0
SMALLER_PART_FIRST = np.ones((28, 28))
SMALLER_PART_FIRST[:, 6:10] = 0


def published(what: Detections, **changes: Any) -> Json:
    return prediction(what, CONFIG, **{"model_version": "tsp-1", "score": 0.4, **changes})


def polygon(points: Any, **changes: Any) -> Json:
    region = {
        "id": "r1",
        "from_name": "label",
        "to_name": "image",
        "type": "polygonlabels",
        "original_width": 100,
        "original_height": 80,
        "image_rotation": 0,
        "value": {"points": points, "closed": True, "polygonlabels": ["cell"]},
    }
    label = changes.pop("label", None)
    if label is not None:
        region["value"]["polygonlabels"] = [label]
    return {**region, **changes}


SQUARE = [[10, 10], [40, 10], [40, 40], [10, 40]]
OTHER_SQUARE = [[60, 60], [90, 60], [90, 90], [60, 90]]
THIRD_SQUARE = [[60, 10], [90, 10], [90, 40], [60, 40]]


def read(*regions: Any) -> tuple[list[int], list[int], Mapping[str, int]]:
    """Labels, areas in pixels, ignored."""
    found = instances_from_annotation({"id": 1, "result": list(regions)}, CONFIG, HW)
    assert found.labels.dtype == np.int64
    return found.labels.tolist(), [int(rle_to_mask(rle).sum()) for rle in found.rles], found.ignored


def iou(first: Rle, second: Rle) -> float:
    one, other = rle_to_mask(first), rle_to_mask(second)
    return float((one & other).sum() / (one | other).sum())


def check_contract(made: Json) -> None:
    json.dumps(made, allow_nan=False)
    assert INTERFACE.validate_prediction(made, return_errors=True) == []
    assert 0 <= made["score"] <= 1
    ids = [region["id"] for region in made["result"]]
    assert len(set(ids)) == len(ids)
    for region in made["result"]:
        check_region(region, parents=ids)


def check_region(region: Json, *, parents: list[str]) -> None:
    points = np.array(region["value"]["points"], dtype=np.float64)
    assert points.min() >= 0
    assert points.max() <= 100
    assert is_simple_polygon(points)
    assert region["value"]["closed"] is True
    assert region["image_rotation"] == 0
    assert 0 <= region.get("score", 0) <= 1
    assert region.get("parentID", region["id"]) in parents


# The address of the image


@pytest.mark.parametrize(
    ("data", "key"),
    [
        pytest.param({"image": "/data/upload/1/a.png"}, "image", id="plain key"),
        pytest.param({"scan": {"url": "/data/upload/1/a.png"}}, "scan.url", id="path"),
        pytest.param({"scan": [{"url": "/data/upload/1/a.png"}]}, "scan[0].url", id="path through a list"),
        pytest.param({"scan.url": "/data/upload/1/a.png", "scan": {}}, "scan.url", id="key with a dot"),
    ],
)
def test_the_image_is_found_where_the_configuration_says(data: Json, key: str) -> None:
    assert image_uri({"id": 1, "data": data}, LabelConfig("p", "i", key, ("a",))) == "/data/upload/1/a.png"


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        pytest.param(
            {"id": 7, "data": {"photo": "x", "text": "y"}},
            "task 7: .*NoneType; keys in data: photo, text",
            id="missing",
        ),
        pytest.param({"id": 7, "data": {"image": ["a.png"]}}, "got list; keys in data: image", id="list"),
        pytest.param({"id": 7, "data": {"image": ""}}, "got str", id="empty text"),
        pytest.param({"id": 7, "data": {}}, "keys in data: none", id="no data"),
        pytest.param({"data": None}, r"task \?: .*keys in data: none", id="neither data nor id"),
    ],
)
def test_a_task_without_an_image_is_named_in_the_error(task: Json, complaint: str) -> None:
    with pytest.raises(ImageError, match=complaint):
        image_uri(task, CONFIG)


# Detections -> prediction


def test_a_detection_becomes_a_region_as_label_studio_wants_it() -> None:
    made = published(detections([FULL], [[20, 16, 60, 48]], labels=[2]))
    check_contract(made)
    region = made["result"][0]
    points = np.array(region["value"].pop("points"))
    np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], [[20, 20], [60, 60]], atol=1.5)
    assert len(region.pop("id")) == 16
    assert region == {
        "from_name": "label",
        "to_name": "image",
        "type": "polygonlabels",
        "original_width": 100,
        "original_height": 80,
        "image_rotation": 0,
        "origin": "prediction",
        "score": 0.93,
        "meta": {"text": ["class .93 box .88 mask .79, certainty .82"]},
        "value": {"closed": True, "polygonlabels": ["dot"]},
    }
    assert (made["model_version"], made["score"]) == ("tsp-1", 0.4)


def test_certainty_of_one_is_written_in_full_and_zero_without_a_leading_zero() -> None:
    sure = detections([FULL], [[20, 16, 60, 48]])
    sure.class_scores[:], sure.box_scores[:], sure.mask_scores[:] = 1.0, 1.0, 0.0
    assert published(sure)["result"][0]["meta"]["text"] == ["class 1.00 box 1.00 mask .00, certainty .42"]


def test_parts_of_one_instance_are_regions_under_the_largest() -> None:
    made = published(detections([SMALLER_PART_FIRST, FULL], [[10, 10, 66, 66], [70, 10, 90, 30]]))
    check_contract(made)
    parent, child, alone = made["result"]
    assert child["parentID"] == parent["id"]
    assert "parentID" not in parent
    assert "parentID" not in alone
    assert max(point[0] for point in child["value"]["points"]) < min(point[0] for point in parent["value"]["points"])


def test_a_published_prediction_reads_back_as_the_same_instances() -> None:
    what = detections([TWO_PARTS, FULL], [[10, 10, 66, 66], [70, 10, 90, 30]], labels=[1, 2])
    found = instances_from_annotation(published(what), CONFIG, HW)
    assert found.labels.tolist() == [1, 2]
    assert found.ignored == {}
    for roi_mask, box, rle in zip(what.roi_masks, what.boxes_xyxy, found.rles, strict=True):
        assert iou(rle, roi_mask_to_rle(roi_mask, box, HW)) > 0.95


def test_an_instance_without_a_polygon_is_left_out() -> None:
    made = published(detections([NOTHING, FULL], [[10, 10, 50, 50], [10, 10, 50, 50]]))
    assert [region["value"]["polygonlabels"] for region in made["result"]] == [["cell"]]


def test_no_detections_give_a_prediction_without_regions() -> None:
    made = published(detections([], []))
    check_contract(made)
    assert made == {"model_version": "tsp-1", "score": 0.4, "result": []}


def test_an_empty_prediction_has_a_score_so_that_it_has_a_place_in_the_queue() -> None:
    made = empty_prediction("none")
    check_contract(made)
    assert made == {"model_version": "none", "score": 0.0, "result": []}


def test_the_same_detections_are_published_with_equal_json_and_another_version_with_other_ids() -> None:
    what = detections([TWO_PARTS, FULL], [[10, 10, 66, 66], [70, 10, 90, 30]])
    assert published(what) == published(what)
    ids = {
        region["id"] for version in ("tsp-1", "tsp-2") for region in published(what, model_version=version)["result"]
    }
    assert len(ids) == 6


def test_equal_detections_in_one_image_get_ids_of_their_own() -> None:
    check_contract(published(detections([FULL, FULL], [[10, 10, 50, 50]] * 2)))


def test_bulk_import_gets_the_task_beside_the_prediction() -> None:
    assert for_task(empty_prediction("v"), 12) == {"task": 12, "model_version": "v", "score": 0.0, "result": []}


@pytest.mark.parametrize("score", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_score_that_bulk_import_would_drop_is_refused(score: float) -> None:
    with pytest.raises(InvalidInputError, match="expected a number in"):
        published(detections([], []), score=score)
    with pytest.raises(InvalidInputError, match="expected a number in"):
        empty_prediction("v", score=score)


@pytest.mark.parametrize("label", [0, 3])
def test_a_class_that_the_configuration_does_not_have_is_refused(label: int) -> None:
    with pytest.raises(InvalidInputError, match=r"expected 1\.\.2 for the labels cell, dot, got"):
        published(detections([FULL, FULL], [[10, 10, 50, 50]] * 2, labels=[1, label]))


def test_a_tiny_instance_in_a_huge_image_survives_rounding() -> None:
    what = Detections(
        image_hw=(200_000, 200_000),
        boxes_xyxy=np.array([[100_000, 100_000, 100_003, 100_003]], dtype=np.float64),
        labels=np.array([1]),
        class_scores=np.array([0.9]),
        box_scores=np.array([0.9]),
        mask_scores=np.array([0.9]),
        roi_masks=np.ones((1, 28, 28)),
    )
    made = published(what)
    check_contract(made)
    assert len(made["result"]) == 1


scores = hnp.arrays(np.float32, 3, elements=st.floats(0, 1, width=32))


@st.composite
def random_detections(draw: st.DrawFn) -> Detections:
    height, width = draw(st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
    side = draw(st.sampled_from([1, 5, 14]))
    corner = st.floats(-50, 3100, width=32)
    return Detections(
        image_hw=(height, width),
        boxes_xyxy=draw(hnp.arrays(np.float32, (3, 4), elements=corner)),
        labels=draw(hnp.arrays(np.int64, 3, elements=st.integers(1, 2))),
        class_scores=draw(scores),
        box_scores=draw(scores),
        mask_scores=draw(scores),
        roi_masks=draw(hnp.arrays(np.float32, (3, side, side), elements=st.floats(0, 1, width=32))),
    )


@settings(deadline=None, max_examples=150)
@given(random_detections(), st.floats(0, 1), st.integers(3, 60))
def test_whatever_the_model_sees_the_prediction_keeps_the_contract(what: Detections, score: float, budget: int) -> None:
    made = published(what, score=score, max_vertices=budget)
    check_contract(made)
    assert published(what, score=score, max_vertices=budget) == made


# Which annotation counts


def annotation(number: int, updated_at: Any = "2026-01-01T10:00:00Z", **more: Any) -> Json:
    return {"id": number, "updated_at": updated_at, "was_cancelled": False, "ground_truth": False, "result": [], **more}


@pytest.mark.parametrize(
    ("annotations", "chosen"),
    [
        pytest.param([], None, id="none"),
        pytest.param([annotation(1)], 1, id="the only one"),
        pytest.param([annotation(1, was_cancelled=True)], None, id="skipped"),
        pytest.param([annotation(1), annotation(2, "2026-02-01T10:00:00Z", was_cancelled=True)], 1, id="skipped later"),
        pytest.param([annotation(1, "2026-01-02T10:00:00Z"), annotation(2)], 1, id="the latest"),
        pytest.param([annotation(1, ground_truth=True), annotation(2, "2026-02-01T10:00:00Z")], 1, id="ground truth"),
        pytest.param(
            [annotation(1, ground_truth=True, was_cancelled=True), annotation(2)], 2, id="skipped ground truth"
        ),
        pytest.param(
            [annotation(1, ground_truth=True), annotation(2, "2026-02-01T10:00:00Z", ground_truth=True)],
            2,
            id="the latest ground truth",
        ),
        pytest.param([annotation(3), annotation(2)], 3, id="same time, highest id"),
        pytest.param(
            [annotation(1, "2026-01-01T10:00:00.5Z"), annotation(2, "2026-01-01T10:00:00Z")],
            1,
            id="fraction of a second",
        ),
        pytest.param(
            [annotation(1, "2026-01-01T10:00:00Z"), annotation(2, "2026-01-01T11:00:00+02:00")], 1, id="time zones"
        ),
        pytest.param([annotation(1, "2026-01-01T10:00:00"), annotation(2, "yesterday")], 1, id="unreadable time"),
        pytest.param([annotation(1, None), annotation(2, None)], 2, id="no times"),
        pytest.param([17, annotation(1)], 1, id="a bare id beside it"),
    ],
)
def test_one_annotation_counts_for_a_task(annotations: list[Any], chosen: int | None) -> None:
    found = choose_annotation({"id": 1, "annotations": annotations, "drafts": [annotation(99, "2027-01-01T10:00:00Z")]})
    assert (found and found["id"]) == chosen


@pytest.mark.parametrize("task", [{}, {"annotations": None}, {"annotations": {}}])
def test_a_task_without_annotations_has_none_that_counts(task: Json) -> None:
    assert choose_annotation(task) is None


# Annotation -> instances


def test_polygons_become_masks_of_the_real_image_size() -> None:
    labels, areas, ignored = read(
        polygon(SQUARE, original_width=50, original_height=40), polygon(OTHER_SQUARE, label="dot")
    )
    assert (labels, areas, ignored) == ([1, 2], [30 * 24, 30 * 24], {})


def test_an_annotation_without_regions_says_that_nothing_is_there() -> None:
    for empty in ({"result": []}, {"result": None}, {}):
        found = instances_from_annotation(empty, CONFIG, HW)
        assert (found.labels.shape, found.rles, found.ignored) == ((0,), (), {})


def test_choices_texts_and_relations_beside_the_polygons_do_not_count() -> None:
    notes = [
        {"type": "choices", "from_name": "quality", "to_name": "image", "value": {"choices": ["good"]}},
        {"type": "textarea", "from_name": "note", "to_name": "image", "id": "r1", "value": {"text": ["?"]}},
        {"type": "relation", "from_id": "r1", "to_id": "r2", "direction": "right"},
    ]
    assert read(polygon(SQUARE), *notes) == ([1], [720], {})


def test_a_label_is_read_by_the_value_that_people_see_as_well_as_by_its_alias() -> None:
    assert read(polygon(SQUARE, label="Cell"))[0] == [1]


def test_the_first_known_of_several_labels_counts() -> None:
    region = polygon(SQUARE)
    region["value"]["polygonlabels"] = ["gone", "dot", "cell"]
    assert read(region)[0] == [2]


def test_a_view_that_was_rotated_changes_no_coordinates() -> None:
    assert read(polygon(SQUARE, image_rotation=90)) == read(polygon(SQUARE))


def test_points_outside_are_clamped_to_the_image() -> None:
    assert read(polygon([[-50, -50], [200, -50], [200, 200], [-50, 200]])) == ([1], [HW[0] * HW[1]], {})


@pytest.mark.parametrize(
    ("regions", "areas"),
    [
        pytest.param(
            [polygon(SQUARE, id="a"), polygon(OTHER_SQUARE, id="b", parentID="a")], [1440], id="parent and part"
        ),
        pytest.param([polygon(OTHER_SQUARE, id="b", parentID="a"), polygon(SQUARE, id="a")], [1440], id="part first"),
        pytest.param(
            [
                polygon(SQUARE, id="a"),
                polygon(OTHER_SQUARE, id="b", parentID="a"),
                polygon(THIRD_SQUARE, id="c", parentID="b"),
            ],
            [2160],
            id="part of a part",
        ),
        pytest.param(
            [polygon(SQUARE, id="a"), polygon(SQUARE, id="b", parentID="a")], [720], id="overlapping parts count once"
        ),
        pytest.param(
            [polygon(SQUARE, id="a"), polygon(OTHER_SQUARE, id="b", parentID="a", label="dot")],
            [720, 720],
            id="another label",
        ),
        pytest.param(
            [
                polygon(SQUARE, id="a"),
                polygon(OTHER_SQUARE, id="b", parentID="a", label="dot"),
                polygon(THIRD_SQUARE, id="c", parentID="a", label="dot"),
            ],
            [720, 720, 720],
            id="two of another label in one",
        ),
        pytest.param(
            [polygon(SQUARE, id="a"), polygon(OTHER_SQUARE, id="b", parentID="x")], [720, 720], id="lost parent"
        ),
        pytest.param([polygon(SQUARE, id="a", parentID="a")], [720], id="its own parent"),
        pytest.param([polygon(SQUARE, id="a"), polygon(OTHER_SQUARE, id="a")], [720, 720], id="one id twice"),
        pytest.param([polygon(SQUARE, id=None), polygon(OTHER_SQUARE, id=None)], [720, 720], id="no ids"),
        pytest.param(
            [
                polygon([[1, 1]], id="a"),
                polygon(SQUARE, id="b", parentID="a"),
                polygon(OTHER_SQUARE, id="c", parentID="a"),
            ],
            [1440],
            id="unusable parent",
        ),
    ],
)
def test_parts_with_a_parent_of_the_same_label_are_one_instance(regions: list[Json], areas: list[int]) -> None:
    assert read(*regions)[1] == areas


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        pytest.param(polygon(SQUARE, label="gone"), "unknown label 'gone'", id="unknown label"),
        pytest.param(polygon(SQUARE, value={"points": SQUARE}), "no label", id="no labels"),
        pytest.param(
            polygon(SQUARE, value={"points": SQUARE, "polygonlabels": [None, 3]}), "no label", id="odd labels"
        ),
        pytest.param(
            polygon(SQUARE, type="rectanglelabels"), "rectanglelabels: only polygons are learnt", id="rectangle"
        ),
        pytest.param(polygon(SQUARE, type="brushlabels"), "brushlabels: only polygons are learnt", id="brush"),
        pytest.param(polygon(SQUARE, from_name="second"), "polygon of another control", id="another control"),
        pytest.param(polygon(SQUARE, to_name="second"), "polygon on another image", id="another image"),
        pytest.param(
            polygon(SQUARE, from_name="gone"),
            "polygon of a tag that the labelling configuration does not have: 'gone'",
            id="a control that is gone",
        ),
        pytest.param(
            polygon(SQUARE, to_name="gone"),
            "polygon of a tag that the labelling configuration does not have: 'gone'",
            id="an image that is gone",
        ),
        pytest.param(polygon(SQUARE[:2]), "fewer than 3 points", id="two points"),
        pytest.param(polygon([]), "fewer than 3 points", id="no points"),
        pytest.param(polygon([[10, 10], [20, 20], [30, 30]]), "polygon without area", id="a line"),
        pytest.param(polygon([[200, 10], [200, 20], [300, 30]]), "polygon without area", id="all outside"),
        pytest.param(polygon([[10, 10], [20, float("nan")], [30, 0]]), "points that are not finite", id="NaN"),
        pytest.param(polygon([[10, 10], [20, float("inf")], [30, 0]]), "points that are not finite", id="infinite"),
        pytest.param(polygon([[10, 10], [20, None], [30, 0]]), "points that are not finite", id="null"),
        pytest.param(polygon([[10, 10], [20], [30, 0]]), "malformed points", id="uneven rows"),
        pytest.param(polygon([[10, 10, 1]] * 3), "malformed points", id="three dimensions"),
        pytest.param(polygon([[]] * 3), "malformed points", id="empty rows"),
        pytest.param(polygon([[10, 10**400], [1, 2], [3, 4]]), "malformed points", id="beyond float"),
        pytest.param(polygon({"x": 1}), "malformed points", id="points are a mapping"),
        pytest.param(polygon("abc"), "malformed points", id="points are text"),
        pytest.param(polygon(SQUARE, value=None), "malformed region", id="no value"),
        pytest.param(polygon(SQUARE, type=None), "malformed region", id="no type"),
        pytest.param("region", "malformed region", id="not a mapping"),
    ],
)
def test_what_cannot_be_learnt_is_counted_with_its_reason(region: Any, reason: str) -> None:
    assert read(region, polygon(OTHER_SQUARE)) == ([1], [720], {reason: 1})


def test_a_result_that_is_no_list_is_counted() -> None:
    assert instances_from_annotation({"result": "x"}, CONFIG, HW).ignored == {"malformed result": 1}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["a", "b", "c"])
points = st.lists(st.lists(st.floats(-10, 110) | st.integers(0, 100), min_size=2, max_size=2), max_size=8)
regions = st.fixed_dictionaries(
    {
        "id": names | anything,
        "from_name": st.just("label") | anything,
        "to_name": st.just("image") | anything,
        "type": st.sampled_from(["polygonlabels", "rectanglelabels", "choices"]) | anything,
        "value": st.fixed_dictionaries(
            {
                "points": points | anything,
                "polygonlabels": st.lists(st.sampled_from(["cell", "dot", "gone"]), max_size=2) | anything,
            }
        )
        | anything,
    },
    optional={"parentID": names | anything, "image_rotation": anything},
)


@settings(deadline=None, max_examples=300)
@given(st.lists(regions | anything, max_size=6) | anything)
def test_whatever_people_draw_or_import_is_read_or_counted(result: Any) -> None:
    found = instances_from_annotation({"id": 1, "result": result}, CONFIG, HW)
    assert len(found.labels) == len(found.rles)
    assert all(rle_to_mask(rle).any() for rle in found.rles)
    assert set(found.labels.tolist()) <= {1, 2}
    assert all(count > 0 for count in found.ignored.values())
    json.dumps(found.ignored)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["id", "annotations", "drafts"]), st.lists(anything, max_size=3)))
def test_whatever_a_task_holds_choosing_does_not_fail(task: Json) -> None:
    choose_annotation(task)


# Instances -> annotation


def disc(centre_xy: tuple[float, float], radius: float) -> Rle:
    y, x = np.mgrid[: HW[0], : HW[1]] + 0.5
    return mask_to_rle((x - centre_xy[0]) ** 2 + (y - centre_xy[1]) ** 2 <= radius**2)


def union(*rles: Rle) -> Rle:
    return mask_to_rle(np.any([rle_to_mask(rle) for rle in rles], axis=0))


def test_what_the_simulated_annotator_draws_reads_back_as_the_truth() -> None:
    truth = (
        disc((30, 30), 18),
        disc((60, 50), 4),
        union(disc((80, 20), 12), disc((80, 60), 9)),
        polygons_to_rle([np.array([[0, 0], [100, 0], [100, 5], [0, 80]])], HW),
    )
    labels = np.array([1, 2, 1, 2])
    drawn = regions_from_instances(labels, truth, CONFIG, HW)
    for region in drawn:
        check_region(region, parents=[region["id"] for region in drawn])
    assert INTERFACE.validate_annotation({"result": drawn})
    assert len(drawn) == 5
    found = instances_from_annotation({"result": drawn}, CONFIG, HW)
    assert found.labels.tolist() == labels.tolist()
    assert found.ignored == {}
    assert min(iou(one, other) for one, other in zip(truth, found.rles, strict=True)) > 0.95


def test_single_pixels_survive_the_round_trip() -> None:
    mask = np.zeros(HW, dtype=bool)
    mask[40, 50] = True
    drawn = regions_from_instances(np.array([1]), [mask_to_rle(mask)], CONFIG, HW)
    assert read(*drawn)[1] == [1]


def test_an_image_without_instances_gives_an_empty_result() -> None:
    assert regions_from_instances(np.zeros(0, dtype=np.int64), [], CONFIG, HW) == []


def test_an_empty_mask_gives_no_region() -> None:
    assert regions_from_instances(np.array([1]), [mask_to_rle(np.zeros(HW, dtype=bool))], CONFIG, HW) == []


def test_labels_and_masks_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="got 2 labels and 1 masks"):
        regions_from_instances(np.array([1, 2]), [disc((30, 30), 9)], CONFIG, HW)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.bool_, (12, 12)))
def test_whatever_the_truth_is_it_is_drawn_within_the_contract(coarse: np.ndarray[Any, Any]) -> None:
    mask = coarse.repeat(4, axis=0).repeat(4, axis=1)
    drawn = regions_from_instances(np.array([1]), [mask_to_rle(mask)], CONFIG, (48, 48))
    for region in drawn:
        check_region(region, parents=[drawn[0]["id"]])
    found = instances_from_annotation({"result": drawn}, CONFIG, (48, 48))
    assert len(found.labels) == bool(coarse.any())
