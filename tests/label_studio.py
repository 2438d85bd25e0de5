"""What tests need around a real Label Studio: starting one quickly, annotator accounts, small images and results."""

import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from ml_backend.ls_client import LabelStudioClient
from scripts.label_studio_server import EXECUTABLE, LabelStudioServer, LabelStudioServerError

USERNAME = "admin@example.com"
PASSWORD = "correct horse battery"
POLYGON_CONFIG = """
<View>
  <Image name="image" value="$image"/>
  <PolygonLabels name="label" toName="image"><Label value="cell"/><Label value="lesion"/></PolygonLabels>
</View>
"""


def new_server(data_dir: Path, **options: Any) -> LabelStudioServer:
    """A server that is not started yet."""
    return LabelStudioServer(data_dir=data_dir, username=USERNAME, password=PASSWORD, **options)


def prepared_server(data_dir: Path, *, template_folder: Path, **options: Any) -> LabelStudioServer:
    """A server on a copy of a data folder whose migrations ran in an earlier test session, if there was one."""
    report: Callable[[str], None] = options.get("report", print)
    template = template_folder / _label_studio_release()
    if not template.exists():
        report("The first test session prepares Label Studio's database, later ones copy it.")
        first = Path(tempfile.mkdtemp(dir=template_folder))
        with new_server(first, **options):
            pass
        if template.exists():  # another session was quicker
            shutil.rmtree(first)
        else:
            first.rename(template)
    shutil.copytree(template, data_dir)
    return new_server(data_dir, **options)


def _label_studio_release() -> str:
    releases = sorted(EXECUTABLE.parent.parent.glob("lib/python*/site-packages/label_studio-*.dist-info"))
    if not releases:
        raise LabelStudioServerError(f"{EXECUTABLE} does not exist: run `make install` first")
    return releases[-1].name


def create_annotator(server: LabelStudioServer, email: str, password: str = PASSWORD) -> str:
    """A second account, made as a person would make it; returns its (legacy) token."""
    return server.create_annotator(email=email, password=password)


def png_bytes(*, width: int = 32, height: int = 24, shade: int = 0) -> bytes:
    """A small grey PNG; another `shade` makes other bytes."""
    file = io.BytesIO()
    Image.new("L", (width, height), shade).save(file, "PNG")
    return file.getvalue()


def polygon_result(*, region_id: str = "r1", label: str = "cell", score: float | None = None) -> dict[str, Any]:
    """One triangle, as Label Studio writes it."""
    region: dict[str, Any] = {
        "id": region_id,
        "from_name": "label",
        "to_name": "image",
        "type": "polygonlabels",
        "original_width": 32,
        "original_height": 24,
        "image_rotation": 0,
        "value": {"points": [[10, 10], [60, 15], [40, 70]], "closed": True, "polygonlabels": [label]},
    }
    return region if score is None else {**region, "score": score}


def prediction(task_id: int, *, score: float, version: str = "v1") -> dict[str, Any]:
    return {"task": task_id, "score": score, "model_version": version, "result": [polygon_result(score=score)]}


def raw_api(server: LabelStudioServer, token: str | None = None) -> httpx.Client:
    """Label Studio's API without our client, for what only tests do."""
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Token {token or server.token}"}, timeout=60.0)


def listed_rows(client: LabelStudioClient) -> list[int]:
    """Grows by the number of tasks in each page that the client lists from now on; requests for counts are left out."""
    rows: list[int] = []

    def note(response: httpx.Response) -> None:
        if response.request.url.path == "/api/tasks/" and response.request.url.params["page_size"] != "1":
            response.read()
            rows.append(len(response.json()["tasks"]))

    client._http.event_hooks = {"response": [note]}
    return rows
