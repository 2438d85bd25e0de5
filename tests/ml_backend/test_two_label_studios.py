"""Two installations of Label Studio whose projects have the same id: nothing of one may end in the other."""

import shutil
from pathlib import Path

import pytest

from ml_backend.inbox import ProjectName, known_project, remember_project
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.overview import overview
from ml_backend.pool import score_pool
from ml_backend.predictor import Predictor
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from model.errors import TSPError
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, raw_api
from tests.ml_backend.examples import VERSION, add_version, grey_images, key_of, sha256

pytestmark = pytest.mark.label_studio


def earlier(service: Service, project: Project) -> str:
    """The key of a project with the same id that an earlier installation at the same address had."""
    name = ProjectName(f"{project.id}-{int(project.created_at.timestamp()) - 1000}", project.id)
    remember_project(service.database, name)
    return name.key


def test_projects_of_the_same_id_keep_everything_apart(
    service: Service, client: LabelStudioClient, project: Project, label_studio: LabelStudioServer, local_files: Path
) -> None:
    old_image, new_image = grey_images(2)
    folder = local_files / f"two-{project.id}"
    folder.mkdir()
    (folder / "scan.png").write_bytes(old_image)
    uri = f"/data/local-files/?d={folder.name}/scan.png"
    with raw_api(label_studio) as api:  # Label Studio serves local files of folders that a project has as a storage
        storage = {"project": project.id, "path": str(folder), "use_blob_urls": True}
        api.post("/api/storages/localfiles", json=storage).raise_for_status()
    old, new = earlier(service, project), key_of(service, project)
    assert known_project(service.database, {"id": project.id}) is None  # which of them, nobody can say

    # What the earlier installation had at the address is another image by now.
    assert service.images.fetch(task_id=1, uri=uri, project_key=old).sha256 == sha256(old_image)
    (folder / "scan.png").write_bytes(new_image)
    assert service.images.fetch(task_id=1, uri=uri, project_key=new).sha256 == sha256(new_image)
    assert service.images.fetch(task_id=1, uri=uri, project_key=old).sha256 == sha256(old_image)

    # The earlier project is not mistaken for this one: nothing is read or published for it.
    add_version(service, old)
    service.registry.activate(old, VERSION)
    client.import_tasks(project.id, [{"data": {"image": uri}}])
    for look in (lambda: reconcile(service, old), lambda: score_pool(service, old, VERSION)):
        with pytest.raises(TSPError, match="is another one than the project"):
            look()
    assert client.model_versions(project.id) == {}

    # Versions, active version, scores and what is told belong to one of them.
    assert service.registry.versions(new) == []
    assert service.registry.active(new) is None
    predictor = Predictor(service)
    assert (predictor.version(old), predictor.version(new)) == (VERSION, "untrained")
    task = {"id": 1, "data": {"image": uri}}
    assert predictor.predict(new, [task], POLYGON_CONFIG)[0]["model_version"] == "untrained"
    assert predictor.predict(old, [task], POLYGON_CONFIG)[0]["model_version"] == VERSION
    add_version(service, new)
    assert score_pool(service, new, VERSION) == 1
    assert not service.scores_file(old, VERSION).exists()
    assert not set(service.project_folders(old)) & set(service.project_folders(new))
    told = {p["key"]: (p["active_version"], len(p["versions"])) for p in overview(service)}
    assert told == {old: (VERSION, 1), new: (None, 1)}
    shutil.rmtree(folder)
