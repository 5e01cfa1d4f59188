"""The commands as typed: exit codes, JSON, and one-paragraph messages without a traceback."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs import cli
from pipeline.workflow import Outcome

pytestmark = pytest.mark.integration

CHAMPION = "models:/tiny@champion"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        return json.loads(self.out)


Metapipe = Callable[..., Answer]


@pytest.fixture
def metapipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Metapipe:
    """Runs `metapipe ARGUMENTS` in this process."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["metapipe", *map(str, arguments)])
        monkeypatch.delenv("METAPIPE_DEBUG", raising=False)
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            logging.captureWarnings(False)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


def refused(answer: Answer, *words: str) -> None:
    """Exit code 2 and one paragraph that holds the words."""
    text = " ".join(answer.err.split())
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.err
    assert "Traceback" not in answer.out
    assert [word for word in words if word not in text] == [], text


def sinusoid_config(folder: Path, **changes: object) -> Path:
    content = yaml.safe_load((CONFIGS / "sinusoid_maml.yaml").read_text())
    content["training"] |= {"steps": 4, "validate_every": 2, "backend": "local", "num_workers": 1}
    content["evaluation"] = {"validation_episodes": 5, "test_episodes": 5, "promotion_episodes": 5}
    content["tracking"] = {"runs": str(folder / "runs")}
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(content | changes))
    return file


def test_help_teaches_and_is_quick(metapipe: Metapipe) -> None:
    answer = metapipe("--help")
    assert answer.code == 0
    assert all(
        word in answer.out
        for word in ("data", "train", "evaluate", "register", "adapt", "runs", "submit", "jobs", "--debug")
    )
    for command in ("train", "evaluate", "register", "adapt", "runs", "submit", "jobs"):
        assert f"metapipe {command}" in metapipe(command, "--help").out
    program = "import sys, jobs.cli; sys.exit(bool({'torch', 'mlflow', 'ray', 'pyarrow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0  # so --help answers in under half a second


