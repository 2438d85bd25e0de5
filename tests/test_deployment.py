"""docker-compose.yml, the Dockerfile and .env.example keep what the README promises of them."""

import ipaddress
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from ml_backend.settings import Settings
from scripts.check_dockerfile import build_context, chain, final, read_dockerfile
from scripts.label_studio_server import EXECUTABLE
from tests.compose import ROOT, ComposeError, interpolate, load_compose, read_env_file
from tests.postgres import running_postgres

REQUIRED = {
    "POSTGRES_PASSWORD": "0a1b2c3d",
    "LABEL_STUDIO_USERNAME": "admin@example.com",
    "LABEL_STUDIO_PASSWORD": "correct horse battery",
    "LABEL_STUDIO_API_KEY": "0123456789" * 4,
    "BASIC_AUTH_USER": "label-studio",
    "BASIC_AUTH_PASS": "s3cret",
}
COMPOSE = load_compose(REQUIRED)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
RAW = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
ARGUMENTS, STAGES = read_dockerfile((ROOT / "Dockerfile").read_text())

every_service = pytest.mark.parametrize("name", SERVICES)


# How variables are read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A and ${A}", "a and a"),
        ("${MISSING}", ""),
        ("$$A", "$A"),
        ("${A:-b}${EMPTY:-b}${MISSING:-b}", "abb"),
        ("${A-b}${EMPTY-b}${MISSING-b}", "ab"),
        ("${A:+b}${EMPTY:+b}${MISSING:+b}", "b"),
        ("${A+b}${EMPTY+b}${MISSING+b}", "bb"),
        ("${MISSING:-x:${A:-y}}", "x:a"),
        ("${A:?no}", "a"),
        ("${EMPTY?no}", ""),
    ],
)
def test_variables_are_replaced_as_compose_does(text: str, value: str) -> None:
    assert interpolate(text, {"A": "a", "EMPTY": ""}) == value


@pytest.mark.parametrize("text", ["${EMPTY:?say it}", "${MISSING:?say it}", "${MISSING?say it}"])
def test_what_is_required_and_missing_is_told(text: str) -> None:
    with pytest.raises(ComposeError, match="say it"):
        interpolate(text, {"EMPTY": ""})


# Secrets


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_nothing_starts_without_the_secrets(name: str, value: str | None) -> None:
    environment = {key: text for key, text in REQUIRED.items() if key != name}
    if value is not None:
        environment[name] = value
    with pytest.raises(ComposeError, match=name):
        load_compose(environment)


@every_service
def test_no_secret_has_a_value_or_a_default_in_the_file(name: str) -> None:
    for variable, value in RAW["services"][name].get("environment", {}).items():
        if re.search("PASS|API_KEY|USER_TOKEN|SECRET|DATABASE_URL", variable):
            assert re.search(r"\$\{[A-Z_]+:\?", value), variable


def test_the_example_lists_every_variable_and_leaves_the_required_ones_empty() -> None:
    example = (ROOT / ".env.example").read_text()
    listed = set(re.findall(r"^#? ?([A-Z_]+)=", example, re.MULTILINE))
    text = "".join((ROOT / name).read_text() for name in ("docker-compose.yml", "docker-compose.cuda.yml"))
    assert listed == set(re.findall(r"\$\{([A-Z_]+)", text)) | {"COMPOSE_FILE"}
    assert read_env_file(ROOT / ".env.example") == dict.fromkeys(REQUIRED, "")


@pytest.mark.parametrize(
    ("name", "default"), re.findall(r"^# ([A-Z_]+)=(\S+)", (ROOT / ".env.example").read_text(), re.M)
)
def test_the_example_shows_the_defaults(name: str, default: str) -> None:
    if name == "COMPOSE_FILE":
        assert all((ROOT / file).is_file() for file in default.split(":"))
    else:
        assert load_compose({**REQUIRED, name: default}) == COMPOSE


# Every service


@every_service
def test_every_service_is_looked_after_and_limited(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert {"interval", "timeout", "start_period", "retries"} <= service["healthcheck"].keys()
    assert service["restart"] == "unless-stopped"
    assert {"memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert service["init"] is True
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}


@every_service
def test_every_service_may_do_as_little_as_possible(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])
    assert all(
        {"size", "mode"} == {option.partition("=")[0] for option in mount.partition(":")[2].split(",")}
        for mount in service["tmpfs"]
    )
    user = service.get("user") or final(STAGES, service["build"]["target"], "USER")
    assert user in ("postgres", "10001:10001")


