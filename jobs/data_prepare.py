"""`metapipe data prepare SOURCE`: one command per source of `pipeline.datasets.sources`, with the source's options."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from jobs import console, data_summary

if TYPE_CHECKING:
    from pipeline.datasets.prepare import Progress as Prepared
    from pipeline.datasets.reading import Reader
    from pipeline.datasets.source import Original
    from pipeline.datasets.sources import SourceOptions
    from pipeline.datasets.survey import Survey
    from pipeline.tasks.shards import Manifest

COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())


def prepare(
    source_name: str,
    given: Mapping[str, Any],
    *,
    out: Annotated[str, typer.Option(help="Folder to write, or s3://…; it appears whole or not at all.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the class splits (and of what a source draws).")] = 0,
    class_lists: Annotated[
        Path | None,
        typer.Option(
            help="File of CLASS,PART rows, or folder of train.txt, val.txt, test.txt: the class split `lists`."
        ),
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Of the classes (or groups) for training, validation, test, e.g. 60,20,20."),
    ] = None,
    all_test: Annotated[
        bool,
        typer.Option("--all-test", help="Also a class split with every class in meta_test, for other data's models."),
    ] = False,
    min_examples: Annotated[int, typer.Option(min=1, help="Leave out classes with fewer.")] = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse raw data with anything odd or unreadable.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read; default: one per CPU.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Read on a Ray cluster: HOST:PORT of its head, or auto. All its nodes see the raw data."),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Write DATASET.md, with a picture and statistics.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is there.")] = False,
    reuse: Annotated[bool, typer.Option("--reuse", help="Do nothing if a whole data set is there already.")] = False,
    json: console.Json = False,
) -> None:
    """Turn raw data into Parquet shards and a manifest (dataset.json) that fixes the class splits.

    given: the source's own options, by name.
    """
    from pipeline.datasets.card import CARD
    from pipeline.datasets.chosen import Chosen
    from pipeline.datasets.prepare import prepare as write_data_set
    from pipeline.datasets.sources import read_options
    from pipeline.storage import location
    from pipeline.tasks import shards

    options = read_options(source_name, _with_folder(given, out, shared=address is not None))
    asked = _record_of_classes(class_lists, shares, all_test, min_examples)
    record = {"name": source_name, **options.record(), "seed": seed, **asked}
    if reuse and (location(out) / shards.MANIFEST).exists():
        manifest = shards.read_manifest(out)
        _check_same(out, manifest, record)
        shards.verify(out, manifest)
        if card and not (location(out) / CARD).exists():
            write_card(out, manifest)
        data_summary.emit(out, manifest, as_json=json, reused=True)
        return
    directory = getattr(options, "directory", None)
    shards.check_free(out, overwrite=overwrite, source=directory)
    raw = options.open(seed=seed)
    source = Chosen(raw, lists=class_lists, shares=_shares(shares), all_test=all_test)
    if source_name == "images":
        _hint_at_photos(raw)
    with Progress(*COLUMNS, console=console.err, transient=True) as bar:
        task = bar.add_task(f"reading {source_name}", total=None)

        def advance(done: Prepared) -> None:
            bad = f", {done.problems} odd or unreadable" if done.problems else ""
            text = f"{done.classes} classes, {done.examples} examples{bad}, now {escape(done.name)}"
            bar.update(task, description=text)

        with _reader(address) as reader:
            manifest, _ = write_data_set(
                source,
                out,
                record=record,
                seed=seed,
                overwrite=overwrite,
                strict=strict,
                min_examples=min_examples,
                workers=workers,
                reader=reader,
                progress=advance,
            )
    for remark in manifest.source.get("remarks", []):
        console.say(remark)
    found = write_card(out, manifest, command=_command(), originals=source.originals()) if card else None
    data_summary.emit(out, manifest, as_json=json, found=found)


def write_card(
    folder: str, manifest: Manifest, *, command: str | None = None, originals: Mapping[Original, int] | None = None
) -> Survey:
    """The data card, with its progress shown. Raises DataError."""
    from pipeline.datasets import card

    with Progress(*COLUMNS, BarColumn(), console=console.err, transient=True) as bar:
        task = bar.add_task("statistics and copies", total=len(manifest.classes))
        return card.write_card(
            folder,
            manifest,
            command=command,
            originals=originals,
            progress=lambda classes: bar.update(task, completed=classes),
        )


def _hint_at_photos(raw: Any) -> None:
    """A line on stderr where pictures in colour are about to become grey ink, as is right for drawings alone."""
    if raw.preprocessing.kind == "drawing" and raw.in_colour():
        console.say("Most pictures are in colour, and kind drawing makes grey ink of them. Photos: --kind photo.")


def _command() -> str:
    """What was typed, for the card."""
    from pipeline.credentials import redacted

    return redacted(shlex.join(["metapipe", *sys.argv[1:]]))


def _shares(text: str | None) -> tuple[int, int, int] | None:
    """Raises ConfigError: not three numbers of which one or more are above 0."""
    from pipeline.errors import ConfigError

    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers) or not sum(map(int, numbers)):
        raise ConfigError(f"--shares {text}: give three whole numbers, as in 60,20,20 (or the numbers of classes).")
    train, val, test = map(int, numbers)
    return train, val, test


def _record_of_classes(
    class_lists: Path | None, shares: str | None, all_test: bool, min_examples: int
) -> dict[str, Any]:
    """What the manifest tells of the classes and class splits that were asked for, beside their seed."""
    lists = class_lists and f"{class_lists.name} sha256:{_sha256(class_lists)}"
    fewest = min_examples if min_examples > 1 else None
    asked = {"class_lists": lists, "shares": shares, "all_test": all_test, "min_examples": fewest}
    return {name: value for name, value in asked.items() if value}


def _sha256(lists: Path) -> str:
    """The start of a digest of a file, or of the files in a folder; "" where there is none (the source tells that)."""
    from hashlib import sha256

    files = sorted(file for file in lists.iterdir() if file.is_file()) if lists.is_dir() else [lists]
    digest = sha256()
    for file in files:
        try:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        except OSError:
            return ""
    return digest.hexdigest()[:16]


@contextmanager
def _reader(address: str | None) -> Iterator[Reader]:
    """What reads: processes of this machine, or a Ray cluster's. Raises ConfigError: no cluster answers there."""
    from pipeline.datasets import on_ray, reading

    if address is None:
        yield reading.read_chunks
        return
    from pipeline.launch import ray_cluster

    console.use_cluster(address)
    with ray_cluster(cpus=1):
        yield on_ray.read_chunks


