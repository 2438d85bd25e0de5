"""The only place that fetches images: from Label Studio, its cloud storages or the web, into a cache by content."""

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import unquote, unquote_to_bytes

import httpx
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from ml_backend.errors import (
    ImageError,
    ImageHostSilentError,
    ImageUnavailableError,
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioUnavailableError,
    StoreError,
    StoreUnavailableError,
)
from ml_backend.foreign_hosts import AllowedHosts, JudgingTransport, PrivateAddressError
from ml_backend.ls_client import LabelStudioClient
from ml_backend.store import Store
from model.files import naming_full_disk

logger = logging.getLogger(__name__)

_CLOUD_SCHEMES = ("s3", "gs", "azure-blob")  # what Label Studio resolves for us, with its own credentials
# Where Label Studio serves files. Anything else there is not for images, and the token can do more than read images.
_FILE_PATHS = ("/data/", "/tasks/", "/projects/", "/storage-data/", "/static/")
_DECODINGS = 3  # how often %-encoding may be wrapped into itself and is still seen through
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_EXIF_ORIENTATION = 0x0112
_TURNED = range(2, 9)  # the EXIF orientations that are not upright
_QUARTER_TURNS = range(5, 9)  # those of them that swap height and width
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Pillow's readers by file extension. `Image.open` is avoided: its guard against decompression bombs is a global of the
# process, and it would try every format that anybody registered.
_READERS: tuple[tuple[str, type[ImageFile.ImageFile]], ...] = (
    ("png", PngImagePlugin.PngImageFile),
    ("jpg", JpegImagePlugin.JpegImageFile),
    ("webp", WebPImagePlugin.WebPImageFile),
    ("tif", TiffImagePlugin.TiffImageFile),
    ("bmp", BmpImagePlugin.BmpImageFile),
)
# What Pillow raises on broken files; SyntaxError is its "not this format".
_BROKEN = (SyntaxError, OSError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error, OverflowError)


