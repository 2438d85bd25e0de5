"""Fetching images: from a real Label Studio, from a small web server with tricks, from data: addresses."""

import base64
import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ml_backend import images
from ml_backend.errors import (
    ImageError,
    ImageHostSilentError,
    ImageUnavailableError,
    LabelStudioAuthError,
    LabelStudioUnavailableError,
)
from ml_backend.foreign_hosts import AllowedHosts
from ml_backend.images import ImageLimits, ImageStore
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from model.dataset import load_image
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import png_bytes, raw_api

Route = Callable[[BaseHTTPRequestHandler], None]
PNG = png_bytes()
LOOPBACK = AllowedHosts.parse("127.0.0.0/8")  # where the web servers of these tests are


class Web:
    """A web server whose paths are functions, and what it was asked."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.asked: list[tuple[str, str | None]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Keeps the test output clean."""

            def do_GET(self) -> None:
                web.asked.append((self.path, self.headers.get("authorization")))
                web.routes[self.path.partition("?")[0]](self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Web":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def gives(content: bytes, status: int = 200, **headers: str) -> Route:
    def route(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return route


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    """A store whose Label Studio is not there: enough for images from elsewhere."""
    with (
        LabelStudioClient("http://127.0.0.1:9", "t" * 40) as client,
        ImageStore(cache_dir=tmp_path / "cache", client=client, allowed_hosts=LOOPBACK) as store,
    ):
        yield store


@contextmanager
def small_store(
    tmp_path: Path, limits: ImageLimits | None = None, url: str = "http://127.0.0.1:9", allowed: str = "127.0.0.0/8"
) -> Iterator[ImageStore]:
    hosts = AllowedHosts.parse(allowed)
    with (
        LabelStudioClient(url, "t" * 40) as client,
        ImageStore(cache_dir=tmp_path / "small", client=client, limits=limits, allowed_hosts=hosts) as store,
    ):
        yield store


def encoded(kind: str, *, width: int = 30, height: int = 20, orientation: int | None = None) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height), (200, 10, 10)).save(file, kind, **({"exif": exif} if orientation else {}))
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


# Label Studio's own files


@pytest.mark.label_studio
def test_an_upload_is_fetched_with_the_token_and_stored_by_its_content(
    client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(width=40, height=30, shade=7))
    client.import_files(project.id, [path])
    client.import_files(project.id, [path])
    tasks = list(client.tasks(project.id))
    assert tasks[0].data["image"] != tasks[1].data["image"]
    with ImageStore(cache_dir=tmp_path / "cache", client=client) as store:
        first, again = [store.fetch(task_id=task.id, uri=task.data["image"]) for task in tasks]
        absolute = store.fetch(task_id=tasks[0].id, uri=client.url + tasks[0].data["image"])
    assert first == again == absolute
    assert first.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert first.path.name == f"{first.sha256}.png"
    assert first.path.read_bytes() == path.read_bytes()
    assert first.image_hw == (30, 40)


