"""Two machines on one PostgreSQL and one store, whose MODEL_DIRs are their own: what one has done of a cycle, the other
goes on with. Real Label Studio, real training."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ml_backend import stored_checkpoint
from ml_backend.batch import choose_batch
from ml_backend.cycle import evaluate_version, snapshot, train_version
from ml_backend.ended_checkpoints import EndedCheckpoints
from ml_backend.errors import StoreUnavailableError
from ml_backend.forget import forget, remove_forgotten_data
from ml_backend.handover import bring_snapshot
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.order import frozen_batch
from ml_backend.pool import read_scores, score_pool
from ml_backend.publish import publish
from ml_backend.service import Service
from ml_backend.store import Store
from ml_backend.stored_checkpoint import CHECKPOINT, bring_checkpoint
from model.files import read_tensors
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import polygon_result
from tests.ml_backend.examples import (
    VERSION,
    add_version,
    begin_cycle,
    cycle_row,
    import_images,
    key_of,
    phantom_images,
    settings,
    sha256,
)
from tests.ml_backend.test_frozen import Steps
from tests.postgres import Postgres

pytestmark = pytest.mark.label_studio

ANNOTATED, POOL = 4, 3


class KilledError(Exception):
    """The machine is gone in the middle."""


def die() -> None:
    raise KilledError


def train_until_killed(service: Service, key: str) -> None:
    """A cycle whose machine is gone after the third of four steps."""
    begin_cycle(service, key)
    snapshot(service, key, 1, Steps(service, key))
    with pytest.raises(KilledError):
        train_version(service, key, 1, Steps(service, key, after=3, do=die))


def assert_same_checkpoints(first: Service, second: Service, key: str) -> None:
    """By their tensors: the files differ in the order of their metadata."""
    ours, theirs = (read_tensors(service.cycle_folder(key, 1) / CHECKPOINT)[0] for service in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The folder that is the store."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def machine(
    label_studio: LabelStudioServer, postgres: Postgres, tmp_path: Path, store: Path
) -> Iterator[Callable[[str], Service]]:
    made: dict[str, Service] = {}
    common = {
        "LABEL_STUDIO_URL": label_studio.url,
        "LABEL_STUDIO_API_KEY": label_studio.token,
        "DATABASE_URL": postgres.new_database(),
        "TSP_STORE_URL": f"file://{store}",
        "TSP_STRATEGY": "hybrid",
        "TSP_BATCH_SIZE": 2,
        "TSP_CHECKPOINT_STEPS": 1,
        "TSP_IMAGES_PER_STEP": 1,
    }

    def service(name: str) -> Service:
        if name not in made:
            made[name] = Service.connect(settings(tmp_path / name, **common))
        return made[name]

    yield service
    for one in made.values():
        one.close()


@pytest.fixture
def key(machine: Callable[[str], Service], client: LabelStudioClient, project: Project) -> str:
    tasks = import_images(client, project, phantom_images(ANNOTATED + POOL) + phantom_images(1, validation=True))
    for task in [*tasks[:ANNOTATED], tasks[-1]]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    return key_of(machine("first"), project)


def test_every_stage_of_a_cycle_may_be_another_machines(
    machine: Callable[[str], Service], client: LabelStudioClient, project: Project, key: str
) -> None:
    log = begin_cycle(machine("first"), key)
    version = snapshot(machine("first"), key, 1, log)
    train_version(machine("second"), key, 1, log)
    assert evaluate_version(machine("third"), key, 1, version, log)
    assert score_pool(machine("fourth"), key, version, log) == POOL
    choose_batch(machine("fifth"), key, 1, version, log)
    assert len(frozen_batch(machine("fifth"), key, version) or ()) == 2
    publish(machine("sixth"), key, version, log)
    facts = cycle_row(machine("first"), key).facts
    assert not [name for name in facts if name.endswith("_mended")]  # images came from the store
    for name in ("first", "seventh"):
        service = machine(name)
        assert service.registry.active(key) == version
        assert frozen_batch(service, key, version) == frozen_batch(machine("fifth"), key, version)
        assert score_pool(service, key, version) == 0  # all are seen
    assert client.project(project.id).model_version == version


def test_a_machine_that_has_seen_nothing_may_choose_of_an_empty_pool(
    machine: Callable[[str], Service], key: str
) -> None:
    add_version(machine("first"), key, strategy="random")
    choose_batch(machine("second"), key, 1, VERSION, begin_cycle(machine("second"), key))
    assert frozen_batch(machine("first"), key, VERSION) == ()


def test_a_training_goes_on_after_the_checkpoint_that_another_machine_has_kept(
    machine: Callable[[str], Service], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_checkpoint, "_EVERY_SECONDS", 0.0)
    first, second = machine("first"), machine("second")
    train_until_killed(first, key)
    steps = Steps(second, key)
    train_version(second, key, 1, steps)
    assert steps.steps == [3, 4]  # it died before the third was kept
    again = Steps(first, key)
    train_version(first, key, 1, again)  # its own checkpoint is behind
    assert again.steps == []
    assert_same_checkpoints(first, second, key)


def flip_a_bit(path: Path) -> None:
    """Of the last weight, so that the file can still be read."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def kept_of(store: Path, key: str) -> list[Path]:
    """The checkpoints in the store, the furthest first."""
    folder = store / "cycles" / key / "1"
    return [folder / one["name"] for one in json.loads((folder / "checkpoint.json").read_text())["kept"]]


