"""How many of the images that people have annotated show nothing, and what to do when most of them do."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select

from ml_backend.db import Database, UsedTaskRow
from model.types import LabeledImage

# Eq. 3, a mean over what is seen in an image, is lowest where that is nothing but a doubtful speck (decision 007).
_BY_EQUATION_3 = frozenset({"tsp", "tsp_without_box", "tsp_without_box_and_mask", "hybrid"})
_FEWEST_IMAGES = 10  # of fewer, "most" says little


def facts_of_batch(
    database: Database, project_key: str, number: int, images: Mapping[int, LabeledImage]
) -> dict[str, int]:
    """Of the `images`, by task, those that cycle `number` is the first to have, and those of them without instances."""
    with database.session() as session:
        of_cycle = select(UsedTaskRow.task_id).where(
            UsedTaskRow.project_key == project_key, UsedTaskRow.first_cycle == number
        )
        new = [images[task] for task in session.scalars(of_cycle) if task in images]
    return {"new_images": len(new), "new_empty_images": sum(len(image.labels) == 0 for image in new)}


def advice(facts_by_cycle: Sequence[Mapping[str, Any]], strategy: str) -> str:
    """For the operator, "" when there is none; the newest cycle is first, `strategy` is the one that is set now."""
    new, empty = next(((f["new_images"], f["new_empty_images"]) for f in facts_by_cycle if f.get("new_images")), (0, 0))
    if strategy not in _BY_EQUATION_3 or new < _FEWEST_IMAGES or 2 * empty <= new:
        return ""
    return (
        f"{empty} of the {new} images that were annotated for the newest cycle show nothing to label, and `{strategy}` "
        "prefers images with nothing but doubtful specks. TSP_STRATEGY=tsp_expected prefers images with uncertain "
        "objects; it counts from the next cycle."
    )
