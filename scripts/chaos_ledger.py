"""What the simulated annotators of a chaos run did to Label Studio, and when: what everything else must agree with."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_format import instances_from_annotation, regions_from_instances
from model.dataset import LabeledSet
from model.errors import TSPError
from model.types import IntArray, LabeledImage, Rle

Json = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """An annotation as Label Studio must have it."""

    cancelled: bool
    content: str


@dataclass(frozen=True)
class Change:
    """From a moment between `begun` and `ended` (unix times) on, `content` counted for a task; None: nothing."""

    begun: float
    ended: float
    content: str | None


@dataclass
class TaskRecord:
    """A task from its import on."""

    image: str  # SHA-256 of its bytes
    file: str
    annotations: dict[int, Kept] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=lambda: [Change(0.0, 0.0, None)])
    imported_at: float = 0.0
    removed_at: float | None = None

    @property
    def counting(self) -> str | None:
        """The content of the annotation that counts."""
        return next((kept.content for kept in reversed(self.annotations.values()) if not kept.cancelled), None)

    def possible(self, begun: float, ended: float) -> set[str | None]:
        """What may have counted at some moment between two times."""
        found: set[str | None] = set()
        for number, change in enumerate(self.changes):
            is_over = self.changes[number + 1].ended if number + 1 < len(self.changes) else float("inf")
            if change.begun <= ended and is_over >= begun:
                found.add(change.content)
        return found

    def untouched_since(self, moment: float) -> bool:
        """Whether the task has been there, without any change to what counts, since then."""
        happened = [self.imported_at, *(change.ended for change in self.changes)]
        return self.removed_at is None and max(happened) < moment


class Ledger:
    """A file of lines, one for each thing that was done; read again it gives the same records."""

    def __init__(self, path: Path) -> None:
        self.tasks: dict[int, TaskRecord] = {}
        self.open: Json | None = None  # what had begun when the process ended
        self.counts: dict[str, int] = {}
        self._path = path
        self._lock = threading.Lock()
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(whole))
            for line in whole:
                self._apply(json.loads(line))

    def begin(self, action: str, **about: Any) -> float:
        """Something will be done; if no end is recorded, it may have been."""
        now = time.time()
        self._write({"do": "begin", "action": action, "at": now, **about})
        return now

    def end(self, action: str, begun: float, **about: Any) -> None:
        """It was done."""
        self._write({"do": action, "begun": begun, "ended": time.time(), **about})

    def records(self) -> dict[int, TaskRecord]:
        """The tasks that exist."""
        with self._lock:
            return {number: task for number, task in self.tasks.items() if task.removed_at is None}

    def annotated(self) -> set[int]:
        """The tasks with an annotation that counts."""
        return {number for number, task in self.records().items() if task.counting is not None}

    def _write(self, entry: Json) -> None:
        with self._lock:
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self._apply(entry)

    def _apply(self, entry: Json) -> None:
        action = entry["do"]
        if action == "begin":
            self.open = entry
            return
        self.open = None
        self.counts[action] = self.counts.get(action, 0) + 1
        if "task" not in entry:  # "nothing" came of it, or a button was pressed
            return
        begun, ended, number = entry["begun"], entry["ended"], entry["task"]
        if action == "import":
            task = TaskRecord(image=entry["image"], file=entry["file"], imported_at=ended)
            self.tasks[number] = task
            return
        task = self.tasks[number]
        if action == "remove":
            task.removed_at = ended
            task.annotations.clear()
        elif action == "found":
            task.annotations = {int(key): Kept(**kept) for key, kept in entry["annotations"].items()}
        elif action == "delete":
            del task.annotations[entry["annotation"]]
        else:
            task.annotations.pop(entry["annotation"], None)  # what was touched last stands last
            task.annotations[entry["annotation"]] = Kept(entry["cancelled"], entry["content"])
        task.changes.append(Change(begun, ended, task.counting))


def content_of(labels: IntArray, rles: Iterable[Rle]) -> str:
    """A name for instances: equal for equal labels and masks in whatever order."""
    pairs = sorted(
        (int(label), _text(rle["counts"]), list(rle["size"])) for label, rle in zip(labels, rles, strict=True)
    )
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def _text(counts: Any) -> str:
    return counts.decode() if isinstance(counts, bytes) else str(counts)


def exported(
    client: LabelStudioClient, api: httpx.Client, project_id: int, truth: "Truth"
) -> dict[int, dict[int, Kept]]:
    """Every task of the project with every annotation, as Label Studio has them now."""
    parameters = {"exportType": "JSON", "download_all_tasks": "true"}
    answer = api.get(f"/api/projects/{project_id}/export", params=parameters)
    answer.raise_for_status()
    found: dict[int, dict[int, Kept]] = {task.id: {} for task in client.tasks(project_id)}
    found |= {task["id"]: truth.kept(task["annotations"]) for task in answer.json() if task["id"] in found}
    return found


class Truth:
    """The images of a run in a fixed order, and what an annotator draws in each."""

    def __init__(self, truth: LabeledSet) -> None:
        self.images = truth.images
        self.class_names = truth.class_names
        self.by_file = {image.path.name: image for image in truth.images}
        self.config: LabelConfig = parse_label_config(self.label_config)

    @property
    def label_config(self) -> str:
        labels = "".join(f'<Label value="{name}"/>' for name in self.class_names)
        return (
            '<View><Image name="image" value="$image"/>'
            f'<PolygonLabels name="label" toName="image">{labels}</PolygonLabels></View>'
        )

    def regions(self, image: LabeledImage, keep: Callable[[int], bool] = lambda _: True) -> list[Json]:
        """The `result` of an annotation with those instances that are to be kept."""
        kept = [number for number in range(len(image.labels)) if keep(number)]
        return regions_from_instances(
            image.labels[kept], [image.rles[number] for number in kept], self.config, image.image_hw
        )

    def content(self, annotation: Mapping[str, Any], image_hw: tuple[int, int]) -> str:
        """What an annotation teaches."""
        instances = instances_from_annotation(annotation, self.config, image_hw)
        return content_of(instances.labels, instances.rles)

    def kept(self, annotations: Iterable[Json]) -> dict[int, Kept]:
        """Exported annotations, the one that was touched last at the end."""
        hw = self.images[0].image_hw
        ordered = sorted(annotations, key=lambda annotation: str(annotation["updated_at"]))
        return {a["id"]: Kept(bool(a["was_cancelled"]), self.content(a, hw)) for a in ordered}


# Of a hundred things an annotator does; the first stands in when another cannot be done.
_WEIGHTS = {"annotate": 62, "skip": 7, "unskip": 6, "update": 9, "delete": 5, "import": 6, "remove": 3, "press": 2}


class Annotators:
    """Do one thing after the other, drawn from the seed, straight to Label Studio (without faults in between)."""

    def __init__(
        self,
        *,
        client: LabelStudioClient,
        api: httpx.Client,
        project_id: int,
        truth: Truth,
        ledger: Ledger,
        rng: random.Random,
    ) -> None:
        self._client, self._api, self._project_id = client, api, project_id
        self._truth, self._ledger, self._rng = truth, ledger, rng

    def settle(self) -> None:
        """What had begun when an earlier process ended, or what Label Studio answered an error to: look what it did."""
        begin = self._ledger.open
        if begin is None:
            return
        there = exported(self._client, self._api, self._project_id, self._truth)
        if begin["action"] == "import":
            known = set(self._ledger.tasks)
            for number in sorted(set(there) - known):
                self._ledger.end("import", begin["at"], task=number, image=begin["image"], file=begin["file"])
            if set(there) <= known:
                self._ledger.end("nothing", begin["at"])
        elif begin.get("task") is None:
            self._ledger.end("nothing", begin["at"])
        elif begin["task"] not in there:
            self._ledger.end("remove", begin["at"], task=begin["task"])
        else:
            kept = {number: vars(one) for number, one in there[begin["task"]].items()}
            self._ledger.end("found", begin["at"], task=begin["task"], annotations=kept)

    def import_images(self, count: int) -> None:
        """The next images become tasks, one by one, as far as there are any."""
        for _ in range(count):
            self._import()

    def act(self, *, may_annotate: bool) -> None:
        """One thing. Label Studio may answer an error (its database is busy): then it is asked what became of it."""
        action = self._rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        try:
            if not self._do(action) and may_annotate:
                self._annotate(cancelled=False) or self._import()
        except (httpx.HTTPError, TSPError):
            time.sleep(1)
            self.settle()

    def press_start_training(self) -> None:
        """The button in Label Studio."""
        begun = self._ledger.begin("press")
        backend = self._client.ml_backends(self._project_id)[0]
        self._api.post(f"/api/ml/{backend.id}/train").raise_for_status()
        self._ledger.end("press", begun)

    def _do(self, action: str) -> bool:
        """Whether it could be done; annotating is left to the caller."""
        match action:
            case "skip":
                return self._annotate(cancelled=True)
            case "unskip":
                return self._patch(cancelled=True)
            case "update":
                return self._patch(cancelled=False)
            case "delete":
                return self._delete()
            case "import":
                return self._import()
            case "remove":
                return self._remove()
            case "press":
                self.press_start_training()
                return True
        return False

    def _annotate(self, *, cancelled: bool) -> bool:
        task = self._client.next_task(self._project_id)
        if task is None:
            return False
        number = int(task["id"])
        image = self._image(number)
        result = self._truth.regions(image)
        begun = self._ledger.begin("annotate", task=number)
        if cancelled:
            made, result = self._client.skip(number), []
        else:
            made = self._client.submit_annotation(number, result=result, lead_time_seconds=1.0)
        content = self._truth.content({"result": result}, image.image_hw)
        action = "skip" if cancelled else "annotate"
        self._ledger.end(action, begun, task=number, annotation=made, cancelled=cancelled, content=content)
        return True

    def _patch(self, *, cancelled: bool) -> bool:
        """Change what was drawn in an annotation: of a skipped one, so that it is skipped no longer."""
        chosen = self._some_annotation(lambda kept: kept.cancelled == cancelled)
        if chosen is None:
            return False
        number, annotation = chosen
        image = self._image(number)
        dropped = self._rng.randrange(len(image.labels) + 1)
        result = self._truth.regions(image, lambda instance: instance != dropped)
        begun = self._ledger.begin("patch", task=number)
        self._api.patch(
            f"/api/annotations/{annotation}/", json={"result": result, "was_cancelled": False}
        ).raise_for_status()
        content = self._truth.content({"result": result}, image.image_hw)
        action = "unskip" if cancelled else "update"
        self._ledger.end(action, begun, task=number, annotation=annotation, cancelled=False, content=content)
        return True

    def _delete(self) -> bool:
        chosen = self._some_annotation(lambda kept: True)
        if chosen is None:
            return False
        number, annotation = chosen
        begun = self._ledger.begin("delete", task=number)
        self._api.delete(f"/api/annotations/{annotation}/").raise_for_status()
        self._ledger.end("delete", begun, task=number, annotation=annotation)
        return True

    def _import(self) -> bool:
        if len(self._ledger.tasks) >= len(self._truth.images):
            return False
        image = self._truth.images[len(self._ledger.tasks)]
        about = {"image": hashlib.sha256(image.path.read_bytes()).hexdigest(), "file": image.path.name}
        begun = self._ledger.begin("import", **about)
        (number,) = self._client.import_files(self._project_id, [image.path])
        self._ledger.end("import", begun, task=number, **about)
        return True

    def _remove(self) -> bool:
        there = sorted(self._ledger.records())
        if len(there) < 10:
            return False
        number = self._rng.choice(there)
        begun = self._ledger.begin("remove", task=number)
        self._api.delete(f"/api/tasks/{number}/").raise_for_status()
        self._ledger.end("remove", begun, task=number)
        return True

    def _image(self, number: int) -> LabeledImage:
        return self._truth.by_file[self._ledger.tasks[number].file]

    def _some_annotation(self, fits: Callable[[Kept], bool]) -> tuple[int, int] | None:
        found = [
            (number, annotation)
            for number, task in sorted(self._ledger.records().items())
            for annotation, kept in task.annotations.items()
            if fits(kept)
        ]
        return self._rng.choice(found) if found else None
