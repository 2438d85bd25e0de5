"""What docker-compose.yml promises, read as Docker Compose would read it; tests/e2e/test_compose.py starts it."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.compose import ROOT, ComposeError, interpolate, load_compose, read_env_file

SECRETS = {
    "POSTGRES_PASSWORD": "letters1and2digits",
    "LABEL_STUDIO_USERNAME": "admin@example.com",
    "LABEL_STUDIO_PASSWORD": "correct horse battery",
    "LABEL_STUDIO_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "BASIC_AUTH_USER": "studio",
    "BASIC_AUTH_PASS": "a pass phrase",
}
SERVICES = ("db", "label-studio", "web", "worker")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load_compose(SECRETS)


def test_the_stack_has_these_services(compose: dict[str, Any]) -> None:
    assert tuple(compose["services"]) == SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_watched_limited_and_shut_in(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    check = service["healthcheck"]
    assert check["test"][0] == "CMD"  # no shell
    assert {"interval", "timeout", "start_period", "retries"} <= set(check)
    assert service["restart"] == "unless-stopped"
    assert service["init"] is True
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    limits = service["deploy"]["resources"]["limits"]
    assert re.fullmatch(r"\d+g", limits["memory"])
    assert limits["pids"] > 0
    assert "container_name" not in service  # it could not be scaled


def test_nobody_is_root(compose: dict[str, Any]) -> None:
    assert compose["services"]["db"]["user"] == "postgres"
    stages = re.split(r"(?m)^FROM ", (ROOT / "Dockerfile").read_text())[1:]
    users = {match[1]: stage for stage in stages if (match := re.match(r"\S+ AS (\S+)", stage))}
    for target in ("cpu", "cuda", "label-studio"):
        assert re.findall(r"(?m)^USER (.+)$", users[target]) == ["10001:10001"], target


def test_label_studio_reaches_the_backend_under_a_name_with_a_dot(compose: dict[str, Any]) -> None:
    """It sends no webhooks to names without one."""
    web, studio = compose["services"]["web"], compose["services"]["label-studio"]
    [alias] = web["networks"]["default"]["aliases"]
    assert "." in alias
    assert "default" in studio["networks"]
    assert f"http://{alias}:9090" in (ROOT / "README.md").read_text()


def test_only_label_studio_and_the_dashboard_are_published_and_on_this_machine_alone(compose: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in compose["services"].items()}
    assert ports == {
        "db": [],
        "label-studio": ["127.0.0.1:8080:8080"],
        "web": ["127.0.0.1:9090:9090"],
        "worker": [],
    }
    assert compose["networks"]["data"] == {"internal": True}
    assert compose["services"]["db"]["networks"] == ["data"]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_it_refuses_to_start_without_a_secret(name: str, value: str | None) -> None:
    given = {**SECRETS, name: value} if value is not None else {n: v for n, v in SECRETS.items() if n != name}
    with pytest.raises(ComposeError, match=f"required variable {name} is missing a value: put "):
        load_compose(given)


def test_the_example_names_every_secret_and_holds_none() -> None:
    example = read_env_file(ROOT / ".env.example")
    assert example == dict.fromkeys(SECRETS, "")
    with pytest.raises(ComposeError):
        load_compose(example)


def test_every_variable_that_compose_reads_stands_in_the_example() -> None:
    example = (ROOT / ".env.example").read_text()
    for name in ("docker-compose.yml", "docker-compose.cuda.yml"):
        for variable in re.findall(r"\$\{(\w+)", (ROOT / name).read_text()):
            assert re.search(rf"(?m)^(# )?{variable}=", example), variable


def test_workers_can_be_many_and_share_folder_and_database_with_the_web_process(compose: dict[str, Any]) -> None:
    web, worker = compose["services"]["web"], compose["services"]["worker"]
    assert web["volumes"] == worker["volumes"] == ["models:/data"]
    assert worker["environment"]["DATABASE_URL"] == web["environment"]["DATABASE_URL"]
    assert "ports" not in worker
    with_gpu = load_compose(SECRETS, "docker-compose.yml", "docker-compose.cuda.yml")["services"]["worker"]
    assert with_gpu["build"]["target"] == "cuda"
    assert with_gpu["environment"] == worker["environment"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "1"),
        ("$A-$$A", "1-$A"),
        ("${B:-2}", "2"),
        ("${E:-2}", "2"),
        ("${E-2}", ""),
        ("${B:-x${A}y}", "x1y"),
        ("${A:+there}${B:+not}", "there"),
    ],
)
def test_variables_are_replaced_as_compose_does(text: str, expected: str) -> None:
    assert interpolate(text, {"A": "1", "E": ""}) == expected


def test_what_the_image_needs_is_let_into_it() -> None:
    """Whatever the Dockerfile copies from the project's folder, .dockerignore lets through."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied: set[str] = set()
    for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text()):
        copied |= {Path(source).name for source in line.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
