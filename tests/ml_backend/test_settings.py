"""What the environment may say, and what is said when it cannot be used."""

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ml_backend.errors import SettingsError
from ml_backend.network_options import network_options
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.config import NetworkConfig, PseudoLabelConfig, TrainingConfig
from model.empty_images import EmptyImagePolicy
from model.strategies import STRATEGIES
from scripts.label_studio_server import free_port
from scripts.settings_table import README, settings_table, table_in, with_table
from tests.postgres import Postgres

SECRET = "s3cret-enough"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings.from_environment()


def test_the_defaults_are_those_of_the_paper_where_it_gives_one(tmp_path: Path) -> None:
    settings = Settings.from_environment()
    pseudo, training = settings.pseudo_labels(), settings.training()
    assert settings.batch_size == 500
    assert (pseudo.class_threshold, pseudo.box_threshold, pseudo.mask_threshold) == (0.9, 0.9, 0.8)
    assert (pseudo.rule, training.beta, training.epochs, training.milestones) == ("and", 0.01, 50, (45, 49))
    assert settings.model_dir == tmp_path / "data"
    assert (settings.host, settings.port) == ("127.0.0.1", 9090)
    assert settings.basic_auth_user is None
    assert settings.label_studio_api_key is None


def test_what_goes_beyond_the_paper_is_off() -> None:
    settings = Settings.from_environment()
    assert settings.pseudo_labels() == PseudoLabelConfig()
    paper = TrainingConfig()
    for name in ("ramp_up", "soft_weights", "pseudo_negatives", "ema_decay", "ema_burn_in"):
        assert getattr(settings.training(), name) == getattr(paper, name)


def test_the_options_of_semi_supervised_training_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: text for name, text, *_ in EXAMPLES if name != "TSP_STORE_URL"}  # with which one of them is refused
    training, pseudo = read(monkeypatch, given).training(), Settings().pseudo_labels()
    assert (training.ramp_up, training.soft_weights, training.pseudo_negatives) == (0.3, True, "outside_ignored")
    assert (training.pseudo_every_steps, training.ema_decay, training.ema_burn_in) == (4, 0.999, 0.5)
    assert (pseudo.class_wise_thresholds, pseudo.class_threshold_floor, pseudo.ignore_threshold) == (True, 0.4, 0.2)


def test_a_floor_above_the_threshold_that_it_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"TSP_CLASS_THRESHOLD_FLOOR: .* to TSP_CLASS_THRESHOLD \(0.4\), got 0.5"):
        read(monkeypatch, {"TSP_CLASS_WISE_THRESHOLDS": "true", "TSP_CLASS_THRESHOLD": "0.4"})


def test_a_precision_that_nothing_measures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured = {"TSP_PSEUDO_RULE": "precision", "TSP_VALIDATION_FRACTION": "0"}
    with pytest.raises(SettingsError, match=r"TSP_PSEUDO_RULE: `precision` .* above 0 .*, got 0: set it"):
        read(monkeypatch, unmeasured)
    assert not read(monkeypatch, {**unmeasured, "TSP_SEMI_SUPERVISED": "false"}).semi_supervised
    assert read(monkeypatch, {**unmeasured, "TSP_PSEUDO_RULE": "and"}).pseudo_rule == "and"


@pytest.mark.parametrize(
    ("optimizer", "schedule", "rate"),
    [("adamw", "one_cycle", 0.001), ("adamw", "step", 0.001), ("sgd", "one_cycle", 0.02), ("sgd", "step", 0.001)],
)
def test_the_default_learning_rate_fits_the_optimizer_and_the_schedule(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, schedule: str, rate: float
) -> None:
    environment = {"TSP_OPTIMIZER": optimizer, "TSP_SCHEDULE": schedule}
    assert read(monkeypatch, environment).training().learning_rate == rate
    assert read(monkeypatch, {**environment, "TSP_LEARNING_RATE": "0.005"}).training().learning_rate == 0.005


