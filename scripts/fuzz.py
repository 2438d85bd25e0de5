"""Sends a real web process what its OpenAPI description allows and forbids, and what Label Studio might send: no answer
may be a server's error, none may be long in coming, and the process may not grow.

    python -m scripts.fuzz --requests 10000 --seed 0 --out docs/fuzz.json
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok

from ml_backend.errors import ImageError, LabelConfigError
from ml_backend.label_config import parse_label_config
from ml_backend.ls_format import choose_annotation, image_uri, instances_from_annotation, regions_from_instances
from model.registry import Registry
from scripts import fuzz_strategies as made
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import free_port
from scripts.tiny_version import tiny_version

PASSWORD = ("studio", "fuzzed")
SECONDS = 10.0  # after which an answer counts as never given
AWAY_EVERY = 250  # requests, of which one wants an image of Label Studio, which is away
WARM_UP = 0.3  # share of the requests after which the process should have all that it needs
MOST_GROWTH_MB = 50.0  # afterwards
_SHOWN = 20
_TRACEBACK = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception|Warning): .*$", re.MULTILINE)


@dataclass
class Findings:
    """What was sent and what came back."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # of each kind
    problems: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    memory_mb: list[float] = field(default_factory=list)
    tracebacks: Counter[str] = field(default_factory=Counter)  # the last line of each in the log

    @property
    def requests(self) -> int:
        return sum(self.kinds.values())


@contextmanager
def web_process(folder: Path) -> Iterator[BackendProcesses]:
    """A guarded web process with a tiny active version in one of the projects, while Label Studio is away."""
    project, _, created = made.PROJECT_UIDS[0].partition(".")
    registry, key = Registry(folder / "models" / "versions"), f"{project}-{created}"
    registry.add(key, *tiny_version("tsp-1-00000000", made.KNOWN_LABELS))
    registry.activate(key, "tsp-1-00000000")
    environment = {
        "LABEL_STUDIO_URL": "http://127.0.0.1:1",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "BASIC_AUTH_USER": PASSWORD[0],
        "BASIC_AUTH_PASS": PASSWORD[1],
        "MODEL_DIR": str(folder / "models"),
        "PORT": str(free_port()),
        "TSP_SHOWN_THRESHOLD": "0",
    }
    backend = BackendProcesses(settings=environment, log_dir=folder)
    try:
        backend.start_one("web")
        backend.wait_until_it_answers()
        _load_the_version(backend.url)
        yield backend
    finally:
        backend.stop()


def _load_the_version(url: str) -> None:
    """The first prediction takes seconds, or more than a request here may take where others use the cores, too."""
    task = {"id": 1, "data": {"image": made.IMAGES[0]}}
    body: dict[str, Any] = {"tasks": [task], "project": made.PROJECT_UIDS[0], "label_config": made.CONFIG}
    requests.post(f"{url}/predict", json=body, auth=PASSWORD, timeout=300).raise_for_status()


