"""What Label Studio might send, and what it never would: strategies for configurations, annotations and tasks."""

import base64
import json
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
from hypothesis import strategies as st

KNOWN_LABELS = ("cell", "lesion")
CONFIG = (
    '<View><Image name="image" value="$image"/><PolygonLabels name="label" toName="image">'
    '<Label value="cell"/><Label value="lesion"/></PolygonLabels></View>'
)
PROJECT_UIDS = ("7.1700000000", "8.1700000001", "9.1700000002")
PROJECTS: tuple[dict[str, Any], ...] = tuple(
    {"id": number, "title": "cells", "created_at": f"2023-11-14T22:13:2{number - 7}.5Z"} for number in (7, 8, 9)
)
ACTIONS = ("ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED", "PROJECT_UPDATED",
           "TASKS_CREATED", "TASKS_DELETED", "START_TRAINING")  # fmt: skip
KINDS = ("polygonlabels", "polygon", "rectanglelabels", "brushlabels", "keypointlabels", "ellipselabels", "bitmask",
         "vectorlabels", "choices", "textarea", "relation", "PolygonLabels", "")  # fmt: skip


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _encoded(extension: str, height: int, width: int) -> bytes:
    noise = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(extension, noise)[1].tobytes()


IMAGES = tuple(_data_uri(_encoded(".png", *size)) for size in ((64, 64), (48, 80), (1, 1), (300, 2)))
LABEL_STUDIO_IMAGES = ("/data/upload/1/a.png", "s3://bucket/a.png", "/data/local-files/?d=a.png")
NO_IMAGES = (
    "", "data:", "data:image/png;base64,", "data:image/png;base64,AAAA", "data:image/svg+xml,<svg/>",
    "file:///etc/passwd", "http://127.0.0.1:1/a.png", "http://169.254.169.254/latest", "http://[::1]/a",
    "http://2130706433/", "ftp://a/b", "//a/b", "/api/projects/", "/data/../../etc/passwd", "/data/%2e%2e/x", "http://",
    "http://[", "\ud800", "a\0b", "https://a b/", IMAGES[0][:-40], IMAGES[0] + "%00",
)  # fmt: skip


def _damaged(content: bytes, changes: list[tuple[int, int]], length: int | None) -> str:
    """An image some of whose bytes were changed, or that was cut off."""
    broken = bytearray(content)
    for at, byte in changes:
        broken[at % len(broken)] = byte
    return _data_uri(bytes(broken[:length]))


damaged_images = st.builds(
    _damaged,
    st.sampled_from([_encoded(extension, 20, 30) for extension in (".png", ".jpg", ".webp", ".tiff", ".bmp")]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.none() | st.integers(0, 3000),
)
images = st.sampled_from(IMAGES) | st.sampled_from(NO_IMAGES) | damaged_images

texts = st.text(max_size=20) | st.sampled_from(["\ud800", "\0", "\u202e", "a" * 1000, "🔬", "<&>\"'"])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 1e308, float("nan"), float("inf")])
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def or_anything(
    strategy: st.SearchStrategy[Any], *, otherwise: st.SearchStrategy[Any] = anything, one_in: int = 30
) -> st.SearchStrategy[Any]:
    """Mostly what is expected, and that first: Hypothesis begins with the smallest number."""
    return st.integers(1, one_in).flatmap(lambda number: otherwise if number == one_in else strategy)


# Labelling configurations


def _tag(name: str, attributes: dict[str, str], inner: str = "") -> str:
    return f"<{name}{''.join(f' {key}={quoteattr(value)}' for key, value in attributes.items())}>{inner}</{name}>"


