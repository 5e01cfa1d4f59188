"""The whole way of one command: check, train, evaluate, register. What the jobs call."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline import baselines as unlearned
from pipeline import (
    class_report,
    evaluation_task,
    initial,
    launch,
    movement,
    pictures,
    promotion,
    results,
    runs,
    storage,
)
from pipeline import experiment as experiments
from pipeline.credentials import without_credentials
from pipeline.datasets.preprocessing import Preprocessing
from pipeline.errors import ConfigError, DataError, TrackingError, TrainingStopped
from pipeline.evaluation_task import Part
from pipeline.experiment import Components, Experiment
from pipeline.learner import Learner, card_of
from pipeline.runs import RunFolder
from pipeline.storage import Location
from pipeline.tasks.classes import ClassTasks
from pipeline.tasks.images import ImageTasks
from pipeline.tasks.mixture import MixtureTasks, families_of
from pipeline.tasks.tables import TableEncoding
from pipeline.tasks.tabular import TabularTasks
from pipeline.tracking import RunLog, Tracker
from pipeline.training import journal
from pipeline.training.evaluate import (
    SELECTION_SEED,
    TEST_SEED,
    Estimate,
    Evaluation,
    curves,
    evaluate,
    paired,
    summarize,
)
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import Plan
from pipeline.types import MetaState, Normalization, Split, TaskFamily

FOLLOW_SECONDS = 1.0
AWAY_SECONDS = 5.0  # between attempts to reach an MLflow that did not answer
OUTAGE_SECONDS = float(os.environ.get("METAPIPE_MLFLOW_OUTAGE_SECONDS", "600"))  # to wait for it after training
Observer = Callable[[list[dict[str, Any]]], None]


class Registration(NamedTuple):
    """A registered version and what became of it."""

    name: str
    version: str
    decision: promotion.Decision


class Outcome(NamedTuple):
    """A finished run."""

    run: RunFolder
    test: Evaluation
    registration: Registration | None
    mlflow_run_id: str
    resumed: bool
    hint: str  # how to look at the results


def train(
    exp: Experiment, *, fresh: bool = False, observe: Observer = lambda _: None, say: Callable[[str], None] = print
) -> Outcome:
    """Train, or go on with, a run; evaluate its best checkpoint; register it.

    observe: is given the metrics records as they come. say: is told what happens, a line at a time.

    Raises UserError: bad input, before any worker starts; TrainingStopped: the run ended early.
    """
    keep_freed_memory()
    exp = exp.absolute()
    data_digest = experiments.check_fits(exp)
    tracker = Tracker()
    with runs.claimed(runs.runs_of(exp)):
        run, resumed = runs.open_run(exp, data_digest=data_digest, fresh=fresh, initial=lambda: initial.resolve(exp))
        say(f"{'going on with' if resumed else 'run'} {run.path}")
        if not resumed and "initial" in run.read():
            say(f"starting from {run.read()['initial']['from']}")
        log = _open_log(exp, run, tracker)
        try:
            with log.system_metrics(), _following(run, log, observe, say):
                launch.run_workers(exp, run)
            plan = Plan(**run.read()["plan"])
            log.tags({f"plan.{name}": str(value) for name, value in plan._asdict().items()})
            parts = experiments.build(exp, device=launch.default_device())
            plan.use_batching(parts.model)
            test = evaluate_run(exp, run, parts, log, data_digest)
            registration = None
            if exp.tracking.register_model:
                say("comparing with the champion on validation episodes that serve nothing else")
                registration = register_run(exp, run, parts, tracker, test)
        except BaseException as error:
            with suppress(TrackingError):  # what went wrong first is what the user must hear of
                log.end("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        log.end("FINISHED")
        run.update(status="finished")
    return Outcome(run, test, registration, log.run_id, resumed, tracker.hint)


def _open_log(exp: Experiment, run: RunFolder, tracker: Tracker) -> RunLog:
    """The run's MLflow run: gone on with, or new where this tracking store has none of it yet."""
    facts = run.read()
    known = without_credentials(facts.get("mlflow_uri") or "")  # of an older version it may hold a password
    run_id = facts.get("mlflow_run_id") if known == tracker.uri else None
    name = f"{exp.name}/{run.path.name}"
    log = tracker.start(exp, run_name=name, data_digest=facts["data_digest"], run_id=run_id)
    run.update(mlflow_run_id=log.run_id, mlflow_uri=tracker.uri)
    return log


