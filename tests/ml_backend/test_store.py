"""The store itself, as a folder and as a bucket of a real S3 server."""

import contextlib
import socket
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ml_backend.chunks import cut, find_cut, open_cut
from ml_backend.errors import ImageHostSilentError, SettingsError, StoreError, StoreUnavailableError
from ml_backend.foreign_hosts import AllowedHosts
from ml_backend.images import ImageStore
from ml_backend.ls_client import LabelStudioClient
from ml_backend.service import Service
from ml_backend.store import Store
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import free_port
from tests.ml_backend.examples import KEY, NOWHERE, VERSION, phantom_images, settings, sha256
from tests.ml_backend.test_frozen import image_server
from tests.s3 import S3, SECRET

Machine = Callable[..., Store]  # by the name of its MODEL_DIR


def test_a_file_of_one_machine_is_had_by_another(machine: Machine, tmp_path: Path) -> None:
    here, there = machine("here"), machine("there")
    path = Path("scores/7-17/a.json")
    (tmp_path / "here" / path).parent.mkdir(parents=True)
    (tmp_path / "here" / path).write_bytes(b"content")
    assert not there.download(tmp_path / "there" / path)
    here.upload(tmp_path / "here" / path)
    assert there.download(tmp_path / "there" / path)
    assert (tmp_path / "there" / path).read_bytes() == b"content"
    assert there.names(tmp_path / "there" / "scores") == ["7-17/a.json"]
    here.remove(tmp_path / "here" / "scores")
    here.remove(tmp_path / "here" / "scores")
    assert there.read(tmp_path / "there" / path) is None
    assert there.names(tmp_path / "there" / "scores") == []


def test_a_small_file_follows_the_store(machine: Machine, tmp_path: Path) -> None:
    store, path = machine("here"), tmp_path / "here" / "scores" / "a.json"
    assert not store.has_another(path)
    store.write(path, b"1")
    assert store.has_another(path)
    store.refresh(path)
    assert path.read_bytes() == b"1"
    assert not store.has_another(path)
    store.remove(path)
    assert store.has_another(path)
    store.refresh(path)
    assert not path.exists()


def test_what_is_remembered_is_answered_until_it_is_old_or_changed_here(machine: Machine, tmp_path: Path) -> None:
    reader, writer, path = machine("here", remembers_seconds=3600.0), machine("here"), tmp_path / "here" / "pointer"
    writer.write(path, b"1")
    assert reader.recall(path) == b"1"
    writer.write(path, b"2")
    assert (reader.recall(path), reader.read(path), writer.recall(path)) == (b"1", b"2", b"2")
    reader.write(path, b"3")
    assert reader.recall(path) == b"3"


@pytest.mark.parametrize("before", [b"1", None], ids=["an older one", "nothing"])
def test_what_is_remembered_is_not_put_in_the_place_of_what_a_worker_has_written_since(
    machine: Machine, tmp_path: Path, before: bytes | None
) -> None:
    """A web process with the worker's own folder."""
    path = tmp_path / "here" / "publication.json"
    web, worker = machine("here", remembers_seconds=3600.0), machine("here")
    if before is not None:
        worker.write(path, before)
    web.refresh(path)
    assert (path.read_bytes() if path.exists() else None) == before
    worker.write(path, b"2")
    path.write_bytes(b"2")
    web.refresh(path)
    assert path.read_bytes() == b"2"
    assert not web.has_another(path)


