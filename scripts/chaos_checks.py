"""What must hold in a chaos run, whatever was killed when. Each check returns the violations it found, in words."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ml_backend.cycle import train_version
from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.dataset import read_coco
from model.errors import TSPError
from model.files import read_tensors
from model.registry import Registry
from scripts.chaos_ledger import Kept, Ledger, content_of

Violations = list[str]


@dataclass(frozen=True)
class Snapshot:
    """What a cycle froze: the content by image (SHA-256), and images that it has twice."""

    ended: float  # unix time
    contents: dict[str, str]
    doubled: tuple[str, ...]


def read_snapshot(folder: Path) -> Snapshot:
    """The snapshot of a cycle; both parts of the split count alike."""
    parts = [folder / "training.json", folder / "validation.json"]
    images = [image for part in parts for image in read_coco(part, Path("/")).images]
    times = Counter(image.image_id for image in images)
    return Snapshot(
        ended=max(part.stat().st_mtime for part in parts),
        contents={image.image_id: content_of(image.labels, image.rles) for image in images},
        doubled=tuple(image for image, count in times.items() if count > 1),
    )


def check_cycles(cycles: list[CycleRow], workflows: Mapping[str, str], batch_size: int) -> Violations:
    """Each cycle once, in a row, for a full batch or on request, and none failed.

    `workflows` are the engine's records: the status by workflow id.
    """
    found: Violations = []
    numbers = [cycle.number for cycle in cycles]
    if numbers != list(range(1, len(cycles) + 1)):
        found.append(f"the cycles are numbered {numbers}")
    for cycle in cycles:
        if cycle.status == "failed":
            found.append(f"cycle {cycle.number} failed: {cycle.error}")
        elif cycle.status not in ("done", "refused"):  # refused: by the gate, its version stays inactive
            found.append(f"cycle {cycle.number} is {cycle.status} at the end: {cycle.stage}")
        if match := re.match(r"(\d+) newly annotated", cycle.reason):
            if int(match[1]) < batch_size:
                found.append(f"cycle {cycle.number} started too early: {cycle.reason}")
        elif not cycle.reason.startswith("asked for"):
            found.append(f"cycle {cycle.number} started for no known reason: {cycle.reason}")
    expected = {f"cycle-{cycle.project_key}-{cycle.number}": "SUCCESS" for cycle in cycles}
    if dict(workflows) != expected:
        wrong = sorted(set(workflows.items()) ^ set(expected.items()))
        found.append(f"the workflow engine's records are not those of the cycles: {wrong[:5]}")
    return found


def check_snapshots(cycles: list[CycleRow], snapshots: Mapping[int, Snapshot], ledger: Ledger) -> Violations:
    """What counted when a snapshot was taken is in it, as it was; what could not be read then is in the next one."""
    found: Violations = []
    numbers = {task.image: number for number, task in ledger.tasks.items()}
    for cycle in cycles:
        snapshot = snapshots.get(cycle.number)
        if snapshot is None:
            continue
        begun = unix(cycle.planned_at)
        found += [f"cycle {cycle.number} has image {image[:8]} twice" for image in snapshot.doubled]
        strange = set(snapshot.contents) - set(numbers)
        found += [f"cycle {cycle.number} has image {image[:8]}, which is no task's" for image in sorted(strange)]
        following = snapshots.get(cycle.number + 1)
        for number, task in ledger.tasks.items():
            taught, possible = snapshot.contents.get(task.image), task.possible(begun, snapshot.ended)
            if taught in possible or (taught is None and cycle.facts.get("problem_count") and following is None):
                continue
            if taught is None and cycle.facts.get("problem_count") and following and task.image in following.contents:
                continue
            if taught is None and cycle.facts.get("problem_count") and None in task.possible(begun, float("inf")):
                continue  # it was deleted before the next one
            found.append(
                f"cycle {cycle.number}, task {number}: the snapshot has {taught or 'nothing'}, expected one of "
                f"{sorted(str(content or 'nothing') for content in possible)} ({cycle.facts.get('problems')})"
            )
    return found


def check_label_studio(there: Mapping[int, Mapping[int, Kept]], ledger: Ledger) -> Violations:
    """No annotation and no task was lost or changed in Label Studio."""
    tasks = ledger.records()
    found = [f"task {number} is gone from Label Studio" for number in sorted(set(tasks) - set(there))]
    found += [f"task {number} is in Label Studio but nobody imported it" for number in sorted(set(there) - set(tasks))]
    for number in sorted(set(tasks) & set(there)):
        if tasks[number].annotations != dict(there[number]):
            found.append(f"task {number}: expected {tasks[number].annotations}, Label Studio has {dict(there[number])}")
    return found


def check_last_cycle(
    cycle: CycleRow, snapshot: Snapshot, there: Mapping[int, Mapping[int, Kept]], ledger: Ledger
) -> Violations:
    """The last cycle, which saw no faults, was taught by each annotation of Label Studio, and by nothing else."""
    wanted = {}
    for number, annotations in there.items():
        counting = [kept.content for kept in annotations.values() if not kept.cancelled]
        if counting and number in ledger.tasks:
            wanted[ledger.tasks[number].image] = counting[-1]
    found: Violations = []
    if cycle.facts.get("annotated") != len(wanted):
        found.append(f"the last cycle used {cycle.facts.get('annotated')} tasks, Label Studio has {len(wanted)}")
    if cycle.facts.get("problem_count"):
        found.append(f"the last cycle could not use all: {cycle.facts['problems']}")
    lost = sorted(set(wanted) - set(snapshot.contents))
    more = sorted(set(snapshot.contents) - set(wanted))
    other = sorted(image for image in set(wanted) & set(snapshot.contents) if wanted[image] != snapshot.contents[image])
    found += [f"{name} in the last snapshot: {images[:10]}" for name, images in
              (("missing", lost), ("too many", more), ("different", other)) if images]  # fmt: skip
    return found


def check_predictions(
    active: str, *, shown: str, counts: Mapping[str, int], predicted: Set[int], open_tasks: Set[int]
) -> Violations:
    """Each task without annotation has one prediction of the active version, which has replaced our older versions.

    `shown` is the version that Label Studio shows, `counts` its predictions by version, `predicted` the tasks that
    carry the active one.
    """
    found: Violations = []
    if shown != active and open_tasks:
        found.append(f"Label Studio shows {shown!r}, the active version is {active!r}")
    if missing := sorted(open_tasks - predicted):
        found.append(f"tasks {missing[:10]} have no prediction of {active}")
    if counts.get(active, 0) != len(predicted):
        found.append(f"{active} has {counts.get(active, 0)} predictions of {len(predicted)} tasks")
    others = {n: count for n, count in counts.items() if n.startswith("tsp-") and n != active}
    if others and counts.get(active):  # a version that found no task without annotation replaces none
        found.append(f"predictions of other versions are left: {others}")
    return found


@dataclass(frozen=True)
class Steps:
    """Training steps as the worker's log has them."""

    done: int
    repeated: int
    worst: int  # most that were repeated at once
    interruptions: int  # after which training went on, or began again


