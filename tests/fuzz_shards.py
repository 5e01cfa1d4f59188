"""Manifests and shards with bytes changed: whatever they hold, reading ends in a DataError or in examples.

    python -m tests.fuzz_shards KIND SECONDS    random changes, within MEMORY_BYTES of memory
    python -m tests.fuzz_shards KIND --atheris  guided by coverage, where atheris is installed, until it is interrupted

KIND is one of KINDS.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.adopt import adopt
from pipeline.errors import DataError
from pipeline.tasks import shards

MEMORY_BYTES = 1 << 30  # beyond what the process has at its start
LEAST = 150  # changes of a campaign, however busy the machine is
EXAMPLES: dict[str, Any] = {
    "image": np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3),
    "vector": np.array([[1, np.nan, 3], [4, 5, 6]], np.float32),
    "text": ["ein Satz", "", "日本語" * 9],
    "encoded_image": [b"\x89PNG" * 5, b"", b"x" * 50],
}
KINDS = (*EXAMPLES, "adopted text", "adopted vector")


def make(kind: str, folder: Path) -> Path:
    """A small data set of two classes in a new folder."""
    out = folder / kind.replace(" ", "-")
    if kind.startswith("adopted"):
        out.mkdir()
        examples = {"adopted text": ["a", "bb"] * 4, "adopted vector": [[1.0, 2.0], [3.0, None]] * 4}[kind]
        rows = pa.table({"label": ["x"] * 3 + ["y"] * 5, "example": examples})
        pq.write_table(rows, out / "part-00000.snappy.parquet", compression="snappy", row_group_size=5)
        adopt(out)
        return out
    classes = [shards.ClassExamples(name, "all", EXAMPLES[kind]) for name in ("a", "b")]
    parts = {"a": "meta_train", "b": "meta_test"}
    options: dict[str, Any] = {"splits": {"random": parts}, "source": {}, "preprocessing": {}, "modality": kind}
    shards.write(out, classes, shape=(8, 8, 3) if kind == "encoded_image" else None, **options)
    return out


def read_all(folder: Path) -> None:
    """As a worker reads, without verifying first, and as `data verify` does. Raises DataError."""
    manifest = shards.read_manifest(folder)
    with shards.ShardReader(folder, manifest) as reader:
        for class_id, entry in enumerate(manifest.classes):
            for rows in (None, [0, min(entry.count, 100) - 1]):
                reader.read_class(class_id, rows)
    shards.verify(folder)


def attack(folder: Path, file: Path, content: bytes) -> str:
    """Read the data set with the file's content changed; says how that ended. Any other error is a finding."""
    file.write_bytes(content)
    try:
        read_all(folder)
    except DataError as error:
        return str(error)
    return ""


def in_step(content: dict[str, Any]) -> bytes:
    """The manifest with a digest that fits, as an attacker writes it; where that cannot be computed, as it is."""
    try:
        manifest = shards.Manifest.model_validate(content)
        content = {**content, "digest": manifest.compute_digest()}
    except ValueError:
        pass
    return json.dumps(content).encode()


def changed(content: bytes, chance: random.Random) -> bytes:
    """A few bytes of it changed, moved, doubled or cut."""
    result = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at, length = chance.randrange(len(result) + 1), chance.choice([1, 1, 2, 4, 8])
        piece = chance.choice(
            [
                chance.randbytes(length),
                bytes(length),
                b"\xff" * length,
                bytes(result[(start := chance.randrange(len(result) + 1)) : start + length]),
                b"",
            ]
        )
        result[at : at + (length if chance.random() < 0.8 else 0)] = piece
    return bytes(result)


def changed_json(content: Any, chance: random.Random) -> Any:
    """One value in it replaced by a nasty one."""
    nasty = [None, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, True, "", "x", "..", "\0", [], {}, [0], "0" * 64]
    if chance.random() < 0.15 or not isinstance(content, (dict, list)) or not content:
        return chance.choice(nasty)
    key = chance.choice(list(content) if isinstance(content, dict) else list(range(len(content))))
    copy = content.copy()
    copy[key] = changed_json(content[key], chance)
    return copy


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


def campaign(kind: str, *, seconds: float, seed: int = 0) -> dict[str, int]:
    """Random changes of the manifest and of the shard, LEAST or more; how many there were, and how many were told."""
    chance = random.Random(seed)
    scratch = Path(tempfile.mkdtemp())
    counts = {"tried": 0, "told": 0}
    try:
        folder = make(kind, scratch)
        manifest = folder / shards.MANIFEST
        shard = folder / shards.read_manifest(folder).shards[0].file
        whole = {manifest: manifest.read_bytes(), shard: shard.read_bytes()}
        attacks: list[Callable[[], tuple[Path, bytes]]] = [
            lambda: (shard, changed(whole[shard], chance)),
            lambda: (manifest, changed(whole[manifest], chance)),
            lambda: (manifest, in_step(changed_json(json.loads(whole[manifest]), chance))),
        ]
        read_all(folder)  # pyarrow's pool takes an address range at its first use
        limit_memory()
        end = time.monotonic() + seconds
        while time.monotonic() < end or counts["tried"] < LEAST:
            file, content = chance.choice(attacks)()
            counts["tried"] += 1
            counts["told"] += bool(attack(folder, file, content))
            file.write_bytes(whole[file])
    finally:
        shutil.rmtree(scratch)
    return counts


def guided(kind: str) -> None:
    import atheris

    folder = make(kind, Path(tempfile.mkdtemp()))
    shard = folder / shards.read_manifest(folder).shards[0].file
    manifest = folder / shards.MANIFEST
    whole = {manifest: manifest.read_bytes(), shard: shard.read_bytes()}

    def one_input(data: bytes) -> None:
        file = shard if data[:1] < b"\x80" else manifest
        attack(folder, file, data[1:])
        file.write_bytes(whole[file])

    corpus = Path(tempfile.mkdtemp())
    for number, (file, first) in enumerate(((shard, b"\0"), (manifest, b"\xff"))):
        (corpus / str(number)).write_bytes(first + whole[file])
    for name, module in list(sys.modules.items()):  # ours alone: torch would take minutes
        if name.startswith("pipeline.tasks.shards"):
            holders = [module, *(each for each in vars(module).values() if isinstance(each, type))]
            for function in [each for holder in holders for each in vars(holder).values()]:
                if isinstance(function, FunctionType) and function.__module__ == name:
                    atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], str(corpus), "-max_len=8192", "-len_control=0"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[2:] == ["--atheris"]:
        guided(sys.argv[1])
    else:
        print(sys.argv[1], campaign(sys.argv[1], seconds=float(sys.argv[2]), seed=int((sys.argv[3:] or ["0"])[0])))
