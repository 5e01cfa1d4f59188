"""A reproduction: which cells there are, what becomes of each, and the table beside the published numbers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from pipeline import experiment, reproduce, reproduce_table
from pipeline.errors import ConfigError, DataError, Interrupted
from pipeline.experiment import Experiment
from pipeline.reproduce import Cell, Plan
from pipeline.runs import RunFolder, latest_run
from pipeline.training import journal, loop
from pipeline.workflow import Observer

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "reproduce" / "omniglot.yaml"
STEPS = 6

EXPERIMENT: dict[str, Any] = {
    "name": "base",
    "task": {"family": "images", "split": "random", "n_way": 2, "n_query": 2, "eval_n_query": 2},
    "model": {"name": "mlp", "hidden": [4]},
    "algorithm": {"name": "maml", "inner_lr": 0.1},
    "training": {"steps": STEPS, "meta_batch_size": 2, "validate_every": 2, "backend": "local"},
    "evaluation": {"validation_episodes": 4, "test_episodes": 6},
}
PUBLISHED = {
    "methods": {
        "maml": {"title": "MAML", "citation": "Finn 2017", "results": {"2w1s": {"transductive": [98.7, 0.4]}}},
        "anil": {
            "title": "ANIL",
            "citation": "Raghu 2020",
            "results": {"2w1s": {"unstated": [96.0]}, "2w3s": {"inductive": [90.0, 1.0], "transductive": [95.0]}},
        },
        "other": {"title": "Another", "citation": "Nobody", "note": "Not ours.", "results": {}},
    }
}
ALGORITHMS: dict[str, Any] = {
    "maml": {"config": "base.yaml", "cells": {"2w3s": {"set": {"task.k_shot": 3}, "minutes": 5.0}, "2w1s": {}}},
    "anil": {"config": "base.yaml", "set": {"algorithm.name": "anil"}, "cells": {"2w1s": {"minutes": 8.0}}},
}
# a first inner rate that no number survives
FAILING = {"algorithm.inner_lr": 1e30, "training.max_nonfinite_steps": 1}


@pytest.fixture
def make(tmp_path: Path, tiny_data: Path) -> Callable[..., Plan]:
    """The plan of a file with these algorithms; keyword arguments go to `load`."""

    def make(algorithms: dict[str, Any] = ALGORITHMS, **arguments: Any) -> Plan:
        content = EXPERIMENT | {"task": {**EXPERIMENT["task"], "data": str(tiny_data)}}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(content))
        (tmp_path / "published.yaml").write_text(yaml.safe_dump(PUBLISHED))
        budget = {"about": "tiny", "settings": ["2w1s", "2w3s"], "algorithms": algorithms}
        file = {"name": "trial", "published": "published.yaml", "prepare": "prepare it", "budgets": {"cpu": budget}}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
        return reproduce.load(tmp_path / "plan.yaml", **{"budget": "cpu", "out": tmp_path / "out", **arguments})

    return make


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of MLflow; it takes seconds to set up, so the tests share it."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def store(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's store of this test, not that of the current folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


class Watched:
    """Which cells were trained, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def __call__(self, exp: Experiment) -> Iterator[Observer]:
        self.names.append(exp.name)
        yield lambda records: None


def names(cells: list[Cell]) -> list[tuple[str, str]]:
    return [(cell.algorithm, cell.setting) for cell in cells]


def written(cell: Cell, *, status: str = "finished", **scores: tuple[float, float]) -> RunFolder:
    """A run of a cell as training leaves it, without training."""
    run = RunFolder(cell.folder / "001")
    machine = {"processor": "Z80", "cores": 2, "gpu": None, "workers": 2, "threads_per_worker": 1}
    run.describe(cell.experiment, data_digest="d" * 64, hardware=[machine])
    with journal.JournalWriter(run.journal, resume_step=0) as writer:
        for step in range(1, 5):
            writer.append(step, {"step_seconds": 15.0, "meta_loss": 0.1})
    run.update(status=status)
    if scores:
        content = {m: [{"mean": 0.5, "ci95": 0.1}, {"mean": a, "ci95": ci}] for m, (a, ci) in scores.items()}
        run.evaluation.mkdir()
        (run.evaluation / "test.json").write_text(json.dumps({"episodes": 600, **content}))
    return run


# --- the plan


