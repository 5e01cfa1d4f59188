"""`metapipe`: every job under one name."""

from __future__ import annotations

from jobs import adapt, cluster_jobs, console, data, evaluate, register, reproduce, runs, submit, train, tune

app = console.new_app(
    name="metapipe",
    no_args_is_help=True,
    help="Distributed meta-learning: from raw data to a registered meta-initialization that adapts to a new task "
    "from a handful of examples.\n\n"
    "First steps: [bold]metapipe data prepare glyphs --out data/glyphs[/], then "
    "[bold]metapipe train configs/demo.yaml[/], then "
    "[bold]metapipe adapt models:/glyphs-5w1s@champion --support FOLDER --query FOLDER[/].",
)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("reproduce")(reproduce.reproduce)
app.command("evaluate")(evaluate.evaluate)
app.command("register")(register.register)
app.command("adapt")(adapt.adapt)
app.command("runs")(runs.runs)
app.command("submit", **submit.SETTINGS)(submit.submit)
app.add_typer(cluster_jobs.app, name="jobs")


def main() -> None:
    console.run(app)


if __name__ == "__main__":
    main()
