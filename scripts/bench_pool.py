"""A look at a pool as the worker does it, from files to lines of the scores file, against the plain loop that reads
image by image and calls torchvision's own Mask R-CNN.

Both have the same ResNet-50 at 800 px with the same weights, score threshold and 100 detections. torchvision's loop
predicts no IoU, computes no score and draws no polygon; it pastes each mask into the image.

Then a look at large JPEGs with the quickest network against that network alone: reading must not be what it waits for.
"""

import base64
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from ml_backend.label_config import parse_label_config
from ml_backend.ls_format import Json
from ml_backend.pool import Viewer, append_line, load_to_look
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.bfloat16 import has_bfloat16
from model.dataset import image_tensor, input_hw, load_image, load_seen
from model.inference import Precision
from model.strategies import look
from scripts.bench_predict import OPTIONS, SHOWN, draw_blobs, stages, torchvision_network
from scripts.bench_version import KEY, LABEL_CONFIG, VERSION, add_version, data_uri, environment
from scripts.make_phantoms import phantom

IMAGE_PX = 1024
IMAGES = 2  # of the pool that both look at
MEMORY_IMAGES = 40  # of the smaller of two pools
MIN_SIZE = 800
PHOTO_HW = (3000, 4000)  # 12 megapixels
PHOTOS = 12
PHOTO_MIN_SIZE = 256
PHOTO_DETECTIONS = 10
_ROOT = Path(__file__).resolve().parent.parent


def score_pool(options: Namespace) -> dict[str, Any]:
    """CPU seconds of a pool; `ratio` is that in float32, which is the default. Each precision has its own figures, also
    by wall time, which other processes on the same cores disturb."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        images = [_pixels(number) for number in range(IMAGES)]
        settings = environment(folder) | SHOWN | {"TSP_THREADS": str(options.threads)}
        network = add_version(
            settings,
            "resnet50_fpn",
            prepare=lambda made: draw_blobs(made, images[0]),
            min_size=MIN_SIZE,
            detections_per_image=100,
            **OPTIONS,
        )
        theirs = torchvision_network(network)
        paths = [folder / f"{number}.png" for number in range(IMAGES)]
        for path, pixels in zip(paths, images, strict=True):
            cv2.imwrite(str(path), pixels)
        ways: dict[str, Callable[[], int]] = {"theirs": lambda: _plain_loop(theirs, paths)}
        precisions: list[Precision] = ["float32", "bfloat16"] if has_bfloat16() else ["float32"]
        for precision in precisions:
            ways[precision] = _pool(settings | {"TSP_PRECISION": precision}, _addresses())
        measured = _in_turn(ways, options.rounds)
        shares = {
            precision: stages(Settings.model_validate(settings | {"TSP_PRECISION": precision}), paths[0], 2)
            for precision in precisions
        }
    return {
        **measured,
        "images": IMAGES,
        "image_px": IMAGE_PX,
        "input_px": MIN_SIZE,
        "detections": 100,
        "threads": options.threads,
        "rounds": options.rounds,
        "stages": shares,
        "photos": photos(options),
        "peak_memory_mb": {str(count): peak_memory_mb(count) for count in (MEMORY_IMAGES, 2 * MEMORY_IMAGES)},
    }


def photos(options: Namespace) -> dict[str, Any]:
    """JPEGs of `PHOTO_HW` seen by `efficientnet_lite0_fpn` at `PHOTO_MIN_SIZE`: the wall time of a look, files to lines
    and of the network alone on pixels of its input size; and CPU seconds of reading and of seeing one image."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        files = [folder / f"{number}.jpg" for number in range(IMAGES)]
        for number, file in enumerate(files):
            cv2.imwrite(str(file), _photo(number), [cv2.IMWRITE_JPEG_QUALITY, 90])
        settings = environment(folder) | SHOWN | {"TSP_THREADS": str(options.threads)}
        add_version(
            settings,
            "efficientnet_lite0_fpn",
            prepare=lambda made: draw_blobs(made, load_image(files[0])),
            min_size=PHOTO_MIN_SIZE,
            max_size=2 * PHOTO_MIN_SIZE,
            detections_per_image=PHOTO_DETECTIONS,
            score_threshold=0.0,
        )
        network, _ = load_to_look(Service.connect(Settings.model_validate(settings)), KEY, VERSION)
        hw = input_hw(PHOTO_HW, network.config)
        seen = [load_seen(file, PHOTO_HW, network.config) for file in files]

        def times(work: Callable[[int], object]) -> Callable[[], int]:
            """The work on the number of a file, as often as the pool has tasks."""
            return lambda: sum(work(number % IMAGES) is not None for number in range(PHOTOS))

        ways = {
            "look": _pool(settings, [_jpeg_uri(file.read_bytes()) for file in files], count=PHOTOS),
            "network": times(lambda number: look(network, seen[number], image_hw=PHOTO_HW)),
            "read": times(lambda number: load_seen(files[number], PHOTO_HW, network.config)),
            "read_whole": times(lambda number: image_tensor(load_image(files[number]), hw)),
        }
        wall, cpu = _timed_in_turn(ways, options.rounds, images=PHOTOS)
        megabytes = [file.stat().st_size / 1e6 for file in files]
    return {
        "image_hw": list(PHOTO_HW),
        "file_mb": round(float(np.mean(megabytes)), 1),
        "input_hw": list(hw),
        "detections": PHOTO_DETECTIONS,
        "images": PHOTOS,
        "images_per_second": {name: round(PHOTOS / float(np.median(wall[name])), 2) for name in ("look", "network")},
        "wall_ratio": round(_median_ratio(wall["look"], wall["network"]), 3),
        "cpu_seconds_of_one": {name: round(float(np.median(cpu[name])) / PHOTOS, 4) for name in ways},
        "read_share": round(_median_ratio(cpu["read"], cpu["look"]), 3),
        "read_by_network": round(_median_ratio(cpu["read"], cpu["network"]), 3),
    }