@pytest.mark.label_studio
@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_a_local_file_is_fetched_through_label_studio(
    form: str, client: LabelStudioClient, project: Project, label_studio: LabelStudioServer, local_files: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = local_files / f"of-project-{project.id}"
    folder.mkdir()
    (folder / "ä b.png").write_bytes(PNG)
    with raw_api(label_studio) as api:
        storage = {"project": project.id, "path": str(folder), "use_blob_urls": True}
        api.post("/api/storages/localfiles", json=storage).raise_for_status()
    uri = f"/data/local-files/?d={folder.name}/%C3%A4%20b.png"
    with ImageStore(cache_dir=tmp_path / "cache", client=client) as store:
        fetched = store.fetch(task_id=1, uri=uri if form == "relative" else client.url + uri)
    assert fetched.path.read_bytes() == PNG


@pytest.mark.label_studio
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "uri",
    ["/data/upload/1/gone.png", "/data/local-files/?d=gone.png", "s3://bucket/not-connected.png", "/api/projects/"],
)
def test_what_label_studio_does_not_have_is_an_error_of_that_task(
    uri: str, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    (task_id,) = client.import_tasks(project.id, [{"data": {"image": uri}}])
    with (
        ImageStore(cache_dir=tmp_path / "cache", client=client) as store,
        pytest.raises(ImageError, match=f"image of task {task_id} .*expected"),
    ):
        store.fetch(task_id=task_id, uri=uri)


@pytest.mark.label_studio
def test_a_refused_token_is_no_fault_of_the_image(
    client: LabelStudioClient, project: Project, label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    client.import_files(project.id, [tmp_path / "a.png"])
    (task,) = client.tasks(project.id)
    with (
        LabelStudioClient(label_studio.url, "0" * 40) as stranger,
        ImageStore(cache_dir=tmp_path / "cache", client=stranger) as store,
        pytest.raises(LabelStudioAuthError),
    ):
        store.fetch(task_id=task.id, uri=task.data["image"])


@pytest.mark.usefixtures("impatient")
def test_a_label_studio_that_is_down_is_no_fault_of_the_image(store: ImageStore) -> None:
    with pytest.raises(LabelStudioUnavailableError):
        store.fetch(task_id=1, uri="/data/upload/1/a.png")


# Cloud storages and redirects: the token stays with Label Studio


@pytest.mark.parametrize("uri", ["s3://bucket/a b.png", "gs://bucket/a.png", "azure-blob://container/a.png"])
def test_a_cloud_image_is_resolved_by_label_studio_and_fetched_without_the_token(
    uri: str, web: Web, tmp_path: Path
) -> None:
    with Web() as cloud:
        web.routes["/tasks/7/resolve/"] = gives(b"", 303, Location=f"{cloud.url}/signed.png?signature=1")
        cloud.routes["/signed.png"] = gives(PNG)
        with small_store(tmp_path, ImageLimits(), url=web.url) as store:
            assert store.fetch(task_id=7, uri=uri).path.read_bytes() == PNG
            store.fetch(task_id=8, uri=uri)
    resolved = base64.urlsafe_b64encode(uri.encode()).decode()
    assert web.asked == [(f"/tasks/7/resolve/?fileuri={resolved}", f"Token {'t' * 40}")]
    assert cloud.asked == [("/signed.png?signature=1", None)]


def test_redirects_back_to_label_studio_carry_the_token_again(web: Web, tmp_path: Path) -> None:
    with Web() as elsewhere:
        elsewhere.routes["/a"] = gives(b"", 302, Location=f"{web.url}/data/upload/1/a.png")
        web.routes["/data/upload/1/a.png"] = gives(b"", 302, Location="/data/final.png")
        web.routes["/data/final.png"] = gives(PNG)
        with small_store(tmp_path, ImageLimits(), url=web.url) as store:
            store.fetch(task_id=1, uri=f"{elsewhere.url}/a")
    token = f"Token {'t' * 40}"
    assert elsewhere.asked == [("/a", None)]
    assert web.asked == [("/data/upload/1/a.png", token), ("/data/final.png", token)]


def test_endless_redirects_end(web: Web, store: ImageStore) -> None:
    web.routes["/a"] = gives(b"", 302, Location="/a")
    with pytest.raises(ImageError, match="more than 5 redirects"):
        store.fetch(task_id=1, uri=f"{web.url}/a")


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
def test_nobody_who_poses_as_label_studio_learns_the_token(scheme: str, web: Web, tmp_path: Path) -> None:
    token = f"Token {'t' * 40}"
    own = web.url.removeprefix("http://")
    with Web() as evil:
        evil.routes["/data/a.png"] = gives(b"", 302, Location="/data/b.png")
        evil.routes["/data/b.png"] = gives(PNG)
        web.routes["/data/out.png"] = gives(b"", 302, Location=f"{evil.url}/data/a.png")
        addresses = [
            f"{scheme}://{own}@{evil.url.removeprefix('http://')}/data/a.png",
            f"{scheme}://{evil.url.removeprefix('http://')}/data/a.png?{own}",
            f"{scheme}://localhost:{evil.url.rpartition(':')[2]}/data/a.png",
            f"{scheme}://{own}/data/out.png",
        ]
        for number, address in enumerate(addresses):
            with small_store(tmp_path / str(number), url=web.url, allowed="127.0.0.0/8,::1") as store:
                store.fetch(task_id=1, uri=address)
        assert len(evil.asked) == 8
        assert {given for _, given in evil.asked} <= {None, "Basic " + base64.b64encode(own.encode()).decode()}
    assert web.asked == [("/data/out.png", token)]


# Private addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "[::ffff:127.0.0.1]"])
def test_an_image_at_a_private_address_is_refused_with_the_setting_that_allows_it(
    host: str, web: Web, tmp_path: Path
) -> None:
    address = f"http://{host}:{web.url.rpartition(':')[2]}/a"
    web.routes["/a"] = gives(PNG)
    with (
        small_store(tmp_path, allowed="images.example,10.0.0.0/8") as store,
        pytest.raises(
            ImageError, match=r"image of task 1 .* has a private address .*web process and the worker"
        ) as told,
    ):
        store.fetch(task_id=1, uri=address)
    assert web.asked == []
    (allowed,) = re.findall(r"set TSP_ALLOWED_IMAGE_HOSTS=(\S+) for", str(told.value))
    assert allowed.startswith("images.example,10.0.0.0/8,")
    with small_store(tmp_path, allowed=allowed) as store:  # what the message says does help
        assert store.fetch(task_id=1, uri=address).path.read_bytes() == PNG


def test_a_private_label_studio_is_asked_and_its_storage_needs_the_setting(web: Web, tmp_path: Path) -> None:
    with Web() as storage:
        web.routes["/tasks/7/resolve/"] = gives(b"", 303, Location=f"{storage.url}/bucket/a.png?signature=secret")
        storage.routes["/bucket/a.png"] = gives(PNG)
        with (
            small_store(tmp_path, url=web.url, allowed="") as store,
            pytest.raises(ImageError, match=r"s3://bucket/a\.png.*TSP_ALLOWED_IMAGE_HOSTS=127\.0\.0\.1 ") as told,
        ):
            store.fetch(task_id=7, uri="s3://bucket/a.png")
        assert "secret" not in str(told.value)
        assert storage.asked == []
        with small_store(tmp_path, url=web.url, allowed="127.0.0.1") as store:
            assert store.fetch(task_id=7, uri="s3://bucket/a.png").path.read_bytes() == PNG


def test_a_redirect_to_a_private_address_is_refused(web: Web, tmp_path: Path) -> None:
    with Web() as inner:
        web.routes["/a"] = gives(b"", 302, Location=inner.url.replace("127.0.0.1", "127.0.0.2"))
        with (
            small_store(tmp_path, allowed="127.0.0.1") as store,
            pytest.raises(ImageError, match=r"127\.0\.0\.2 has a private address"),
        ):
            store.fetch(task_id=1, uri=f"{web.url}/a")


# What of Label Studio is no file


@pytest.mark.parametrize(
    "uri",
    [
        "/api/projects/", "/user/logout", "/", "/data", "/data/../api/users/", "/data/%2e%2e/api/users/",
        "/data/%252e%252e/api/users/", "/data/..%2fapi/users/", "/data/..\\api", "/data/%5c..%5capi/",
        "/data/local-files/?d=../../etc/passwd", "/data/local-files/?d=%2e%2e%2fetc/passwd",
        "/data/local-files/?d=a/..%252f..%252fetc/passwd", "/data/local-files/?x=1&d=..", "/data/a%00.png",
        "/dataset/a.png", "/admin/", "//127.0.0.1/data/a.png",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_label_studio_is_asked_for_files_only_and_without_detours(
    uri: str, form: str, web: Web, tmp_path: Path
) -> None:
    with small_store(tmp_path, url=web.url) as store, pytest.raises(ImageError, match=r"image of task 1 .*expected"):
        store.fetch(task_id=1, uri=uri if form == "relative" else web.url + uri)
    assert web.asked == []


def test_dots_in_names_are_no_detour(web: Web, tmp_path: Path) -> None:
    web.routes["/data/upload/1/a..b...png"] = gives(PNG)
    with small_store(tmp_path, url=web.url) as store:
        store.fetch(task_id=1, uri="/data/upload/1/a..b...png")


@pytest.mark.parametrize("task_id", ["1/../../api/users", True, None, 1.5, {}], ids=repr)
def test_a_task_whose_id_is_no_number_reaches_no_other_path(task_id: Any, web: Web, tmp_path: Path) -> None:
    with small_store(tmp_path, url=web.url) as store, pytest.raises(ImageError, match="expected a whole number"):
        store.fetch(task_id=task_id, uri="s3://bucket/a.png")
    assert web.asked == []


@pytest.mark.parametrize(
    "target", ["file:///etc/hostname", "ftp://host/a.png", "data:image/png;base64,AAAA", "http://"]
)
def test_a_redirect_to_something_that_is_no_web_address_is_refused(target: str, web: Web, store: ImageStore) -> None:
    web.routes["/a"] = gives(b"", 302, Location=target)
    with pytest.raises(ImageError, match="image of task 1"):
        store.fetch(task_id=1, uri=f"{web.url}/a")


@pytest.mark.parametrize(
    "uri",
    ["file:///etc/hostname", "ftp://host/a.png", "//host/a.png", "a.png", "", "http://", "http://[", "azure://c/a",
     "s3", "\ud800", "http://\ud800/"],
    ids=repr,
)  # fmt: skip
def test_what_is_no_address_is_refused(uri: str, store: ImageStore) -> None:
    with pytest.raises(ImageError, match="image of task 3 "):
        store.fetch(task_id=3, uri=uri)


# What may come


@pytest.mark.parametrize(
    ("kind", "orientation", "image_hw"),
    [
        ("PNG", None, (20, 30)), ("JPEG", None, (20, 30)), ("WEBP", None, (20, 30)), ("TIFF", None, (20, 30)),
        ("BMP", None, (20, 30)), ("TIFF", 1, (20, 30)), ("JPEG", 3, (20, 30)), ("JPEG", 6, (30, 20)),
        ("PNG", 8, (30, 20)),
    ],
)  # fmt: skip
def test_the_size_is_the_one_that_the_model_sees(
    kind: str, orientation: int | None, image_hw: tuple[int, int], web: Web, store: ImageStore
) -> None:
    web.routes["/a"] = gives(encoded(kind, orientation=orientation))
    fetched = store.fetch(task_id=1, uri=f"{web.url}/a")
    assert fetched.image_hw == image_hw
    assert load_image(fetched.path).shape[:2] == image_hw


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
def test_a_turned_image_that_opencv_reads_wrongly_is_refused(kind: str, web: Web, store: ImageStore) -> None:
    web.routes["/a"] = gives(encoded(kind, orientation=6))
    with pytest.raises(ImageError, match="save it upright"):
        store.fetch(task_id=1, uri=f"{web.url}/a")


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG of that size; a few bytes that would become gigabytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 1000) + b"IDAT" + bytes(1000)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"", "got an empty file", id="empty"),
        pytest.param(b"<html>please log in</html>", "PNG, JPEG, WebP, TIFF or BMP", id="html"),
        pytest.param(encoded("GIF"), "starts with b'GIF8", id="gif"),
        pytest.param(PNG[:-30], "damaged png", id="cut off PNG"),
        pytest.param(encoded("JPEG", width=300, height=300)[:-500], "damaged jpg", id="cut off JPEG"),
        pytest.param(PNG[:20], "expected a", id="cut off header"),
        pytest.param(png_header(60_000, 60_000), "at most 100000000 pixels, got 60000 x 60000", id="bomb"),
    ],
)
def test_what_is_no_image_is_refused(content: bytes, problem: str, web: Web, store: ImageStore, tmp_path: Path) -> None:
    web.routes["/a"] = gives(content)
    with pytest.raises(ImageError, match=problem):
        store.fetch(task_id=1, uri=f"{web.url}/a")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


