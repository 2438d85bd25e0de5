"""When a cycle starts; pure."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A project at one moment. `new` counts the annotated tasks that no earlier cycle has used."""

    annotated: int
    new: int
    batch_size: int
    running: bool  # a cycle is planned or running
    requested: bool  # somebody pressed "Start training"
    try_again_at: str = ""  # in words; before, no cycle starts by itself: the last ones failed before their snapshot


@dataclass(frozen=True)
class Decision:
    """Whether to start a cycle now, and why (not), in words for people; `is_problem`: they have to know them."""

    start: bool
    reason: str
    is_problem: bool = False


NOTHING_ANNOTATED = "training was asked for, but no image is annotated yet"


def plan(situation: Situation) -> Decision:
    """A cycle starts when b new images are annotated, or at once when somebody asks; never two at a time, and not at
    once after one that failed before it had read them."""
    if situation.running:
        return Decision(False, "a cycle is running")
    is_full = situation.new >= situation.batch_size
    if is_full and (situation.requested or not situation.try_again_at):
        return Decision(True, f"{situation.new} newly annotated images (a batch is {situation.batch_size})")
    if situation.requested and situation.annotated > 0:
        return Decision(True, f"asked for, with {situation.new} newly annotated images")
    if situation.requested:
        return Decision(False, NOTHING_ANNOTATED, is_problem=True)
    if is_full:
        reason = (
            "the last cycle failed before it had read the annotations. The next one starts at "
            f"{situation.try_again_at}, or at once when somebody presses Start Training in Label Studio."
        )
        return Decision(False, reason, is_problem=True)
    return Decision(False, f"{situation.new} of {situation.batch_size} images of the next batch are annotated")
