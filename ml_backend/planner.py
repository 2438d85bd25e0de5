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


@dataclass(frozen=True)
class Decision:
    """Whether to start a cycle now, and why (not), in words for people."""

    start: bool
    reason: str


def plan(situation: Situation) -> Decision:
    """A cycle starts when b new images are annotated, or at once when somebody asks; never two at a time."""
    if situation.running:
        return Decision(False, "a cycle is running")
    if situation.new >= situation.batch_size:
        return Decision(True, f"{situation.new} newly annotated images (a batch is {situation.batch_size})")
    if situation.requested and situation.annotated > 0:
        return Decision(True, f"asked for, with {situation.new} newly annotated images")
    if situation.requested:
        return Decision(False, "training was asked for, but no image is annotated yet")
    return Decision(False, f"{situation.new} of {situation.batch_size} images of the next batch are annotated")
