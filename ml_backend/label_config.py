"""Reads from a labelling configuration which control draws the polygons, on which image and in which classes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn
from xml.etree.ElementTree import Element, ParseError  # types only; the parsing below is defusedxml's

from defusedxml.ElementTree import fromstring  # type: ignore[import-untyped]

from ml_backend.errors import LabelConfigError

MINIMAL_CONFIG = """\
<View>
  <Image name="image" value="$image"/>
  <PolygonLabels name="label" toName="image">
    <Label value="object"/>
  </PolygonLabels>
</View>"""


@dataclass(frozen=True)
class LabelConfig:
    """One PolygonLabels control and the image it draws on.

    Class i + 1 is `labels[i]`, in the order of the configuration. `labels` holds what Label Studio writes into results:
    a label's `alias` if it has one, else its `value`. `displayed` holds the `value` of each, which results carry that
    were made before the alias was added; empty means the same as `labels`.
    """

    from_name: str
    to_name: str
    data_key: str  # of task["data"]; may be a path such as "scan.url"
    labels: tuple[str, ...]
    displayed: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()  # of the tags that are neither the control nor the image

    def class_of(self, label: str) -> int | None:
        """The class 1..C of a label in a result, None when the configuration does not know it."""
        for names in (self.labels, self.displayed):
            if label in names:
                return names.index(label) + 1
        return None


def parse_label_config(xml: str, *, from_name: str | None = None) -> LabelConfig:
    """The first PolygonLabels that points at an Image, or the one called `from_name`; LabelConfigError if unusable."""
    tags = _tags(xml)
    images = {tag.get("name", ""): tag for tag in tags if _is(tag, "Image")}
    control = _polygon_control(tags, images, from_name)
    to_name = _image_name(control, images)
    if to_name is None:
        _refuse(f"{_describe(control)} points at no Image: its toName must be the name of an Image", tags)
    labels = _labels(control, tags)
    return LabelConfig(
        from_name=control.get("name", ""),
        to_name=to_name,
        data_key=_data_key(images[to_name], tags),
        labels=tuple(labels),
        displayed=tuple(labels.values()),
        other_names=tuple(
            tag.get("name", "") for tag in tags if tag.get("name") not in (None, control.get("name"), to_name)
        ),
    )


def _tags(xml: str) -> list[Element]:
    """All tags in document order, without those inside a Repeater: their names exist only once a task is opened."""
    try:
        root: Element = fromstring(xml, forbid_dtd=True)
    except ParseError as error:
        raise LabelConfigError(_message(f"not well-formed XML ({error})", found="no tags")) from error
    except ValueError as error:  # defusedxml's refusal of a DTD or of entities; text that has no UTF-8 form
        raise LabelConfigError(_message(f"refused XML ({error})", found="no tags")) from error
    repeated = {id(tag) for repeater in root.iter() if _is(repeater, "Repeater") for tag in repeater.iter()}
    return [tag for tag in root.iter() if id(tag) not in repeated]


def _polygon_control(tags: Sequence[Element], images: dict[str, Element], from_name: str | None) -> Element:
    controls = [tag for tag in tags if _is(tag, "PolygonLabels") and tag.get("name")]
    if not controls:
        _refuse("expected a PolygonLabels tag with a name, outside of any Repeater", tags)
    if from_name is not None:
        named = [tag for tag in controls if tag.get("name") == from_name]
        if not named:
            names = ", ".join(tag.get("name", "") for tag in controls)
            _refuse(f"expected a PolygonLabels with name={from_name!r}, found only: {names}; mend TSP_FROM_NAME", tags)
        return named[0]
    return next((tag for tag in controls if _image_name(tag, images) is not None), controls[0])


def _image_name(control: Element, images: dict[str, Element]) -> str | None:
    """The first Image among the comma-separated names of `toName`."""
    return next((name for name in control.get("toName", "").split(",") if name in images), None)


def _labels(control: Element, tags: Sequence[Element]) -> dict[str, str]:
    """Name in results -> displayed name, in document order."""
    attributes = [control, *(tag for tag in control.iter() if _is(tag, "Label"))]
    if any(tag.get("value", "").startswith("$") for tag in attributes):
        _refuse(f"{_describe(control)} takes its labels from task data; write them out as Label tags", tags)
    labels: dict[str, str] = {}
    for tag in attributes[1:]:
        name = tag.get("alias") or tag.get("value")
        if name:
            labels.setdefault(name, tag.get("value") or name)
    if not labels:
        _refuse(f"{_describe(control)} has no labels; add a Label tag with a value for each class", tags)
    return labels


def _data_key(image: Element, tags: Sequence[Element]) -> str:
    if image.get("valueList"):
        _refuse(f'{_describe(image)} shows a list of images; use one image for each task, value="$image"', tags)
    match = re.fullmatch(r"\$([^\s,${}]+)", image.get("value", ""))
    if match is None:
        _refuse(f'{_describe(image)} needs one variable as its value, such as value="$image"', tags)
    return match[1]


def _is(tag: Element, name: str) -> bool:
    return tag.tag.lower() == name.lower()  # the editor does not mind the case of a tag


def _describe(tag: Element) -> str:
    attributes = "".join(f' {key}="{value}"' for key, value in tag.attrib.items() if key in _TELLING)
    return f"<{tag.tag}{attributes}>"


_TELLING = ("name", "toName", "value", "valueList")


def _refuse(problem: str, tags: Sequence[Element]) -> NoReturn:
    found = ", ".join(dict.fromkeys(tag.tag for tag in tags))
    raise LabelConfigError(_message(problem, found=found or "no tags"))


def _message(problem: str, *, found: str) -> str:
    return f"Labelling configuration: {problem}. Tags found: {found}.\nA configuration that works:\n{MINIMAL_CONFIG}"
