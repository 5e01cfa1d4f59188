"""The data card beside a manifest: DATASET.md and DATASET.png for people, DATASET-statistics.json for programs.

It describes what is in the folder and can be written again at any time. It is no part of the data set: digests,
verification and training do not look at it.
"""

from __future__ import annotations

import io
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.datasets.duplicates import LISTED
from pipeline.datasets.preprocessing import Preprocessing, decode_picture
from pipeline.datasets.source import Original
from pipeline.datasets.survey import Survey, survey
from pipeline.errors import DataError
from pipeline.storage import Location, location, write
from pipeline.tasks import shards
from pipeline.types import SPLITS

# Not README.md: in a folder that was adopted, that one is somebody else's.
CARD, PICTURE, STATISTICS = "DATASET.md", "DATASET.png", "DATASET-statistics.json"
CLASS_ROWS = 100  # of the table by class; DATASET-statistics.json has them all
PICTURE_CLASSES, PICTURE_EXAMPLES = 6, 8  # of each part
CELL = 56  # pixels of an example in the picture
COLUMNS = 40  # of vectors that are listed
LONGEST_TEXT = 200  # characters of an example on the card


def write_card(
    folder: str | Location,
    manifest: shards.Manifest,
    *,
    command: str | None = None,
    originals: Mapping[Original, int] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Look at every example and write the card into the data set's folder; returns what was found.

    command: that made the data set. originals: how often each kind of raw picture was met.
    Raises DataError: a shard cannot be read, or the folder not be written to.
    """
    folder = location(folder)
    found = survey(folder, manifest, progress=progress)
    picture = sheet(folder, manifest) if manifest.modality in ("image", "encoded_image") else None
    text = markdown(
        manifest,
        found,
        name=folder.absolute().name,
        command=command,
        originals=originals or {},
        picture=picture is not None,
        texts=some_texts(folder, manifest) if manifest.modality == "text" else (),
    )
    try:
        write(folder / STATISTICS, _json(manifest, found, originals or {}))
        if picture is not None:
            write(folder / PICTURE, picture)
        write(folder / CARD, text)  # last: where it stands the others do
    except OSError as error:
        raise DataError(f"{folder}: the data card cannot be written ({error}).") from error
    return found


def leaks(found: Survey) -> dict[str, dict[str, int]]:
    """Class split -> examples of later parts with an identical one, or one nearly so, in an earlier part."""
    return {
        split: {"identical": found.identical[split].examples, "near": found.near[split].examples}
        if split in found.near
        else {"identical": found.identical[split].examples}
        for split in found.identical
    }


def markdown(
    manifest: shards.Manifest,
    found: Survey,
    *,
    name: str,
    command: str | None,
    originals: Mapping[Original, int],
    picture: bool,
    texts: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The card's page. texts: (part, class, example) of some texts."""
    sections = [
        f"# {_text(name)}\n\n{_what(manifest)}",
        f"![examples of each part]({PICTURE})" if picture else _sentences(texts),
        _table(("", ""), _facts(manifest)),
        "## Class splits\n\n" + _splits(manifest),
        "## Leakage\n\n" + _leakage(manifest, found),
        "## Problems\n\n" + _problems(manifest.source),
        "## Statistics\n\n" + _statistics(manifest, found, originals),
        "## Classes\n\n" + _classes(manifest, found),
        "## How it was made\n\n" + _made(manifest, command),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def sheet(folder: Location, manifest: shards.Manifest) -> bytes:
    """A PNG: for each part of the first class split a few classes as rows of examples, spread over the part's list."""
    font = ImageFont.load_default(11)
    width = 150 + PICTURE_EXAMPLES * (CELL + 2)
    rows = [
        (part, members)
        for part in SPLITS
        if (members := _spread(manifest.members(manifest.splits[0], part), PICTURE_CLASSES))
    ]
    height = sum(22 + len(members) * (CELL + 2) for _, members in rows)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    top = 0
    with shards.ShardReader(folder, manifest) as reader:
        for part, members in rows:
            pen.text((4, top + 5), f"{part} ({manifest.splits[0]})", fill="black", font=font)
            top += 22
            for class_id in members:
                entry = manifest.classes[class_id]
                pen.text((4, top + CELL // 2 - 6), _short(entry.name), fill="black", font=font)
                numbers = _spread(range(entry.count), PICTURE_EXAMPLES)
                for column, example in enumerate(_images(manifest, reader, class_id, numbers)):
                    shown = Image.fromarray(example.squeeze()).convert("RGB").resize((CELL, CELL))
                    picture.paste(shown, (150 + column * (CELL + 2), top))
                top += CELL + 2
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def some_texts(folder: Location, manifest: shards.Manifest) -> list[tuple[str, str, str]]:
    """(part, class, example) of a few texts of each part of the first class split, cut at LONGEST_TEXT characters."""
    found: list[tuple[str, str, str]] = []
    with shards.ShardReader(folder, manifest) as reader:
        for part in SPLITS:
            for class_id in _spread(manifest.members(manifest.splits[0], part), PICTURE_CLASSES):
                entry = manifest.classes[class_id]
                for text in reader.read_class(class_id, _spread(range(entry.count), 2)):
                    assert isinstance(text, str)
                    cut = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
                    found.append((part, entry.name, cut))
    return found


def _images(
    manifest: shards.Manifest, reader: shards.ShardReader, class_id: int, numbers: Sequence[int]
) -> Iterator[np.ndarray]:
    for example in reader.read_class(class_id, numbers):
        if isinstance(example, bytes):
            preprocessing = Preprocessing.model_validate(manifest.preprocessing)
            try:
                yield preprocessing(decode_picture(io.BytesIO(example), name="an encoded picture"))
            except DataError:
                continue
        else:
            yield example  # type: ignore[misc]


def _what(manifest: shards.Manifest) -> str:
    kind = {"image": "images", "encoded_image": "encoded images", "vector": "vectors", "text": "texts"}
    classes, groups = len(manifest.classes), len({entry.group for entry in manifest.classes})
    return (
        f"{manifest.num_examples} {kind[manifest.modality]} of {classes} classes in {groups} "
        f"{'group' if groups == 1 else 'groups'}, prepared by metapipe for few-shot learning."
    )


def _sentences(texts: Sequence[tuple[str, str, str]]) -> str:
    return _table(("part", "class", "example"), [tuple(map(_text, row)) for row in texts]) if texts else ""


def _facts(manifest: shards.Manifest) -> list[tuple[str, str]]:
    counts = sorted(entry.count for entry in manifest.classes)
    size = sum(shard.bytes for shard in manifest.shards)
    facts = [
        ("modality", manifest.modality),
        ("one example", " × ".join(map(str, manifest.shape)) or "a text"),
        ("examples per class", f"{counts[0]} to {counts[-1]}, median {statistics.median(counts):g}"),
        ("shards", f"{len(manifest.shards)} Parquet files, {size / 1e6:.1f} MB"),
        ("digest", f"`{manifest.digest}`"),
    ]
    return [fact for fact in facts if fact[1]]


def _splits(manifest: shards.Manifest) -> str:
    rows = []
    for split in manifest.splits:
        for part in SPLITS:
            members = [entry for entry in manifest.classes if entry.splits[split] == part]
            groups = len({entry.group for entry in members})
            rows.append((split, part, len(members), groups, sum(entry.count for entry in members)))
    return _table(("class split", "part", "classes", "groups", "examples"), rows) + (
        "\n\nThe classes of each part stand in dataset.json, and nothing that trains or tests can change them."
    )


def _leakage(manifest: shards.Manifest, found: Survey) -> str:
    rows = []
    for split in manifest.splits:
        near, pairs = found.near.get(split), found.look_alikes.get(split)
        rows.append(
            (
                split,
                found.identical[split].examples,
                "not looked for" if near is None else near.examples,
                "not looked for" if pairs is None else len(pairs),
            )
        )
    header = ("class split", "identical examples", "near-identical examples", "look-alike classes (pairs)")
    text = [
        "Examples of a later part (meta_train, meta_val, meta_test) with a copy in an earlier one, and pairs of "
        "classes of different parts that look or read alike.",
        _table(header, rows),
        f"Besides, {found.copies_within} examples are identical to another of their own class, and "
        f"{found.copies_across} to one of another class.",
    ]
    if found.compared < 1:
        text.append(f"Identity was looked at for {100 * found.compared:.1f} % of the examples, all copies of each.")
    if found.near_compared and found.near_compared < manifest.num_examples:
        text.append(f"Likeness was looked at for {found.near_compared} examples, spread evenly over the classes.")
    for kind, leaking in (("identical", found.identical), ("near-identical", found.near)):
        for split, each in leaking.items():
            if each.examples:
                listed = [
                    f"- {_text(p.class_b)} [{p.number_b}] is in {_text(p.class_a)} [{p.number_a}]"
                    for p in each.listed[:10]
                ]
                text.append(
                    f"{kind.capitalize()} across the parts of `{split}`, the first (in brackets the number in its "
                    "class, from 0):\n\n" + "\n".join(listed)
                )
    for split, pairs in found.look_alikes.items():
        listed = [f"- {_text(a)} ({pa}) and {_text(b)} ({pb}), {cosine:.2f}" for a, pa, b, pb, cosine in pairs[:10]]
        if listed:
            text.append(f"Classes that look alike across the parts of `{split}`, the closest:\n\n" + "\n".join(listed))
    return "\n\n".join(text)


def _problems(source: Mapping[str, Any]) -> str:
    problems, left_out = source.get("problems"), source.get("left_out")
    text = []
    if not problems and not left_out:
        text.append("None was met: everything in the raw data could be read.")
    if problems:
        listed = [f"- {_text(str(item))}: {_text(str(reason))}" for item, reason in problems["first"][:20]]
        text.append(f"{problems['count']} items could not be read or are odd, the first:\n\n" + "\n".join(listed))
    if left_out:
        listed = [f"- {_text(str(each['class']))}: {each['examples']} examples" for each in left_out["first"][:20]]
        text.append(f"{left_out['count']} classes were left out for having too few:\n\n" + "\n".join(listed))
    text += [f"Remark: {_text(remark)}" for remark in source.get("remarks", [])]
    return "\n\n".join(text)


def _statistics(manifest: shards.Manifest, found: Survey, originals: Mapping[Original, int]) -> str:
    text = []
    if manifest.modality in ("image", "encoded_image"):
        channels = ("grey",) if len(found.mean) == 1 else ("red", "green", "blue")
        by_channel = list(zip(channels, _four(found.mean), _four(found.std), strict=False))
        text.append(_table(("pixels, in [0, 1]", "mean", "standard deviation"), by_channel))
    elif manifest.modality == "text":
        text.append(f"A text has {found.mean[0]:.1f} ± {found.std[0]:.1f} characters (mean ± standard deviation).")
    else:
        numbers = zip(manifest.columns, _four(found.mean), _four(found.std), found.missing, strict=True)
        rows = [
            (
                _text(column.name),
                "numeric" if column.kind == "numeric" else f"{len(column.categories)} categories",
                mean if column.kind == "numeric" else "",
                std if column.kind == "numeric" else "",
                f"{100 * missing:.2f} %",
            )
            for column, mean, std, missing in numbers
        ]
        text.append(_table(("column", "kind", "mean", "standard deviation", "missing"), rows[:COLUMNS]))
        if len(rows) > COLUMNS:
            text.append(f"The other {len(rows) - COLUMNS} columns are in {STATISTICS}.")
    raw = _originals(originals or found.originals)
    if raw:
        header = ("raw pictures (a sample of each class)", "least", "median", "most")
        text.append(_table(header, [(side, *raw[side].values()) for side in ("width", "height")]))
        for kind in ("modes", "formats"):
            if raw[kind]:
                text.append(f"Their {kind}: " + ", ".join(f"{name} {count}" for name, count in raw[kind].items()) + ".")
    return "\n\n".join(text)


def _originals(found: Mapping[Original, int]) -> dict[str, dict[str, Any]]:
    """Sizes in pixels, and how often each mode and format is there; empty where nothing is known."""
    if not found:
        return {}
    each = list(Counter(found).elements())
    described: dict[str, dict[str, Any]] = {}
    for side, values in (("width", [o.width for o in each]), ("height", [o.height for o in each])):
        described[side] = {"least": min(values), "median": statistics.median_low(values), "most": max(values)}
    described["modes"] = dict(Counter(o.mode for o in each).most_common())
    described["formats"] = dict(Counter(o.format for o in each if o.format).most_common())
    return described


def _classes(manifest: shards.Manifest, found: Survey) -> str:
    of = {"text": " of the length", "vector": " of the first columns"}.get(manifest.modality, " of the pixels")
    rows = [
        (_text(c.name), _text(c.group), c.examples, " ".join(_four(c.mean[:3])), " ".join(_four(c.std[:3])))
        for c in found.classes[:CLASS_ROWS]
    ]
    table = _table(("class", "group", "examples", f"mean{of}", "standard deviation"), rows)
    more = len(found.classes) - len(rows)
    return table + (f"\n\nThe other {more} classes are in {STATISTICS}." if more else "")


def _made(manifest: shards.Manifest, command: str | None) -> str:
    found = ("near_duplicates", "problems", "left_out", "remarks")
    source = {k: v for k, v in manifest.source.items() if k not in found}
    text = [_fenced(command)] if command else []
    text.append("Source and options:\n\n" + _fenced(json.dumps(source, ensure_ascii=False, indent=1)))
    if manifest.preprocessing:
        shown = json.dumps(manifest.preprocessing, ensure_ascii=False, indent=1)
        text.append("Preprocessing, which a user's own examples go through as well:\n\n" + _fenced(shown))
    text.append(f"This card describes the data set and is no part of it; all numbers are in {STATISTICS}.")
    return "\n\n".join(text)


def _json(manifest: shards.Manifest, found: Survey, originals: Mapping[Original, int]) -> str:
    content = {
        "digest": manifest.digest,
        "mean": found.mean,
        "std": found.std,
        "missing": found.missing,
        "raw_pictures": _originals(originals or found.originals),
        "copies_within_classes": found.copies_within,
        "copies_across_classes": found.copies_across,
        "identical": {
            k: {"examples": v.examples, "listed": [list(p) for p in v.listed]} for k, v in found.identical.items()
        },
        "near": {k: {"examples": v.examples, "listed": [list(p) for p in v.listed]} for k, v in found.near.items()},
        "look_alike_classes": {
            split: {"pairs": len(pairs), "closest": [list(pair) for pair in pairs[:LISTED]]}
            for split, pairs in found.look_alikes.items()
        },
        "compared_for_identity": found.compared,
        "compared_for_likeness": found.near_compared,
        "classes": [entry._asdict() for entry in found.classes],
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the numbers, evenly."""
    return [numbers[i * len(numbers) // count] for i in range(count)] if len(numbers) > count else list(numbers)


def _short(name: str) -> str:
    """A class's name for the picture, whose font has Latin letters alone."""
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def _four(values: Sequence[float]) -> list[str]:
    return [f"{value:.4g}" for value in values]


def _text(content: str) -> str:
    """A user's text as text: nothing in it is Markdown or HTML."""
    one_line = " ".join(content.split()) if content.split() else content
    escaped = one_line.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#!~" else c for c in escaped)


def _fenced(content: str) -> str:
    fence = "```"
    while fence in content:
        fence += "`"
    return f"{fence}\n{content}\n{fence}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
