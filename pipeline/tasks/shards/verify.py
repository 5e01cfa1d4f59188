"""A data set's digests, footers and indices against its bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.errors import DataError
from pipeline.storage import Readable, readable
from pipeline.tasks.shards.digests import file_sha256
from pipeline.tasks.shards.examples import ExamplesDigest
from pipeline.tasks.shards.manifest import MANIFEST, Manifest, ShardEntry, read_manifest
from pipeline.tasks.shards.reader import ShardReader, leads_outside


def verify(folder: str | Readable, manifest: Manifest | None = None, *, sizes_only: bool = False) -> Manifest:
    """Check every digest, footer and index of a data set against its bytes. Returns the manifest.

    sizes_only: of the shards no more than that they are there, and as long as they should be.

    Raises DataError: names every damaged, truncated or missing shard, or the class that disagrees.
    """
    folder = readable(folder)
    manifest = manifest or read_manifest(folder)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        problems = [p for p in pool.map(lambda shard: _shard_problem(folder, shard, sizes_only), manifest.shards) if p]
    if problems:
        raise DataError(f"{folder}: " + "; ".join(problems) + ". Restore these files, or prepare the data set again.")
    if sizes_only:
        return manifest
    with ShardReader(folder, manifest) as reader:
        for class_id, entry in enumerate(manifest.classes):
            digest, count = ExamplesDigest(), 0
            for part in reader.parts(class_id):
                digest.update(part)
                count += len(part)
            if count != entry.count or digest.hexdigest() != entry.sha256:
                raise DataError(
                    f"{folder / MANIFEST}: class {entry.name} disagrees with its shards. Prepare the data set again."
                )
    return manifest


def _shard_problem(folder: Readable, shard: ShardEntry, size_only: bool) -> str | None:
    file = folder / shard.file
    try:
        if leads_outside(folder, file):
            return f"{shard.file} is a link to a place outside this folder, which is not read (copy the file into it)"
        size = file.stat().st_size if isinstance(file, Path) else file.size()
        if size != shard.bytes:
            return f"{shard.file} has {size} bytes instead of {shard.bytes} (truncated or replaced)"
        if not size_only and file_sha256(file) != shard.sha256:
            return f"{shard.file} is damaged (its sha256 differs from the manifest's)"
    except FileNotFoundError:
        return f"{shard.file} is missing"
    except OSError as error:
        return f"{shard.file} cannot be read ({error.strerror or error})"
    return None