def test_only_label_studio_and_the_dashboard_are_published_on_this_machine_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"label-studio": ["127.0.0.1:8080:8080"], "web": ["127.0.0.1:9090:9090"]}
    elsewhere = load_compose(
        {**REQUIRED, "BIND_ADDRESS": "10.1.2.3", "LABEL_STUDIO_PORT": "80", "DASHBOARD_PORT": "81"}
    )
    assert elsewhere["services"]["label-studio"]["ports"] == ["10.1.2.3:80:8080"]
    assert elsewhere["services"]["web"]["ports"] == ["10.1.2.3:81:9090"]


def test_the_database_is_where_nobody_comes_in_or_goes_out() -> None:
    assert COMPOSE["networks"]["data"]["internal"] is True
    assert SERVICES["db"]["networks"] == ["data"]


def test_the_backend_has_a_name_that_label_studio_sends_webhooks_to() -> None:
    (alias,) = SERVICES["web"]["networks"]["default"]["aliases"]
    assert "." in alias
    assert f"http://{alias}:9090" in (ROOT / "README.md").read_text()


def test_web_process_and_worker_share_all_but_the_sign_of_life() -> None:
    web, worker = SERVICES["web"]["environment"], dict(SERVICES["worker"]["environment"])
    alive = worker.pop("TSP_ALIVE_FILE")
    assert web == worker
    assert SERVICES["web"]["volumes"] == SERVICES["worker"]["volumes"] == ["models:/data"]
    assert SERVICES["worker"]["healthcheck"]["test"][-1] == alive


def test_the_worker_can_be_multiplied() -> None:
    assert {"container_name", "ports"}.isdisjoint(SERVICES["worker"])


def test_our_service_is_given_settings_that_exist() -> None:
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    assert SERVICES["worker"]["environment"].keys() <= known
    variables = [i.value for i in STAGES["service"].instructions if i.keyword == "ENV"]
    names = set(re.findall(r"([A-Z_]+)=", " ".join(variables)))
    assert names == {"MODEL_DIR", "TORCH_HOME", "TSP_HOST", "PORT"}
    assert names - {"TORCH_HOME"} <= known


def test_links_and_label_studio_itself_use_the_address_of_browsers() -> None:
    public = "https://labels.example.com"
    services = load_compose({**REQUIRED, "LABEL_STUDIO_PUBLIC_URL": public})["services"]
    assert services["web"]["environment"]["TSP_PUBLIC_LABEL_STUDIO_URL"] == public
    assert services["label-studio"]["environment"]["LABEL_STUDIO_HOST"] == public
    moved = load_compose({**REQUIRED, "LABEL_STUDIO_PORT": "8081"})["services"]
    assert moved["web"]["environment"]["TSP_PUBLIC_LABEL_STUDIO_URL"] == "http://localhost:8081"


def test_the_gpu_file_changes_the_worker_only() -> None:
    with_gpu = load_compose(REQUIRED, "docker-compose.yml", "docker-compose.cuda.yml")["services"]
    assert {name for name, service in with_gpu.items() if service != SERVICES[name]} == {"worker"}
    worker = with_gpu["worker"]
    assert worker["build"] == SERVICES["worker"]["build"] | {"args": {"TORCH_INDEX": ""}}
    assert worker["deploy"]["resources"]["limits"] == SERVICES["worker"]["deploy"]["resources"]["limits"]
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


