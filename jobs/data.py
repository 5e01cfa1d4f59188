"""`metapipe data`: prepare, verify and show data sets."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from jobs import console

if TYPE_CHECKING:
    from pipeline.datasets.prepare import Source
    from pipeline.tasks.shards import Manifest

app = console.new_app(help="Prepare data sets as Parquet shards, check them, look at them.", no_args_is_help=True)

Folder = Annotated[str, typer.Argument(help="Folder of a prepared data set (it holds dataset.json), or s3://…")]


class SourceName(StrEnum):
    glyphs = "glyphs"
    omniglot = "omniglot"
    images = "images"


class Kind(StrEnum):
    drawing = "drawing"
    photo = "photo"


@app.command()
def prepare(
    source_name: Annotated[
        SourceName,
        typer.Argument(
            metavar="glyphs|omniglot|images",
            help="glyphs: characters of many scripts, rendered here, nothing to download. omniglot: the official "
            "archives. images: your own pictures, SOURCE/CLASS/* or SOURCE/GROUP/CLASS/*.",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder to write, or s3://…; it appears whole or not at all.")],
    source: Annotated[
        Path | None, typer.Option(help="Folder of the raw data (archives or extracted; omniglot and images).")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the raw data first (omniglot).")] = False,
    size: Annotated[int, typer.Option(min=8, max=1024, help="Height and width in pixels.")] = 28,
    kind: Annotated[Kind, typer.Option(help="images: drawing (grey, ink high) or photo (RGB).")] = Kind.drawing,
    seed: Annotated[int, typer.Option(min=0, help="Of the class splits (and of the drawings of glyphs).")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is there.")] = False,
    reuse: Annotated[bool, typer.Option("--reuse", help="Do nothing if a whole data set is there already.")] = False,
    json: console.Json = False,
) -> None:
    """Turn raw data into Parquet shards and a manifest (dataset.json) that fixes the class splits."""
    from pipeline.datasets.prepare import prepare as write_data_set
    from pipeline.storage import location
    from pipeline.tasks import shards

    record: dict[str, Any] = {"name": source_name.value, "size": size, "seed": seed}
    if source_name is SourceName.images:
        record["kind"] = kind.value  # the other sources are drawings whatever it says
    place = location(out)
    if reuse and (place / shards.MANIFEST).exists():
        manifest = shards.read_manifest(out)
        _check_same(out, manifest, record)
        shards.verify(out, manifest)
        console.emit(_summary(out, manifest), as_json=json, show=lambda: _show(out, manifest, reused=True))
        return
    shards.check_free(out, overwrite=overwrite)
    chosen = _source(source_name, source, download=download, size=size, kind=kind, seed=seed, out=out)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console.err, transient=True) as progress:
        task = progress.add_task(f"reading {source_name.value}")
        count = 0

        def advance(raw: Any) -> None:
            nonlocal count
            count += 1
            progress.update(task, description=f"{count} classes, now {escape(raw.name)}")

        manifest, _ = write_data_set(chosen, out, record=record, seed=seed, overwrite=overwrite, progress=advance)
    console.emit(_summary(out, manifest), as_json=json, show=lambda: _show(out, manifest))


def _check_same(out: str, manifest: Manifest, record: dict[str, Any]) -> None:
    """Raises ConfigError: a data set prepared with other options stands at `out`; names those that differ."""
    from pipeline.errors import ConfigError

    differing = [f"{k} {manifest.source.get(k)} and not {v}" for k, v in record.items() if manifest.source.get(k) != v]
    if differing:
        raise ConfigError(f"{out}: was prepared with {', '.join(differing)}. Use --overwrite, or another --out.")


def _source(
    name: SourceName, folder: Path | None, *, download: bool, size: int, kind: Kind, seed: int, out: str
) -> Source:
    from pipeline.errors import ConfigError

    if name is SourceName.glyphs:
        from pipeline.datasets.glyphs import Glyphs

        return Glyphs(seed=seed, size=size)
    if name is SourceName.omniglot:
        from pipeline.datasets.omniglot import Omniglot

        if download:
            return Omniglot.download(folder or _archives_beside(out), size=size)
        if folder is None:
            raise ConfigError("omniglot: give the folder of its archives with --source, or fetch them with --download.")
        return Omniglot(folder, size=size)
    from pipeline.datasets.image_folder import ImageFolder
    from pipeline.datasets.preprocessing import Preprocessing

    if folder is None:
        raise ConfigError("images: give the folder that holds a folder of pictures per class with --source.")
    preprocessing = Preprocessing(kind=kind.value, size=size, channels=3 if kind is Kind.photo else 1)
    return ImageFolder(folder, preprocessing=preprocessing)


def _archives_beside(out: str) -> Path:
    from pipeline.storage import location

    place = location(out)
    return place.parent / "raw" if isinstance(place, Path) else Path("data/raw")


@app.command()
def verify(folder: Folder, json: console.Json = False) -> None:
    """Check every digest, footer and index of a data set against its bytes."""
    from pipeline.tasks import shards

    manifest = shards.verify(folder)
    console.emit(
        {**_summary(folder, manifest), "verified": True},
        as_json=json,
        show=lambda: console.out.print(
            f"{escape(str(folder))}: whole. {len(manifest.shards)} shards, {len(manifest.classes)} classes, "
            f"{manifest.num_examples} examples, digest {manifest.digest[:12]}…"
        ),
    )


@app.command()
def show(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: NAME-episodes.png here.")] = None,
    class_split: Annotated[str | None, typer.Option("--class-split", help="Default: the data set's first.")] = None,
    part: Annotated[str, typer.Option(help="meta_train, meta_val or meta_test.")] = "meta_train",
    n_way: Annotated[int, typer.Option(min=2)] = 5,
    k_shot: Annotated[int, typer.Option(min=1)] = 1,
    episodes: Annotated[int, typer.Option(min=1, max=24)] = 6,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: console.Json = False,
) -> None:
    """Describe a data set and draw a few of its episodes."""
    import torch

    from pipeline import pictures
    from pipeline.config import validate
    from pipeline.storage import location
    from pipeline.tasks import shards
    from pipeline.tasks.images import ImagesConfig

    manifest = shards.read_manifest(folder)
    file = out or Path(f"{location(folder).absolute().name}-episodes.png")
    content = {
        "family": "images",
        "data": folder,
        "split": class_split or manifest.splits[0],
        "n_way": n_way,
        "k_shot": k_shot,
        "n_query": 4,
        "eval_n_query": 4,
    }
    family = validate(ImagesConfig, content, source="data show").build(device=torch.device("cpu"), dtype=torch.float32)
    batch = family.sample(part_of_split(part), 0, torch.arange(episodes), seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures.episodes(batch, file)

    def describe() -> None:
        _show(folder, manifest)
        console.out.print(f"picture of {episodes} {part} episodes: {escape(str(file))}")

    console.emit({**_summary(folder, manifest), "picture": str(file)}, as_json=json, show=describe)


def part_of_split(name: str) -> Any:
    """The part of a class split with this name. Raises ConfigError."""
    from pipeline.errors import ConfigError
    from pipeline.types import SPLITS

    if name not in SPLITS:
        raise ConfigError(f"--part {name}: choose one of {', '.join(SPLITS)}.")
    return name


def _counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    return {split: dict(Counter(entry.splits[split] for entry in manifest.classes)) for split in manifest.splits}


def _summary(folder: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "data": str(folder),
        "digest": manifest.digest,
        "shape": list(manifest.shape),
        "classes": len(manifest.classes),
        "groups": len({entry.group for entry in manifest.classes}),
        "examples": manifest.num_examples,
        "shards": len(manifest.shards),
        "classes_by_split": _counts(manifest),
        "near_duplicates": {
            split: found["pairs"] for split, found in manifest.source.get("near_duplicates", {}).items()
        },
        "source": {k: v for k, v in manifest.source.items() if k != "near_duplicates"},
    }


def _show(folder: str, manifest: Manifest, *, reused: bool = False) -> None:
    height, width, channels = manifest.shape
    console.out.print(
        f"[bold]{escape(str(folder))}[/]{' (already there, verified)' if reused else ''}: {len(manifest.classes)} "
        f"classes in {len({entry.group for entry in manifest.classes})} groups, {manifest.num_examples} images of "
        f"{height}×{width}×{channels}, {len(manifest.shards)} shards, digest {manifest.digest[:12]}…"
    )
    table = Table("class split", "meta_train", "meta_val", "meta_test", "look-alikes across parts")
    found = manifest.source.get("near_duplicates", {})
    for split, counts in _counts(manifest).items():
        parts = [str(counts.get(part, 0)) for part in ("meta_train", "meta_val", "meta_test")]
        table.add_row(escape(split), *parts, str(found.get(split, {}).get("pairs", "not looked for")))
    console.out.print(table)
    for split, pairs in found.items():
        for first, part, second, other, similarity in pairs["closest"][:3]:
            console.out.print(
                f"  {split}: {first} ({part}) looks like {second} ({other}), similarity {similarity:.2f}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


if __name__ == "__main__":
    console.run(app)
