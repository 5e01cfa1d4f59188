"""scikit-learn's digits as a data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from jobs import data
from pipeline.tasks import shards


def test_every_drawing_is_the_librarys(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    answer = CliRunner().invoke(data.app, ["prepare", "digits", "--size", "8", "--out", str(tmp_path / "d"), "--json"])
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    assert (told["classes"], told["examples"], told["shape"]) == (10, 1797, [8, 8, 1])
    manifest = shards.verify(tmp_path / "d")
    assert manifest.splits == ["all_test"]
    assert len(manifest.members("all_test", "meta_test")) == 10
    digits = load_digits()
    with shards.ShardReader(tmp_path / "d", manifest) as reader:
        for digit, name in ((0, "zero"), (7, "seven")):
            number = next(i for i, entry in enumerate(manifest.classes) if entry.name == name)
            ours = reader.read_class(number)[..., 0].astype(float)
            theirs = digits.images[digits.target == digit]
            assert ours.shape == theirs.shape
            assert ours.max(axis=(1, 2)).tolist() == [255] * len(ours), "contrast is stretched"
            inside = theirs.min(axis=(1, 2)) == 0
            stretched = theirs * 255 / theirs.max(axis=(1, 2), keepdims=True)
            assert float(np.abs(ours - stretched)[inside].max()) < 2
