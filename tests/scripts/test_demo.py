"""What the demo hands to its processes."""

import argparse
from pathlib import Path
from types import SimpleNamespace

from scripts.demo import _settings

OPTIONS = argparse.Namespace(backend_port=9090, batch_size=20, image_size=None, data=None, epochs=10, min_steps=300)


def test_the_environments_settings_count_where_the_demo_has_no_option_of_its_own(monkeypatch):
    monkeypatch.setenv("TSP_STRATEGY", "hybrid")
    monkeypatch.setenv("TSP_BATCH_SIZE", "7")
    settings = _settings(OPTIONS, Path("demo"), SimpleNamespace(url="http://127.0.0.1:1", token="t"))
    assert settings["TSP_STRATEGY"] == "hybrid"
    assert settings["TSP_BATCH_SIZE"] == "20"
