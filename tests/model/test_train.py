import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from model.config import TrainingConfig
from model.dataset import load_image
from model.errors import CheckpointError, DatasetError, InvalidInputError, NonFiniteLossError
from model.evaluate import evaluate
from model.files import read_tensors, write_tensors
from model.predict import detect
from model.train import beta, learning_rate, train
from tests.model.examples import ellipse, labeled_image, rectangle, tiny_network

CONFIG = TrainingConfig(epochs=2, batch_size=1, learning_rate=0.005, checkpoint_every_steps=2)  # 3 steps an epoch
STEPS = 6


class InterruptionError(Exception):
    pass


def interrupt_after(step):
    def on_step(progress):
        if progress.step == step:
            raise InterruptionError

    return on_step


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three annotated images, one of them empty, and two that the model has labelled."""
    folder = tmp_path_factory.mktemp("images")
    return [
        labeled_image(folder, "a", (1, rectangle(8, 8, 30, 28)), (2, ellipse(24, 32, 60, 60))),
        labeled_image(folder, "bb", (1, rectangle(30, 10, 60, 40))),
        labeled_image(folder, "ccc"),
        labeled_image(folder, "dddd", (2, ellipse(4, 4, 40, 40)), pseudo=True),
        labeled_image(folder, "eeeee", (1, rectangle(20, 20, 50, 60)), pseudo=True),
    ]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The checkpoint of a whole run and what came out of it."""
    network, checkpoint = tiny_network(), tmp_path_factory.mktemp("finished") / "checkpoint"
    progress = train(network, images, CONFIG, checkpoint=checkpoint)
    assert (progress.step, progress.steps) == (STEPS, STEPS)
    return checkpoint, network.state_dict()


@pytest.fixture(scope="module")
def uninterrupted(finished):
    return finished[1]


