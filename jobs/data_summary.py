"""A data set in a few lines: for `metapipe data` and its JSON."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from jobs import console

if TYPE_CHECKING:
    from pipeline.tasks.shards import Manifest


def counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Class split -> part -> its number of classes."""
    return {split: dict(Counter(entry.splits[split] for entry in manifest.classes)) for split in manifest.splits}


def summary(folder: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "data": str(folder),
        "digest": manifest.digest,
        "shape": list(manifest.shape),
        "classes": len(manifest.classes),
        "groups": len({entry.group for entry in manifest.classes}),
        "examples": manifest.num_examples,
        "shards": len(manifest.shards),
        "classes_by_split": counts(manifest),
        "near_duplicates": {
            split: found["pairs"] for split, found in manifest.source.get("near_duplicates", {}).items()
        },
        "source": {k: v for k, v in manifest.source.items() if k != "near_duplicates"},
    }


def show(folder: str, manifest: Manifest, *, reused: bool = False) -> None:
    height, width, channels = manifest.shape
    console.out.print(
        f"[bold]{escape(str(folder))}[/]{' (already there, verified)' if reused else ''}: {len(manifest.classes)} "
        f"classes in {len({entry.group for entry in manifest.classes})} groups, {manifest.num_examples} images of "
        f"{height}×{width}×{channels}, {len(manifest.shards)} shards, digest {manifest.digest[:12]}…"
    )
    table = Table("class split", "meta_train", "meta_val", "meta_test", "look-alikes across parts")
    found = manifest.source.get("near_duplicates", {})
    for split, by_part in counts(manifest).items():
        parts = [str(by_part.get(part, 0)) for part in ("meta_train", "meta_val", "meta_test")]
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
