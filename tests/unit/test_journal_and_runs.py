"""The metrics journal loses nothing and tells nothing twice; a command goes on with the right run, or is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import experiment
from pipeline.errors import ConfigError, DataError
from pipeline.experiment import Experiment
from pipeline.runs import CONFIG_FILE, RUN_FILE, claimed, find_run, latest_run, open_run, runs_of
from pipeline.training import journal
from pipeline.training.journal import JournalReader, JournalWriter

# --- the journal


def append_all(path: Path, steps: range, *, resume_step: int = 0) -> None:
    writer = JournalWriter(path, resume_step=resume_step)
    for step in steps:
        writer.append(step, {"loss": step / 2})
    writer.close()


def told(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records]


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, step / 2) for step in steps]


def test_records_come_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = JournalReader(path)
    assert reader.new_records() == []  # no file yet
    append_all(path, range(1, 4))
    assert told(reader.new_records()) == expected(range(1, 4))
    assert reader.new_records() == []
    append_all(path, range(4, 6), resume_step=3)
    assert told(reader.new_records()) == expected(range(4, 6))
    assert told(journal.read(path)) == expected(range(1, 6))


def test_resumed_writer_repeats_steps_and_the_reader_does_not(tmp_path: Path) -> None:
    """Killed at step 9 with a checkpoint at 5: steps 6 to 9 are written again, and reach the reader once."""
    path = tmp_path / "metrics.jsonl"
    reader = JournalReader(path)
    append_all(path, range(1, 8))
    assert told(reader.new_records()) == expected(range(1, 8))
    append_all(path, range(8, 10), resume_step=7)
    append_all(path, range(6, 13), resume_step=5)
    assert told(reader.new_records()) == expected(range(8, 13))
    assert told(journal.read(path)) == expected(range(1, 13))


def test_reader_that_starts_late_goes_on_after_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_all(path, range(1, 8))
    assert told(JournalReader(path, after_step=5).new_records()) == expected(range(6, 8))
    assert told(JournalReader(path).new_records()) == expected(range(1, 8))


def test_half_written_last_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_all(path, range(1, 3))
    reader = JournalReader(path)
    line = json.dumps({"step": 3, "loss": 1.5}) + "\n"
    with path.open("a") as stream:
        stream.write(line[:9])
    assert told(reader.new_records()) == expected(range(1, 3))
    assert told(journal.read(path)) == expected(range(1, 3))
    with path.open("a") as stream:
        stream.write(line[9:])
    assert told(reader.new_records()) == expected(range(3, 4))


@settings(max_examples=50, deadline=None)
@given(
    attempts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30), st.booleans()), min_size=1, max_size=6),
    data=st.data(),
)
def test_any_history_of_kills_and_resumptions(
    attempts: list[tuple[int, int, bool]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each attempt trains on from a checkpoint and is cut short, maybe within a line; a reader polls at will."""
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    reader, received, last = JournalReader(path), [], 0
    for steps, cut, poll in attempts:
        resume = data.draw(st.integers(0, last))  # a checkpoint's step; its lines had been flushed
        last = resume + steps
        append_all(path, range(resume + 1, last + 1), resume_step=resume)
        if cut:
            with path.open("a") as stream:
                stream.write('{"step": 99, "loss": 12345678.9}'[:cut])
        if poll:
            received += reader.new_records()
    append_all(path, range(last + 1, 100), resume_step=last)
    received += reader.new_records()
    assert told(received) == expected(range(1, 100))
    assert told(journal.read(path)) == expected(range(1, 100))


def test_records_are_whole_json_with_step_and_time(tmp_path: Path) -> None:
    append_all(tmp_path / "metrics.jsonl", range(1, 3))
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 1.6e12 < first["time"] <= second["time"]
    assert set(first) == {"step", "time", "loss"}


# --- which run a command goes on with

CONTENT: dict[str, Any] = {
    "name": "trial",
    "task": {"family": "sinusoid"},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "maml", "inner_lr": 0.01},
    "training": {"steps": 10, "meta_batch_size": 4, "backend": "local"},
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Experiment]:
    """Experiments whose runs go to tmp_path/runs; keyword arguments replace sections' keys."""

    def make(**training: Any) -> Experiment:
        content = {**CONTENT, "training": {**CONTENT["training"], **training}}
        return experiment.from_dict({**content, "tracking": {"runs": str(tmp_path / "runs")}}, source="test")

    return make


def test_unfinished_run_goes_on_and_finished_one_leads_to_the_next(make: Callable[..., Experiment]) -> None:
    first, resumed = open_run(make(), data_digest="d" * 64)
    assert (first.number, resumed) == (1, False)
    assert first.experiment() == make()
    assert not first.finished
    again, resumed = open_run(make(), data_digest="d" * 64)
    assert (again.path, resumed) == (first.path, True)
    first.update(status="finished")
    assert first.finished
    second, resumed = open_run(make(steps=20), data_digest="e" * 64)
    assert (second.number, resumed) == (2, False)
    assert second.read()["data_digest"] == "e" * 64
    assert first.read()["data_digest"] == "d" * 64


