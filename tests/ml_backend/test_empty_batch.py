"""How many newly annotated images show nothing, and when that is worth an advice."""

import numpy as np
import pytest

from ml_backend.db import Database, ProjectRow, UsedTaskRow
from ml_backend.empty_batch import facts_of_batch
from model.strategies import STRATEGIES
from model.types import LabeledImage

KEY = "5-1735787045"
ADVISED = {"tsp", "tsp_without_box", "tsp_without_box_and_mask", "hybrid"}


def image(instances: int) -> LabeledImage:
    labels = np.ones(instances, dtype=np.int64)
    rles = ({"size": [4, 4], "counts": "03"},) * instances
    return LabeledImage(image_id="a", path=__file__, image_hw=(4, 4), labels=labels, rles=rles)


def used(database: Database, cycles: dict[int, int]) -> None:
    with database.session() as session:
        session.add(ProjectRow(key=KEY, label_studio_id=5, title="CT"))
        session.flush()
        session.add_all(UsedTaskRow(project_key=KEY, task_id=t, first_cycle=n) for t, n in cycles.items())


def test_only_images_that_are_new_in_the_cycle_count(database: Database) -> None:
    used(database, {1: 1, 2: 1, 3: 2, 4: 2, 5: 2})
    images = {1: image(0), 2: image(0), 3: image(0), 4: image(2)}  # 5 has a problem
    facts = facts_of_batch(database, KEY, 2, images, "tsp")
    assert facts == {"new_images": 2, "new_empty_images": 1, "advice": ""}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whoever_ranks_by_a_mean_is_advised_when_most_are_empty(database: Database, strategy: str) -> None:
    used(database, {1: 1, 2: 1, 3: 1})
    facts = facts_of_batch(database, KEY, 1, {1: image(0), 2: image(0), 3: image(1)}, strategy)
    assert (facts["new_images"], facts["new_empty_images"]) == (3, 2)
    assert facts["advice"].startswith(f"2 of the 3 newly annotated images show nothing to label, and `{strategy}`") == (
        strategy in ADVISED
    )
    assert ("TSP_STRATEGY=tsp_expected" in facts["advice"]) == (strategy in ADVISED)


def test_without_new_images_there_is_no_advice(database: Database) -> None:
    used(database, {})
    assert facts_of_batch(database, KEY, 1, {}, "tsp") == {"new_images": 0, "new_empty_images": 0, "advice": ""}
