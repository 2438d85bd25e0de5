"""What both processes work with: settings, database, model registry, Label Studio and its images."""

import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from sqlalchemy.exc import DBAPIError

from ml_backend.annotations import AnnotatedIds
from ml_backend.db import Database
from ml_backend.errors import ProjectGoneError, SettingsError
from ml_backend.foreign_hosts import AllowedHosts
from ml_backend.images import ImageLimits, ImageStore
from ml_backend.import_turns import ImportTurns
from ml_backend.inbox import ProjectName, label_studio_id
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_http import NotFoundError
from ml_backend.ls_types import Project
from ml_backend.settings import Settings
from ml_backend.store import Store, open_store
from ml_backend.stored_registry import StoredRegistry
from model.errors import TSPError
from model.files import as_json, disk_full, write_bytes
from model.registry import Registry

_LEAST_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Service:
    """Built once in each process and handed down."""

    settings: Settings
    database: Database
    registry: Registry
    label_studio: LabelStudioClient
    images: ImageStore
    store: Store | None = None  # None: all processes share MODEL_DIR
    import_turns: ImportTurns = field(default_factory=ImportTurns)  # a worker's are shared with the others

    @cached_property
    def annotated(self) -> AnnotatedIds:
        """Which tasks are annotated."""
        return AnnotatedIds(self.label_studio)

    @classmethod
    def connect(cls, settings: Settings, *, remembers_seconds: float = 0.0) -> Self:
        """Opens the database and folders; Label Studio itself and the object store are not called yet. What small files
        the store has may be as old as `remembers_seconds`. SettingsError without a token, and for a MODEL_DIR or a
        database that cannot be used."""
        client = LabelStudioClient(
            settings.label_studio_url, settings.require_api_key(), public_url=settings.browser_url
        )
        try:
            settings.model_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=settings.model_dir):  # it may belong to somebody else
                pass
        except OSError as error:
            raise SettingsError(
                f"MODEL_DIR: expected a folder that can be made and written to, got {settings.model_dir} "
                f"({error.strerror})"
            ) from error
        store, versions = open_store(settings, remembers_seconds=remembers_seconds), settings.model_dir / "versions"
        return cls(
            settings=settings,
            database=_open_database(settings),
            registry=StoredRegistry(versions, store) if store else Registry(versions),
            store=store,
            label_studio=client,
            images=ImageStore(
                cache_dir=settings.model_dir / "cache",
                client=client,
                limits=ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
                allowed_hosts=AllowedHosts.parse(settings.allowed_image_hosts),
                store=store,
            ),
        )

    def close(self) -> None:
        self.images.close()
        self.label_studio.close()
        self.database.close()

    def check_space(self) -> None:
        """DiskFullError unless there is some on the disk of MODEL_DIR: the databases of SQLite are there, too."""
        usage = shutil.disk_usage(self.settings.model_dir)
        if usage.total and usage.free < _LEAST_BYTES:  # file systems that do not count say 0 of 0
            raise disk_full("the records of what is done", self.settings.model_dir)

    def project(self, project_key: str) -> Project:
        """The project in Label Studio; ProjectGoneError when there is none, TSPError when its id belongs to another one
        by now."""
        number = label_studio_id(project_key)
        try:
            project = self.label_studio.project(number)
        except NotFoundError as error:
            if not error.in_json:  # a proxy, or another server
                raise
            raise ProjectGoneError(
                f"project {number} is not in Label Studio any more, or the owner of LABEL_STUDIO_API_KEY may not see "
                "it: give that user access, or forget the project on the dashboard"
            ) from error
        if ProjectName.from_uid(project.uid) != ProjectName(project_key, number):
            raise TSPError(
                f"project {number} of {self.settings.label_studio_url} is another one than the project {project_key} "
                f"that was connected here: was Label Studio set up anew, or LABEL_STUDIO_URL changed? "
                f"Use another MODEL_DIR and DATABASE_URL for the new one."
            )
        return project

    def keep_json(self, path: Path, value: Any) -> None:
        """Write a small file for all processes. First into the store: else one that brings it at this moment would put
        the older one back in its place."""
        content = as_json(value)
        if self.store:
            self.store.write(path, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)

    def share(self, path: Path) -> None:
        """Let the other processes have a small file that was written; they share it already when there is no store."""
        if self.store:
            self.store.upload(path)

    def bring(self, path: Path) -> None:
        """Make a small file what another process may have written."""
        if self.store:
            self.store.refresh(path)

    def share_lines(self, path: Path) -> None:
        """The same for a file to which lines are added."""
        if self.store:
            self.store.upload_lines(path)

    def bring_lines(self, path: Path) -> None:
        """The same for a file to which another process may have added lines."""
        if self.store:
            self.store.download_lines(path)

    def has_lines_of(self, path: Path, size: int) -> bool:
        """Whether such a file has so many bytes, here and for the other processes."""
        is_so_here = size_here(path) == size
        return is_so_here and (self.store is None or self.store.size_of_lines(path) == size)

    def cycle_folder(self, project_key: str, number: int) -> Path:
        """Where a cycle keeps its snapshot and its training checkpoint."""
        return self.cycles_folder(project_key) / str(number)

    def cycles_folder(self, project_key: str) -> Path:
        """Where all cycles of a project keep theirs."""
        return self.settings.model_dir / "cycles" / project_key

    def annotations_file(self, project_key: str) -> Path:
        """What was read of the project's annotations."""
        return self.cycles_folder(project_key) / "annotations.sqlite"

    def scores_file(self, project_key: str, version: str) -> Path:
        """What a version saw in each unlabelled image, one JSON line for each task."""
        return self.scores_folder(project_key) / f"{version}.jsonl"

    def chunks_folder(self, project_key: str, version: str) -> Path:
        """Where the pool lies that several workers are looking at for a version."""
        return self.scores_folder(project_key) / f"{version}.chunks"

    def annotated_file(self, project_key: str, version: str) -> Path:
        """What a version saw in the images it was trained on, for strategies that compare images; one line each."""
        return self.scores_folder(project_key) / f"{version}.annotated.jsonl"

    def batch_file(self, project_key: str, version: str) -> Path:
        """The tasks that were chosen as a version's batch, for strategies that choose a set."""
        return self.scores_folder(project_key) / f"{version}.batch.json"

    def empty_file(self, project_key: str, version: str) -> Path:
        """Where images in which a version sees nothing stand in its queue."""
        return self.scores_folder(project_key) / f"{version}.empty.json"

    def publication_file(self, project_key: str, version: str) -> Path:
        """Under which name and in which labels a version's predictions stand in Label Studio."""
        return self.scores_folder(project_key) / f"{version}.publication.json"

    def project_folders(self, project_key: str) -> tuple[Path, ...]:
        """Everything that lies on the disk for this project alone."""
        versions = self.registry.root / project_key
        return versions, self.cycles_folder(project_key), self.scores_folder(project_key)

    def scores_folder(self, project_key: str) -> Path:
        """Where a project's versions keep what they saw."""
        return self.settings.model_dir / "scores" / project_key


def size_here(path: Path) -> int:
    """Of a file on this disk, in bytes; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def unusable_database(settings: Settings, error: DBAPIError | OSError, *, expected: str) -> SettingsError:
    """With what the database says, in one line, without the statement."""
    said = str(error.orig if isinstance(error, DBAPIError) else error)
    reason = " ".join(said.partition("\nLINE ")[0].split())  # PostgreSQL shows the statement, too
    where = "DATABASE_URL" if settings.database_url else f"the database in MODEL_DIR, {settings.model_dir}"
    return SettingsError(f"{where}: expected {expected}, but: {reason}")


def _open_database(settings: Settings) -> Database:
    """SettingsError when it does not answer, or does not let us in or make our tables."""
    try:
        return Database(settings.database)
    except (DBAPIError, OSError) as error:
        expected = "a database that answers, lets us in and lets us make tables"
        raise unusable_database(settings, error, expected=expected) from error
