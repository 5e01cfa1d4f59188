"""`metapipe data adopt`: a manifest for Parquet files that another program wrote, which stay as they are."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Literal

from pipeline import storage
from pipeline.datasets.labels import check_classes, label_problem
from pipeline.datasets.prepare import REPORTED_PROBLEMS
from pipeline.datasets.preprocessing import Preprocessing, decode_picture
from pipeline.datasets.splits import class_splits
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Location, location
from pipeline.tasks import shards
from pipeline.tasks.shards import adopting

Kind = Literal["drawing", "photo"]
SIZE = 84  # pixels, of encoded images


def adopt(
    folder: str | Location,
    *,
    label: str = "label",
    group: str | None = None,
    example: str | None = None,
    shape: tuple[int, int, int] | None = None,
    kind: Kind | None = None,
    size: int | None = None,
    seed: int = 0,
    min_examples: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda rows, total: None,
) -> shards.Manifest:
    """Write the manifest of a folder of Parquet files; returns it.

    label, group, example: columns; without `example` it is guessed. shape: H, W, C of pictures that are stored as
    pixels. kind and size: how pictures are prepared (of pixels: how a user's picture becomes one of them; of grey
    ones kind must be given, as pixels do not tell it). seed: of the class splits. min_examples: a class with fewer is
    left out. strict: refuse rows that are no examples, else they are left out and recorded under `problems`.

    Raises ConfigError, DataError: a column is missing or holds something else; what is said of it in
    `pipeline.tasks.shards.adopting`.
    """
    folder = location(folder)
    if not overwrite and (folder / shards.MANIFEST).exists():
        raise DataError(f"{folder}: is a data set already. Write its manifest anew with --overwrite.")
    column, stored = adopting.guess_example(folder, example, label, group)
    modality = adopting.guess_modality(stored, shape)
    if modality is None:
        raise ConfigError(f"{folder}: column {column!r} is of type {stored}, which holds no examples.")
    if modality == "image" and shape is None:
        raise ConfigError(
            f"{folder}: column {column!r} holds pixels; say their shape with --shape HEIGHT,WIDTH,CHANNELS."
        )
    preprocessing: dict[str, Any] = {}
    if modality == "encoded_image":
        chosen = Preprocessing(kind=kind or "photo", size=size or SIZE, channels=1 if kind == "drawing" else 3)
        preprocessing, shape = chosen.model_dump(mode="json"), (chosen.size, chosen.size, chosen.channels)
    elif modality == "image" and shape is not None:
        preprocessing = _of_pixels(shape, kind)
    layout = shards.Layout(label=label, group=group, example=column)
    found = adopting.index(
        folder,
        layout,
        modality,
        shape,
        check=_problem,
        check_label=label_problem,
        check_classes=check_classes,
        min_examples=min_examples,
        progress=progress,
    )
    if strict and (found.problems or found.left_out):
        raise DataError(_refusal(folder, found))
    if not found.classes:
        raise DataError(f"{folder}: no row is an example with a label{_first(found)}.")
    splits = class_splits({entry["name"]: entry["group"] for entry in found.classes}, seed=seed)
    source: dict[str, Any] = {"name": "adopted", **layout.model_dump(exclude_none=True), "split_seed": seed}
    if found.problems:
        listed = [list(problem) for problem in found.problems[:REPORTED_PROBLEMS]]
        source["problems"] = {"count": found.num_problems, "first": listed}
    if found.left_out:
        source["left_out"] = {"count": len(found.left_out), "first": found.left_out[:REPORTED_PROBLEMS]}
    content = {
        "format_version": 2,
        "modality": modality,
        "shape": found.shape,
        "dtype": adopting.dtype_of(modality),
        "columns": found.columns,
        "layout": layout,
        "classes": [
            {**entry, "splits": {split: members[entry["name"]] for split, members in splits.items()}}
            for entry in found.classes
        ],
        "splits": list(splits),
        "shards": found.shards,
        "source": source,
        "preprocessing": preprocessing,
        "digest": "0" * 64,
    }
    manifest = shards.Manifest.model_validate(content)
    manifest = manifest.model_copy(update={"digest": manifest.compute_digest()})
    try:
        storage.write(folder / shards.MANIFEST, manifest.to_json())
    except OSError as error:
        raise DataError(f"{folder / shards.MANIFEST}: cannot be written ({error}).") from error
    return manifest


def as_table(folder: str, *, label: str, group: str | None, example: str | None, shape: str | None) -> dict[str, Any]:
    """The options with which `data prepare parquet` takes the same examples. Raises ConfigError, DataError."""
    column, stored = adopting.guess_example(location(folder), example, label, group)
    modality = adopting.guess_modality(stored, parse_shape(shape))
    given: dict[str, Any] = {"directory": folder, "label": label, **({"group": group} if group else {})}
    if modality == "text":
        return {**given, "text": column}
    if modality == "encoded_image":
        return {**given, "image": column.removesuffix(".bytes")}
    if modality == "vector":
        return {**given, "features": [column]}
    raise ConfigError(
        f"{folder}: column {column!r} of type {stored} cannot be rewritten. Write the files sorted by class, with row "
        "groups of at most 64 MiB, and adopt them."
    )


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """ "28,28,1" -> (28, 28, 1). Raises ConfigError."""
    if text is None:
        return None
    numbers = text.replace("x", ",").replace("×", ",").split(",")
    if len(numbers) != 3 or not all(number.strip().isascii() and number.strip().isdigit() for number in numbers):
        raise ConfigError(f"--shape {text}: write it as HEIGHT,WIDTH,CHANNELS, such as 28,28,1.")
    height, width, channels = (int(number) for number in numbers)
    if not height * width * channels:
        raise ConfigError(f"--shape {text}: each must be at least 1.")
    return height, width, channels


def _of_pixels(shape: tuple[int, int, int], kind: Kind | None) -> dict[str, Any]:
    """How a user's picture becomes an image of this shape; nothing where no preprocessing gives it."""
    height, width, channels = shape
    if height != width or channels not in (1, 3) or not 8 <= height <= 1024:
        return {}
    if kind is None and channels == 1:
        raise ConfigError(
            f"--shape {height},{width},1: say with --kind how users' pictures become such grey pixels. --kind drawing: "
            "ink is high, dark on light is inverted. --kind photo: grey as it is (X-rays, photographs)."
        )
    kind = kind or "photo"
    if kind == "drawing" and channels != 1:
        raise ConfigError(f"--kind drawing: drawings are grey, and --shape {height},{width},{channels} is not.")
    return Preprocessing(kind=kind, size=height, channels=1 if channels == 1 else 3).model_dump(mode="json")


def _problem(example: str | bytes) -> str | None:
    """What is wrong with a text or a picture, which is decoded: a header is whole where a file was cut short."""
    if isinstance(example, str):
        return None if example.strip() else "has no text"
    try:
        decode_picture(io.BytesIO(example), name="")
    except DataError as error:
        return str(error).removeprefix(": ").rstrip(".")
    return None


def _refusal(folder: Location, found: adopting.Found) -> str:
    told = [f"{problem.item}: {problem.reason}" for problem in found.problems[:5]]
    told += [f"class {each['class']}: only {each['examples']} examples" for each in found.left_out[:5]]
    total = found.num_problems + len(found.left_out)
    more = f" (and {total - len(told)} more)" if total > len(told) else ""
    return f"{folder}: {'; '.join(told)}{more}. Mend or remove them, or leave --strict out to go without them."


def _first(found: adopting.Found) -> str:
    return f" ({found.problems[0].item}: {found.problems[0].reason})" if found.problems else ""