def test_numbers_are_ordered_as_numbers(make: Callable[..., Experiment]) -> None:
    for number in range(1, 4):
        run, _ = open_run(make(), data_digest="d")
        run.update(status="finished")
        assert run.number == number
    run.path.rename(run.path.with_name("999"))
    run, _ = open_run(make(), data_digest="d")
    assert run.number == 1000
    run.update(status="finished")
    assert open_run(make(), data_digest="d")[0].number == 1001


def test_changed_configuration_is_refused_and_named(make: Callable[..., Experiment]) -> None:
    run, _ = open_run(make(), data_digest="d" * 64)
    with pytest.raises(ConfigError) as caught:
        open_run(make(steps=20, outer={"outer_lr": 0.5}), data_digest="d" * 64)
    message = str(caught.value)
    assert message.startswith(str(run.path))
    assert "training.steps: 10 -> 20" in message
    assert "training.outer.outer_lr: 0.001 -> 0.5" in message
    assert "meta_batch_size" not in message
    assert "--fresh" in message
    assert open_run(make(), data_digest="d" * 64)[1], "the old values still go on"


def test_changed_data_set_is_refused(make: Callable[..., Experiment]) -> None:
    open_run(make(), data_digest="d" * 64)
    with pytest.raises(ConfigError, match=r"data set digest: d{12} -> e{12}"):
        open_run(make(), data_digest="e" * 64)


def test_where_results_go_is_no_change(make: Callable[..., Experiment]) -> None:
    run, _ = open_run(make(), data_digest="d")
    exp = make()
    tracking = exp.tracking.model_copy(update={"experiment": "another", "register_model": False})
    assert open_run(exp.model_copy(update={"tracking": tracking}), data_digest="d")[0].path == run.path


def test_where_a_networks_code_lies_is_no_change(make: Callable[..., Experiment], tmp_path: Path) -> None:
    """Each job on a cluster unpacks it into another folder."""

    def network(folder: str) -> Experiment:
        model = {"name": "module", "factory": "nets:make", "folder": str(tmp_path / folder)}
        return experiment.from_dict({**make().to_dict(), "model": model}, source="test")

    run, _ = open_run(network("job1"), data_digest="d")
    again, resumed = open_run(network("job2"), data_digest="d")
    assert (again.path, resumed) == (run.path, True)


def test_fresh_leaves_the_unfinished_run_as_it_is(make: Callable[..., Experiment]) -> None:
    first, _ = open_run(make(), data_digest="d")
    before = (first.path / RUN_FILE).read_bytes(), (first.path / CONFIG_FILE).read_bytes()
    second, resumed = open_run(make(steps=20), data_digest="e", fresh=True)
    assert (second.number, resumed) == (2, False)
    assert ((first.path / RUN_FILE).read_bytes(), (first.path / CONFIG_FILE).read_bytes()) == before
    assert open_run(make(steps=20), data_digest="e")[0].path == second.path


@pytest.mark.parametrize(
    "left", [[], [".config.yaml.partial"], [CONFIG_FILE], [CONFIG_FILE, ".run.json.partial"], [CONFIG_FILE, RUN_FILE]]
)
def test_killed_while_a_run_was_being_set_up(left: list[str], make: Callable[..., Experiment]) -> None:
    """Whatever files it got to: the same command again makes the run or goes on with it."""
    run, _ = open_run(make(), data_digest="d")
    content = {file.name: file.read_bytes() for file in run.path.iterdir()}
    for file in run.path.iterdir():
        file.unlink()
    for name in left:
        whole = content.get(name)
        (run.path / name).write_bytes(b"half" if whole is None else whole)
    again, resumed = open_run(make(), data_digest="d")
    assert again.path == run.path
    assert resumed == (RUN_FILE in left)
    assert again.experiment() == make()
    assert again.read()["status"] == "running"


def test_update_keeps_the_other_entries(make: Callable[..., Experiment]) -> None:
    run, _ = open_run(make(), data_digest="d")
    assert run.update(registered_version=3) == run.read()
    assert run.read() == {"status": "running", "name": "trial", "data_digest": "d", "registered_version": 3}
    assert sorted(p.name for p in run.path.iterdir()) == [CONFIG_FILE, RUN_FILE]


def test_find_run(make: Callable[..., Experiment], tmp_path: Path) -> None:
    first, _ = open_run(make(), data_digest="d")
    first.update(status="finished")
    second, _ = open_run(make(), data_digest="d")
    assert find_run(first.path).path == first.path
    assert find_run(first.path.parent).path == second.path
    with pytest.raises(DataError, match=r"nothing: holds no run"):
        find_run(tmp_path / "nothing")
    assert latest_run(tmp_path / "nothing") is None


@pytest.mark.parametrize("content", ["", "{", "not JSON"])
def test_damaged_run_file_is_named(content: str, make: Callable[..., Experiment]) -> None:
    run, _ = open_run(make(), data_digest="d")
    (run.path / RUN_FILE).write_text(content)
    with pytest.raises(DataError, match=r"001/run\.json: cannot be read"):
        run.read()


HOLDER = """
import sys, time
from pathlib import Path
from pipeline.runs import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_works_on_a_name(make: Callable[..., Experiment]) -> None:
    folder = runs_of(make())
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(ConfigError, match="another process is training a run of this name"), claimed(folder):
                pass
        finally:
            process.kill()
    with claimed(folder):  # the lock went with the process
        pass


def test_a_runs_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"tracking\.runs"), claimed(tmp_path / "file" / "name"):
        pass
