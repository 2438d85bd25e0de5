"""Projects that people do not want to see any more: connected by mistake, or deleted in Label Studio."""

import logging
import shutil
from collections.abc import Callable

from sqlalchemy import delete, select

from ml_backend.db import (
    ActivationRow,
    CycleRow,
    EventRow,
    ForgottenRow,
    PoolLookRow,
    PostponedTaskRow,
    ProjectRow,
    UsedTaskRow,
    unfinished_work,
)
from ml_backend.inbox import check_known
from ml_backend.service import Service

logger = logging.getLogger(__name__)

FORGOTTEN = (
    "Project {key} is forgotten. If Label Studio still has the connection (project settings > Model), remove it there: "
    "it would connect the project again the next time it asks for the backend's state."
)

DATA_GOES = (
    "The worker now deletes its versions, scores and history. Copies of its images stay in MODEL_DIR/cache: other "
    "projects may show them."
)


def forget(service: Service, project_key: str, *, delete_data: bool = False) -> None:
    """Leave a project alone from now on; what runs for it ends soon. Connected again, it goes on where it was.

    With `delete_data` the worker also removes its versions, scores and history, so that it would begin anew. What Label
    Studio holds stays as it is.
    """
    check_known(service.database, project_key)
    with service.database.session() as session:
        session.merge(ForgottenRow(project_key=project_key, delete_data=delete_data))


def forgotten_projects(service: Service) -> list[str]:
    """Those whose data is still there, so that they would go on if they were connected again."""
    with service.database.session() as session:
        query = select(ProjectRow.key).where(ProjectRow.key.in_(select(ForgottenRow.project_key)))
        return list(session.scalars(query.order_by(ProjectRow.key)))


def remove_forgotten_data(service: Service, project_key: str, delete_workflows: Callable[[list[str]], None]) -> None:
    """Remove a project's data if people have asked for that and nothing runs for it any more. What a crash leaves, the
    next call removes. Images stay in the cache: other projects may show them."""
    with service.database.session() as session:
        row = session.get(ForgottenRow, project_key)
        is_asked_for = row is not None and row.delete_data
    if is_asked_for and unfinished_work(service.database, project_key) is None:
        _remove(service, project_key, delete_workflows)


def _remove(service: Service, project_key: str, delete_workflows: Callable[[list[str]], None]) -> None:
    for folder in service.project_folders(project_key):
        if service.store:
            service.store.remove(folder)
        shutil.rmtree(folder, ignore_errors=not folder.exists())
    with service.database.session() as session:
        # Numbers start again at 1, and the workflow engine runs nothing twice under one name.
        workflows = [
            f"{what}-{project_key}-{number}"
            for table, what in ((CycleRow, "cycle"), (ActivationRow, "activation"))
            for number in session.scalars(select(table.number).where(table.project_key == project_key))
        ]
    delete_workflows(workflows)
    with service.database.session() as session:
        for rows in (CycleRow, ActivationRow, PoolLookRow, UsedTaskRow, PostponedTaskRow, EventRow):
            session.execute(delete(rows).where(rows.project_key == project_key))
        session.execute(delete(ProjectRow).where(ProjectRow.key == project_key))
        # The row stays, so that a webhook that is left in Label Studio does not bring the project back.
        session.merge(ForgottenRow(project_key=project_key, delete_data=False))
    logger.info("project %s: its data is removed", project_key)
