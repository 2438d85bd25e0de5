"""A pool that is cut into chunks: nothing is lost, doubled or half there."""

from pathlib import Path
from typing import Any

import pytest

from ml_backend.chunks import cut, find_cut, open_cut


def tasks(count: int) -> list[dict[str, Any]]:
    return [{"id": 10 + number, "data": {"image": f"/data/ü{number}.png"}} for number in range(count)]


def cut_pool(folder: Path, count: int, size: int) -> Any:
    return cut(folder, "7-1700000000", "tsp-1-00000000", tasks(count), size=size)


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 100, [2]), (3, 1, [1, 1, 1]), (0, 5, [])],
    ids=["a smaller one at the end", "no rest", "one chunk", "one by one", "nothing"],
)
def test_every_task_is_in_one_chunk_in_order(tmp_path: Path, count: int, size: int, sizes: list[int]) -> None:
    pool = cut_pool(tmp_path / "chunks", count, size)
    chunks = [pool.tasks(number) for number in range(pool.chunks)]
    assert [len(chunk) for chunk in chunks] == sizes
    assert [task for chunk in chunks for task in chunk] == tasks(count)
    assert pool.total == count


def test_a_pool_is_found_as_it_was_cut_until_it_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "chunks"
    assert find_cut(folder, "7-1700000000", "tsp-1-00000000") is None
    pool = cut_pool(folder, 5, 2)
    assert find_cut(folder, "7-1700000000", "tsp-1-00000000") == pool
    pool.remove()
    assert find_cut(folder, "7-1700000000", "tsp-1-00000000") is None
    with pytest.raises(FileNotFoundError):
        open_cut(folder, "7-1700000000", "tsp-1-00000000", pool.folder.name)
    assert list(tmp_path.iterdir()) == []


def test_a_pool_whose_removal_broke_off_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = cut_pool(tmp_path / "chunks", 5, 2)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before it came to anything
        pool.remove()
    assert find_cut(tmp_path / "chunks", "7-1700000000", "tsp-1-00000000") is None
    assert cut_pool(tmp_path / "chunks", 5, 2).chunks == 3


def test_a_later_pool_of_the_same_version_has_another_name(tmp_path: Path) -> None:
    first = cut_pool(tmp_path / "chunks", 5, 2)
    first.remove()
    assert cut_pool(tmp_path / "chunks", 5, 2).folder != first.folder


def test_cutting_that_broke_off_begins_anew(tmp_path: Path) -> None:
    folder = tmp_path / "chunks"
    pool = cut_pool(folder, 5, 2)
    pool.folder.rename(folder / f".{pool.folder.name}")  # as it is called until it is whole
    assert find_cut(folder, "7-1700000000", "tsp-1-00000000") is None
    again = cut_pool(folder, 4, 2)
    assert [path.name for path in folder.iterdir()] == [again.folder.name]


def test_what_was_found_in_a_chunk_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    pool = cut_pool(tmp_path / "chunks", 4, 2)
    with pytest.raises(ValueError, match="not JSON compliant"):
        pool.keep(1, [{"task": 12, "score": 0.5}, {"task": 13, "score": float("nan")}])
    assert not pool.is_seen(1)
    with pytest.raises(FileNotFoundError):
        list(pool.lines(1))
    found = [{"task": 12, "score": 0.1 + 0.2}, {"task": 13, "problem": "größer"}]
    pool.keep(1, found)
    assert (pool.is_seen(0), pool.is_seen(1)) == (False, True)
    assert list(pool.lines(1)) == found
