"""Texts and rows that a user shows a model on the command line, and episodes of them in words."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jobs import adapt, console, data
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.datasets.tables.scanning import MISSING
from pipeline.errors import DataError
from pipeline.learner import Learner, write_model
from pipeline.shown import table_rows
from pipeline.shown_files import Rows, read_lines, read_rows, read_support
from pipeline.tasks import shards
from pipeline.tasks.shards.manifest import Column
from pipeline.tasks.tables import TableEncoding
from pipeline.types import SPLITS
from tests.contract.entries import Case, card, raw


@pytest.fixture(scope="module", params=["text", "tabular"])
def case(request: pytest.FixtureRequest, tiny_sets: dict[str, Path], one_thread: None) -> Case:
    return Case("protonet", {}, request.param, tiny_sets)


def run(app: Any, *arguments: Any) -> Any:
    answer = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert answer.exit_code == 0, (answer.output, answer.exception)
    return json.loads(answer.stdout)


def cells(case: Case, examples: Any) -> list[str]:
    """Lines of a CSV file, with what a user would write for a missing value and a category."""
    if isinstance(examples, list):
        return list(examples)
    colours = ["blue", "green", "red"]
    return [f"{a!r},{'' if np.isnan(b) else repr(b)},{colours[int(c)]}" for a, b, c in examples.tolist()]


@pytest.mark.parametrize("value", [*MISSING, " ? "])
def test_what_preparing_takes_as_missing_is_missing(value: str) -> None:
    encoding = TableEncoding(
        columns=[Column(name="width"), Column(name="colour", kind="categorical", categories=["red"])],
        normalize="none",
        prior_examples=0,
        mean=[0.0],
        variance=[1.0],
    )
    assert table_rows([{"width": value, "colour": value}], encoding, torch.float32, "query_x").isnan().all()


def test_metapipe_adapt_reads_csv_files(case: Case, tmp_path: Path) -> None:
    write_model(tmp_path / "model", card(case), case.state)
    support, query = raw(case)
    labels = [f"class {i}" for i in case.batch.support_y[0].tolist()]
    header = "text" if isinstance(support, list) else "length,width,colour"
    shown = [f"kind,{header}", *(f"{k},{c}" for k, c in zip(labels, cells(case, support), strict=True))]
    (tmp_path / "support.csv").write_text("\n".join(shown) + "\n")
    asked = tmp_path / ("query.txt" if isinstance(support, list) else "query.csv")
    lines = cells(case, query)
    asked.write_text("\n".join(lines if asked.suffix == ".txt" else [header, *lines]) + "\n")
    app = console.single_command(adapt.adapt)
    found = run(app, tmp_path / "model", "--support", tmp_path / "support.csv", "--query", asked, "--label", "kind")
    expected = Learner.from_folder(tmp_path / "model").adapt(support, labels).predict(query)
    assert found["labels"] == sorted(set(labels))
    given = [list(p["probabilities"].values()) for p in found["predictions"]]
    np.testing.assert_allclose(given, expected, atol=1e-6)
    if isinstance(support, list):
        assert [p["text"] for p in found["predictions"]] == query
    else:
        assert [p["row"] for p in found["predictions"]] == list(range(1, len(query) + 1))


def test_rows_with_decimal_commas_are_the_same_rows(case: Case, tmp_path: Path) -> None:
    support, query = raw(case)
    if isinstance(support, list):
        return
    write_model(tmp_path / "model", card(case), case.state)
    labels = [f"class {i}" for i in case.batch.support_y[0].tolist()]
    answers = []
    for name, sign, between in (("points", ".", ","), ("commas", ",", ";")):
        shown = ["kind,length,width,colour", *(f"{k},{c}" for k, c in zip(labels, cells(case, support), strict=True))]
        asked = ["length,width,colour", *cells(case, query)]
        files = []
        for part, lines in (("support", shown), ("query", asked)):
            files.append(tmp_path / f"{part}-{name}.csv")
            written = [line.replace(",", between).replace(".", sign) for line in lines]
            files[-1].write_text("\n".join(written) + "\n")
        given = ["--support", files[0], "--query", files[1], "--label", "kind", "--delimiter", between]
        found = run(console.single_command(adapt.adapt), tmp_path / "model", *given, "--decimal", sign)
        answers.append(found["predictions"])
    assert answers[0] == answers[1]
    points = [tmp_path / f"{part}-points.csv" for part in ("support", "query")]
    told = refusal(
        tmp_path / "model", "--support", points[0], "--query", points[1], "--decimal", ",", "--label", "kind"
    )
    assert "--decimal , says that points are not decimal" in told


def test_a_model_of_arrays_is_not_taken_for_one_of_pictures(case: Case, tmp_path: Path) -> None:
    write_model(tmp_path / "model", card(case).model_copy(update={"preprocessing": None}), case.state)
    (tmp_path / "shown.csv").write_text("label,text\na,b\nb,c\n")
    shown = tmp_path / "shown.csv"
    assert "takes arrays [" in refusal(tmp_path / "model", "--support", shown, "--query", shown)


@pytest.mark.parametrize("classes", [8, 30])
def test_the_table_of_many_classes_shows_the_best(classes: int) -> None:
    probabilities = np.full((1, classes), 0.001)
    probabilities[0, [3, 5, 7]] = 0.2, 0.6, 0.1
    stream = io.StringIO()
    table = adapt._table("m", "picture", ["x.png"], [f"k{i}" for i in range(classes)], probabilities)
    Console(file=stream, width=80).print(table)
    line = next(line for line in stream.getvalue().splitlines() if "x.png" in line)
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    if classes == 30:
        assert cells == ["x.png", "k5", "0.600", "k3 0.200", "k7 0.100"]
    else:
        assert cells[1] == "k5"
        assert len(cells) == 10


def test_metapipe_data_show_tells_episodes(case: Case, tiny_sets: dict[str, Path]) -> None:
    folder = tiny_sets[case.experiment.task.family]
    found = run(data.app, "show", folder, "--n-way", 3, "--k-shot", 2, "--episodes", 2)
    assert [len(episode) for episode in found["episodes"]] == [3, 3]
    assert all(len(examples) == 2 for episode in found["episodes"] for examples in episode.values())
    (name, (example, _)), *_ = found["episodes"][0].items()
    assert name.startswith("group")
    assert "please" in example if isinstance(example, str) else set(example) == {"length", "width", "colour"}
    in_words = CliRunner().invoke(data.app, ["show", str(folder), "--n-way", "3", "--episodes", "1"])
    assert in_words.exit_code == 0
    assert "episode 1" in in_words.output


def texts(rows: Rows) -> list[str]:
    return rows.cells("text", option="--text")


STEERING = "\x1b[31mred\x07\x9b0m \u202eback\u2069 \r\x00\u2028."


def test_texts_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a data set, of classes and of what is shown; line ends and other scripts stay."""
    columns = [Column(name=f"c{STEERING}", kind="categorical", categories=[STEERING, "日本\N{COMBINING ACUTE ACCENT}"])]
    classes = [shards.ClassExamples(f"k{i}", "all", np.array([[i % 2]] * 6, np.float32)) for i in range(6)]
    texts = [shards.ClassExamples(f"k{i}", "all", [f"{STEERING}\nשלום {i}"] * 6) for i in range(6)]
    how: dict[str, Any] = {"source": {"problems": {"count": 1, "first": [[STEERING, STEERING]]}}, "preprocessing": {}}
    how["splits"] = {"random": {f"k{i}": SPLITS[i % 3] for i in range(6)}}
    shards.write(tmp_path / "texts", texts, modality="text", **how)
    shards.write(tmp_path / "table", classes, modality="vector", columns=columns, **how)
    shown = [
        CliRunner().invoke(data.app, ["show", str(tmp_path / name), "--n-way", "2"]).output
        for name in ("texts", "table")
    ]
    stream = io.StringIO()
    Console(file=stream, width=200).print(adapt._table("m", "text", [STEERING], [STEERING, "b"], np.array([[1.0, 0]])))
    console.say(STEERING)
    console._print_error(STEERING)
    shown += [stream.getvalue(), capsys.readouterr().err]
    for output in shown:
        assert "\\x1b[31m" in output
        assert not {c for c in output if unicodedata.category(c) in ("Cc", "Zl", "Zp")} - {"\n"}
        assert not set("\u202e\u2069") & set(output)
    assert "שלום" in shown[0]
    assert "日本\N{COMBINING ACUTE ACCENT}" in shown[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"label,text\na,x\n,y\n", "f.csv: row 3 has no label"),
        (b"label,text\n\na,x\n\n\nb, \n", "f.csv: row 6 has no text"),
        (b"label,words\na,x\n", "has no column 'text'; it has: label, words.* with --text"),
        (b"label,text\n\na\n", "row 3 has not 2 cells"),
        (b"label,text\na,b,c\n", "row 2 has not 2 cells"),
        (b"label,text\n", "holds no row"),
        (b"", "holds no row"),
        (b"label,text\na,\xff\n", "is not UTF-8"),
        (b'label,text\na,"x\n', "not a CSV file"),
    ],
)
def test_files_that_cannot_be_shown_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "f.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        texts(read_support(tmp_path / "f.csv", label="label").rows)


