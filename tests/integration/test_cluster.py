"""A real cluster of two nodes with their own addresses, an MLflow server beside it, jobs submitted from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from pipeline import experiment as experiments
from pipeline import launch
from pipeline.runs import JOURNAL_FILE, RunFolder, open_run
from pipeline.training import journal
from tests.servers import mlflow_server, network, postgres, ray_nodes

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 6
NETWORK = """
from torch import nn
from {package}.layers import activation

def make_net(width):
    return nn.Sequential(nn.Linear(1, width), activation(), nn.Linear(width, 1))
"""


@dataclass
class Site:
    """The cluster as its users see it, from a machine that is none of its nodes."""

    cluster: ray_nodes.Cluster
    tracking: mlflow_server.MlflowServer
    admin: mlflow_server.Account
    project: Path

    def environment(self, **changes: str | None) -> dict[str, str]:
        ours = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))},
            **self.cluster.env(),
            "RAY_ADDRESS": self.cluster.address,
            "MLFLOW_TRACKING_URI": self.tracking.url,
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(self.project),  # no token of somebody's own
            **changes,
        }
        return {k: v for k, v in ours.items() if v is not None}

    def start(self, *words: object, **changes: str | None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
        return subprocess.Popen(
            command,
            cwd=self.project,
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def metapipe(self, *words: object, **changes: str | None) -> Answer:
        process = self.start(*words, **changes)
        try:
            out, err = process.communicate(timeout=150)
        finally:
            process.kill()
        answer = Answer(process.returncode, out, err)
        assert self.cluster.token not in out + err
        assert self.admin.password not in out + err
        assert "Traceback" not in out + err, err
        return answer

    def state(self, what: str) -> list[dict]:
        """Ray's own account of its actors or nodes."""
        request = urllib.request.Request(
            f"{self.cluster.address}/api/v0/{what}?limit=1000",
            headers={"Authorization": f"Bearer {self.cluster.token}"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)["data"]["result"]["result"]


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = network.why_not()
    if reason is not None:
        pytest.skip(reason)
    admin = mlflow_server.Account()
    store = None  # sqlite
    if postgres.why_not() is None:
        store = request.getfixturevalue("postgres_server").create_database("mlflow_cluster")
    folder = tmp_path_factory.mktemp("mlflow")
    with (
        network.running(machines=2) as net,
        mlflow_server.running(folder, host=net.outside, backend_store=store, admin=admin) as tracking,
        # who may write to MLflow is a secret, so the nodes have it; where it is comes with the job
        ray_nodes.running(
            net.machines,
            env={k: v for k, v in tracking.env(admin).items() if k != "MLFLOW_TRACKING_URI"},
        ) as cluster,
    ):
        yield Site(cluster, tracking, admin, _project(tmp_path_factory.mktemp("project")))


def _project(folder: Path) -> Path:
    """A user's own: a configuration, a network in a package, data that must not travel."""
    package = folder / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "layers.py").write_text("from torch.nn import Tanh as activation\n")
    (package / "nets.py").write_text(NETWORK.format(package="my_package"))
    (folder / "data").mkdir()
    (folder / "data" / "large.bin").write_bytes(os.urandom(4_000_000))
    (folder / "my.yaml").write_text(yaml.safe_dump(_content(folder)))
    return folder


def _content(folder: Path, **training: object) -> dict:
    return {
        "name": "own-net",
        "task": {"family": "sinusoid", "k_shot": 5, "n_query": 5, "eval_k_shot": 5, "eval_n_query": 10},
        "model": {"name": "module", "factory": "my_package.nets:make_net", "arguments": {"width": 16}},
        "algorithm": {"name": "maml", "inner_lr": 0.01},
        "training": {
            "steps": STEPS,
            "meta_batch_size": 8,
            "validate_every": 3,
            "dtype": "float64",
            "backend": "ray",
            "num_workers": 2,
            **training,
        },
        "evaluation": {"validation_episodes": 5, "test_episodes": 5, "promotion_episodes": 5},
        "tracking": {"runs": str(folder / "shared" / "runs")},
    }


