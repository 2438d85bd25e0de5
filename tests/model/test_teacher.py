"""The moving average by hand, what the teacher says, and that runs with it resume with the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import PseudoLabelConfig, TrainingConfig
from model.errors import CheckpointError, InvalidInputError
from model.files import read_tensors
from model.teacher import Teacher
from model.train import load_trained, train
from tests.model.examples import ellipse, image, labeled_image, rectangle, tiny_network
from tests.model.test_train import InterruptionError, assert_same_bits, interrupt_after

EVERYTHING = PseudoLabelConfig(class_threshold=0, box_threshold=0, mask_threshold=0)
CONFIG = TrainingConfig(
    epochs=2, batch_size=1, learning_rate=0.005, checkpoint_every_steps=2, ema_decay=0.9, ema_burn_in=0.3,
    ramp_up=0.5, soft_weights=True, pseudo_negatives="outside_ignored", beta=0.5,
)  # fmt: skip
STEPS = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three annotated images, one that the model labelled, and one in which it has not found anything yet."""
    folder = tmp_path_factory.mktemp("images")
    labeled = labeled_image(folder, "dddd", (2, ellipse(4, 4, 40, 40)), pseudo=True)
    return [
        labeled_image(folder, "a", (1, rectangle(8, 8, 30, 28)), (2, ellipse(24, 32, 60, 60))),
        labeled_image(folder, "bb", (1, rectangle(30, 10, 60, 40))),
        labeled_image(folder, "ccc"),
        replace(labeled, triplets=np.array([[0.9, 0.8, 0.7]]), ignored_boxes_xyxy=np.array([[40.0, 40, 60, 60]])),
        labeled_image(folder, "eeeee", pseudo=True),
    ]


def weight(network):
    return network.roi_heads.box_predictor.cls_score.weight


def test_the_teacher_is_the_moving_average_of_its_student():
    student = tiny_network()
    teacher = Teacher(student, 0.5)
    first = weight(student).detach().clone()
    with torch.no_grad():
        weight(student).add_(1)
    teacher.follow(100)
    torch.testing.assert_close(weight(teacher.network), first + 0.5)
    teacher.follow(101)
    torch.testing.assert_close(weight(teacher.network), first + 0.75)
    torch.testing.assert_close(weight(student), first + 1)


def test_the_first_steps_count_more():
    student = tiny_network()
    teacher = Teacher(student, 0.999)
    first = weight(student).detach().clone()
    with torch.no_grad():
        weight(student).add_(1)
    teacher.follow(1)
    torch.testing.assert_close(weight(teacher.network), first + 1 - 2 / 11)