def refusal(*arguments: Any) -> str:
    answer = CliRunner().invoke(console.single_command(adapt.adapt), list(map(str, arguments)))
    assert isinstance(answer.exception, DataError)
    return str(answer.exception)


def test_what_is_wrong_with_a_file_is_told_by_file_and_row(case: Case, tmp_path: Path) -> None:
    """A file that is missing or no CSV even before the model is looked for."""
    write_model(tmp_path / "model", card(case), case.state)
    of_text = case.experiment.task.family == "text"
    right = "label,text\na,one\nb,two\n" if of_text else "label,length,width,colour\na,1,2,red\nb,2,3,red\n"
    wrong = "text\nsix\n\n   \n" if of_text else "length,width,colour\n1,2,red\n\nabc,2,red\n"
    support, query = tmp_path / "support.csv", tmp_path / "query.csv"
    support.write_text(right)
    query.write_text(wrong)
    told = refusal(tmp_path / "model", "--support", support, "--query", query)
    assert told.startswith(f"{query}: row 4")
    assert "has no text" in told if of_text else "column 'length' holds 'abc'" in told
    if not of_text:
        support.write_text(right.replace("2,3", "1e39,3"))
        assert f"{support}: row 3: column 'length' holds '1e39'" in refusal(
            tmp_path / "model", "--support", support, "--query", query
        )
        query.write_text("length,width\n1,2\n")
        support.write_text(right)
        told = refusal(tmp_path / "model", "--support", support, "--query", query)
        assert told.startswith(f"{query}: has no column 'colour'")
    for shown, asked in (
        (tmp_path / "none.csv", query),
        (support, tmp_path / "none.csv"),
        (support, tmp_path / "n.txt"),
    ):
        told = refusal("models:/nobody@champion", "--support", shown, "--query", asked)
        assert "cannot be read" in told
        assert told.startswith(str(asked if shown == support else shown))


