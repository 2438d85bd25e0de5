"""A short chaos run: plugs are pulled while annotators work in a real Label Studio, and in the end everything agrees.

`python -m scripts.chaos` does the same for longer.
"""

from pathlib import Path

import pytest

from scripts import chaos
from tests.label_studio import prepared_server

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]


def test_every_annotation_teaches_once_whatever_is_killed(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    templates = Path(pytestconfig.cache.mkdir("label_studio"))
    server = prepared_server(tmp_path / "label-studio", template_folder=templates)
    report = chaos.run(chaos.Plan.quick(kills=10, seed=1), tmp_path, server=server)
    assert report["violations"] == {}
    assert report["kills"] >= 10
    assert report["kills_by_process"].keys() == {"web", "worker"}
    assert report["label_studio_restarts"] >= 1
    assert sum(report["faults"]["webhook"].values())
    assert sum(report["faults"]["api"].values())
    assert report["cycles"] >= 2
    assert report["annotated_in_label_studio"] == report["annotated_in_last_cycle"] > 0
    assert report["switches"], "nobody saw the queue switch"
    assert report["trained_again"], "no cycle was trained once more to compare its weights"
