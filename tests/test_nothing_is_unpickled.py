"""No module of ours calls anything that could run code out of a file: read from the syntax of every source file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for room in ("model", "ml_backend", "scripts") for path in (ROOT / room).rglob("*.py"))

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "klepto",
    "hickle", "torch.hub", "torch.package", "torch.jit", "tensorflow",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "read_pickle", "load_state_dict_from_url", "load_url", "unsafe_load", "full_load",
    "load_all", "fromfile", "memmap",
}  # fmt: skip
ONLY_WITH = {"torch.load": ("weights_only", True), "source.get_state_dict": ("weights_only", True)}
NEVER_WITH = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True, "shell": True}


def problems(source: str) -> Iterator[str]:
    names: dict[str, str] = {}  # as used -> as it is called
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            imported = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in imported if any(f"{name}.".startswith(f"{bad}.") for bad in FORBIDDEN_MODULES))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield from _problems_of_call(node, names)


def _problems_of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    first, dot, rest = ast.unparse(node.func).partition(".")
    called = names.get(first, first) + dot + rest
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if called.rpartition(".")[2] in FORBIDDEN_CALLS and not called.endswith(".eval"):  # a network's eval() is a mode
        yield called
    if called.rpartition(".")[0] == "yaml" and called != "yaml.safe_load" and "load" in called:
        yield called
    if called.startswith(("torch.jit.", "torch.hub.", "torch.package.")):
        yield called
    if called in ONLY_WITH:
        argument, value = ONLY_WITH[called]
        if not _is(given.get(argument), value):
            yield f"{called} without {argument}={value}"
    yield from (f"{called}({arg}={value})" for arg, value in NEVER_WITH.items() if _is(given.get(arg), value))
    if None in given and called in ("numpy.load", "torch.load"):
        yield f"{called} with arguments that cannot be read here"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_source_file_can_run_code_out_of_a_file(path: Path) -> None:
    assert list(problems(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "from joblib import load",
        "import torch.hub", "from torch import hub", "import torch\ntorch.load('a')",
        "import torch as t\nt.load('a', weights_only=False)",
        "from torch import load\nload('a')", "import torch\ntorch.load('a', weights_only=flag)",
        "import numpy as np\nnp.load('a', allow_pickle=True)", "import numpy as np\nnp.load('a', **options)",
        "import yaml\nyaml.load('a')", "from yaml import load as read\nread('a')", "import torch\ntorch.jit.load('a')",
        "eval('1')", "import pandas as pd\npd.read_pickle('a')", "import subprocess\nsubprocess.run('a', shell=True)",
        "source.get_state_dict(check_hash=True)",
    ],
)  # fmt: skip
def test_what_could_run_code_is_found(source: str) -> None:
    assert list(problems(source))


@pytest.mark.parametrize(
    "source",
    ["import torch\ntorch.load('a', weights_only=True)", "network.eval()", "import numpy as np\nnp.load('a')",
     "import yaml\nyaml.safe_load('a')", "import json\njson.load(file)"],
)  # fmt: skip
def test_what_cannot_is_left_alone(source: str) -> None:
    assert list(problems(source)) == []


def test_all_source_files_are_looked_at() -> None:
    assert len(SOURCES) > 60
