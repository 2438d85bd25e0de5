"""Carries out the steps of the Dockerfile without a container engine, in a new folder, and starts what came of it.

python -m scripts.check_dockerfile [--folder FOLDER] [--build-arg NAME=VALUE] [--libraries-from .venv]

Each stage gets a folder that stands for its root: `/data` of the Dockerfile is `<folder>/<stage>/data`, files are
copied as .dockerignore allows, and RUN lines run with this machine's shell and Python. Accounts and owners are the
only steps left out. What a container shuts in (user, capabilities, read-only root) is not checked. Then the web
process and the worker of the image must come up there, without the repository.

With --libraries-from, nothing is downloaded: libraries are looked up in that virtual environment instead, and only
our own wheel is built and installed. Without it, everything is installed anew, which takes minutes and, with CUDA, 6
GB.
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from ml_backend.health import trouble_with
from scripts.label_studio_server import HOST, free_port

ROOT = Path(__file__).resolve().parent.parent
WORKER = ("python", "-m", "ml_backend.worker")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")
_ACCOUNTS = ("groupadd", "useradd")
_START_SECONDS = 180.0


class DockerfileError(Exception):
    """The Dockerfile, or what it makes, does not work."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, such as RUN, its options (`--from=wheel`) and the rest of it."""

    keyword: str
    options: dict[str, str]
    value: str


@dataclass(frozen=True)
class Stage:
    """What stands below a FROM: the stage or image that it goes on from, its name, and its instructions."""

    base: str
    name: str
    instructions: tuple[Instruction, ...]