def test_two_nodes_train_and_register_what_was_submitted_from_outside(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = site.metapipe("submit", "train", "my.yaml", "--set", "seed=3", "--follow", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["status"] == "SUCCEEDED"
    assert answer.json["command"] == "train my.yaml --set seed=3"
    assert answer.json["package"]["bytes"] < 4_000_000  # without the data
    assert answer.json["env"] == ["MLFLOW_TRACKING_URI"]
    assert f"outer step {STEPS}/{STEPS}" in answer.err  # the logs were followed

    # a worker on each node, by Ray's own account
    addresses = {node["node_id"]: node["node_ip"] for node in site.state("nodes")}
    workers = [actor for actor in site.state("actors") if "RayTrainWorker" in actor["class_name"]]
    assert {addresses[worker["node_id"]] for worker in workers} == {m.address for m in site.cluster.machines}

    # their all-reduce gives what one worker computes alone
    run = RunFolder(site.project / "shared" / "runs" / "own-net" / "001")
    trained = run.checkpoints.load_meta(STEPS, torch.device("cpu"))
    monkeypatch.chdir(site.project)
    content = _content(tmp_path, backend="local", num_workers=1) | {"seed": 3}
    experiment = experiments.from_dict(content, source="test").absolute()
    alone, _ = open_run(experiment, data_digest="none")
    launch.run_workers(experiment, alone)
    expected = alone.checkpoints.load_meta(STEPS, torch.device("cpu"))
    for name, value in expected.params.items():
        torch.testing.assert_close(trained.params[name], value, rtol=1e-10, atol=1e-12)

    # the model is in the registry of the server, its files are served by it, and it predicts
    for name, value in site.tracking.env(site.admin).items():
        monkeypatch.setenv(name, value)
    from pipeline import serving

    learner = serving.load("models:/own-net@champion")
    assert learner.card.checkpoint["run"] == "own-net/001"
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).reshape(5, 1)
    assert learner.adapt(x.numpy(), torch.sin(x).numpy()).predict(x.numpy()).shape == (5, 1)


def test_a_failing_job_gives_its_own_exit_code(site: Site) -> None:
    smoke = REPOSITORY / "configs" / "smoke.yaml"  # outside the project: it travels all the same
    missing = f"task.data={site.project}/shared/not-there"
    words = ("train", smoke, "--set", missing, "--set", f"tracking.runs={site.project}/shared/runs")
    answer = site.metapipe("submit", *words, "--follow")
    assert answer.code == 2, answer.err
    assert "no such data set" in answer.out
    assert "FAILED with exit code 2" in answer.err
    assert not (site.project / "shared" / "runs" / "smoke").exists()


def test_detach_list_and_stop(site: Site) -> None:
    changes = ("name=long", "training.steps=10000000", "training.validate_every=50")
    alone = ("training.backend=local", "training.num_workers=1")  # in the command's own process: quicker to start
    words = ["train", "my.yaml", *(word for change in changes + alone for word in ("--set", change))]
    submitted = site.metapipe("submit", *words, "--json")
    assert submitted.code == 0, submitted.err
    job = submitted.json["job"]
    assert f"metapipe jobs logs {job} --follow --address {site.cluster.address}" in submitted.json["look"]

    following = site.start("jobs", "logs", job, "--follow")
    assert following.stdout is not None
    assert any("outer step" in line for line in following.stdout)  # it trains
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=30)
    assert following.returncode == 130
    assert "The job goes on" in err

    listed = site.metapipe("jobs", "list", "--json").json["jobs"]
    mine = next(entry for entry in listed if entry["job"] == job)
    assert mine["status"] == "RUNNING"
    assert mine["exit_code"] is None
    assert mine["command"].startswith("train my.yaml --set name=long")
    assert job in site.metapipe("jobs", "list").out

    stopped = site.metapipe("jobs", "stop", job, "--json")
    assert stopped.code == 0, stopped.err
    assert stopped.json["status"] == "STOPPED"
    after = site.metapipe("jobs", "logs", job, "--follow")
    assert after.code == 3  # as a run that stopped early
    assert "outer step" in after.out
    assert "Interrupted" in after.out
    run = RunFolder(site.project / "shared" / "runs" / "long" / "001")
    last = journal.read(run.path / JOURNAL_FILE)[-1]["step"]
    assert run.checkpoints.latest() == last  # nothing that was trained is lost


def test_tokens_and_jobs_that_are_refused(site: Site) -> None:
    began = time.monotonic()
    wrong = site.metapipe("jobs", "list", RAY_AUTH_TOKEN="wrong")
    assert wrong.code == 2
    assert "refuses this token" in wrong.err
    missing = site.metapipe("jobs", "list", RAY_AUTH_TOKEN=None, RAY_AUTH_MODE=None)
    assert missing.code == 2
    assert "asks for a token" in missing.err
    assert site.metapipe("jobs", "list", RAY_AUTH_MODE=None).code == 0  # a token is enough
    unknown = site.metapipe("jobs", "stop", "raysubmit_nothing")
    assert unknown.code == 2
    assert "there is no such job" in unknown.err
    nowhere = site.metapipe("jobs", "list", "--address", site.cluster.address.replace(".1:8265", ".99:8265"))
    assert nowhere.code == 2
    assert "no Ray job server answers" in nowhere.err
    assert time.monotonic() - began < 60  # not minutes


def test_a_server_on_this_machines_loopback_is_refused(site: Site) -> None:
    answer = site.metapipe("submit", "train", "my.yaml", MLFLOW_TRACKING_URI="http://127.0.0.1:5000")
    assert answer.code == 2
    assert "on each of the cluster's nodes that node itself" in answer.err