def test_while_the_store_is_away_a_file_that_a_worker_has_written_stays(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    url, path = f"file://{tmp_path / 'shared'}", tmp_path / "here" / "publication.json"
    web, worker = Store(url, tmp_path / "here", remembers_seconds=3600.0), Store(url, tmp_path / "here")
    worker.write(path, b"1")
    web.refresh(path)
    path.write_bytes(b"2")
    (tmp_path / "shared").rename(tmp_path / "away")
    web.refresh(path)
    assert path.read_bytes() == b"2"
    path.unlink()
    web.refresh(path)
    assert path.read_bytes() == b"1"  # nothing better is known


def test_the_first_of_two_creates(machine: Machine, tmp_path: Path) -> None:
    assert machine("here").create(tmp_path / "here" / "secret", b"1") == b"1"
    assert machine("there").create(tmp_path / "there" / "secret", b"2") == b"1"


def test_of_many_that_create_at_once_in_a_folder_all_have_the_same(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    stores = [Store(f"file://{tmp_path}/shared", tmp_path / str(number)) for number in range(8)]
    start = threading.Barrier(8)

    def create(number: int, secret: int) -> bytes:
        start.wait()
        return stores[number].create(tmp_path / f"{number}/{secret}", f"{number}".encode())

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads get into each other's way more often
    try:
        with ThreadPoolExecutor(8) as threads:
            for secret in range(200):
                got = set(threads.map(create, range(8), [secret] * 8))
                assert got == {stores[0].read(tmp_path / f"0/{secret}")}
    finally:
        sys.setswitchinterval(usual)
    assert stat.S_IMODE((tmp_path / "shared/0").stat().st_mode) == 0o600  # it may be a secret


@pytest.mark.parametrize("prefix", ["a*", "a[1]", "a b/ü", "a/../b"])
def test_a_prefix_may_have_odd_characters(bucket: str, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "scores" / "a.json"
    neighbour, store = (Store(f"s3://{bucket}/{one}", tmp_path) for one in ("a1", prefix))
    for one in (neighbour, store):
        one.write(path, b"1")
    assert (store.read(path), store.names(path.parent)) == (b"1", ["a.json"])
    store.remove(path.parent)
    assert (store.read(path), store.names(path.parent)) == (None, [])
    assert neighbour.read(path) == b"1"


def test_what_the_store_refuses_to_remove_is_told(s3: S3, bucket: str, tmp_path: Path) -> None:
    store = Store(f"s3://{bucket}", tmp_path)
    store.write(tmp_path / "scores" / "a.json", b"1")
    s3.refuse(bucket, "s3:DeleteObject")
    with pytest.raises(StoreUnavailableError, match=r"scores/a.json is not removed: Access Denied"):
        store.remove(tmp_path / "scores")


def test_the_check_of_a_store_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    store = machine("here")
    store.check("host-1")
    assert store.everything(tmp_path / "here") == []


@pytest.mark.parametrize("action", ["s3:PutObject", "s3:GetObject", "s3:DeleteObject"])
def test_the_check_of_a_store_finds_what_is_refused(s3: S3, bucket: str, tmp_path: Path, action: str) -> None:
    store = Store(f"s3://{bucket}", tmp_path)
    s3.refuse(bucket, action)
    with pytest.raises(StoreUnavailableError, match=r"the store does not answer for .*/checks/host-1.*"):
        store.check("host-1")


def test_more_files_than_a_request_removes_are_removed(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_backend.store._REMOVED_AT_ONCE", 2)
    store, folder = machine("here"), tmp_path / "here" / "scores"
    for number in range(5):
        store.write(folder / str(number), b"")
    store.remove(folder)
    assert store.names(folder) == []


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "scores").symlink_to("scores")  # whoever follows it gets an error of the system
    store = Store(f"file://{tmp_path}/shared", tmp_path / "here")
    with pytest.raises(StoreUnavailableError, match=r"scores: .*symbolic links"):
        store.names(tmp_path / "here" / "scores")


def test_a_file_with_another_digest_is_refused_and_nothing_is_left(machine: Machine, tmp_path: Path) -> None:
    store, path = machine("here"), tmp_path / "here" / "weights"
    store.write(path, b"content")
    with pytest.raises(StoreError, match=r"weights is damaged: its SHA-256 is not 0000"):
        store.download(path, sha256="0" * 64)
    assert list((tmp_path / "here").iterdir()) == []
    assert store.download(path, sha256=sha256(b"content"))


# Lines


def test_lines_are_added_in_parts_and_put_together_elsewhere(machine: Machine, tmp_path: Path) -> None:
    here, there = machine("here"), machine("there")
    path, other = tmp_path / "here" / "a.jsonl", tmp_path / "there" / "a.jsonl"
    there.download_lines(other)
    assert not other.exists()
    path.write_bytes(b"1\n2\n")
    here.upload_lines(path)
    here.upload_lines(path)
    with path.open("ab") as file:
        file.write(b"3\nhalf")
    here.upload_lines(path)
    there.download_lines(other)
    assert other.read_bytes() == b"1\n2\n3\n"
    assert len(here.names(tmp_path / "here" / "a.jsonl.parts")) == 2
    with other.open("ab") as file:
        file.write(b"4\n")
    there.upload_lines(other)
    here.download_lines(path)
    assert path.read_bytes() == b"1\n2\n3\n4\n"  # the half line was nobody's


def test_lines_that_were_not_kept_stay_unless_others_took_their_place(machine: Machine, tmp_path: Path) -> None:
    here, there = machine("here"), machine("there")
    path, other = tmp_path / "here" / "a.jsonl", tmp_path / "there" / "a.jsonl"
    path.write_bytes(b"1\n")
    here.upload_lines(path)
    path.write_bytes(b"1\nlost\n")
    here.download_lines(path)
    assert path.read_bytes() == b"1\nlost\n"
    there.download_lines(other)
    other.write_bytes(other.read_bytes() + b"2\n")
    there.upload_lines(other)
    here.download_lines(path)
    assert path.read_bytes() == b"1\n2\n"


def test_parts_are_of_a_bearable_size(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml_backend.store._PART_BYTES", 5)
    here, path = machine("here"), tmp_path / "here" / "a.jsonl"
    path.write_bytes(b"1\n2\n3\na line that is longer\n4\nhalf")
    here.upload_lines(path)
    assert len(here.names(tmp_path / "here" / "a.jsonl.parts")) == 3
    machine("there").download_lines(tmp_path / "there" / "a.jsonl")
    assert (tmp_path / "there" / "a.jsonl").read_bytes() == path.read_bytes().removesuffix(b"half")


def test_lines_are_not_added_to_those_of_another_worker(machine: Machine, tmp_path: Path) -> None:
    here, there = machine("here"), machine("there")
    path, other = tmp_path / "here" / "a.jsonl", tmp_path / "there" / "a.jsonl"
    path.write_bytes(b"mine\n")
    other.write_bytes(b"theirs, which is longer\n")
    there.upload_lines(other)
    for more in (b"", b"mine, which are more than theirs\n"):
        path.write_bytes(path.read_bytes() + more)
        with pytest.raises(StoreUnavailableError, match=r"a.jsonl has lines of another worker by now"):
            here.upload_lines(path)
    here.download_lines(path)
    assert path.read_bytes() == other.read_bytes()


def test_what_is_no_part_of_a_file_is_left_out(machine: Machine, store_url: str, tmp_path: Path) -> None:
    here, path = machine("here"), tmp_path / "here" / "a.jsonl"
    path.write_bytes(b"1\n")
    here.upload_lines(path)
    parts = path.with_name("a.jsonl.parts")
    here.write(parts / "notes.txt", b"of somebody")
    here.write(parts / f".{0:015d}-{'0' * 64}.{'0' * 32}.unfinished", b"of a worker that was killed")
    machine("there").download_lines(tmp_path / "there" / "a.jsonl")
    assert (tmp_path / "there" / "a.jsonl").read_bytes() == b"1\n"


# Chunks


def test_a_pool_is_cut_by_one_machine_seen_by_another_and_removed(machine: Machine, tmp_path: Path) -> None:
    here, there = ((tmp_path / name / "scores" / f"{VERSION}.chunks", machine(name)) for name in ("here", "there"))
    tasks = [{"id": 10 + number, "data": {"image": f"/data/ü{number}.png"}} for number in range(5)]
    assert find_cut(here[0], KEY, VERSION, store=here[1]) is None
    pool = cut(here[0], KEY, VERSION, tasks, size=2, store=here[1])
    assert find_cut(here[0], KEY, VERSION, store=here[1]) == pool
    same = open_cut(there[0], KEY, VERSION, pool.folder.name, store=there[1])
    assert [task for number in range(same.chunks) for task in same.tasks(number)] == tasks
    found = [{"task": 12, "score": 0.1 + 0.2}, {"task": 13, "problem": "gr\u00f6\u00dfer \u2028 \x85"}]
    same.keep(1, found)
    assert [pool.is_seen(number) for number in range(3)] == [False, True, False]
    assert list(pool.lines(1)) == found
    with pytest.raises(FileNotFoundError):
        list(pool.lines(0))
    pool.remove()
    pool.remove()
    assert find_cut(there[0], KEY, VERSION, store=there[1]) is None
    with pytest.raises(FileNotFoundError):
        open_cut(there[0], KEY, VERSION, pool.folder.name, store=there[1])
    assert here[1].names(here[0]) == []


def test_what_is_found_after_a_pool_was_removed_is_not_kept(machine: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "here" / "scores" / f"{VERSION}.chunks"
    pool = cut(folder, KEY, VERSION, [{"id": 1, "data": {}}], size=1, store=machine("here"))
    slow = open_cut(folder, KEY, VERSION, pool.folder.name, store=machine("here"))
    pool.remove()
    slow.keep(0, [{"task": 1}])
    assert machine("here").names(folder) == []


def test_cutting_that_broke_off_begins_anew(machine: Machine, tmp_path: Path) -> None:
    store, folder = machine("here"), tmp_path / "here" / f"{VERSION}.chunks"
    half = cut(folder, KEY, VERSION, [{"id": 1, "data": {}}], size=1, store=store)
    store.remove(half.folder / "plan.json")  # which is written last
    assert find_cut(folder, KEY, VERSION, store=store) is None
    whole = cut(folder, KEY, VERSION, [{"id": 2, "data": {}}], size=1, store=store)
    assert store.names(folder) == [f"{whole.folder.name}/0.tasks.json", f"{whole.folder.name}/plan.json"]


# Images


def test_an_image_that_one_machine_has_fetched_is_had_by_another_without_its_host(
    machine: Machine, tmp_path: Path
) -> None:
    (image,) = phantom_images(1)
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "a.png").write_bytes(image)
    with LabelStudioClient(NOWHERE, "0" * 40) as client, contextlib.ExitStack() as stack:
        here, there = (
            stack.enter_context(
                ImageStore(
                    cache_dir=tmp_path / name / "cache",
                    client=client,
                    allowed_hosts=AllowedHosts.parse("127.0.0.0/8"),
                    store=machine(name),
                )
            )
            for name in ("here", "there")
        )
        with image_server(tmp_path / "host") as host:
            fetched = here.fetch(task_id=1, uri=f"{host}/a.png")
        brought = there.fetch(task_id=2, uri=f"{host}/a.png")
        assert (brought.sha256, brought.image_hw) == (fetched.sha256, fetched.image_hw)
        assert brought.path == tmp_path / "there" / fetched.path.relative_to(tmp_path / "here")
        assert brought.path.read_bytes() == image
        brought.path.write_bytes(b"damaged")
        assert there.fetch(task_id=2, uri=f"{host}/a.png").path.read_bytes() == image
        brought.path.unlink()
        assert there.at_hand(fetched.path) == brought.path
        assert brought.path.read_bytes() == image
        machine("here").write(fetched.path, b"damaged")  # in the store
        brought.path.unlink()
        with pytest.raises(ImageHostSilentError):
            there.fetch(task_id=2, uri=f"{host}/a.png")


@pytest.mark.parametrize(
    "entry",
    [
        '{"sha256": "%s", "extension": "png/../../../../../outside/a", "height": 1, "width": 1}',
        '{"sha256": "%s"}',
        "[]",
    ],
)
def test_an_entry_of_the_store_that_names_no_image_leads_nowhere(tmp_path: Path, entry: str) -> None:
    (tmp_path / "a" / "share").mkdir(parents=True)
    store, cache = Store(f"file://{tmp_path}/a/share", tmp_path / "here"), tmp_path / "here" / "cache"
    uri = f"http://127.0.0.1:{free_port()}/a.png"
    index = cache / "index" / sha256(uri.encode())[:2] / f"{sha256(uri.encode())}.json"
    store.write(index, entry.replace("%s", sha256(b"1")).encode())
    store.write(cache / "images" / sha256(b"1")[:2] / f"{sha256(b'1')}.png/../../../../../outside/a", b"1")
    with (
        LabelStudioClient(NOWHERE, "0" * 40) as client,
        ImageStore(
            cache_dir=cache, client=client, store=store, allowed_hosts=AllowedHosts.parse("127.0.0.1")
        ) as images,
        pytest.raises(ImageHostSilentError),  # the host is asked instead
    ):
        images.fetch(task_id=1, uri=uri)
    assert index.exists()  # it was looked at
    assert not (tmp_path / "outside").exists()


# A store that is away


def test_a_bucket_without_the_package_for_it_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    bucket = settings(tmp_path, TSP_STORE_URL="s3://bucket", DATABASE_URL="postgresql://u@h/d")
    with pytest.raises(SettingsError, match=r"pip install 'tsp-active-learning\[s3\]'"):
        Service.connect(bucket)


def test_a_server_that_is_away_is_told_without_credentials(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**s3.environment, "AWS_ENDPOINT_URL": f"http://me:{SECRET}@127.0.0.1:{free_port()}"}.items():
        monkeypatch.setenv(name, value)
    store = Store("s3://bucket/prefix", tmp_path)
    (tmp_path / "a").write_bytes(b"1")
    for ask in (store.read, store.upload):  # each takes seconds: the library tries again, too
        with pytest.raises(StoreUnavailableError, match=r"the store does not answer for s3://bucket/prefix/a") as told:
            ask(tmp_path / "a")
        assert SECRET not in "".join(traceback.format_exception(told.value))
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_bucket_that_is_missing_is_not_an_empty_one(bucket: str, tmp_path: Path) -> None:
    store = Store(f"s3://no-such-{bucket}", tmp_path)
    for ask in (store.read, store.names, store.download, store.upload_lines, store.download_lines):
        with pytest.raises(StoreUnavailableError, match=r"bucket does not exist"):
            ask(tmp_path / "a")


@pytest.mark.parametrize("status", [301, 403, 404, 500])
def test_a_server_that_says_the_same_to_every_question_is_away(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"], lambda _: Fault(kind="status", status=status)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = Store(f"s3://{bucket}", tmp_path)
        asks = (store.read, store.has, store.names, store.download, store.remove)
        for ask in (*asks, lambda path: store.write(path, b"")):
            with pytest.raises(StoreUnavailableError):
                ask(tmp_path / "a")


@pytest.mark.parametrize("endpoint", ["minio:9000", "http://", "http://host:port"])
def test_an_endpoint_that_is_no_address_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(StoreUnavailableError, match=rf"{endpoint}.*AWS_ENDPOINT_URL"):
        Store("s3://bucket", tmp_path).read(tmp_path / "a")


def test_an_answer_that_ends_in_its_middle_is_not_taken_for_a_file(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    Store(f"s3://{bucket}", tmp_path).write(path, b"12345678" * 10_000)

    def cut_off(call: Call) -> Fault | None:
        return Fault(kind="cut") if call.method == "GET" and "list-type" not in call.path else None

    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"], cut_off) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = Store(f"s3://{bucket}", tmp_path)
        for ask in (store.read, store.download):
            with pytest.raises(StoreUnavailableError, match="not completed"):
                ask(path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_meanwhile_is_the_old_one_or_the_new_one(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s3fs.S3FileSystem.default_block_size", 1000)  # what is larger is fetched in pieces
    path, contents = tmp_path / "a", [digit * 10_000 for digit in (b"1", b"2")]
    direct = Store(f"s3://{bucket}", tmp_path)
    direct.write(path, contents[0])
    fetched = threading.Semaphore(2)

    def look(call: Call) -> None:
        if call.method == "GET" and not fetched.acquire(blocking=False):
            direct.write(path, contents[1])

    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"], lambda _: None, look=look) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert Store(f"s3://{bucket}", tmp_path).download(path)
    assert path.read_bytes() in contents


def test_a_store_that_keeps_one_thread_waiting_does_not_keep_those_that_remember(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    hangs, is_asked, goes_on = (threading.Event() for _ in range(3))
    Store(f"s3://{bucket}", tmp_path).write(path, b"1")

    def look(call: Call) -> None:
        if hangs.is_set():
            is_asked.set()
            goes_on.wait()

    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"], lambda _: None, look=look) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        web = Store(f"s3://{bucket}", tmp_path, remembers_seconds=1e-9)
        assert web.recall(path) == b"1"
        hangs.set()
        with ThreadPoolExecutor(1) as threads:
            slow = threads.submit(web.recall, path)
            is_asked.wait()
            try:
                assert web.recall(path) == b"1"
                assert not slow.done()
            finally:
                goes_on.set()
            assert slow.result() == b"1"


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """A store that takes every connection and never says anything; those that were made."""
    monkeypatch.setattr("ml_backend.store._PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("ml_backend.store._ATTEMPT_SECONDS", 0.2)
    monkeypatch.setattr("ml_backend.store._REST_SECONDS", 3600.0)
    credentials = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.getsockname()))

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(server.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield connections
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def test_a_silent_store_is_asked_once_by_those_that_remember_and_then_left_alone(
    silent: list[socket.socket], tmp_path: Path
) -> None:
    web = Store("s3://bucket", tmp_path, remembers_seconds=1.0)
    for ask in (web.read, web.recall, web.names, web.download):
        with pytest.raises(StoreUnavailableError, match=r"(?i)time-?out"):
            ask(tmp_path / "a")
    assert len(silent) == 1


@pytest.mark.parametrize("remembers_seconds", [0.0, 1.0])
@pytest.mark.parametrize("what", ["read", "has", "names", "write", "create", "upload", "remove", "check"])
def test_no_question_to_a_silent_store_waits_without_an_end(
    silent: list[socket.socket], tmp_path: Path, what: str, remembers_seconds: float
) -> None:
    path, store = tmp_path / "a", Store("s3://bucket", tmp_path, remembers_seconds=remembers_seconds)
    path.write_bytes(b"1")
    ask: Callable[[], object] = {
        "write": lambda: store.write(path, b"1"),
        "create": lambda: store.create(path, b"1"),
        "check": lambda: store.check("host-1"),
    }.get(what, lambda: getattr(store, what)(path))
    with pytest.raises(StoreUnavailableError, match=r"(?i)time-?out"):
        ask()
    assert 1 <= len(silent) <= (1 if remembers_seconds else 5)


def test_a_folder_that_is_not_mounted_is_not_an_empty_one(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/mount", tmp_path / "here")
    for ask in (store.read, store.names, store.download, lambda path: store.write(path, b"")):
        with pytest.raises(StoreUnavailableError, match=r"the folder is not there: create it, or mount it"):
            ask(tmp_path / "here" / "a")
    assert not (tmp_path / "mount").exists()


def test_while_the_store_is_away_the_last_that_was_known_is_answered_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_backend.store._REST_SECONDS", 0.0)
    (tmp_path / "shared").mkdir()
    path, url = tmp_path / "here" / "pointer", f"file://{tmp_path / 'shared'}"
    web, worker = Store(url, tmp_path / "here", remembers_seconds=1e-9), Store(url, tmp_path / "here")
    worker.write(path, b"1")
    assert (web.recall(path), worker.recall(path)) == (b"1", b"1")
    (tmp_path / "shared").rename(tmp_path / "away")
    assert web.recall(path) == b"1"
    for ask in (lambda: worker.recall(path), lambda: web.recall(tmp_path / "here" / "other")):
        with pytest.raises(StoreUnavailableError):
            ask()
    (tmp_path / "away").rename(tmp_path / "shared")
    worker.write(path, b"2")
    assert web.recall(path) == b"2"