def peak_memory_mb(count: int) -> int:
    """The most that a process of its own takes while it looks at so many images, with `efficientnet_lite0_fpn`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        add_version(environment(Path(folder)), "efficientnet_lite0_fpn", score_threshold=0.0)
        command = [sys.executable, "-m", "scripts.bench_pool", folder, str(count)]
        return int(subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout)


def _look_and_print_peak(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    if (seen := _pool(environment(folder) | SHOWN, _addresses(), count=count)()) != count:
        raise RuntimeError(f"expected {count} lines, got {seen}")
    status = Path("/proc/self/status").read_text().splitlines()
    print(round(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024))


def _pool(environment_: dict[str, str], addresses: list[str], *, count: int = IMAGES) -> Callable[[], int]:
    """A look at so many tasks with the active version; gives the number of lines that tell what was seen."""
    service = Service.connect(Settings.model_validate(environment_))
    viewer = Viewer(service, KEY, VERSION, parse_label_config(LABEL_CONFIG))

    def tasks() -> Iterator[Json]:
        for number, address in enumerate(islice(cycle(addresses), count), start=1):
            yield {"id": number, "data": {"image": address}}

    def look() -> int:
        seen = 0
        with tempfile.TemporaryFile("w") as file, closing(viewer.lines(tasks())) as lines:
            for line in lines:
                append_line(file, line)
                seen += "result" in line
        return seen

    return look


def _plain_loop(network: torch.nn.Module, paths: list[Path]) -> int:
    seen = 0
    with torch.inference_mode():
        for path in paths:
            pixels = load_image(path)
            seen += "masks" in network([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])[0]
    return seen


def _in_turn(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, Any]:
    """Medians."""
    wall, cpu = _timed_in_turn(ways, rounds, images=IMAGES)
    measured: dict[str, Any] = {
        name: {
            "images_per_second": round(IMAGES / float(np.median(wall[name])), 3),
            "seconds": round(float(np.median(wall[name])), 3),
            "cpu_seconds": round(float(np.median(cpu[name])), 3),
            "times_as_fast": round(_median_ratio(wall["theirs"], wall[name]), 3),
            "times_as_fast_by_cpu": round(_median_ratio(cpu["theirs"], cpu[name]), 3),
        }
        for name in ways
    }
    return {
        "ours": measured["float32"]["cpu_seconds"],
        "theirs": measured["theirs"]["cpu_seconds"],
        "ratio": _median_ratio(cpu["float32"], cpu["theirs"]),
        "ways": measured,
    }


def _timed_in_turn(
    ways: dict[str, Callable[[], int]], rounds: int, *, images: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of each round; which goes first changes, a round before them warms up. Raises RuntimeError
    when a way has not seen so many images."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began, began_cpu = time.perf_counter(), time.process_time()
            if (seen := ways[name]()) != images:
                raise RuntimeError(f"{name}: expected {images} images, got {seen}")
            if number:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - began_cpu)
    return wall, cpu


def _median_ratio(first: list[float], second: list[float]) -> float:
    return float(np.median(np.array(first) / np.array(second)))


def _addresses() -> list[str]:
    return [data_uri(_pixels(number)) for number in range(IMAGES)]


def _pixels(number: int) -> NDArray[np.uint8]:
    grey = phantom(3 + number, IMAGE_PX, empty_fraction=0.0).image
    return np.repeat(grey[:, :, None], 3, axis=2)


def _photo(number: int) -> NDArray[np.uint8]:
    """With the noise of a camera, so that the file is as large as one of its photos."""
    pixels = cv2.resize(_pixels(number), PHOTO_HW[::-1], interpolation=cv2.INTER_CUBIC).astype(np.int16)
    noise = np.random.default_rng(number).normal(0, 6, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _jpeg_uri(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    _look_and_print_peak(Path(sys.argv[1]), int(sys.argv[2]))
