"""The whole way of a sweep: trials, each a child run in MLflow; the best one re-evaluated, registered, promoted.

RUNS/SWEEP/001/sweep.json           what is searched, to go on with
RUNS/SWEEP/001/run.json             status, data digest, MLflow runs of the sweep and of its trials
RUNS/SWEEP/001/trials/TRIAL/        a run folder each (runs.py)
RUNS/SWEEP/001/evaluation/          trials.parquet, trials.csv, sweep.png
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import config, launch, results, runs, storage, sweep_pictures, tuning, workflow
from pipeline import experiment as experiments
from pipeline.errors import ConfigError, TrackingError, TrainingStopped, UserError
from pipeline.runs import RunFolder
from pipeline.storage import Location
from pipeline.sweep import Params, Sweep
from pipeline.tracking import RunLog, Tracker
from pipeline.training import journal
from pipeline.training.evaluate import FRESH_SEED, Estimate, Evaluation, evaluate
from pipeline.training.memory import keep_freed_memory
from pipeline.workflow import Delivery, Registration

SWEEP_FILE = "sweep.json"
FOLLOW_SECONDS = 1.0


@dataclass(frozen=True)
class Trial:
    """What became of a trial."""

    name: str
    run: RunFolder
    params: Params
    status: str  # finished, stopped (by the scheduler or the budget), failed, running (not ended yet)
    step: int  # outer steps it came to
    score: float | None  # its best validation's, on the selection episodes; None before the first
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        fields = {"trial": self.name, "status": self.status, "step": self.step, "score": self.score}
        return {**fields, **self.params, "error": self.error}


class Outcome(NamedTuple):
    """A finished sweep."""

    folder: Location
    trials: list[Trial]  # the best first
    best: Trial
    fresh: Estimate  # the best trial on validation episodes that chose nothing
    score_name: str
    test: Evaluation
    registration: Registration | None
    mlflow_run_id: str
    resumed: bool
    hint: str


def tune(sweep: Sweep, *, fresh: bool = False, say: Callable[[str], None] = print) -> Outcome:
    """Run a sweep, or go on with one; re-evaluate its best trial, register it.

    Raises UserError: bad input, before any trial starts; TrainingStopped: no trial came to a validation.
    """
    keep_freed_memory()
    sweep = sweep.absolute()
    base = sweep.base
    data_digest = experiments.check_fits(base, under_ray=True)
    tracker = Tracker()
    parent = storage.location(base.tracking.runs).absolute() / sweep.settings.name
    with runs.claimed(parent):
        folder, resumed = _open(sweep, parent, data_digest=data_digest, fresh=fresh)
        say(f"{'going on with' if resumed else 'sweep'} {folder.path}")
        log = _open_log(sweep, folder, tracker)
        try:
            with _following(sweep, folder, log, tracker, say) as children:
                _run(sweep, folder, data_digest, say)
            trials = trials_of(folder, sweep)
            _end_children(trials, children)
            best = _best(trials, folder)
            outcome = _conclude(sweep, folder, trials, best, children[best.name], log, tracker, data_digest, say)
        except BaseException as error:
            with suppress(TrackingError):
                log.end("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        log.end("FINISHED")
        folder.update(status="finished")
    return outcome._replace(resumed=resumed)


def _open(sweep: Sweep, parent: Location, *, data_digest: str, fresh: bool) -> tuple[RunFolder, bool]:
    """The sweep's folder, and whether it is an unfinished one to go on with. Raises ConfigError: it was another."""
    last = runs.latest_run(parent)
    if last is not None and not last.finished and not fresh:
        before = json.loads((last.path / SWEEP_FILE).read_text())
        changes = config.differences(before, json.loads(json.dumps(sweep.to_dict())))
        if last.read()["data_digest"] != data_digest:
            changes.append("data set digest")
        if changes:
            raise ConfigError(
                f"{last.path}: this sweep is unfinished and was started differently: {'; '.join(changes)}. Go on with "
                "the old values, start anew with --fresh, or give the sweep another name."
            )
        return last, True
    folder = RunFolder(parent / f"{last.number + 1 if last else 1:03d}")
    storage.make_folder(folder.path / "trials")
    storage.write(folder.path / SWEEP_FILE, json.dumps(sweep.to_dict(), indent=1) + "\n")
    folder.update(status="running", name=sweep.settings.name, data_digest=data_digest)
    return folder, False


