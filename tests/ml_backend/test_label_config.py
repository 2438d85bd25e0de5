import pytest
from label_studio_sdk.label_interface import LabelInterface

from ml_backend.errors import LabelConfigError
from ml_backend.label_config import MINIMAL_CONFIG, LabelConfig, parse_label_config

TWO_IMAGES = """
<View>
  <Image name="overview" value="$thumbnail"/>
  <Style>.wide {width: 100%}</Style>
  <View className="wide">
    <Header value="Outline every lesion"/>
    <View><Image name="slice" value="$ct" zoom="true"/></View>
    <RectangleLabels name="boxes" toName="slice"><Label value="artefact"/></RectangleLabels>
    <BrushLabels name="brush" toName="slice"><Label value="skull"/></BrushLabels>
    <Choices name="quality" toName="slice"><Choice value="good"/><Choice value="bad"/></Choices>
    <PolygonLabels name="lesions" toName="slice" strokeWidth="2">
      <View><Label value="bleeding" background="red"/></View>
      <Label value="infarct"/>
    </PolygonLabels>
  </View>
</View>
"""

TWO_CONTROLS = """
<View>
  <Image name="left" value="$left"/>
  <Image name="right" value="$right"/>
  <PolygonLabels name="first" toName="left"><Label value="a"/></PolygonLabels>
  <PolygonLabels name="second" toName="right"><Label value="b"/></PolygonLabels>
</View>
"""


def with_image(
    image: str, control: str = '<PolygonLabels name="p" toName="i"><Label value="a"/></PolygonLabels>'
) -> str:
    return f"<View>{image}{control}</View>"


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        pytest.param(MINIMAL_CONFIG, LabelConfig("label", "image", "image", ("object",), ("object",)), id="one label"),
        pytest.param(
            TWO_IMAGES,
            LabelConfig(
                "lesions",
                "slice",
                "ct",
                ("bleeding", "infarct"),
                ("bleeding", "infarct"),
                ("overview", "boxes", "brush", "quality"),
            ),
            id="nested, several images, other controls",
        ),
        pytest.param(
            TWO_CONTROLS,
            LabelConfig("first", "left", "left", ("a",), ("a",), ("right", "second")),
            id="two polygon controls",
        ),
        pytest.param(
            '<?xml version="1.0" encoding="utf-8"?><!-- made by hand -->'
            + with_image(
                '<Image name="i" value="$größe"/>',
                '<PolygonLabels name="p" toName="i"><Label value="ä"/></PolygonLabels>',
            ),
            LabelConfig("p", "i", "größe", ("ä",), ("ä",)),
            id="declaration, comment, other alphabets",
        ),
        pytest.param(
            with_image(
                '<Text name="t" value="$text"/><Image name="i" value="$scan.url"/>',
                '<PolygonLabels name="p" toName="t,i"><Label value="a"/></PolygonLabels>',
            ),
            LabelConfig("p", "i", "scan.url", ("a",), ("a",), ("t",)),
            id="several targets, path into the data",
        ),
        pytest.param(
            with_image(
                '<Image name="i" value="$image"/>',
                '<PolygonLabels name="t" toName="x"><Label value="z"/></PolygonLabels>'
                '<polygonlabels name="p" toName="i"><label value="a"/></polygonlabels>',
            ),
            LabelConfig("p", "i", "image", ("a",), ("a",), ("t",)),
            id="the first control points at no image, lower case",
        ),
        pytest.param(
            with_image(
                '<Image name="i" value="$image"/>',
                '<PolygonLabels name="p" toName="i"><Label value="Cell" alias="cell_1"/><Label value="b" alias=""/>'
                '<Label value="other" alias="cell_1"/><Label background="red"/></PolygonLabels>',
            ),
            LabelConfig("p", "i", "image", ("cell_1", "b"), ("Cell", "b")),
            id="aliases, repeated and nameless labels",
        ),
    ],
)
def test_the_polygon_control_and_its_image_are_found(xml: str, expected: LabelConfig) -> None:
    assert parse_label_config(xml) == expected


def test_a_control_can_be_chosen_by_name() -> None:
    assert parse_label_config(TWO_CONTROLS, from_name="second").to_name == "right"


