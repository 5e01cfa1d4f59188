"""The sources of `metapipe data prepare`: their registry, options and command."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from jobs import data
from pipeline import experiment
from pipeline.config import validate
from pipeline.credentials import without_credentials
from pipeline.datasets import sources
from pipeline.errors import ConfigError, DataError
from pipeline.tasks import regression
from pipeline.tasks.images import ImagesConfig


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


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("kind", ["drawing", "photo"])
def test_colour_photos_as_drawings_are_hinted_at(colour: bool, kind: str, tmp_path: Path) -> None:
    folder = picture_folders(tmp_path / "mine")
    if not colour:  # a scan: RGB, and grey
        for file in folder.rglob("*.png"):
            Image.open(file).convert("L").convert("RGB").save(file)
    else:
        for number, file in enumerate(folder.rglob("*.png")):
            Image.new("RGB", (20, 24), (200, 40, 10 * number)).save(file)
    answer = run("images", folder, "--kind", kind, "--out", tmp_path / "out", "--no-card", "--json")
    assert answer.exit_code == 0, answer.output
    hints = [line for line in answer.stderr.splitlines() if "--kind photo" in line]
    assert len(hints) == (colour and kind == "drawing")


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


def test_the_command_counts_what_it_left_out_and_writes_the_card(tmp_path: Path) -> None:
    folder = picture_folders(tmp_path / "mine", classes=6)
    (folder / "kind1" / "broken.png").write_bytes(b"no picture")
    (folder / "kind2" / "x.png").write_bytes((folder / "kind1" / "0.png").read_bytes())
    (folder / "empty").mkdir()
    lists = tmp_path / "lists.csv"
    lists.write_text("kind0,train\nkind1,train\nkind2,val\nkind3,test\nkind4,test\nempty,test\nkind5,val\n")
    arguments = ("images", folder, "--out", tmp_path / "out", "--class-lists", lists, "--all-test", "--workers", 1)
    answer = run(*arguments, "--json")
    assert answer.exit_code == 0, answer.output
    content = json.loads(answer.stdout)
    assert (content["problems"], content["classes_left_out"], content["classes"]) == (2, 1, 6)
    assert content["classes_by_split"]["lists"] == {"meta_train": 2, "meta_val": 2, "meta_test": 2}
    assert content["classes_by_split"]["all_test"] == {"meta_test": 6}
    assert content["leaks"]["lists"]["identical"] == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("dataset.json", "shards"),
        *("DATASET.md", "DATASET.png", "DATASET-statistics.json"),
    }
    shown = run(*arguments, "--overwrite")
    text = " ".join(shown.stdout.split())
    assert "2 items were odd or could not be read (--strict refuses them)" in text
    assert "1 classes had too few examples and were left out: empty" in text
    refused = run(*arguments, "--overwrite", "--strict")
    assert isinstance(refused.exception, DataError)
    assert "broken.png: not a picture" in str(refused.exception)
    (tmp_path / "out" / "DATASET.md").unlink()
    assert run(*arguments, "--reuse").exit_code == 0, "a refusal took the data set that was there"
    assert (tmp_path / "out" / "DATASET.md").is_file()
    other = run(*arguments, "--reuse", "--shares", "60,20,20")
    assert "shares None and not 60,20,20" in str(other.exception)
    assert run("images", folder, "--out", tmp_path / "bare", "--no-card").exit_code == 0
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"dataset.json", "shards"}
    again = CliRunner().invoke(data.app, ["card", str(tmp_path / "bare"), "--json"])
    assert json.loads(again.stdout)["leaks"]["random"].keys() == {"identical", "near"}


@pytest.mark.parametrize("name", ["csv", "images", "mnist"])
@pytest.mark.parametrize("address", ["http://host:8765/text.csv", "https://me:secret@host/a?token=secret", "s3://b/k"])
def test_an_address_of_raw_data_is_refused_as_it_was_written(name: str, address: str, tmp_path: Path) -> None:
    for where in (address, Path.cwd() / address):  # with --address the folder's whole path is asked for
        answer = run(name, where, "--out", tmp_path / "out")
        shown = str(answer.exception)
        assert isinstance(answer.exception, ConfigError)
        assert without_credentials(address) in shown
        assert "secret" not in shown
        assert "raw data must lie in a folder" in shown
    assert not list(tmp_path.iterdir())


def test_classes_that_are_too_small_are_told_with_the_option_that_leaves_them_out(tmp_path: Path) -> None:
    folder = picture_folders(tmp_path / "mine", classes=20)
    for file in sorted((folder / "kind3").iterdir())[1:]:
        file.unlink()
    of_class = len(list((folder / "kind1").iterdir()))
    arguments = ("images", folder, "--out", tmp_path / "out", "--workers", 1, "--no-card", "--shares", "10,5,5")
    answer = run(*arguments)
    assert "1 class has a single example" in answer.stdout
    assert "on: kind3. Leave such classes out with --min-examples" in answer.stdout
    content = {"family": "images", "data": str(tmp_path / "out"), "split": "random", "n_way": 2, "n_query": 1}
    config = validate(ImagesConfig, {**content, "eval_n_query": of_class - 1}, source="test")
    with pytest.raises(DataError, match=rf"class kind3 .*`metapipe data prepare … --min-examples {of_class} --over"):
        config.verify()
    answer = run(*arguments, "--min-examples", of_class, "--overwrite")
    assert "single example" not in answer.stdout
    config.verify()


@pytest.mark.parametrize("shares", ["60,20", "a,b,c", "0,0,0", "-1,1,1", "60;20;20"])
def test_shares_that_are_none(shares: str, tmp_path: Path) -> None:
    answer = run("images", picture_folders(tmp_path / "mine"), "--out", tmp_path / "out", f"--shares={shares}")
    assert isinstance(answer.exception, ConfigError)
    assert f"--shares {shares}: give three whole numbers" in str(answer.exception)


def test_a_data_set_of_other_classes_is_not_reused(tmp_path: Path) -> None:
    lists = tmp_path / "lists.csv"
    lists.write_text("kind0,meta_train\nkind1,meta_val\nkind2,meta_test\n")
    folder, out = picture_folders(tmp_path / "raw"), tmp_path / "out"
    asked = ("images", folder, "--out", out, "--class-lists", lists, "--reuse", "--workers", 1)
    assert run(*asked).exit_code == 0
    assert run(*asked).exit_code == 0
    answers = [run(*asked, "--min-examples", 2)]
    lists.write_text("kind0,meta_test\nkind1,meta_val\nkind2,meta_train\n")
    answers.append(run(*asked))
    for answer, key in zip(answers, ("min_examples", "class_lists"), strict=True):
        assert isinstance(answer.exception, ConfigError)
        assert key in str(answer.exception)


@pytest.mark.parametrize("name", sources.PROCEDURAL)
def test_functions_that_are_drawn_are_nothing_to_prepare(name: str, tmp_path: Path) -> None:
    """And what to write instead is a task of an experiment."""
    answer = run(name, "--out", tmp_path / "out")
    assert isinstance(answer.exception, ConfigError)
    told = re.findall(r"task: (\{.*?\})", str(answer.exception))
    assert told
    for task in told:
        others = {"model": {"name": "mlp"}, "algorithm": {"name": "maml", "inner_lr": 0.1}, "training": {"steps": 1}}
        content = {"name": "x", "task": yaml.safe_load(task), **others}
        task_config = experiment.from_dict(content, source="told").task
        assert name in (task_config.family, getattr(task_config, "function", None))
    assert set(sources.PROCEDURAL) == {*regression.FUNCTIONS, "sinusoid"}
