"""The compose files against the compose specification's own schema, and the rules of a safe default."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.conftest import REPOSITORY

COMPOSE = REPOSITORY / "infra" / "compose"
FILES = [COMPOSE / "compose.yaml", COMPOSE / "gpu.yaml", REPOSITORY / "infra" / "monitoring" / "compose.yaml"]
ENV = COMPOSE / ".env.example"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SECRET = re.compile(r"(?i)password|secret|token|access_key")
ONCE = {"prepare"}
GIVE_UP_ROOT_THEMSELVES = {"postgres", "s3", "prometheus", "grafana"}  # images of others


class Unset(Exception):
    """A variable that compose would stop at."""


def example() -> dict[str, str]:
    """.env.example's variables that are not commented out."""
    lines = [line for line in ENV.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.partition("=")[::2] for line in lines)


def filled() -> dict[str, str]:
    return {name: value or f"value-of-{name}" for name, value in example().items()}


def interpolated(text: str, env: dict[str, str]) -> str:
    """Variables replaced as compose does it. Raises Unset."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        found = env.get(name, "")
        if operator == "?" and not found:
            raise Unset(f"{name} {rest}")
        return found or (rest if operator == "-" else "")

    return VARIABLE.sub(value, text)


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(interpolated(file.read_text(), filled()))


@functools.cache
def services() -> dict[str, dict[str, Any]]:
    """Of the two files that have whole services."""
    return read(FILES[0])["services"] | read(FILES[2])["services"]


@functools.cache
def validator() -> Draft202012Validator:
    package = importlib.util.find_spec("check_jsonschema")
    if package is None:
        pytest.skip("check-jsonschema, which ships the compose specification's schema, is not installed (make setup)")
    vendored = Path(str(package.origin)).parent / "builtin_schemas" / "vendor"
    return Draft202012Validator(json.loads((vendored / "compose-spec.json").read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_compose_specification_accepts_it(file: Path) -> None:
    errors = [f"{e.json_path}: {e.message}" for e in validator().iter_errors(read(file))]
    assert errors == []


@pytest.mark.parametrize(
    "fault",
    [
        {"healthcheck": {"test": ["CMD", "true"], "intervall": "5s"}},
        {"depends_on": {"s3": {"condition": "service_ready"}}},
        {"environment": [{"A": "b"}]},
        {"imagge": "x"},
    ],
)
def test_the_schema_catches_planted_faults(fault: dict[str, Any]) -> None:
    content = read(FILES[0])
    content["services"]["mlflow"] |= fault
    assert not validator().is_valid(content)


def test_an_empty_secret_stops_it_with_its_name() -> None:
    text = "".join(file.read_text() for file in FILES)
    asked_for = {name for name, operator, _ in VARIABLE.findall(text) if operator == "?"}
    assert asked_for | {"RAY_AUTH_TOKEN"} == set(example())
    assert all(value == "" for value in example().values())  # an example has no secret that someone could keep
    interpolated(text, filled())
    for name in asked_for:
        with pytest.raises(Unset, match=f"^{name} is not set in infra/compose/.env"):
            interpolated(text, filled() | {name: ""})


def test_no_secret_is_written_out_or_has_a_default() -> None:
    for file in FILES:
        for line in file.read_text().splitlines():
            name, colon, value = line.split("#")[0].strip().partition(": ")
            if colon and SECRET.search(name) and value and name != "secrets":
                assert re.fullmatch(r"\$\{\w+:\?[^}]*\}", value) or value == "RAY_AUTH_TOKEN", line


def test_nothing_listens_beyond_loopback() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert sorted(port.split(":")[-1] for port in published) == ["3000", "5000", "7070", "8265", "9090"]
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in published)
    assert not any({"network_mode", "privileged", "pid"} & set(service) for service in services().values())
    assert "ports" not in services()["postgres"]
    assert services()["postgres"]["networks"] == ["database"]
    assert read(FILES[0])["networks"]["database"] == {"internal": True}


def test_every_image_is_pinned() -> None:
    for name, service in services().items():
        tag = service["image"].rpartition(":")[2]
        assert "build" in service or re.search(r"\d+\.\d+", tag), (name, service["image"])


def test_services_wait_for_healthy_ones() -> None:
    for name, service in services().items():
        assert ("healthcheck" in service) == (name not in ONCE), name
        for needed, how in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if needed in ONCE else "service_healthy"
            assert how["condition"] == expected, (name, needed)
    assert services()["ray-worker"]["deploy"]["replicas"] == 2


def test_services_have_no_more_rights_than_they_need() -> None:
    for name, service in services().items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "user" not in service, name  # the image's own, which is not root
        assert ("build" in service) == (name not in GIVE_UP_ROOT_THEMSELVES), name
        assert name == "postgres" or "cap_add" not in service, name


def test_ray_asks_for_its_token_and_mlflow_for_a_user() -> None:
    ray = [service for service in services().values() if service.get("command", [""])[0] == "ray"]
    assert len(ray) == 2
    for service in ray:
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"] == "value-of-RAY_AUTH_TOKEN"
        assert not any("ADMIN" in variable for variable in service["environment"])
    assert services()["mlflow"]["command"] == ["/opt/metapipe/infra/mlflow/serve.sh"]
    assert services()["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


def test_ray_knows_the_options_it_is_started_with() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for service in services().values():
        if service.get("command", [""])[0] == "ray":
            assert service["command"][:2] == ["ray", "start"]
            assert {word.partition("=")[0] for word in service["command"][2:]} <= known


def test_what_is_mounted_exists() -> None:
    volumes = set(read(FILES[0])["volumes"]) | set(read(FILES[2])["volumes"])
    for service in services().values():
        for volume in service.get("volumes", []):
            source, _, rest = volume.partition(":")
            if source.startswith("."):
                assert (COMPOSE / source).exists(), source
                assert rest.endswith(":ro"), volume
            else:
                assert source in volumes, source


def refused_secrets(files: list[dict[str, Any]]) -> list[str]:
    """Services that compose would not start: one that is read-only can be given a file as a secret and nothing else."""
    found = []
    for kind in ("secrets", "configs"):
        sources = {name: source for file in files for name, source in file.get(kind, {}).items()}
        for file in files:
            for name, service in file["services"].items():
                given = [entry if isinstance(entry, str) else entry["source"] for entry in service.get(kind, [])]
                if service.get("read_only") and any({"environment", "content"} & set(sources[item]) for item in given):
                    found.append(name)
    return found


def test_no_read_only_service_is_given_a_secret_from_the_environment() -> None:
    contents = [read(file) for file in FILES]
    assert refused_secrets(contents) == []
    contents[2]["services"]["prometheus"]["read_only"] = True  # a planted fault
    assert refused_secrets(contents) == ["prometheus"]


def test_these_are_all_compose_files() -> None:
    assert set(FILES) == {file for file in (REPOSITORY / "infra").rglob("*.y*ml") if "services" in top_keys(file)}


def top_keys(file: Path) -> set[str]:
    return set(re.findall(r"^(\w+):", file.read_text(), re.MULTILINE))


SERVE = {
    "PGHOST": "127.0.0.1",
    "PGDATABASE": "m",
    "PGUSER": "u",
    "PGPASSWORD": "p",
    "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "a long one of a test",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "k",
    "MLFLOW_ARTIFACTS_DESTINATION": "s3://b/m",
}


@pytest.mark.parametrize("missing", sorted(SERVE))
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "unset"])
def test_the_mlflow_server_starts_with_nothing_left_out(missing: str, empty: bool) -> None:
    env = {**SERVE, "PATH": os.environ["PATH"]}
    env.pop(missing)
    if empty:
        env[missing] = ""
    done = subprocess.run(["infra/mlflow/serve.sh"], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"{missing}: is not set" in done.stderr


def test_compose_and_the_example_give_the_mlflow_server_all_it_asks_for() -> None:
    assert set(SERVE) <= set(services()["mlflow"]["environment"])
    lines = (REPOSITORY / "infra" / "mlflow" / "server.env.example").read_text().splitlines()
    values = dict(line.partition("=")[::2] for line in lines if line and not line.startswith("#"))
    assert set(SERVE) <= set(values)
    assert {name for name, value in values.items() if not value} == {name for name in values if SECRET.search(name)}
