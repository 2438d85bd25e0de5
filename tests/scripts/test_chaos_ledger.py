"""The ledger of a chaos run, and the checks that compare everything with it: each must be able to fail."""

import json

import numpy as np
import pytest

from ml_backend.db import CycleRow
from scripts import chaos_checks as checks
from scripts.chaos_checks import Snapshot
from scripts.chaos_ledger import Kept, Ledger, content_of
from tests.model.examples import rectangle

PLANNED = "2026-01-01T00:00:00.000000+00:00"
MOMENT = checks.unix(PLANNED)


def ledger(tmp_path, *entries):
    """Task 1 with image "a", imported long before; then these entries, times in seconds after the cycle was planned."""
    path = tmp_path / "ledger.jsonl"
    first = {"do": "import", "task": 1, "image": "a", "file": "a.png", "begun": -99, "ended": -98}
    lines = [
        {**entry, **{name: entry[name] + MOMENT for name in ("begun", "ended") if name in entry}}
        for entry in (first, *entries)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Ledger(path)


def drawn(content, begun, ended, **others):
    return {"do": "annotate", "task": 1, "annotation": 7, "cancelled": False, "content": content,
            "begun": begun, "ended": ended, **others}  # fmt: skip


def cycle(number=1, **others):
    fields = {"status": "done", "reason": "8 newly annotated images (a batch is 8)", "error": "", "facts": {}}
    return CycleRow(project_key="1-2", number=number, planned_at=PLANNED, **{**fields, **others})


def test_a_ledger_that_is_read_again_is_the_same(tmp_path):
    first = Ledger(tmp_path / "ledger.jsonl")
    begun = first.begin("import", image="a", file="a.png")
    first.end("import", begun, task=1, image="a", file="a.png")
    begun = first.begin("annotate", task=1)
    first.end("annotate", begun, task=1, annotation=7, cancelled=False, content="x")
    first.begin("remove", task=1)
    again = Ledger(tmp_path / "ledger.jsonl")
    assert again.tasks == first.tasks
    assert again.annotated() == {1}
    assert again.counts == {"import": 1, "annotate": 1}
    assert again.open is not None
    assert again.open["action"] == "remove"


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).begin("press")
    with path.open("a") as file:
        file.write('{"do": "pre')
    assert Ledger(path).open["action"] == "press"
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("window", "possible"),
    [
        ((-20, -15), {None}),
        ((-20, -8), {None, "x"}),
        ((-5, 5), {"x"}),
        ((-5, 11), {"x", "y"}),
        ((20, 30), {"y"}),
        ((20, 50), {"y", None}),
    ],
)
def test_what_may_have_counted_in_a_window(tmp_path, window, possible):
    task = ledger(
        tmp_path,
        drawn("x", -10, -9),
        drawn("y", 10, 12, do="update"),
        {"do": "delete", "task": 1, "annotation": 7, "begun": 40, "ended": 41},
    ).tasks[1]
    assert task.possible(*(MOMENT + edge for edge in window)) == possible


@pytest.mark.parametrize(
    ("entries", "contents", "violations"),
    [
        ([drawn("x", -10, -9)], {"a": "x"}, 0),
        ([drawn("x", -10, -9)], {}, 1),
        ([drawn("x", -10, -9)], {"a": "y"}, 1),
        ([drawn("x", -10, -9, cancelled=True)], {"a": "x"}, 1),
        ([drawn("x", 2, 3)], {}, 0),
        ([drawn("x", 2, 3)], {"a": "x"}, 0),
        ([drawn("x", 20, 30)], {"a": "x"}, 1),
        ([], {"b": "x"}, 1),
    ],
    ids=["as drawn", "lost", "changed", "skipped", "maybe late", "maybe early", "too late", "nobody's"],
)
def test_snapshots_are_compared_with_the_ledger(tmp_path, entries, contents, violations):
    snapshot = Snapshot(ended=MOMENT + 5, contents=contents, doubled=())
    assert len(checks.check_snapshots([cycle()], {1: snapshot}, ledger(tmp_path, *entries))) == violations


