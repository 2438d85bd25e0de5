"""What Label Studio's API tells of projects, tasks, backends and webhooks, as far as we look at it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Project:
    """`model_version` is "" when none is chosen. `task_count` and `prediction_count` are Label Studio's own counters.

    There is no counter of annotated tasks here: Label Studio's leaves imported (ground truth) annotations out;
    ask `count_annotated_tasks`.
    """

    id: int
    title: str
    label_config: str
    model_version: str
    sampling: str
    maximum_annotations: int
    shows_predictions: bool
    created_at: datetime
    task_count: int
    annotation_count: int
    prediction_count: int

    @property
    def uid(self) -> str:
        """The name under which Label Studio presents the project to a backend: "<id>.<unix time of its creation>"."""
        return f"{self.id}.{int(self.created_at.timestamp())}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task without its annotations; `data` as it was imported (cloud addresses are not resolved).

    `annotation_count` leaves skipped annotations and drafts out; `updated_at` moves with every annotation that is
    created, changed or deleted.
    """

    id: int
    data: dict[str, Any]
    annotation_count: int
    skip_count: int
    updated_at: datetime

    @property
    def is_annotated(self) -> bool:
        """At least one annotation that is neither skipped nor a draft."""
        return self.annotation_count > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedTask:
    """A task with `annotations` that are neither skipped nor drafts, at least one; `updated_at` moves with each of
    them."""

    id: int
    updated_at: datetime
    annotations: int


@dataclass(frozen=True, kw_only=True)
class MLBackend:
    """A connected backend. `state`: "CO" connected, "DI" disconnected, "ER" error, "TR" training, "PR" predicting."""

    id: int
    url: str
    title: str
    state: str
    error_message: str
    model_version: str
    basic_auth_user: str = ""


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """A project's webhook. Its headers are left out on purpose: they hold the shared secret."""

    id: int
    url: str
    is_active: bool
    sends_all_actions: bool
    actions: tuple[str, ...]


def project_of(answer: Any) -> Project:
    """From label-studio-sdk's answer, which has None where Label Studio has nothing."""
    return Project(
        id=answer.id,
        title=answer.title or "",
        label_config=answer.label_config or "",
        model_version=answer.model_version or "",
        sampling=answer.sampling or "",
        maximum_annotations=answer.maximum_annotations or 1,
        shows_predictions=bool(answer.show_collab_predictions),
        created_at=answer.created_at,
        task_count=answer.task_number or 0,
        annotation_count=answer.total_annotations_number or 0,
        prediction_count=answer.total_predictions_number or 0,
    )


def ml_backend_of(answer: Any) -> MLBackend:
    """From label-studio-sdk's answer."""
    return MLBackend(
        id=answer.id,
        url=answer.url,
        title=answer.title or "",
        state=answer.state or "",
        error_message=answer.error_message or "",
        model_version=answer.model_version or "",
        basic_auth_user=answer.basic_auth_user or "",
    )


def webhook_of(answer: Any) -> Webhook:
    """From label-studio-sdk's answer."""
    return Webhook(
        id=answer.id,
        url=answer.url,
        is_active=bool(answer.is_active),
        sends_all_actions=bool(answer.send_for_all_actions),
        actions=tuple(answer.actions or ()),
    )