def _open_log(sweep: Sweep, folder: RunFolder, tracker: Tracker) -> RunLog:
    facts = folder.read()
    known = facts.get("mlflow_run_id") if facts.get("mlflow_uri") == tracker.uri else None
    log = tracker.start(
        sweep.base,
        run_name=f"{sweep.settings.name}/{folder.path.name}",
        data_digest=facts["data_digest"],
        run_id=known,
    )
    if log.run_id != known:
        folder.update(mlflow_run_id=log.run_id, mlflow_uri=tracker.uri, children={})
        log.tags({"sweep": sweep.settings.name})
    return log


def _run(sweep: Sweep, folder: RunFolder, data_digest: str, say: Callable[[str], None]) -> None:
    deadline = time.monotonic() + 60 * (sweep.settings.budget_minutes or float("inf"))

    def ended(name: str, status: str, error: str) -> None:
        run = RunFolder(folder.path / "trials" / name)
        facts = run.read() if run.exists else {}
        if status == tuning.STOPPED and facts.get("status") == tuning.RUNNING and time.monotonic() < deadline:
            facts = run.update(status=status)  # by the scheduler; one that ran out of time may be gone on with
        if status == tuning.FINISHED and facts.get("status") == tuning.RUNNING:
            facts = run.update(status=status)  # ended by the scheduler at its last step
        if status == tuning.FAILED and facts.get("status") == tuning.RUNNING:
            facts = run.update(status=status, error=error)  # its process died, and could not write that itself
        reason = facts.get("error") or error
        told = f": {reason}" if reason else ""
        say(f"trial {name} {facts.get('status', status)}, {_shown(facts.get('params', {}))}{told}")

    known = [trial.params for trial in trials_of(folder, sweep)]
    tuning.run_trials(sweep, folder.path / "trials", data_digest=data_digest, known=known, on_end=ended)


