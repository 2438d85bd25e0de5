"""Images as the network sees them: large JPEGs are decoded reduced, and stay where and what they are."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.config import NetworkConfig
from model.dataset import image_tensor, input_hw, load_image, load_seen
from model.errors import ImageFileError
from tests.model.examples import TINY

CONFIG = NetworkConfig.for_profile("efficientnet_lite0_fpn", 3, **{**TINY, "min_size": 32, "max_size": 48})
LARGE = (404, 532)  # decoded at a half
FACTORS = {cv2.IMREAD_REDUCED_COLOR_2: 2, cv2.IMREAD_REDUCED_COLOR_4: 4, cv2.IMREAD_REDUCED_COLOR_8: 8}


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By how much each image was reduced when it was decoded."""
    read, told = cv2.imread, []

    def imread(path: str, flags: int) -> Any:
        told.append(FACTORS.get(flags, 1))
        return read(path, flags)

    monkeypatch.setattr(cv2, "imread", imread)
    return told


def photo(hw: tuple[int, int] = LARGE, *, seed: int = 0) -> Image.Image:
    """Details of some 50 pixels, with noise."""
    random = np.random.default_rng(seed)
    details = random.integers(0, 256, (hw[0] // 50 + 2, hw[1] // 50 + 2, 3)).astype(np.float32)
    pixels = cv2.resize(details, hw[::-1], interpolation=cv2.INTER_CUBIC) + random.normal(0, 10, (*hw, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def turned(orientation: int) -> dict[str, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def whole(path: Path) -> NDArray[np.float64]:
    """What training sees of the image, in grey values."""
    pixels = load_image(path)
    tensor = image_tensor(pixels, input_hw((pixels.shape[0], pixels.shape[1]), CONFIG))
    return (tensor * 255).permute(1, 2, 0).numpy().astype(np.float64)


@pytest.mark.parametrize(
    ("hw", "factor"),
    [
        pytest.param((255, 296), 1, id="just too small"),
        pytest.param((256, 320), 2, id="a half"),
        pytest.param((320, 256), 2, id="upright"),
        pytest.param((510, 640), 2, id="not quite a quarter"),
        pytest.param((512, 640), 4, id="a quarter"),
        pytest.param((1024, 1280), 8, id="an eighth"),
        pytest.param((1028, 1280), 4, id="an eighth would not be whole"),
        pytest.param((1024, 1282), 2, id="nor a quarter"),
        pytest.param((1024, 1281), 1, id="nor a half"),
        pytest.param((2560, 2560), 8, id="no more than an eighth"),
        pytest.param((136, 2000), 8, id="by the longer side when that limits the input"),
        pytest.param((20, 30), 1, id="smaller than the input"),
    ],
)
def test_a_jpeg_is_reduced_as_far_as_four_times_the_input_is_left(
    hw: tuple[int, int], factor: int, factors: list[int], tmp_path: Path
) -> None:
    photo(hw).save(tmp_path / "a.jpg")
    seen = load_seen(tmp_path / "a.jpg", hw, CONFIG)
    assert (seen.shape, seen.dtype) == ((*input_hw(hw, CONFIG), 3), np.uint8)
    assert factors == [factor]
    expected = whole(tmp_path / "a.jpg")
    if factor == 1:
        np.testing.assert_array_equal(seen, expected)
    else:
        assert np.abs(seen - expected).mean() < 1


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        pytest.param("RGB", {}, id="colour"),
        pytest.param("RGB", {"subsampling": 0}, id="colour at full size"),
        pytest.param("RGB", {"progressive": True}, id="progressive"),
        pytest.param("L", {}, id="grey"),
        pytest.param("CMYK", {}, id="four inks"),
        *(pytest.param("RGB", turned(n), id=f"orientation {n}") for n in range(1, 9)),
    ],
)
def test_looking_and_training_see_nearly_the_same(
    mode: str, options: dict[str, Any], factors: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "a.jpg"
    photo().convert(mode).save(path, quality=95, **options)
    expected = whole(path)
    hw = load_image(path).shape[:2]
    factors.clear()
    seen = load_seen(path, (hw[0], hw[1]), CONFIG)
    assert factors == [2]
    assert (seen.shape, seen.flags.c_contiguous) == (expected.shape, True)
    difference = np.abs(seen - expected)
    assert difference.mean() < 1
    assert difference.max() <= 5
    if mode == "L":
        assert (seen == seen[:, :, :1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_lies_in_a_corner_stays_there(orientation: int, factors: list[int], tmp_path: Path) -> None:
    """To a fiftieth of a pixel of the input."""
    hw, path = (1032, 1384), tmp_path / "a.jpg"
    pixels = np.zeros(hw, dtype=np.uint8)
    for x in (70, hw[1] - 71):
        for y in (70, hw[0] - 71):
            cv2.circle(pixels, (x, y), 60, (255,), cv2.FILLED)
    Image.fromarray(pixels).save(path, **turned(orientation))
    seen = load_seen(path, hw if orientation < 5 else hw[::-1], CONFIG)
    assert factors == [8]
    expected = whole(path)
    assert seen.shape == expected.shape
    rows, columns = expected.shape[0] // 2, expected.shape[1] // 2
    for corner in (np.s_[:rows, :columns], np.s_[:rows, columns:], np.s_[rows:, :columns], np.s_[rows:, columns:]):
        np.testing.assert_allclose(centre_yx(seen[corner]), centre_yx(expected[corner]), atol=0.02)


def centre_yx(pixels: NDArray[Any]) -> tuple[float, float]:
    """The centre of what is bright."""
    grey = pixels[:, :, 0].astype(float)
    y, x = np.mgrid[: grey.shape[0], : grey.shape[1]]
    return float((grey * y).sum() / grey.sum()), float((grey * x).sum() / grey.sum())


@pytest.mark.parametrize("kind", ["png", "tif", "webp", "bmp"])
@pytest.mark.parametrize("name", ["a.{}", "a.jpg"], ids=["named as it is", "named as a JPEG"])
def test_other_files_are_read_whole(kind: str, name: str, factors: list[int], tmp_path: Path) -> None:
    path = tmp_path / name.format(kind)
    photo().save(path, "TIFF" if kind == "tif" else kind)
    np.testing.assert_array_equal(load_seen(path, LARGE, CONFIG), whole(path))
    assert set(factors) == {1}


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_of_sixteen_bits_the_upper_eight_are_seen(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"deep.{kind}"
    cv2.imwrite(str(path), np.asarray(photo()).astype(np.uint16) * 257)
    np.testing.assert_array_equal(load_seen(path, LARGE, CONFIG), whole(path))
    cv2.imwrite(str(path), np.asarray(photo()).astype(np.uint16) * 16)
    with pytest.raises(ImageFileError, match="window the image to 8 bits"):
        load_seen(path, LARGE, CONFIG)


def test_a_jpeg_is_known_by_its_content(factors: list[int], tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png", "JPEG")
    load_seen(tmp_path / "a.png", LARGE, CONFIG)
    assert factors == [2]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: None, id="missing"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: b"no image", id="something else"),
        pytest.param(lambda content: content[:3], id="no more than a JPEG's first bytes"),
        pytest.param(lambda content: content[:300], id="cut off in its header"),
    ],
)
def test_a_damaged_file_is_refused_as_when_it_is_read_whole(
    damage: Callable[[bytes], bytes | None], tmp_path: Path
) -> None:
    path = tmp_path / "a.jpg"
    photo().save(path)
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageFileError) as expected:
        load_image(path)
    with pytest.raises(ImageFileError) as told:
        load_seen(path, LARGE, CONFIG)
    assert str(told.value) == str(expected.value)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_are_refused_or_passed_over_as_when_all_is_read(seed: int, tmp_path: Path) -> None:
    path, random = tmp_path / "a.jpg", np.random.default_rng(seed)
    photo().save(path)
    content = bytearray(path.read_bytes())
    if seed % 2:
        del content[int(random.integers(len(content))) :]
    for _ in range(3):
        content[int(random.integers(len(content)))] = int(random.integers(256))
    path.write_bytes(content)
    pixels = cv2.imread(str(path))
    with nullcontext() if pixels is not None else pytest.raises(ImageFileError, match="that OpenCV can read"):
        assert load_image(path).shape == pixels.shape
    with nullcontext() if pixels is not None else pytest.raises(ImageFileError, match="that OpenCV can read"):
        assert load_seen(path, LARGE if pixels is None else pixels.shape[:2], CONFIG).ndim == 3


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("stated", [(532, 404), (410, 532), (20, 30)], ids=["turned", "higher", "small"])
def test_an_image_of_another_size_than_stated_is_refused_by_name(
    kind: str, stated: tuple[int, int], tmp_path: Path
) -> None:
    photo().save(tmp_path / f"a.{kind}")
    with pytest.raises(ImageFileError, match=rf"a\.{kind}: expected an image of size \({stated[0]}, {stated[1]}\), "):
        load_seen(tmp_path / f"a.{kind}", stated, CONFIG)
