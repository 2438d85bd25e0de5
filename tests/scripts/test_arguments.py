"""What commands take, and that each says so in its --help."""

import argparse
import importlib
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.arguments import folder_to_write, from_0_to_1

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for package in ("scripts", "ml_backend", "model")
    for file in sorted((ROOT / package).rglob("*.py"))
    if "ArgumentParser(" in (text := file.read_text()) and '__name__ == "__main__"' in text
]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for group in subcommands(parser):
        for command in group.choices.values():
            yield from parsers(command)


def subcommands(parser: argparse.ArgumentParser) -> list[argparse._SubParsersAction]:
    return [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]


def without_help(parser: argparse.ArgumentParser) -> set[str]:
    """Arguments and subcommands."""
    groups = subcommands(parser)
    described = {action.dest for group in groups for action in group._choices_actions if action.help}
    commands = {name for group in groups for name in group.choices}
    return {
        action.dest for action in parser._actions if action not in groups and not action.help
    } | commands - described


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_what_each_argument_is(command, monkeypatch):
    seen = []

    def stop(parser, *arguments):
        seen.append(parser)
        sys.exit()

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [command])
    with pytest.raises(SystemExit):
        importlib.import_module(command).main()
    (top,) = seen
    assert top.description
    for parser in parsers(top):
        said = parser.format_help()  # an error where a text has a lone %
        assert "None" not in said
        assert without_help(parser) == set()


def test_the_commands_are_found():
    assert {"scripts.benchmark", "scripts.bench", "scripts.show_examples"} <= set(COMMANDS)


@pytest.mark.parametrize("text", ["new", "new/below", "there"])
def test_a_folder_to_write_may_be_there_or_not(tmp_path, text):
    (tmp_path / "there").mkdir()
    assert folder_to_write(str(tmp_path / text)) == tmp_path / text


@pytest.mark.parametrize("below", [".", "runs/of/it"])
def test_a_folder_to_write_that_is_a_file_or_below_one_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / below)
    with pytest.raises(ArgumentTypeError, match=rf"expected a folder, got '{path}', where .*file is a file"):
        folder_to_write(path)


@pytest.mark.parametrize("text", ["0", "0.2", "1"])
def test_a_share_is_read(text):
    assert from_0_to_1(text) == float(text)


@pytest.mark.parametrize("text", ["-0.1", "1.5", "nan", "inf", "half", ""])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ArgumentTypeError, match=rf"expected a number from 0 to 1, got '{text}'"):
        from_0_to_1(text)
