"""Training by several processes: real ones, started by torchrun, that meet by gloo."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch

from model.config import NetworkConfig, TrainingConfig
from model.dataset import LabeledSet, TrainingSteps, write_coco
from model.distributed import Ranks
from model.errors import ImageFileError, InvalidInputError
from model.files import read_tensors
from model.together import train_in_processes
from tests.model.examples import ellipse, labeled_image, rectangle, tiny_network

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {"epochs": 3, "batch_size": 4, "learning_rate": 0.005, "beta": 0.5, "checkpoint_every_steps": 2}
STEPS = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven annotated images with one to three instances or none, and three that the model has labelled."""
    folder = tmp_path_factory.mktemp("images")
    shapes = [(1, rectangle(8, 8, 30, 28)), (2, ellipse(24, 32, 60, 60)), (1, rectangle(40, 2, 62, 20))]
    annotated = [labeled_image(folder, "a" * (n + 1), *shapes[: n % 4]) for n in range(7)]
    pseudo = [labeled_image(folder, "p" * (n + 1), shapes[n], pseudo=True) for n in range(3)]
    return [*annotated, *pseudo]


@pytest.fixture(scope="module")
def place(images, tmp_path_factory):
    return written(tmp_path_factory.mktemp("trainings"), images, TRAINING)


def written(folder, images, training):
    """The folder, with what the processes read."""
    write_coco(folder / "coco.json", LabeledSet(images=tuple(images), class_names=("one", "two")))
    (folder / "training.json").write_text(json.dumps(training))
    return folder


