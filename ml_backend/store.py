"""A second place for the files of MODEL_DIR, in an object store, so that processes on several machines need no disk in
common (docs/decisions/083).

A file has the same name there as below MODEL_DIR, and gets it by one request: it is whole or not there.
"""

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from ml_backend.errors import SettingsError, StoreError, StoreUnavailableError
from ml_backend.settings import Settings
from model.files import create_private, is_unfinished, naming_full_disk, replacement, write_bytes

logger = logging.getLogger(__name__)

_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec"}  # whose errors tell of a store that is away
_PARTS = ".parts"
_PART_NAME = re.compile(r"(\d{15,})-([0-9a-f]{64})")
_PART_BYTES = 32_000_000  # about as many go into the memory at once
_REMOVED_AT_ONCE = 1000  # what S3 takes in a request
_MOST_REMOVALS = 20  # of a folder in which something new is found each time
# Those who go on with what they remember ask a store that is silent once, no longer than this, and then rest.
_PATIENCE_SECONDS = 5.0
_REST_SECONDS = 5.0
_ATTEMPT_SECONDS = 12.0  # of the others, for whom s3fs tries five times
# botocore, below s3fs, would try each of these five times.
_ONE_ATTEMPT = {"retries": {"total_max_attempts": 1}}


def open_store(settings: Settings, *, remembers_seconds: float = 0.0) -> "Store | None":
    """The store of TSP_STORE_URL, which is not asked for anything yet; None without one."""
    if not settings.store_url:
        return None
    if settings.store_url.startswith("s3://") and importlib.util.find_spec("s3fs") is None:
        raise SettingsError(
            "TSP_STORE_URL: s3:// needs the package s3fs, which is not installed: pip install 'tsp-active-learning[s3]'"
        )
    return Store(settings.store_url, settings.model_dir, remembers_seconds=remembers_seconds)


