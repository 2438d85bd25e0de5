"""What the watcher of a chaos run must notice: each thing is done to a real Label Studio and a real registry."""

import json
import threading

import pytest

from ml_backend.db import CycleRow, Database
from ml_backend.inbox import ProjectName, remember_project
from model.registry import ModelCard, Registry
from scripts import chaos_checks as checks
from scripts.chaos_ledger import Ledger
from scripts.chaos_watch import Watcher
from scripts.fault_proxy import Call
from tests.label_studio import png_bytes, prediction
from tests.model.examples import tiny_network

VERSION = "tsp-1-0123abcd"


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "versions")


def add_version(registry, key, version=VERSION, *, fingerprint=""):
    network = tiny_network()
    card = ModelCard(
        version=version, network=network.config.to_json(), class_names=("cell", "lesion"),
        created_at="2026-01-01T00:00:00+00:00", data_fingerprint=fingerprint,
    )  # fmt: skip
    registry.add(key, card, network)
    return network


@pytest.mark.label_studio
class TestWatcher:
    @pytest.fixture
    def key(self, project):
        return ProjectName.from_uid(project.uid).key

    @pytest.fixture
    def tasks(self, client, project, tmp_path):
        """Two tasks that nobody has annotated, imported before the cycle was planned."""
        paths = [tmp_path / f"{shade}.png" for shade in (1, 2)]
        for shade, path in enumerate(paths):
            path.write_bytes(png_bytes(shade=shade))
        return client.import_files(project.id, paths)

    @pytest.fixture
    def seen(self):
        """What the watcher told."""
        return []

    @pytest.fixture
    def watcher(self, client, project, tasks, key, registry, tmp_path, seen):
        lines = [{"do": "import", "task": task, "image": str(task), "file": f"{task}.png", "begun": 1, "ended": 2}
                 for task in tasks]  # fmt: skip
        (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        database = Database(f"sqlite:///{tmp_path / 'state.sqlite3'}")
        remember_project(database, ProjectName(key, project.id))
        with database.session() as session:
            session.add(CycleRow(project_key=key, number=1, version=VERSION, status="running"))
        yield Watcher(
            project_key=key, model_dir=tmp_path, database=database, client=client,
            ledger=Ledger(tmp_path / "ledger.jsonl"), quiet=threading.RLock(),
            tell=lambda kind, **about: seen.append((kind, about.get("what", ""))),
        )  # fmt: skip
        database.close()

    @staticmethod
    def violations(seen):
        return [what for kind, what in seen if kind == "violation"]

    def test_a_whole_version_is_no_violation(self, watcher, client, project, tasks, seen):
        client.import_predictions(project.id, [prediction(task, score=0.5, version=VERSION) for task in tasks])
        client.set_model_version(project.id, VERSION)
        watcher._look_at_label_studio()
        assert [kind for kind, _ in seen] == ["switch"]

    def test_a_version_that_is_shown_before_all_its_predictions_are_there(self, watcher, client, project, tasks, seen):
        client.import_predictions(project.id, [prediction(tasks[0], score=0.5, version=VERSION)])
        client.set_model_version(project.id, VERSION)
        watcher._look_at_label_studio()
        assert self.violations(seen) == [f"{VERSION} (shown): tasks [{tasks[1]}] have no prediction"]

    def test_a_request_to_show_a_version_before_all_its_predictions_are_there(
        self, watcher, client, project, tasks, seen
    ):
        client.import_predictions(project.id, [prediction(tasks[1], score=0.5, version=VERSION)])
        body = json.dumps({"model_version": VERSION}).encode()
        watcher.look_at_request(Call(method="PATCH", path=f"/api/projects/{project.id}/", body=body))
        assert self.violations(seen) == [f"{VERSION} (asked for): tasks [{tasks[0]}] have no prediction"]

    def test_two_predictions_of_a_task(self, watcher, client, project, tasks, seen):
        twice = [prediction(task, score=0.5, version=VERSION) for task in (*tasks, tasks[0])]
        client.import_predictions(project.id, twice)
        client.set_model_version(project.id, VERSION)
        watcher._look_at_label_studio()
        assert self.violations(seen) == [f"{VERSION} (shown): 3 predictions of 2 tasks"]

    def test_a_version_of_no_cycle(self, watcher, client, project, tasks, seen):
        strange = "tsp-9-0123abcd"
        client.import_predictions(project.id, [prediction(task, score=0.5, version=strange) for task in tasks])
        client.set_model_version(project.id, strange)
        watcher._look_at_label_studio()
        assert self.violations(seen) == [f"{strange} (shown) is no cycle's"]

    def test_an_active_version_that_is_not_whole(self, watcher, registry, key, seen):
        add_version(registry, key)
        registry.activate(key, VERSION)
        watcher._look_at_registry()
        assert seen == []
        add_version(registry, key, "tsp-2-0123abcd")
        registry.activate(key, "tsp-2-0123abcd")
        weights = checks.weights_file(registry, key, "tsp-2-0123abcd")
        weights.write_bytes(weights.read_bytes()[:-1000])
        watcher._look_at_registry()
        (what,) = self.violations(seen)
        assert what.startswith("the active version is not whole: RegistryError")

    def test_a_pointer_to_nothing(self, watcher, registry, key, seen):
        add_version(registry, key)
        registry.activate(key, VERSION)
        (registry.root / key / VERSION).rename(registry.root / key / "elsewhere")
        watcher._look_at_registry()
        assert len(self.violations(seen)) == 1


def test_the_registry_is_compared_with_the_cycles(registry, tmp_path):
    (tmp_path / "1").mkdir()
    training = tmp_path / "1" / "training.json"
    training.write_text("{}")
    add_version(registry, "1-2", fingerprint=checks.sha256_of(training))
    digest = checks.sha256_of(checks.weights_file(registry, "1-2", VERSION))
    one = CycleRow(project_key="1-2", number=1, version=VERSION, status="done")

    def found(cycles=(one,), digests=None):
        return checks.check_registry(registry, "1-2", cycles, tmp_path, digests or {VERSION: digest})

    assert found() == []
    lost = CycleRow(project_key="1-2", number=2, version="tsp-2-0123abcd", status="done")
    assert found((one, lost)) == ["the versions ['tsp-2-0123abcd'] are not in the registry"]
    assert found(()) == [f"{VERSION} is in the registry, but no cycle made it"]
    assert found(digests={VERSION: "another"}) == [f"{VERSION} is not what it was when it was first seen"]
    training.write_text("{ }")
    assert found() == [f"{VERSION} says that it was made of another snapshot than its cycle's"]
    checks.weights_file(registry, "1-2", VERSION).write_bytes(b"half")
    (damaged,) = found()
    assert "is damaged" in damaged


@pytest.mark.parametrize(
    ("changed", "violation"),
    [
        ({}, None),
        ({"shown": "tsp-0-0123abcd"}, "Label Studio shows 'tsp-0-0123abcd', the active version is"),
        ({"open_tasks": {1, 2, 3}}, "tasks [3] have no prediction of"),
        ({"counts": {VERSION: 3}}, f"{VERSION} has 3 predictions of 2 tasks"),
        ({"counts": {VERSION: 2, "tsp-0-0123abcd": 1}}, "predictions of other versions are left"),
        ({"counts": {VERSION: 2, "somebody's": 1}}, None),
        ({"counts": {"tsp-0-0123abcd": 1}, "predicted": set(), "open_tasks": set()}, None),
    ],
)
def test_predictions_at_the_end(changed, violation):
    whole = {"shown": VERSION, "counts": {VERSION: 2}, "predicted": {1, 2}, "open_tasks": {1, 2}}
    found = checks.check_predictions(VERSION, **(whole | changed))
    assert len(found) == (violation is not None)
    assert violation is None or found[0].startswith(violation)


def test_one_bit_of_one_weight_is_a_difference():
    weights = tiny_network().state_dict()
    assert checks.compare_weights(VERSION, weights, {name: tensor.clone() for name, tensor in weights.items()}) == []
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.numel() > 1)
    changed = weights[name].clone()
    changed.view(-1)[0] = changed.view(-1)[0].nextafter(changed.new_tensor(9.0))
    (found,) = checks.compare_weights(VERSION, weights, {**weights, name: changed})
    assert found.startswith(f"{VERSION}: 1 of {len(weights)} tensors differ")
