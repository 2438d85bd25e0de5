"""The whole loop on this machine: a real Label Studio, our backend, images, and on request a simulated annotator.

`make demo`, `make demo DATA=<folder>`, `make demo ORACLE=1`; everything is kept in `.demo/` and goes on at the next
start. A DATA folder holds images, or `images/` and a COCO `annotations.json`.
"""

import argparse
import json
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from xml.sax.saxutils import quoteattr

import httpx

from ml_backend.db import UNFINISHED, utc_now
from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient
from ml_backend.predictor import UNTRAINED
from model.dataset import LabeledSet, read_coco
from model.errors import TSPError
from scripts.arguments import not_negative, positive
from scripts.backend_processes import BackendProcessError, BackendProcesses
from scripts.label_studio_server import LabelStudioServer, LabelStudioServerError, refuse_taken_port
from scripts.make_phantoms import make_phantoms
from scripts.oracle import Oracle

EMAIL, PASSWORD = "annotator@example.com", "label-with-me"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # which Label Studio takes as uploads
PHANTOMS, PHANTOM_SIZE = 150, 192
PHANTOM_INSTRUCTION = (
    "Outline each lesion in the brain. Haemorrhage: a patch brighter than the brain. Oedema: a faint patch darker than "
    "the brain. Calcification: a small, very bright spot. The four dark leaves in the middle are ventricles; "
    "some images have no lesion: submit them empty."
)


@dataclass(frozen=True)
class DemoImages:
    """What is to be labelled; `truth` is what the simulated annotator knows."""

    name: str
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    truth: LabeledSet | None
    instruction: str = ""  # what annotators are told


def main() -> None:
    """Start everything, say where it is, and stay until Ctrl-C."""
    options = _options()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, _stop_in_order)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup wants it to go on
        signal.signal(signal.SIGHUP, _stop_in_order)
    try:
        _run(options)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where this left off.")
    except (TSPError, LabelStudioServerError, BackendProcessError) as error:
        sys.exit(f"The demo cannot go on: {error}")


def _run(options: argparse.Namespace) -> None:
    folder = Path(options.folder).resolve()
    for option, port in (("PORT", options.port), ("BACKEND_PORT", options.backend_port)):
        refuse_taken_port(port, hint=f"choose another with {option}=")
    images = _images(options, folder)
    if options.oracle and images.truth is None:
        raise TSPError(f"{options.data}: the simulated annotator needs a COCO annotations.json beside images/")
    wanted = options.batch_size or _positive_from_environment("TSP_BATCH_SIZE", 20)
    options.batch_size = _batch_size(wanted, options.cycles, len(images.paths))
    with ExitStack() as running:
        server = running.enter_context(
            LabelStudioServer(
                data_dir=folder / "label-studio",
                username=EMAIL,
                password=PASSWORD,
                port=options.port,
                report=_say,
                end_with_us=True,
            )
        )
        client = running.enter_context(LabelStudioClient(server.url, server.token))
        _say("Our web process and worker start ...")
        backend = running.enter_context(
            BackendProcesses(settings=_settings(options, folder, server), log_dir=folder / "logs", end_with_us=True)
        )
        project_id = _project(client, images, folder / "projects.json")
        client.connect_backend(project_id, url=backend.url, title="TSP Mask R-CNN")
        client.create_webhook(project_id, url=f"{backend.url}/webhook")
        _explain(server, backend, project_id, options, images.instruction)
        if options.oracle:
            _annotate(client, backend, project_id, images, options)
            if options.exit_when_done:
                return
            print("The simulated annotator is done; go on by hand, or stop with Ctrl-C.")
        while True:
            time.sleep(1)
            backend.check()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", default="", help="folder of images, or with images/ and annotations.json (COCO)")
    parser.add_argument("--labels", default="object", help="class names for a folder without annotations, by commas")
    parser.add_argument("--oracle", action="store_true", help="a simulated annotator submits the ground truth")
    parser.add_argument("--cycles", type=positive, default=2, help="cycles that the simulated annotator stays for")
    parser.add_argument("--exit-when-done", action="store_true", help="stop when the simulated annotator is done")
    # None: TSP_* of the environment, else the demo's own.
    parser.add_argument("--batch-size", type=positive, help="annotated images that start a cycle (20)")
    parser.add_argument(
        "--image-size", type=positive, help="shorter side the network sees (192 for phantoms, else 256)"
    )
    parser.add_argument("--epochs", type=positive, help="passes over the annotated images in a cycle (10)")
    parser.add_argument("--min-steps", type=not_negative, help="training steps of a cycle, at least (300)")
    parser.add_argument("--folder", default=".demo", help="where everything is kept")
    parser.add_argument("--port", type=int, default=8080, help="Label Studio's port")
    parser.add_argument("--backend-port", type=int, default=9090, help="our port")
    return parser.parse_args()


def _positive_from_environment(name: str, default: int) -> int:
    try:
        return positive(os.environ.get(name) or str(default))
    except argparse.ArgumentTypeError as error:
        raise TSPError(f"{name}: {error}") from error


