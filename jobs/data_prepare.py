"""`metapipe data prepare SOURCE`: one command per source of `pipeline.datasets.sources`, with the source's options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from jobs import console, data_summary

if TYPE_CHECKING:
    from pipeline.datasets.prepare import Progress as Prepared
    from pipeline.datasets.sources import SourceOptions
    from pipeline.tasks.shards import Manifest


def prepare(
    source_name: str,
    given: Mapping[str, Any],
    *,
    out: Annotated[str, typer.Option(help="Folder to write, or s3://…; it appears whole or not at all.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the class splits (and of what a source draws).")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is there.")] = False,
    reuse: Annotated[bool, typer.Option("--reuse", help="Do nothing if a whole data set is there already.")] = False,
    json: console.Json = False,
) -> None:
    """Turn raw data into Parquet shards and a manifest (dataset.json) that fixes the class splits.

    given: the source's own options, by name.
    """
    from pipeline.datasets.prepare import prepare as write_data_set
    from pipeline.datasets.sources import read_options
    from pipeline.storage import location
    from pipeline.tasks import shards

    options = read_options(source_name, _with_folder(given, out))
    record = {"name": source_name, **options.record(), "seed": seed}
    if reuse and (location(out) / shards.MANIFEST).exists():
        manifest = shards.read_manifest(out)
        _check_same(out, manifest, record)
        shards.verify(out, manifest)
        show = lambda: data_summary.show(out, manifest, reused=True)  # noqa: E731
        console.emit(data_summary.summary(out, manifest), as_json=json, show=show)
        return
    shards.check_free(out, overwrite=overwrite)
    source = options.open(seed=seed)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console.err, transient=True) as progress:
        task = progress.add_task(f"reading {source_name}")

        def advance(done: Prepared) -> None:
            bad = f", {done.problems} that cannot be read" if done.problems else ""
            text = f"{done.classes} classes, {done.examples} examples{bad}, now {escape(done.name)}"
            progress.update(task, description=text)

        manifest, _ = write_data_set(source, out, record=record, seed=seed, overwrite=overwrite, progress=advance)
    show = lambda: data_summary.show(out, manifest)  # noqa: E731
    console.emit(data_summary.summary(out, manifest), as_json=json, show=show)


def _with_folder(given: Mapping[str, Any], out: str) -> dict[str, Any]:
    """The options with a folder for what is downloaded: raw/ beside `out`, where no other was given."""
    from pathlib import Path

    from pipeline.storage import location

    if not given.get("download") or given.get("directory"):
        return dict(given)
    place = location(out)
    return {**given, "directory": place.parent / "raw" if isinstance(place, Path) else Path("data/raw")}


def _check_same(out: str, manifest: Manifest, record: dict[str, Any]) -> None:
    """Raises ConfigError: a data set prepared with other options stands at `out`; names those that differ."""
    from pipeline.errors import ConfigError

    differing = [f"{k} {manifest.source.get(k)} and not {v}" for k, v in record.items() if manifest.source.get(k) != v]
    if differing:
        raise ConfigError(f"{out}: was prepared with {', '.join(differing)}. Use --overwrite, or another --out.")


class Sources(TyperGroup):
    """A command per source, made when it is asked for: only then its code is imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        from pipeline.datasets.sources import SOURCES

        return list(SOURCES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from pipeline.datasets.sources import SOURCES, options_of

        if cmd_name not in SOURCES:
            return None
        command = command_for(cmd_name, options_of(cmd_name))
        return typer.main.get_command(console.single_command(command, name=cmd_name, help=SOURCES[cmd_name].help))


app = console.new_app(
    cls=Sources,
    no_args_is_help=True,
    help="Turn raw data into Parquet shards and a manifest (dataset.json) that fixes the class splits.",
)


@app.callback()
def _group() -> None: ...


def command_for(name: str, section: type[SourceOptions]) -> Any:
    """The command of one source: its options and those of every source."""
    common = [
        parameter
        for parameter in inspect.signature(prepare, eval_str=True).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    own = [parameter for field in section.model_fields for parameter in _parameters(section, field)]

    def command(**given: Any) -> None:
        shared = {parameter.name: given.pop(parameter.name) for parameter in common}
        source = given.pop("source", None)
        if source is not None and given["directory"] is not None:
            from pipeline.errors import ConfigError

            raise ConfigError(f"data prepare {name}: DIR {given['directory']} and --source {source}: give one of them.")
        if source is not None:
            given["directory"] = source
        prepare(name, {key: value for key, value in given.items() if value is not None}, **shared)

    command.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _parameters(section: type[SourceOptions], name: str) -> list[inspect.Parameter]:
    """How a field of a source's options is given: what typer makes options from."""
    field = section.model_fields[name]
    if name == "directory":  # --source: as it was given before there was an argument
        argument = typer.Argument(metavar="DIR", help=field.description)
        return [
            _parameter("directory", field.annotation, argument, None),
            _parameter("source", field.annotation, typer.Option("--source", hidden=True), None),
        ]
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(flag, help=field.description)
    return [
        _parameter(name, field.annotation, option, inspect.Parameter.empty if field.is_required() else field.default)
    ]


def _parameter(name: str, annotation: Any, info: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[annotation, info])