def _with_folder(given: Mapping[str, Any], out: str, *, shared: bool) -> dict[str, Any]:
    """The options with a folder for what is downloaded: raw/ beside `out`, where no other was given.

    shared: processes that work in other folders read it too.
    """
    from pipeline.storage import location

    if not given.get("directory"):
        if not given.get("download"):
            return dict(given)
        place = location(out)
        given = {**given, "directory": place.parent / "raw" if isinstance(place, Path) else Path("data/raw")}
    return {**given, "directory": Path(given["directory"]).absolute()} if shared else dict(given)


def _check_same(out: str, manifest: Manifest, record: dict[str, Any]) -> None:
    """Raises ConfigError: a data set prepared with other options stands at `out`; names those that differ."""
    from pipeline.errors import ConfigError

    found = {"split_seed", "near_duplicates", "problems", "left_out", "remarks"}  # in the data, and not asked for
    there = {key: value for key, value in manifest.source.items() if key not in found}
    same_source = there.get("name") == record["name"]
    keys = [*record, *(key for key in there if key not in record)] if same_source else ["name"]
    differing = [
        f"{key} {there.get(key)} and not {record.get(key)}" for key in keys if there.get(key) != record.get(key)
    ]
    if differing:
        raise ConfigError(f"{out}: was prepared with {', '.join(differing)}. Use --overwrite, or another --out.")


class Sources(TyperGroup):
    """A command per source, made when it is asked for: only then its code is imported."""

    _listing = False  # while the names and help lines of all are shown, for which no code is needed

    def list_commands(self, ctx: Any) -> list[str]:
        from pipeline.datasets.sources import SOURCES

        return list(SOURCES)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        super().format_help(ctx, formatter)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from pipeline.datasets.sources import PROCEDURAL, SOURCES, options_of, procedural

        if cmd_name in PROCEDURAL:
            raise procedural(cmd_name)
        if cmd_name not in SOURCES:
            return None
        command = _nothing if self._listing else command_for(cmd_name, options_of(cmd_name))
        return typer.main.get_command(console.single_command(command, name=cmd_name, help=SOURCES[cmd_name].help))


def _nothing() -> None: ...


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