def lose(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("harm", "damaged", "steps"),
    [(flip_a_bit, 0, [3, 4]), (flip_a_bit, 1, [2, 3, 4]), (flip_a_bit, 2, [1, 2, 3, 4]), (lose, 1, [2, 3, 4])],
)
def test_a_checkpoint_that_is_damaged_in_the_store_is_told_and_the_next_best_is_gone_on_with(
    machine: Callable[[str], Service],
    key: str,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[Path], None],
    damaged: int,
    steps: list[int],
) -> None:
    monkeypatch.setattr(stored_checkpoint, "_EVERY_SECONDS", 0.0)
    train_until_killed(machine("first"), key)
    for path in kept_of(store, key)[:damaged]:
        harm(path)
    second = Steps(machine("second"), key)
    train_version(machine("second"), key, 1, second)
    assert second.steps == steps
    told = "the store has lost" if harm is lose else "is damaged: its SHA-256 is not"
    assert caplog.text.count(told) == damaged
    train_version(machine("third"), key, 1, third := Steps(machine("third"), key))
    assert third.steps == []  # the store has a whole one again


def test_a_worker_that_is_killed_while_it_keeps_a_checkpoint_leaves_the_one_before(
    machine: Callable[[str], Service],
    key: str,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stored_checkpoint, "_EVERY_SECONDS", 0.0)
    first, second = machine("first"), machine("second")
    train_until_killed(first, key)  # two are kept
    before, slots = kept_of(store, key), sorted((store / "cycles" / key / "1").glob("checkpoint-*"))
    contents = [path.read_bytes() for path in slots]
    with monkeypatch.context() as context:
        context.setattr(stored_checkpoint._Index, "write", lambda *_: die())
        with pytest.raises(KilledError):
            train_version(first, key, 1, Steps(first, key))
    assert [path.read_bytes() == content for path, content in zip(slots, contents, strict=True)].count(False) == 1
    assert kept_of(store, key) == before
    train_version(second, key, 1, steps := Steps(second, key))
    assert steps.steps == [3, 4]
    assert "is damaged" not in caplog.text


def test_what_a_finished_training_had_come_to_is_made_again_when_the_store_has_damaged_it(
    machine: Callable[[str], Service], key: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_checkpoint, "_EVERY_SECONDS", 0.0)
    first = machine("first")
    begin_cycle(first, key)
    version = snapshot(first, key, 1, Steps(first, key))
    train_version(first, key, 1, Steps(first, key))
    flip_a_bit(kept_of(store, key)[0])
    killed = Steps(machine("second"), key, after=1, do=die)
    with pytest.raises(KilledError):
        evaluate_version(machine("second"), key, 1, version, killed)
    evaluate_version(machine("third"), key, 1, version, third := Steps(machine("third"), key))
    assert (killed.steps, third.steps) == ([4], [4])
    assert_same_checkpoints(first, machine("third"), key)


