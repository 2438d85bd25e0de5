"""What a training leaves beside its version goes when its cycle is over; the store's part is in test_handover."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ml_backend.ended_checkpoints import EndedCheckpoints
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.service import Service
from ml_backend.stored_checkpoint import CHECKPOINT
from tests.ml_backend.examples import KEY, UID, begin_cycle, settings


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service.connect(settings(tmp_path))
    name = ProjectName.from_uid(UID)
    assert name is not None
    remember_project(service.database, name)
    yield service
    service.close()


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def files_of(service: Service, number: int) -> set[str]:
    return files_below(service.cycle_folder(KEY, number))


def leave_files(folder: Path, *names: str) -> None:
    for name in names or (CHECKPOINT, "training.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_each_checkpoint_is_removed_once_its_cycle_has_ended(service: Service) -> None:
    ended, statuses = EndedCheckpoints(service), ("done", "failed", "refused")
    for number, status in enumerate(statuses, start=1):
        log = begin_cycle(service, KEY, number)
        leave_files(service.cycle_folder(KEY, number))
        ended.remove(KEY)
        assert files_of(service, number) == {CHECKPOINT, "training.json"}
        log.finish(status)
        ended.remove(KEY)
        assert files_of(service, number) == {"training.json"}


def test_a_cycle_that_failed_before_it_trained_leaves_nothing_to_remove(service: Service) -> None:
    begin_cycle(service, KEY).finish("failed", error="no image could be read")
    EndedCheckpoints(service).remove(KEY)
    assert not service.cycle_folder(KEY, 1).exists()


def test_a_worker_that_starts_removes_what_the_one_before_it_has_left(service: Service) -> None:
    log = begin_cycle(service, KEY)
    leave_files(service.cycle_folder(KEY, 1))
    log.finish("done")
    EndedCheckpoints(service).remove(KEY)
    assert files_of(service, 1) == {"training.json"}


def test_what_cannot_be_removed_is_told_once_and_tried_again(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    log = begin_cycle(service, KEY)
    in_the_way = service.cycle_folder(KEY, 1) / CHECKPOINT
    in_the_way.mkdir(parents=True)  # not a file
    log.finish("done")
    ended = EndedCheckpoints(service)
    for _ in range(2):
        ended.remove(KEY)
    assert caplog.text.count("checkpoints of ended cycles stay for now") == 1
    in_the_way.rmdir()
    leave_files(service.cycle_folder(KEY, 1))
    ended.remove(KEY)
    assert files_of(service, 1) == {"training.json"}


LEFT_HERE = (
    ".checkpoint-to-share",  # a hard link: without it, the space is free
    ".checkpoint.safetensors.0f1e.unfinished",
    "together-x1/network.safetensors",
    "together-x1/images.json",
)
LEFT_IN_STORE = (".checkpoint-2.safetensors.0f1e.unfinished", "checkpoint-1.safetensors", "checkpoint.json")


@pytest.fixture
def with_store(tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "store").mkdir()
    of_folder = settings(tmp_path).model_copy(update={"store_url": f"file://{tmp_path / 'store'}"})
    service = Service.connect(of_folder)
    name = ProjectName.from_uid(UID)
    assert name is not None
    remember_project(service.database, name)
    yield service
    service.close()


def test_what_a_worker_that_was_stopped_in_a_training_has_left_is_removed(with_store: Service, tmp_path: Path) -> None:
    shared = tmp_path / "store" / "cycles" / KEY
    for number in (1, 2):
        leave_files(with_store.cycle_folder(KEY, number), CHECKPOINT, "training.json", *LEFT_HERE)
        leave_files(shared / str(number), "training.json", *LEFT_IN_STORE)
    begin_cycle(with_store, KEY, 1).finish("done")
    begin_cycle(with_store, KEY, 2)  # it goes on
    EndedCheckpoints(with_store).remove(KEY)
    assert files_of(with_store, 1) == files_below(shared / "1") == {"training.json"}
    assert files_of(with_store, 2) == {CHECKPOINT, "training.json", *LEFT_HERE}
    assert files_below(shared / "2") == {"training.json", *LEFT_IN_STORE}


def test_one_file_that_cannot_be_removed_keeps_no_other_one(
    with_store: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "store" / "cycles" / KEY
    for number in (1, 2):
        leave_files(with_store.cycle_folder(KEY, number), *LEFT_HERE)
        leave_files(shared / str(number), *LEFT_IN_STORE)
        (with_store.cycle_folder(KEY, number) / CHECKPOINT).mkdir()  # not a file
        begin_cycle(with_store, KEY, number).finish("done")
    ended = EndedCheckpoints(with_store)
    for _ in range(2):
        ended.remove(KEY)
    assert files_of(with_store, 1) | files_of(with_store, 2) | files_below(shared) == set()
    (told,) = caplog.records
    assert f"cycles/{KEY}/1/{CHECKPOINT}" in told.getMessage()


def test_a_folder_that_cannot_be_listed_keeps_no_other_one(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    in_the_way = service.cycle_folder(KEY, 1)
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()  # not a folder
    leave_files(service.cycle_folder(KEY, 2))
    for number in (1, 2):
        begin_cycle(service, KEY, number).finish("done")
    EndedCheckpoints(service).remove(KEY)
    assert files_of(service, 2) == {"training.json"}
    (told,) = caplog.records
    assert str(in_the_way) in told.getMessage()