# Files that would grow in memory


def text_bomb() -> bytes:
    """A small PNG with a comment that grows to 300 MB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1_000_000)) for _ in range(300)) + packer.flush()
    chunk = b"zTXtcomment\0\0" + packed
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return PNG[:33] + whole + PNG[33:]  # after the header


def png_bomb(side: int) -> bytes:
    """A valid PNG, of a few 100 kB, that grows to side * side bytes."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()

    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + packed) + chunk(b"IEND")


def large_webp() -> bytes:
    """The header of a lossless WebP of 16383 x 16383 pixels, the most there is: 1 GB."""
    content = bytearray(encoded_with("WEBP", lossless=True))
    content[21:25] = struct.pack("<I", 16382 | 16382 << 14)
    return bytes(content)


def large_animation() -> bytes:
    """A WebP animation with a canvas of 60000 x 60000 pixels."""
    content = bytearray(encoded_with("WEBP", save_all=True, append_images=[Image.new("RGB", (30, 20), "blue")]))
    assert content[12:16] == b"VP8X"
    content[24:30] = (59_999).to_bytes(3, "little") * 2
    return bytes(content)


def large_tiff() -> bytes:
    """A compressed TIFF whose tags speak of 60000 x 60000 pixels."""
    content = bytearray(encoded_with("TIFF", compression="tiff_adobe_deflate"))
    directory = struct.unpack("<I", content[4:8])[0]
    for index in range(struct.unpack("<H", content[directory : directory + 2])[0]):
        at = directory + 2 + 12 * index
        (tag,) = struct.unpack("<H", content[at : at + 2])
        if tag in (256, 257):  # width and height
            content[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 60_000)
    return bytes(content)