def assert_same_bits(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


# --- resuming


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_training_that_was_interrupted_ends_with_the_same_bits(step, images, uninterrupted, tmp_path):
    """Checkpoints are at 2, 4 and 6; the steps since the last one are done again."""
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(InterruptionError):
        train(tiny_network(), images, CONFIG, checkpoint=checkpoint, on_step=interrupt_after(step))
    assert checkpoint.exists() is (step >= 2)

    other = tiny_network(seed=1)  # what it starts from no longer matters once there is a checkpoint
    network = other if checkpoint.exists() else tiny_network()
    torch.manual_seed(99)  # nor does what else was drawn before
    steps = []
    train(network, images, CONFIG, checkpoint=checkpoint, on_step=lambda progress: steps.append(progress.step))
    assert steps == list(range(step - step % 2 + 1, STEPS + 1))
    assert_same_bits(network.state_dict(), uninterrupted)


def test_training_that_is_interrupted_again_and_again_ends_with_the_same_bits(images, uninterrupted, tmp_path):
    for step in (3, 5):
        with pytest.raises(InterruptionError):
            train(tiny_network(), images, CONFIG, checkpoint=tmp_path / "c", on_step=interrupt_after(step))
    network = tiny_network(seed=1)
    train(network, images, CONFIG, checkpoint=tmp_path / "c")
    assert_same_bits(network.state_dict(), uninterrupted)


def test_a_resumed_training_keeps_no_hold_on_the_checkpoint_that_it_has_replaced(images, tmp_path):
    """Its space on the disk would stay taken."""
    with pytest.raises(InterruptionError):
        train(tiny_network(), images, CONFIG, checkpoint=tmp_path / "c", on_step=interrupt_after(3))
    mapped = []
    train(
        tiny_network(), images, CONFIG, checkpoint=tmp_path / "c",
        on_step=lambda _: mapped.extend(re.findall(f".*{tmp_path}.*", Path("/proc/self/maps").read_text())),
    )  # fmt: skip
    assert mapped == []


def test_adamw_resumes_with_the_same_bits(images, tmp_path):
    config = TrainingConfig.for_cpu(epochs=2, batch_size=1, checkpoint_every_steps=2)
    network = tiny_network()
    train(network, images, config)
    with pytest.raises(InterruptionError):
        train(tiny_network(), images, config, checkpoint=tmp_path / "c", on_step=interrupt_after(3))
    resumed = tiny_network(seed=1)
    train(resumed, images, config, checkpoint=tmp_path / "c")
    assert_same_bits(resumed.state_dict(), network.state_dict())


def test_another_seed_gives_other_weights(images, uninterrupted):
    network = tiny_network()
    train(network, images, TrainingConfig(epochs=1, batch_size=1, learning_rate=0.005, seed=1))
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(network.state_dict()[name], uninterrupted[name])


def test_loader_processes_change_nothing_in_the_result(images, uninterrupted):
    network = tiny_network()
    config = TrainingConfig(epochs=2, batch_size=1, learning_rate=0.005, loader_workers=1)
    train(network, images, config)
    assert_same_bits(network.state_dict(), uninterrupted)


def test_a_finished_checkpoint_leaves_nothing_to_do(images, finished):
    checkpoint, expected = finished
    network, steps = tiny_network(seed=1), []
    assert train(network, images, CONFIG, checkpoint=checkpoint, on_step=steps.append) is None
    assert steps == []
    assert not network.training
    assert_same_bits(network.state_dict(), expected)


@pytest.fixture(scope="module")
def checkpoint_after_two_steps(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
    with pytest.raises(InterruptionError):
        train(tiny_network(), images, CONFIG, checkpoint=path, on_step=interrupt_after(2))
    return path.read_bytes()


def other_settings(images):
    return tiny_network(), images, TrainingConfig(epochs=4)


def other_network(images):
    return tiny_network(detections_per_image=7), images, CONFIG


def other_labels(images):
    return tiny_network(), images[:-1], CONFIG


@pytest.mark.parametrize("other", [other_settings, other_network, other_labels])
def test_the_checkpoint_of_another_run_is_refused_and_kept(other, images, checkpoint_after_two_steps, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(checkpoint_after_two_steps)
    network, its_images, config = other(images)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(network, its_images, config, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == checkpoint_after_two_steps


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path):
    path.write_bytes(b"")


def overwritten(path):
    path.write_bytes(b"\x00" * 5000)


def without_metadata(path):
    write_tensors(path, read_tensors(path)[0], {})


@pytest.mark.parametrize("damage", [cut_off, emptied, overwritten, without_metadata])
def test_a_damaged_checkpoint_is_refused_and_says_how_to_go_on(damage, images, checkpoint_after_two_steps, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(checkpoint_after_two_steps)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match="Delete"):
        train(tiny_network(), images, CONFIG, checkpoint=checkpoint)


KILLED_RUN = """
    import sys
    from pathlib import Path
    import torch
    from tests.model.examples import labeled_image, rectangle, tiny_network
    from model.config import TrainingConfig
    from model.train import train

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    images = [labeled_image(folder, "a", (1, rectangle(8, 8, 30, 28))), labeled_image(folder, "bb")]
    config = TrainingConfig(epochs=3, batch_size=1, checkpoint_every_steps=1)
    train(tiny_network(), images, config, checkpoint=folder / "checkpoint", on_step=lambda p: print(p.step, flush=True))
"""


def test_a_killed_process_leaves_a_checkpoint_from_which_the_same_bits_come(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[2])])}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED_RUN), str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**environment, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    with process:
        for line in process.stdout:
            if int(line) == 3:
                time.sleep(0.02)  # somewhere in the next step or its checkpoint
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL

    pictures = [labeled_image(tmp_path, "a", (1, rectangle(8, 8, 30, 28))), labeled_image(tmp_path, "bb")]
    config = TrainingConfig(epochs=3, batch_size=1, checkpoint_every_steps=1)
    resumed, whole, steps = tiny_network(seed=1), tiny_network(), []
    train(resumed, pictures, config, checkpoint=tmp_path / "checkpoint", on_step=lambda p: steps.append(p.step))
    train(whole, pictures, config)
    assert 4 <= steps[0] <= steps[-1] == 6
    assert_same_bits(resumed.state_dict(), whole.state_dict())


# --- losses that are no numbers


def test_a_weight_that_is_not_a_number_stops_training_with_the_name_of_the_loss(images):
    network = tiny_network()
    with torch.no_grad():
        network.roi_heads.mask_predictor.mask_fcn_logits.bias.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match=r"step 1 of 6: the loss is nan .*loss_mask': nan"):
        train(network, images, CONFIG)


