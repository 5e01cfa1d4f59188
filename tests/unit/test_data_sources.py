"""The sources of `metapipe data prepare`: their registry, options and command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs import data
from pipeline.datasets import sources
from pipeline.errors import ConfigError


def picture_folders(root: Path, classes: int = 3, count: int = 4) -> Path:
    for c in range(classes):
        (root / f"kind{c}").mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([c, i]).integers(0, 256, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"kind{c}" / f"{i}.png")
    return root


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(data.app, ["prepare", *map(str, arguments)])


@pytest.mark.parametrize("name", sources.SOURCES)
def test_every_source_has_options_that_are_explained(name: str) -> None:
    section = sources.options_of(name)
    assert section.__doc__
    for field, info in section.model_fields.items():
        assert info.description, f"{name}: --{field} has no help"
    assert sources.read_options(name, {}).record().keys() <= section.model_fields.keys()
    answer = run(name, "--help")
    assert answer.exit_code == 0, answer.output
    for field in set(section.model_fields) - {"directory"}:
        assert f"--{field.replace('_', '-')}" in answer.output


def test_a_source_that_is_none_and_options_that_are_wrong() -> None:
    with pytest.raises(ConfigError, match=r"mmist: no such source of data; choose one of glyphs, "):
        sources.read_options("mmist", {})
    with pytest.raises(ConfigError, match=r"data prepare images: sise: unknown key \(did you mean size\?\)"):
        sources.read_options("images", {"sise": 28})
    with pytest.raises(ConfigError, match=r"data prepare images: size: .*1024 \(got 5000\)"):
        sources.read_options("images", {"size": 5000})


def test_the_folder_is_an_argument_or_an_option_but_not_two_places(tmp_path: Path) -> None:
    folder = picture_folders(tmp_path / "mine")
    for number, place in enumerate(([folder], ["--source", folder])):
        answer = run("images", *place, "--kind", "photo", "--size", 16, "--out", tmp_path / f"{number}", "--json")
        assert answer.exit_code == 0, answer.output
        assert json.loads(answer.stdout)["shape"] == [16, 16, 3]
    answer = run("images", folder, "--source", tmp_path, "--out", tmp_path / "two")
    assert isinstance(answer.exception, ConfigError)
    assert "give one of them" in str(answer.exception)
    missing = run("images", "--out", tmp_path / "none")
    assert "DIR is missing" in str(missing.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "mine"]