def test_an_index_of_checkpoints_that_makes_no_sense_names_none(
    machine: Callable[[str], Service], key: str, store: Path
) -> None:
    first, second, folder = machine("first"), machine("second"), store / "cycles" / key / "1"
    train_until_killed(first, key)
    (folder.parent / "other").write_bytes(b"")
    elsewhere = {"kept": [{"name": "../other", "step": 9, "sha256": sha256(b"")}]}
    for index in ("[]", "12", "{", "\0", '{"kept": [{}]}', '{"kept": 1}', json.dumps(elsewhere)):
        (folder / "checkpoint.json").write_text(index)
        assert not bring_checkpoint(second, key, 1)
        assert not (second.cycle_folder(key, 1) / CHECKPOINT).exists()
    assert not bring_checkpoint(first, key, 1)  # what it has of its own may not be all
    train_version(first, key, 1, steps := Steps(first, key))
    assert steps.steps == [4]  # after its own
    assert len(kept_of(store, key)) == 1
    assert bring_checkpoint(first, key, 1)


def test_a_machine_without_hard_links_keeps_checkpoints_as_well(
    machine: Callable[[str], Service], key: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    first = machine("first")
    begin_cycle(first, key)
    snapshot(first, key, 1, Steps(first, key))
    monkeypatch.setattr("os.link", no_links)
    train_version(first, key, 1, Steps(first, key))
    here = first.cycle_folder(key, 1) / CHECKPOINT
    assert kept_of(store, key)[0].read_bytes() == here.read_bytes()
    assert not [path for path in here.parent.iterdir() if path.name.startswith(".")]


def test_checkpoints_of_ended_cycles_leave_the_store_and_those_of_others_stay(
    machine: Callable[[str], Service], key: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, folder = machine("first"), store / "cycles" / key
    log = begin_cycle(first, key)
    snapshot(first, key, 1, log)
    train_version(first, key, 1, log)
    begin_cycle(first, key, 2)
    for name in ("2/checkpoint-1.safetensors", "1/checkpoint.step"):  # the latter of an older release
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    before = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    ended = EndedCheckpoints(first)
    ended.remove(key)
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == before
    log.finish("failed", error="of something")
    EndedCheckpoints(machine("second")).remove(key)  # the worker of the first has died since
    assert (first.cycle_folder(key, 1) / CHECKPOINT).exists()  # on a disk of its own
    left = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    gone = {"1/checkpoint-1.safetensors", "1/checkpoint.json", "1/checkpoint.step"}
    assert {str(path) for path in before - left} == gone
    assert Path("2/checkpoint-1.safetensors") in left


def test_a_removal_that_the_store_refuses_is_told_once_and_done_later(
    machine: Callable[[str], Service], key: str, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = machine("first")
    folder = store / "cycles" / key / "1"
    folder.mkdir(parents=True)
    (folder / "checkpoint-1.safetensors").write_bytes(b"")
    begin_cycle(first, key).finish("done")
    store.rename(store.with_name("away"))
    ended = EndedCheckpoints(first)
    for _ in range(2):
        ended.remove(key)
    assert caplog.text.count("checkpoints of ended cycles stay for now: the store does not answer") == 1
    store.with_name("away").rename(store)
    ended.remove(key)
    assert list(folder.iterdir()) == []


def test_a_checkpoint_of_this_machine_that_is_further_than_the_stores_is_gone_on_with(
    machine: Callable[[str], Service], key: str
) -> None:
    first = machine("first")
    train_until_killed(first, key)
    steps = Steps(first, key)
    train_version(first, key, 1, steps)
    assert steps.steps == [4]


def test_a_training_does_not_wait_for_a_store_that_is_away_but_its_end_does(
    machine: Callable[[str], Service], key: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_checkpoint, "_EVERY_SECONDS", 0.0)
    first, second = machine("first"), machine("second")
    begin_cycle(first, key)
    version = snapshot(first, key, 1, Steps(first, key))
    steps = Steps(first, key, after=1, do=lambda: store.rename(store.with_name("away")) and None)
    with pytest.raises(StoreUnavailableError, match=r"the folder is not there"):
        train_version(first, key, 1, steps)
    assert steps.steps == [1, 2, 3, 4]
    store.with_name("away").rename(store)
    again = Steps(first, key)
    train_version(first, key, 1, again)
    assert again.steps == []  # nothing was lost
    assert evaluate_version(second, key, 1, version, Steps(second, key))


def test_a_snapshot_whose_record_was_lost_is_replaced_everywhere(
    machine: Callable[[str], Service], client: LabelStudioClient, project: Project, key: str
) -> None:
    first, second = machine("first"), machine("second")
    begin_cycle(first, key)
    snapshot(first, key, 1, Steps(first, key))
    train_version(first, key, 1, Steps(first, key))
    (task,) = import_images(client, project, phantom_images(ANNOTATED + POOL + 1)[-1:])
    client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    snapshot(second, key, 1, Steps(second, key))
    steps = Steps(first, key)
    train_version(first, key, 1, steps)
    assert steps.steps == [1, 2, 3, 4, 5]
    tasks = [json.loads((s.cycle_folder(key, 1) / "tasks.json").read_text()) for s in (first, second)]
    assert tasks[0] == tasks[1]
    assert task in tasks[0].values()


def test_a_snapshot_that_was_brought_in_part_keeps_no_checkpoint_of_another(
    machine: Callable[[str], Service], client: LabelStudioClient, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = machine("first"), machine("second")
    begin_cycle(first, key)
    snapshot(first, key, 1, Steps(first, key))
    train_version(first, key, 1, Steps(first, key))
    checkpoint = first.cycle_folder(key, 1) / CHECKPOINT
    assert checkpoint.exists()
    (task,) = import_images(client, first.project(key), phantom_images(ANNOTATED + POOL + 1)[-1:])
    client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    snapshot(second, key, 1, Steps(second, key))
    refresh = Store.refresh

    def fall_silent(store: Store, path: Path) -> None:
        refresh(store, path)
        raise StoreUnavailableError("it is away")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "refresh", fall_silent)
        with pytest.raises(StoreUnavailableError):
            bring_snapshot(first, key, 1)
    bring_snapshot(first, key, 1)
    assert not checkpoint.exists()
    tasks = [json.loads((s.cycle_folder(key, 1) / "tasks.json").read_text()) for s in (first, second)]
    assert tasks[0] == tasks[1]


def test_a_small_file_is_in_the_store_before_it_is_here(
    machine: Callable[[str], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another thread that brings it in between puts the older one back."""
    service = machine("first")
    path = service.settings.model_dir / "scores" / "a.json"

    def die(path: Path, content: bytes) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("ml_backend.service.write_bytes", die)
        with pytest.raises(OSError, match="killed"):
            service.keep_json(path, {"edition": 1})
    service.bring(path)
    assert json.loads(path.read_text()) == {"edition": 1}


def test_lines_that_a_killed_worker_did_not_keep_are_kept_by_the_next_look(
    machine: Callable[[str], Service], client: LabelStudioClient, project: Project, key: str
) -> None:
    first, second = machine("first"), machine("second")
    log = begin_cycle(first, key)
    version = snapshot(first, key, 1, log)
    train_version(first, key, 1, log)
    evaluate_version(first, key, 1, version, log)
    score_pool(first, key, version, log)
    scores = first.scores_file(key, version)
    assert first.store is not None
    first.store.remove(scores.with_name(f"{scores.name}.parts"))  # as if it had been killed before
    assert score_pool(first, key, version, log) == 0
    assert score_pool(second, key, version, log) == 0
    assert [line["task"] for line in read_scores(second.scores_file(key, version))] == [
        line["task"] for line in read_scores(scores)
    ]


def test_a_forgotten_project_leaves_nothing_in_the_store(
    machine: Callable[[str], Service], key: str, store: Path
) -> None:
    first = machine("first")
    log = begin_cycle(first, key)
    version = snapshot(first, key, 1, log)
    train_version(first, key, 1, log)
    evaluate_version(first, key, 1, version, log)
    log.finish("done")
    forget(first, key, delete_data=True)
    remove_forgotten_data(first, key, lambda names: None)
    assert {path.parts[len(store.parts)] for path in store.rglob("*") if path.is_file()} == {"cache"}
    assert machine("second").registry.versions(key) == []


def test_a_machine_whose_disk_is_new_has_everything_from_the_store(machine: Callable[[str], Service], key: str) -> None:
    first = machine("first")
    log = begin_cycle(first, key)
    version = snapshot(first, key, 1, log)
    train_version(first, key, 1, log)
    for name in ("cycles", "cache/images", "cache/index"):
        shutil.rmtree(first.settings.model_dir / name)
    assert evaluate_version(first, key, 1, version, log)
