"""A look at a pool as the worker does it, from files to lines of the scores file, against the plain loop that reads
image by image and calls torchvision's own Mask R-CNN.

Both have the same ResNet-50 at 800 px with the same weights, score threshold and 100 detections. torchvision's loop
predicts no IoU, computes no score and draws no polygon; it pastes each mask into the image.
"""

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
from ml_backend.pool import Viewer, append_line
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.bfloat16 import has_bfloat16
from model.dataset import load_image
from model.inference import Precision
from scripts.bench_predict import OPTIONS, SHOWN, draw_blobs, stages, torchvision_network
from scripts.bench_version import KEY, LABEL_CONFIG, VERSION, add_version, data_uri, environment
from scripts.make_phantoms import phantom

IMAGE_PX = 1024
IMAGES = 2  # of the pool that both look at
MEMORY_IMAGES = 40  # of the smaller of two pools
MIN_SIZE = 800
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
            ways[precision] = _pool(settings | {"TSP_PRECISION": precision})
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
        "peak_memory_mb": {str(count): peak_memory_mb(count) for count in (MEMORY_IMAGES, 2 * MEMORY_IMAGES)},
    }


def peak_memory_mb(count: int) -> int:
    """The most that a process of its own takes while it looks at so many images, with `efficientnet_lite0_fpn`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        add_version(environment(Path(folder)), "efficientnet_lite0_fpn", score_threshold=0.0)
        command = [sys.executable, "-m", "scripts.bench_pool", folder, str(count)]
        return int(subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout)


def _look_and_print_peak(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    if (seen := _pool(environment(folder) | SHOWN, count=count)()) != count:
        raise RuntimeError(f"expected {count} lines, got {seen}")
    status = Path("/proc/self/status").read_text().splitlines()
    print(round(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024))


def _pool(environment_: dict[str, str], *, count: int = IMAGES) -> Callable[[], int]:
    """A look at so many tasks with the active version; gives the number of lines that tell what was seen."""
    service = Service.connect(Settings.model_validate(environment_))
    viewer = Viewer(service, KEY, VERSION, parse_label_config(LABEL_CONFIG))
    addresses = [data_uri(_pixels(number)) for number in range(IMAGES)]

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
    """Medians; which goes first changes, one round warms up."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began, began_cpu = time.perf_counter(), time.process_time()
            if (seen := ways[name]()) != IMAGES:
                raise RuntimeError(f"{name}: expected {IMAGES} images, got {seen}")
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
    measured: dict[str, Any] = {
        name: {
            "images_per_second": round(IMAGES / float(np.median(wall[name][1:])), 3),
            "seconds": round(float(np.median(wall[name][1:])), 3),
            "cpu_seconds": round(float(np.median(cpu[name][1:])), 3),
            "times_as_fast": round(_median_ratio(wall["theirs"], wall[name]), 3),
            "times_as_fast_by_cpu": round(_median_ratio(cpu["theirs"], cpu[name]), 3),
        }
        for name in names
    }
    return {
        "ours": measured["float32"]["cpu_seconds"],
        "theirs": measured["theirs"]["cpu_seconds"],
        "ratio": _median_ratio(cpu["float32"], cpu["theirs"]),
        "ways": measured,
    }


def _median_ratio(first: list[float], second: list[float]) -> float:
    return float(np.median(np.array(first[1:]) / np.array(second[1:])))


def _pixels(number: int) -> NDArray[np.uint8]:
    grey = phantom(3 + number, IMAGE_PX, empty_fraction=0.0).image
    return np.repeat(grey[:, :, None], 3, axis=2)


if __name__ == "__main__":
    _look_and_print_peak(Path(sys.argv[1]), int(sys.argv[2]))
