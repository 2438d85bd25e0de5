"""The versions that a project has, and how people make another one the active one.

    python -m ml_backend.versions list <project>
    python -m ml_backend.versions activate <project> <version>
    python -m ml_backend.versions forget <project> [--delete-data]

A project is named by its key, "<id>-<unix time of creation>", or by its id in Label Studio. The command and the
dashboard only write down what is wanted; the worker does it, goes on after a crash, and tells how far it is.
"""

import argparse
import sys
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ml_backend import inbox
from ml_backend.batch import choose_batch
from ml_backend.cycle_log import CycleLog
from ml_backend.db import UNFINISHED, ActivationRow, CycleRow, ProjectRow, unfinished_work, utc_now
from ml_backend.forget import FORGOTTEN, forget
from ml_backend.pool import score_pool
from ml_backend.publish import publish
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.errors import InvalidInputError, TSPError
from model.strategies import STRATEGIES


def request_activation(service: Service, project_key: str, version: str, reason: str) -> int:
    """Write down that this version shall be the active one, and its queue Label Studio's; the number of the wish.

    TSPError when there is no such project or version, its files are not all there, or the project is busy.
    """
    service.registry.check(project_key, version)
    inbox.check_known(service.database, project_key)
    if work := unfinished_work(service.database, project_key):
        raise InvalidInputError(f"project {project_key}: {work} is not finished yet; ask again when it is")
    try:
        with service.database.session() as session:
            return _add_activation(session, project_key, version, reason)
    except IntegrityError as error:  # somebody else has asked in this moment
        raise InvalidInputError(
            f"project {project_key}: another version was just asked for; look at it first"
        ) from error


def activate_version(service: Service, project_key: str, number: int, log: CycleLog) -> None:
    """Fulfil a wish: look at the tasks that the version has not seen, choose a batch if its own is used up, publish.

    Every part can be repeated and goes on where it was; until the last one, the queue stays as it is.
    """
    with service.database.session() as session:
        version = session.get_one(ActivationRow, (project_key, number)).version or ""
        query = select(CycleRow.number).where(CycleRow.project_key == project_key, CycleRow.status.in_(UNFINISHED))
        if (running := session.scalar(query.limit(1))) is not None:  # both began in the same moment
            raise InvalidInputError(f"cycle {running} has begun meanwhile; ask again when it is finished.")
        newest_cycle = session.scalar(select(func.max(CycleRow.number)).where(CycleRow.project_key == project_key)) or 0
    log.begin()
    score_pool(service, project_key, version, log)
    choose_batch(service, project_key, newest_cycle, version, log, anew_when_used_up=True)
    publish(service, project_key, version, log)


def end_refused_cycle(service: Service, project_key: str, number: int) -> None:
    """The gate has refused what a cycle made. The active version's queue stays; where it is a batch, which people have
    used up by now, the next one is asked for."""
    active = service.registry.active(project_key)
    with service.database.session() as session:
        row = session.get_one(CycleRow, (project_key, number))
        if row.status not in UNFINISHED:
            return
        row.status, row.stage, row.finished_at = "refused", "refused", utc_now()
        if active and STRATEGIES[service.registry.card(project_key, active).strategy].chooses_a_set:
            _add_activation(
                session, project_key, active, f"cycle {number} was refused: {active} chooses the next batch"
            )


def versions_overview(service: Service, project_key: str) -> list[dict[str, Any]]:
    """The versions that are kept, the newest first, with what the gate said of each."""
    with service.database.session() as session:
        query = select(CycleRow.version, CycleRow.facts).where(CycleRow.project_key == project_key)
        facts: dict[str | None, dict[str, Any]] = {row.version: row.facts for row in session.execute(query)}
    active = service.registry.active(project_key)
    return [
        {
            "version": version,
            "created_at": (card := service.registry.card(project_key, version)).created_at,
            "is_active": version == active,
            "map_50": card.metrics.get("map_50"),
            "strategy": card.strategy,
            "gate": facts.get(version, {}).get("gate", {}).get("reason", ""),
        }
        for version in reversed(service.registry.versions(project_key))
    ]


def _add_activation(session: Session, project_key: str, version: str, reason: str) -> int:
    newest = select(func.max(ActivationRow.number)).where(ActivationRow.project_key == project_key)
    number = (session.scalar(newest) or 0) + 1
    session.add(ActivationRow(project_key=project_key, number=number, version=version, reason=reason))
    return number


def _key_of(service: Service, name: str) -> str:
    """The project's key, of its key or its id in Label Studio."""
    if name.isdecimal():
        with service.database.session() as session:
            query = select(ProjectRow.key).where(ProjectRow.label_studio_id == int(name)).order_by(ProjectRow.key)
            keys = session.scalars(query).all()
        if len(keys) == 1:
            return keys[0]
        if keys:
            raise InvalidInputError(f"several projects have the id {name}: name one of {', '.join(keys)}")
    inbox.check_known(service.database, name)
    return name


def main() -> None:
    """Run one command with the settings of the environment."""
    parser = argparse.ArgumentParser(prog="python -m ml_backend.versions", description="versions of a project")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show the versions that are kept")
    activation = commands.add_parser("activate", help="make a version the active one, also an older or a refused one")
    forgetting = commands.add_parser("forget", help="leave a project alone until it is connected again")
    for command in (listing, activation, forgetting):
        command.add_argument("project", help='"<id>-<unix time of creation>", or the id in Label Studio')
    activation.add_argument("version")
    forgetting.add_argument("--delete-data", action="store_true", help="also remove its versions, scores and history")
    arguments = parser.parse_args()
    try:
        service = Service.connect(Settings.from_environment())
        project_key = _key_of(service, arguments.project)
        if arguments.command == "list":
            _print_versions(service, project_key)
        elif arguments.command == "activate":
            request_activation(service, project_key, arguments.version, "asked for on the command line")
            print(f"{arguments.version} is asked for: the worker publishes it; the dashboard shows how far it is")
        else:
            forget(service, project_key, delete_data=arguments.delete_data)
            print(FORGOTTEN.format(key=project_key))
    except TSPError as error:
        sys.exit(str(error))


def _print_versions(service: Service, project_key: str) -> None:
    for version in versions_overview(service, project_key):
        map_50 = "" if version["map_50"] is None else f"mask mAP@0.5 {version['map_50']:.3f}"
        active = "active" if version["is_active"] else ""
        print(f"{version['version']}  {version['created_at'][:19]}  {map_50:18}  {active:6}  {version['gate']}")


if __name__ == "__main__":
    main()