@pytest.mark.parametrize("checkpoint_every_steps", [1, 2, 100])
def test_a_learning_rate_that_is_too_high_stops_training_and_leaves_no_ruined_checkpoint(
    checkpoint_every_steps, images, tmp_path
):
    checkpoint = tmp_path / "checkpoint"
    config = TrainingConfig(epochs=2, batch_size=1, learning_rate=1e30, checkpoint_every_steps=checkpoint_every_steps)
    with pytest.raises(NonFiniteLossError, match="Lower the learning rate"):
        train(tiny_network(), images, config, checkpoint=checkpoint)
    if checkpoint.exists():
        assert all(tensor.isfinite().all() for tensor in read_tensors(checkpoint)[0].values())


def test_weights_ruined_by_the_very_last_step_are_not_handed_out_as_a_trained_network(images):
    network = tiny_network()
    with pytest.raises(NonFiniteLossError, match=r"after step 1, .* is not finite"):
        train(network, images, TrainingConfig(epochs=1, batch_size=3, learning_rate=math.inf))


def test_the_previous_checkpoint_survives_a_loss_that_is_not_finite(images, tmp_path):
    checkpoint, network = tmp_path / "checkpoint", tiny_network()

    def ruin(progress):
        if progress.step == 3:
            network.rpn.head.cls_logits.bias.data.fill_(math.nan)

    with pytest.raises(NonFiniteLossError, match="step 4 of 6"):
        train(network, images, CONFIG, checkpoint=checkpoint, on_step=ruin)
    tensors, metadata = read_tensors(checkpoint)
    assert metadata["step"] == "2"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# --- schedule, progress, settings


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 1e-3), (44, 1e-3), (45, 1e-4), (48, 1e-4), (49, 1e-5)],
)
def test_the_rate_is_divided_by_ten_at_the_papers_milestones(epoch, expected):
    config, steps_per_epoch = TrainingConfig(), 7
    assert config.epochs == 50
    for step in (epoch * steps_per_epoch, epoch * steps_per_epoch + steps_per_epoch - 1):
        assert learning_rate(config, step, config.epochs * steps_per_epoch) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        pytest.param(0, 0.0002, id="starts at a hundredth"),
        pytest.param(10, 0.0101, id="half way up"),
        pytest.param(20, 0.02, id="peaks after a fifth"),
        pytest.param(60, 0.0101, id="half way down"),
        pytest.param(100, 0.0002, id="ends at a hundredth"),
    ],
)
def test_one_cycle_rises_and_falls_along_cosines(step, expected):
    config = TrainingConfig.for_cpu(learning_rate=0.02)
    assert learning_rate(config, step, 101) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["step", "one_cycle"])
def test_every_rate_of_a_run_lies_between_zero_and_the_given_one(schedule):
    for epochs in (1, 2, 50):
        config = TrainingConfig(epochs=epochs, schedule=schedule, learning_rate=0.01)
        rates = [learning_rate(config, step, 3 * epochs) for step in range(3 * epochs)]
        assert all(0 < rate <= 0.01 + 1e-12 for rate in rates)


@pytest.mark.parametrize(
    ("ramp_up", "step", "share"),
    [
        pytest.param(0.0, 0, 1.0, id="no ramp"),
        pytest.param(0.4, 0, math.exp(-5), id="start"),
        pytest.param(0.4, 20, math.exp(-5 / 4), id="half way"),
        pytest.param(0.4, 40, 1.0, id="end of the ramp"),
        pytest.param(0.4, 99, 1.0, id="after it"),
        pytest.param(1.0, 50, math.exp(-5 / 4), id="over the whole run"),
    ],
)
def test_beta_rises_along_a_sigmoid_ramp(ramp_up, step, share):
    assert beta(TrainingConfig(beta=0.05, ramp_up=ramp_up), step, 100) == pytest.approx(0.05 * share)
    rare = TrainingConfig(beta=0.05, ramp_up=ramp_up, pseudo_every_steps=4)
    assert beta(rare, step, 100) == pytest.approx(4 * 0.05 * share)


