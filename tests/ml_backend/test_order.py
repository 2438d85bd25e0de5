"""Where a task stands in the queue of a version; pure."""

from typing import Any

import pytest

from ml_backend.order import QueueOrder, queue_score
from tests.ml_backend.examples import VALIDATION_FRACTION, VERSION, grey_images, sha256

NEVER_VALIDATION = sha256(grey_images(1)[0])
ALWAYS_VALIDATION = sha256(grey_images(1, validation=True)[0])


def line(task: int, score: float | None, *, image: str = NEVER_VALIDATION) -> dict[str, Any]:
    return {"task": task, "image": image, "score": score}


def order(*batch: int) -> QueueOrder:
    return QueueOrder(version=VERSION, validation_fraction=VALIDATION_FRACTION, when_empty=0.6, batch=batch)


@pytest.mark.parametrize(
    ("line", "score"),
    [
        pytest.param(line(1, 0.25), 0.25, id="its S"),
        pytest.param(line(1, 0.0), 0.0, id="the most uncertain"),
        pytest.param(line(1, None), 0.6, id="nothing found"),
        pytest.param(line(1, 0.25, image=ALWAYS_VALIDATION), 1.0, id="validation"),
        pytest.param(line(1, None, image=ALWAYS_VALIDATION), 1.0, id="validation with nothing found"),
        pytest.param({"task": 1, "problem": "broken"}, 1.0, id="unreadable"),
    ],
)
def test_the_queue_is_in_order_of_s_and_what_cannot_teach_comes_last(line: dict[str, Any], score: float) -> None:
    assert queue_score(line, validation_fraction=VALIDATION_FRACTION, when_empty=0.6) == score
    without_batch = order()
    assert without_batch.score_of(line) == without_batch.answer_score(line) == score
    assert without_batch.version_of(1) == VERSION


def test_without_a_batch_there_is_one_name() -> None:
    assert order().versions == (VERSION,)


@pytest.mark.parametrize(
    ("line", "version", "published", "answered"),
    [
        pytest.param(line(7, 0.9), VERSION, 0.0, 0.0, id="the first of the batch"),
        pytest.param(line(5, 0.1), VERSION, 0.5, 0.5, id="the second"),
        pytest.param(line(6, 0.1), f"{VERSION}.pool", 0.1, 1.0, id="outside"),
        pytest.param(line(6, None), f"{VERSION}.pool", 0.6, 1.0, id="outside, with nothing found"),
        pytest.param({"task": 6, "problem": "broken"}, f"{VERSION}.pool", 1.0, 1.0, id="unreadable"),
    ],
)
def test_a_batch_stands_in_its_own_order_and_the_rest_elsewhere(
    line: dict[str, Any], version: str, published: float, answered: float
) -> None:
    with_batch = order(7, 5)
    assert with_batch.versions == (VERSION, f"{VERSION}.pool")
    assert with_batch.version_of(line["task"]) == version
    assert with_batch.score_of(line) == published
    assert with_batch.answer_score(line) == answered


def test_the_scores_of_a_long_batch_rise_and_stay_below_one() -> None:
    tasks = range(5000, 0, -1)
    scores = [order(*tasks).score_of(line(task, 0.5)) for task in (5000, 4999, 4998, 2, 1)]
    assert scores == sorted(set(scores))
    assert 0 <= scores[0] < scores[-1] < 1
