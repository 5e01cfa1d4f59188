"""Trials of a sweep under Ray Tune. A trial is a run folder; Ray's own experiment state is written and never read.

When a sweep is run again, each trial reports what its journal already holds, so that searcher and scheduler learn what
they had learnt, and goes on from its own last checkpoint.
"""

from __future__ import annotations

import math
import os
import secrets
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import experiment as experiments
from pipeline import initial, launch, storage
from pipeline.credentials import redacted
from pipeline.errors import Interrupted, StopRequested, UserError
from pipeline.experiment import Components, Experiment
from pipeline.runs import RunFolder
from pipeline.sweep import ASHA, PBT, MedianStopping, Params, Range, Sweep, digest
from pipeline.training import journal
from pipeline.training.checkpoint import META_FILE, STATE_FILE
from pipeline.training.context import LocalContext, StopSignals
from pipeline.training.loop import train

if TYPE_CHECKING:
    from ray.tune import Checkpoint, ResultGrid

DRIVER_MEMORY = 256 << 20  # bytes; what the driver of a distributed trial claims, so that it takes no worker's CPU
FOLLOW_SECONDS = 0.5
STOP_SECONDS = 5.0  # for the workers of a trial that was stopped, to end by themselves
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"


def run_trials(
    sweep: Sweep,
    folder: storage.Location,
    *,
    data_digest: str,
    known: Sequence[Params],
    on_end: Callable[[str, str, str], None],
) -> None:
    """Run every trial under `folder`, which holds a run folder for each; returns when all have ended.

    known: what earlier attempts have drawn (searcher optuna). on_end: is told a trial's name and status, and
    why its process died.

    A trial that fails ends no other. Raises Interrupted.
    """
    training = sweep.base.training
    workers = max(1, sweep.settings.workers_per_trial)
    cpus = workers * training.cpus_per_worker
    with (
        launch.ray_cluster(cpus),
        StopSignals() as signals,
        ThreadPoolExecutor(1, thread_name_prefix="ray-tune") as pool,
    ):
        fit = pool.submit(_fit, sweep, folder, data_digest, known, on_end)
        while not fit.done():
            if signals.received is not None:
                import ray

                ray.shutdown()  # every trial has the checkpoint of its last validation
                raise Interrupted(signals.received)
            threading.Event().wait(FOLLOW_SECONDS)
        fit.result()


def _fit(
    sweep: Sweep,
    folder: storage.Location,
    data_digest: str,
    known: Sequence[Params],
    on_end: Callable[[str, str, str], None],
) -> ResultGrid:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints to standard output, which is for results
    from ray import tune

    settings, training = sweep.settings, sweep.base.training
    score = _score(sweep.base)
    constant = {
        "folder": str(folder),
        "data_digest": data_digest,
        "sweep": {"settings": settings.model_dump(mode="json"), "base": sweep.base.to_dict(), "source": sweep.source},
        "score": score,
    }
    if settings.searcher == "optuna":
        space = {"params": {key: _domain(domain) for key, domain in sweep.search.items()}, **constant}
        searcher, samples = _optuna(sweep, known), settings.trials
    else:
        names = [{"trial": f"{i:04d}", "params": params} for i, params in enumerate(sweep.trials())]
        space = {"chosen": tune.grid_search(names), **constant}
        searcher, samples = None, 1
    tuner = tune.Tuner(
        tune.with_resources(_trial, _resources(sweep)),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=searcher,
            scheduler=_scheduler(sweep),
            num_samples=samples,
            max_concurrent_trials=settings.max_concurrent or _room(sweep),
            time_budget_s=60 * settings.budget_minutes if settings.budget_minutes else None,
        ),
        run_config=tune.RunConfig(
            name=secrets.token_hex(4),
            storage_path=str(folder.parent / "ray"),
            failure_config=tune.FailureConfig(max_failures=training.max_failures),
            callbacks=[_callback(sweep, folder, on_end)],
            verbose=0,
        ),
    )
    return tuner.fit()


def score_key(exp: Experiment, parts: Components) -> str:
    """Which of a validation's metrics ranks trials."""
    return f"val_{parts.family.objective.score_name}_{exp.evaluation.selection_mode}"


def _score(exp: Experiment) -> dict[str, Any]:
    """The metric that ranks trials, and the sign that makes larger better."""
    parts = experiments.build(exp, device=launch.default_device())
    return {"key": score_key(exp, parts), "sign": 1 if parts.family.objective.higher_is_better else -1}


def _domain(domain: Range) -> Any:
    from ray import tune

    if domain.log_uniform:
        return tune.loguniform(*domain.log_uniform)
    if domain.uniform:
        return tune.uniform(*domain.uniform)
    if domain.integer:
        return tune.randint(domain.integer[0], domain.integer[1] + 1)
    return tune.choice(domain.ends)