@dataclass(frozen=True, kw_only=True)
class FetchedImage:
    """An image on this disk. `sha256` of its bytes is its identity: the same image uploaded twice has it once.

    `image_hw` is (height, width) in pixels as browsers and OpenCV show it, EXIF orientation applied.
    """

    path: Path
    sha256: str
    image_hw: tuple[int, int]
    is_new: bool = field(default=False, compare=False)  # its host gave it now; it was in no cache


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may cost; beyond it the image is refused."""

    max_bytes: int = 100_000_000
    max_pixels: int = 100_000_000
    max_data_uri_bytes: int = 10_000_000
    max_seconds: float = 300.0
    timeout_seconds: float = 30.0


class ImageStore:
    """Fetches the images of tasks and keeps them under `cache_dir`: `images/ab/<sha256>.<ext>`, and one small file for
    each address that says which image it was. What is cached is never asked for again. With a `store`, the cache is
    looked for there, too, before a host is asked, and what a host gave is kept there.

    Several processes may share a cache, and a killed one leaves nothing half-written. Safe to share between threads.
    """

    def __init__(
        self,
        *,
        cache_dir: Path,
        client: LabelStudioClient,
        limits: ImageLimits | None = None,
        allowed_hosts: AllowedHosts | None = None,
        store: Store | None = None,
    ) -> None:
        self._limits = limits or ImageLimits()
        self._allowed = allowed_hosts or AllowedHosts()
        self._client, self._store = client, store
        self._is_absence_told = False  # of the store
        self._images = cache_dir / "images"
        self._index = cache_dir / "index"
        self._unfinished = cache_dir / "unfinished"
        for folder in (self._images, self._index, self._unfinished):
            folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self._unfinished)
        # They carry no token, so nothing that they reach can learn one; redirects are followed here, one by one.
        options: dict[str, Any] = {"follow_redirects": False, "timeout": self._limits.timeout_seconds}
        self._web = httpx.Client(transport=JudgingTransport(self._allowed), **options)
        self._allowed_web = httpx.Client(**options)  # for hosts that are allowed by name

    def close(self) -> None:
        self._web.close()
        self._allowed_web.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def fetch(
        self, *, task_id: int, uri: str, project_key: str = "", may_do_without_store: bool = False
    ) -> FetchedImage:
        """The image at `uri`, as it stands in the task's data. What one project had at an address of Label Studio is
        not believed of another: Label Studio may have been set up anew at the same place. What is damaged in the cache
        is fetched again.

        With `may_do_without_store`, while the store is away, an image comes from its host each time that it is asked
        for: what is known here, the store has.

        Raises ImageError when this image cannot be had or read (the others may be fine; ImageUnavailableError when it
        is worth another try, ImageHostSilentError when those of the same host may be, too), DiskFullError,
        StoreUnavailableError, and the client's errors when Label Studio itself is away or refuses the token.
        """
        source = _Source(task_id=task_id, uri=uri)
        if not _is_text(uri):
            raise source.error("expected an address, got text that is not valid Unicode")
        entry = self._index_path(uri, project_key)
        known = self._look_up(entry)
        if known is None:
            with self._excused(may_do_without_store):
                known = self._brought(entry)
        if known is not None:
            return known
        with self._space_for(source), _unfinished_file(self._unfinished) as (file, unfinished):
            sha256 = self._write(source, file)
            extension, image_hw = self._inspect(source, unfinished)
            path = self._images / sha256[:2] / f"{sha256}.{extension}"
            _publish(file, unfinished, path)
            with self._excused(may_do_without_store):
                self._remember(entry, path, image_hw)
        return FetchedImage(path=path, sha256=sha256, image_hw=image_hw, is_new=True)

    def at_hand(self, path: Path) -> Path:
        """Where the file of a cache, perhaps another machine's, lies in this one; brought from the store if there is
        one that has it."""
        if self._store is None:
            return path
        here = self._images / path.name[:2] / path.name
        if not here.exists():
            self._store.download(here)
        return here

    def may_be_had(self, path: Path) -> bool:
        """Whether the file of a cache, perhaps another machine's, need not be fetched again, as far as one can tell."""
        return self._store is not None or path.exists()

    # The cache

    def _index_path(self, uri: str, project_key: str) -> Path:
        """Where the answer for an address is kept: by a hash, since addresses are long and may contain signatures."""
        own_path = self._client.own_path(uri)
        is_on_label_studio = own_path is not None or _scheme(uri) in _CLOUD_SCHEMES
        address = f"{self._client.url} {project_key} {own_path or uri}" if is_on_label_studio else uri
        key = hashlib.sha256(address.encode()).hexdigest()
        return self._index / key[:2] / f"{key}.json"

    def _look_up(self, entry: Path) -> FetchedImage | None:
        known = self._known(entry)
        if known is None or not is_whole(known.path):  # somebody tidied the cache up, or the disk damaged it
            return None
        return known

    def _known(self, entry: Path) -> FetchedImage | None:
        """Which image it was at an address, here or not; None when it was never seen, or the entry is damaged."""
        try:
            known = json.loads(entry.read_bytes())
            sha256, extension, image_hw = known["sha256"], known["extension"], (known["height"], known["width"])
            if not _SHA256.fullmatch(sha256) or extension not in dict(_READERS):  # they become a path
                return None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        path = self._images / sha256[:2] / f"{sha256}.{extension}"
        return FetchedImage(path=path, sha256=sha256, image_hw=image_hw)

    def _brought(self, entry: Path) -> FetchedImage | None:
        """What the store has for an address, from now on in the cache here; None when it has nothing whole."""
        if self._store is None or not (entry.exists() or self._store.download(entry)):
            return None
        known = self._known(entry)
        if known is None:
            return None
        try:
            self._store.download(known.path, sha256=known.sha256)
        except StoreUnavailableError:
            raise
        except StoreError:  # damaged there: the host has another copy
            return None
        return self._look_up(entry)

    def _remember(self, entry: Path, path: Path, image_hw: tuple[int, int]) -> None:
        known = {"sha256": path.stem, "extension": path.suffix[1:], "height": image_hw[0], "width": image_hw[1]}
        content = json.dumps(known).encode()
        if self._store:  # before it is known here: what is known is not fetched again
            self._store.upload(path)
            self._store.write(entry, content)
        with _unfinished_file(self._unfinished) as (file, unfinished):
            file.write(content)
            _publish(file, unfinished, entry)

    @contextmanager
    def _excused(self, is_excused: bool) -> Iterator[None]:
        """A store that is away ends the block and, if it may, nothing else; that is told once each time."""
        try:
            yield
            self._is_absence_told = False
        except StoreUnavailableError as error:
            if not is_excused:
                raise
            if not self._is_absence_told:
                logger.warning("images come from their hosts for the time being: %s", error)
            self._is_absence_told = True

    def _space_for(self, source: "_Source") -> AbstractContextManager[None]:
        return naming_full_disk(f"the image of task {source.task_id}", self._unfinished)

    # Fetching

    def _write(self, source: "_Source", file: IO[bytes]) -> str:
        """Write the bytes to `file`; returns their SHA-256."""
        if _scheme(source.uri) == "data":
            chunks: Iterable[bytes] = [_decode_data_uri(source, self._limits.max_data_uri_bytes)]
            return self._copy(source, chunks, file)
        try:
            with self._follow(source) as response:
                self._check_announced(source, response)
                return self._copy(source, response.iter_bytes(_CHUNK_BYTES), file)
        except (LabelStudioUnavailableError, LabelStudioAuthError):
            raise  # no fault of the image
        except LabelStudioError as error:
            raise source.error(f"expected an image, got an error: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            kind = ImageHostSilentError if isinstance(error, httpx.TransportError) else ImageError
            raise source.error(f"expected an image, the download failed: {reason}", kind) from error

    @contextmanager
    def _follow(self, source: "_Source") -> Iterator[httpx.Response]:
        """The open response at the end of all redirects; each address on the way is judged anew."""
        address = self._first_address(source)
        for _ in range(_MAX_REDIRECTS + 1):
            with self._open(source, address) as response:
                if not response.has_redirect_location:
                    yield response
                    return
                address = str(response.url.join(response.headers["location"]))
        raise source.error(f"expected an image, got more than {_MAX_REDIRECTS} redirects")

    def _first_address(self, source: "_Source") -> str:
        if _scheme(source.uri) in _CLOUD_SCHEMES:
            if type(source.task_id) is not int:  # it becomes a part of a path
                raise source.error(f"expected a whole number as the id of the task, got {source.task_id!r:.50}")
            encoded = base64.urlsafe_b64encode(source.uri.encode()).decode()
            return f"/tasks/{source.task_id}/resolve/?fileuri={encoded}"
        return source.uri

    @contextmanager
    def _open(self, source: "_Source", address: str) -> Iterator[httpx.Response]:
        """Label Studio's own addresses through its client, which holds the token; all others without it."""
        own_path = self._client.own_path(address)
        if own_path is not None:
            _check_own_path(source, own_path)
            with self._client.download(address) as response:
                yield response
            return
        _check_foreign_address(source, address)
        with self._stream(source, address) as response:
            if not (response.is_success or response.has_redirect_location):
                status = response.status_code
                kind = ImageUnavailableError if status in (408, 429) or status >= 500 else ImageError
                raise source.error(f"expected an image, the server answered {status}", kind)
            yield response

    @contextmanager
    def _stream(self, source: "_Source", address: str) -> Iterator[httpx.Response]:
        host = httpx.URL(address).host
        web = self._allowed_web if self._allowed.has_name(host) else self._web
        try:
            with web.stream("GET", address) as response:
                yield response
        except PrivateAddressError as error:
            raise source.error(
                f"{host} has a private address ({error}), from which images are fetched only if that is allowed: set "
                f"TSP_ALLOWED_IMAGE_HOSTS={self._allowed.with_host(host)} for the web process and the worker"
            ) from error

    def _check_announced(self, source: "_Source", response: httpx.Response) -> None:
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limits.max_bytes:
            raise source.error(f"expected at most {self._limits.max_bytes} bytes, the server announces {announced}")

    def _copy(self, source: "_Source", chunks: Iterable[bytes], file: IO[bytes]) -> str:
        digest = hashlib.sha256()
        size = 0
        deadline = time.monotonic() + self._limits.max_seconds
        for chunk in chunks:
            size += len(chunk)
            if size > self._limits.max_bytes:
                raise source.error(f"expected at most {self._limits.max_bytes} bytes, got more")
            if time.monotonic() > deadline:
                raise source.error(f"expected the image within {self._limits.max_seconds:.0f} s, got {size} bytes")
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        return digest.hexdigest()

    # Judging

    def _inspect(self, source: "_Source", path: Path) -> tuple[str, tuple[int, int]]:
        """(extension, (height, width)). The size comes from the header, before any pixel is decoded; then all are, so
        that a damaged image is found here and not in the middle of a training."""
        with path.open("rb") as file:
            extension, image = _read_header(source, file)
            with image:
                width, height = image.size
                if width * height > self._limits.max_pixels:
                    raise source.error(
                        f"expected at most {self._limits.max_pixels} pixels, got {width} x {height} = {width * height}"
                    )
                try:
                    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
                    image.draft(None, (1, 1))  # of a JPEG, all bytes are read and few pixels made
                    image.load()
                except _BROKEN as error:
                    raise source.error(f"expected a whole image, got a damaged {extension} file: {error}") from error
        if orientation in _TURNED and extension not in ("png", "jpg"):
            # OpenCV ignores it in WebP and cannot read such a TIFF; browsers show both turned.
            raise source.error(f"a {extension} file that is turned by EXIF orientation {orientation}: save it upright")
        if orientation in _QUARTER_TURNS:
            width, height = height, width
        return extension, (height, width)


def is_whole(path: Path) -> bool:
    """Whether a file of the cache is there, with the bytes that gave it its name."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == path.stem
    except OSError:  # of a disk that cannot read it, too
        return False


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where an image comes from, to be named in errors."""

    task_id: int
    uri: str

    def error(self, problem: str, kind: type[ImageError] = ImageError) -> ImageError:
        """An error of this kind that names the image."""
        shown = self.uri
        if "://" in shown:  # signatures are in the query, passwords before the host
            shown = re.sub(r"//[^/]*@", "//", shown.partition("?")[0], count=1)
        return kind(f"image of task {self.task_id} ({shown[:200]}): {problem}")


def _check_foreign_address(source: _Source, address: str) -> None:
    """Whether an address outside Label Studio may be asked at all; also called for each redirect."""
    if _scheme(address) not in ("http", "https") or not httpx.URL(address).host:
        clouds = ", ".join(f"{scheme}://" for scheme in _CLOUD_SCHEMES)
        raise source.error(
            f"expected http(s)://, {clouds}, data: or a path on Label Studio such as /data/upload/..., "
            f"got {address.partition('?')[0][:200]!r}"
        )


def _check_own_path(source: _Source, own_path: str) -> None:
    """Whether Label Studio may be asked for this with our token: the files that it serves, without detours."""
    path, decoded = own_path.partition("?")[0], own_path
    for _ in range(_DECODINGS):
        decoded = unquote(decoded)
    if ".." in re.split(r"[/\\?&=]", decoded) or "\\" in decoded or "\0" in decoded:
        raise source.error("expected a path without '..', backslashes and null characters")
    if not path.startswith(_FILE_PATHS):
        raise source.error(f"expected a file of Label Studio, below {', '.join(_FILE_PATHS)}, got {path[:200]!r}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON can smuggle in
        return False
    return True


def _scheme(address: str) -> str:
    scheme, colon, _ = address.partition(":")
    return scheme.lower() if colon else ""


def _decode_data_uri(source: _Source, max_bytes: int) -> bytes:
    """The bytes of `data:[<type>][;base64],<data>`."""
    header, comma, payload = source.uri.partition(",")
    if not comma:
        raise source.error("expected data:image/...;base64,..., got no comma")
    if len(payload) > max_bytes * 3:  # %-encoding, the longest, takes three characters a byte
        raise source.error(f"expected at most {max_bytes} bytes in a data: address, got {len(payload)} characters")
    try:
        is_base64 = header.lower().endswith(";base64")
        content = base64.b64decode(payload, validate=True) if is_base64 else unquote_to_bytes(payload)
    except (binascii.Error, ValueError) as error:
        raise source.error(f"expected base64 in a data: address: {error}") from error
    if len(content) > max_bytes:
        raise source.error(f"expected at most {max_bytes} bytes in a data: address, got {len(content)}")
    return content


def _read_header(source: _Source, file: IO[bytes]) -> tuple[str, ImageFile.ImageFile]:
    for extension, reader in _READERS:
        file.seek(0)
        try:
            return extension, reader(file)
        except Image.DecompressionBombError as error:  # WebP's reader has a limit of its own
            raise source.error(f"expected fewer pixels: {error}") from error
        except _BROKEN:
            continue  # another format, or damaged beyond recognition
    file.seek(0)
    start = file.read(16)
    came = f"a file that starts with {start!r}" if start else "an empty file"
    raise source.error(f"expected a whole PNG, JPEG, WebP, TIFF or BMP image, got {came}")


@contextmanager
def _unfinished_file(folder: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file under a name of its own, gone at the end unless it was published."""
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _publish(file: IO[bytes], unfinished: Path, path: Path) -> None:
    """Give a finished file its name, in one step that survives a crash."""
    file.flush()
    os.fsync(file.fileno())
    path.parent.mkdir(exist_ok=True)
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # a rename is on the disk only when its folder is
    finally:
        os.close(folder)


def _remove_leftovers(folder: Path) -> None:
    """What killed processes left unfinished; a day's age says that nobody is writing it any more."""
    long_ago = time.time() - 24 * 3600
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < long_ago:
                path.unlink()
        except FileNotFoundError:
            continue  # another process was quicker
