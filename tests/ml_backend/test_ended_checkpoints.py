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


def files_of(service: Service, number: int) -> set[str]:
    return {path.name for path in service.cycle_folder(KEY, number).iterdir()}


def leave_files(service: Service, number: int) -> None:
    folder = service.cycle_folder(KEY, number)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CHECKPOINT, "training.json"):
        (folder / name).write_bytes(b"")


def test_each_checkpoint_is_removed_once_its_cycle_has_ended(service: Service) -> None:
    ended, statuses = EndedCheckpoints(service), ("done", "failed", "refused")
    for number, status in enumerate(statuses, start=1):
        log = begin_cycle(service, KEY, number)
        leave_files(service, number)
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
    leave_files(service, 1)
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
    leave_files(service, 1)
    ended.remove(KEY)
    assert files_of(service, 1) == {"training.json"}