def count_steps(log: str) -> Steps:
    """Count them in a log at DEBUG."""
    newest: dict[int, int] = {}
    done = repeated = worst = interruptions = 0
    for match in re.finditer(r"cycle (\d+): step (\d+) of \d+$", log, re.MULTILINE):
        cycle, step = int(match[1]), int(match[2])
        done += 1
        if cycle in newest and step != newest[cycle] + 1:
            interruptions += 1
            again = max(0, newest[cycle] - step + 1)
            repeated, worst = repeated + again, max(worst, again)
        newest[cycle] = step
    return Steps(done, repeated, worst, interruptions)


def check_steps(steps: Steps, *, checkpoint_steps: int) -> Violations:
    """A kill costs at most the steps since the last checkpoint."""
    if steps.worst > checkpoint_steps:
        return [f"{steps.worst} steps were repeated at once, a checkpoint is written every {checkpoint_steps}"]
    return []


def check_registry(
    registry: Registry, project_key: str, cycles: Iterable[CycleRow], cycle_folder: Path, digests: Mapping[str, str]
) -> Violations:
    """Each version loads, belongs to one cycle and to its snapshot, and is as it was when it was first seen."""
    found: Violations = []
    versions = registry.versions(project_key)
    made_by = {cycle.version: cycle for cycle in cycles if cycle.version}
    missing = [c.version for c in cycles if c.status == "done" and c.version not in versions]
    if missing:
        found.append(f"the versions {missing} are not in the registry")
    for version in versions:
        if version not in made_by:
            found.append(f"{version} is in the registry, but no cycle made it")
            continue
        try:
            _, card = registry.load(project_key, version)
        except TSPError as error:
            found.append(str(error))
            continue
        training = cycle_folder / str(made_by[version].number) / "training.json"
        if training.exists() and card.data_fingerprint != sha256_of(training):
            found.append(f"{version} says that it was made of another snapshot than its cycle's")
        if version in digests and sha256_of(weights_file(registry, project_key, version)) != digests[version]:
            found.append(f"{version} is not what it was when it was first seen")
    return found


def weights_file(registry: Registry, project_key: str, version: str) -> Path:
    return registry.root / project_key / version / "weights.safetensors"


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train_again(
    environment: Mapping[str, str], project_key: str, number: int, version: str, scratch: Path
) -> Violations:
    """Train a cycle once more from its frozen snapshot, without interruption, in this process, and compare all weights.

    `environment` are the worker's settings.
    """
    settings = Settings.model_validate(dict(environment))
    torch.set_num_threads(settings.threads or 1)
    service = Service.connect(settings)
    try:
        source = service.cycle_folder(project_key, number)
        again = Settings.model_validate({**environment, "MODEL_DIR": str(scratch)})
        other = Service.connect(again)
        try:
            folder = other.cycle_folder(project_key, number)
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("training.json", "validation.json", "recipe.json", "pseudo.json", "class_thresholds.json"):
                if (source / name).exists():
                    (folder / name).write_bytes((source / name).read_bytes())
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
            train_version(other, project_key, number, _SilentLog(other.database, project_key, number))
            ours, _ = read_tensors(folder / "checkpoint.safetensors")
        finally:
            other.close()
        theirs, _ = read_tensors(weights_file(service.registry, project_key, version))
    finally:
        service.close()
    return compare_weights(version, theirs, {name: ours[f"network.{name}"] for name in theirs})


def compare_weights(version: str, published: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> Violations:
    """Tensors by name must be equal in every bit."""
    different = [name for name, tensor in published.items() if not torch.equal(tensor, again[name])]
    if different:
        return [f"{version}: {len(different)} of {len(published)} tensors differ from a training without interruption"]
    return []


class _SilentLog(CycleLog):
    """There is no row to write into."""

    def _update(self, **columns: Any) -> None:
        pass

    def facts(self, facts: dict[str, Any]) -> None:
        pass

    def go_on(self) -> None:
        pass


def unix(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
