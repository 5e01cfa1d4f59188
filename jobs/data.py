"""`metapipe data`: prepare, verify and show data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from jobs import console, data_prepare, data_summary

app = console.new_app(help="Prepare data sets as Parquet shards, check them, look at them.", no_args_is_help=True)
app.add_typer(data_prepare.app, name="prepare")


Folder = Annotated[
    str, typer.Argument(help="Folder of a prepared data set (it holds dataset.json), or s3://…, https://…")
]


@app.command()
def adopt(
    folder: Annotated[
        str, typer.Argument(help="Folder of Parquet files of pandas, Polars, DuckDB, Spark …, or s3://…")
    ],
    label: Annotated[str, typer.Option(help="Column of the classes' names.")] = "label",
    group: Annotated[str | None, typer.Option(help="Column of their groups, which the split `group` keeps.")] = None,
    example: Annotated[
        str | None,
        typer.Option(help="Column of the examples: pictures (bytes, struct of bytes and path), numbers, texts."),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="H,W,C of pictures that are stored as pixels.")] = None,
    kind: Annotated[
        Literal["drawing", "photo"] | None, typer.Option(help="Of pictures. drawing: grey, ink high. photo: colours.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=8, max=1024, help="Pixels of prepared pictures; default 84.")] = None,
    min_examples: Annotated[int, typer.Option("--min-examples", min=1, help="Leave out classes with fewer.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the class splits.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse rows that are no examples.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write a manifest that is there anew.")] = False,
    rewrite: Annotated[
        str | None, typer.Option(metavar="OUT", help="Make a sorted copy in our own form instead, as `prepare` does.")
    ] = None,
    json: console.Json = False,
) -> None:
    """Give Parquet files of another program a manifest (dataset.json); the files stay as they are."""
    from pipeline.datasets import adopt as adopting

    if rewrite is not None:
        given = adopting.as_table(folder, label=label, group=group, example=example, shape=shape)
        pictures = {"kind": kind, "size": size} if "image" in given else {}
        given |= {key: value for key, value in pictures.items() if value is not None}
        shared: dict[str, Any] = {"min_examples": min_examples, "strict": strict, "overwrite": overwrite}
        data_prepare.prepare("parquet", given, out=rewrite, seed=seed, json=json, **shared)
        return
    with console.err.status(f"reading {escape(folder)}") as status:
        manifest = adopting.adopt(
            folder,
            label=label,
            group=group,
            example=example,
            shape=adopting.parse_shape(shape),
            kind=kind,
            size=size,
            seed=seed,
            min_examples=min_examples,
            strict=strict,
            overwrite=overwrite,
            progress=lambda rows, total: status.update(f"{rows} of {total} rows"),
        )
    data_summary.emit(folder, manifest, as_json=json)


@app.command()
def verify(folder: Folder, json: console.Json = False) -> None:
    """Check every digest, footer and index of a data set against its bytes."""
    from pipeline.tasks import shards

    manifest = shards.verify(folder)
    console.emit(
        {**data_summary.summary(folder, manifest), "verified": True},
        as_json=json,
        show=lambda: console.out.print(
            f"{escape(str(folder))}: whole. {len(manifest.shards)} shards, {len(manifest.classes)} classes, "
            f"{manifest.num_examples} examples, digest {manifest.digest[:12]}…"
        ),
    )


@app.command()
def card(folder: Folder, json: console.Json = False) -> None:
    """Write a data set's card anew: DATASET.md, a picture of examples, statistics and copies across parts."""
    from pipeline.tasks import shards

    manifest = shards.read_manifest(folder)
    found = data_prepare.write_card(folder, manifest)
    data_summary.emit(folder, manifest, as_json=json, found=found)


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
    """Describe a data set and show a few of its episodes: a picture, or, of texts and tables, the examples."""
    from pipeline.tasks import shards

    manifest = shards.read_manifest(folder)
    shape = {"n_way": n_way, "k_shot": k_shot, "n_query": 4, "eval_n_query": 4}
    content = {"data": folder, "split": class_split or manifest.splits[0], **shape}
    if manifest.modality in ("text", "vector"):
        from jobs import data_episodes

        shown = data_episodes.supports(content, manifest.modality, part_of_split(part), episodes=episodes, seed=seed)

        def describe() -> None:
            data_summary.show(folder, manifest)
            data_episodes.show(shown)

        found: dict[str, Any] = {"episodes": shown}
    else:
        file = _draw(folder, content, out, part_of_split(part), episodes=episodes, seed=seed)

        def describe() -> None:
            data_summary.show(folder, manifest)
            console.out.print(f"picture of {episodes} {part} episodes: {escape(str(file))}")

        found = {"picture": str(file)}
    console.emit({**data_summary.summary(folder, manifest), **found}, as_json=json, show=describe)


def _draw(folder: str, content: dict[str, Any], out: Path | None, part: Any, *, episodes: int, seed: int) -> Path:
    """A picture of episodes of images; returns its file."""
    import torch

    from pipeline import pictures
    from pipeline.config import validate
    from pipeline.storage import readable
    from pipeline.tasks.images import ImagesConfig

    file = out or Path(f"{readable(folder).absolute().name}-episodes.png")
    section = validate(ImagesConfig, {"family": "images", **content}, source="data show").only(part)
    family = section.build(device=torch.device("cpu"), dtype=torch.float32)
    batch = family.sample(part, 0, torch.arange(episodes), seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures.episodes(batch, file)
    return file


def part_of_split(name: str) -> Any:
    """The part of a class split with this name. Raises ConfigError."""
    from pipeline.errors import ConfigError
    from pipeline.types import SPLITS

    if name not in SPLITS:
        raise ConfigError(f"--part {name}: choose one of {', '.join(SPLITS)}.")
    return name


if __name__ == "__main__":
    console.run(app)
