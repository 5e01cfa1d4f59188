"""Texts, and features of somebody's encoder from a Parquet file: from raw data to a registered model that adapts."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import experiment as experiments
from pipeline import serving, workflow
from pipeline.datasets.prepare import prepare
from pipeline.datasets.sources import read_options
from pipeline.workflow import Outcome
from tests.servers import mlflow_server, process

pytestmark = pytest.mark.integration

CLASSES, EXAMPLES, UNITS = 12, 12, 6
SHAPE = {"n_way": 2, "k_shot": 2, "n_query": 2, "eval_n_query": 4}


def embedded(folder: Path) -> tuple[Path, np.ndarray]:
    """Sentences with the embeddings of an encoder, as users have them; and the embeddings [classes, examples, D]."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(CLASSES, 1, UNITS)) + 0.2 * random.normal(size=(CLASSES, EXAMPLES, UNITS))
    vectors = vectors.astype(np.float32)
    columns = {
        "sentence": [f"please {name}word {i}" for name in range(CLASSES) for i in range(EXAMPLES)],
        "embedding": pa.array(list(vectors.reshape(-1, UNITS)), pa.list_(pa.float32())),
        "intent": [f"intent{number:02d}" for number in np.repeat(np.arange(CLASSES), EXAMPLES)],
        "domain": [f"domain{number}" for number in np.repeat(np.arange(CLASSES) // 2, EXAMPLES)],
    }
    pq.write_table(pa.table(columns), folder / "embedded.parquet")
    return folder / "embedded.parquet", vectors


def train(home: Path, name: str, options: dict[str, Any], **sections: dict[str, Any]) -> Outcome:
    chosen = read_options("parquet", {"label": "intent", "group": "domain", **options})
    prepare(chosen.open(seed=0), home / name, record=chosen.record(), workers=1)
    content = {
        "name": name,
        "algorithm": {"name": "protonet"},
        "training": {"steps": 2, "meta_batch_size": 2, "validate_every": 2, "backend": "local"},
        "evaluation": {"validation_episodes": 4, "test_episodes": 20, "promotion_episodes": 4},
        "tracking": {"runs": str(home / "runs")},
        **sections,
    }
    content["task"] = {"data": str(home / name), "split": "group", **SHAPE, **content["task"]}
    return workflow.train(experiments.from_dict(content, source="test"), say=lambda _: None)


def test_features_of_an_encoder_from_a_file(home: Path, tmp_path: Path) -> None:
    file, vectors = embedded(tmp_path)
    outcome = train(
        home,
        "encoded",
        {"directory": file, "features": ["embedding"]},
        task={"family": "tabular", "normalize": "none"},
        model={"name": "mlp", "hidden": [16]},
    )
    assert outcome.test.score("inductive").mean > 0.9
    learner = serving.load("models:/encoded@champion")
    adapted = learner.adapt(vectors[:2, :3].reshape(-1, UNITS), ["a"] * 3 + ["b"] * 3)
    assert adapted.predict(vectors[1, 3:]).argmax(axis=1).tolist() == [1] * (EXAMPLES - 3)


def test_texts_over_http(home: Path, tmp_path: Path) -> None:
    """Trained from TF-IDF; `mlflow models serve` answers to raw sentences."""
    file, _ = embedded(tmp_path)
    train(
        home,
        "sentences",
        {"directory": file, "text": "sentence"},
        task={"family": "text"},
        model={"name": "text", "buckets": 512, "embedding": None, "start": "tfidf", "center": True},
    )
    url = f"http://127.0.0.1:{(port := process.free_port())}"
    command = [str(mlflow_server.BIN / "mlflow"), "models", "serve", "-m", "models:/sentences@champion"]
    command += ["--env-manager", "local", "--port", str(port)]

    def post(inputs: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        content, kind = json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{url}/invocations", content, kind), timeout=60
            ) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    support, labels = ["play some music", "grüße aus Köln", "wake me at 7"], [4, 7, 9]
    query = ["music please", "wake me tomorrow"]
    env = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    env["PATH"] = f"{mlflow_server.BIN}{os.pathsep}{env['PATH']}"
    with process.running(command, answers=lambda: process.responds(f"{url}/ping"), log=tmp_path / "serve.log", env=env):
        status, answer = post({"support_x": support, "support_y": labels, "query_x": query})
        assert status == 200, answer
        expected = serving.load("models:/sentences@champion").adapt(support, labels).predict(query)
        np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)
        assert np.argmax(answer["predictions"], axis=1).tolist() == [0, 2]
        status, answer = post({"support_x": [*support[:2], ""], "support_y": labels, "query_x": query})
        assert status == 400
        assert "entry 2 is '' and no text" in answer["message"], answer
