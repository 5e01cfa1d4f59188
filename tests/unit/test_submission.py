"""What travels with a job, and what is refused before one is sent. The jobs themselves: integration/test_cluster.py."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from pipeline import experiment as experiments
from pipeline import packing, placement, submission
from pipeline.errors import ClusterError, ConfigError, TrackingError
from pipeline.experiment import Experiment
from pipeline.job_environment import job_environment
from pipeline.submission import Job
from pipeline.tracking import tracking_uri

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def touch(folder: Path, *names: str, size: int = 3) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def packed(project: Path, *wanted: Path) -> set[str]:
    """Names in the package, but for this package's own."""
    package = packing.pack(project, project.parent / "job.zip", wanted=wanted)
    with zipfile.ZipFile(package.file) as archive:
        names = set(archive.namelist())
    assert names == package.names
    assert {"pipeline/submission.py", "jobs/cli.py", "pipeline/algorithms/maml.py"} <= names
    assert not [name for name in names if "__pycache__" in name]
    return {name for name in names if not name.startswith(("pipeline/", "jobs/"))}


UNWANTED = (
    ".env",
    ".git/config",
    ".venv/lib/torch.py",
    "data/shard.parquet",
    "runs/x/001/run.json",
    "mlruns/1/meta.yaml",
    "mlartifacts/1/model",
    "mlflow.db",
    "mlflow.db-wal",
    "my/__pycache__/nets.pyc",
    "my.egg-info/PKG-INFO",
    "venv/lib/torch.py",
)
WANTED = ("my.yaml", "my/nets.py", "my/data/words.txt", "pyproject.toml")


@pytest.mark.parametrize("git", [False, True])
def test_a_project_travels_without_data_environments_and_caches(tmp_path: Path, git: bool) -> None:
    project = tmp_path / "project"
    touch(project, *UNWANTED[:1], *UNWANTED[2:], *WANTED)
    expected = set(WANTED)
    if git:
        touch(project, "notes.txt")
        (project / ".gitignore").write_text("notes.txt\n")
        subprocess.run(["git", "init", "-q", project], check=True)
    else:
        touch(project, UNWANTED[1])
    assert packed(project) == expected


def test_what_is_wanted_travels_wherever_it_lies(tmp_path: Path) -> None:
    project = tmp_path / "project"
    touch(project, "data/my.yaml", "a.py")
    touch(tmp_path / "elsewhere", "x.yaml")
    assert packed(project, project / "data/my.yaml", tmp_path / "elsewhere/x.yaml") == {
        "a.py",
        "data/my.yaml",
        "submitted/x.yaml",
    }


def test_the_checkout_itself_travels_without_tests(tmp_path: Path) -> None:
    package = packing.pack(CONFIGS.parent, tmp_path / "job.zip")
    assert {"configs/smoke.yaml", "pyproject.toml", "pipeline/launch.py"} <= package.names
    assert not [name for name in package.names if name.startswith(("tests", "infra", ".", "data", "runs"))]


def test_the_same_content_is_the_same_package(tmp_path: Path) -> None:
    project = tmp_path / "project"
    touch(project, "a.py", "b.py")
    first = packing.pack(project, tmp_path / "1.zip").file.read_bytes()
    touch(project, "a.py")  # another time of change
    assert packing.pack(project, tmp_path / "2.zip").file.read_bytes() == first


def test_a_large_project_is_refused_and_the_large_folders_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    touch(project, "corpus/english/a.bin", "corpus/english/b.bin", size=2_000_000)
    touch(project, "small.py")
    monkeypatch.setattr(packing, "LIMIT_BYTES", 3_000_000)
    with pytest.raises(ConfigError, match=r"most are in corpus/english \(3\.8 MiB\)"):
        packing.pack(project, tmp_path / "job.zip")
    monkeypatch.setattr(packing, "LIMIT_BYTES", 2**30)
    monkeypatch.setattr(packing, "LIMIT_FILES", 10)
    with pytest.raises(ConfigError, match="more than the 10 files"):
        packing.pack(project, tmp_path / "job.zip")
    assert not (tmp_path / "job.zip").exists()


