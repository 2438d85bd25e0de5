"""What does not fit into memory is done in smaller pieces."""

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import TrainingConfig
from model.errors import TooLargeError
from model.memory import is_out_of_memory
from model.network import MaskRCNNWithScores
from model.predict import detect
from model.train import train
from tests.model.examples import ellipse, labeled_image, rectangle, tiny_network

CONFIG = TrainingConfig(epochs=2, batch_size=4, learning_rate=0.005, checkpoint_every_steps=1)  # 1 step an epoch
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four annotated images, and one that the model has labelled."""
    folder = tmp_path_factory.mktemp("images")
    return [
        labeled_image(folder, "a", (1, rectangle(8, 8, 30, 28)), (2, ellipse(24, 32, 60, 60))),
        labeled_image(folder, "bb", (1, rectangle(30, 10, 60, 40))),
        labeled_image(folder, "ccc", (2, ellipse(10, 10, 50, 40))),
        labeled_image(folder, "dddd"),
        labeled_image(folder, "eeeee", (2, ellipse(4, 4, 40, 40)), pseudo=True),
    ]


def small_memory(most: int, error: BaseException = NO_MEMORY, **options) -> tuple[MaskRCNNWithScores, list[int]]:
    """A real network on a device that has memory for so many images; and how many it was given each time."""
    network, sizes = tiny_network(frozen_batch_norm=True, **options), []

    def refuse(_, arguments):
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > most:
            raise error

    network.register_forward_pre_hook(refuse)
    return network, sizes


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        pytest.param(5, [5, 5], id="all fit"),
        pytest.param(4, [5, 3, 2, 3, 2], id="halved once"),
        pytest.param(2, [5, 3, 2, 2, 1, 2, 2, 1], id="halved twice"),
        pytest.param(1, [5, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], id="one by one"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_for_the_rest_of_the_run(most, expected, images, caplog):
    network, sizes = small_memory(most)
    with caplog.at_level(logging.WARNING):
        progress = train(network, images, CONFIG)
    assert sizes == expected
    assert len(caplog.messages) == len(set(caplog.messages)) == {5: 0, 4: 1, 2: 2, 1: 3}[most]
    assert progress.step == 2


def test_pieces_teach_nearly_what_the_whole_batch_teaches(images):
    """The same images in pieces: the gradient points the same way, each part of it is as large."""
    moved = {}
    for most in (5, 2, 1):
        network, _ = small_memory(most)
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        seen = []
        train(
            network, images, TrainingConfig(epochs=1, batch_size=4, beta=1.0, learning_rate=0.001), on_step=seen.append
        )
        step = torch.cat([(p.detach() - before[name]).flatten() for name, p in network.named_parameters()])
        moved[most] = step, seen[0]
    whole, progress = moved[5]
    for most in (2, 1):
        step, other = moved[most]
        assert torch.cosine_similarity(step, whole, dim=0) > 0.9
        assert float(step.norm()) == pytest.approx(float(whole.norm()), rel=0.3)
        assert other.losses.keys() == progress.losses.keys()
        assert other.loss == pytest.approx(progress.loss, rel=0.3)


def test_a_run_that_had_to_halve_can_be_gone_on_with_in_more_or_less_memory(images, tmp_path):
    class StopError(Exception):
        pass

    def stop(_):
        raise StopError

    for most in (1, 5):
        network, _ = small_memory(2)
        with pytest.raises(StopError):
            train(network, images, CONFIG, checkpoint=tmp_path / f"{most}", on_step=stop)
        network, sizes = small_memory(most)
        assert train(network, images, CONFIG, checkpoint=tmp_path / f"{most}").step == 2
        assert sizes[0] == 5  # one step was left


def test_one_image_that_does_not_fit_is_an_error_that_says_what_to_lower(images):
    network, _ = small_memory(0)
    with pytest.raises(TooLargeError, match=r"one image of up to \(64, 64\) pixels .* Lower the image size"):
        train(network, images, CONFIG)


def test_another_error_is_not_taken_for_a_lack_of_memory(images):
    network, sizes = small_memory(0, RuntimeError("expected scalar type Float but found Half"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        train(network, images, CONFIG)
    assert sizes == [5]


def test_detection_halves_a_batch_too_and_finds_the_same():
    pixels = [np.full((64, 64, 3), shade, dtype=np.uint8) for shade in (10, 90, 170, 250, 130)]
    network, sizes = small_memory(1)
    found = list(detect(network, pixels, batch_size=5))
    assert sizes == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    for one, many in zip(detect(network, pixels), found, strict=True):
        np.testing.assert_array_equal(one.class_scores, many.class_scores)
    network, _ = small_memory(0)
    with pytest.raises(TooLargeError, match="Lower the image size"):
        list(detect(network, pixels, batch_size=5))


def test_a_failed_allocation_of_the_cpu_is_known_by_its_words():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 50)
    assert is_out_of_memory(failed.value)
    with pytest.raises(MemoryError) as failed:
        bytearray(1 << 60)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("CUDA error: out of memory", id="CUDA"),
        pytest.param("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", id="cuBLAS"),
        pytest.param("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", id="cuDNN"),
        pytest.param("MPS backend out of memory (MPS allocated: 17.85 GB)", id="MPS"),
    ],
)
def test_other_devices_say_it_in_words_of_their_own(words):
    assert is_out_of_memory(RuntimeError(words))


LITTLE_MEMORY = """
    import logging, resource, sys
    from pathlib import Path
    import torch
    from tests.model.examples import labeled_image, rectangle, tiny_network
    from model.config import TrainingConfig
    from model.train import train

    torch.set_num_threads(1)
    logging.basicConfig(level="WARNING", format="%(message)s", stream=sys.stdout)
    folder = Path(sys.argv[1])
    images = [labeled_image(folder, "a" * n, (1, rectangle(8, 8, 30, 28))) for n in range(1, 9)]
    network = tiny_network()

    def take_memory(_, given):
        torch.empty(len(given[0]) * 500_000_000, dtype=torch.uint8)

    network.register_forward_pre_hook(take_memory)
    used = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + 1_800_000_000,) * 2)
    print(train(network, images, TrainingConfig(epochs=1, batch_size=8)).step)
"""


def test_training_goes_on_when_memory_really_ends(tmp_path):
    """A process with little address space left, and a network that takes 500 MB of it for each image."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[2])])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LITTLE_MEMORY), str(tmp_path)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "step 1: 8 images do not fit into memory, from now on 4 at a time",
        "step 1: 4 images do not fit into memory, from now on 2 at a time",
        "1",
    ]
