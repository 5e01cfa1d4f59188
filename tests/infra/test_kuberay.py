"""The Kubernetes manifests against KubeRay's own custom resource definitions, and the rules of a safe default."""

from __future__ import annotations

import copy
import functools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline import experiment as experiments
from pipeline import sweep as sweeps
from pipeline.launch import AUTOSCALING_VARIABLE
from tests.conftest import REPOSITORY

KUBERAY = REPOSITORY / "infra" / "kuberay"
OVERLAYS = sorted(folder.name for folder in (KUBERAY / "overlays").iterdir())
CRDS = REPOSITORY.parent / "shared" / "data" / "kuberay-crds"
SECRET = re.compile(r"(?i)password|secret|token|access_key|username")


def strict(schema: Any) -> Any:
    """A CRD's schema with unknown fields refused, as the API server prunes or refuses them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        keeps = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
        if not keeps:
            made["additionalProperties"] = False
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


@functools.cache
def schema_of(kind: str) -> dict[str, Any]:
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"KubeRay's custom resource definitions are not at {CRDS}")
    crd = yaml.safe_load(file.read_text())
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1" and v["served"])
    root = strict(version["schema"]["openAPIV3Schema"])
    root["properties"]["metadata"] = {"type": "object"}
    return root


@functools.cache
def pod_template() -> dict[str, Any]:
    """Kubernetes' own schema of a pod template, as the RayCluster's definition has it."""
    return schema_of("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]


def errors(schema: dict[str, Any], content: Any) -> list[str]:
    return [f"{e.json_path}: {e.message}" for e in Draft202012Validator(schema).iter_errors(content)]


@functools.cache
def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    """What an overlay applies. Needs kustomize, alone or in kubectl."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        pytest.skip("neither kustomize nor kubectl is on the PATH")
    done = subprocess.run([*command, str(KUBERAY / "overlays" / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def documents() -> list[tuple[Path, dict[str, Any]]]:
    """Every manifest as it lies in the checkout."""
    files = [file for file in sorted((KUBERAY / "base").rglob("*.yaml")) if file.name != "kustomization.yaml"]
    return [(file, content) for file in files for content in yaml.safe_load_all(file.read_text())]


def source(kind: str) -> dict[str, Any]:
    (content,) = (content for _, content in documents() if content["kind"] == kind)
    return content


def pod_specs(content: Any) -> Iterator[dict[str, Any]]:
    """The specs of all pod templates within."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("template", "submitterPodTemplate") and "spec" in value:
                yield value["spec"]
            yield from pod_specs(value)
    elif isinstance(content, list):
        for item in content:
            yield from pod_specs(item)


def test_the_custom_resources_are_valid_as_they_lie() -> None:
    cluster = source("RayCluster")
    assert errors(schema_of("RayCluster"), cluster) == []
    jobs = [content for _, content in documents() if content["kind"] == "RayJob"]
    assert {job["metadata"]["name"] for job in jobs} == {"metapipe-train", "metapipe-tune"}
    for job in jobs:
        whole = {**job, "spec": {**job["spec"], "rayClusterSpec": cluster["spec"]}}
        assert errors(schema_of("RayJob"), whole) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rendered_overlays_are_valid(overlay: str) -> None:
    for content in rendered(overlay):
        if content["apiVersion"] == "ray.io/v1":
            assert errors(schema_of(content["kind"]), content) == []
        assert content["kind"] == "Namespace" or content["metadata"]["namespace"] == "metapipe"
        if content["kind"] == "Deployment":
            assert errors(pod_template(), content["spec"]["template"]) == []


def test_the_schema_catches_planted_faults() -> None:
    cluster = source("RayCluster")

    def planted(path: list[Any], value: Any) -> list[str]:
        content = copy.deepcopy(cluster)
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return errors(schema_of("RayCluster"), content)

    worker = ["spec", "workerGroupSpecs", 0]
    assert planted(["spec", "workerGroupSpec"], []) != []  # unknown
    assert planted(["spec", "authOptions", "mode"], "tokens") != []
    assert planted([*worker, "maxReplicas"], "4") != []
    assert planted([*worker, "template", "spec", "containers", 0, "volumeMount"], []) != []
    assert planted([*worker, "template", "spec", "containers", 0, "name"], 3) != []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_hold_what_their_names_say(overlay: str) -> None:
    kinds = [content["kind"] for content in rendered(overlay)]
    is_job = overlay.startswith(("train", "tune"))
    assert kinds.count("RayJob") == is_job
    assert kinds.count("RayCluster") == kinds.count("Deployment") == (not is_job)
    (ray,) = (content for content in rendered(overlay) if content["kind"] in ("RayCluster", "RayJob"))
    cluster = ray["spec"]["rayClusterSpec"] if is_job else ray["spec"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "metapipe-ray"}
    assert ("gcsFaultToleranceOptions" in cluster) == (overlay == "gpu-fault-tolerant")
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    on_gpu = "gpu" in overlay
    assert worker["image"] == ("metapipe:cuda" if on_gpu else "metapipe:cpu")
    assert worker["resources"]["limits"].get("nvidia.com/gpu") == ("1" if on_gpu else None)
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["image"] == worker["image"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


def settings() -> dict[str, str]:
    """The variables of settings.env, which become the ConfigMap metapipe-settings."""
    lines = (KUBERAY / "base" / "cluster" / "settings.env").read_text().splitlines()
    return dict(line.partition("=")[::2] for line in lines if line and not line.startswith("#"))


def clusters(content: Any) -> Iterator[dict[str, Any]]:
    """The specs of all Ray clusters within."""
    if isinstance(content, dict):
        if "workerGroupSpecs" in content:
            yield content
        for value in content.values():
            yield from clusters(value)


def where_jobs_would_be_refused(cluster: dict[str, Any], variables: dict[str, str]) -> list[str]:
    """Containers of a cluster that may have fewer workers than it can get, and that don't know that more can come.

    variables: those of metapipe-settings. A job's driver inherits the head's environment, its trials the workers'.
    """
    groups = cluster["workerGroupSpecs"]
    if not cluster.get("enableInTreeAutoscaling"):
        return []
    if all(group["minReplicas"] == group["maxReplicas"] for group in groups):
        return []
    found = []
    for spec in pod_specs(cluster):
        for container in spec["containers"]:
            maps = [entry.get("configMapRef", {}).get("name") for entry in container.get("envFrom", [])]
            environment = variables if "metapipe-settings" in maps else {}
            environment = environment | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}
            if environment.get(AUTOSCALING_VARIABLE) != "1":
                found.append(container["name"])
    return found


def test_jobs_wait_for_workers_that_are_not_there_yet() -> None:
    cluster = source("RayCluster")["spec"]
    assert where_jobs_would_be_refused(cluster, settings()) == []
    assert where_jobs_would_be_refused(cluster, {}) == ["ray-head", "ray-worker"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_of_every_overlay_wait_for_workers(overlay: str) -> None:
    contents = rendered(overlay)
    maps = [content for content in contents if content["kind"] == "ConfigMap"]
    variables = maps[0]["data"] if maps else settings()  # of the standing cluster, beside which the job runs
    (cluster,) = (cluster for content in contents for cluster in clusters(content))
    assert where_jobs_would_be_refused(cluster, variables) == []


def ends_of_workers(cluster: dict[str, Any]) -> Iterator[tuple[list[str], int]]:
    """What each worker's pod does before SIGTERM, and how many seconds it has for that and its end."""
    for group in cluster["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        for container in spec["containers"]:
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
            yield hook.get("command", []), spec["terminationGracePeriodSeconds"]


def assert_workers_are_drained(cluster: dict[str, Any]) -> None:
    copied = [line.split() for line in (REPOSITORY / "infra" / "docker" / "Dockerfile").read_text().splitlines()]
    in_image = {words[2]: words[1] for words in copied if words[:1] == ["COPY"] and len(words) == 3}
    for command, grace in ends_of_workers(cluster):
        python, script, option, seconds = command
        assert python == "python"
        assert (REPOSITORY / in_image[script]).name == "drain_node.py"
        assert option == "--seconds"
        assert int(seconds) + 20 <= grace  # Ray's own end comes after it
    for spec in pod_specs(cluster["headGroupSpec"]):
        assert not any("lifecycle" in container for container in spec["containers"])  # its end is the cluster's


def test_workers_write_a_checkpoint_before_their_pod_ends() -> None:
    """SIGTERM is too late for it: Ray ends workers at once."""
    assert_workers_are_drained(source("RayCluster")["spec"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_of_every_overlay_write_a_checkpoint_before_their_pod_ends(overlay: str) -> None:
    (cluster,) = (cluster for content in rendered(overlay) for cluster in clusters(content))
    assert_workers_are_drained(cluster)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_more_rights_than_they_need(overlay: str) -> None:
    """Kubernetes' `restricted` standard, which the namespace enforces."""
    found = [spec for content in rendered(overlay) for spec in pod_specs(content)]
    assert len(found) == 3  # head, worker; MLflow or the submitter
    for spec in found:
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 1000  # the image's
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in security
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
            if container["name"] in ("ray-head", "ray-worker"):
                assert not {"livenessProbe", "readinessProbe", "startupProbe"} & set(container)  # KubeRay's


def secrets_asked_for(content: Any) -> Iterator[tuple[str, str]]:
    """(secret, key) of every reference; key "" for a whole secret."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "secretKeyRef":
                yield value["name"], value["key"]
            elif key == "secretRef":
                yield value["name"], ""
            elif key == "secretName":
                yield value, "auth_token"
            else:
                yield from secrets_asked_for(value)
    elif isinstance(content, list):
        for item in content:
            yield from secrets_asked_for(item)


def env_entries(content: Any) -> Iterator[dict[str, Any]]:
    for spec in pod_specs(content):
        for container in spec["containers"]:
            yield from container.get("env", [])


def test_secrets_come_by_reference_only() -> None:
    everything = [content for overlay in OVERLAYS for content in rendered(overlay)]
    assert "Secret" not in {content["kind"] for content in everything}
    entries = [entry for content in everything for entry in env_entries(content)]
    secret = [entry for entry in entries if SECRET.search(entry["name"])]
    assert len(secret) >= 4
    assert all(set(entry.get("valueFrom", {})) == {"secretKeyRef"} for entry in secret)
    settings = (KUBERAY / "base" / "cluster" / "settings.env").read_text()
    assert not SECRET.search(settings)


def test_the_readme_makes_every_secret_that_is_asked_for() -> None:
    readme = (REPOSITORY / "infra" / "README.md").read_text()
    commands = readme.replace("\\\n", " ").splitlines()
    made = {m[1]: line for line in commands if (m := re.search(r"create secret generic (\S+)", line))}
    asked_for = {pair for overlay in OVERLAYS for content in rendered(overlay) for pair in secrets_asked_for(content)}
    assert {name for name, _ in asked_for} == set(made)
    for name, key in asked_for:
        assert f"--from-literal={key}" in made[name], (name, key)


def test_ray_is_the_version_that_is_installed() -> None:
    constraints = (REPOSITORY / "infra" / "constraints.txt").read_text()
    assert f"\nray=={source('RayCluster')['spec']['rayVersion']}\n" in constraints


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith(("train", "tune"))])
def test_the_jobs_commands_are_accepted(overlay: str) -> None:
    (job,) = (content for content in rendered(overlay) if content["kind"] == "RayJob")
    program, command, config, *options = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("metapipe", overlay.partition("-")[0])
    assert options[::2] == ["--set"] * (len(options) // 2)
    file = REPOSITORY / config.removeprefix("/opt/metapipe/")
    load = experiments.load if command == "train" else lambda *words: sweeps.load(*words).base
    experiment = load(file, options[1::2])
    assert experiment.tracking.runs.startswith("s3://metapipe/")
    assert experiment.training.use_gpu == ("gpu" in overlay)