def test_labels_are_the_ones_that_label_studio_accepts_in_results() -> None:
    xml = with_image(
        '<Image name="i" value="$image"/>',
        '<PolygonLabels name="p" toName="i"><Label value="Cell" alias="c"/><Label value="dot"/></PolygonLabels>',
    )
    assert list(parse_label_config(xml).labels) == LabelInterface(xml).get_control("p").labels


def test_a_label_is_known_by_its_alias_and_by_its_displayed_value() -> None:
    config = LabelConfig("p", "i", "image", ("c", "dot"), ("Cell", "dot"))
    assert [config.class_of(name) for name in ("c", "Cell", "dot", "other")] == [1, 1, 2, None]


REPEATED = """
<View>
  <Repeater on="$images">
    <Image name="i_{{idx}}" value="$images[{{idx}}]"/>
    <PolygonLabels name="p_{{idx}}" toName="i_{{idx}}"><Label value="a"/></PolygonLabels>
  </Repeater>
</View>
"""

BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    '<View><Image name="i" value="$image"/><PolygonLabels name="p" toName="i"><Label value="&b;"/>'
    "</PolygonLabels></View>"
)


@pytest.mark.parametrize(
    ("xml", "problem", "found"),
    [
        pytest.param("", "not well-formed", "no tags", id="empty"),
        pytest.param("<View><Image></View>", "not well-formed", "no tags", id="malformed"),
        pytest.param("<View>\ud800</View>", "refused", "no tags", id="not text"),
        pytest.param(BOMB, "refused", "no tags", id="entity bomb"),
        pytest.param('<!DOCTYPE x SYSTEM "file:///etc/hosts"><View/>', "refused", "no tags", id="DTD"),
        pytest.param("<View/>", "expected a PolygonLabels", "View", id="nothing in it"),
        pytest.param(
            with_image('<Image name="i" value="$image"/>', '<RectangleLabels name="r" toName="i"/>'),
            "expected a PolygonLabels",
            "View, Image, RectangleLabels",
            id="rectangles only",
        ),
        pytest.param(
            with_image('<Text name="i" value="$text"/>'),
            'name="p" toName="i"> points at no Image',
            "Text",
            id="no image",
        ),
        pytest.param(
            with_image('<Image name="i" value="$image"/>', '<PolygonLabels name="p" toName="i"/>'),
            "has no labels",
            "PolygonLabels",
            id="no labels",
        ),
        pytest.param(
            with_image('<Image name="i" value="$image"/>', '<PolygonLabels name="p" toName="i" value="$labels"/>'),
            "takes its labels from task data",
            "PolygonLabels",
            id="dynamic labels",
        ),
        pytest.param(
            with_image(
                '<Image name="i" value="$image"/>',
                '<PolygonLabels name="p" toName="i"><Label value="$name"/></PolygonLabels>',
            ),
            "takes its labels from task data",
            "Label",
            id="dynamic label",
        ),
        pytest.param(with_image('<Image name="i" valueList="$images"/>'), "list of images", "Image", id="value list"),
        pytest.param(with_image('<Image name="i" value="image"/>'), "one variable", "Image", id="value without dollar"),
        pytest.param(with_image('<Image name="i"/>'), "one variable", "Image", id="no value"),
        pytest.param(
            REPEATED,
            "outside of any Repeater",
            "View",
            id="repeater",
        ),
    ],
)
def test_an_unusable_configuration_gets_an_error_that_helps(xml: str, problem: str, found: str) -> None:
    with pytest.raises(LabelConfigError) as raised:
        parse_label_config(xml)
    message = str(raised.value)
    assert problem in message
    assert found in message.split("Tags found: ")[1].split(". A configuration")[0]
    assert message.endswith(MINIMAL_CONFIG)


def test_an_unknown_control_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(LabelConfigError, match="name='third', found only: first, second"):
        parse_label_config(TWO_CONTROLS, from_name="third")


def test_the_configuration_offered_for_pasting_is_valid_for_label_studio() -> None:
    LabelInterface(MINIMAL_CONFIG).validate()
