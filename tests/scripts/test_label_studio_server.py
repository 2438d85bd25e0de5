"""Starting and stopping a real Label Studio."""

import os
import shutil
import socket
from pathlib import Path

import httpx
import pytest

from ml_backend.ls_client import LabelStudioClient
from scripts.label_studio_server import LabelStudioServer, LabelStudioServerError, refuse_taken_port
from tests.label_studio import PASSWORD, POLYGON_CONFIG, USERNAME, new_server


@pytest.fixture
def prepared_folder(label_studio: LabelStudioServer, tmp_path: Path) -> Path:
    """A data folder whose first start is behind it (copied from a running server, so only for what a start does)."""
    folder = tmp_path / "data"
    shutil.copytree(label_studio.data_dir, folder)
    return folder


@pytest.mark.label_studio
def test_a_second_start_keeps_projects_accounts_and_tokens(prepared_folder: Path) -> None:
    said: list[str] = []
    with new_server(prepared_folder, report=said.append) as server:
        annotator = server.create_annotator(email="restart@example.com", password=PASSWORD)
        personal = server.create_personal_access_token(email="restart@example.com", password=PASSWORD)
        with LabelStudioClient(server.url, server.token) as client:
            project = client.create_project(title="kept", label_config=POLYGON_CONFIG)
    with new_server(prepared_folder, report=said.append) as server:
        for token, owner in (
            (server.token, USERNAME),
            (annotator, "restart@example.com"),
            (personal, "restart@example.com"),
        ):
            with LabelStudioClient(server.url, token) as client:
                assert client.whoami() == owner
                assert project in client.projects()
        assert server.create_annotator(email="restart@example.com", password=PASSWORD) == annotator
    assert said[0] == "Label Studio starts ..."
    assert said[-1].startswith("Label Studio answers at http://127.0.0.1:")


@pytest.mark.label_studio
def test_stopping_leaves_nothing_running(prepared_folder: Path) -> None:
    server = new_server(prepared_folder)
    server.start()
    group = server._process.pid if server._process else 0
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    server.stop()


@pytest.mark.label_studio
def test_a_folder_serves_one_label_studio_at_a_time(label_studio: LabelStudioServer) -> None:
    with pytest.raises(LabelStudioServerError, match=r"runs on .* already: stop it"):
        new_server(label_studio.data_dir).start()
    assert httpx.get(f"{label_studio.url}/health").is_success


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LabelStudioServerError, match=f"port {port} is taken"):
            new_server(tmp_path, port=port).start()


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_cannot_exist_is_refused(port: int) -> None:
    with pytest.raises(LabelStudioServerError, match=f"port {port}: expected 1 to 65535, choose another"):
        refuse_taken_port(port)


def test_without_label_studio_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LabelStudioServerError, match="run `make install` first"):
        new_server(tmp_path, executable=tmp_path / "label-studio").start()


def test_a_label_studio_that_ends_at_once_shows_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "label-studio"
    broken.write_text("#!/bin/sh\necho the reason\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(LabelStudioServerError, match=r"ended while it started:\nthe reason"):
        new_server(tmp_path / "data", executable=broken).start()


@pytest.mark.label_studio
def test_a_wrong_password_is_told(label_studio: LabelStudioServer) -> None:
    with pytest.raises(LabelStudioServerError, match=r"refused to log admin@example.com in"):
        label_studio.create_personal_access_token(email=USERNAME, password="wrong")


def test_another_token_than_the_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("1" * 40)
    with pytest.raises(LabelStudioServerError, match="was made with another token"):
        new_server(tmp_path, token="2" * 40).start()
