"""What the families share whose tasks are points of a drawn function."""

from __future__ import annotations

from typing import Any

from pipeline.tasks.shapes import OneShape
from pipeline.types import Split


class PointTasks(OneShape):
    """Task family: its config has k_shot and n_query, and eval_k_shot and eval_n_query for validation and test."""

    config: Any

    def _sizes(self, split: Split) -> tuple[int, int]:
        """Support and query points of a task."""
        config = self.config
        return (config.k_shot, config.n_query) if split == "meta_train" else (config.eval_k_shot, config.eval_n_query)
