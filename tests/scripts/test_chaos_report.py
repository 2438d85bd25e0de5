"""What a report says of the machine and of the code that ran there."""

import subprocess

import pytest

from scripts import chaos_report
from scripts.chaos_report import commit, machine


def test_the_machine_is_told_without_its_name():
    there = machine()
    assert {"cpu", "cpus", "bfloat16", "memory_gb", "torch", "torchvision", "commit"} <= set(there)
    assert there["cpu"]
    assert there["bfloat16"] in (True, False)


@pytest.mark.parametrize(
    ("text", "model"),
    [
        pytest.param("processor\t: 0\nmodel name\t: A CPU @ 2.0GHz\n" * 2, "A CPU @ 2.0GHz", id="x86-64"),
        pytest.param("processor\t: 0\nBogoMIPS\t: 50.00\n", "unknown", id="Arm"),
        pytest.param(None, "unknown", id="no Linux"),
    ],
)
def test_the_cpu_is_the_one_that_linux_names(text, model, tmp_path):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert chaos_report._cpu_model(tmp_path / "cpuinfo") == model


def test_the_commit_says_whether_the_code_was_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) is None
    who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    (tmp_path / "docs").mkdir()
    for name in ("code.py", "docs/result.json"):
        (tmp_path / name).write_text("1")
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = commit(tmp_path)
    assert clean
    (tmp_path / "docs" / "result.json").write_text("2")
    assert commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert commit(tmp_path) == f"{clean}+changes"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