EXAMPLES: list[tuple[str, str, str, Any]] = [
    ("LABEL_STUDIO_URL", "https://ls.example.com/label/", "label_studio_url", "https://ls.example.com/label"),
    ("TSP_PUBLIC_LABEL_STUDIO_URL", "https://labels.org/", "public_label_studio_url", "https://labels.org"),
    ("TSP_HOST", "localhost", "host", "localhost"),
    ("PORT", "8000", "port", 8000),
    ("LOG_LEVEL", "DEBUG", "log_level", "DEBUG"),
    ("MODEL_DIR", "/srv/models", "model_dir", Path("/srv/models")),
    ("TSP_ALIVE_FILE", "/tmp/alive", "alive_file", Path("/tmp/alive")),
    ("DATABASE_URL", "postgresql://u@h/d", "database_url", "postgresql://u@h/d"),
    ("TSP_STORE_URL", "s3://bucket/tsp/", "store_url", "s3://bucket/tsp"),
    ("TSP_BATCH_SIZE", "20", "batch_size", 20),
    ("TSP_VALIDATION_FRACTION", "0", "validation_fraction", 0.0),
    ("TSP_SEMI_SUPERVISED", "false", "semi_supervised", False),
    ("TSP_STRATEGY", "hybrid", "strategy", "hybrid"),
    ("TSP_COLD_START", "spread", "cold_start", "spread"),
    ("TSP_GATE", "false", "gate", False),
    ("TSP_GATE_MARGIN", "0.1", "gate_margin", 0.1),
    ("TSP_BETA", "0.1", "beta", 0.1),
    ("TSP_CLASS_THRESHOLD", "0.5", "class_threshold", 0.5),
    ("TSP_BOX_THRESHOLD", "0.6", "box_threshold", 0.6),
    ("TSP_MASK_THRESHOLD", "0.7", "mask_score_threshold", 0.7),
    ("TSP_PSEUDO_RULE", "or", "pseudo_rule", "or"),
    ("TSP_PSEUDO_PRECISION", "0.8", "pseudo_precision", 0.8),
    ("TSP_CLASS_WISE_THRESHOLDS", "true", "class_wise_thresholds", True),
    ("TSP_CLASS_THRESHOLD_FLOOR", "0.4", "class_threshold_floor", 0.4),
    ("TSP_SOFT_WEIGHTS", "true", "soft_weights", True),
    ("TSP_PSEUDO_NEGATIVES", "outside_ignored", "pseudo_negatives", "outside_ignored"),
    ("TSP_IGNORE_THRESHOLD", "0.2", "ignore_threshold", 0.2),
    ("TSP_RAMP_UP", "0.3", "ramp_up", 0.3),
    ("TSP_PSEUDO_EVERY_STEPS", "4", "pseudo_every_steps", 4),
    ("TSP_TEACHER_DECAY", "0.999", "teacher_decay", 0.999),
    ("TSP_TEACHER_BURN_IN", "0.5", "teacher_burn_in", 0.5),
    ("TSP_EMPTY_POLICY", "last", "empty_policy", EmptyImagePolicy.LAST),
    ("TSP_FROM_NAME", "outline", "from_name", "outline"),
    ("TSP_MAX_VERTICES", "12", "max_vertices", 12),
    ("TSP_SCORE_THRESHOLD", "0.1", "score_threshold", 0.1),
    ("TSP_QUEUE_THRESHOLD", "0.1", "queue_threshold", 0.1),
    ("TSP_SHOWN_THRESHOLD", "0.4", "shown_threshold", 0.4),
    ("TSP_PROFILE", "resnet50_fpn", "profile", "resnet50_fpn"),
    ("TSP_WEIGHTS", "none", "weights", "none"),
    ("TSP_IMAGE_SIZE", "192", "image_size", 192),
    ("TSP_ANCHOR_SIZES", "[4, 8, 16, 32, 64]", "anchor_sizes", (4, 8, 16, 32, 64)),
    ("TSP_DETECTIONS", "300", "detections_per_image", 300),
    ("TSP_EPOCHS", "3", "epochs", 3),
    ("TSP_MIN_STEPS", "100", "min_steps", 100),
    ("TSP_OPTIMIZER", "sgd", "optimizer", "sgd"),
    ("TSP_SCHEDULE", "step", "schedule", "step"),
    ("TSP_LEARNING_RATE", "0.002", "learning_rate", 0.002),
    ("TSP_GRADIENT_CLIP", "0", "gradient_clip", 0.0),
    ("TSP_IMAGES_PER_STEP", "4", "images_per_step", 4),
    ("TSP_CHECKPOINT_STEPS", "5", "checkpoint_steps", 5),
    ("TSP_SEED", "7", "seed", 7),
    ("TSP_DEVICE", "cuda:1", "device", "cuda:1"),
    ("TSP_PRECISION", "bfloat16", "precision", "bfloat16"),
    ("TSP_THREADS", "2", "threads", 2),
    ("TSP_LOADED_VERSIONS", "1", "loaded_versions", 1),
    ("TSP_PROCESSES", "2", "processes", 2),
    ("TSP_MACHINES", "1", "machines", 1),
    ("TSP_MEETING_POINT", "10.0.0.5:29400", "meeting_point", "10.0.0.5:29400"),
    ("TSP_SCORING_CHUNK", "32", "scoring_chunk", 32),
    ("TSP_NICENESS", "0", "niceness", 0),
    ("TSP_RECONCILE_SECONDS", "0.5", "reconcile_seconds", 0.5),
    ("TSP_ALLOWED_IMAGE_HOSTS", "minio.local,10.0.0.0/8", "allowed_image_hosts", "minio.local,10.0.0.0/8"),
    ("TSP_MAX_IMAGE_BYTES", "1000", "max_image_bytes", 1000),
    ("TSP_MAX_IMAGE_PIXELS", "1000", "max_image_pixels", 1000),
]
SECRETS = ("LABEL_STUDIO_API_KEY", "BASIC_AUTH_PASS")
POSTGRES = {"DATABASE_URL": "postgresql://u@h/d"}