@pytest.mark.label_studio
def test_label_studio_may_reach_private_networks_but_neither_itself_nor_metadata_services(tmp_path: Path) -> None:
    addresses = {
        "172.18.0.4": True,
        "10.0.0.9": True,
        "192.168.64.3": True,
        "127.0.0.1": False,
        "0.0.0.0": False,
        "169.254.169.254": False,
        "::1": False,
        "::ffff:127.0.0.1": False,
    }
    program = (
        "import sys, django; sys.path.insert(0, __import__('label_studio').__path__[0]); django.setup()\n"
        "from core.utils.io import SsrfBlockedUrlError, validate_ip\n"
        "for ip in sys.argv[1:]:\n"
        "    try: validate_ip(ip)\n"
        "    except SsrfBlockedUrlError: print(ip, 'refused')\n"
        "    else: print(ip, 'reached')\n"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "DJANGO_SETTINGS_MODULE": "core.settings.label_studio",
        "LABEL_STUDIO_BASE_DATA_DIR": str(tmp_path),
    }
    told = SERVICES["label-studio"]["environment"]
    environment |= {name: told[name] for name in ("USE_DEFAULT_BANNED_SUBNETS", "USER_ADDITIONAL_BANNED_SUBNETS")}
    done = subprocess.run(
        [EXECUTABLE.parent / "python", "-c", program, *addresses],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    answers = re.findall(r"^(\S+) (refused|reached)$", done.stdout, re.MULTILINE)
    assert {ip: answer == "reached" for ip, answer in answers} == addresses
    assert all(ipaddress.ip_address(ip) for ip in addresses)


# The databases


def test_both_services_get_a_database_in_utf8_and_no_password_makes_anybody_superuser() -> None:
    password = REQUIRED["POSTGRES_PASSWORD"]
    with running_postgres(superuser="postgres", asks_for_passwords=True, encoding="SQL_ASCII") as server:
        run = ["psql", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--file", ROOT / "deploy" / "databases.sql"]
        subprocess.run(
            [*run, server.local_url("postgres")],
            env={"PATH": "/usr/bin:/bin", "POSTGRES_PASSWORD": password},
            check=True,
            timeout=60,
        )
        for name in ("label_studio", "tsp"):
            address = f"postgresql://{name}:{password}@127.0.0.1:{server.port}/{name}"
            with psycopg.connect(address) as connection:
                connection.execute("CREATE TABLE mine (id int)")
                role = "SELECT rolsuper, current_setting('server_encoding') FROM pg_roles WHERE rolname = current_user"
                assert connection.execute(role).fetchone() == (False, "UTF8")
            with pytest.raises(psycopg.OperationalError, match="authentication failed"):
                psycopg.connect(address.replace(password, "guessed"))
        with pytest.raises(psycopg.OperationalError, match="authentication failed"):
            psycopg.connect(f"postgresql://postgres:{password}@127.0.0.1:{server.port}/postgres")


# The Dockerfile


def test_the_versions_are_those_of_make_install() -> None:
    makefile = (ROOT / "Makefile").read_text()
    arguments = {i.value for stage in STAGES.values() for i in stage.instructions if i.keyword == "ARG"}
    (torch,) = re.findall(r"^TORCH \?= (.*)$", makefile, re.MULTILINE)
    (label_studio,) = re.findall(r"^LABEL_STUDIO \?= (.*)$", makefile, re.MULTILINE)
    assert {f'TORCH="{torch}"', f"LABEL_STUDIO={label_studio}"} <= arguments
    assert SERVICES["label-studio"]["image"].endswith(f":{label_studio.partition('==')[2]}")
    (ours,) = set(re.findall(r"label-studio-ml==[\d.]+", makefile))
    assert set(re.findall(r"label-studio-ml==[\d.]+", (ROOT / "Dockerfile").read_text())) == {ours}


def test_torch_is_for_the_cpu_unless_another_index_is_named() -> None:
    arguments = [i.value for i in STAGES["backend"].instructions if i.keyword == "ARG"]
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in arguments
    installed = next(i.value for i in STAGES["backend"].instructions if i.keyword == "RUN")
    for index, options in (("", ""), ("https://wheels", "--index-url https://wheels")):
        shown = subprocess.check_output(
            ["/bin/sh", "-c", f"pip() {{ echo $*; }}; {installed}"],
            env={"TORCH_INDEX": index, "TORCH": "torch"},
            text=True,
        )
        assert shown.split() == ["install", *options.split(), "torch"]


@pytest.mark.parametrize("target", ["backend", "label-studio"])
def test_images_run_without_rights_in_processes_that_hear_signals(target: str) -> None:
    assert final(STAGES, target, "USER") == "10001:10001"
    assert final(STAGES, target, "ENTRYPOINT") is None
    assert isinstance(json.loads(str(final(STAGES, target, "CMD"))), list)
    shown = [line for stage in chain(STAGES, target) for line in stage.instructions if line.keyword == "RUN"]
    assert shown
    assert "PIP_NO_CACHE_DIR=1" in " ".join(i.value for i in STAGES["base"].instructions)


@pytest.mark.parametrize("name", ["label-studio", "web"])
def test_images_and_compose_ask_for_health_in_the_same_way(name: str) -> None:
    check = str(final(STAGES, SERVICES[name]["build"]["target"], "HEALTHCHECK"))
    assert json.loads(check.removeprefix("CMD ")) == SERVICES[name]["healthcheck"]["test"][1:]


def test_only_what_the_package_is_made_of_is_sent_to_a_build() -> None:
    sent = build_context(ROOT)
    assert {path.parts[0] for path in sent} == {"pyproject.toml", "README.md", "constraints.txt", "model", "ml_backend"}
    assert Path("ml_backend/ui/ui.html") in sent
    tracked = subprocess.check_output(["git", "ls-files", "model", "ml_backend"], cwd=ROOT, text=True).split()
    assert set(map(str, sent)) >= set(tracked)
    assert {path.suffix for path in sent} <= {".py", ".html", ".js", ".toml", ".md", ".txt"}


@pytest.mark.slow
def test_the_steps_of_the_dockerfile_make_an_installation_that_runs_without_the_repository(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.check_dockerfile", "--libraries-from", sys.prefix]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "images")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The target backend works" in done.stdout
