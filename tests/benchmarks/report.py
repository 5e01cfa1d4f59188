"""What a benchmark leaves behind: where it ran, its rows as one Markdown table, and the same as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pipeline.training import hardware

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "numpy", "pyarrow", "ray", "higher", "torchopt", "learn2learn")

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""A column's title -> its cell of a row."""


def place(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: what must be equal for numbers to stand in one table."""
    return {
        "processor": hardware.processor(),
        "cores": hardware.cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "commit": _commit(),
    }


def load_average() -> float:
    """Processes that wanted a core over the last minute: at more than there are cores, all times are too long."""
    return round(os.getloadavg()[0], 2)


def command(module: str) -> str:
    return f"python -m {module} {' '.join(sys.argv[1:])}".strip()


def write(
    folder: Path | None, name: str, *, where: Mapping[str, Any], rows: Sequence[Row], columns: Columns, notes: list[str]
) -> None:
    """Print the table; with a folder also write it there as NAME.md and NAME.json.

    Rows that an earlier command left in NAME.json stay where they are of the same place and of other cases (the key
    `case`), so that a long benchmark can be run in pieces.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        rows, notes = _with_earlier(folder / f"{name}.json", where, rows, notes)
        content = {"where": where, "rows": rows, "notes": notes}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        (folder / f"{name}.md").write_text(_markdown(where, rows, columns, notes))
    print(_markdown(where, rows, columns, notes), flush=True)


def _with_earlier(
    path: Path, where: Mapping[str, Any], rows: Sequence[Row], notes: list[str]
) -> tuple[Sequence[Row], list[str]]:
    try:
        earlier = json.loads(path.read_text())
    except FileNotFoundError:
        return rows, notes
    if earlier["where"] != json.loads(json.dumps(where)):
        return rows, notes
    measured = {row["case"] for row in rows}
    kept = [row for row in earlier["rows"] if row["case"] not in measured]
    return [*kept, *rows], list(dict.fromkeys([*earlier["notes"], *notes]))


def _markdown(where: Mapping[str, Any], rows: Iterable[Row], columns: Columns, notes: Iterable[str]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        f"{where['processor']}, {where['cores']} cores, {where['device']}, {where['threads']} thread(s) a process; "
        f"Python {where['python']}, {versions}; commit {where['commit']}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows),
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", REPOSITORY, *arguments], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
