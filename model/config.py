"""Every knob of the learning core, frozen; the paper's values are the defaults where the paper gives one."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from model.errors import InvalidInputError

Profile = Literal["resnet50_fpn", "resnet18_fpn", "efficientnet_lite0_fpn"]
PROFILES: tuple[str, ...] = get_args(Profile)

# The names of `model.strategies.STRATEGIES`, for those who need no network to check one.
STRATEGY_NAMES: tuple[str, ...] = (
    "random",
    "mc_dropout",
    "core_set",
    "class_entropy",
    "learning_loss",
    "tsp",
    "tsp_without_box",
    "tsp_without_box_and_mask",
    "tsp_expected",
    "tsp_present",
    "hybrid",
)

# To tell versions apart. With fewer a bootstrap is too sure of itself: of equally good versions it calls 8 % worse
# where 5 % are meant.
FEWEST_IMAGES = 10


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network. Sizes are pixels at the network's input; `num_classes` counts the background, as in torchvision."""

    profile: str
    num_classes: int
    min_size: int = 800  # the shorter side is scaled to this ...
    max_size: int = 1333  # ... unless the longer one would exceed this
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)  # one for each pyramid level
    fpn_channels: int = 256
    box_head_width: int = 1024
    mask_head_widths: tuple[int, ...] = (256, 256, 256, 256)
    proposals_training: int = 2000
    proposals_inference: int = 1000
    rois_per_image: int = 512
    trainable_stages: int = 3  # of a pretrained body, counted from its top
    frozen_batch_norm: bool = False  # set for a pretrained body: its statistics are not estimated from tiny batches
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100
    mask_threshold: float = 0.3  # section 3.1; the same for targets, evaluation and the polygons people see
    dropout: float = 0.0  # in the box and mask heads; MC dropout needs some
    learning_loss: bool = False  # an auxiliary module predicts each image's loss

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise InvalidInputError(f"profile: expected one of {', '.join(PROFILES)}, got {self.profile!r}")
        if self.num_classes < 2:
            raise InvalidInputError(
                f"num_classes: expected at least 2 (background and one class), got {self.num_classes}"
            )
        if len(self.anchor_sizes) != 5:
            raise InvalidInputError(f"anchor_sizes: expected 5, one for each pyramid level, got {self.anchor_sizes}")
        if not 0 < self.min_size <= self.max_size:
            raise InvalidInputError(f"expected 0 < min_size <= max_size, got {self.min_size} and {self.max_size}")

    @classmethod
    def for_profile(cls, profile: str, num_classes: int, **options: Any) -> Self:
        """The profile's own defaults, overridden by `options` (field names of this class)."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise InvalidInputError(f"unknown network options {unknown}; there are {sorted(known)}")
        return cls(profile=profile, num_classes=num_classes, **{**_PROFILE_DEFAULTS.get(profile, {}), **options})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` gives an equal config."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, card: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        lists_as_tuples: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in card.items()
        }
        return cls(**lists_as_tuples)


_PROFILE_DEFAULTS: dict[str, dict[str, Any]] = {
    "resnet50_fpn": {},
    "resnet18_fpn": {"min_size": 512, "max_size": 1024},
    # Sized for CPUs: the body stays as ImageNet left it, the heads are slim. Measured in docs/figures.md.
    "efficientnet_lite0_fpn": {
        "min_size": 256,
        "max_size": 512,
        "anchor_sizes": (16, 32, 64, 128, 256),
        "fpn_channels": 64,
        "box_head_width": 256,
        "mask_head_widths": (64, 64),
        "proposals_training": 500,
        "proposals_inference": 200,
        "rois_per_image": 64,
        "trainable_stages": 0,
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run (section 4.2 of the paper). An epoch is one pass over the annotated images."""

    epochs: int = 50
    min_steps: int = 0  # a small set gets more epochs, until it has so many steps; schedules stretch with them
    batch_size: int = 2
    pseudo_batch_size: int = 1  # pseudo-labelled images added to a step while there are any ...
    pseudo_every_steps: int = 1  # ... every so many steps; they count that many times, so that eq. 5 holds on average
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["step", "one_cycle"] = "step"
    learning_rate: float = 0.001
    milestones: tuple[int, ...] = (45, 49)  # epochs after which "step" divides the learning rate by 10
    momentum: float = 0.9  # of "sgd"
    weight_decay: float = 1e-4
    gradient_clip: float | None = None  # largest gradient norm
    iou_loss_weight: float = 1.0  # lambda of eq. 1
    beta: float = 0.01  # eq. 5
    # Beyond the paper, all off: eq. 4 and 5 are as they stand (docs/decisions/010-semi-supervision.md).
    ramp_up: float = 0.0  # share of the run over which beta rises from almost 0
    soft_weights: bool = False  # pseudo labels count by their c, b and m instead of 1
    pseudo_outlines: bool = True  # False: pseudo labels teach what is there, not its box and mask
    pseudo_negatives: Literal["none", "outside_ignored"] = "none"  # background that counts in pseudo-labelled images
    ema_decay: float = 0.0  # of a teacher, the moving average of the weights, which remakes the pseudo labels
    ema_burn_in: float = 0.2  # share of the run before the teacher does so
    horizontal_flip: float = 0.5  # probability; the paper's only augmentation
    seed: int = 0
    checkpoint_every_steps: int = 50
    loader_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "pseudo_batch_size", "pseudo_every_steps", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, values in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("step", "one_cycle")),
            ("pseudo_negatives", ("none", "outside_ignored")),
        ):
            if getattr(self, name) not in values:
                raise InvalidInputError(f"{name}: expected {values[0]!r} or {values[1]!r}, got {getattr(self, name)!r}")
        if self.beta < 0:
            raise InvalidInputError(f"beta: expected at least 0, got {self.beta}")
        for name in ("ramp_up", "ema_burn_in"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name}: expected a share of the run in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise InvalidInputError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay}")

    @classmethod
    def for_cpu(cls, **options: Any) -> Self:
        """What learns well in few steps without a GPU: AdamW, one-cycle schedule, clipped gradients."""
        defaults: dict[str, Any] = {
            "epochs": 15,
            "optimizer": "adamw",
            "schedule": "one_cycle",
            "learning_rate": 0.001,
            "weight_decay": 0.01,
            "gradient_clip": 5.0,
        }
        return cls(**{**defaults, **options})


