"""Candidate against champion: a paired comparison on validation episodes that serve nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.learner import Learner, ModelCard, tasks_of
from pipeline.training.evaluate import PROMOTION_SEED, Estimate, Evaluation, evaluate, paired
from pipeline.types import MetaState, Normalization, TaskFamily

MODE: Normalization = "inductive"  # the mode in which models are served


@dataclass(frozen=True)
class Decision:
    """Whether the candidate becomes champion, and why; `tags` go onto its version."""

    promote: bool
    reason: str
    candidate: Estimate
    champion_version: str | None = None
    difference: Estimate | None = None  # in the score's unit, positive where the candidate is better

    def tags(self) -> dict[str, str]:
        tags = {
            "promotion.decision": "promoted" if self.promote else "not promoted",
            "promotion.reason": self.reason,
            "promotion.mode": MODE,
            "promotion.episode_seed": str(PROMOTION_SEED),
            "promotion.score": f"{self.candidate.mean:.6f}",
            "promotion.score_ci95": f"{self.candidate.half_width:.6f}",
        }
        if self.champion_version is not None:
            tags["promotion.champion_version"] = self.champion_version
        if self.difference is not None:
            tags["promotion.difference"] = f"{self.difference.mean:.6f}"
            tags["promotion.difference_ci95"] = f"{self.difference.half_width:.6f}"
        return tags


def decide(
    candidate: Learner,
    champion: tuple[str, Learner] | None,
    family: TaskFamily,
    *,
    episodes: int,
    chunk: int | None,
    device: torch.device,
) -> Decision:
    """Promote where there is no champion, or where the interval of the paired difference lies above zero.

    champion: (version, learner). One that was trained on other data or for other tasks is not comparable, and
    stays.
    """

    def scores(learner: Learner) -> Evaluation:
        state = MetaState(*({k: v.to(device) for k, v in part.items()} for part in learner.state))
        return evaluate(
            learner.algorithm,
            family,
            state,
            split="meta_val",
            seed=PROMOTION_SEED,
            episodes=episodes,
            data_digest=candidate.card.data_digest,
            chunk=chunk,
        )

    own = scores(candidate)
    if not bool(own.losses[..., -1].isfinite().all()):
        version = champion[0] if champion else None
        return Decision(False, "its answers are not finite in some episodes", own.score(MODE), version)
    if champion is None:
        return Decision(True, "there was no champion", own.score(MODE))
    version, other = champion
    obstacle = _not_comparable(candidate.card, other.card)
    if obstacle:
        return Decision(False, f"not comparable with champion version {version}: {obstacle}", own.score(MODE), version)
    sign = 1 if family.objective.higher_is_better else -1
    difference = paired(sign * own.final_scores(MODE), sign * scores(other).final_scores(MODE))
    promote = difference.low > 0
    reason = (
        f"{'beats' if promote else 'does not beat'} champion version {version} on {episodes} paired episodes: "
        f"{family.objective.score_name} better by {difference.mean:+.4f} ± {difference.half_width:.4f} ({MODE})"
    )
    return Decision(promote, reason, own.score(MODE), version, difference)


def _not_comparable(candidate: ModelCard, champion: ModelCard) -> str | None:
    for name in ("data_digest", "n_way", "k_shot", "objective", "input_shape", "preprocessing"):
        ours, theirs = getattr(candidate, name), getattr(champion, name)
        if ours != theirs:
            return f"{name} is {theirs} there and {ours} here"
    ours, theirs = (_class_splits(card) for card in (candidate, champion))
    return None if ours == theirs else f"class split is {theirs} there and {ours} here"


def _class_splits(card: ModelCard) -> str:
    return ", ".join(str(task.get("split")) for task in tasks_of(card.experiment["task"]))