class Store:
    """The files below `folder`, by their paths there, at `url`. Safe to share between threads.

    Every method raises StoreUnavailableError when the store does not answer or refuses us, and those that write files
    here DiskFullError. `recall` may answer what was true `remembers_seconds` ago, or the last that was known while the
    store is away. Whoever remembers leaves a store that is away alone for a while.
    """

    def __init__(self, url: str, folder: Path, *, remembers_seconds: float = 0.0) -> None:
        self._url, self._folder, self._remembers_seconds = url.rstrip("/"), folder, remembers_seconds
        self._remembered: dict[tuple[str, Path], tuple[float, Any]] = {}
        self._asked: set[tuple[str, Path]] = set()  # at this moment, by any thread
        self._trouble, self._rests_until = "", 0.0

    def check(self, name: str) -> None:
        """Whether it takes a small file of this name, gives it back and removes it: what every cycle will need."""
        path = self._folder / "checks" / name
        self.write(path, name.encode())
        found = self.read(path)
        with self._asking(path):
            if found != name.encode():
                raise OSError("it does not give back what it was given")
        self.remove(path)

    def read(self, path: Path) -> bytes | None:
        """What the store has under the path of a file; None when it has nothing."""
        with suppress(FileNotFoundError), self._asking(path):
            content: bytes = self._files.cat_file(self._key(path))
            return content
        return None

    def has(self, path: Path) -> bool:
        """Whether the store has something under the path of a file."""
        with suppress(FileNotFoundError), self._asking(path):
            self._files.info(self._key(path))
            return True
        return False

    def recall(self, path: Path) -> bytes | None:
        """`read`, for small files that are asked for again and again."""
        found: bytes | None = self._recalled("read", path)
        return found

    def write(self, path: Path, content: bytes) -> None:
        """Keep this under the path of a file."""
        with self._asking(path):
            if self._is_folder:
                target = Path(self._key(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(target, content)
            else:
                self._files.pipe_file(self._key(path), content)
        self._remembered.pop(("read", path), None)

    def create(self, path: Path, content: bytes) -> bytes:
        """Keep this under the path of a file unless there is something already; returns what is there afterwards.

        Stores that know no conditional writes let the last of two win that ask in the same moment.
        """
        known = self.read(path)
        if known is not None:
            return known
        # Somebody else may be quicker, and some stores know no conditional writes, or no links.
        with self._asking(path), suppress(OSError):
            if self._is_folder:
                target = Path(self._key(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                create_private(target, content)
            else:
                self._files.pipe_file(self._key(path), content, mode="create")
        kept = self.read(path)
        if kept is None:
            self.write(path, content)
            kept = self.read(path)
        return content if kept is None else kept

    def upload(self, path: Path, *, source: Path | None = None) -> None:
        """Keep a file, which may lie elsewhere for the moment (`source`)."""
        source = source or path
        with self._asking(path):
            if self._is_folder:
                target = Path(self._key(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacement(target) as unfinished:
                    shutil.copyfile(source, unfinished)
            else:
                self._files.put_file(str(source), self._key(path))
        self._remembered.pop(("read", path), None)

    def download(self, path: Path, *, sha256: str | None = None, target: Path | None = None) -> bool:
        """Replace a file, or another one (`target`), by the store's, in one step; False when the store has none.
        StoreError when its bytes have another SHA-256 than this."""
        target = target or path
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), self._asking(path):
            with naming_full_disk(str(target), target.parent), replacement(target) as unfinished:
                # In several requests at once it could be made of two files, when another takes its place meanwhile.
                self._files.get_file(self._key(path), str(unfinished), max_concurrency=1)
                if sha256 is not None and digest_of(unfinished) != sha256:
                    raise StoreError(f"{self._shown(path)} is damaged: its SHA-256 is not {sha256}")
            return True
        return False

    def has_another(self, path: Path) -> bool:
        """Whether a small file is not what the store has, which may be nothing."""
        return self.recall(path) != _bytes_of(path)

    def refresh(self, path: Path) -> None:
        """Make a small file what the store has, which may be nothing."""
        content = self.recall(path)
        if content == _bytes_of(path):
            return
        if self._remembers_seconds:  # a worker with the same folder may have written a newer file since
            try:
                content = self.read(path)
            except StoreUnavailableError:
                if path.exists():
                    return
            else:
                self._remembered["read", path] = time.monotonic(), content
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)

    def names(self, folder: Path) -> list[str]:
        """The files below a folder, as paths from there; what is known of them may be as old as `recall`'s."""
        found: list[str] = self._recalled("names", folder)
        return found

    def everything(self, folder: Path) -> list[str]:
        """`names` as they are now, with what a process that was killed has left unfinished."""
        with self._asking(folder):
            return list(self._listed(folder, with_unfinished=True))

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all that is in it, also what others add to it in this moment; nothing happens
        when it is not there."""
        with self._asking(path):
            for _ in range(_MOST_REMOVALS):
                key = self._key(path)
                if not (self._remove_files(key) if self._is_folder else self._remove_objects(key)):
                    break
            else:
                raise OSError("there is something new in it each time that all is removed")
        self._remembered.clear()

    def _remove_files(self, key: str) -> bool:
        """Whether there may be more."""
        with suppress(FileNotFoundError):  # of something in it that another process has removed or renamed
            self._files.rm(key, recursive=True)
        return os.path.lexists(key)

    def _remove_objects(self, key: str) -> bool:
        """Whether there may be more. s3fs's own `rm` says nothing of what the store refuses to remove, and takes a "*"
        or "[" in a prefix for a pattern."""
        found = [str(name).partition("/") for name in self._files.find(key)]
        for start in range(0, len(found), _REMOVED_AT_ONCE):
            objects = [{"Key": name} for _, _, name in found[start : start + _REMOVED_AT_ONCE]]
            delete = {"Objects": objects, "Quiet": True}
            answer = self._files.call_s3("delete_objects", Bucket=found[0][0], Delete=delete)
            for refused in answer.get("Errors", []):
                raise PermissionError(f"{refused.get('Key')} is not removed: {refused.get('Message')}")
        return bool(found)

    # Files that only grow: lines are added in parts, since an object cannot be added to

    def upload_lines(self, path: Path) -> None:
        """Keep the whole lines of a file that the store lacks, as one more part, or some when they are many.
        StoreUnavailableError when the store has other lines by now, which `download_lines` brings."""
        parts = self._parts(path)
        if not path.exists():
            return
        with path.open("rb") as file:
            if parts and not parts[-1].is_in(file):
                raise StoreUnavailableError(
                    f"{self._shown(path)} has lines of another worker by now; the next try goes on with those."
                )
            start = parts[-1].end if parts else 0
            file.seek(start)
            while block := file.read(_PART_BYTES) + file.readline():
                lines = block[: block.rfind(b"\n") + 1]
                if lines:
                    self.write(_parts_folder(path) / f"{start:015d}-{hashlib.sha256(lines).hexdigest()}", lines)
                start += len(lines)

    def download_lines(self, path: Path) -> None:
        """Make a file begin with what the store has of it. Lines that follow stay only if all before were the same:
        else they belong to what a worker found that did not live to keep it, and another one has gone on since."""
        parts = self._parts(path)
        if not parts:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with naming_full_disk(str(path), path.parent), path.open("rb+") as file:
            missing = [part for part in parts if not part.is_in(file)]
            if not missing:
                return
            missing = [part for part in parts if part.start >= missing[0].start]
            file.truncate(missing[0].start)
            file.seek(missing[0].start)
            for part in missing:
                lines = self.read(part.path)
                if lines is None:
                    return  # all are being removed
                file.write(lines)

    def size_of_lines(self, path: Path) -> int:
        """How many bytes of a file to which lines are added the store has."""
        parts = self._parts(path)
        return parts[-1].end if parts else 0

    def _parts(self, path: Path) -> list["_Part"]:
        """Those that make up the file, in their order; what does not follow on another is left out."""
        parts: list[_Part] = []
        folder = _parts_folder(path)
        with self._asking(path):
            found = self._listed(folder)
        for name, size in sorted(found.items()):
            match = _PART_NAME.fullmatch(name)
            if match and int(match[1]) == (parts[-1].end if parts else 0):
                parts.append(_Part(folder / name, int(match[1]), int(match[1]) + size, match[2]))
        return parts

    def _listed(self, folder: Path, *, with_unfinished: bool = False) -> dict[str, int]:
        """The files below a folder, as paths from there, and their sizes."""
        start = f"{self._key(folder)}/"
        if self._is_folder:
            found = dict(_files_below(start))
        else:
            found = {str(key): int(about["size"]) for key, about in self._files.find(start, detail=True).items()}
        return {
            key.removeprefix(start): size
            for key, size in sorted(found.items())
            if key.startswith(start)
            and not key.endswith("/")  # as consoles show empty folders
            and (with_unfinished or not is_unfinished(key.rpartition("/")[2]))
        }

    # Asking

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system of fsspec, and the root in its words. Imported at the first question: it takes a while."""
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {}
        if not self._is_folder:
            patience = _PATIENCE_SECONDS if self._remembers_seconds else _ATTEMPT_SECONDS
            timeouts = {"connect_timeout": patience, "read_timeout": patience}
            options = {"session": _session_that_just_writes(), "config_kwargs": {**_ONE_ATTEMPT, **timeouts}}
        files, root = url_to_fs(self._url, use_listings_cache=False, skip_instance_cache=True, **options)
        if self._remembers_seconds:
            files.retries = 1  # attempts of s3fs
        return files, str(root)

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @property
    def _is_folder(self) -> bool:
        """On a file system, where a write is not one step by itself."""
        return self._url.startswith("file:")

    def _key(self, path: Path) -> str:
        return f"{self._opened[1]}/{path.relative_to(self._folder).as_posix()}"

    def _shown(self, path: Path) -> str:
        return f"{self._url}/{path.relative_to(self._folder).as_posix()}"

    def _recalled(self, what: str, path: Path) -> Any:
        known = self._remembered.get((what, path))
        if known and (time.monotonic() - known[0] < self._remembers_seconds or (what, path) in self._asked):
            return known[1]  # a store that does not answer keeps one thread waiting, not all
        self._asked.add((what, path))
        try:
            found = self.read(path) if what == "read" else self._found(path)
        except StoreUnavailableError as error:
            if known is None or not self._remembers_seconds:
                raise
            logger.warning("%s Until then, what was known before is answered.", error)
            found = known[1]
        finally:
            self._asked.discard((what, path))
        if self._remembers_seconds:
            self._remembered[what, path] = time.monotonic(), found
        return found

    def _found(self, folder: Path) -> list[str]:
        with self._asking(folder):
            return list(self._listed(folder))

    @contextmanager
    def _asking(self, path: Path) -> Iterator[None]:
        """What keeps the store from answering is a StoreUnavailableError; FileNotFoundError passes, unless more is
        missing than the one file."""
        if time.monotonic() < self._rests_until:
            raise StoreUnavailableError(self._trouble)
        try:
            if self._is_folder and not Path(self._opened[1]).is_dir():
                raise NotADirectoryError("the folder is not there: create it, or mount it")
            yield
        except Exception as error:
            is_missing = isinstance(error, FileNotFoundError) and _is_of_one_object(error)
            if is_missing or not (isinstance(error, OSError) or _is_of_a_library(error)):
                raise
            if self._remembers_seconds:
                self._rests_until = time.monotonic() + _REST_SECONDS
            self._trouble = (
                f"the store does not answer for {self._shown(path)}: {_reason(error)}. Look at the store, at "
                "TSP_STORE_URL, and at what gives endpoint and credentials (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and so "
                "on). When it answers again, this goes on where it was; after a change of these variables, start the "
                "processes again."
            )
            raise StoreUnavailableError(self._trouble) from None  # the library's words may have a password in them


@dataclass(frozen=True)
class _Part:
    """The bytes from `start` to `end` of a file."""

    path: Path
    start: int
    end: int
    sha256: str

    def is_in(self, file: IO[bytes]) -> bool:
        """Whether the file has them at their place."""
        file.seek(self.start)
        return hashlib.sha256(file.read(self.end - self.start)).hexdigest() == self.sha256


def _session_that_just_writes() -> Any:
    """botocore would ask the store before each write whether it may (Expect: 100-continue), and the HTTP library waits
    for the answer without an end."""
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    session = AioSession()
    session.unregister("before-call.s3", add_expect_header)
    return session


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _parts_folder(path: Path) -> Path:
    return path.with_name(path.name + _PARTS)


def _files_below(folder: str) -> Iterator[tuple[str, int]]:
    """The files in a folder and in those below it, and their sizes. fsspec passes over a folder that cannot be read, as
    if nothing were there."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry.path)
            else:
                with suppress(FileNotFoundError):  # removed meanwhile
                    yield entry.path, entry.stat().st_size


def _is_of_one_object(error: FileNotFoundError) -> bool:
    """Whether one object is missing, and not the bucket: nor is it a server that knows no buckets at all."""
    answer: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return bool(answer.get("Error", {}).get("Code", "NoSuchKey") == "NoSuchKey")


def _is_of_a_library(error: Exception) -> bool:
    """Whether it comes from the libraries: botocore raises ValueError for an endpoint without http://, for example."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.partition(".")[0] in _LIBRARIES for module in modules)


def _reason(error: Exception) -> str:
    """In one line, without the user name and password that an endpoint may carry."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"//[^/\s]*@", "//", words)[:500].rstrip(".")