def _optuna(sweep: Sweep, known: Sequence[Params]) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    class Named(OptunaSearch):
        """Gives every trial a name, and so a folder, of its own, also where the same values are drawn again."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self._drawn: Counter[str] = Counter()

        def suggest(self, trial_id: str) -> Any:
            suggested = super().suggest(trial_id)
            if not isinstance(suggested, dict):  # nothing now, or nothing more
                return suggested
            name = digest(suggested["params"])
            self._drawn[name] += 1
            again = f"-{self._drawn[name]}" if self._drawn[name] > 1 else ""
            return {**suggested, "trial": name + again}

    first = [{f"params/{key}": value for key, value in params.items()} for params in known]
    seed = sweep.settings.seed + len(known)  # else it would draw first what it drew first
    return Named(metric="score", mode="max", seed=seed, points_to_evaluate=first or None)


def _scheduler(sweep: Sweep) -> Any:
    from ray.tune import schedulers

    settings, steps = sweep.settings.scheduler, sweep.base.training.steps
    if isinstance(settings, ASHA):
        return schedulers.ASHAScheduler(
            time_attr="step",
            max_t=steps,
            grace_period=min(settings.grace_steps, steps),
            reduction_factor=settings.reduction_factor,
        )
    if isinstance(settings, MedianStopping):
        return schedulers.MedianStoppingRule(
            time_attr="step", grace_period=settings.grace_steps, min_samples_required=settings.min_trials
        )
    if isinstance(settings, PBT):
        import random

        random.seed(sweep.settings.seed)  # Ray's own draws, whom to copy and how to perturb, come from this one

        def draws(domain: Range) -> Callable[[], Any] | list[Any]:
            values = domain.choice or domain.grid
            if values and not all(isinstance(value, int | float) for value in values):
                return values  # no number to perturb: a neighbour in the list
            return lambda: _plain_draw(domain, random.random())

        class Population(schedulers.PopulationBasedTraining):
            def _get_new_config(self, trial: Any, trial_to_clone: Any) -> Any:
                config, operations = super()._get_new_config(trial, trial_to_clone)
                return {**config, "chosen": {**config["chosen"], "trial": trial_name(trial.config)}}, operations

            def choose_trial_to_run(self, tune_controller: Any) -> Any:
                chosen = super().choose_trial_to_run(tune_controller)
                live = tune_controller.get_live_trials()
                if chosen is None and live and all(trial.status == "PAUSED" for trial in live):
                    # The one that they all waited for has failed: without this, they would wait for ever.
                    self._next_perturbation_sync = 1 + max(self._trial_state[t].last_train_time for t in live)
                    chosen = super().choose_trial_to_run(tune_controller)
                return chosen

        return Population(
            time_attr="step",
            perturbation_interval=settings.interval_steps,
            quantile_fraction=settings.quantile,
            synch=settings.synchronous,
            hyperparam_mutations={"chosen": {"params": {key: draws(value) for key, value in sweep.search.items()}}},
        )
    return None


def _plain_draw(domain: Range, seed: float) -> Any:
    import numpy as np

    values = domain.choice or domain.grid
    if values:
        return values[int(seed * len(values))]
    return domain.draw(np.random.default_rng(int(seed * 2**32)))


def _resources(sweep: Sweep) -> dict[str, float]:
    training = sweep.base.training
    if sweep.settings.workers_per_trial:
        return {"CPU": 0, "memory": DRIVER_MEMORY}
    return {"CPU": float(training.cpus_per_worker), **({"GPU": 1.0} if training.use_gpu else {})}


def _room(sweep: Sweep) -> int:
    """How many trials the cluster holds at once; one that waits for its workers would hold up the others' too.

    All of them where the cluster grows with what waits: it may hold none now.
    """
    import ray

    if os.environ.get(launch.AUTOSCALING_VARIABLE):
        return sweep.settings.trials if sweep.settings.searcher == "optuna" else len(sweep.trials())
    training, available = sweep.base.training, ray.cluster_resources()
    workers = max(1, sweep.settings.workers_per_trial)
    room = available.get("CPU", 0) // (workers * training.cpus_per_worker)
    if training.use_gpu:
        room = min(room, available.get("GPU", 0) // workers)
    return max(1, int(room))


def _callback(sweep: Sweep, folder: storage.Location, on_end: Callable[[str, str, str], None]) -> Any:
    from ray import tune

    class Ends(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            reached = (trial.last_result or {}).get("step", 0)
            ended(trial_name(trial.config), FINISHED if reached >= steps else STOPPED, "")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
            ended(trial_name(trial.config), FAILED, redacted(lines[-1] if lines else "its process died"))

    steps = sweep.base.training.steps  # once: every look at the base checks it anew

    def ended(name: str, status: str, error: str) -> None:
        on_end(name, status, error)
        if sweep.settings.workers_per_trial:
            run = RunFolder(folder / name)
            if status != FINISHED:
                run.request_stop()  # they write a checkpoint; another group that Ray may start for them ends as well
            threading.Thread(target=_make_room, args=(run,), daemon=True).start()

    return Ends()


def _make_room(run: RunFolder) -> None:
    """For other trials, where the workers of one are that a scheduler has ended, be it at its last step."""
    time.sleep(STOP_SECONDS)
    with suppress(RuntimeError, UserError, OSError):  # the cluster has ended meanwhile
        launch.free_place(run)


def trial_name(config: dict[str, Any]) -> str:
    """The folder of a trial: its number where trials are listed beforehand, else from a digest of what was drawn."""
    return config["chosen"]["trial"] if "chosen" in config else config["trial"]


# --- in the trial's process


class TrialContext(LocalContext):
    """A trial in one process: every validation goes to Ray Tune."""

    def __init__(self, device: str, tell: Callable[[dict[str, float]], None]) -> None:
        super().__init__(device)
        self._tell = tell

    def report(self, metrics: dict[str, float]) -> None:
        self._tell(metrics)


def _trial(config: dict[str, Any]) -> None:
    sweep = Sweep(_settings(config["sweep"]["settings"]), config["sweep"]["base"], source=config["sweep"]["source"])
    run = RunFolder(storage.location(config["folder"]) / trial_name(config))
    params = _params(config, run, sweep)
    exp = sweep.experiment(params)
    storage.make_folder(run.path)
    _follow_another(run)
    starts_from = None if run.exists else initial.resolve(exp)
    run.describe(exp, data_digest=config["data_digest"], initial=starts_from, params=params)
    facts = run.read()
    perturbed = isinstance(sweep.settings.scheduler, PBT)
    told = 0

    def tell(record: dict[str, float]) -> None:
        nonlocal told
        key, sign = config["score"]["key"], config["score"]["sign"]
        if key in record and record["step"] > told:
            told = int(record["step"])
            _report({"step": told, "score": sign * record[key]}, run if perturbed else None)

    try:
        if sweep.settings.workers_per_trial:
            launch.free_place(run)  # of workers whose driver, an earlier process of this trial, has died
        for record in journal.read(run.journal):
            tell(record)
        if facts["status"] == FAILED:
            _report({"step": told + 1, "score": -math.inf}, run if perturbed else None)
        if facts["status"] != RUNNING:
            return
        if sweep.settings.workers_per_trial:
            _train_distributed(exp, run, tell)
        else:
            train(TrialContext("cuda" if exp.training.use_gpu else "cpu", tell), exp, run)
    except StopRequested:
        pass  # by the scheduler or the time that is up: the driver of the sweep knows
    except Exception as error:
        # noted and not raised: Ray would start it again, as it does where the process died
        said = redacted(f"{type(error).__name__}: {error}")
        run.update(status=FAILED, error=said, traceback=redacted(traceback.format_exc()))
        _report({"step": told + 1, "score": -math.inf}, run if perturbed else None)
    else:
        run.update(status=FINISHED)


def _settings(content: dict[str, Any]) -> Any:
    from pipeline import config
    from pipeline.sweep import SweepConfig

    return config.validate(SweepConfig, content, source="the sweep")


def _params(config: dict[str, Any], run: RunFolder, sweep: Sweep) -> Params:
    """What was drawn; under PBT, what it has become since."""
    from ray import tune

    params = dict(config["chosen"]["params"] if "chosen" in config else config["params"])
    if isinstance(sweep.settings.scheduler, PBT) and run.exists and tune.get_checkpoint() is None:
        params = run.read()["params"]  # the sweep is gone on with
    return {key: round(value) if sweep.search[key].integer else value for key, value in params.items()}


def _report(metrics: dict[str, float], run: RunFolder | None) -> None:
    """run: whose checkpoint another trial may copy (PBT)."""
    from ray import tune

    if run is None:
        tune.report(metrics)
        return
    latest = run.checkpoints.latest()
    with tempfile.TemporaryDirectory() as scratch:
        if latest is not None:
            for name in (STATE_FILE, META_FILE):
                (Path(scratch) / name).write_bytes((run.checkpoints.path(latest) / name).read_bytes())
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(scratch))


def _follow_another(run: RunFolder) -> None:
    """PBT: put the checkpoint that Ray hands over, another trial's it may be, in the place of this one's."""
    from ray import tune

    checkpoint: Checkpoint | None = tune.get_checkpoint()
    if checkpoint is None:
        return
    import json

    with checkpoint.as_directory() as folder:
        files = {name: (Path(folder) / name).read_bytes() for name in (STATE_FILE, META_FILE)}
    step = json.loads(files[META_FILE])["step"]
    for other in run.checkpoints.steps():
        storage.remove_folder(run.checkpoints.path(other))
    storage.write_folder(run.checkpoints.path(step), files)


def _train_distributed(exp: Experiment, run: RunFolder, tell: Callable[[dict[str, float]], None]) -> None:
    """On Ray Train workers of its own, whose journal this process follows."""
    reader = journal.JournalReader(run.journal)
    with ThreadPoolExecutor(1, thread_name_prefix="trial") as pool:
        training = pool.submit(launch.run_workers, exp, run)
        while not training.done():
            threading.Event().wait(FOLLOW_SECONDS)
            for record in reader.new_records():
                tell(record)
        training.result()
    for record in reader.new_records():
        tell(record)
