"""When a cycle starts."""

import pytest

from ml_backend.planner import Situation, plan


@pytest.mark.parametrize(
    ("annotated", "new", "running", "requested", "start", "reason"),
    [
        pytest.param(0, 0, False, False, False, "0 of 10 images of the next batch are annotated", id="nothing yet"),
        pytest.param(9, 9, False, False, False, "9 of 10 images of the next batch are annotated", id="one too few"),
        pytest.param(10, 10, False, False, True, "10 newly annotated images (a batch is 10)", id="a batch"),
        pytest.param(25, 25, False, False, True, "25 newly annotated images (a batch is 10)", id="more than a batch"),
        pytest.param(30, 9, False, False, False, "9 of 10 images", id="old annotations do not count"),
        pytest.param(30, 10, True, False, False, "a cycle is running", id="a batch during a cycle"),
        pytest.param(30, 3, True, True, False, "a cycle is running", id="asked for during a cycle"),
        pytest.param(30, 10, True, True, False, "a cycle is running", id="a batch and asked for during a cycle"),
        pytest.param(3, 3, False, True, True, "asked for, with 3 newly annotated images", id="asked for early"),
        pytest.param(30, 0, False, True, True, "asked for, with 0 newly annotated images", id="asked for once more"),
        pytest.param(0, 0, False, True, False, "no image is annotated yet", id="asked for with nothing to learn"),
        pytest.param(
            10, 10, False, True, True, "10 newly annotated images (a batch is 10)", id="a batch and asked for"
        ),
    ],
)
def test_a_cycle_starts_with_a_whole_batch_or_when_asked_for_and_never_beside_another(
    annotated: int, new: int, running: bool, requested: bool, start: bool, reason: str
) -> None:
    situation = Situation(annotated=annotated, new=new, batch_size=10, running=running, requested=requested)
    decision = plan(situation)
    assert decision.start is start
    assert reason in decision.reason


FAILED = "the last cycle failed before it had read the annotations. The next one starts at 12:30 UTC, or at once when"


@pytest.mark.parametrize(
    ("new", "requested", "start", "reason", "is_problem"),
    [
        pytest.param(10, False, False, FAILED, True, id="a batch"),
        pytest.param(10, True, True, "10 newly annotated images", False, id="a batch and asked for"),
        pytest.param(3, True, True, "asked for, with 3 newly annotated images", False, id="asked for"),
        pytest.param(3, False, False, "3 of 10 images of the next batch", False, id="no batch any more"),
    ],
)
def test_after_a_cycle_that_read_no_annotation_the_next_one_starts_later_or_when_asked_for(
    new: int, requested: bool, start: bool, reason: str, is_problem: bool
) -> None:
    decision = plan(
        Situation(annotated=30, new=new, batch_size=10, running=False, requested=requested, try_again_at="12:30 UTC")
    )
    assert (decision.start, decision.is_problem) == (start, is_problem)
    assert decision.reason.startswith(reason)