def read_dockerfile(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """The ARGs before the first FROM with their defaults, and the stages by name. DockerfileError for the unknown."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: list[Instruction] = []
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            words = instruction.value.split()
            if len(words) != 3 or words[1].upper() != "AS":
                raise DockerfileError(f"expected FROM <base> AS <name>, got FROM {instruction.value}")
            current = []
            stages[words[2]] = Stage(words[0], words[2], ())
            name = words[2]
        elif not stages:
            key, _, default = instruction.value.partition("=")
            arguments[key] = default
        else:
            current.append(instruction)
            stages[name] = Stage(stages[name].base, name, tuple(current))
    return arguments, stages


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        keyword, _, rest = line.partition(" ")
        options: dict[str, str] = {}
        while match := re.match(r"--([\w-]+)=(\S+)\s+", rest := rest.lstrip()):
            options[match[1]] = match[2]
            rest = rest[match.end() :]
        found.append(Instruction(keyword.upper(), options, rest))
    return found


def chain(stages: Mapping[str, Stage], target: str) -> list[Stage]:
    """The stages that a target goes on from, the first one first, and itself."""
    if target not in stages:
        raise DockerfileError(f"expected one of the targets {', '.join(stages)}, got {target}")
    below = stages[target].base
    return [*(chain(stages, below) if below in stages else []), stages[target]]


def final(stages: Mapping[str, Stage], target: str, keyword: str) -> str | None:
    """The last word of a target on CMD, HEALTHCHECK, USER or ENTRYPOINT."""
    found = [i.value for stage in chain(stages, target) for i in stage.instructions if i.keyword == keyword]
    return found[-1] if found else None


def environment_of(stages: Mapping[str, Stage], target: str) -> dict[str, str]:
    """The variables that a target's ENV instructions set, as they are written."""
    pairs = (
        pair.partition("=")
        for stage in chain(stages, target)
        for i in stage.instructions
        if i.keyword == "ENV"
        for pair in shlex.split(i.value)
    )
    return {name: value for name, _, value in pairs}


def build_context(root: Path) -> list[Path]:
    """The files that are sent to a build, relative to `root`: those that .dockerignore leaves."""
    rules = [line.strip() for line in (root / ".dockerignore").read_text().splitlines()]
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    tops = {rule.removeprefix("!").split("/")[0] for rule in rules if rule.startswith("!")}
    files = [path for top in tops for path in ([root / top] if (root / top).is_file() else (root / top).rglob("*"))]
    relative = sorted(path.relative_to(root) for path in files if path.is_file())
    return [path for path in relative if not _is_ignored(path, rules)]


def _is_ignored(path: Path, rules: Sequence[str]) -> bool:
    """The last rule that names the file or a folder above it decides."""
    ignored = False
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        places = [path, *path.parents][:-1]
        names = [place.name if "**/" in rule else str(place) for place in places]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            ignored = not rule.startswith("!")
    return ignored


class Build:
    """Carries stages out, each in a folder of its own."""

    def __init__(self, *, folder: Path, build_arguments: Mapping[str, str], libraries: Path | None) -> None:
        self._arguments, self.stages = read_dockerfile((ROOT / "Dockerfile").read_text())
        self._build_arguments = build_arguments
        self._folder, self._libraries = folder, libraries
        self._done: dict[str, dict[str, str]] = {}

    def run(self, target: str) -> dict[str, str]:
        """Carry out a target and what it copies from; returns its environment."""
        if target not in self._done:
            root = self.root(target)
            root.mkdir(parents=True)
            environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | {
                name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))
            }
            arguments: dict[str, str] = {}
            work = root
            for stage in chain(self.stages, target):
                for instruction in stage.instructions:
                    work = self._carry_out(instruction, root, work, environment, arguments)
            self._done[target] = environment
        return self._done[target]

    def root(self, target: str) -> Path:
        """The folder that stands for "/"."""
        return self._folder / target

    def _carry_out(
        self, instruction: Instruction, root: Path, work: Path, environment: dict[str, str], arguments: dict[str, str]
    ) -> Path:
        """One instruction; returns the working folder after it."""
        value = instruction.value
        if instruction.keyword == "ARG":
            name, _, default = value.partition("=")
            arguments[name] = self._build_arguments.get(name, "".join(shlex.split(default)))
        elif instruction.keyword == "ENV":
            for pair in shlex.split(value):
                name, _, text = pair.partition("=")
                environment[name] = _below(root, _expanded(text, environment))
        elif instruction.keyword == "WORKDIR":
            work = root / value.lstrip("/")
            work.mkdir(parents=True, exist_ok=True)
        elif instruction.keyword == "COPY":
            self._copy(instruction, root, work)
        elif instruction.keyword == "RUN":
            self._shell(value, root, work, environment | arguments)
        elif instruction.keyword not in ("USER", "EXPOSE", "HEALTHCHECK", "CMD"):
            raise DockerfileError(f"{instruction.keyword} is not known here: teach scripts/check_dockerfile.py")
        return work

    def _copy(self, instruction: Instruction, root: Path, work: Path) -> None:
        *sources, target = instruction.value.split()
        destination = (root / target.lstrip("/")) if target.startswith("/") else work / target
        print(f"COPY {instruction.value}")
        if stage := instruction.options.get("from"):
            self.run(stage)
            for source in sources:
                shutil.copytree(self.root(stage) / source.lstrip("/"), destination, dirs_exist_ok=True)
            return
        for source in sources:
            files = [path for path in build_context(ROOT) if path == Path(source) or Path(source) in path.parents]
            if not files:
                raise DockerfileError(f"COPY {source}: .dockerignore leaves nothing of it")
            for file in files:
                inside = file.relative_to(source) if file != Path(source) else Path(file.name)
                (destination / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / file, destination / inside)

    def _shell(self, command: str, root: Path, work: Path, environment: dict[str, str]) -> None:
        for part in command.split(" && "):
            text = part.strip()
            if text.startswith(_ACCOUNTS):
                print(f"left out: {text}")
                continue
            if self._libraries is not None and self._is_download(text):
                print(f"left out, libraries are those of {self._libraries}: {text}")
                continue
            if self._libraries is not None and text.startswith("pip wheel"):
                text = f"PYTHONPATH={shlex.quote(str(self._libraries))} {text} --no-build-isolation --no-index"
            text = re.sub(r" --(owner|group)=\S+", "", text)
            text = re.sub(r"(?<![\w./])/(?=opt/venv|data|source|wheel|requirements)", f"{root}/", text)
            print(f"RUN {text}", flush=True)
            done = subprocess.run(["/bin/sh", "-c", text], cwd=work, env=environment, check=False)
            if done.returncode:
                raise DockerfileError(f"RUN {text}: exit code {done.returncode}")
            if self._libraries is not None and text.startswith("python -m venv"):
                packages = next((root / "opt/venv").glob("lib/python*/site-packages"))
                (packages / "libraries.pth").write_text(f"{self._libraries}\n")  # its own .pth files are not read

    def _is_download(self, command: str) -> bool:
        return command.startswith("pip install") and "/wheel/" not in command