def test_an_image_that_could_not_be_read_must_be_in_the_next_snapshot(tmp_path):
    known = ledger(tmp_path, drawn("x", -10, -9))
    cycles = [cycle(facts={"problem_count": 1, "problems": ["task 1: 500"]}), cycle(2)]
    first = Snapshot(ended=MOMENT + 5, contents={}, doubled=())
    for contents, violations in (({"a": "x"}, 0), ({}, 2)):
        second = Snapshot(ended=MOMENT + 5, contents=contents, doubled=())
        assert len(checks.check_snapshots(cycles, {1: first, 2: second}, known)) == violations


def test_an_image_that_is_there_twice(tmp_path):
    snapshot = Snapshot(ended=MOMENT + 5, contents={"a": "x"}, doubled=("a",))
    found = checks.check_snapshots([cycle()], {1: snapshot}, ledger(tmp_path, drawn("x", -10, -9)))
    assert found == ["cycle 1 has image a twice"]


@pytest.mark.parametrize(
    ("cycles", "violations"),
    [
        ([cycle(1), cycle(2)], 0),
        ([cycle(1), cycle(3)], 1),
        ([cycle(1, reason="3 newly annotated images (a batch is 8)")], 1),
        ([cycle(1, reason="asked for, with 3 newly annotated images")], 0),
        ([cycle(1, reason="just so")], 1),
        ([cycle(1, status="failed", error="disk full")], 1),
        ([cycle(1, status="refused")], 0),
        ([cycle(1, status="running", stage="training")], 1),
    ],
)
def test_cycles(cycles, violations):
    workflows = {f"cycle-1-2-{one.number}": "SUCCESS" for one in cycles}
    assert len(checks.check_cycles(cycles, workflows, 8)) == violations


def test_a_workflow_that_ran_for_no_cycle():
    workflows = {"cycle-1-2-1": "SUCCESS", "cycle-1-2-2": "SUCCESS"}
    assert len(checks.check_cycles([cycle()], workflows, 8)) == 1


def test_label_studio_is_compared_with_the_ledger(tmp_path):
    known = ledger(tmp_path, drawn("x", -10, -9))
    assert checks.check_label_studio({1: {7: Kept(False, "x")}}, known) == []
    for there in (
        {1: {}},
        {1: {7: Kept(True, "x")}},
        {1: {7: Kept(False, "y")}},
        {},
        {1: {7: Kept(False, "x")}, 2: {}},
    ):
        assert len(checks.check_label_studio(there, known)) == 1


@pytest.mark.parametrize(
    ("annotated", "contents", "violations"),
    [(1, {"a": "x"}, 0), (2, {"a": "x"}, 1), (1, {}, 1), (1, {"a": "y"}, 1), (1, {"a": "x", "b": "x"}, 1)],
)
def test_the_last_cycle_is_compared_with_label_studio(tmp_path, annotated, contents, violations):
    known = ledger(tmp_path, drawn("x", -10, -9))
    last = cycle(facts={"annotated": annotated, "problem_count": 0})
    snapshot = Snapshot(ended=MOMENT, contents=contents, doubled=())
    assert len(checks.check_last_cycle(last, snapshot, {1: {7: Kept(False, "x")}}, known)) == violations


def test_steps_are_counted_from_the_log():
    log = "".join(f"DEBUG ml_backend.cycle: project 1-2, cycle {c}: step {s} of 9\n"
                  for c, s in [(1, 1), (1, 2), (1, 3), (1, 3), (1, 4), (2, 1), (2, 2), (2, 1), (2, 2)])  # fmt: skip
    steps = checks.count_steps(log)
    assert steps == checks.Steps(done=9, repeated=3, worst=2, interruptions=2)
    assert checks.check_steps(steps, checkpoint_steps=2) == []
    assert len(checks.check_steps(steps, checkpoint_steps=1)) == 1


def test_contents_are_equal_for_equal_instances_in_any_order():
    first, second = rectangle(1, 1, 9, 9), rectangle(20, 20, 30, 30)
    rles = [{"counts": f"{mask.sum()}", "size": [64, 64]} for mask in (first, second)]
    labels = np.array([1, 2])
    assert content_of(labels, rles) == content_of(labels[::-1], rles[::-1])
    assert content_of(labels, rles) != content_of(labels[::-1], rles)