def run(folder, processes, *, dies="nobody"):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "tests.model.one_of_several", str(folder), dies]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def trained(folder, processes):
    """The losses by step of a training by so many processes, and the weights each of them ends with."""
    done = run(folder, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return lines, [read_tensors(folder / f"weights-{rank}.safetensors")[0] for rank in range(processes)]


@pytest.fixture(scope="module")
def by_two(place):
    return trained(place / "two", 2)


def test_two_processes_have_the_loss_curve_of_one_with_the_same_images(place, by_two):
    by_one, _ = trained(place / "one", 1)
    lines, _ = by_two
    assert [step for step, *_ in lines] == list(range(1, STEPS + 1))
    for (_, loss, losses), (_, expected, all_expected) in zip(lines, by_one, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)
        assert losses == pytest.approx(all_expected, rel=1e-3, abs=1e-5)
    assert any(name.startswith("semi_") for name in lines[0][2])
    assert lines[-1][1] < lines[0][1]


def test_so_they_have_with_adamw_one_cycle_clipped_gradients_and_a_teacher(images, tmp_path):
    """The teacher, whose weights they end with, labels the images from step 4 on."""
    options = {"optimizer": "adamw", "schedule": "one_cycle", "gradient_clip": 0.5, "ema_decay": 0.9}
    place = written(tmp_path, images, {**TRAINING, **options, "learning_rate": 0.001, "ema_burn_in": 0.5})
    (by_one, _), (lines, (first, second)) = trained(place / "one", 1), trained(place / "two", 2)
    assert [step for step, *_ in lines] == list(range(1, STEPS + 1))
    for (_, loss, losses), (_, expected, all_expected) in zip(lines, by_one, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)
        assert losses == pytest.approx(all_expected, rel=1e-3, abs=1e-5)
    before, after = (lines[number][2]["semi_loss_objectness"] for number in (2, 3))
    assert after > 10 * before  # the teacher, which trusts everything here, sees more than the labels said
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def test_all_processes_end_with_the_same_weights(by_two):
    first, second = by_two[1]
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def test_a_training_of_which_one_process_was_killed_ends_with_the_same_weights(place, by_two):
    """Checkpoints are at 2, 4 and 6: after the death in step 3, step 3 is done again."""
    folder = place / "killed"
    assert run(folder, 2, dies="0:3").returncode != 0  # the others do not wait for it
    lines, weights = trained(folder, 2)
    assert [step for step, *_ in lines][-4:] == [3, 4, 5, 6]
    assert [step for step, *_ in lines].count(1) == 1
    for name, tensor in by_two[1][0].items():
        assert torch.equal(weights[0][name], tensor), name


def test_every_image_of_a_step_is_taken_by_one_process(images):
    network, training = NetworkConfig.for_profile("efficientnet_lite0_fpn", 3, min_size=64), TrainingConfig(**TRAINING)
    whole = TrainingSteps(images, network=network, training=training, share=(0, 1))
    for step in range(len(whole)):
        shares = [TrainingSteps(images, network=network, training=training, share=(rank, 3))[step] for rank in range(3)]
        tensors, targets = whole[step]
        seeds = [[target["seed"] for target in share[1]] for share in shares]
        assert sorted(chain(*seeds)) == sorted(target["seed"] for target in targets)
        assert len(set(chain(*seeds))) == len(targets) == 5
        by_seed = {target["seed"]: image for target, image in zip(targets, tensors, strict=True)}
        for share, share_seeds in zip(shares, seeds, strict=True):
            assert all(torch.equal(image, by_seed[seed]) for image, seed in zip(share[0], share_seeds, strict=True))
            assert any(not target["pseudo"] for target in share[1])


def test_more_processes_than_images_in_a_step_are_refused(images):
    network, training = NetworkConfig.for_profile("efficientnet_lite0_fpn", 3), TrainingConfig(batch_size=2)
    with pytest.raises(InvalidInputError, match="each of 3 processes needs an annotated image in every step"):
        TrainingSteps(images, network=network, training=training, share=(0, 3))


def test_a_process_outside_of_torchrun_is_told_how_to_start(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(InvalidInputError, match="torchrun --nproc-per-node 2"):
        Ranks.join()


def test_processes_that_would_go_on_at_different_steps_do_not_train(tmp_path):
    """As when the folder that machines share shows an older checkpoint on one of them."""
    program = tmp_path / "start.py"
    program.write_text(
        "from torch import nn\nfrom model.distributed import Ranks\nranks = Ranks.join()\n"
        "ranks.start_alike(nn.Linear(1, 1), 50 * (1 + ranks.rank))\nprint('trains')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "trains" not in done.stdout
    assert "expected that all processes see one checkpoint, got steps 50 to 100" in done.stderr


# --- started by `train_in_processes`


def test_processes_that_we_start_train_as_those_of_torchrun_do(images, by_two, tmp_path):
    network, steps = tiny_network(frozen_batch_norm=True), []
    checkpoint = tmp_path / "checkpoint.safetensors"
    options = {"processes": 2, "checkpoint": checkpoint, "on_step": steps.append}
    progress = train_in_processes(network, images, TrainingConfig(**TRAINING, milestones=(2, 4)), **options)
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert progress == steps[-1]
    for name, tensor in by_two[1][0].items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("rank", [0, 1])
def test_after_the_death_of_a_process_all_are_started_again(images, by_two, tmp_path, caplog, rank):
    network, steps = tiny_network(frozen_batch_norm=True), []

    def on_step(progress):
        steps.append(progress.step)
        if steps == [1, 2, 3]:
            (victim,) = (process for process in processes_of(tmp_path) if rank_of(process) == rank)
            os.kill(victim, signal.SIGKILL)

    config = TrainingConfig(**TRAINING, milestones=(2, 4))
    train_in_processes(network, images, config, processes=2, checkpoint=tmp_path / "c.safetensors", on_step=on_step)
    assert caplog.text.count("one of 2 training processes ended with 1; all go on from the checkpoint") == 1
    assert steps[:3] == [1, 2, 3]
    assert steps[-1] == STEPS
    for name, tensor in by_two[1][0].items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_more_processes_than_annotated_images_are_refused_before_they_start(images, tmp_path):
    few = [image for image in images if image.pseudo or image.image_id == images[0].image_id]
    options = {"processes": 2, "checkpoint": tmp_path / "c.safetensors"}
    with pytest.raises(
        InvalidInputError, match=r"annotated image \(1\).*got 2: annotate more images, or train with fewer"
    ):
        train_in_processes(tiny_network(), few, TrainingConfig(**TRAINING), **options)
    assert list(tmp_path.iterdir()) == []


def test_what_a_process_reports_is_raised_here(images, tmp_path):
    broken = dataclasses.replace(images[0], path=tmp_path / "missing.png")
    options = {"processes": 2, "checkpoint": tmp_path / "c.safetensors"}
    with pytest.raises(ImageFileError, match=r"missing\.png: expected an image"):
        train_in_processes(tiny_network(), [broken, *images[1:]], TrainingConfig(**TRAINING), **options)
    assert processes_of(tmp_path) == []


def test_the_processes_end_with_the_one_that_started_them_however_that_ends(place, tmp_path):
    command = [sys.executable, "-m", "tests.model.starts_others", str(place / "coco.json"), str(tmp_path / "c")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline() == "step 1\n"
        assert len(processes_of(tmp_path)) == 2
        started.kill()
    until = time.monotonic() + 60
    while processes_of(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.1)


def processes_of(folder):
    """Ids of the processes, but not of those that start them, that train with a checkpoint in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if f"{folder}/together-".encode() in command and b"model.agent" not in command:
            found.append(int(process.name))
    return sorted(found)


def rank_of(process):
    pairs = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next(int(pair[5:]) for pair in pairs if pair.startswith(b"RANK="))
