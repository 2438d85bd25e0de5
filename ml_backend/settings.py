"""The only reader of the environment. Names without a prefix are those that users of label-studio-ml know."""

import json
import os
import re
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import make_url

from ml_backend.errors import SettingsError
from ml_backend.foreign_hosts import AllowedHosts
from model.config import STRATEGY_NAMES, NetworkConfig, Profile, PseudoLabelConfig, TrainingConfig
from model.empty_images import EmptyImagePolicy
from model.errors import InvalidInputError
from model.machines import ADDRESS, host_and_port

_DEVICES = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")  # of torch, which takes seconds to ask
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def _env(name: str, default: Any, description: str, **limits: Any) -> Any:
    """One setting, read from the environment variable `name`."""
    return Field(default, validation_alias=name, description=description, validate_default=True, **limits)


class Settings(BaseSettings):
    """Every setting, with its default; the table in the README is made from these descriptions."""

    # Nothing but these names is read: SEED or DEVICE may stand in the environment for another program.
    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        case_sensitive=True,
        env_ignore_empty=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it may be a secret; `from_environment` shows what is none
    )

    label_studio_url: str = _env(
        "LABEL_STUDIO_URL", "http://localhost:8080", "Label Studio's address, as this service reaches it"
    )
    public_label_studio_url: str | None = _env(
        "TSP_PUBLIC_LABEL_STUDIO_URL",
        None,
        "Label Studio's address, as browsers reach it (its LABEL_STUDIO_HOST); none: LABEL_STUDIO_URL",
    )
    label_studio_api_key: SecretStr | None = _env(
        "LABEL_STUDIO_API_KEY", None, "a personal access token or a legacy token of a user who may edit the projects"
    )
    basic_auth_user: str | None = _env("BASIC_AUTH_USER", None, "user name that Label Studio must send; none: no check")
    basic_auth_pass: SecretStr | None = _env("BASIC_AUTH_PASS", None, "password that Label Studio must send")
    host: str = _env(
        "TSP_HOST", "127.0.0.1", "address on which the web process listens; one that others reach needs BASIC_AUTH_*"
    )
    port: int = _env("PORT", 9090, "port on which the web process listens", ge=0, le=65535)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _env("LOG_LEVEL", "INFO", "how much is logged")
    model_dir: Path = _env("MODEL_DIR", Path("data"), "folder of the model versions, checkpoints and cached images")
    alive_file: Path | None = _env(
        "TSP_ALIVE_FILE", None, "file that the worker touches every few seconds, for health checks; none: no file"
    )
    database_url: str = _env(
        "DATABASE_URL",
        "",
        "SQLAlchemy address of the state; empty: SQLite in MODEL_DIR; PostgreSQL: `postgresql://...`, whose role needs "
        "CREATE on the database",
    )

    store_url: str = _env(
        "TSP_STORE_URL",
        "",
        "object store by which processes that share no disk have the same files: `s3://bucket/prefix` or "
        "`file:///folder`; none: all share MODEL_DIR",
    )

    batch_size: int = _env("TSP_BATCH_SIZE", 500, "b: newly annotated images that start a cycle", ge=1)
    validation_fraction: float = _env(
        "TSP_VALIDATION_FRACTION",
        0.2,
        "share of the images, by a hash of their bytes, that only measure; more than 0 for TSP_PSEUDO_RULE=precision",
        ge=0,
        lt=1,
    )
    semi_supervised: bool = _env("TSP_SEMI_SUPERVISED", True, "also learn from images that nobody has labelled yet")
    strategy: str = _env(
        "TSP_STRATEGY",
        "tsp",
        "which images people get first: tsp, random, mc_dropout, core_set, class_entropy, learning_loss, "
        "tsp_without_box, tsp_without_box_and_mask, tsp_expected, tsp_present, hybrid",
    )
    cold_start: Literal["random", "spread"] = _env(
        "TSP_COLD_START",
        "random",
        "the first batch: `random`, or `spread` over what the pretrained network sees in the images",
    )
    gate: bool = _env(
        "TSP_GATE",
        True,
        "refuse a new version that is worse on the validation images (docs/decisions/040)",
    )
    gate_margin: float = _env(
        "TSP_GATE_MARGIN", 0.02, "by how much mask mAP@0.5 may fall before a new version is refused", ge=0, le=1
    )
    beta: float = _env("TSP_BETA", 0.01, "weight of the pseudo-label loss (eq. 5)", ge=0)
    class_threshold: float = _env("TSP_CLASS_THRESHOLD", 0.9, "sigma_c: class score a pseudo label needs", ge=0, le=1)
    box_threshold: float = _env("TSP_BOX_THRESHOLD", 0.9, "sigma_b: box score a pseudo label needs", ge=0, le=1)
    mask_score_threshold: float = _env(
        "TSP_MASK_THRESHOLD", 0.8, "sigma_m: mask score a pseudo label needs", ge=0, le=1
    )
    pseudo_rule: Literal["and", "or", "precision"] = _env(
        "TSP_PSEUDO_RULE",
        "and",
        "`and`: all three thresholds (section 3.2); `or`: any of them (Algorithm 1, line 10); `precision`: as many as "
        "were right on the validation images (TSP_PSEUDO_PRECISION, TSP_VALIDATION_FRACTION)",
    )
    pseudo_precision: float = _env(
        "TSP_PSEUDO_PRECISION", 0.9, "share of right pseudo labels that the rule `precision` aims at", gt=0, lt=1
    )
    class_wise_thresholds: bool = _env(
        "TSP_CLASS_WISE_THRESHOLDS", False, "lower sigma_c for classes of which the model is less sure in general"
    )
    class_threshold_floor: float = _env(
        "TSP_CLASS_THRESHOLD_FLOOR", 0.5, "below which TSP_CLASS_WISE_THRESHOLDS lowers no sigma_c", ge=0, le=1
    )
    soft_weights: bool = _env("TSP_SOFT_WEIGHTS", False, "pseudo labels count by their scores c, b, m instead of 1")
    pseudo_negatives: Literal["none", "outside_ignored"] = _env(
        "TSP_PSEUDO_NEGATIVES",
        "none",
        "background that teaches in pseudo-labelled images: `none` (eq. 4), or `outside_ignored`: where no detection "
        "is in doubt",
    )
    ignore_threshold: float = _env(
        "TSP_IGNORE_THRESHOLD", 0.1, "class score above which a detection that is not trusted is in doubt", ge=0, le=1
    )
    ramp_up: float = _env("TSP_RAMP_UP", 0.0, "share of a training over which beta rises from almost 0", ge=0, le=1)
    pseudo_every_steps: int = _env(
        "TSP_PSEUDO_EVERY_STEPS",
        8,
        "a pseudo-labelled image joins each n-th training step only, and counts n times: 8 cost some 5 % more time",
        ge=1,
    )
    teacher_decay: float = _env(
        "TSP_TEACHER_DECAY",
        0.0,
        "of a mean teacher, which labels anew while the model trains; such as 0.999; 0: no teacher",
        ge=0,
        lt=1,
    )
    teacher_burn_in: float = _env(
        "TSP_TEACHER_BURN_IN", 0.2, "share of a training after which the teacher begins to label", ge=0, le=1
    )
    empty_policy: EmptyImagePolicy = _env(
        "TSP_EMPTY_POLICY",
        EmptyImagePolicy.MEDIAN,
        "place in the queue of images without detections: first, last, median (tsp_expected and tsp_present put them "
        "last, learning_loss where it predicts)",
    )
    from_name: str | None = _env("TSP_FROM_NAME", None, "the PolygonLabels tag to use when a project has several")
    max_vertices: int = _env("TSP_MAX_VERTICES", 40, "most vertices of a pre-annotated polygon", ge=4)
    score_threshold: float = _env(
        "TSP_SCORE_THRESHOLD", 0.05, "class score below which a detection does not exist", ge=0, le=1
    )
    queue_threshold: float = _env(
        "TSP_QUEUE_THRESHOLD",
        0.2,
        "class score from which a detection counts in an image's score (S, eq. 3), the order of the queue",
        ge=0,
        le=1,
    )
    shown_threshold: float = _env(
        "TSP_SHOWN_THRESHOLD", 0.2, "class score from which annotators see a detection's polygon", ge=0, le=1
    )

    profile: Profile = _env(
        "TSP_PROFILE", "efficientnet_lite0_fpn", "network: the paper's is `resnet50_fpn` (wants a GPU)"
    )
    weights: str = _env(
        "TSP_WEIGHTS",
        "imagenet",
        "where training starts: imagenet, coco (resnet50_fpn only), none or a .safetensors file",
    )
    image_size: int | None = _env(
        "TSP_IMAGE_SIZE", None, "shorter side the network sees, in pixels; none: the profile's", ge=32
    )
    anchor_sizes: tuple[PositiveInt, ...] | None = _env(
        "TSP_ANCHOR_SIZES",
        None,
        "five anchor sizes in pixels of the network's input, as JSON; none: chosen from the annotated instances",
        min_length=5,
        max_length=5,
    )
    detections_per_image: int | None = _env(
        "TSP_DETECTIONS", None, "most instances found in an image; none: 100, or twice what people found in one", ge=1
    )
    epochs: int = _env("TSP_EPOCHS", 50, "passes over the annotated images in a cycle", ge=1)
    min_steps: int = _env("TSP_MIN_STEPS", 0, "a small set gets more epochs, until it has so many training steps", ge=0)
    optimizer: Literal["adamw", "sgd"] = _env(
        "TSP_OPTIMIZER", "adamw", "`sgd` is the paper's; `adamw` needs far fewer steps (docs/decisions/006)"
    )
    schedule: Literal["step", "one_cycle"] = _env(
        "TSP_SCHEDULE", "one_cycle", "learning rate over time: `step` is the paper's, `one_cycle` needs fewer epochs"
    )
    learning_rate: float | None = _env(
        "TSP_LEARNING_RATE",
        None,
        "peak learning rate; none: 0.001, the paper's with `sgd` and `step`, but 0.02 with `sgd` and `one_cycle`",
        gt=0,
    )
    gradient_clip: float = _env("TSP_GRADIENT_CLIP", 5.0, "largest gradient norm; 0: gradients are not clipped", ge=0)
    images_per_step: int = _env("TSP_IMAGES_PER_STEP", 2, "annotated images in a training step", ge=1)
    checkpoint_steps: int = _env(
        "TSP_CHECKPOINT_STEPS", 50, "training steps between checkpoints, repeated at most when one is cut off", ge=1
    )
    seed: int = _env("TSP_SEED", 0, "seed of everything random in training", ge=0)
    device: str = _env("TSP_DEVICE", "auto", "cpu, cuda, cuda:1, mps, xpu; auto: cuda where there is one")
    precision: Literal["float32", "bfloat16"] = _env(
        "TSP_PRECISION",
        "float32",
        "numbers with which versions look at images; `bfloat16` is quicker on CPUs that have it, and nearly as exact "
        "(docs/decisions/078)",
    )
    threads: int = _env(
        "TSP_THREADS", 0, "CPU threads of the network; 0: all cores but one in the worker, one in the web process", ge=0
    )
    loaded_versions: int = _env(
        "TSP_LOADED_VERSIONS",
        4,
        "model versions that the web process keeps in memory, of the projects that were asked for predictions last, "
        "besides those of requests that are under way; each takes 0.3 GB with `resnet50_fpn`, 0.05 GB with "
        "`efficientnet_lite0_fpn`",
        ge=1,
    )
    processes: int = _env(
        "TSP_PROCESSES",
        1,
        "processes that train together, each on its share of TSP_IMAGES_PER_STEP; with TSP_DEVICE=cuda each on a GPU",
        ge=1,
    )
    machines: int = _env(
        "TSP_MACHINES",
        1,
        "machines that train together, the worker's included, each with TSP_PROCESSES; the others run "
        "`python -m ml_backend.machine`",
        ge=1,
    )
    meeting_point: str = _env(
        "TSP_MEETING_POINT",
        "",
        "`host:port` at which the worker's machine waits for the others, in a network of their own",
    )
    scoring_chunk: int = _env(
        "TSP_SCORING_CHUNK",
        100,
        "images that a worker takes at once from a pool that is being scored; with PostgreSQL, all workers score it",
        ge=1,
    )
    niceness: int = _env(
        "TSP_NICENESS", 10, "how far the worker stands back behind other processes, 0 to 19", ge=0, le=19
    )
    reconcile_seconds: float = _env(
        "TSP_RECONCILE_SECONDS", 60.0, "how often Label Studio is asked what it has, webhooks or not", gt=0
    )
    allowed_image_hosts: str = _env(
        "TSP_ALLOWED_IMAGE_HOSTS",
        "",
        "hosts at private addresses from which images may be fetched, beside Label Studio's own: names, `*.domain`, "
        "addresses or networks, separated by commas",
    )
    max_image_bytes: int = _env("TSP_MAX_IMAGE_BYTES", 100_000_000, "largest image file", ge=1)
    max_image_pixels: int = _env("TSP_MAX_IMAGE_PIXELS", 100_000_000, "largest image, in pixels", ge=1)

    @field_validator("model_dir")
    @classmethod
    def _absolute(cls, folder: Path) -> Path:
        return folder.resolve()

    @field_validator("label_studio_url", "public_label_studio_url")
    @classmethod
    def _web_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address like http://localhost:8080")
        if parts.username or parts.password:
            raise ValueError("expected an address without user name and password: the token is LABEL_STUDIO_API_KEY")
        return url.rstrip("/")

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str) -> str:
        if url and not url.startswith(("sqlite:///", "postgres://", "postgresql://", "postgresql+psycopg://")):
            raise ValueError("expected postgresql://user:password@host/database or sqlite:////absolute/path")
        return url

    @field_validator("store_url")
    @classmethod
    def _known_store(cls, url: str, info: ValidationInfo) -> str:
        if not url:
            return url
        parts = urlsplit(url)
        is_folder, is_bucket = parts.scheme == "file" and not parts.netloc, parts.scheme == "s3" and parts.netloc
        if not (is_folder and len(parts.path) > 1) and not is_bucket:
            raise ValueError("expected s3://bucket/prefix or file:///absolute/path")
        if "//" in parts.path or "::" in url:  # such keys are written but never listed; "::" has a meaning for fsspec
            raise ValueError("expected a path without '//' and '::'")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "expected an address without credentials and options: give these by AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL or what else the AWS libraries read"
            )
        if not info.data.get("database_url", "postgres").startswith("postgres"):
            raise ValueError("expected a PostgreSQL in DATABASE_URL beside it: SQLite cannot be shared by machines")
        return url.rstrip("/")

    @field_validator("cold_start")
    @classmethod
    def _with_one_disk(cls, cold_start: str, info: ValidationInfo) -> str:
        if cold_start == "spread" and info.data.get("store_url"):
            raise ValueError("expected random beside TSP_STORE_URL: a spread first batch needs a shared MODEL_DIR")
        return cold_start

    @field_validator("allowed_image_hosts")
    @classmethod
    def _known_hosts(cls, hosts: str) -> str:
        AllowedHosts.parse(hosts)
        return hosts

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, strategy: str) -> str:
        if strategy not in STRATEGY_NAMES:
            raise ValueError(f"expected one of {', '.join(STRATEGY_NAMES)}")
        return strategy

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, weights: str, info: ValidationInfo) -> str:
        if weights not in ("none", "imagenet", "coco") and not weights.endswith(".safetensors"):
            raise ValueError("expected imagenet, coco, none or the path of a .safetensors file")
        if weights == "coco" and info.data.get("profile", "resnet50_fpn") != "resnet50_fpn":
            raise ValueError("expected imagenet, none or a file beside this TSP_PROFILE: coco is for resnet50_fpn only")
        return weights

    @field_validator("processes")
    @classmethod
    def _an_image_for_each(cls, processes: int, info: ValidationInfo) -> int:
        images = info.data.get("images_per_step", processes)
        if processes > images:
            raise ValueError(f"expected at most TSP_IMAGES_PER_STEP ({images}): each needs an image in every step")
        return processes

    @field_validator("machines")
    @classmethod
    def _an_image_for_each_machine(cls, machines: int, info: ValidationInfo) -> int:
        processes, images = info.data.get("processes", 1), info.data.get("images_per_step", machines)
        if machines * processes > images:
            raise ValueError(
                f"expected at most TSP_IMAGES_PER_STEP ({images}) in all: each needs an image in every step"
            )
        return machines

    @field_validator("meeting_point")
    @classmethod
    def _an_address(cls, address: str) -> str:
        if address and not host_and_port(address):
            raise ValueError(ADDRESS)
        return address

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not _DEVICES.fullmatch(device):
            raise ValueError("expected auto, cpu, cuda, mps or xpu, or one of several as in cuda:1")
        return device

    @field_validator("anchor_sizes", mode="before")
    @classmethod
    def _from_json(cls, sizes: object) -> object:
        if not isinstance(sizes, str):
            return sizes
        try:
            return json.loads(sizes)
        except ValueError as error:
            raise ValueError("expected JSON like [16, 32, 64, 128, 256]") from error

    @classmethod
    def from_environment(cls) -> Self:
        """Read and check; SettingsError names the variable, what was expected and what came (but never a secret)."""
        try:
            settings = cls()
        except ValidationError as error:
            problems = "; ".join(_described(problem) for problem in error.errors())
            raise SettingsError(f"settings: {problems}. The README lists every setting.") from error
        if settings.class_wise_thresholds and settings.class_threshold_floor > settings.class_threshold:
            raise SettingsError(
                f"TSP_CLASS_THRESHOLD_FLOOR: expected a number from 0 to TSP_CLASS_THRESHOLD "
                f"({settings.class_threshold}), got {settings.class_threshold_floor}"
            )
        if settings.semi_supervised and settings.pseudo_rule == "precision" and not settings.validation_fraction:
            raise SettingsError(
                "TSP_PSEUDO_RULE: `precision` is measured on validation images, expected a TSP_VALIDATION_FRACTION "
                "above 0 (its default is 0.2), got 0: set it, choose the rule `and` or `or`, or set "
                "TSP_SEMI_SUPERVISED=false"
            )
        try:
            NetworkConfig.for_profile(settings.profile, 2, **settings.network_sizes())
            settings.training()
            settings.pseudo_labels()
        except InvalidInputError as error:
            raise SettingsError(f"settings: {error}. The README lists every setting.") from error
        if settings.machines > 1 and not settings.meeting_point:
            raise SettingsError(
                "TSP_MACHINES is more than 1: set TSP_MEETING_POINT to host:port of the worker's machine"
            )
        in_all = settings.machines * settings.processes
        if settings.strategy == "learning_loss" and settings.images_per_step <= in_all:
            raise SettingsError(
                f"TSP_IMAGES_PER_STEP: learning_loss compares the images that a process has in one step, expected at "
                f"least {2 * in_all}, two for each of {in_all}, got {settings.images_per_step}: set it higher, or "
                "choose another TSP_STRATEGY"
            )
        settings._check_store_folder()
        if (settings.basic_auth_user is None) != (settings.basic_auth_pass is None):
            raise SettingsError("BASIC_AUTH_USER and BASIC_AUTH_PASS: set both or neither")
        if settings.basic_auth_user is None and settings.host not in _THIS_MACHINE:
            raise SettingsError(
                f"TSP_HOST is {settings.host}, where others can reach the service: set BASIC_AUTH_USER and "
                "BASIC_AUTH_PASS, or TSP_HOST to 127.0.0.1"
            )
        return settings

    def _check_store_folder(self) -> None:
        """SettingsError when the store is a folder in which what is kept would be taken for what is here."""
        if not self.store_url.startswith("file:"):
            return
        store, here = Path(urlsplit(self.store_url).path).resolve(), self.model_dir
        if store.is_relative_to(here) or here.is_relative_to(store):
            raise SettingsError(
                f"TSP_STORE_URL: expected a folder that is not MODEL_DIR ({here}), not inside it and not around it, "
                f"got {store}: choose another folder, the same for all processes, or unset TSP_STORE_URL when all of "
                "them share MODEL_DIR"
            )

    @classmethod
    def unknown_names(cls) -> list[str]:
        """Variables of the environment that look like settings of this service and are none: probably misspelt."""
        known = {str(field.validation_alias) for field in cls.model_fields.values()}
        return sorted(name for name in os.environ if name.startswith("TSP_") and name not in known)

    @cached_property
    def database(self) -> str:
        """The SQLAlchemy address of the project state."""
        if not self.database_url:
            return f"sqlite:///{self.model_dir / 'state.sqlite3'}"
        for plain in ("postgres://", "postgresql://"):
            if self.database_url.startswith(plain):
                return self.database_url.replace(plain, "postgresql+psycopg://", 1)
        return self.database_url

    @cached_property
    def workflow_database(self) -> str:
        """Where the durable workflows keep their steps: beside an SQLite file, in a schema of its own in PostgreSQL."""
        if not self.database.startswith("sqlite"):
            return self.database
        address = make_url(self.database)
        beside = f"{(address.database or '').removesuffix('.sqlite3')}-workflows.sqlite3"
        return address.set(database=beside, query={}).render_as_string()

    @property
    def browser_url(self) -> str:
        """Label Studio's address in links for people."""
        return self.public_label_studio_url or self.label_studio_url

    def torch_device(self) -> str:
        """Where networks run."""
        if self.device != "auto":
            return self.device
        import torch  # only who runs a network loads it: the web process answers Label Studio long before

        return "cuda" if torch.cuda.is_available() else "cpu"

    def require_api_key(self) -> str:
        """The token for Label Studio; SettingsError when there is none."""
        if self.label_studio_api_key is None or not self.label_studio_api_key.get_secret_value():
            raise SettingsError(
                "LABEL_STUDIO_API_KEY is not set: create a personal access token in Label Studio "
                "(Account & Settings > Personal Access Token) and set it for the web and the worker process"
            )
        return self.label_studio_api_key.get_secret_value()

    def network_sizes(self) -> dict[str, Any]:
        """The sizes that differ from the profile's defaults (fields of NetworkConfig)."""
        sizes: dict[str, Any] = {}
        if self.image_size is not None:
            sizes |= {"min_size": self.image_size, "max_size": 2 * self.image_size}
        if self.anchor_sizes is not None:
            sizes["anchor_sizes"] = self.anchor_sizes
        return sizes

    def training(self) -> TrainingConfig:
        """How a cycle trains."""
        sgd_in_one_cycle = self.optimizer == "sgd" and self.schedule == "one_cycle"
        return TrainingConfig(
            epochs=self.epochs,
            min_steps=self.min_steps,
            batch_size=self.images_per_step,
            optimizer=self.optimizer,
            weight_decay=0.01 if self.optimizer == "adamw" else 1e-4,  # AdamW's is decoupled from the gradient
            schedule=self.schedule,
            learning_rate=self.learning_rate or (0.02 if sgd_in_one_cycle else 0.001),
            milestones=(round(self.epochs * 0.9), round(self.epochs * 0.98)),  # the paper's 45 and 49 of 50
            gradient_clip=self.gradient_clip or None,
            beta=self.beta,
            ramp_up=self.ramp_up,
            soft_weights=self.soft_weights,
            pseudo_negatives=self.pseudo_negatives,
            pseudo_every_steps=self.pseudo_every_steps,
            ema_decay=self.teacher_decay,
            ema_burn_in=self.teacher_burn_in,
            seed=self.seed,
            checkpoint_every_steps=self.checkpoint_steps,
        )

    def pseudo_labels(self) -> PseudoLabelConfig:
        """Which predictions become pseudo labels."""
        return PseudoLabelConfig(
            class_threshold=self.class_threshold,
            box_threshold=self.box_threshold,
            mask_threshold=self.mask_score_threshold,
            rule=self.pseudo_rule,
            precision=self.pseudo_precision,
            class_wise_thresholds=self.class_wise_thresholds,
            class_threshold_floor=self.class_threshold_floor,
            ignore_threshold=self.ignore_threshold,
        )


_MAY_HOLD_SECRETS = (
    "LABEL_STUDIO_URL",
    "TSP_PUBLIC_LABEL_STUDIO_URL",
    "LABEL_STUDIO_API_KEY",
    "BASIC_AUTH_PASS",
    "DATABASE_URL",
    "TSP_STORE_URL",
)


def exit_if_unusable() -> None:
    """End the process with a message when the settings of the environment cannot be used; for commands that load much
    before they come to it."""
    try:
        Settings.from_environment().require_api_key()
    except SettingsError as error:
        sys.exit(str(error))


def _described(problem: Mapping[str, Any]) -> str:
    """One problem with one variable: what was expected, and what came unless it may be or hold a secret."""
    name = ".".join(map(str, problem["loc"]))
    expected = problem["msg"].removeprefix("Value error, ")
    is_secret = name in _MAY_HOLD_SECRETS
    came = "something else, not shown because it may hold a secret" if is_secret else repr(problem["input"])
    return f"{name}: {expected}, got {came}"