def test_there_is_an_example_of_each_variable() -> None:
    every = {str(field.validation_alias) for field in Settings.model_fields.values()}
    assert {name for name, *_ in EXAMPLES} == every - {"BASIC_AUTH_USER", *SECRETS}


@pytest.mark.parametrize(("name", "text", "field", "value"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_each_variable_is_read(monkeypatch: pytest.MonkeyPatch, name: str, text: str, field: str, value: Any) -> None:
    needed = POSTGRES if name == "TSP_STORE_URL" else {}
    assert getattr(read(monkeypatch, {**needed, name: text}), field) == value


@pytest.mark.parametrize(
    ("url", "others", "problem"),
    [
        ("s3://bucket", {}, "expected a PostgreSQL in DATABASE_URL beside it"),
        ("s3://bucket", {"DATABASE_URL": "sqlite:////a/b"}, "expected a PostgreSQL in DATABASE_URL beside it"),
        ("bucket", POSTGRES, "expected s3://bucket/prefix or file:///absolute/path"),
        ("s3://", POSTGRES, "expected s3://bucket/prefix or file:///absolute/path"),
        ("file://host/path", POSTGRES, "expected s3://bucket/prefix or file:///absolute/path"),
        ("file:///", POSTGRES, "expected s3://bucket/prefix or file:///absolute/path"),
        ("s3://bucket//prefix", POSTGRES, "expected a path without '//' and '::'"),
        ("file:///store/a::b", POSTGRES, "expected a path without '//' and '::'"),
        ("https://bucket.s3.amazonaws.com", POSTGRES, "expected s3://bucket/prefix or file:///absolute/path"),
        (f"s3://key:{SECRET}@bucket", POSTGRES, "expected an address without credentials"),
        (f"s3://bucket/?secret={SECRET}", POSTGRES, "expected an address without credentials"),
        ("file:///store", {**POSTGRES, "TSP_COLD_START": "spread"}, "TSP_COLD_START: expected random beside"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str, others: dict[str, str], problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        read(monkeypatch, {**others, "TSP_STORE_URL": url})
    assert SECRET not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("store", ["data", "data/store", "", "data/../data", "link/store"])
def test_a_store_that_is_not_apart_from_the_folder_of_this_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: str
) -> None:
    (tmp_path / "link").symlink_to("data")
    place = {**POSTGRES, "MODEL_DIR": "data", "TSP_STORE_URL": f"file://{tmp_path}/{store}"}
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, place)
    folder = (tmp_path / store).resolve()
    assert str(caught.value).startswith(
        f"TSP_STORE_URL: expected a folder that is not MODEL_DIR ({tmp_path / 'data'}), not inside it and not around "
        f"it, got {folder}: choose another folder"
    )


def test_a_store_beside_the_folder_of_this_machine_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = {**POSTGRES, "MODEL_DIR": "data", "TSP_STORE_URL": f"file://{tmp_path}/data-store"}
    assert read(monkeypatch, place).store_url == place["TSP_STORE_URL"]


def test_tokens_and_passwords_are_read_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, {"BASIC_AUTH_USER": "studio", **dict.fromkeys(SECRETS, SECRET)})
    assert settings.require_api_key() == SECRET
    assert settings.basic_auth_pass is not None
    assert settings.basic_auth_pass.get_secret_value() == SECRET
    assert SECRET not in f"{settings} {settings!r} {settings.model_dump_json()}"


def test_variables_of_other_programs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"SEED": "7", "DEVICE": "cuda", "EPOCHS": "many", "tsp_seed": "7", "TSP_UNKNOWN": "1", "THREADS": "x"}
    assert read(monkeypatch, others) == Settings()


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(field.validation_alias) for field in Settings.model_fields.values()]
    assert read(monkeypatch, dict.fromkeys(names, "")) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("LABEL_STUDIO_URL", "localhost:8080", "like http://localhost:8080, got something else, not shown"),
        ("LABEL_STUDIO_URL", f"ftp://studio:{SECRET}@host", "expected an address like"),
        ("LABEL_STUDIO_URL", "http://[::1", "Invalid IPv6 URL"),
        ("PORT", "http", "valid integer"),
        ("PORT", "70000", "less than or equal to 65535"),
        ("LOG_LEVEL", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("DATABASE_URL", f"mysql://studio:{SECRET}@host/db", "expected postgresql://"),
        ("DATABASE_URL", SECRET, "expected postgresql://"),
        ("TSP_BATCH_SIZE", "0", "greater than or equal to 1"),
        ("TSP_VALIDATION_FRACTION", "1", "less than 1"),
        ("TSP_SEMI_SUPERVISED", "perhaps", "valid boolean"),
        ("TSP_STRATEGY", "best", "expected one of random, mc_dropout, core_set, class_entropy, learning_loss, tsp,"),
        ("TSP_COLD_START", "warm", "'random' or 'spread'"),
        ("TSP_GATE_MARGIN", "-0.1", "greater than or equal to 0"),
        ("TSP_BETA", "nan", "finite"),
        ("TSP_CLASS_THRESHOLD", "90", "less than or equal to 1"),
        ("TSP_PSEUDO_RULE", "xor", "'and', 'or' or 'precision'"),
        ("TSP_PSEUDO_NEGATIVES", "all", "'none' or 'outside_ignored'"),
        ("TSP_RAMP_UP", "2", "less than or equal to 1"),
        ("TSP_PSEUDO_EVERY_STEPS", "0", "greater than or equal to 1"),
        ("TSP_TEACHER_DECAY", "1", "less than 1"),
        ("TSP_EMPTY_POLICY", "middle", "'first', 'last' or 'median'"),
        ("TSP_MAX_VERTICES", "3", "greater than or equal to 4"),
        ("TSP_PROFILE", "resnet101", "'resnet50_fpn', 'resnet18_fpn' or 'efficientnet_lite0_fpn'"),
        ("TSP_IMAGE_SIZE", "8", "greater than or equal to 32"),
        ("TSP_ANCHOR_SIZES", "16,32,64,128,256", r"expected JSON like \[16, 32, 64, 128, 256\]"),
        ("TSP_ANCHOR_SIZES", "[16, 32]", "5 items"),
        ("TSP_ANCHOR_SIZES", "[0, 1, 2, 3, 4]", "greater than 0"),
        ("TSP_ANCHOR_SIZES", '{"a": 1}', "valid tuple"),
        ("TSP_EPOCHS", "1.5", "valid integer"),
        ("TSP_LEARNING_RATE", "inf", "finite"),
        ("TSP_DEVICE", "gpu", "expected auto, cpu, cuda, mps or xpu"),
        ("TSP_PROCESSES", "0", "greater than or equal to 1"),
        ("TSP_PROCESSES", "3", r"expected at most TSP_IMAGES_PER_STEP \(2\)"),
        ("TSP_MACHINES", "3", r"expected at most TSP_IMAGES_PER_STEP \(2\) in all"),
        ("TSP_MACHINES", "2", "set TSP_MEETING_POINT to host:port of the worker's machine"),
        ("TSP_MEETING_POINT", "abc", "TSP_MEETING_POINT: expected host:port, like 10.0.0.5:29400, .*got 'abc'"),
        ("TSP_MEETING_POINT", "10.0.0.5:0", "expected host:port"),
        ("TSP_SCORING_CHUNK", "0", "greater than or equal to 1"),
        ("TSP_NICENESS", "-5", "greater than or equal to 0"),
        ("TSP_LOADED_VERSIONS", "0", "greater than or equal to 1"),
        ("TSP_RECONCILE_SECONDS", "0", "greater than 0"),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        read(monkeypatch, {name: text, "LABEL_STUDIO_API_KEY": SECRET})
    assert name in str(caught.value)
    assert SECRET not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(("name", "text"), [("TSP_BATCH_SIZE", "many"), ("TSP_DEVICE", "gpu"), ("TSP_BETA", "-1")])
def test_an_error_shows_the_value_that_came(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: .*, got '{text}'"):
        read(monkeypatch, {name: text})


@pytest.mark.parametrize(
    ("processes", "machines", "images", "needed"), [(1, 1, 1, 2), (2, 1, 2, 4), (1, 2, 2, 4), (2, 2, 4, 8)]
)
def test_learning_loss_without_two_images_for_a_process_is_refused(
    monkeypatch: pytest.MonkeyPatch, processes: int, machines: int, images: int, needed: int
) -> None:
    place = {"TSP_PROCESSES": str(processes), "TSP_MACHINES": str(machines), "TSP_MEETING_POINT": "10.0.0.5:29400"}
    few, enough = ({**place, "TSP_IMAGES_PER_STEP": str(count)} for count in (images, needed))
    read(monkeypatch, few)
    read(monkeypatch, {**enough, "TSP_STRATEGY": "learning_loss"})
    with pytest.raises(SettingsError, match=f"TSP_IMAGES_PER_STEP: learning_loss .* at least {needed}, .*got {images}"):
        read(monkeypatch, {**few, "TSP_STRATEGY": "learning_loss"})


@pytest.mark.parametrize("name", ["BASIC_AUTH_USER", "BASIC_AUTH_PASS"])
def test_half_of_the_basic_authentication_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(SettingsError, match="BASIC_AUTH_USER and BASIC_AUTH_PASS: set both or neither") as caught:
        read(monkeypatch, {name: SECRET})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::"])
def test_an_address_that_others_reach_needs_a_user_name_and_a_password(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    with pytest.raises(SettingsError, match=f"TSP_HOST is {host}, .* set BASIC_AUTH_USER"):
        read(monkeypatch, {"TSP_HOST": host})
    assert read(monkeypatch, {"BASIC_AUTH_USER": "studio", "BASIC_AUTH_PASS": SECRET}).host == host


def test_names_that_are_probably_misspelt_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TSP_BATCHSIZE", "TSP_BATCH_SIZE", "BATCHSIZE"):
        monkeypatch.setenv(name, "3")
    assert Settings.unknown_names() == ["TSP_BATCHSIZE"]


def test_several_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"PORT: .*; TSP_EPOCHS: .*The README lists every setting"):
        read(monkeypatch, {"PORT": "x", "TSP_EPOCHS": "y"})


def test_a_missing_token_says_where_to_get_one() -> None:
    with pytest.raises(SettingsError, match="LABEL_STUDIO_API_KEY is not set: create a personal access token"):
        Settings.from_environment().require_api_key()


@pytest.mark.parametrize(
    ("given", "state", "workflows"),
    [
        pytest.param("", "sqlite:///{0}/data/state.sqlite3", "sqlite:///{0}/data/state-workflows.sqlite3", id="none"),
        pytest.param("sqlite:////srv/tsp.db", "sqlite:////srv/tsp.db", "sqlite:////srv/tsp.db-workflows.sqlite3",
                     id="SQLite"),
        pytest.param("postgres://u:p@h:1/d", "postgresql+psycopg://u:p@h:1/d", "postgresql+psycopg://u:p@h:1/d",
                     id="PostgreSQL's short form"),
        pytest.param("postgresql://u@h/d", "postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d",
                     id="PostgreSQL"),
        pytest.param("postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d",
                     id="PostgreSQL as SQLAlchemy names it"),
    ],
)  # fmt: skip
def test_the_databases_follow_from_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, state: str, workflows: str
) -> None:
    settings = read(monkeypatch, {"DATABASE_URL": given})
    assert settings.database == state.format(tmp_path)
    assert settings.workflow_database == workflows.format(tmp_path)


def test_every_strategy_can_be_chosen_and_gets_the_network_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, strategy in STRATEGIES.items():
        settings = read(monkeypatch, {"TSP_STRATEGY": name})
        network = NetworkConfig.for_profile(settings.profile, 2, **network_options(settings))
        assert network.dropout == strategy.network_options.get("dropout", 0.0)
        assert network.learning_loss is (name == "learning_loss")
        assert name in str(Settings.model_fields["strategy"].description)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_the_table_has_one_row_for_each_setting_with_portable_defaults() -> None:
    rows = settings_table().splitlines()[2:]
    assert len(rows) == len(Settings.model_fields)
    assert "| `MODEL_DIR` | `data` | " in settings_table()
    assert "| `LABEL_STUDIO_API_KEY` | none | " in settings_table()
    assert "| `TSP_SEMI_SUPERVISED` | `true` | " in settings_table()
    assert all(row.count("|") == 4 for row in rows)
    assert str(Path.cwd()) not in settings_table()


def test_the_readme_lists_every_setting_as_it_is() -> None:
    assert table_in(README.read_text()) == settings_table(), "run `python -m scripts.settings_table --write`"


@pytest.mark.parametrize("old_table", ["", "| an old row |\n"], ids=["empty", "an old table"])
def test_only_the_table_of_a_readme_is_written(old_table: str) -> None:
    readme = f"# Title\n\n<!-- settings -->\n{old_table}<!-- /settings -->\n\nMore \\1 text.\n"
    written = with_table(readme)
    assert written == f"# Title\n\n<!-- settings -->\n{settings_table()}<!-- /settings -->\n\nMore \\1 text.\n"
    assert with_table(written) == written


def test_a_readme_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- settings -->"):
        with_table("# Title\n")


def test_weights_that_are_neither_known_nor_a_file_of_the_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected imagenet, coco, none or the path of a \.safetensors file"):
        Settings(TSP_WEIGHTS="resnet50.pth")


@pytest.mark.parametrize("profile", [{}, {"TSP_PROFILE": "resnet18_fpn"}], ids=["the default", "another"])
def test_weights_that_the_profile_has_none_of_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, profile: dict[str, str]
) -> None:
    with pytest.raises(SettingsError, match=r"TSP_WEIGHTS: expected .* coco is for resnet50_fpn only, got 'coco'"):
        read(monkeypatch, {"TSP_WEIGHTS": "coco", **profile})
    assert read(monkeypatch, {"TSP_WEIGHTS": "coco", "TSP_PROFILE": "resnet50_fpn"}).weights == "coco"