def test_a_model_of_pictures_says_so(tiny_sets: dict[str, Path], tmp_path: Path) -> None:
    case = Case("protonet", {}, "images", tiny_sets)
    drawings = Preprocessing(kind="drawing", size=12)
    write_model(tmp_path / "model", card(case).model_copy(update={"preprocessing": drawings}), case.state)
    (tmp_path / "f.csv").write_text("label,text\na,b\n")
    file = tmp_path / "f.csv"
    assert "takes pictures. Give --support a folder" in refusal(tmp_path / "model", "--support", file, "--query", file)


def test_queries_are_lines_or_a_column(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("one\n\n two, with a comma\n")
    (tmp_path / "q.csv").write_text('text,more\n"two\nlines",1\n')
    assert read_lines(tmp_path / "q.txt") == ["one", "two, with a comma"]
    assert texts(read_rows(tmp_path / "q.csv")) == ["two\nlines"]
    odd = [f"one{mark}text" for mark in ("\u2028", "\u2029", "\x0c", "\x0b", "\x1c", "\x85", "\r")]
    for end in ("\n", "\r\n"):
        (tmp_path / "q.txt").write_bytes(end.join(odd).encode())
        (tmp_path / "q.csv").write_bytes(end.join(["text", *(f'"{text}"' for text in odd)]).encode())
        assert read_lines(tmp_path / "q.txt") == odd
        assert texts(read_rows(tmp_path / "q.csv")) == odd
        (tmp_path / "q.csv").write_bytes(end.join(["text", *odd[:-1]]).encode())  # without quotes a \r ends a row
        assert texts(read_rows(tmp_path / "q.csv")) == odd[:-1]
    (tmp_path / "empty.txt").touch()
    for name, words in (("none.csv", "cannot be read"), ("empty.txt", "holds no text")):
        with pytest.raises(DataError, match=words):
            read_lines(tmp_path / name)