def test_the_options_beyond_the_paper_are_off():
    config = TrainingConfig()
    assert (config.ramp_up, config.soft_weights, config.pseudo_negatives, config.ema_decay) == (0, False, "none", 0)


def test_the_loss_of_a_step_uses_its_own_beta(images):
    config = TrainingConfig(epochs=2, batch_size=1, beta=0.5, ramp_up=1.0)
    seen = []
    train(tiny_network(), images, config, on_step=seen.append)
    for progress in seen:
        semi = sum(value for name, value in progress.losses.items() if name.startswith("semi_"))
        supervised = sum(progress.losses.values()) - semi
        expected = supervised + beta(config, progress.step - 1, progress.steps) * semi
        assert progress.loss == pytest.approx(expected, rel=1e-5)


def test_progress_counts_steps_and_sums_the_losses_by_equation_5(images):
    seen = []
    last = train(tiny_network(), images, CONFIG, on_step=seen.append)
    assert [progress.step for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert {progress.steps for progress in seen} == {STEPS}
    assert last == seen[-1]
    for progress in seen:
        semi = sum(value for name, value in progress.losses.items() if name.startswith("semi_"))
        supervised = sum(progress.losses.values()) - semi
        assert semi > 0
        assert progress.loss == pytest.approx(supervised + 0.01 * semi, rel=1e-5)


def test_beta_zero_makes_pseudo_labels_weightless(images):
    """The body sees both images in one batch, so its batch norm is frozen here."""
    networks = []
    for pseudo_images in (images[3:4], images[4:5]):
        network = tiny_network(frozen_batch_norm=True)
        train(network, [*images[:3], *pseudo_images], TrainingConfig(epochs=1, batch_size=2, beta=0.0))
        networks.append(network.state_dict())
    for name, tensor in networks[0].items():
        torch.testing.assert_close(networks[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"pseudo_batch_size": 0}, "pseudo_batch_size: expected at least 1"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps: expected at least 1"),
        ({"schedule": "cosine"}, "'step' or 'one_cycle', got 'cosine'"),
        ({"pseudo_negatives": "all"}, "'none' or 'outside_ignored', got 'all'"),
        ({"beta": -1.0}, r"beta: expected at least 0, got -1.0"),
        ({"ramp_up": 1.1}, r"ramp_up: expected a share of the run in \[0, 1\], got 1.1"),
        ({"ema_burn_in": -0.1}, "ema_burn_in: expected a share"),
        ({"ema_decay": 1.0}, r"ema_decay: expected a number in \[0, 1\), got 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        TrainingConfig(**settings)


def test_training_on_pseudo_labels_alone_is_refused(images):
    with pytest.raises(DatasetError, match="at least one annotated image"):
        train(tiny_network(), images[3:], CONFIG)


# --- it learns


def test_the_network_learns_four_images_by_heart(tmp_path):
    images = [
        labeled_image(tmp_path, "a", (1, rectangle(8, 8, 30, 28)), (2, ellipse(30, 34, 60, 58))),
        labeled_image(tmp_path, "bb", (1, rectangle(30, 10, 60, 30)), (2, ellipse(4, 32, 30, 60))),
        labeled_image(tmp_path, "ccc", (2, ellipse(20, 4, 56, 30)), (1, rectangle(10, 38, 50, 60))),
        labeled_image(tmp_path, "dddd", (1, rectangle(4, 4, 24, 60)), (2, ellipse(28, 14, 60, 50))),
    ]
    network = tiny_network(weights="imagenet", fpn_channels=32, box_head_width=64, rois_per_image=32)
    config = TrainingConfig.for_cpu(epochs=40, batch_size=4)
    losses = []
    train(network, images, config, on_step=lambda progress: losses.append(progress.loss))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

    found = detect(network, [load_image(image.path) for image in images], batch_size=4)
    by_image = {image.image_id: detections for image, detections in zip(images, found, strict=True)}
    result = evaluate(by_image, images, ["box", "disc"], mask_threshold=network.config.mask_threshold)
    assert result.map_50 > 0.6
    assert min(result.ap_50_by_class.values()) > 0.5
