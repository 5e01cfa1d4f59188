"""A data set in a few lines: for `metapipe data` and its JSON."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from jobs import console

LEAST = 2  # examples of a class that an episode can be drawn from

if TYPE_CHECKING:
    from pipeline.datasets.survey import Survey
    from pipeline.tasks.shards import Manifest


def counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Class split -> part -> its number of classes."""
    return {split: dict(Counter(entry.splits[split] for entry in manifest.classes)) for split in manifest.splits}


def summary(folder: str, manifest: Manifest, *, found: Survey | None = None) -> dict[str, Any]:
    """found: when the data card was made."""
    problems, left_out = (manifest.source.get(key, {"count": 0, "first": []}) for key in ("problems", "left_out"))
    content = {
        "data": str(folder),
        "digest": manifest.digest,
        "shape": list(manifest.shape),
        "classes": len(manifest.classes),
        "groups": len({entry.group for entry in manifest.classes}),
        "examples": manifest.num_examples,
        "least_examples_of_a_class": min(entry.count for entry in manifest.classes),
        "shards": len(manifest.shards),
        "classes_by_split": counts(manifest),
        "near_duplicates": {split: alike["pairs"] for split, alike in look_alikes(manifest, found).items()},
        "problems": problems["count"],
        "classes_left_out": left_out["count"],
        "source": {k: v for k, v in manifest.source.items() if k != "near_duplicates"},
    }
    if found is not None:
        from pipeline.datasets.card import leaks

        content["leaks"] = leaks(found)
        content["copies"] = {"within_classes": found.copies_within, "across_classes": found.copies_across}
    return content


def emit(folder: str, manifest: Manifest, *, as_json: bool, reused: bool = False, found: Survey | None = None) -> None:
    """The summary as JSON, or shown. found: when the data card was made."""
    console.emit(
        summary(folder, manifest, found=found),
        as_json=as_json,
        show=lambda: show(folder, manifest, reused=reused, found=found),
    )


def look_alikes(manifest: Manifest, found: Survey | None) -> dict[str, dict[str, Any]]:
    """Class split -> number of pairs of classes that look alike across its parts, and the closest of them."""
    if found is None:
        recorded: dict[str, dict[str, Any]] = manifest.source.get("near_duplicates", {})
        return recorded
    return {split: {"pairs": len(pairs), "closest": pairs[:3]} for split, pairs in found.look_alikes.items()}


def show(folder: str, manifest: Manifest, *, reused: bool = False, found: Survey | None = None) -> None:
    """found: when the data card was made."""
    kinds = {"image": "images", "encoded_image": "encoded images", "vector": "vectors", "text": "texts"}
    of = f" of {'×'.join(map(str, manifest.shape))}" if manifest.shape else ""
    console.out.print(
        f"[bold]{escape(str(folder))}[/]{' (already there, verified)' if reused else ''}: {len(manifest.classes)} "
        f"classes in {len({entry.group for entry in manifest.classes})} groups, {manifest.num_examples} "
        f"{kinds[manifest.modality]}{of}, {len(manifest.shards)} shards, digest {manifest.digest[:12]}…"
    )
    table = Table("class split", "meta_train", "meta_val", "meta_test", "look-alikes across parts")
    if found is not None:
        table.add_column("copies across parts")
    alike = look_alikes(manifest, found)
    for split, by_part in counts(manifest).items():
        cells = [str(by_part.get(part, 0)) for part in ("meta_train", "meta_val", "meta_test")]
        cells.append(str(alike.get(split, {}).get("pairs", "not looked for")))
        if found is not None:
            near = f" + {found.near[split].examples} nearly" if split in found.near else ""
            cells.append(f"{found.identical[split].examples}{near}")
        table.add_row(escape(console.harmless(split)), *cells)
    console.out.print(table)
    for split, pairs in alike.items():
        for first, part, second, other, similarity in pairs["closest"][:3]:
            _line(f"  {split}: {first} ({part}) looks like {second} ({other}), similarity {similarity:.2f}")
    _show_problems(manifest)
    _show_small_classes(manifest)
    if found is not None:
        from pipeline.datasets.card import CARD

        _line(f"data card: {location_of(folder, CARD)}")


def _show_small_classes(manifest: Manifest) -> None:
    """No episode can be drawn from a class of one example, so no training takes the part that it is in."""
    names = [entry.name for entry in manifest.classes if entry.count < LEAST]
    if names:
        which = "1 class has" if len(names) == 1 else f"{len(names)} classes have"
        shown = ", ".join(names[:5] + ["…"] * (len(names) > 5))
        _line(
            f"{which} a single example, and an episode needs one to learn from and one to be tested on: {shown}. Leave "
            "such classes out with --min-examples (k_shot plus eval_n_query, or more)."
        )


def _show_problems(manifest: Manifest) -> None:
    problems, left_out = (manifest.source.get(key) for key in ("problems", "left_out"))
    if problems:
        _line(f"{problems['count']} items were odd or could not be read (--strict refuses them):")
        for item, reason in problems["first"][:5]:
            _line(f"  {item}: {reason}")
    if left_out:
        names = [str(each["class"]) for each in left_out["first"][:5]] + ["…"] * (left_out["count"] > 5)
        _line(f"{left_out['count']} classes had too few examples and were left out: {', '.join(names)}")


def location_of(folder: str, name: str) -> str:
    """A file in a data set's folder, as a user would write it."""
    return f"{str(folder).rstrip('/')}/{name}"


def _line(text: str) -> None:
    """As it is: names and paths may look like markup, and a broken line cannot be copied."""
    console.out.print(console.harmless(text), markup=False, highlight=False, soft_wrap=True)
