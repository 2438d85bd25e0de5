"""The fuzzer: a short run against a real web process, and that it would see what is wrong."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import fuzz
from scripts import fuzz_strategies as made


def test_a_few_hundred_requests_find_nothing(tmp_path: Path) -> None:
    """The long run is `python -m scripts.fuzz --requests 10000`; its report is in docs/fuzz.json."""
    with fuzz.web_process(tmp_path) as backend:
        findings = fuzz.fuzz(backend, tmp_path, count=240, seed=7)
    assert findings.problems == []
    assert findings.tracebacks == {}
    assert findings.requests >= 240
    assert {"200", "401", "422", "503"} <= {status for found in findings.statuses.values() for status in found}
    shares = fuzz.report(findings, [], seed=7, converted=0, seconds=0)["share_of_statuses_by_route"]
    assert all(shares[route]["200"] > 0.6 and shares[route]["422"] > 0.05 for route in ("/predict", "/webhook"))
    assert {
        "label studio /predict",
        "malformed /predict",
        "stranger /webhook",
        "schema negative POST /setup",
        "away",
    } <= set(findings.kinds)


def test_annotations_of_every_kind_are_converted_or_refused_in_words() -> None:
    assert fuzz.convert(count=200, seed=7) == []


def test_a_conversion_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("somewhere")

    monkeypatch.setattr(fuzz, "instances_from_annotation", breaks)
    problems = fuzz.convert(count=50, seed=7)
    assert problems
    assert all(problem.startswith("ZeroDivisionError: somewhere: (") for problem in problems)


def answer(status: int, content: bytes = b'{"detail": "no"}', kind: str = "application/json") -> requests.Response:
    response = requests.Response()
    response.status_code, response._content, response.headers["content-type"] = status, content, kind
    return response


@pytest.mark.parametrize(
    ("kind", "given", "problem"),
    [
        ("label studio /setup", answer(200), ""),
        ("label studio /setup", answer(422), "a proper request got 422"),
        ("malformed /setup", answer(422), ""),
        ("malformed /setup", answer(500), "status 500"),
        ("label studio /setup", answer(500), "status 500"),
        ("label studio /setup", answer(503), "status 503"),
        ("away", answer(503), ""),
        ("away", answer(500), "status 500"),
        ("stranger /setup", answer(401), ""),
        ("stranger /setup", answer(422), "a stranger got 422"),
        ("label studio /setup", answer(401), "the right password was refused"),
        ("label studio /setup", answer(200, b"{"), "broken JSON"),
        ("schema positive GET /ui", answer(404, b"", "text/plain"), "without a word"),
    ],
)
def test_what_is_wrong_with_an_answer_is_seen(kind: str, given: requests.Response, problem: str) -> None:
    found = fuzz._problem(kind, given)
    assert problem in found
    assert bool(found) is bool(problem)


def test_a_server_that_hangs_up_is_a_finding() -> None:
    findings = fuzz.Findings()

    def hangs(_: object) -> requests.Response:
        raise requests.Timeout("too long")

    fuzz._record(findings, "label studio /setup", hangs, {})
    assert findings.problems[0].startswith("label studio /setup: Timeout after 0.0 s")


def test_the_fuzzer_fails_when_something_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    findings = fuzz.Findings(problems=["x"], memory_mb=[900.0, 900.0])
    monkeypatch.setattr(fuzz, "web_process", nullcontext)
    monkeypatch.setattr(fuzz, "fuzz", lambda *_, **__: findings)
    monkeypatch.setattr(fuzz, "convert", lambda **_: [])
    monkeypatch.setattr(sys, "argv", ["fuzz", "--requests", "1", "--out", str(tmp_path / "report.json")])
    with pytest.raises(SystemExit, match="1 problems"):
        fuzz.main()
    findings.problems.clear()
    fuzz.main()
    assert '"requests": 0' in (tmp_path / "report.json").read_text()
    findings.memory_mb.append(1000.0)
    with pytest.raises(SystemExit, match=r"grew by 100\.0 MB"):
        fuzz.main()


def test_the_same_seed_makes_the_same_requests() -> None:
    def drawn(seed: int) -> list[str]:
        found: list[str] = []
        fuzz._generate(made.predicts, lambda example: found.append(repr(example)), count=5, seed=seed)
        return found

    assert drawn(1) == drawn(1) != drawn(2)


@settings(max_examples=10, deadline=None, database=None)
@given(st.one_of(made.setups, made.predicts, made.webhooks, made.usable_predicts, made.usable_webhooks))
def test_what_is_made_can_be_sent(body: Any) -> None:
    assert made.as_json(body)