def _batch_size(wanted: int, cycles: int, images: int) -> int:
    """As wanted, but small enough that the images fill as many batches as the demo is to show."""
    largest = max(1, images // cycles)
    if wanted > largest:
        _say(f"{images} images do not fill {cycles} batches of {wanted}: a batch is {largest}")
    return min(wanted, largest)


def _settings(options: argparse.Namespace, folder: Path, server: LabelStudioServer) -> dict[str, str]:
    """The demo's own settings, unless the environment has others (an empty one is none), and what the demo's options
    say."""
    own = {
        "TSP_VALIDATION_FRACTION": "0.25",
        "TSP_IMAGE_SIZE": str(256 if options.data else PHANTOM_SIZE),
        "TSP_EPOCHS": "10",
        "TSP_MIN_STEPS": "300",
        "TSP_RECONCILE_SECONDS": "15",
    }
    given = {
        "TSP_BATCH_SIZE": options.batch_size,
        "TSP_IMAGE_SIZE": options.image_size,
        "TSP_EPOCHS": options.epochs,
        "TSP_MIN_STEPS": options.min_steps,
    }
    return {
        **own,
        **{name: value for name, value in os.environ.items() if value and re.match("TSP_|LOG_LEVEL$", name)},
        **{name: str(value) for name, value in given.items() if value is not None},
        "LABEL_STUDIO_URL": server.url,
        "LABEL_STUDIO_API_KEY": server.token,
        "MODEL_DIR": str(folder / "backend"),
        "PORT": str(options.backend_port),
    }


def _images(options: argparse.Namespace, folder: Path) -> DemoImages:
    """The folder that was asked for, or CT phantoms: a fresh machine may download nothing."""
    if not options.data:
        phantoms = folder / "phantoms"
        if not (phantoms / "annotations.json").exists():
            _say(f"{PHANTOMS} CT phantoms are drawn ...")
        make_phantoms(phantoms, images=PHANTOMS, size=PHANTOM_SIZE, seed=0)
        return replace(_coco_images("CT phantoms", phantoms), instruction=PHANTOM_INSTRUCTION)
    data = Path(options.data).resolve()
    if not data.is_dir():
        raise TSPError(f"DATA: expected a folder, got {data}")
    if (data / "annotations.json").exists():
        return _coco_images(data.name, data)
    files = sorted(path for path in data.rglob("*") if path.is_file())
    paths = tuple(filter(_is_taken, files))
    if others := [path.name for path in files if not _is_taken(path)]:
        named = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
        _say(f"{len(others)} files are left out, because Label Studio takes {', '.join(IMAGE_SUFFIXES)} only: {named}")
    if not paths:
        raise TSPError(
            f"{data}: expected images ({', '.join(IMAGE_SUFFIXES)}) or a COCO annotations.json, found neither"
        )
    return DemoImages(data.name, paths, tuple(options.labels.split(",")), None)


def _is_taken(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _coco_images(name: str, folder: Path) -> DemoImages:
    truth = read_coco(folder / "annotations.json")
    if others := [image.path.name for image in truth.images if not _is_taken(image.path)]:
        raise TSPError(
            f"{folder}: Label Studio takes {', '.join(IMAGE_SUFFIXES)} only, got {others[0]} and {len(others) - 1} "
            "more: convert them"
        )
    return DemoImages(name, tuple(image.path for image in truth.images), truth.class_names, truth)


def _project(client: LabelStudioClient, images: DemoImages, remembered: Path) -> int:
    """The project of these images: the one of an earlier start, or a new one with all images imported."""
    known: dict[str, Any] = json.loads(remembered.read_text()) if remembered.exists() else {}
    key = f"{images.name} ({len(images.paths)} images)"
    if key not in known:
        if any(other.startswith(f"{images.name} (") for other in known):
            _say(f"the number of images in {images.name} has changed: this is a new project, the earlier one stays")
        project = client.create_project(title=key, label_config=_label_config(images.labels))
        client.update_project(
            project.id,
            sampling=UNCERTAINTY_SAMPLING,
            maximum_annotations=1,
            expert_instruction=images.instruction,
        )
        known[key] = project.id
        remembered.write_text(json.dumps(known))
    project_id = int(known[key])
    done = client.count_tasks(project_id)  # an import that was interrupted goes on
    for start in range(done, len(images.paths), 25):
        client.import_files(project_id, images.paths[start : start + 25])
        _say(f"images are imported: {min(start + 25, len(images.paths))} of {len(images.paths)}")
    return project_id


def _label_config(labels: tuple[str, ...]) -> str:
    lines = "".join(f"<Label value={quoteattr(label)}/>" for label in labels)
    return (
        '<View><Image name="image" value="$image" zoom="true"/>'
        f'<PolygonLabels name="label" toName="image">{lines}</PolygonLabels></View>'
    )


def _explain(
    server: LabelStudioServer,
    backend: BackendProcesses,
    project_id: int,
    options: argparse.Namespace,
    instruction: str,
) -> None:
    if instruction:
        print(f"\n{textwrap.indent(textwrap.fill(instruction, 110), '  ')}")
    print(
        f"""
  Label Studio   {server.url}/projects/{project_id}/data
  log in as      {EMAIL}   password: {PASSWORD}
  dashboard      {backend.url}/ui
  logs           {options.folder}/logs

  Press "Label All Tasks" and label. After every {options.batch_size} images the model trains by itself (watch the
  dashboard); then new tasks open with its polygons, the most uncertain image first, as the Data Manager shows by
  Order by > Prediction score. To train at once: project settings > Model, "..." of the backend, Start Training, and
  confirm. Ctrl-C stops everything and keeps it.
""",
        flush=True,
    )


def _annotate(
    client: LabelStudioClient,
    backend: BackendProcesses,
    project_id: int,
    images: DemoImages,
    options: argparse.Namespace,
) -> None:
    """Label batch after batch, waiting for each cycle, and print what every cycle reached."""
    if images.truth is None:
        return
    oracle = Oracle(client, project_id, images.truth)
    status = _Status(backend, project_id)
    if (finished := status.finished_cycles()) >= options.cycles:
        _say(f"{finished} cycles are finished already: CYCLES={finished + 1} would add one")
    while status.finished_cycles() < options.cycles:
        status.wait_while_busy()
        wanted = options.batch_size - status.newly_annotated()
        for number in range(1, wanted + 1):
            served = oracle.annotate_next()
            if served is None:
                _say("no task is left to annotate")
                return
            trained = served.score is not None and served.model_version != UNTRAINED
            by = f"S {served.score:.3f}" if trained else "drawn at random"
            _say(f"annotated task {served.task_id} ({served.instances} instances, {by}), {number} of {wanted}")
        status.wait_for_cycle(options.batch_size)
    status.print_table()


class _Status:
    """What our backend says of one project."""

    def __init__(self, backend: BackendProcesses, project_id: int) -> None:
        self._backend = backend
        self._project_id = project_id

    def cycles(self) -> list[dict[str, Any]]:
        """The newest first."""
        cycles: list[dict[str, Any]] = self._project().get("cycles", [])
        return cycles

    def newly_annotated(self) -> int:
        """What counts towards the next batch, as the backend has it."""
        return int(self._project().get("new_annotated", 0))

    def _project(self) -> dict[str, Any]:
        self._backend.check()
        projects = httpx.get(f"{self._backend.url}/status", timeout=30).json()["projects"]
        return next((project for project in projects if project["id"] == self._project_id), {})

    def finished_cycles(self) -> int:
        return sum(cycle["status"] in ("done", "refused", "failed") for cycle in self.cycles())

    def wait_for_cycle(self, batch_size: int) -> None:
        """Until one more cycle than now is finished, or the backend has looked and found the batch too small."""
        finished, asked_at = self.finished_cycles(), utc_now()

        def is_over() -> bool:
            project = self._project()
            too_small = project["checked_at"] > asked_at and project["new_annotated"] < batch_size
            return self.finished_cycles() > finished or (too_small and not self._is_busy())

        self._wait(is_over)
        newest = next(iter(self.cycles()), None)
        if newest is not None and newest["status"] == "failed":
            raise TSPError(f"cycle {newest['number']} failed: {newest['error']}")

    def wait_while_busy(self) -> None:
        self._wait(lambda: not self._is_busy())

    def _is_busy(self) -> bool:
        return any(cycle["status"] in UNFINISHED for cycle in self.cycles())

    def _wait(self, is_over: Callable[[], bool]) -> None:
        newest = next(iter(self.cycles()), None)
        told = self._described(newest) if newest and newest["status"] not in UNFINISHED else ""  # that is no news
        while not is_over():
            newest = next(iter(self.cycles()), None)
            if newest and (now := self._described(newest)) != told:
                _say(now)
                told = now
            time.sleep(2)

    def print_table(self) -> None:
        print(f"\n  {'cycle':>5} {'annotated':>10} {'pseudo-labelled':>16} {'mask mAP@0.5':>13} {'mAP@[.5:.95]':>13}")
        for cycle in reversed(self.cycles()):
            facts = cycle["facts"]
            metrics = facts.get("metrics", {})
            if cycle["status"] == "failed":
                print(f"  {cycle['number']:>5} {facts.get('annotated', ''):>10} failed: {cycle['error']}")
                continue
            if cycle["status"] in UNFINISHED:
                print(f"  {cycle['number']:>5} {facts.get('annotated', ''):>10} going on: {cycle['stage']}")
                continue
            print(
                f"  {cycle['number']:>5} {facts.get('annotated', ''):>10} {facts.get('pseudo_labeled', ''):>16} "
                f"{_figure(metrics.get('map_50')):>13} {_figure(metrics.get('map_50_95')):>13}"
            )
        print(flush=True)

    def _described(self, cycle: dict[str, Any]) -> str:
        is_going_on = cycle["total"] and cycle["status"] in UNFINISHED
        share = f", {10 * (10 * cycle['done'] // cycle['total'])} %" if is_going_on else ""
        return f"cycle {cycle['number']}: {cycle['stage']}{share}"


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')}  {text}", flush=True)


def _stop_in_order(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
