"""`ray up` files against Ray's own schema and its own preparation of a cluster's configuration."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline import experiment as experiments
from pipeline import placement
from pipeline.launch import AUTOSCALING_VARIABLE
from tests.conftest import REPOSITORY

FILES = ["aws-gpu.yaml", "on-premise.yaml"]
FOLDER = REPOSITORY / "infra" / "ray-up"


def schema() -> dict[str, Any]:
    import ray.autoscaler

    return json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(read(name), schema())
    prepared = prepare_config(read(name))
    validate_config(prepared)
    kinds = prepared["available_node_types"]
    assert prepared["head_node_type"] in kinds
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) >= prepared["max_workers"] > 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "fault", [{"max_worker": 3}, {"provider": {"region": "x"}}, {"docker": {"images": "x"}}, {"max_workers": "many"}]
)
def test_rays_schema_catches_planted_faults(name: str, fault: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**read(name), **fault}, schema())


@pytest.mark.parametrize("name", FILES)
def test_ray_knows_the_options_it_is_started_with(name: str) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for commands in (read(name)["head_start_ray_commands"], read(name)["worker_start_ray_commands"]):
        words = shlex.split(commands[-1].partition("; ")[2])
        assert words[:2] == ["ray", "start"]
        assert {word.partition("=")[0] for word in words[2:]} <= known


@pytest.mark.parametrize("name", FILES)
def test_the_jobs_command_in_its_head_is_accepted(name: str) -> None:
    """Also by the check of where data and runs lie, which refuses a configuration's relative paths."""
    head = (FOLDER / name).read_text().partition("\ncluster_name")[0].replace("\\\n#", " ")
    (command,) = (line.strip("# ") for line in head.splitlines() if "metapipe submit" in line)
    _, _, job = command.partition(" train ")
    config, *options = shlex.split(job)
    assert options[::2] == ["--set"] * (len(options) // 2)
    assert placement.check_storage(experiments.load(REPOSITORY / config, options[1::2])) == []


@pytest.mark.parametrize("name", FILES)
def test_it_is_closed(name: str) -> None:
    content = read(name)
    options = content["docker"]["run_options"]
    assert {"--env=RAY_AUTH_MODE=token", "--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(options)
    assert content["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in content["head_start_ray_commands"][-1]
    assert not re.search(r"(?i)(password|secret|auth_token|access_key)\w*=", " ".join(options))


@pytest.mark.parametrize("name", FILES)
def test_jobs_wait_for_workers_exactly_where_workers_may_come(name: str) -> None:
    """Else a job on a cluster of no workers yet would be refused, or one on a full cluster would wait for ever."""
    from ray.autoscaler._private.util import prepare_config

    content = prepare_config(read(name))
    kinds = [
        kind for kind_name, kind in content["available_node_types"].items() if kind_name != content["head_node_type"]
    ]
    grows = any(kind["min_workers"] < kind["max_workers"] for kind in kinds)
    assert grows == (name == "aws-gpu.yaml")
    variables = [option for option in content["docker"]["run_options"] if AUTOSCALING_VARIABLE in option]
    assert variables == ([f"--env={AUTOSCALING_VARIABLE}=1"] if grows else [])


def test_gpu_workers_come_and_go() -> None:
    content = read("aws-gpu.yaml")
    gpu, head = content["available_node_types"]["gpu"], content["available_node_types"]["head"]
    assert gpu["resources"]["GPU"] == 1
    assert gpu["min_workers"] == 0
    assert "GPU" not in head["resources"]
    for kind in (gpu, head):
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert kind["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