def test_a_project_cannot_have_rooms_under_our_names(tmp_path: Path) -> None:
    touch(tmp_path / "project", "jobs/mine.py")
    with pytest.raises(ConfigError, match=r"project/jobs: .*Rename the folder"):
        packing.pack(tmp_path / "project", tmp_path / "job.zip")


# the environment


def test_only_harmless_variables_travel_by_themselves() -> None:
    here = {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MLFLOW_TRACKING_PASSWORD": "hidden",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "AWS_REGION": "eu-central-1",
        "RAY_AUTH_TOKEN": "hidden",
        "HOME": "/home/me",
        "METAPIPE_DEBUG": "",
    }
    assert job_environment([], here) == {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "AWS_REGION": "eu-central-1"}
    given = ["MLFLOW_TRACKING_URI=http://other:5000", "HOME"]
    assert job_environment(given, here) == {
        "MLFLOW_TRACKING_URI": "http://other:5000",
        "AWS_REGION": "eu-central-1",
        "HOME": "/home/me",
    }


@pytest.mark.parametrize(
    "name",
    [
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "RAY_AUTH_TOKEN",
        "my_api_key",
        "DB_PWD",
        "BASIC_AUTH",
        "SSH_PRIVATE",
    ],
)
def test_what_looks_like_a_secret_is_refused_unless_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="dashboard") as refusal:
        job_environment([f"{name}=hunter2"], {})
    assert "hunter2" not in str(refusal.value)
    assert job_environment([f"{name}=hunter2"], {}, allow_secrets=True) == {name: "hunter2"}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "AUTHOR", "KEYBOARD", "MONKEY_BARS"])
def test_harmless_names_are_not_taken_for_secrets(name: str) -> None:
    assert job_environment([f"{name}=4"], {}) == {name: "4"}


def test_addresses_with_passwords_are_refused() -> None:
    for given, here in (
        ([], {"MLFLOW_TRACKING_URI": "https://me:hunter2@mlflow:5000"}),
        (["DATABASE=postgresql://me:hunter2@db/mlflow"], {}),
    ):
        with pytest.raises(ConfigError, match="a user and a password in it") as refusal:
            job_environment(given, here)
        assert "hunter2" not in str(refusal.value)


def test_env_that_is_no_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="--env NOTHING: is not set here"):
        job_environment(["NOTHING"], {})
    with pytest.raises(ConfigError, match="write it as NAME=VALUE"):
        job_environment(["a b=1"], {})


# places


def experiment(*overrides: str) -> Experiment:
    return experiments.load(CONFIGS / "smoke.yaml", overrides)


def test_relative_places_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"task.data=data/glyphs: .*--set task.data=s3://BUCKET/glyphs"):
        placement.check_storage(experiment("tracking.runs=/shared/runs"))
    with pytest.raises(ConfigError, match=r"tracking.runs=runs: .*--set tracking.runs=/SHARED/runs"):
        placement.check_storage(experiment("task.data=/shared/glyphs"))
    remarks = placement.check_storage(experiment("task.data=/shared/glyphs", "tracking.runs=s3://bucket/runs"))
    assert remarks == ["task.data=/shared/glyphs: every node has to see it under this path"]


@pytest.mark.parametrize(
    ("place", "refused"),
    [
        ("http://localhost:8000/glyphs", True),
        ("https://127.0.0.1/glyphs", True),
        ("http://127.8.9.1:80/glyphs/", True),
        ("http://[::1]:8000/glyphs", True),
        ("http://0.0.0.0:8000/glyphs", True),
        ("http://data.localhost/glyphs", True),
        ("https://data.example.org/localhost", False),
        ("http://10.0.0.7:8000/glyphs", False),
        ("s3://localhost/glyphs", False),  # a bucket
        ("/shared/localhost", False),
    ],
)
def test_data_from_this_machines_own_web_server_is_refused(place: str, refused: bool) -> None:
    alone = experiment(f"task.data={place}")
    content = alone.to_dict()
    mixed = {**content["task"], "data": "/shared/other"}
    content["task"] = {
        "family": "mixture",
        "sets": [{"name": "a", "task": mixed}, {"name": "b", "task": content["task"]}],
    }
    for given, key in (
        (alone, r"task\.data"),
        (experiments.from_dict(content, source="test"), r"task\.sets\[1\]\.task\.data"),
    ):
        placement.check_data_servers(given, same_network=True)
        if refused:
            with pytest.raises(
                ConfigError, match=f"^{key}=.*each of the cluster's nodes that node itself.*s3://BUCKET/glyphs"
            ):
                placement.check_data_servers(given, same_network=False)
        else:
            placement.check_data_servers(given, same_network=False)