def start_both(build: Build, target: str) -> None:
    """Start web process and worker of a target in its folder, Label Studio being away, and ask their health checks."""
    root, environment = build.root(target), dict(build.run(target))
    data, alive = root / "data", root / "alive"
    port = free_port()
    environment |= {
        "TSP_HOST": HOST,
        "PORT": str(port),
        "LABEL_STUDIO_URL": f"http://{HOST}:1",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "BASIC_AUTH_USER": "label-studio",
        "BASIC_AUTH_PASS": "check",
        "TSP_ALIVE_FILE": str(alive),
    }
    command = json.loads(str(final(build.stages, target, "CMD")))
    print(f"start {shlex.join(command)} and {shlex.join(WORKER)}", flush=True)
    processes = [
        subprocess.Popen([shutil.which(program, path=environment["PATH"]) or program, *rest], env=environment, cwd=data)
        for program, *rest in (command, WORKER)
    ]
    try:
        _wait_until_both_are_well(processes, f"http://{HOST}:{port}/health", str(alive))
        page = httpx.get(f"http://{HOST}:{port}/ui", auth=("label-studio", "check"), timeout=30)
        if page.status_code != 200 or "TSP active learning" not in page.text:
            raise DockerfileError(f"/ui: expected the dashboard, got {page.status_code}")
        place = subprocess.check_output(
            ["python", "-c", "import ml_backend; print(ml_backend.__file__)"], env=environment, cwd=data, text=True
        )
        if not place.startswith(str(root)):
            raise DockerfileError(f"ml_backend: expected the installed one below {root}, got {place.strip()}")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


def _wait_until_both_are_well(processes: Sequence[subprocess.Popen[bytes]], *checks: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while troubles := list(filter(None, map(trouble_with, checks))):
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            raise DockerfileError(f"web process and worker: expected both to come up, got {'; '.join(troubles)}")
        time.sleep(0.5)


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: environment.get(match[1] or match[2], match[3] or ""), text)


def _below(root: Path, text: str) -> str:
    """A path of the Dockerfile, or several with ":" between, below the folder that stands for "/"."""
    places = ("/opt/venv", "/data")
    return ":".join(f"{root}{part}" if part.startswith(places) else part for part in text.split(":"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--target", default="backend", help="stage of the Dockerfile")
    parser.add_argument(
        "--folder", type=Path, help="a new folder to work in; default: a temporary one, removed afterwards"
    )
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    parser.add_argument(
        "--libraries-from", type=Path, metavar="VENV", help="download nothing, take libraries from there"
    )
    return parser.parse_args()


def main() -> None:
    options = _options()
    libraries = None
    if options.libraries_from is not None:
        libraries = next(options.libraries_from.resolve().glob("lib/python*/site-packages"), None)
        if libraries is None:
            sys.exit(f"--libraries-from: expected a virtual environment, got {options.libraries_from}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dockerfile-"))
    try:
        build = Build(
            folder=folder.resolve(),
            build_arguments=dict(pair.split("=", 1) for pair in options.build_arg),
            libraries=libraries,
        )
        start_both(build, options.target)
    except DockerfileError as error:
        sys.exit(str(error))
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print(f"The target {options.target} works: its web process and its worker came up.")


if __name__ == "__main__":
    main()