@contextmanager
def _following(run: RunFolder, log: RunLog, observe: Observer, say: Callable[[str], None]) -> Iterator[None]:
    """Deliver the journal's records to MLflow and to the observer while the block runs, and the rest after it.

    While MLflow does not answer, training goes on and the records wait in the journal; what was delivered twice because
    an answer got lost, MLflow keeps once (same run, name, step, time and value).
    """
    to_mlflow = Delivery(run, log, say)
    to_observer = journal.JournalReader(run.journal)
    done = threading.Event()
    failure: list[Exception] = []

    plan = run.read().get("plan")  # of an earlier start

    def tell_plan() -> None:
        nonlocal plan
        now = run.read().get("plan")
        if now and now != plan:
            plan = now
            say(f"computing with {Plan(**now)}")

    def follow() -> None:
        try:
            while not done.wait(FOLLOW_SECONDS):
                tell_plan()
                observe(to_observer.new_records())
                to_mlflow.try_once()
        except Exception as error:  # raised by the main thread, once the workers are through
            failure.append(error)

    follower = threading.Thread(target=follow, name="journal", daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()
        if not failure:
            tell_plan()
            observe(to_observer.new_records())
            to_mlflow.try_once()
    if failure:
        raise failure[0]
    to_mlflow.insist()


class Delivery:
    """Of the journal's records to MLflow, each once, however long MLflow is away."""

    def __init__(self, run: RunFolder, log: RunLog, say: Callable[[str], None]) -> None:
        self._reader = journal.JournalReader(run.journal, after_step=log.last_step())
        self._log = log
        self._say = say
        self._waiting: list[dict[str, Any]] = []
        self._away_since: float | None = None
        self._not_before = 0.0

    def try_once(self) -> TrackingError | None:
        """Deliver what there is; where that fails, keep it and leave MLflow alone for a while."""
        self._waiting += self._reader.new_records()
        if time.monotonic() < self._not_before:
            return None
        try:
            self._log.metrics(self._waiting)
        except TrackingError as error:
            if self._away_since is None:
                self._away_since = time.monotonic()
                self._say("MLflow does not answer; training goes on and its metrics wait in the run's journal")
            self._not_before = time.monotonic() + AWAY_SECONDS
            return error
        if self._away_since is not None:
            self._say(f"MLflow answers again; {len(self._waiting)} steps' metrics were delivered late")
        self._away_since = None
        self._waiting = []
        return None

    def insist(self) -> None:
        """Wait for MLflow, at most OUTAGE_SECONDS. Raises TrackingError."""
        deadline = time.monotonic() + OUTAGE_SECONDS
        while True:
            self._not_before = 0.0
            error = self.try_once()
            if error is None:
                return
            if time.monotonic() > deadline:
                raise error
            time.sleep(AWAY_SECONDS)


def best_checkpoint(run: RunFolder) -> tuple[int, MetaState]:
    step = run.checkpoints.best()
    if step is None:
        step = run.checkpoints.latest()
    if step is None:
        raise ConfigError(f"{run.path}: has no checkpoint yet. Train it first.")
    return step, run.checkpoints.load_meta(step, launch.default_device())


def evaluate_run(exp: Experiment, run: RunFolder, parts: Components, log: RunLog, data_digest: str) -> Evaluation:
    """The best checkpoint on the test episodes: numbers, per-episode results and pictures, in the run and in MLflow.

    Raises TrainingStopped: there is no best one, as the answers in all validations were not finite.
    """
    latest = run.checkpoints.latest()
    if latest is not None and run.checkpoints.meta(latest)["best_step"] is None:
        raise TrainingStopped(
            f"{run.path}: in no validation were all losses finite, so there is nothing to evaluate or register: the "
            "adapted learner diverges. Lower algorithm.inner_lr or algorithm.eval_adaptation_steps (and what else "
            "makes adaptation at test differ from that in training), and start anew with --fresh."
        )
    step, state = best_checkpoint(run)
    chunk = experiments.task_chunk(exp, parts, launch.default_device())
    test = evaluate(
        parts.algorithm,
        parts.family,
        state,
        split="meta_test",
        seed=TEST_SEED,
        episodes=exp.evaluation.test_episodes,
        curve_episodes=exp.evaluation.curve_episodes,
        data_digest=data_digest,
        chunk=chunk,
        keep_predictions=True,
    )
    classes: dict[str, class_report.ClassReport] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        content = {**test.to_dict(), "checkpoint_step": step}
        (folder / "test.json").write_text(json.dumps(content, indent=1) + "\n")
        results.write(test, folder / "test.parquet")
        records = journal.read(run.journal)
        pictures.training_curves(records, test.score_name, folder / "curves.png")
        pictures.over_training(records, folder / "over_training.png")
        pictures.adaptation_curve(test, folder / "adaptation.png")
        pictures.learned_rates(parts.algorithm.describe(state), folder / "rates.png")
        moved = movement.measure(parts.algorithm, parts.family, state, chunk=chunk)
        if moved is not None:
            (folder / "movement.json").write_text(json.dumps(moved.to_dict(), indent=1) + "\n")
            pictures.movement(moved, folder / "movement.png")
        for name, own, family, place in class_report.by_set(test, parts.family, folder):
            if isinstance(family, ImageTasks):
                slots = family.alike("meta_val", torch.arange(4))[0]
                pictures.episodes(family.sample("meta_val", 0, slots, seed=SELECTION_SEED), place / "episodes.png")
            if isinstance(family, ClassTasks):
                classes[name] = class_report.write(own, family, place, mode=exp.evaluation.selection_mode)
        further = _curves(exp, parts, state, folder)
        storage.copy_folder(folder, run.evaluation)
        log.artifacts(folder, "evaluation")
    summary = summarize(test, "test") | (moved.metrics() if moved else {}) | further
    for name, told in classes.items():
        summary |= class_report.metrics(told, name)
    log.summary(summary, step=exp.training.steps)
    log.tags({"checkpoint.best_step": str(step), "checkpoint.folder": str(run.checkpoints.path(step))})
    for name, told in classes.items():
        log.tags(class_report.tags(told, name))
    return test


def _curves(exp: Experiment, parts: Components, state: MetaState, folder: Path) -> dict[str, float]:
    """What the algorithm shows of the test episodes besides scores: numbers and a picture each, and their metrics."""
    found = curves(
        parts.algorithm,
        parts.family,
        state,
        split="meta_test",
        seed=TEST_SEED,
        episodes=exp.evaluation.test_episodes,
        chunk=experiments.task_chunk(exp, parts, launch.default_device()),
    )
    for name, estimates in found.items():
        points = [{"number": k, "mean": e.mean, "ci95": e.half_width} for k, e in enumerate(estimates, start=1)]
        content = {"episodes": exp.evaluation.test_episodes, "episode_seed": TEST_SEED, name: points}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        pictures.curve(name, estimates, folder / f"{name}.png")
    return {f"test_{name}_{k}": e.mean for name, points in found.items() for k, e in enumerate(points, start=1)}


def register_run(
    exp: Experiment, run: RunFolder, parts: Components, tracker: Tracker, test: Evaluation
) -> Registration:
    step, state = best_checkpoint(run)
    classes = parts.family if isinstance(parts.family, ClassTasks | MixtureTasks) else None
    facts = run.checkpoints.meta(step)
    card = card_of(
        exp,
        objective=parts.family.objective.name,
        input_shape=parts.family.input_shape,
        num_outputs=parts.family.num_outputs,
        preprocessing=getattr(parts.family, "preprocessing", None),
        data_digest=run.read()["data_digest"],
        training_classes=list(classes.class_digests("meta_train")) if classes else (),
        checkpoint={"run": f"{exp.name}/{run.path.name}", "step": step, "sha256": facts["sha256"]},
    )
    learner = Learner(card, MetaState(*({k: v.cpu() for k, v in part.items()} for part in state)))
    champion = tracker.champion(exp.name)
    decision = promotion.decide(
        learner,
        champion,
        parts.family,
        episodes=exp.evaluation.promotion_episodes,
        chunk=experiments.task_chunk(exp, parts, launch.default_device()),
        device=launch.default_device(),
    )
    tags = {
        "data_digest": card.data_digest,
        "checkpoint.run": card.checkpoint["run"],
        "checkpoint.step": str(step),
        "checkpoint.sha256": facts["sha256"],
        "normalization.training": card.normalization,
        "normalization.serving": promotion.MODE,
        **{key: f"{value:.6f}" for key, value in summarize(test, "test").items()},
    }
    version = tracker.register(run.read()["mlflow_run_id"], card, learner.state, tags)
    tracker.record(exp.name, str(version.version), decision)
    run.update(registered=f"models:/{exp.name}/{version.version}")
    return Registration(exp.name, str(version.version), decision)


def register(path: str | Location) -> Registration:
    """Register the best checkpoint of a finished run anew, by the same rule as training.

    Raises UserError: no such run, not finished, or its data set has changed since.
    """
    run = runs.find_run(path)
    if not run.finished:
        raise ConfigError(f"{run.path}: is not finished. Run its training command again first; it registers by itself.")
    exp = run.experiment()
    digest = experiments.check_fits(exp)
    if digest != run.read()["data_digest"]:
        raise ConfigError(f"{run.path}: was trained on other data (the data set's digest has changed since).")
    tracker = Tracker()
    parts = experiments.build(exp, device=launch.default_device())
    with runs.claimed(run.path.parent):
        log = _open_log(exp, run, tracker)
        Delivery(run, log, lambda _: None).insist()  # of what this tracking store does not have yet
        test = evaluate_run(exp, run, parts, log, digest)
        registration = register_run(exp, run, parts, tracker, test)
        log.end("FINISHED")
    return registration


class Comparison(NamedTuple):
    """A baseline on the same episodes: its score, and how much better the model is, paired by episode."""

    name: str
    score: Estimate
    advantage: Estimate


class ModelEvaluation(NamedTuple):
    learner: Learner
    evaluation: Evaluation
    comparisons: list[Comparison]
    mode: Normalization
    trained_on_this_data: bool
    data: str | None  # the data set's folder; None where there is no one
    notes: list[str]  # what the user should know of the data


def evaluate_model(
    learner: Learner,
    *,
    data: str | None = None,
    class_split: str | None = None,
    part: Part = "meta_test",
    n_way: int | None = None,
    k_shot: int | None = None,
    n_query: int | None = None,
    **how: Any,
) -> ModelEvaluation:
    """A model on fixed episodes of a data set (by default the one it was trained on).

    part: "all" for every class of a data set that was never trained on; for what else can be changed see
    `evaluation_task.of`. how: as `_evaluated`.

    Raises ConfigError: a report is wanted and the tasks have no classes; more classes than the model has outputs.
    DataError: the data set is missing, damaged, too small, or its images have another shape.
    """
    shape: dict[str, Any] = {"class_split": class_split, "part": part, "n_way": n_way, "k_shot": k_shot}
    (result,) = evaluate_model_on(learner, [data], **shape, n_query=n_query, **how)
    return result


def evaluate_model_on(
    learner: Learner,
    data: Sequence[str | None],
    *,
    class_split: str | None = None,
    part: Part = "meta_test",
    n_way: int | None = None,
    k_shot: int | None = None,
    n_query: int | None = None,
    **how: Any,
) -> list[ModelEvaluation]:
    """`evaluate_model` on each of several data sets, all of which are checked before the first one is evaluated."""
    keep_freed_memory()
    exp = experiments.from_dict(learner.card.experiment, source="the model's experiment", stored=True)
    prepared = []
    for folder in data:
        chosen = evaluation_task.of(
            exp, data=folder, class_split=class_split, part=part, n_way=n_way, k_shot=k_shot, n_query=n_query
        )
        one = _prepared(learner, exp, *chosen, report=bool(how.get("report")))
        prepared.append(one if len(data) == 1 else one._replace(family=None))  # not all of them in memory at once
    return [_evaluated(learner, one, **how) for one in prepared]


class _Prepared(NamedTuple):
    """Episodes that were found to fit a learner."""

    exp: Experiment
    task: Any  # a section
    part: Split
    digest: str
    family: TaskFamily | None  # None: to be built anew


def _prepared(learner: Learner, exp: Experiment, task: Any, part: Split, *, report: bool) -> _Prepared:
    """Raises ConfigError and DataError as `evaluate_model` does."""
    digest = task.verify()
    family = _built(learner, task)
    if report:
        class_report.check(family)
    ways = family.description.get("n_way") or 0
    if ways > learner.card.num_outputs and not learner.algorithm.any_way:
        raise ConfigError(
            f"--n-way {ways}: {learner.card.name} was trained for {learner.card.num_outputs}-way tasks, and its head "
            "has that many outputs. Give fewer, or train with a larger task.n_way."
        )
    if list(family.input_shape) != learner.card.input_shape:
        raise ConfigError(
            f"{task.data}: its {family.inputs} are {list(family.input_shape)}, {learner.card.name} takes "
            f"{learner.card.input_shape}. Prepare the data set as the one it was trained on (--size, the same columns)."
        )
    if isinstance(family, ImageTasks):
        _check_alike(learner, family)
    if isinstance(family, ClassTasks) and part != "meta_train":
        _check_unseen(learner, family, part)
    return _Prepared(exp, task, part, digest, family)


def _built(learner: Learner, task: Any) -> TaskFamily:
    """The family of a section, whose tables are encoded as the learner knows them. Raises DataError."""
    family: TaskFamily = task.build(device=launch.default_device(), dtype=learner.dtype)
    if isinstance(family, TabularTasks | MixtureTasks) and isinstance(learner.card.preprocessing, TableEncoding):
        family.use(learner.card.preprocessing)
    elif learner.card.preprocessing is None and any(isinstance(each, TabularTasks) for each in families_of(family)):
        raise DataError(
            f"{learner.card.name}: is of an older version, which encoded each table of a mixture by itself and kept "
            "none of these encodings. Train it anew."
        )
    return family


def _check_alike(learner: Learner, family: ImageTasks) -> None:
    """Raises ConfigError: ink is high in the pictures of the one and paper in those of the other."""
    known = learner.card.preprocessing
    kind = family.manifest.preprocessing.get("kind")
    if isinstance(known, Preprocessing) and kind is not None and kind != known.kind:
        raise ConfigError(
            f"{family.config.data}: its pictures were prepared as {kind}, {learner.card.name} was trained on "
            f"{known.kind}s, whose values mean something else. Prepare the data set with --kind {known.kind}."
        )


def _evaluated(
    learner: Learner,
    prepared: _Prepared,
    *,
    episodes: int = 1000,
    seed: int = TEST_SEED,
    steps: int | None = None,
    baselines: bool = False,
    report: Path | None = None,
) -> ModelEvaluation:
    """report: a folder for which classes are hard and which are confused (see `class_report`)."""
    exp, task, part, digest, family = prepared
    device = launch.default_device()
    family = family or _built(learner, task)
    chunk = experiments.task_chunk(exp, Components(family, learner.model, learner.algorithm), device)

    def run(state: MetaState, *, keep_predictions: bool = False) -> Evaluation:
        return evaluate(
            learner.algorithm,
            family,
            MetaState(*({k: v.to(device) for k, v in group.items()} for group in state)),
            split=part,
            seed=seed,
            episodes=episodes,
            data_digest=digest,
            chunk=chunk,
            steps=steps,
            keep_predictions=keep_predictions,
        )

    evaluation = run(learner.state, keep_predictions=report is not None)
    if report:
        for _, own, of_set, place in class_report.by_set(evaluation, family, report):
            if isinstance(of_set, ClassTasks):
                class_report.write(own, of_set, place, mode=promotion.MODE)
    comparisons = []
    if baselines:
        ours = evaluation.final_scores(promotion.MODE)
        untrained = run(learner.algorithm.init(exp.seed)).final_scores(promotion.MODE)
        others = {"same network, untrained, adapted": untrained}
        if learner.card.objective == "classification":
            others |= unlearned.scores(family, split=part, seed=seed, episodes=episodes)
        sign = 1 if family.objective.higher_is_better else -1
        comparisons = [Comparison(n, Estimate.of(s), paired(sign * ours, sign * s)) for n, s in others.items()]
    its_data = digest == learner.card.data_digest
    folder = getattr(task, "data", None)
    return ModelEvaluation(learner, evaluation, comparisons, promotion.MODE, its_data, folder, _notes(family))


def _notes(family: TaskFamily) -> list[str]:
    if not isinstance(family, TabularTasks):
        return []
    return [
        f"{family.config.data}: column {column!r}: {len(names)} of its categories were not in training and count as "
        f"missing ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
        for column, names in family.unknown_categories.items()
    ]


def _check_unseen(learner: Learner, family: ClassTasks, part: Split) -> None:
    """Raises DataError where the model was trained on classes that it is to be tested on (another class split, say)."""
    candidates = family.class_digests(part)
    seen = sorted(candidates[digest] for digest in candidates.keys() & set(learner.card.training_classes))
    if seen:
        raise DataError(
            f"{family.config.data}: {learner.card.name} was trained on {len(seen)} of the {len(candidates)} {part} "
            f"classes of the class split {family.config.split!r} ({', '.join(seen[:3])}, …), so its score there would "
            "mean nothing. Use the data set and the class split that it was trained with, or other data."
        )
