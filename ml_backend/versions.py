"""The versions that a project has, and how people make another one the active one.

    python -m ml_backend.versions list <project>
    python -m ml_backend.versions activate <project> <version>
    python -m ml_backend.versions forget <project> [--delete-data]

A project is named by its key, "<id>-<unix time of creation>", or by its id in Label Studio. The command and the
dashboard only write down what is wanted; the worker does it, goes on after a crash, and tells how far it is.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import func, make_url, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ml_backend import inbox
from ml_backend.db import ActivationRow, CycleRow, ProjectRow, is_forgotten, unfinished_work
from ml_backend.forget import DATA_GOES, FORGOTTEN, forget
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.errors import InvalidInputError, TSPError


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
            return add_activation(session, project_key, version, reason)
    except IntegrityError as error:  # somebody else has asked in this moment
        raise InvalidInputError(
            f"project {project_key}: another version was just asked for; look at it first"
        ) from error


def add_activation(session: Session, project_key: str, version: str, reason: str) -> int:
    """The wish for a version, within a transaction; its number."""
    newest = select(func.max(ActivationRow.number)).where(ActivationRow.project_key == project_key)
    number = (session.scalar(newest) or 0) + 1
    session.add(ActivationRow(project_key=project_key, number=number, version=version, reason=reason))
    return number


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
    activation.add_argument("version", help="one that `list` names")
    forgetting.add_argument("--delete-data", action="store_true", help="also remove its versions, scores and history")
    arguments = parser.parse_args()
    try:
        settings = Settings.from_environment()
        _refuse_new_place(settings)
        service = Service.connect(settings)
        project_key = _key_of(service, arguments.project)
        if arguments.command == "list":
            _print_versions(service, project_key)
        elif arguments.command == "activate":
            request_activation(service, project_key, arguments.version, "asked for on the command line")
            print(f"{arguments.version} is asked for: the worker publishes it; the dashboard shows how far it is")
        else:
            forget(service, project_key, delete_data=arguments.delete_data)
            print(FORGOTTEN.format(key=project_key))
            if arguments.delete_data:
                print(DATA_GOES)
    except TSPError as error:
        sys.exit(str(error))


def _refuse_new_place(settings: Settings) -> None:
    """InvalidInputError when nothing was ever kept where the settings say; it would be made, and be empty."""
    address = make_url(settings.database)
    if address.get_backend_name() == "sqlite" and address.database and not Path(address.database).exists():
        raise InvalidInputError(
            f"expected a project's state in {address.database}, but no such file exists: set MODEL_DIR or DATABASE_URL "
            "as they are set for the worker"
        )


def _print_versions(service: Service, project_key: str) -> None:
    if is_forgotten(service.database, project_key):
        print(f"{project_key} is forgotten: connected to Label Studio again, it goes on where it was.")
    for version in versions_overview(service, project_key):
        map_50 = "" if version["map_50"] is None else f"mask mAP@0.5 {version['map_50']:.3f}"
        active = "active" if version["is_active"] else ""
        print(f"{version['version']}  {version['created_at'][:19]}  {map_50:18}  {active:6}  {version['gate']}")


if __name__ == "__main__":
    main()
