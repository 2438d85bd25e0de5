"""A mean teacher: the moving average of the student's weights, which labels unlabelled images while the student learns.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017; for detectors Liu et al., "Unbiased
Teacher", ICLR 2021.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import PseudoLabelConfig, TrainingConfig
from model.dataset import training_target, used_fields
from model.network import MaskRCNNWithScores
from model.predict import detections_of, outputs_in_memory
from model.pseudo_labels import image_with_trusted
from model.types import FloatArray


class Teacher:
    """The average of a student's weights and buffers, in `network`, a copy of the student that is never trained."""

    def __init__(self, student: MaskRCNNWithScores, decay: float) -> None:
        self.network = copy.deepcopy(student).requires_grad_(False).eval()
        self._decay = decay
        self._pairs = list(zip(self.network.state_dict().values(), student.state_dict().values(), strict=True))

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the student after `step` steps, `t += (1 - d) (s - t)`.

        The first steps have a smaller decay, (1 + step) / (10 + step): the random start should not stay in the average.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        for mine, students in self._pairs:
            if mine.is_floating_point():
                mine.lerp_(students, 1 - decay)
            else:
                mine.copy_(students)

    def targets(
        self,
        images: Sequence[Tensor],
        training: TrainingConfig,
        pseudo: PseudoLabelConfig,
        *,
        class_thresholds: FloatArray | None = None,
    ) -> list[dict[str, Any]]:
        """The targets, perhaps without instances, that the teacher gives images (3, H, W) of the network's input size.

        Filtered as any pseudo labels (section 3.2), with the weights and ignored boxes that `training` uses. Images
        that do not fit into memory together are looked at in smaller groups.
        """
        if not images:
            return []
        outputs = outputs_in_memory(self.network, list(images))
        return [
            self._target(output, (image.shape[1], image.shape[2]), training, pseudo, class_thresholds)
            for output, image in zip(outputs, images, strict=True)
        ]

    def _target(
        self,
        output: dict[str, Tensor],
        hw: tuple[int, int],
        training: TrainingConfig,
        pseudo: PseudoLabelConfig,
        class_thresholds: FloatArray | None,
    ) -> dict[str, Any]:
        labeled = image_with_trusted(
            detections_of(output, input_hw=hw, image_hw=hw),
            pseudo,
            image_id="teacher",  # a view in memory, of no file
            path=Path(),
            mask_threshold=self.network.config.mask_threshold,
            class_thresholds=class_thresholds,
        )
        return training_target(used_fields(labeled, training), hw, flip=False)
