"""What a benchmark's runs share, and the lines of its figure: a strategy, perhaps with SSL and options of its own.

A line is written `strategy[+recipe][@name=value...]`, such as "tsp+ssl@beta=0.05" or "tsp@first=spread@epochs=20".
With a recipe it also learns from pseudo labels: `+ssl` by the profile's settings, any other by the options that it
stands for.
"""

import re
import types
import typing
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from model.config import PseudoLabelConfig, TrainingConfig
from model.empty_images import EmptyImagePolicy
from model.strategies import STRATEGIES, Strategy

FULL = "full"  # not a strategy: everything is annotated at once, the line that the others are measured against

# Ways to learn from pseudo labels, by the options that they stand for.
RECIPES: dict[str, dict[str, str]] = {
    "ssl": {},
    "ssl_by_precision": {
        "beta": "0.5",
        "pseudo_every_steps": "2",
        "pseudo_negatives": "outside_ignored",
        "rule": "precision",
        "soft_weights": "true",
    },
}

FirstBatch = Literal["random", "spread"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How images are chosen: the first batch, which detections count, and where images without any stand."""

    first: FirstBatch = "random"  # or "spread": far from each other for the pretrained body
    queue_threshold: float = 0.2  # class score from which a detection counts in an image's score (decision 005)
    empty_policy: str = EmptyImagePolicy.MEDIAN.value
    candidates: int = 4  # of the hybrid strategy: that many times the batch are the uncertain ones

    def __post_init__(self) -> None:
        if self.first not in typing.get_args(FirstBatch):
            raise ValueError(f"first: expected 'random' or 'spread', got {self.first!r}")
        if not 0 <= self.queue_threshold <= 1:
            raise ValueError(f"queue_threshold: expected 0 to 1, got {self.queue_threshold}")
        if self.empty_policy not in [policy.value for policy in EmptyImagePolicy]:
            raise ValueError(f"empty_policy: expected {', '.join(EmptyImagePolicy)}, got {self.empty_policy!r}")
        if self.candidates < 1:
            raise ValueError(f"candidates: expected at least 1, got {self.candidates}")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all runs on a set share; a line's options override the training, the pseudo labels and the selection."""

    profile: str
    weights: str
    network: dict[str, Any]
    training: TrainingConfig
    pseudo: PseudoLabelConfig = field(default_factory=PseudoLabelConfig)
    selection: Selection = field(default_factory=Selection)
    first_batch: int
    batch: int
    cycles: int


@dataclass(frozen=True, kw_only=True)
class RunName:
    """One line of the figure at one seed; `options` as they are written, and those of its recipe, by name."""

    strategy: str
    semi_supervised: bool = False
    options: tuple[tuple[str, str], ...] = ()
    seed: int

    @property
    def line(self) -> str:
        recipe, own = self._recipe() if self.semi_supervised else ("", self.options)
        return self.strategy + f"+{recipe}" * bool(recipe) + "".join(f"@{name}={value}" for name, value in own)

    def _recipe(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Of the recipes whose options are all set here, to whatever values, the one that leaves the fewest options to
        be written, and these options."""
        names = {option for option, _ in self.options}
        left = {
            recipe: tuple(pair for pair in self.options if pair not in standing_for.items())
            for recipe, standing_for in RECIPES.items()
            if standing_for.keys() <= names
        }
        recipe = min(left, key=lambda name: len(left[name]))
        return recipe, left[recipe]

    @property
    def folder(self) -> str:
        return f"{self.line}-seed{self.seed}"


def parse_line(line: str, seed: int) -> RunName:
    """The run of a line at a seed. Raises ValueError, which says what there is, for a line that does not exist."""
    head, *written = line.split("@")
    strategy, plus, recipe = head.partition("+")
    if strategy not in {*STRATEGIES, FULL} or (plus and (recipe not in RECIPES or strategy == FULL)):
        known, ways = ", ".join(STRATEGIES), " or ".join(f"+{name}" for name in RECIPES)
        raise ValueError(f"expected {known}, with or without {ways}, or {FULL}, got {line!r}")
    pairs = [text.partition("=")[::2] for text in written]
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"{line!r} gives an option twice")
    options = tuple(sorted((RECIPES.get(recipe, {}) | dict(pairs)).items()))
    name = RunName(strategy=strategy, semi_supervised=bool(plus), options=options, seed=seed)
    try:
        _overrides(name)
    except ValueError as error:
        raise ValueError(f"{line!r}: {error}") from error
    return name


def settings_of(name: RunName, experiment: Experiment) -> Experiment:
    """The experiment with the line's own options and the run's seed."""
    overrides = _overrides(name)
    return replace(
        experiment,
        training=replace(experiment.training, seed=name.seed, **overrides[TrainingConfig]),
        pseudo=replace(experiment.pseudo, **overrides[PseudoLabelConfig]),
        selection=replace(experiment.selection, **overrides[Selection]),
    )


def strategy_of(name: RunName, selection: Selection) -> Strategy:
    """The strategy of a line, with as many candidates as the line says."""
    strategy = STRATEGIES[name.strategy]
    if hasattr(strategy, "candidates"):
        strategy = copy(strategy)
        strategy.candidates = selection.candidates
    return strategy


def supervised_twin(name: RunName) -> RunName:
    """The same line without pseudo labels and what is said about them."""
    options = tuple((option, value) for option, value in name.options if option not in _about_pseudo_labels())
    return replace(name, semi_supervised=False, options=options)


def random_alike(line: str) -> str:
    """The line with the same recipe and options whose images are chosen at random."""
    return "random" + re.sub("^[^+@]*", "", line)


def changed_from(line: str) -> str | None:
    """The line that this one changes in one way: without its options, or TSP with all three scores; None for others."""
    head, _, options = line.partition("@")
    if options:
        return head
    return re.sub("^tsp_without_[^+]*", "tsp", line) if line.startswith("tsp_without_") else None


def supervised_settings(settings: Experiment) -> dict[str, Any]:
    """What decides how a cycle without pseudo labels is trained, besides its images."""
    training = asdict(without_semi_supervision(settings.training))
    return {"profile": settings.profile, "weights": settings.weights, "network": settings.network, "training": training}


def without_semi_supervision(training: TrainingConfig) -> TrainingConfig:
    """The same for annotated images, with everything that concerns only pseudo-labelled ones at its default."""
    defaults: dict[str, Any] = {f.name: f.default for f in fields(TrainingConfig) if f.name in _semi_supervised_only()}
    return replace(training, **defaults)


def _about_pseudo_labels() -> set[str]:
    """Options that change nothing where there are no pseudo labels."""
    return (set(_types(PseudoLabelConfig)) | _semi_supervised_only()) - {"score_threshold"}  # found for each network


def _semi_supervised_only() -> set[str]:
    """Settings of the training that concern only pseudo-labelled images."""
    known = {"beta", "ramp_up", "soft_weights", "ema_burn_in"}
    return {name for name in _types(TrainingConfig) if name in known or name.startswith("pseudo_")}


def _overrides(name: RunName) -> dict[type[Any], dict[str, Any]]:
    """The options by the class whose fields they are, read and checked."""
    owners = {
        field_name: owner
        for owner in (TrainingConfig, PseudoLabelConfig, Selection)
        for field_name in _types(owner)
        if field_name not in _forbidden(name)
    }
    result: dict[type[Any], dict[str, Any]] = {TrainingConfig: {}, PseudoLabelConfig: {}, Selection: {}}
    for option, text in name.options:
        if option not in owners:
            hint = "; with +ssl there is" if option in _about_pseudo_labels() and name.strategy != FULL else ""
            raise ValueError(
                f"there is no option {option!r} for {name.strategy}{hint}; there are {', '.join(sorted(owners))}"
            )
        owner = owners[option]
        result[owner][option] = _read(option, text, _types(owner)[option])
    for checked, values in result.items():
        checked(**values)  # raises for values that it does not take
    return result


def _forbidden(name: RunName) -> set[str]:
    """Options that would change nothing on this line, or what belongs to the run."""
    forbidden = {"seed", "checkpoint_every_steps", "loader_workers", "score_threshold"}  # the last one is found
    if name.strategy == FULL:
        forbidden |= set(_types(Selection))
    if not name.semi_supervised:
        forbidden |= _about_pseudo_labels()
    if not hasattr(STRATEGIES.get(name.strategy), "candidates"):
        forbidden.add("candidates")
    return forbidden


def _types(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _read(option: str, text: str, kind: Any) -> Any:
    """The value of a field's type. None is written "none", and several numbers as 45-49."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is types.UnionType:
            if text == "none":
                return None
            return _read(option, text, arguments[0])
        if origin is Literal:
            if text not in arguments:
                raise ValueError
            return text
        if origin is tuple:
            return tuple(arguments[0](part) for part in text.split("-"))
        if kind is bool:
            return {"true": True, "false": False}[text]
        return kind(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{option}: expected {_described(kind)}, got {text!r}") from error


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "numbers with '-' between them"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a value or none")