def fuzz(backend: BackendProcesses, folder: Path, *, count: int, seed: int) -> Findings:
    """At least `count` requests; the same seed makes the same ones."""
    findings, url = Findings(), backend.url
    session = requests.Session()
    session.auth = PASSWORD
    stranger = requests.Session()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", auth=PASSWORD)
    senders: list[tuple[str, st.SearchStrategy[Any], Callable[[Any], requests.Response]]] = []
    for operation in (found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)):
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            kind = f"schema {mode.value} {operation.label}"
            cases = operation.as_strategy(generation_mode=mode)
            if mode is schemathesis.GenerationMode.POSITIVE:
                cases = st.tuples(cases, st.integers(1, 4)).map(_mostly_of_a_known_project)
            senders.append((kind, cases, partial(_call, session)))
    for who, sender, path, bodies in (
        ("label studio", session, "/setup", made.usable_setups),
        ("label studio", session, "/predict", made.usable_predicts),
        ("label studio", session, "/predict", made.usable_predicts_with_a_version),
        ("label studio", session, "/webhook", made.usable_webhooks),
        ("malformed", session, "/setup", made.setups),
        ("malformed", session, "/predict", made.predicts),
        ("malformed", session, "/webhook", made.webhooks),
        ("stranger", stranger, "/setup", made.usable_setups),
        ("stranger", stranger, "/predict", made.usable_predicts),
        ("stranger", stranger, "/webhook", made.usable_webhooks | made.webhooks),
    ):
        senders.append((f"{who} {path}", bodies, partial(_post, sender, f"{url}{path}")))
    senders.append(("away", made.predicts_of_label_studios_images, partial(_post, session, f"{url}/predict")))

    share = max(1, count // 400)
    for number in cycle(range(1_000_000)):  # small turns, so that every kind is spread over the whole time
        for kind, strategy, send in senders:
            turn = share if kind != "away" else 1
            turn *= 4 if kind.startswith("label studio") else 1
            if kind == "away" and findings.kinds[kind] * AWAY_EVERY > findings.requests:
                continue
            if not _has_more(kind, findings):
                continue
            _generate(strategy, partial(_record, findings, kind, send), count=turn, seed=seed * 1_000_003 + number)
            findings.memory_mb.append(_memory_mb(backend.pid("web")))
            backend.check()
            if findings.requests >= count:
                log = (folder / "web.log").read_text(errors="replace")
                findings.tracebacks.update(_TRACEBACK.findall(log))
                return findings
    raise AssertionError("unreachable: the loop ends by its count")


def _mostly_of_a_known_project(drawn: tuple[schemathesis.Case[Any], int]) -> schemathesis.Case[Any]:
    """What a description in OpenAPI cannot say, in three requests of four: which projects there are, and what a
    labelling configuration is."""
    case, number = drawn
    if number < 4 and isinstance(case.body, dict) and "project" in case.body:
        known = made.PROJECTS[0] if isinstance(case.body["project"], dict) else made.PROJECT_UIDS[0]
        case.body = {**case.body, "project": known, "schema": made.CONFIG, "label_config": made.CONFIG}
    return case


def _has_more(kind: str, findings: Findings) -> bool:
    """Operations without parameters have one request, which need not be sent thousands of times."""
    return not (
        kind.startswith("schema") and "GET" in kind and findings.kinds[kind] >= max(20, findings.requests // 50)
    )


def _generate(strategy: st.SearchStrategy[Any], use: Callable[[Any], None], *, count: int, seed: int) -> None:
    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(example: Any) -> None:
        use(example)

    try:
        each()
    except Unsatisfiable:
        return  # nothing of this kind exists, such as a wrong request to an operation without parameters


def _call(session: requests.Session, case: schemathesis.Case[Any]) -> requests.Response:
    options = case.as_transport_kwargs()
    return session.request(**options, timeout=SECONDS, allow_redirects=False)


def _post(session: requests.Session, address: str, body: object) -> requests.Response:
    headers = {"Content-Type": "application/json"}
    return session.post(address, data=made.as_json(body), headers=headers, timeout=SECONDS)


def _record(findings: Findings, kind: str, send: Callable[[Any], requests.Response], example: Any) -> None:
    started = time.monotonic()
    findings.kinds[kind] += 1
    try:
        answer = send(example)
    except requests.RequestException as error:
        findings.problems.append(
            f"{kind}: {type(error).__name__} after {time.monotonic() - started:.1f} s: {example!r:.500}"
        )
        return
    seconds = time.monotonic() - started
    findings.statuses[kind][str(answer.status_code)] += 1
    findings.slowest = max(findings.slowest, (round(seconds, 2), kind))
    if problem := _problem(kind, answer):
        findings.problems.append(f"{kind}: {problem}: {example!r:.500}")


def _problem(kind: str, answer: requests.Response) -> str:
    """What is wrong with an answer; "" when nothing is."""
    status = answer.status_code
    if kind.startswith("stranger"):
        return "" if status == 401 else f"a stranger got {status}"
    if status == 401:
        return "the right password was refused"
    if status >= 500 and not (kind == "away" and status == 503):
        return f"status {status}: {answer.text[:300]}"
    if kind.startswith("label studio") and status != 200:
        return f"a proper request got {status}: {answer.text[:300]}"
    if "json" in answer.headers.get("content-type", ""):
        try:
            answer.json()
        except ValueError:
            return f"status {status} with broken JSON: {answer.text[:300]}"
    if status >= 400 and not answer.text:
        return f"status {status} without a word"
    return ""


def _memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def convert(*, count: int, seed: int) -> list[str]:
    """Configurations and tasks through the conversions themselves, which may refuse only with their own errors."""
    problems: list[str] = []
    pairs = st.tuples(made.label_configs, made.tasks, st.tuples(st.integers(1, 300), st.integers(1, 300)))

    def use(example: tuple[str, Any, tuple[int, int]]) -> None:
        try:
            _convert(*example)
        except Exception as error:  # each is a finding
            problems.append(f"{type(error).__name__}: {error}: {example!r:.500}")

    _generate(pairs, use, count=count, seed=seed)
    return problems


def _convert(xml: str, task: Any, image_hw: tuple[int, int]) -> None:
    try:
        config = parse_label_config(xml)
    except LabelConfigError:
        config = parse_label_config(made.CONFIG)
    try:
        image_uri(task, config)
    except ImageError as error:
        str(error).encode(errors="strict" if "\\ud8" not in ascii(task) else "replace")
    annotation = choose_annotation(task)
    for one in filter(None, [annotation, *_mappings(task.get("annotations"))]):
        found = instances_from_annotation(one, config, image_hw)
        regions = regions_from_instances(found.labels, found.rles, config, image_hw)
        json.dumps(regions, allow_nan=False)


def _mappings(values: object) -> Iterable[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def report(findings: Findings, conversions: list[str], *, seed: int, converted: int, seconds: float) -> dict[str, Any]:
    """The figures, small enough to be kept."""
    memory = findings.memory_mb
    warm = memory[int(len(memory) * WARM_UP)]
    return {
        "requests": findings.requests,
        "seed": seed,
        "seconds": round(seconds),
        "problems": len(findings.problems),
        "first_problems": findings.problems[:_SHOWN],
        "tracebacks": dict(findings.tracebacks),
        "statuses": dict(sorted(sum(findings.statuses.values(), Counter()).items())),
        "slowest_seconds": findings.slowest[0],
        "slowest_kind": findings.slowest[1],
        "memory_mb": {"after_warm_up": warm, "end": memory[-1], "growth": round(memory[-1] - warm, 1)},
        "conversions": {"count": converted, "problems": len(conversions), "first_problems": conversions[:_SHOWN]},
        "share_of_statuses_by_route": _shares(findings),
        "statuses_by_kind": {kind: dict(sorted(found.items())) for kind, found in sorted(findings.statuses.items())},
    }


def _shares(findings: Findings) -> dict[str, dict[str, float]]:
    """Of each route's requests with the right password, the share of each status."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, found in findings.statuses.items():
        if not kind.startswith("stranger"):
            counts["/predict" if kind == "away" else kind.rpartition(" ")[2]].update(found)
    return {
        route: {status: round(number / found.total(), 3) for status, number in sorted(found.items())}
        for route, found in sorted(counts.items())
    }


def main() -> None:
    """Fuzz, print the report, and fail if there is a problem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--conversions", type=int, help="as many as requests, unless said otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of the requests; default: %(default)s")
    parser.add_argument("--out", type=Path, help="where the report is kept, too")
    options = parser.parse_args()
    converted = options.requests if options.conversions is None else options.conversions
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, web_process(Path(folder)) as backend:
        findings = fuzz(backend, Path(folder), count=options.requests, seed=options.seed)
    conversions = convert(count=converted, seed=options.seed)
    figures = report(findings, conversions, seed=options.seed, converted=converted, seconds=time.monotonic() - started)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    if findings.problems or conversions:
        sys.exit(f"{len(findings.problems) + len(conversions)} problems")
    if figures["memory_mb"]["growth"] > MOST_GROWTH_MB:
        sys.exit(f"the web process grew by {figures['memory_mb']['growth']} MB")


if __name__ == "__main__":
    main()