def _shown(params: Params) -> str:
    return ", ".join(f"{k.rsplit('.', 1)[-1]}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in params.items())


def trials_of(folder: RunFolder, sweep: Sweep) -> list[Trial]:
    """Every trial that has begun, the best first."""
    places = (folder.path / "trials").iterdir() if (folder.path / "trials").is_dir() else ()
    found = [_trial(RunFolder(path), sweep) for path in places if (path / runs.RUN_FILE).exists()]
    return sorted(found, key=lambda trial: (trial.score is None, -(trial.score or 0.0) * _sign(sweep), trial.name))


def _trial(run: RunFolder, sweep: Sweep) -> Trial:
    facts = run.read()
    latest = run.checkpoints.latest()
    meta = run.checkpoints.meta(latest) if latest is not None else {}
    records = journal.read(run.journal)
    return Trial(
        name=run.path.name,
        run=run,
        params=facts.get("params", {}),
        status=facts["status"],
        step=max((record["step"] for record in records), default=0),
        score=meta.get("best_score"),
        error=facts.get("error"),
    )


def _sign(sweep: Sweep) -> int:
    return 1 if experiments.build(sweep.base, device=launch.default_device()).family.objective.higher_is_better else -1


def _best(trials: list[Trial], folder: RunFolder) -> Trial:
    if not trials or trials[0].score is None:
        errors = sorted({trial.error for trial in trials if trial.error})
        raise TrainingStopped(
            f"{folder.path}: none of {len(trials)} trials came to a finite validation"
            + (f" ({errors[0]})" if errors else "")
            + ". Narrow the ranges, or give the trials more time."
        )
    return trials[0]


# --- MLflow


@contextmanager
def _following(
    sweep: Sweep, folder: RunFolder, log: RunLog, tracker: Tracker, say: Callable[[str], None]
) -> Iterator[dict[str, RunLog]]:
    """A child run for each trial as it begins, and its journal's records delivered; by name."""
    children: dict[str, RunLog] = {}
    deliveries: dict[str, Delivery] = {}
    done = threading.Event()

    def look() -> None:
        known = folder.read().get("children", {})
        for path in (folder.path / "trials").iterdir():
            run = RunFolder(path)
            if path.name not in children and run.exists:
                child = tracker.start(
                    run.experiment(),
                    run_name=f"{sweep.settings.name}/{folder.path.name}/{path.name}",
                    data_digest=run.read()["data_digest"],
                    run_id=known.get(path.name),
                    parent=log.run_id,
                )
                known = folder.update(children={**known, path.name: child.run_id})["children"]
                deliveries[path.name] = Delivery(run, child, say)
                children[path.name] = child
        for delivery in deliveries.values():
            delivery.try_once()

    def follow() -> None:
        while not done.wait(FOLLOW_SECONDS):
            with suppress(UserError, OSError):  # a server or a store that does not answer: again the next time
                look()

    follower = threading.Thread(target=follow, name="trials", daemon=True)
    follower.start()
    try:
        yield children
    finally:
        done.set()
        follower.join()
    look()
    for delivery in deliveries.values():
        delivery.insist()


def _end_children(trials: list[Trial], children: dict[str, RunLog]) -> None:
    for trial in trials:
        child = children[trial.name]
        child.tags({"sweep.status": trial.status, "sweep.step": str(trial.step)})
        if trial.error:
            child.tags({"sweep.error": trial.error[:5000]})
            child.text(trial.run.read().get("traceback", trial.error), "error.txt")
        child.end("FAILED" if trial.status == tuning.FAILED else "FINISHED")


# --- the end


def _conclude(
    sweep: Sweep,
    folder: RunFolder,
    trials: list[Trial],
    best: Trial,
    child: RunLog,
    log: RunLog,
    tracker: Tracker,
    data_digest: str,
    say: Callable[[str], None],
) -> Outcome:
    """Table and picture; the best trial on fresh episodes and on the test episodes; registered."""
    exp = best.run.experiment()
    parts = experiments.build(exp, device=launch.default_device())
    step, state = workflow.best_checkpoint(best.run)
    say(f"the best of {len(trials)} trials, {best.name}, on {sweep.settings.fresh_episodes} fresh episodes")
    evaluation = evaluate(
        parts.algorithm,
        parts.family,
        state,
        split="meta_val",
        seed=FRESH_SEED,
        episodes=sweep.settings.fresh_episodes,
        data_digest=data_digest,
        chunk=experiments.task_chunk(exp, parts, launch.default_device()),
    )
    fresh = evaluation.score(exp.evaluation.selection_mode)
    test = workflow.evaluate_run(exp, best.run, parts, child, data_digest)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        results.write_trials([trial.to_dict() for trial in trials], place)
        sweep_pictures.sweep(
            [(trial.params, trial.score, trial.status, journal.read(trial.run.journal)) for trial in trials],
            metric=tuning.score_key(exp, parts),
            higher_is_better=parts.family.objective.higher_is_better,
            file=place / "sweep.png",
        )
        storage.copy_folder(place, folder.evaluation)
        log.artifacts(place, "sweep")
    log.text((folder.path / SWEEP_FILE).read_text(), "sweep/sweep.json")
    assert best.score is not None
    values = {"best_selection": best.score, "best_fresh": fresh.mean, "best_fresh_ci95": fresh.half_width}
    log.summary(values, step=exp.training.steps)
    log.tags({"sweep.best_trial": best.name, "sweep.best_run": child.run_id, "sweep.best_step": str(step)})
    log.tags({f"sweep.best.{key}": str(value) for key, value in best.params.items()})
    registration = None
    if exp.tracking.register_model:
        say("comparing with the champion on validation episodes that serve nothing else")
        best.run.update(mlflow_run_id=child.run_id, mlflow_uri=tracker.uri)
        registration = workflow.register_run(exp, best.run, parts, tracker, test)
    child.end("FINISHED")
    return Outcome(
        folder.path,
        trials,
        best,
        fresh,
        test.score_name,
        test,
        registration,
        log.run_id,
        resumed=False,
        hint=tracker.hint,
    )