def test_a_model_dir_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "models"
    with pytest.raises(SettingsError, match=f"MODEL_DIR: expected a folder .* got {folder} \\(Not a directory\\)"):
        Service.connect(Settings(MODEL_DIR=folder, LABEL_STUDIO_API_KEY="0" * 40))


def test_a_model_dir_that_cannot_be_written_to_is_named() -> None:
    with pytest.raises(
        SettingsError, match=r"MODEL_DIR: expected a folder that can be made and written to, got /proc "
    ):
        Service.connect(Settings(MODEL_DIR="/proc", LABEL_STUDIO_API_KEY="0" * 40))


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    address = f"postgresql://me:hidden-word@127.0.0.1:{free_port()}/tsp"
    with pytest.raises(SettingsError, match=r"DATABASE_URL: expected a database that answers, .*refused") as told:
        Service.connect(Settings(MODEL_DIR=tmp_path, LABEL_STUDIO_API_KEY="0" * 40, DATABASE_URL=address))
    assert "hidden-word" not in str(told.value)


def refused_database(folder: Path, address: str) -> str:
    """What is said of it."""
    with pytest.raises(SettingsError) as told:
        Service.connect(Settings(MODEL_DIR=folder, LABEL_STUDIO_API_KEY="0" * 40, DATABASE_URL=address))
    said, _, why = str(told.value).partition(", but: ")
    assert said == "DATABASE_URL: expected a database that answers, lets us in and lets us make tables"
    return why


def test_a_user_who_may_not_make_tables_is_told(tmp_path: Path, postgres: Postgres) -> None:
    address = postgres.new_database()
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("CREATE ROLE guest LOGIN")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # as PostgreSQL 15 does by itself
    guest = address.replace("//tests@", "//guest@")
    assert refused_database(tmp_path, guest) == "permission denied for schema public"


def test_a_file_that_is_no_database_or_cannot_be_made_is_told(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"not a database " * 100)
    assert refused_database(tmp_path, f"sqlite:///{path}") == "file is not a database"
    assert "Not a directory" in refused_database(tmp_path, f"sqlite:///{path}/below/state.sqlite")


def test_a_server_that_never_answers_is_asked_once_and_told(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/tsp"
        assert "timeout" in pool.submit(refused_database, tmp_path, address).result(timeout=60)
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