def test_cells_come_setting_by_setting_in_the_order_of_the_file(make: Callable[..., Plan]) -> None:
    plan = make()
    assert names(plan.cells) == [("maml", "2w1s"), ("anil", "2w1s"), ("maml", "2w3s")]
    assert [cell.minutes for cell in plan.cells] == [None, 8.0, 5.0]
    assert plan.cells[2].experiment.task.k_shot == 3
    assert plan.cells[1].experiment.algorithm.name == "anil"
    assert len({cell.name for cell in plan.cells}) == 3
    assert not any(cell.experiment.tracking.register_model for cell in plan.cells)
    assert names(plan.select(only=["maml"])) == [("maml", "2w1s"), ("maml", "2w3s")]
    assert names(plan.select(only=["maml", "anil"], settings=["2w1s"])) == [("maml", "2w1s"), ("anil", "2w1s")]
    with pytest.raises(ConfigError, match="--only boil: the cpu budget has only maml, anil"):
        plan.select(only=["boil"])
    with pytest.raises(ConfigError, match="--settings 9w9s"):
        plan.select(settings=["9w9s"])
    with pytest.raises(ConfigError, match="the cpu budget has no such cell, only anil 2w1s"):
        plan.select(only=["anil"], settings=["2w3s"])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"2w3s": {}}, r"algorithms\.maml\.cells\.2w3s: its test tasks are \(n_way, k_shot\) = \(2, 1\)"),
        ({"2w1s": {"set": {"training.stepz": 1}}}, r"cells\.2w1s .*base\.yaml.*training\.stepz: unknown key"),
        ({"2w1s": {"set": {"task": {"family": "sinusoid"}}}}, r"test tasks are \(n_way, k_shot\) = \(\)"),
        ({"4w1s": {}}, r"cells\.4w1s: is not one of the budget's settings"),
        ({"2w1s": {"minutes": 0}}, r"cells\.2w1s\.minutes: .*greater than 0"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    cell: dict[str, Any], message: str, make: Callable[..., Plan]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make({"maml": {"config": "base.yaml", "cells": cell}})


def test_a_budget_that_the_file_lacks(make: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match="has no budget 'gpu'; it has cpu"):
        make(budget="gpu")


def test_the_command_of_a_cell_trains_the_same_experiment(make: Callable[..., Plan], tiny_data: Path) -> None:
    algorithms = {
        "maml": {
            "config": "base.yaml",
            "set": {"training.outer": {"optimizer": "sgd", "outer_lr": 1e-5}, "model.hidden": [3, 4]},
            "cells": {"2w1s": {"set": {"training.compile": True, "training.memory_budget": "4 GB"}}},
        }
    }
    for cell in make(algorithms).cells + make(data=str(tiny_data)).cells:
        words = shlex.split(reproduce_table.command(cell))
        assert words[:2] == ["metapipe", "train"]
        overrides = [word for word in words[3:] if word != "--set"]
        loaded = experiment.load(words[2], overrides).absolute()
        assert loaded.model_copy(update={"tracking": cell.experiment.tracking}) == cell.experiment


def test_shipped_plans_load() -> None:
    for budget in ("cpu", "gpu"):
        plan = reproduce.load(SHIPPED, budget=budget, out="out")
        assert plan.cells[0].algorithm == "maml"
        assert plan.settings[0] == "5w1s"
        assert {cell.algorithm for cell in plan.cells} <= plan.methods.keys()
        assert {setting for m in plan.methods.values() for setting in m.results} <= set(plan.settings)
    cpu = reproduce.load(SHIPPED, budget="cpu", out="out").select(settings=["5w1s"])
    assert sum(cell.minutes or 0 for cell in cpu) <= 125, "two hours on two busy cores for the 5-way 1-shot column"


# --- the table


def test_rows_say_what_became_of_each_cell(make: Callable[..., Plan]) -> None:
    plan = make()
    maml, anil, maml_3s = plan.cells
    written(maml, inductive=(0.979, 0.01), transductive=(0.9831, 0.002))
    written(anil, status="running")
    reproduce._note_failure(maml_3s, ConfigError("no such thing | here"))
    rows = {(row.algorithm, row.setting): row for row in reproduce_table.rows(plan)}
    assert [row.status for row in rows.values()] == [
        *("finished", "failed"),
        *("under way", "not run"),
        *("not run", "not run"),
    ]
    row = rows["maml", "2w1s"]
    assert (str(row.inductive), str(row.transductive)) == ("97.90 ± 1.00", "98.31 ± 0.20")
    assert row.reached == ["transductive"], "98.3 is where the published interval begins; of inductive it says nothing"
    assert (row.training_minutes, row.outer_steps, row.episodes) == (1.0, 4, 600)
    assert rows["anil", "2w1s"].note == f"outer step 4 of {STEPS}"
    assert rows["maml", "2w3s"].note == "no such thing | here"
    assert rows["anil", "2w3s"].command is None, "not in the plan, but published"

    text = reproduce_table.markdown(plan, list(rows.values()))
    assert "| MAML | published | 98.70 ± 0.40 (transductive) | – |" in text
    assert "|  | ours, inductive | 97.90 ± 1.00 | failed |" in text
    assert "|  | ours, transductive | **98.31 ± 0.20** | failed |" in text
    assert "| ANIL | published | 96.0 | 90.00 ± 1.00 (inductive)<br>95.0 (transductive) |" in text
    assert "|  | ours, inductive | under way | not run |" in text
    assert "| MAML | 2w1s | finished | 600 | 4 | 1.0 | 2 cores of Z80, 2 workers of 1 thread | " in text
    assert "failed: no such thing \\| here" in text
    assert reproduce_table.command(maml) in text
    assert "- Another: Nobody. Not ours." in text


def test_the_files_hold_every_cell_and_any_table_has_a_picture(make: Callable[..., Plan]) -> None:
    plan = make()
    for ours in ({}, {"inductive": (1.0, 0.0), "transductive": (1.0, 0.0)}):
        if ours:
            written(plan.cells[0], **ours)
        markdown, data, picture = reproduce_table.write(plan, reproduce_table.rows(plan))
        assert markdown.name == "results-cpu.md"
        cells = json.loads(data.read_text())["cells"]
        assert len(cells) == 3 * 2
        assert cells[0]["inductive"] == ({"mean": 1.0, "ci95": 0.0} if ours else None)
        assert cells[0]["published"] == {"transductive": {"mean": 0.987, "ci95": 0.004}}
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_of_another_configuration_or_data_set_does_not_count(make: Callable[..., Plan]) -> None:
    cell = make().cells[0]
    written(cell, inductive=(0.9, 0.1), transductive=(0.9, 0.1))
    assert reproduce.standing(cell, data_digest="d" * 64).status == "finished"
    changed = {**ALGORITHMS, "maml": {**ALGORITHMS["maml"], "set": {"algorithm.inner_lr": 0.2}}}
    for found in (reproduce.standing(make(changed).cells[0]), reproduce.standing(cell, data_digest="e" * 64)):
        assert found.status == "not run"
        assert "was run differently" in found.note
    assert (
        reproduce.standing(
            make({**ALGORITHMS, "maml": {**ALGORITHMS["maml"], "set": {"training.max_failures": 7}}}).cells[0]
        ).status
        == "finished"
    )


# --- running


def test_a_data_set_that_is_not_there(make: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make(data=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere: no such data set\. Prepare it with `prepare it`.*--data"):
        reproduce.run(plan, plan.cells, watch=Watched())


def test_tasks_that_the_data_set_is_too_small_for(make: Callable[..., Plan]) -> None:
    """Of the last cell: before the first one is trained."""
    many = {"set": {"task.k_shot": 3, "task.eval_n_query": 900}}
    plan = make({"maml": {"config": "base.yaml", "cells": {"2w1s": {}, "2w3s": many}}})
    watched = Watched()
    with pytest.raises(DataError, match=r"too few for task\.k_shot=3 plus task\.eval_n_query=900"):
        reproduce.run(plan, plan.cells, watch=watched)
    assert watched.names == []


def test_a_gpu_that_is_not_there(make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    algorithms = {"maml": {"config": "base.yaml", "set": {"training.use_gpu": True}, "cells": {"2w1s": {}}}}
    plan = make(algorithms)
    with pytest.raises(ConfigError, match="no CUDA device"):
        reproduce.run(plan, plan.cells, watch=Watched())


@pytest.mark.usefixtures("one_thread", "store")
def test_one_failing_cell_stops_no_other_and_the_next_command_tries_it_again(make: Callable[..., Plan]) -> None:
    algorithms = {
        "maml": {"config": "base.yaml", "set": FAILING, "cells": {"2w1s": {}}},
        "anil": {"config": "base.yaml", "set": {"algorithm.name": "anil"}, "cells": {"2w1s": {}}},
    }
    plan = make(algorithms)
    watched, said, written_after = Watched(), [], []

    def after_each() -> None:
        written_after.append([reproduce.standing(cell).status for cell in plan.cells])

    failed = reproduce.run(plan, plan.cells, watch=watched, say=said.append, after_each=after_each)
    assert failed == 1
    assert watched.names == [cell.name for cell in plan.cells]
    assert written_after[-1] == ["failed", "finished"]
    rows = {row.algorithm: row for row in reproduce_table.rows(plan) if row.setting == "2w1s"}
    assert "not finite" in rows["maml"].note
    assert any("failed: training stopped" in line for line in said)
    finished = rows["anil"]
    run = RunFolder(finished.run or "")
    seconds = sum(record["step_seconds"] for record in journal.read(run.journal))
    assert finished.training_minutes == pytest.approx(seconds / 60)
    assert 0 < seconds < 60
    assert finished.outer_steps == STEPS
    assert finished.episodes == 6
    assert finished.hardware[0]["workers"] == 1
    assert finished.hardware[0]["cores"] >= 1
    assert finished.hardware[0]["gpu"] is None
    logged = mlflow.MlflowClient().get_run(finished.mlflow_run_id or "")
    assert logged.data.metrics["test_accuracy_inductive"] == pytest.approx(finished.inductive.mean)
    assert logged.data.params["algorithm.name"] == "anil"

    again = Watched()
    assert reproduce.run(plan, plan.cells, watch=again, say=said.append) == 1
    assert again.names == [plan.cells[0].name], "the failed one alone"
    assert "[2/2] anil 2w1s: finished before" in said
    assert latest_run(plan.cells[1].folder).number == 1
    assert reproduce.run(plan, plan.cells[1:], watch=again, say=said.append, fresh=True) == 0
    assert latest_run(plan.cells[1].folder).number == 2


@pytest.mark.usefixtures("one_thread", "store")
def test_a_killed_command_goes_on_where_it_was(make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    algorithms = {name: {"config": "base.yaml", "cells": {"2w1s": {}}} for name in ("maml", "anil")}
    plan = make(algorithms)  # both of them the same training, the first one interrupted
    taken = loop._queue_outer_step
    computed = []

    def interrupted(context: Any, exp: Any, parts: Any, state: Any, *rest: Any, **how: Any) -> Any:
        if state.step == 4 and computed.count(4) == 0:  # with a checkpoint of step 4
            computed.append(state.step)
            raise Interrupted
        computed.append(state.step)
        return taken(context, exp, parts, state, *rest, **how)

    monkeypatch.setattr(loop, "_queue_outer_step", interrupted)
    with pytest.raises(Interrupted):
        reproduce.run(plan, plan.cells, watch=Watched(), say=lambda _: None)
    assert [reproduce.standing(cell).status for cell in plan.cells] == ["under way", "not run"]
    assert reproduce.standing(plan.cells[0]).note == f"outer step 4 of {STEPS}"
    assert computed == [0, 1, 2, 3, 4]

    assert reproduce.run(plan, plan.cells, watch=Watched(), say=lambda _: None) == 0
    assert computed == [0, 1, 2, 3, 4, 4, 5, *range(STEPS)]
    first, second = (latest_run(cell.folder) for cell in plan.cells)
    assert first is not None
    assert second is not None
    assert first.number == 1
    assert [record["step"] for record in journal.read(first.journal)] == [*range(1, STEPS + 1)]
    assert reproduce.test_of(first) == reproduce.test_of(second), "as if it had never been interrupted"
    assert len(reproduce.hardware_of(first)) == 1, "on one machine, though started twice"


@pytest.mark.usefixtures("one_thread", "store")
def test_what_does_not_fit_into_the_minutes_is_left_out(make: Callable[..., Plan]) -> None:
    plan = make()  # no estimate, 8 minutes, 5 minutes
    watched, said = Watched(), []
    assert reproduce.run(plan, plan.cells, watch=watched, minutes=6, say=said.append) == 0
    assert watched.names == [plan.cells[0].name, plan.cells[2].name]
    assert any("anil 2w1s: left out, it takes about 8 minutes and" in line for line in said)
    assert reproduce.standing(plan.cells[1]).status == "not run"
    written(plan.cells[1], status="running")  # 4 of 6 steps are done: under 3 minutes are left
    assert reproduce._minutes_needed(plan.cells[1], reproduce.standing(plan.cells[1])) == pytest.approx(8 / 3)
    assert reproduce.run(plan, plan.cells, watch=watched, minutes=0, say=said.append) == 0
    assert len(watched.names) == 2


def test_the_command_writes_the_table_without_training(
    make: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import cli

    plan = make()
    written(plan.cells[0], inductive=(0.9, 0.01), transductive=(0.95, 0.01))
    arguments = ["reproduce", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--table-only", "--json"]
    monkeypatch.setattr("sys.argv", ["metapipe", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    answer = json.loads(capsys.readouterr().out)
    assert answer == json.loads((tmp_path / "out" / "results-cpu.json").read_text())
    assert [cell["status"] for cell in answer["cells"]].count("finished") == 1