_words = st.sampled_from(
    ["label", "image", "cell", "lesion", "$image", "$a.b[0]", "$", "", "ä", "a,b", "${x}", "$a b"]
) | (st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="￾￿"), max_size=8))
_labels = st.lists(
    st.dictionaries(st.sampled_from(["value", "alias", "background", "hint"]), _words, max_size=3), max_size=5
).map(lambda labels: "".join(_tag("Label", attributes) for attributes in labels))
_attributes = st.fixed_dictionaries(
    {"name": _words, "toName": _words}, optional={"value": _words, "valueList": _words, "strokeWidth": _words}
)
_controls = st.builds(
    _tag,
    st.sampled_from(["PolygonLabels", "polygonlabels", "BrushLabels", "Image", "Repeater", "View", "Choices"]),
    _attributes,
    _labels,
)  # fmt: skip
_names = st.text("abcxyzäß -_.", min_size=1, max_size=6).map(lambda name: f"_{name}")
_good_labels = st.lists(
    st.sampled_from(["cell", "lesion", "ä b", "<&>", "🔬"]) | _names, min_size=1, max_size=4, unique=True
).map(lambda names: "".join(_tag("Label", {"value": name}) for name in names))
_other_controls = st.lists(
    st.sampled_from(["BrushLabels", "RectangleLabels", "Choices"]).map(lambda kind: _tag(kind, {"name": f"other {kind}",
                                                                                                 "toName": "image"})),
    max_size=2).map("".join)  # fmt: skip
usable_configs: st.SearchStrategy[str] = st.just(CONFIG) | st.builds(
    lambda before, control, labels, after: _tag("View", {}, (
        f'{before}<Image name="image" value="$image"/>'
        f'{_tag("PolygonLabels", {"name": control, "toName": "image"}, labels)}{after}')),
    _other_controls, _names, _good_labels, _other_controls,
)  # fmt: skip
_odd_configs = st.sampled_from(
    ["", "<View", "<View/>", "plain", "<!DOCTYPE a [<!ENTITY b 'c'>]><View>&b;</View>", "<View>\0</View>", "\ud800",
     "<?xml version='1.0' encoding='utf-16'?><View/>", "<a>" * 3000 + "</a>" * 3000,
     "<View xmlns:a='b'><a:Image/></View>"]
)  # fmt: skip
label_configs: st.SearchStrategy[str] = (
    st.just(CONFIG)
    | st.lists(_controls, max_size=5).map(lambda tags: f"<View>{''.join(tags)}</View>")
    | st.builds(lambda at, text: CONFIG[:at] + text + CONFIG[at:], st.integers(0, len(CONFIG)), texts)
    | st.builds(lambda start, end: CONFIG[:start] + CONFIG[end:], *[st.integers(0, len(CONFIG))] * 2)
    | _odd_configs
    | texts
)


# Annotations

_percents = st.floats(0, 100) | st.floats(-50, 150) | st.integers(0, 100) | numbers
_points = st.lists(st.lists(_percents, min_size=2, max_size=2) | st.lists(_percents, max_size=3), max_size=12)
_ids = st.sampled_from(["r1", "r2", "r3", "r4"])
_values = st.one_of(
    st.fixed_dictionaries({"points": or_anything(_points), "closed": st.booleans(), "polygonlabels": or_anything(
        st.lists(st.sampled_from([*KNOWN_LABELS, "unknown"]) | texts, max_size=2))}),
    st.fixed_dictionaries({"x": _percents, "y": _percents, "width": _percents, "height": _percents, "rotation": numbers,
                           "rectanglelabels": st.lists(texts, max_size=2)}),
    st.fixed_dictionaries({"format": st.sampled_from(["rle", "png"]), "rle": st.lists(numbers, max_size=20),
                           "brushlabels": st.lists(texts, max_size=2)}),
    anything,
)  # fmt: skip
_polygons = st.fixed_dictionaries(
    {"points": st.lists(st.lists(st.floats(0, 100), min_size=2, max_size=2), min_size=3, max_size=12),
     "polygonlabels": st.sampled_from(KNOWN_LABELS).map(lambda label: [label])}
).map(lambda value: {"type": "polygonlabels", "from_name": "label", "to_name": "image", "value": value})  # fmt: skip
_any_regions = st.fixed_dictionaries(
    {},
    optional={
        "id": or_anything(_ids), "parentID": or_anything(_ids), "type": or_anything(st.sampled_from(KINDS)),
        "from_name": or_anything(st.sampled_from(["label", "other"])), "to_name": st.sampled_from(["image", "other"]),
        "value": _values, "image_rotation": st.sampled_from([0, 90, 180, 270, 45]) | numbers,
        "original_width": numbers, "original_height": numbers, "score": numbers, "meta": anything,
    },
)  # fmt: skip
_nested_polygons = st.builds(
    lambda region, own, parent: {**region, "id": own, "parentID": parent}, _polygons, _ids, _ids | st.none()
)
results = or_anything(st.lists(or_anything(_polygons | _nested_polygons | _any_regions), max_size=5))
_times = st.datetimes().map(lambda time: time.isoformat() + "Z") | st.sampled_from(
    ["2023-11-14T22:13:20Z", "never", ""]
)
annotations = or_anything(
    st.fixed_dictionaries(
        {"id": or_anything(st.integers(1, 9)), "result": results},
        optional={"was_cancelled": st.booleans(), "ground_truth": or_anything(st.booleans()), "draft": anything,
                  "updated_at": or_anything(_times), "created_at": or_anything(_times), "lead_time": numbers},
    )
)  # fmt: skip


