import json
import math
import os
import threading

import numpy as np
import pytest
import torch

from model.errors import DiskFullError
from model.files import read_tensors, remove_abandoned, write_bytes, write_json, write_tensors
from tests.small_disk import small_disk


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_bytes_replace_what_was_there_and_leave_nothing_else(tmp_path):
    path = tmp_path / "file"
    for content in (b"a long first content", b"", b"short"):
        write_bytes(path, content)
        assert path.read_bytes() == content
    assert entries(tmp_path) == ["file"]


def test_an_open_reader_goes_on_with_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with path.open("rb") as reader:
        write_bytes(path, b"new and longer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new and longer"


def test_readers_never_see_half_a_file_while_two_threads_replace_it(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([letter]) * 300_000 for letter in b"ab"]
    write_bytes(path, contents[0])
    stop, errors = threading.Event(), []

    def replace(content):
        try:
            while not stop.is_set():
                write_bytes(path, content)
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=replace, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    read = [path.read_bytes() for _ in range(100)]
    stop.set()
    for writer in writers:
        writer.join()
    assert errors == []
    assert set(read) <= set(contents)
    assert entries(tmp_path) == ["file"]


def test_json_comes_back_equal(tmp_path):
    value = {"text": "é \n", "numbers": [1, 2.5, -1e-9], "nothing": None, "yes": True}
    write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text()) == value


@pytest.mark.parametrize(
    ("value", "error"),
    [
        pytest.param({"loss": math.nan}, ValueError, id="NaN"),
        pytest.param([math.inf], ValueError, id="infinity"),
        pytest.param({"score": np.float32(0.5)}, TypeError, id="a numpy number"),
    ],
)
def test_what_json_cannot_say_is_refused_and_the_old_file_stays(value, error, tmp_path):
    path = tmp_path / "file.json"
    write_json(path, [1])
    with pytest.raises(error):
        write_json(path, value)
    assert json.loads(path.read_text()) == [1]
    assert entries(tmp_path) == ["file.json"]


def test_tensors_come_back_bit_for_bit_with_their_metadata(tmp_path):
    path = tmp_path / "file"
    tensors = {
        "float": torch.tensor([1.5, -0.0, math.nan, math.inf]),
        "int": torch.arange(6).reshape(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "not contiguous": torch.arange(6.0).reshape(2, 3).T,
        "with gradient": torch.ones(2, requires_grad=True),
    }
    write_tensors(path, tensors, {"step": "3"})
    read, metadata = read_tensors(path)
    assert metadata == {"step": "3"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        torch.testing.assert_close(read[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert entries(tmp_path) == ["file"]


def test_tensors_that_cannot_be_written_leave_the_old_file(tmp_path):
    path, shared = tmp_path / "file", torch.ones(10)
    write_tensors(path, {"x": torch.ones(1)}, {})
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": shared, "b": shared}, {})
    assert list(read_tensors(path)[0]) == ["x"]
    assert entries(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1], id="cut off"),
        pytest.param(lambda content: content + b"x", id="too long"),
        pytest.param(lambda content: b"PK\x03\x04" + content, id="another kind"),
    ],
)
def test_a_damaged_tensor_file_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "weights"
    write_tensors(path, {"x": torch.ones(100)}, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="weights: expected a safetensors file"):
        read_tensors(path)


def test_writing_into_a_folder_that_is_not_there_fails(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "nowhere" / "file", b"x")


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    path = tmp_path / "weights[1]"
    old, new, of_another = (
        tmp_path / f".{name}.{'0' * 31}{n}.unfinished"
        for n, name in enumerate(["weights[1]", "weights[1]", "weights1"])
    )
    for left in (old, new, of_another):
        left.touch()
    for left in (old, of_another):
        os.utime(left, (0, 0))
    remove_abandoned(path)
    assert not old.exists()
    assert new.exists()
    assert of_another.exists()


def test_on_a_full_disk_the_error_says_what_to_do_and_the_old_file_stays(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        path = disk.folder / "file"
        write_bytes(path, b"old")
        with disk.full(but=500_000), pytest.raises(DiskFullError) as failed:
            write_bytes(path, bytes(1_500_000))
        assert path.read_bytes() == b"old"
        assert entries(disk.folder) == ["file"]
        assert f"no space for {path} (1.5 MB): 0.5 MB are free on the disk of {disk.folder}. Remove" in str(
            failed.value
        )
        write_bytes(path, bytes(1_500_000))
        assert path.stat().st_size == 1_500_000


def test_an_error_that_is_not_about_space_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "nowhere" / "file", b"")
