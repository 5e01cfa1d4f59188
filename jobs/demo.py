"""`make demo`: the whole way on the embedded default data, each step a command that a user could type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from jobs import console

DATA, MODEL, FOLDER = Path("data/glyphs"), "models:/glyphs-5w1s@champion", Path("demo")
N_WAY, K_SHOT, QUERIES = 5, 1, 2  # of the pictures to adapt to


def demo() -> None:
    """Prepare, look, train on Ray, register, evaluate against baselines, adapt to pictures in a folder."""
    began = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    _metapipe("data", "prepare", "glyphs", "--out", str(DATA), "--reuse")
    _metapipe("data", "show", str(DATA), "--part", "meta_test", "--out", str(FOLDER / "episodes.png"))
    trained = json.loads(_metapipe("train", "configs/demo.yaml", "--json", capture=True))
    console.out.print(f"registered {trained['registered']['model']}: {trained['registered']['reason']}", soft_wrap=True)
    results = FOLDER / "evaluation.parquet"
    command = ("evaluate", MODEL, "--episodes", "600", "--baselines", "--out", str(results))
    evaluated = json.loads(_metapipe(*command, "--json", capture=True))
    support, query = _pictures()
    _metapipe("adapt", MODEL, "--support", str(support), "--query", str(query), "--out", str(FOLDER / "answers.json"))
    _summary(trained, evaluated, minutes=(time.monotonic() - began) / 60)


def _metapipe(*arguments: str, capture: bool = False) -> str:
    console.out.print(f"\n[bold cyan]$ metapipe {' '.join(arguments)}[/]", highlight=False, soft_wrap=True)
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    # the demo is on its own: its Ray and its MLflow are local and end with it
    env = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, env=env)
    if done.returncode:
        sys.exit(done.returncode)  # the command has said why
    return done.stdout


def _pictures() -> tuple[Path, Path]:
    """Drawings of unseen characters as PNG files: a folder per class, and queries named by their class."""
    import torch
    from PIL import Image

    from pipeline.config import validate
    from pipeline.tasks.images import ImagesConfig

    shape = {"n_way": N_WAY, "k_shot": K_SHOT, "n_query": QUERIES, "eval_n_query": QUERIES}
    content = {"family": "images", "data": DATA, "split": "script", **shape}
    family = validate(ImagesConfig, content, source="demo").build(device=torch.device("cpu"), dtype=torch.float32)
    batch = family.sample("meta_test", 0, torch.tensor([0]), seed=7)
    support, query = FOLDER / "support", FOLDER / "query"
    for folder in (support, query):
        shutil.rmtree(folder, ignore_errors=True)
    for images, labels, name in (
        (batch.support_x[0], batch.support_y[0], str(support / "class-{label}" / "{number}.png")),
        (batch.query_x[0], batch.query_y[0], str(query / "of-class-{label}-{number}.png")),
    ):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            file = Path(name.format(label=label, number=number))
            file.parent.mkdir(parents=True, exist_ok=True)
            ink = (image[0] * 255).to(torch.uint8)
            Image.fromarray((255 - ink).numpy()).resize((112, 112)).save(file)  # black on white, as people draw
    return support, query


def _summary(trained: dict, evaluated: dict, *, minutes: float) -> None:
    final = evaluated["inductive"][-1]
    console.out.rule("what happened")
    show = console.out.print
    show(
        f"The champion answers {100 * final['mean']:.2f} ± {100 * final['ci95']:.2f} % of 5-way 1-shot queries "
        f"right, on characters of scripts it has never seen (inductive, as it is served; {evaluated['episodes']} "
        "episodes, 95 % interval). On the same episodes:"
    )
    for baseline in evaluated["baselines"]:
        show(f"  {100 * baseline['mean']:.2f} ± {100 * baseline['ci95']:.2f} %  {baseline['name']}", highlight=False)
    show(f"This run: {trained['registered']['model']}: {trained['registered']['reason']}.", soft_wrap=True)
    show(
        f"Pictures, answers and per-episode results: {FOLDER}/. Checkpoints and curves: {trained['run']}.",
        soft_wrap=True,
    )
    show(f"Runs, metrics and model versions: [bold].venv/bin/{trained['look']}[/]", soft_wrap=True)
    show(f"{minutes:.1f} minutes. Ray and MLflow have ended.")


if __name__ == "__main__":
    app = console.single_command(demo)
    console.run(app)