_data = st.fixed_dictionaries({"image": or_anything(images)}, optional={"note": anything})
_several = or_anything(st.lists(annotations, max_size=3))
tasks = st.fixed_dictionaries(
    {"id": or_anything(st.integers(1, 99)), "data": or_anything(_data)},
    optional={"annotations": _several, "drafts": _several, "predictions": _several, "is_labeled": st.booleans()},
)


# Bodies of requests that must be answered with 200, whatever is wrong with the images and annotations in them


def _usable_predicts(uids: Sequence[str], configs: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"tasks": st.lists(tasks, max_size=3), "project": st.sampled_from(uids), "label_config": configs},
        optional={"params": st.none() | st.fixed_dictionaries({}, optional={"login": anything, "context": anything})},
    )


usable_setups = st.fixed_dictionaries(
    {"project": st.sampled_from(PROJECT_UIDS), "schema": usable_configs},
    optional={"hostname": texts, "access_token": texts, "extra_params": anything},
)
usable_predicts = _usable_predicts(PROJECT_UIDS, usable_configs)
usable_predicts_with_a_version = _usable_predicts(PROJECT_UIDS[:1], st.just(CONFIG) | usable_configs)
predicts_of_label_studios_images = st.sampled_from(LABEL_STUDIO_IMAGES).map(
    lambda image: {"tasks": [{"id": 1, "data": {"image": image}}], "project": PROJECT_UIDS[0], "label_config": CONFIG}
)
_hook_projects = st.sampled_from([*PROJECTS, *({"id": project["id"]} for project in PROJECTS)])
usable_webhooks = st.fixed_dictionaries(
    {"action": st.sampled_from(ACTIONS), "project": _hook_projects},
    optional={"task": or_anything(tasks), "annotation": annotations, "annotations": anything, "tasks": anything},
)


# Bodies of requests in which anything may be wrong

_no_uids = st.sampled_from(["7", "", "7.", "x.1", "../7.1", "9" * 400]) | anything
_configs = or_anything(st.just(CONFIG), otherwise=label_configs, one_in=2)
setups = st.fixed_dictionaries(
    {
        "project": or_anything(st.sampled_from(PROJECT_UIDS), otherwise=_no_uids, one_in=6),
        "schema": or_anything(_configs),
    },
    optional={"hostname": texts, "access_token": texts, "extra_params": anything},
)
predicts = st.fixed_dictionaries(
    {
        "tasks": or_anything(st.lists(or_anything(tasks), max_size=3), one_in=6),
        "project": or_anything(st.sampled_from(PROJECT_UIDS), otherwise=_no_uids, one_in=6),
        "label_config": or_anything(_configs),
    },
    optional={"params": anything},
)
webhooks = (
    st.fixed_dictionaries(
        {
            "action": or_anything(st.sampled_from(ACTIONS), one_in=4),
            "project": or_anything(_hook_projects, one_in=4),
        },
        optional={"task": or_anything(tasks), "annotation": annotations, "annotations": anything},
    )
    | anything
)


def as_json(body: object) -> bytes:
    """As Label Studio would write it, NaN and lone surrogates included."""
    return json.dumps(body).encode()