def test_every_job_is_a_module_too() -> None:
    for job in ("data", "train", "evaluate", "register", "adapt", "runs", "submit", "cluster_jobs", "demo"):
        done = subprocess.run([sys.executable, "-m", f"jobs.{job}", "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


def test_train_and_its_json(metapipe: Metapipe, home: Path, tmp_path: Path) -> None:
    answer = metapipe("train", sinusoid_config(tmp_path), "--json", "--set", "training.steps=6")
    assert answer.code == 0, answer.err
    assert answer.json["run"] == str(tmp_path / "runs" / "sinusoid" / "001")
    assert answer.json["test"]["episodes"] == 5
    assert answer.json["registered"]["version"]
    assert "validation mse" in answer.err  # progress goes to the other stream
    again = metapipe("train", sinusoid_config(tmp_path), "--set", "training.steps=6")
    assert "sinusoid/002" in again.err  # a finished run leads to a new one
    assert "adaptation steps" in again.out
    listed = metapipe("runs", "--json").json["runs"]
    assert {"sinusoid/001", "sinusoid/002"} <= {run["run"] for run in listed}
    assert "sinusoid/001" in metapipe("runs").out
    registered = metapipe("register", tmp_path / "runs" / "sinusoid", "--json")
    assert registered.code == 0, registered.err
    assert not registered.json["champion"]


def test_evaluate_and_adapt(
    metapipe: Metapipe, trained: Outcome, pictures: tuple[Path, Path], image_data: Path, tmp_path: Path
) -> None:
    options = ("--data", image_data, "--episodes", 6, "--baselines", "--out", tmp_path / "results.parquet")
    evaluated = metapipe("evaluate", CHAMPION, *options, "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["episodes"] == 6
    assert [b["name"] for b in evaluated.json["baselines"]][1] == "nearest neighbour on pixels"
    assert (tmp_path / "results.parquet").exists()
    assert "nearest neighbour" in metapipe("evaluate", CHAMPION, *options).out

    support, query = pictures
    arguments = ("adapt", CHAMPION, "--support", support, "--query", query)
    adapted = metapipe(*arguments, "--out", tmp_path / "answers.json", "--json")
    assert adapted.code == 0, adapted.err
    assert adapted.json == json.loads((tmp_path / "answers.json").read_text())
    assert [p["label"] for p in adapted.json["predictions"]] == ["kind0", "kind1", "kind2"]
    assert all(abs(sum(p["probabilities"].values()) - 1) < 1e-4 for p in adapted.json["predictions"])
    assert "kind1" in metapipe(*arguments).out
    one = metapipe("adapt", CHAMPION, "--support", support, "--query", query / "kind2.png", "--json")
    assert [p["label"] for p in one.json["predictions"]] == ["kind2"]


def test_data_commands(metapipe: Metapipe, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "mine"
    prepared = metapipe("data", "prepare", "images", "--source", pictures[0], "--out", out, "--json")
    assert prepared.code == 0, prepared.err
    assert prepared.json["classes"] == 3
    assert metapipe("data", "verify", out, "--json").json["verified"]
    refused(
        metapipe("data", "prepare", "images", "--source", pictures[0], "--out", out), "already exists", "--overwrite"
    )
    again = metapipe("data", "prepare", "images", "--out", out, "--reuse").out
    assert "already there" in " ".join(again.split()), "lines break where the path has them"
    shard = out / "shards" / "00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    refused(metapipe("data", "verify", out), "shards/00000.parquet", "truncated")
    shard.unlink()
    refused(metapipe("data", "verify", out), "shards/00000.parquet is missing")


def test_show_draws_episodes(metapipe: Metapipe, image_data: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "episodes.png"
    shown = metapipe("data", "show", image_data, "--out", picture, "--n-way", 4, "--episodes", 3, "--json")
    assert shown.code == 0, shown.err
    with Image.open(picture) as image:
        assert min(image.size) > 100
    refused(metapipe("data", "show", image_data, "--part", "test"), "--part test", "meta_test")


def test_bad_input_is_one_paragraph(
    metapipe: Metapipe, trained: Outcome, image_data: Path, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    config = sinusoid_config(tmp_path)
    refused(metapipe("train", tmp_path / "none.yaml"), "none.yaml", "no such configuration file")
    refused(metapipe("train", config, "--set", "training.stepz=1"), "training.stepz", "did you mean steps?")
    refused(metapipe("train", config, "--set", "training.steps=many"), "training.steps", "integer", "'many'")
    refused(metapipe("train", config, "--set", "algorithm.inner_lr=-1"), "algorithm.inner_lr", "greater than 0", "-1")
    demo = ("train", CONFIGS / "demo.yaml", "--set", f"tracking.runs={tmp_path}")
    refused(metapipe(*demo, "--set", "task.data=/no/such"), "/no/such", "no such data set", "metapipe data prepare")
    on_tiny = (*demo, "--set", f"task.data={image_data}", "--set", "task.split=random")
    refused(metapipe(*on_tiny, "--set", "task.n_way=9"), "8 classes", "task.n_way=9")
    refused(metapipe(*on_tiny, "--set", "task.k_shot=7"), "8 examples", "task.k_shot=7")
    refused(metapipe("adapt", "models:/tiny@nobody", "--support", "x", "--query", pictures[1]), "no such model", "tiny")
    refused(metapipe("evaluate", "models:/nothing/1"), "models:/nothing/1", "Registered models")
    refused(metapipe("register", tmp_path / "nowhere"), "holds no run")
    refused(
        metapipe("adapt", CHAMPION, "--support", pictures[1], "--query", pictures[1]), "no folder in it holds pictures"
    )
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG but no more")
    refused(metapipe("adapt", CHAMPION, "--support", pictures[0], "--query", broken), "broken.png", "not a picture")
    refused(metapipe("adapt", CHAMPION, "--support", pictures[0], "--query", tmp_path / "none"), "holds no picture")


def test_an_unreachable_server_is_refused_quickly(
    metapipe: Metapipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.monotonic()
    refused(metapipe("train", sinusoid_config(tmp_path)), "http://127.0.0.1:9", "mlflow server")
    refused(metapipe("runs"), "http://127.0.0.1:9")
    assert time.monotonic() - began < 20


def test_an_unfinished_run_that_changed_is_refused(metapipe: Metapipe, home: Path, tmp_path: Path) -> None:
    config = sinusoid_config(tmp_path)
    stopped = metapipe("train", config, "--set", "algorithm.inner_lr=1e30", "--set", "training.max_nonfinite_steps=2")
    assert stopped.code == 3, stopped.err
    assert "not finite 2 times in a row" in " ".join(stopped.err.split())
    refused(metapipe("train", config), "unfinished", "algorithm.inner_lr: 1e+30 -> 0.01", "--fresh")
    fresh = metapipe("train", config, "--fresh", "--json")
    assert fresh.code == 0, fresh.err
    assert fresh.json["run"].endswith("sinusoid/002")


def test_a_gpu_that_is_not_there_is_told_before_ray_starts(metapipe: Metapipe, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    answer = metapipe(
        "train", sinusoid_config(tmp_path), "--set", "training.backend=ray", "--set", "training.use_gpu=true"
    )
    refused(answer, "training.use_gpu", "no CUDA device")
    assert not (tmp_path / "runs").exists()


def test_a_data_set_of_another_size_is_not_reused(
    metapipe: Metapipe, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ("data", "prepare", "images", "--source", pictures[0], "--out", tmp_path / "mine", "--reuse")
    assert metapipe(*arguments).code == 0
    refused(metapipe(*arguments, "--size", 32), "size 28 and not 32", "--overwrite")


def test_labels_that_look_like_markup(
    metapipe: Metapipe, trained: Outcome, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    import shutil

    for name, new in (("kind0", "[red]x"), ("kind1", "[bold]")):
        shutil.copytree(pictures[0] / name, tmp_path / "support" / new)
    answer = metapipe("adapt", CHAMPION, "--support", tmp_path / "support", "--query", pictures[1])
    assert answer.code == 0, answer.err
    assert "[red]x" in answer.out


def test_debug_shows_the_traceback_without_passwords(
    metapipe: Metapipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = metapipe("train", tmp_path / "none.yaml", "--debug")
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert "ConfigError" in answer.err

    def defect(path: str, overrides: object = ()) -> None:
        raise RuntimeError(f"cannot reach {path}")

    monkeypatch.setattr("pipeline.experiment.load", defect)
    answer = metapipe("train", "http://ada:hunter2hunter2@host/none.yaml", "--debug")
    assert answer.code == 1
    assert "RuntimeError: cannot reach http:/host/none.yaml" in answer.err
    assert "hunter2" not in answer.err