def large_bmp() -> bytes:
    content = bytearray(encoded_with("BMP"))
    content[18:26] = struct.pack("<ii", 60_000, 60_000)
    return bytes(content)


def large_jpeg() -> bytes:
    content = bytearray(encoded_with("JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    return bytes(content)


def encoded_with(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, kind, **options)
    return file.getvalue()


BOMBS = {
    "png": png_bomb(20_000), "png text": text_bomb(), "webp": large_webp(), "webp animation": large_animation(),
    "tiff": large_tiff(), "bmp": large_bmp(), "jpeg": large_jpeg(),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(kind: str, web: Web, tmp_path: Path) -> None:
    """In a process of its own, whose memory is measured: the smallest of these images would take 300 MB."""
    web.routes["/a"] = gives(BOMBS[kind])
    asked = """
import resource, sys
from pathlib import Path
from ml_backend.errors import ImageError
from ml_backend.foreign_hosts import AllowedHosts
from ml_backend.images import ImageStore
from ml_backend.ls_client import LabelStudioClient

folder, url = sys.argv[1:]
client = LabelStudioClient("http://127.0.0.1:9", "t" * 40)
store = ImageStore(cache_dir=Path(folder), client=client, allowed_hosts=AllowedHosts.parse("127.0.0.1"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    store.fetch(task_id=1, uri=url)
except ImageError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-c", asked, str(tmp_path), f"{web.url}/a"]
    told, megabytes = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout.splitlines()
    assert told.startswith("image of task 1 ")
    assert int(megabytes) < 100, told


def test_of_many_frames_the_first_is_the_image(web: Web, store: ImageStore) -> None:
    others = [Image.new("RGB", (30, 20), (shade, 0, 0)) for shade in range(100)]
    for kind in ("TIFF", "WEBP", "PNG"):
        web.routes[f"/{kind}"] = gives(encoded_with(kind, save_all=True, append_images=others))
        fetched = store.fetch(task_id=1, uri=f"{web.url}/{kind}")
        assert fetched.image_hw == load_image(fetched.path).shape[:2] == (20, 30)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(PNG * 100)
    except OSError:
        handler.close_connection = True


def dripping(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x" * (1 << 16))
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    gives(PNG[:-30], **{"Content-Length": str(len(PNG))})(handler)


@pytest.mark.parametrize(
    ("route", "problem"),
    [
        pytest.param(gives(PNG, **{"Content-Length": "50001"}), "at most 50000 bytes.*announces 50001", id="announced"),
        pytest.param(endless, "at most 50000 bytes, got more", id="endless"),
        pytest.param(cut_off, "the download failed", id="cut off"),
        pytest.param(gives(b"", 404), "the server answered 404", id="404"),
        pytest.param(gives(b"", 304), "the server answered 304", id="304"),
    ],
)
def test_a_download_that_is_too_long_or_fails_is_refused(route: Route, problem: str, web: Web, tmp_path: Path) -> None:
    web.routes["/a"] = route
    with small_store(tmp_path, ImageLimits(max_bytes=50_000)) as store, pytest.raises(ImageError, match=problem):
        store.fetch(task_id=1, uri=f"{web.url}/a?signature=secret")


@pytest.mark.parametrize(
    ("route", "kind"),
    [
        (cut_off, ImageHostSilentError),
        (gives(b"", 503), ImageUnavailableError),
        (gives(b"", 429), ImageUnavailableError),
        (gives(b"", 404), ImageError),
        (gives(b"x"), ImageError),
    ],
    ids=["cut off", "503", "429", "404", "no image"],
)
def test_what_is_worth_another_try_is_told_apart(
    route: Route, kind: type[ImageError], web: Web, tmp_path: Path
) -> None:
    web.routes["/a"] = route
    with small_store(tmp_path, ImageLimits()) as store, pytest.raises(ImageError) as refused:
        store.fetch(task_id=1, uri=f"{web.url}/a")
    assert type(refused.value) is kind


def test_a_download_that_takes_for_ever_is_given_up(web: Web, tmp_path: Path) -> None:
    web.routes["/a"] = dripping
    with (
        small_store(tmp_path, ImageLimits(max_seconds=0.2)) as store,
        pytest.raises(ImageError, match=r"expected the image within 0 s"),
    ):
        store.fetch(task_id=1, uri=f"{web.url}/a")


def test_signatures_and_passwords_stay_out_of_errors(web: Web, store: ImageStore) -> None:
    web.routes["/a"] = gives(b"", 403)
    for uri in (f"{web.url}/a?signature=secret", web.url.replace("://", "://me:secret@") + "/a"):
        with pytest.raises(ImageError) as refused:
            store.fetch(task_id=1, uri=uri)
        assert "secret" not in str(refused.value)


# data: addresses


def test_a_data_address_is_an_image_too(store: ImageStore) -> None:
    assert store.fetch(task_id=1, uri=data_uri(PNG)).sha256 == hashlib.sha256(PNG).hexdigest()


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,!!!!", "expected base64"),
        ("data:image/svg+xml,%3Csvg/%3E", "starts with b'<svg/>'"),
        ("data:image/png;base64," + "A" * 4_000, "at most 1000 bytes"),
        ("data:image/png;base64," + "A" * 2_000, "at most 1000 bytes"),
    ],
)
def test_a_bad_data_address_is_refused(uri: str, problem: str, tmp_path: Path) -> None:
    with (
        small_store(tmp_path, ImageLimits(max_data_uri_bytes=1_000)) as store,
        pytest.raises(ImageError, match=problem),
    ):
        store.fetch(task_id=1, uri=uri)


# The cache


def test_an_address_is_asked_once_also_by_later_processes(web: Web, store: ImageStore, tmp_path: Path) -> None:
    web.routes["/a"] = gives(PNG)
    first = store.fetch(task_id=1, uri=f"{web.url}/a")
    with (
        LabelStudioClient("http://127.0.0.1:9", "t" * 40) as client,
        ImageStore(cache_dir=tmp_path / "cache", client=client) as later,
    ):
        assert later.fetch(task_id=2, uri=f"{web.url}/a") == first
    assert len(web.asked) == 1


def test_an_image_that_was_tidied_away_or_whose_entry_is_damaged_is_fetched_again(
    web: Web, store: ImageStore, tmp_path: Path
) -> None:
    web.routes["/a"] = gives(PNG)
    first = store.fetch(task_id=1, uri=f"{web.url}/a")
    first.path.unlink()
    assert store.fetch(task_id=1, uri=f"{web.url}/a") == first
    (entry,) = (tmp_path / "cache" / "index").rglob("*.json")
    entry.write_bytes(b"")
    assert store.fetch(task_id=1, uri=f"{web.url}/a") == first
    assert len(web.asked) == 3


def test_the_same_path_on_two_label_studios_is_two_images(web: Web, tmp_path: Path) -> None:
    with Web() as other:
        for shade, server in enumerate((web, other)):
            server.routes["/data/upload/1/a.png"] = gives(png_bytes(shade=shade))
        fetched = []
        for server in (web, other):
            with small_store(tmp_path, ImageLimits(), url=server.url) as store:
                fetched.append(store.fetch(task_id=1, uri="/data/upload/1/a.png"))
    assert fetched[0].sha256 != fetched[1].sha256


def test_many_threads_may_fetch_the_same_image(web: Web, store: ImageStore, tmp_path: Path) -> None:
    web.routes["/a"] = gives(PNG)
    fetched = []
    threads = [
        threading.Thread(target=lambda: fetched.append(store.fetch(task_id=1, uri=f"{web.url}/a"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 8
    assert len(set(fetched)) == 1
    assert list((tmp_path / "cache" / "unfinished").iterdir()) == []


def test_leftovers_of_killed_processes_are_removed_after_a_day(store: ImageStore, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "unfinished"
    old, new = folder / "old", folder / "new"
    for path in (old, new):
        path.write_bytes(b"half an im")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    images._remove_leftovers(folder)
    assert list(folder.iterdir()) == [new]


@pytest.mark.parametrize(
    ("status", "passes"), [(408, True), (429, True), (500, True), (503, True), (403, False), (404, False)]
)
def test_an_answer_that_may_change_is_told_apart(status: int, passes: bool, web: Web, store: ImageStore) -> None:
    web.routes["/a"] = gives(b"", status)
    with pytest.raises(ImageError, match=f"answered {status}") as caught:
        store.fetch(task_id=1, uri=f"{web.url}/a")
    assert isinstance(caught.value, ImageUnavailableError) is passes
