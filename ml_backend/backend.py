"""`TSPBackend`: this service as a class of label-studio-ml, for tools that expect one.

It runs under label-studio-ml 1.0.9, the newest release on PyPI, and under the signature of the 2.x line. Our own web
process (app.py) answers the same without it, for label-studio-ml brings torch, and its Flask server is not used
(docs/decisions/002, 070).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from label_studio_ml.model import LabelStudioMLBase

from ml_backend import inbox
from ml_backend.inbox import ProjectName
from ml_backend.ls_format import Json
from ml_backend.predictor import Predictor
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.errors import InvalidInputError


class TSPBackend(LabelStudioMLBase):
    """Predicts with the active version of a project; training happens in the worker, `fit` only asks for it.

    `project_id` is the name that Label Studio gives a project: "<id>.<unix time of its creation>". 1.0.9 does not say
    which project it is about, except in the events that `fit` is given.
    """

    def __init__(
        self,
        project_id: str | None = None,
        label_config: str | None = None,
        *,
        service: Service | None = None,
        predictor: Predictor | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.label_config = label_config  # past label-studio-ml, which would parse it too and raise errors of its own
        self.project_id = project_id
        self._service = service or Service.connect(Settings.from_environment())
        self._predictor = predictor or Predictor(self._service)

    def predict(
        self, tasks: Sequence[Mapping[str, Any]], context: Mapping[str, Any] | None = None, **others: Any
    ) -> list[Json]:
        """One prediction (result, score, model_version) for each task; empty ones before the first cycle."""
        return self._predictor.predict(self._project().key, tasks, self.label_config or "")

    def fit(
        self, *arguments: Any, event: str | None = None, data: Mapping[str, Any] | None = None, **others: Any
    ) -> dict[str, Any]:
        """Record the event and return: Label Studio waits one second. The worker decides whether to train.

        2.x calls `fit(event, data)`; 1.0.9 calls `fit((), event=..., data=...)`, () being the tasks.
        """
        action = event or next((argument for argument in arguments if isinstance(argument, str)), "ANNOTATION_UPDATED")
        payload = data or next((argument for argument in arguments if isinstance(argument, Mapping)), {})
        name = ProjectName.from_webhook(payload.get("project")) or self._project()
        inbox.remember_project(self._service.database, name)
        inbox.record(self._service.database, name.key, action)
        return {}

    def setup(self) -> Json:
        """The version that `predict` uses."""
        return {"model_version": self._predictor.version(self._project().key)}

    def _project(self) -> ProjectName:
        name = ProjectName.from_uid(self.project_id)
        if name is None:
            raise InvalidInputError(
                f"project_id: expected '<id>.<unix time of creation>' as Label Studio sends it, got {self.project_id!r}"
            )
        return name
