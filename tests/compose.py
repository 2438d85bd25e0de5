"""Reads docker-compose.yml as Docker Compose does, for want of Docker: merges, variables, defaults and refusals.

https://docs.docker.com/reference/compose-file/interpolation/
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parent.parent
_NAME = re.compile(r"[A-Za-z_]\w*")
_OPERATORS = (":-", ":?", ":+", "-", "?", "+")


class ComposeError(Exception):
    """Compose would refuse to start, with this message."""


def load_compose(environment: Mapping[str, str], *names: str) -> dict[str, Any]:
    """The files of the project's folder (docker-compose.yml by default), later ones laid over earlier ones."""
    whole: dict[str, Any] = {}
    for name in names or ("docker-compose.yml",):
        whole = _overlaid(whole, _resolved(yaml.safe_load((ROOT / name).read_text()), environment))
    return {key: value for key, value in whole.items() if not key.startswith("x-")}


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of an .env file; those without a value are empty."""
    return {name: value or "" for name, value in dotenv_values(path, interpolate=False).items()}


def interpolate(text: str, environment: Mapping[str, str]) -> str:
    """A text with its variables replaced; ComposeError where one is required and missing."""
    result, position = "", 0
    while (dollar := text.find("$", position)) >= 0:
        result += text[position:dollar]
        value, position = _variable(text, dollar + 1, environment)
        result += value
    return result + text[position:]


def _variable(text: str, start: int, environment: Mapping[str, str]) -> tuple[str, int]:
    """The value of the variable whose "$" stands before `start`, and where the text goes on."""
    if text[start : start + 1] == "$":
        return "$", start + 1
    braced = text[start : start + 1] == "{"
    match = _NAME.match(text, start + braced)
    if match is None:
        raise ComposeError(f"invalid interpolation format: {text!r}")
    name, end = match[0], match.end()
    if not braced:
        return environment.get(name, ""), end
    close = _closing_brace(text, end)
    rest = text[end:close]
    operator = next((o for o in _OPERATORS if rest.startswith(o)), "")
    if rest and not operator:
        raise ComposeError(f"invalid interpolation format: {text!r}")
    return _value(name, operator, rest[len(operator) :], environment), close + 1


def _value(name: str, operator: str, operand: str, environment: Mapping[str, str]) -> str:
    given = environment.get(name)
    there = bool(given) if operator.startswith(":") else given is not None
    if operator.endswith("+"):
        return interpolate(operand, environment) if there else ""
    if there or not operator:
        return given or ""
    if operator.endswith("?"):
        raise ComposeError(f"required variable {name} is missing a value: {interpolate(operand, environment)}")
    return interpolate(operand, environment)


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for position in range(start, len(text)):
        depth += text.startswith("${", position) - (text[position] == "}")
        if depth == 0:
            return position
    raise ComposeError(f"invalid interpolation format: {text!r}")


def _resolved(node: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _resolved(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolved(value, environment) for value in node]
    return interpolate(node, environment) if isinstance(node, str) else node


def _overlaid(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _overlaid(below.get(key), value) for key, value in above.items()}}
    return above