def network(folder: str, **also: str) -> Experiment:
    content = experiment().to_dict()
    content["model"] = {"name": "module", "factory": "my.nets:make", "folder": folder, **also}
    return experiments.from_dict(content, source="test")


def test_a_network_of_the_users_own_travels_with_its_package(tmp_path: Path) -> None:
    project = tmp_path / "project"
    touch(project, "data/code/my/__init__.py", "data/code/my/nets.py", "data/code/my/weights.bin")
    found = placement.network_files(network("data/code"), project)
    assert found == [project / "data/code/my/__init__.py", project / "data/code/my/nets.py"]
    assert placement.network_files(network("."), project) == []  # installed
    with pytest.raises(ConfigError, match=r"--set model\.folder=data/code"):
        placement.network_files(network(str(project / "data/code")), project)
    with pytest.raises(ConfigError, match="submit from a folder above it"):
        placement.network_files(network("../data/code"), project / "configs")
    assert placement.network_files(network(str(project / "data/code")), tmp_path / "other") == []  # on shared storage


@pytest.mark.parametrize("key", ["training.init_from", "model.vectors", "model.weights"])
def test_files_to_start_from_travel_where_their_path_is_relative(tmp_path: Path, key: str) -> None:
    touch(tmp_path / "project", "given/start.safetensors", "runs/earlier/config.yaml")
    touch(tmp_path, "elsewhere.safetensors")

    def starts_from(place: str) -> list[Path]:
        content = experiment().to_dict()
        section, name = key.split(".")
        model = {"init_from": {}, "vectors": {"name": "text"}, "weights": {"name": "torchvision"}}[name]
        content["model"] = model or content["model"]
        if name == "weights":
            content["model"] |= {"architecture": "resnet18"}
        content[section][name] = place
        return placement.starting_files(experiments.from_dict(content, source="test"), tmp_path / "project")

    assert starts_from("given/start.safetensors") == [tmp_path / "project/given/start.safetensors"]
    assert starts_from("/anywhere/start.safetensors") == []
    assert starts_from("s3://bucket/start.safetensors") == []
    for wrong in ("../elsewhere.safetensors", "given/none.safetensors"):
        with pytest.raises(ConfigError, match=f"{key}={wrong}: it is no file of this folder.*which travels"):
            starts_from(wrong)
    if key == "training.init_from":
        assert starts_from("models:/earlier@champion") == []
        with pytest.raises(ConfigError, match=r"init_from=runs/earlier: it is a folder, which does not travel"):
            starts_from("runs/earlier")


def test_a_command_that_trains_by_itself_asks_for_what_it_needs() -> None:
    assert placement.driver_resources(experiment("training.backend=ray", "training.num_workers=2")) == {}
    here = experiment("training.backend=processes", "training.num_workers=2", "training.cpus_per_worker=2")
    assert placement.driver_resources(here) == {"cpus": 4, "gpus": 0}


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000", True),
        ("MLFLOW_TRACKING_URI", "http://localhost:5000", True),
        ("MLFLOW_TRACKING_URI", "http://[::1]:5000", True),
        ("MLFLOW_TRACKING_URI", "http://0.0.0.0:5000", True),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000", True),
        ("MLFLOW_TRACKING_URI", "sqlite:////shared/mlflow.db", True),
        ("MLFLOW_TRACKING_URI", "mlruns", True),
        ("MLFLOW_TRACKING_URI", "http://mlflow:5000", False),
        ("MLFLOW_TRACKING_URI", "databricks", False),
        ("AWS_REGION", "eu-central-1", False),
    ],
)
def test_addresses_that_mean_something_else_there_are_refused(name: str, value: str, refused: bool) -> None:
    if refused:
        with pytest.raises(TrackingError, match=name):
            placement.check_addresses({name: value}, same_files=False, same_network=False)
    else:
        placement.check_addresses({name: value}, same_files=False, same_network=False)


