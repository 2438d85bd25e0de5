"""How many newly annotated images show nothing, and when that is worth an advice."""

from pathlib import Path

import numpy as np
import pytest

from ml_backend.db import Database, ProjectRow, UsedTaskRow
from ml_backend.empty_batch import advice, facts_of_batch
from model.strategies import STRATEGIES
from model.types import LabeledImage, Rle

KEY = "5-1735787045"
ADVISED = {"tsp", "tsp_without_box", "tsp_without_box_and_mask", "hybrid"}


def image(instances: int) -> LabeledImage:
    rle: Rle = {"size": [4, 4], "counts": "03"}
    labels = np.ones(instances, dtype=np.int64)
    return LabeledImage(image_id="a", path=Path("a.png"), image_hw=(4, 4), labels=labels, rles=(rle,) * instances)


def batch(new: int, empty: int) -> dict[str, int]:
    return {"new_images": new, "new_empty_images": empty}


def test_only_images_that_are_new_in_the_cycle_count(database: Database) -> None:
    with database.session() as session:
        session.add(ProjectRow(key=KEY, label_studio_id=5, title="CT"))
        session.flush()
        first_cycles = {1: 1, 2: 1, 3: 2, 4: 2, 5: 2}
        session.add_all(UsedTaskRow(project_key=KEY, task_id=t, first_cycle=n) for t, n in first_cycles.items())
    images = {1: image(0), 2: image(0), 3: image(0), 4: image(2)}  # 5 has a problem
    assert facts_of_batch(database, KEY, 1, images) == batch(2, 2)
    assert facts_of_batch(database, KEY, 2, images) == batch(2, 1)
    assert facts_of_batch(database, KEY, 3, images) == batch(0, 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whoever_ranks_by_eq_3_is_advised_when_most_are_empty(strategy: str) -> None:
    said = advice([batch(50, 43)], strategy)
    assert bool(said) == (strategy in ADVISED)
    if said:
        assert said.startswith(
            f"43 of the 50 images that were annotated for the newest cycle show nothing to label, and `{strategy}` "
        )
        assert "TSP_STRATEGY=tsp_expected" in said


@pytest.mark.parametrize(
    ("facts", "advised"),
    [
        pytest.param([], False, id="no cycle"),
        pytest.param([{}], False, id="a cycle of an older release"),
        pytest.param([batch(50, 25)], False, id="half"),
        pytest.param([batch(50, 26)], True, id="more than half"),
        pytest.param([batch(9, 9)], False, id="few"),
        pytest.param([batch(0, 0), batch(50, 43)], True, id="a newer cycle without new images"),
        pytest.param([{}, batch(50, 43)], True, id="a newer cycle that has not read its annotations"),
        pytest.param([batch(50, 5), batch(50, 43)], False, id="a newer cycle with others"),
    ],
)
def test_the_newest_cycle_with_new_images_decides(facts: list[dict[str, int]], advised: bool) -> None:
    assert bool(advice(facts, "tsp")) == advised