@dataclass(frozen=True, kw_only=True)
class PseudoLabelConfig:
    """Which predictions are trusted: `and` is the text of section 3.2, `or` Algorithm 1, line 10, and `precision` goes
    beyond the paper: those whose score of eq. 2 exceeds sigma_s, which `pseudo_labels.with_score_threshold` finds."""

    class_threshold: float = 0.9  # sigma_c
    box_threshold: float = 0.9  # sigma_b
    mask_threshold: float = 0.8  # sigma_m
    rule: Literal["and", "or", "precision"] = "and"
    precision: float = 0.9  # of rule "precision": share of right predictions, on images that the model has not learnt
    precision_iou: float = 0.5  # mask IoU from which a prediction of the correct class is right
    score_threshold: float = 1.0  # sigma_s of rule "precision"; at 1 nothing is trusted
    class_wise_thresholds: bool = False  # beyond the paper: sigma_c by class, `pseudo_labels.class_thresholds`
    class_threshold_floor: float = 0.5  # below which no class's sigma_c falls
    ignore_threshold: float = 0.1  # what is not trusted, but has a larger c, is kept as a box to ignore

    def __post_init__(self) -> None:
        if self.rule not in ("and", "or", "precision"):
            raise InvalidInputError(f"rule: expected 'and', 'or' or 'precision', got {self.rule!r}")
        if not 0 < self.precision < 1:
            raise InvalidInputError(f"precision: expected a share between 0 and 1, got {self.precision}")
        if not 0 < self.precision_iou < 1:
            raise InvalidInputError(f"precision_iou: expected a mask IoU between 0 and 1, got {self.precision_iou}")
        if self.rule == "precision" and self.class_wise_thresholds:
            raise InvalidInputError("class_wise_thresholds: expected False with rule 'precision', which has no sigma_c")
        if self.class_wise_thresholds and not 0 <= self.class_threshold_floor <= self.class_threshold:
            raise InvalidInputError(
                f"class_threshold_floor: expected a number from 0 to class_threshold ({self.class_threshold}), "
                f"got {self.class_threshold_floor}"
            )
