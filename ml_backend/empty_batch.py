"""How many of the images that people have just annotated show nothing, and what to do when most of them do."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select

from ml_backend.db import Database, UsedTaskRow
from model.strategies import STRATEGIES
from model.strategies.tsp import TSP, ExpectedTSP, PresentTSP
from model.types import LabeledImage


def facts_of_batch(
    database: Database, project_key: str, number: int, images: Mapping[int, LabeledImage], strategy: str
) -> dict[str, Any]:
    """Of the `images`, by task, those that cycle `number` is the first to have, and those of them without an instance.

    "advice" is for the operator, "" when there is none; `strategy` is the one that will choose the next images.
    """
    with database.session() as session:
        tasks = session.scalars(
            select(UsedTaskRow.task_id).where(UsedTaskRow.project_key == project_key, UsedTaskRow.first_cycle == number)
        ).all()
    new = [images[task] for task in tasks if task in images]
    empty = sum(len(image.labels) == 0 for image in new)
    return {"new_images": len(new), "new_empty_images": empty, "advice": _advice(len(new), empty, strategy)}


def _advice(new: int, empty: int, strategy: str) -> str:
    """A mean over an image's detections, such as eq. 3, is lowest where nothing but a doubtful speck is seen."""
    chosen_by = STRATEGIES[strategy]
    is_mean = isinstance(chosen_by, TSP) and not isinstance(chosen_by, ExpectedTSP | PresentTSP)
    if not is_mean or 2 * empty <= new:
        return ""
    return (
        f"{empty} of the {new} newly annotated images show nothing to label, and `{strategy}` puts images with nothing "
        "but doubtful specks first: TSP_STRATEGY=tsp_expected, which counts from the next cycle, prefers images with "
        "uncertain objects."
    )
