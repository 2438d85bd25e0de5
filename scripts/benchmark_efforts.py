"""The profiles of the benchmark: the paper's own settings, and what fits a CPU."""

from dataclasses import dataclass

from model.config import TrainingConfig
from scripts.benchmark_lines import Experiment


@dataclass(frozen=True, kw_only=True)
class Effort:
    """A profile: the experiment, how much of a set it uses, and its defaults."""

    experiment: Experiment
    pool: int | None = None
    test: int | None = None


EFFORTS = {
    # The paper's own settings (section 4.2); wants GPUs. It says neither where the weights come from, nor how many
    # images a step has; its images are 512 x 512 and 512 x 1024. Anchors fit the pool, as with every profile.
    "paper": Effort(
        experiment=Experiment(
            profile="resnet50_fpn",
            weights="coco",
            network={"min_size": 512, "max_size": 1024, "detections_per_image": 100},
            training=TrainingConfig(batch_size=8, loader_workers=2),
            first_batch=500,
            batch=500,
            cycles=6,
        )
    ),
    # The paper's proportions: a batch is a sixth of what is annotated for full supervision. Every cycle trains for 1000
    # steps, whatever it has: what more images bring must not come from more training. A run takes about ten minutes on
    # one core at 128 px: eight lines, three seeds fit into three hours on two.
    "cpu": Effort(
        experiment=Experiment(
            profile="efficientnet_lite0_fpn",
            weights="imagenet",
            network={"min_size": 160, "max_size": 256, "detections_per_image": 30},
            # What pseudo-labelled images cost in each eighth step, and in more, is in docs/benchmark.md.
            training=TrainingConfig.for_cpu(epochs=6, min_steps=1000, checkpoint_every_steps=100, pseudo_every_steps=8),
            first_batch=50,
            batch=50,
            cycles=5,
        ),
        pool=300,
        test=120,
    ),
}
