"""One run of Algorithm 1 with an oracle: real and tiny, interrupted everywhere."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

import model.files
import scripts.active_learning
from model.config import TrainingConfig
from scripts.active_learning import cycles_done, first_batch, run
from scripts.benchmark_lines import parse_line
from scripts.benchmark_signs import SignsOfLife
from tests.scripts.examples import EXPERIMENT, SMALL, without_seconds


def carry_out(out, sets, line="tsp", *, seed=0, experiment=EXPERIMENT, **options):
    """Run to the end; what run.json holds, without the seconds."""
    name = parse_line(line, seed)
    run(name, experiment, sets, out / name.folder, out / "shared", **options)
    return without_seconds(out / name.folder / "run.json")


def watch_training(monkeypatch):
    """The steps of each training from now on."""
    trained = []
    train = scripts.active_learning.train

    def watched(network, images, config, *, on_step, **options):
        steps = []
        trained.append(steps)

        def both(progress):
            steps.append(progress)
            on_step(progress)

        return train(network, images, config, on_step=both, **options)

    monkeypatch.setattr(scripts.active_learning, "train", watched)
    return trained


def annotated(state):
    return [cycle["annotated"] for cycle in state["cycles"]]


# --- one run


def test_a_run_annotates_a_batch_a_cycle_and_leaves_only_its_result(tmp_path, sets):
    state = carry_out(tmp_path, sets)
    first, second = annotated(state)
    assert first == first_batch(sets.pool, 3, 0)
    assert len(second) == 2
    assert not set(first) & set(second)
    assert [cycle["annotated_images"] for cycle in state["cycles"]] == [3, 5]
    assert "next" not in state
    assert [path.name for path in (tmp_path / "tsp-seed0").iterdir()] == ["run.json"]


def test_a_run_says_what_it_is_at_and_that_changes_nothing(tmp_path, sets, monkeypatch, capsys):
    quiet = carry_out(tmp_path / "quiet", sets)
    capsys.readouterr()
    monkeypatch.setattr(scripts.active_learning, "SignsOfLife", partial(SignsOfLife, every_seconds=0))
    assert carry_out(tmp_path / "loud", sets) == quiet
    said = capsys.readouterr().err
    for line in (
        "tsp-seed0, cycle 1 of 2: training, step 1 of 4",
        f"tsp-seed0, cycle 1 of 2: measuring, image 1 of {len(sets.test.images)}",
        "tsp-seed0, cycle 1 of 2: choosing what comes next, image 6",
        "tsp-seed0, cycle 1 of 2: looking at what people annotate, image 2 of 2",
        "tsp-seed0, cycle 2 of 2: training, step 1 of 3",
    ):
        assert line in said.splitlines()


def test_a_pool_that_runs_out_ends_with_everything_annotated(tmp_path, sets):
    experiment = replace(EXPERIMENT, first_batch=6, batch=2, cycles=4, training=TrainingConfig(epochs=1, batch_size=9))
    state = carry_out(tmp_path, sets, "tsp+ssl", experiment=experiment)
    assert [len(batch) for batch in annotated(state)] == [6, 2, 1, 0]
    assert sorted(i for batch in annotated(state) for i in batch) == sorted(
        image.image_id for image in sets.pool.images
    )
    assert [cycle["pseudo_images"] for cycle in state["cycles"]][2:] == [0, 0]


def test_the_full_line_annotates_everything_in_one_cycle(tmp_path, sets):
    state = carry_out(tmp_path, sets, "full")
    assert [cycle["annotated_images"] for cycle in state["cycles"]] == [9]
    assert cycles_done(parse_line("full", 0), EXPERIMENT, sets, tmp_path / "full-seed0") == (1, 1)


def test_pseudo_labels_are_trained_on_when_every_detection_is_trusted(tmp_path, sets, monkeypatch):
    steps = watch_training(monkeypatch)
    with_ssl = carry_out(tmp_path, sets, "tsp+ssl")
    assert any(name.startswith("semi_") for name in steps[-1][-1].losses)
    first, second = with_ssl["cycles"]
    assert (first["pseudo_images"], first["pseudo_quality"]) == (0, None)
    assert second["pseudo_images"] == 4
    assert second["pseudo_quality"]["instances"] > 0
    assert 0 <= second["pseudo_quality"]["precision"] <= 1

    steps.clear()
    without = carry_out(tmp_path, sets)
    assert not any(name.startswith("semi_") for training in steps for step in training for name in step.losses)
    assert annotated(without) == annotated(with_ssl)


def test_a_cycle_trains_on_what_was_annotated_and_on_its_own_labels_of_the_rest(tmp_path, sets, monkeypatch):
    trained, train = [], scripts.active_learning.train

    def watched(network, images, config, **options):
        trained.append((sorted(i.image_id for i in images if not i.pseudo), [i.image_id for i in images if i.pseudo]))
        return train(network, images, config, **options)

    monkeypatch.setattr(scripts.active_learning, "train", watched)
    first, chosen = annotated(carry_out(tmp_path, sets, "tsp+ssl"))
    rest = [image.image_id for image in sets.pool.images if image.image_id not in {*first, *chosen}]
    assert trained == [(sorted(first), []), (sorted([*first, *chosen]), rest)]


def test_a_spread_first_batch_starts_at_random_and_differs_from_a_random_one(tmp_path, sets):
    batches = [annotated(carry_out(tmp_path, sets, "random@first=spread", seed=seed))[0] for seed in (0, 1)]
    for seed, batch in enumerate(batches):
        assert batch[0] == first_batch(sets.pool, 3, seed)[0]
        assert len(set(batch)) == 3
    assert [set(batch) for batch in batches] != [set(first_batch(sets.pool, 3, seed)) for seed in (0, 1)]


def test_a_cycle_says_what_its_annotations_cost_and_how_good_the_network_is(tmp_path, sets):
    state = carry_out(tmp_path, sets)
    by_id = {image.image_id: image for image in sets.pool.images}
    known = []
    for cycle in state["cycles"]:
        new = [by_id[image_id] for image_id in cycle["annotated"]]
        known += new
        assert cycle["new_empty_images"] == sum(not len(image.labels) for image in new)
        assert cycle["annotated_instances"] == sum(len(image.labels) for image in known)
        assert sum(cycle["annotated_by_class"].values()) == cycle["annotated_instances"]
        assert cycle["annotated_vertices"] >= 3 * cycle["annotated_instances"]
        assert set(cycle["ap_50_by_class"]) == set(sets.test.class_names)
        assert len(json.dumps(cycle)) < 30_000
    assert sum(map(sum, state["test_instances"].values())) == sum(len(image.labels) for image in sets.test.images)


@pytest.mark.parametrize("line", ["random", "tsp+ssl"])
def test_masks_are_calibrated_on_what_people_annotated_after_the_network_before_had_seen_it(tmp_path, sets, line):
    experiment = replace(EXPERIMENT, training=replace(EXPERIMENT.training, min_steps=60, batch_size=3), cycles=3)
    cycles = carry_out(tmp_path, sets, line, experiment=experiment)["cycles"]
    assert cycles[0]["calibrated_map_50"] is None
    assert all(cycle["calibrated_map_50"] is not None for cycle in cycles[1:])


def test_a_teacher_gets_the_images_without_labels_too(tmp_path, sets, monkeypatch):
    trained, train = [], scripts.active_learning.train

    def watched(network, images, config, **options):
        trained.append([image for image in images if image.pseudo])
        return train(network, images, config, **options)

    monkeypatch.setattr(scripts.active_learning, "train", watched)
    for line in ("tsp+ssl@class_threshold=1", "tsp+ssl@class_threshold=1@ema_decay=0.9"):
        carry_out(tmp_path, sets, line)
    assert [len(pseudo) for pseudo in trained] == [0, 0, 0, 4]
    assert [len(image.labels) for image in trained[-1]] == [0] * 4


# --- interrupted


class StoppedHereError(Exception):
    pass


def interrupted_at_every_write(monkeypatch, carry_on, *, after):
    """Carry a run on until it ends, stopped each time just after its first file, or just before its second one."""
    real, attempts = model.files.write_bytes, 0
    while True:
        written = []

        def write(path, content, written=written):
            if len(written) == 1:
                raise StoppedHereError
            real(path, content)
            written.append(path)
            if after:
                raise StoppedHereError

        monkeypatch.setattr(model.files, "write_bytes", write)
        attempts += 1
        try:
            return carry_on(), attempts
        except StoppedHereError:
            assert attempts < 100
        finally:
            monkeypatch.setattr(model.files, "write_bytes", real)


@pytest.mark.parametrize(
    ("line", "after"),
    [
        pytest.param("tsp+ssl", True, id="tsp+ssl, after a file"),
        pytest.param("tsp+ssl@first=spread", False, id="tsp+ssl, before the next file"),
        pytest.param("mc_dropout", True, id="mc_dropout, after a file"),
        pytest.param(
            "tsp+ssl@class_wise_thresholds=true@class_threshold_floor=0@ema_decay=0.9@pseudo_negatives=outside_ignored"
            "@soft_weights=true",
            True,
            id="all options of pseudo labels, after a file",
        ),
    ],
)
def test_a_run_interrupted_everywhere_ends_as_if_it_had_not_been(tmp_path, sets, monkeypatch, line, after):
    expected = carry_out(tmp_path / "at once", sets, line)
    state, attempts = interrupted_at_every_write(
        monkeypatch, lambda: carry_out(tmp_path / "in pieces", sets, line), after=after
    )
    # Two cycles, each of several files.
    assert attempts >= 5
    assert state == expected


def test_a_run_stops_between_cycles_and_goes_on_as_if_it_had_not(tmp_path, sets, monkeypatch):
    expected = carry_out(tmp_path / "at once", sets, "tsp+ssl")
    name = parse_line("tsp+ssl", 0)
    folder = tmp_path / "stopped" / name.folder
    with monkeypatch.context() as patched:
        # The deadline passes while the first cycle is going on.
        patched.setattr(scripts.active_learning, "time", SimpleNamespace(monotonic=iter([0, 2]).__next__))
        run(name, EXPERIMENT, sets, folder, tmp_path / "stopped" / "shared", deadline=1)
    assert cycles_done(name, EXPERIMENT, sets, folder) == (1, 2)
    assert carry_out(tmp_path / "stopped", sets, "tsp+ssl") == expected


def test_a_finished_run_is_not_touched(tmp_path, sets):
    carry_out(tmp_path, sets)
    path = tmp_path / "tsp-seed0" / "run.json"
    before = path.stat()
    carry_out(tmp_path, sets)
    assert path.stat() == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "in the middle"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"batch": 3}, id="batch"),
        pytest.param({"training": replace(EXPERIMENT.training, epochs=2)}, id="epochs"),
        pytest.param({"network": {**SMALL, "min_size": 48}}, id="network"),
    ],
)
def test_a_run_made_with_other_settings_is_refused(tmp_path, sets, change, finished):
    folder = tmp_path / "tsp-seed0"
    if finished:
        carry_out(tmp_path, sets)
    else:
        folder.mkdir()
        settings = scripts.active_learning._load(folder, parse_line("tsp", 0), EXPERIMENT, sets)
        (folder / "run.json").write_text(json.dumps(settings))
    other = replace(EXPERIMENT, **change)
    with pytest.raises(ValueError, match="other settings or images"):
        cycles_done(parse_line("tsp", 0), other, sets, folder)
    with pytest.raises(ValueError, match="other settings or images"):
        run(parse_line("tsp", 0), other, sets, folder, tmp_path / "shared")


# --- what runs have in common


def test_all_strategies_start_with_the_same_images_at_a_seed_and_others_at_another(sets):
    pool = sets.pool
    assert first_batch(pool, 3, 0) == first_batch(pool, 5, 0)[:3]
    assert first_batch(pool, 5, 0) != first_batch(pool, 5, 1)
    assert len(set(first_batch(pool, 9, 2))) == 9


def test_the_first_cycle_is_trained_once_for_all_lines_that_share_it(tmp_path, sets, monkeypatch):
    trained = watch_training(monkeypatch)
    states = [carry_out(tmp_path, sets, strategy) for strategy in ("random", "tsp", "core_set", "learning_loss")]
    assert [len(steps) > 0 for steps in trained] == [True, True, False, True, False, True, True, True]
    assert len({tuple(state["cycles"][0]["annotated"]) for state in states}) == 1
    first = [{k: v for k, v in state["cycles"][0].items() if k != "queue"} for state in states]
    assert first[0] == first[1] == first[2]


def test_lines_that_choose_alike_are_trained_once_as_long_as_no_pseudo_label_passes(tmp_path, sets, monkeypatch):
    trained = watch_training(monkeypatch)
    nothing_passes, all_pass = "tsp+ssl@class_threshold=1", "tsp+ssl"
    states = [carry_out(tmp_path, sets, line) for line in ("tsp", nothing_passes, all_pass)]
    assert [len(steps) > 0 for steps in trained] == [True, True, False, False, False, True]
    assert annotated(states[0]) == annotated(states[1]) == annotated(states[2])
    alone = carry_out(tmp_path / "alone", sets, nothing_passes)
    assert len(trained[-1]) > 0
    assert states[1] == alone


def cycles_of(line, folder, sets, *, seed=0, experiment=EXPERIMENT, device="cpu"):
    return scripts.active_learning._Cycles(
        parse_line(line, seed), experiment, sets, folder=folder, shared=folder, device=device, keep_network=False
    )


def test_what_is_trained_otherwise_is_not_shared(tmp_path, sets):
    weights = tmp_path / "own.safetensors"
    weights.write_bytes(b"1")
    own = replace(EXPERIMENT, weights=str(weights))
    other_test = replace(sets, test=replace(sets.test, images=sets.test.images[1:]))

    def digest(*order, line="tsp", data=sets, **options):
        cycles = cycles_of(line, tmp_path, data, **options)
        images = list(cycles.small.values())
        return cycles._digest_of_training([images[i] for i in order])

    known = digest(0, 1, 2)
    assert digest(0, 1, 2, line="random+ssl@beta=0.05") == known
    others = [
        digest(0, 1),
        digest(2, 1, 0),
        digest(0, 1, 2, seed=1),
        digest(0, 1, 2, line="learning_loss"),
        digest(0, 1, 2, data=other_test),
        digest(0, 1, 2, device="cuda:1"),
        digest(0, 1, 2, experiment=own),
    ]
    weights.write_bytes(b"2")
    others.append(digest(0, 1, 2, experiment=own))
    assert len({known, *others}) == 9


def test_a_network_that_is_shared_is_measured_by_what_each_run_has_held_out(tmp_path, sets):
    cycles = cycles_of("tsp", tmp_path, sets)
    images = list(cycles.small.values())[:3]
    held_out = {"mask_scores": [0.2, 0.9, 0.5, 0.7], "mask_ious": [0.9, 0.2, 0.7, 0.5]}
    _, without, _ = cycles._shared_cycle(images, None)
    _, calibrated, _ = cycles._shared_cycle(images, held_out)
    assert without["calibrated_map_50"] is None
    assert calibrated["calibrated_map_50"] is not None
    assert cycles._shared_cycle(images, None)[1] == without