def test_a_head_on_this_machine_may_use_its_loopback_and_files() -> None:
    for value, fits in (
        ("http://127.0.0.1:5000", True),
        ("sqlite:////home/me/mlflow.db", True),
        ("sqlite:///mlflow.db", False),  # relative to the job's own folder
    ):
        environment = {"MLFLOW_TRACKING_URI": value}
        if fits:
            placement.check_addresses(environment, same_files=True, same_network=True)
        else:
            with pytest.raises(TrackingError):
                placement.check_addresses(environment, same_files=True, same_network=True)


def test_servers_that_do_not_answer_are_refused_quickly() -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"no MLflow server answers .*--no-check"):
        placement.check_answers({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    with pytest.raises(ClusterError, match="no Ray job server answers"):
        submission.Cluster("http://127.0.0.1:9")
    assert time.monotonic() - began < 30


def test_a_job_without_a_tracking_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri().startswith("sqlite:///")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as Ray has it in a job
    with pytest.raises(TrackingError, match="in the environment of the cluster's nodes"):
        tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri() == "http://mlflow:5000"


# the cluster


def test_the_address_given_goes_before_the_environments() -> None:
    here = {"RAY_API_SERVER_ADDRESS": "http://a:8265", "RAY_ADDRESS": "http://b:8265"}
    assert submission.server_address("https://head:8265/", here) == "https://head:8265"
    assert submission.server_address(None, here) == "http://a:8265"
    assert submission.server_address(None, {"RAY_ADDRESS": "http://b:8265"}) == "http://b:8265"
    with pytest.raises(ConfigError, match="which cluster"):
        submission.server_address(None, {"RAY_ADDRESS": "head:6379"})  # of the cluster, not of its job server
    for wrong in ("ray://head:10001", "head:6379", "auto", "http://head:port", "http://"):
        with pytest.raises(ConfigError, match="not the address of a job server"):
            submission.server_address(wrong, {})
    with pytest.raises(ConfigError, match="password") as refusal:
        submission.server_address("http://me:hunter2@head:8265", {})
    assert "hunter2" not in str(refusal.value)


def test_a_log_that_is_told_again_is_written_once() -> None:
    written: list[str] = []
    log = submission.Once(written.append)
    for connection in (["one\n", "two\n"], ["on", "e\ntwo\nth"], [], ["one\ntwo\nthree\n", "four\n"]):
        log.begin()
        for chunk in connection:
            log.take(chunk)
    assert "".join(written) == "one\ntwo\nthree\nfour\n"


def test_which_addresses_are_this_machines_own() -> None:
    assert submission.is_own_address("127.0.0.1")
    assert submission.is_own_address("localhost")
    assert not submission.is_own_address("192.0.2.1")  # kept for documentation, nobody's


@pytest.mark.parametrize(
    ("status", "driver", "exit_code"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
        ("STOPPED", None, 3),
    ],
)
def test_a_jobs_exit_code(status: str, driver: int | None, exit_code: int | None) -> None:
    job = Job("raysubmit_1", status, "train x.yaml", "", 1.0, 2.0, driver)
    assert job.exit_code == exit_code
    assert job.ended == (exit_code is not None)


def test_only_train_and_tune_are_submitted_and_only_with_their_own_options() -> None:
    def answer(*words: str) -> str:
        command = [sys.executable, "-m", "jobs.cli", "submit", "--address", "http://127.0.0.1:9", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())

    assert "choose one of train" in answer("data", "verify", "x")
    assert "No such option: --frsh" in answer("train", "configs/smoke.yaml", "--frsh")
    assert "training.stepz" in answer("train", "configs/smoke.yaml", "--set", "training.stepz=1")
    assert "task.data=data/glyphs" in answer("train", "configs/smoke.yaml", "--follow")
    assert "task.data=data/glyphs" in answer("tune", "configs/tune/smoke.yaml")
    assert "algorithm.inner_rl" in answer("tune", "configs/tune/smoke.yaml", "--set", "algorithm.inner_rl=1")