def test_weights_that_stay_stay_to_the_bit_and_nothing_of_the_teacher_is_trained():
    student = tiny_network()
    teacher = Teacher(student, 0.99)
    for step in range(5):
        teacher.follow(step)
    assert_same_bits(teacher.network.state_dict(), student.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert not teacher.network.training
    assert student.training


def test_the_teacher_labels_what_it_trusts_and_ignores_the_rest():
    teacher = Teacher(tiny_network(score_threshold=0.0), 0.9)
    views = [image(seed=1), image((64, 80), seed=2)]
    for targets, trusts in (
        (teacher.targets(views, CONFIG, replace(EVERYTHING, ignore_threshold=0.0)), True),
        (teacher.targets(views, CONFIG, replace(EVERYTHING, ignore_threshold=0.0, class_threshold=1)), False),
    ):
        for target, view in zip(targets, views, strict=True):
            count = len(target["labels"])
            assert target["pseudo"]
            assert (count > 0) is trusts
            assert target["masks"].shape == (count, *view.shape[1:])
            assert target["weights"].shape == (count, 3)
            assert trusts or len(target["ignored"]) > 0
    assert teacher.targets([], CONFIG, EVERYTHING) == []


def test_fields_that_the_settings_do_not_use_are_left_out():
    teacher = Teacher(tiny_network(score_threshold=0.0), 0.9)
    (target,) = teacher.targets([image()], TrainingConfig(ema_decay=0.9), EVERYTHING)
    assert set(target) == {"boxes", "labels", "masks", "pseudo"}


# --- training


@pytest.fixture(scope="module")
def uninterrupted(images):
    network, losses = tiny_network(), []
    train(network, images, CONFIG, pseudo=EVERYTHING, on_step=lambda progress: losses.append(progress.losses))
    assert all(any(name.startswith("semi_") for name in step) for step in losses)
    return network.state_dict()


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_training_with_a_teacher_that_was_interrupted_ends_with_the_same_bits(step, images, uninterrupted, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(InterruptionError):
        train(tiny_network(), images, CONFIG, pseudo=EVERYTHING, checkpoint=checkpoint, on_step=interrupt_after(step))
    network = tiny_network(seed=1) if checkpoint.exists() else tiny_network()
    torch.manual_seed(99)
    train(network, images, CONFIG, pseudo=EVERYTHING, checkpoint=checkpoint)
    assert_same_bits(network.state_dict(), uninterrupted)
    again = tiny_network(seed=2)
    assert train(again, images, CONFIG, pseudo=EVERYTHING, checkpoint=checkpoint) is None
    assert_same_bits(again.state_dict(), uninterrupted)


def test_the_teacher_is_what_is_left_in_the_network(images, tmp_path):
    network = tiny_network()
    train(network, images, CONFIG, pseudo=EVERYTHING, checkpoint=tmp_path / "c")
    tensors, _ = read_tensors(tmp_path / "c")
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(network.state_dict()[name], tensors[f"teacher.{name}"])
    assert not torch.equal(tensors[f"network.{name}"], tensors[f"teacher.{name}"])


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, ema_decay=0.0)], ids=["a teacher", "no teacher"])
def test_the_checkpoint_gives_the_network_that_training_left(images, tmp_path, config):
    network, other, checkpoint = tiny_network(), tiny_network(seed=1), tmp_path / "c.safetensors"
    train(network, images, config, pseudo=EVERYTHING, checkpoint=checkpoint)
    load_trained(other, checkpoint)
    assert_same_bits(other.state_dict(), network.state_dict())
    assert not other.training
    assert_same_bits(tiny_network(weights=str(checkpoint), seed=2).state_dict(), network.state_dict())


def test_what_the_teacher_trusts_changes_the_weights(images, uninterrupted):
    network = tiny_network()
    train(network, images, CONFIG, pseudo=PseudoLabelConfig())
    assert not torch.equal(weight(network), uninterrupted["roi_heads.box_predictor.cls_score.weight"])


def test_before_the_burn_in_is_over_the_given_labels_count_and_what_the_teacher_trusts_does_not(images):
    networks = []
    for pseudo in (EVERYTHING, PseudoLabelConfig()):
        networks.append(tiny_network())
        train(networks[-1], images, replace(CONFIG, ema_burn_in=1.0), pseudo=pseudo)
    assert_same_bits(networks[0].state_dict(), networks[1].state_dict())


def test_a_teacher_that_is_not_told_what_to_trust_is_refused_unless_it_has_nothing_to_label(images):
    with pytest.raises(InvalidInputError, match="pass `pseudo`"):
        train(tiny_network(), images, CONFIG)
    train(tiny_network(), images[:3], CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"pseudo": replace(EVERYTHING, box_threshold=0.1)},
        {"class_thresholds": np.array([0.5, 0.6])},
        {"config": replace(CONFIG, ema_decay=0.8)},
        {"config": replace(CONFIG, ema_burn_in=0.4)},
        {"config": replace(CONFIG, ramp_up=0.4)},
        {"config": replace(CONFIG, soft_weights=False)},
        {"config": replace(CONFIG, pseudo_negatives="none")},
        {"triplets": np.array([[0.9, 0.8, 0.6]])},
        {"ignored_boxes_xyxy": np.zeros((0, 4))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_setting_is_another_run(changes, images, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(InterruptionError):
        train(tiny_network(), images, CONFIG, pseudo=EVERYTHING, checkpoint=checkpoint, on_step=interrupt_after(2))
    fields = {name: value for name, value in changes.items() if name in ("triplets", "ignored_boxes_xyxy")}
    others = [*images[:3], replace(images[3], **fields), images[4]]
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(
            tiny_network(), others, changes.get("config", CONFIG), pseudo=changes.get("pseudo", EVERYTHING),
            class_thresholds=changes.get("class_thresholds"), checkpoint=checkpoint,
        )  # fmt: skip
