"""A data set's digests, footers and indices against its bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import DataError
from pipeline.storage import Location, ObjectPath, location
from pipeline.tasks.shards.digests import file_sha256
from pipeline.tasks.shards.examples import ExamplesDigest
from pipeline.tasks.shards.manifest import MANIFEST, Manifest, ShardEntry, read_manifest
from pipeline.tasks.shards.reader import ShardReader, leads_outside


def verify(folder: str | Location, manifest: Manifest | None = None) -> Manifest:
    """Check every digest, footer and index of a data set against its bytes. Returns the manifest.

    Raises DataError: names every damaged, truncated or missing shard, or the class that disagrees.
    """
    folder = location(folder)
    manifest = manifest or read_manifest(folder)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        problems = [p for p in pool.map(lambda shard: _shard_problem(folder, shard), manifest.shards) if p]
    if problems:
        raise DataError(f"{folder}: " + "; ".join(problems) + ". Restore these files, or prepare the data set again.")
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


def _shard_problem(folder: Location, shard: ShardEntry) -> str | None:
    file = folder / shard.file
    try:
        if leads_outside(folder, file):
            return f"{shard.file} is a link to a place outside this folder, which is not read (copy the file into it)"
        size = file.size() if isinstance(file, ObjectPath) else file.stat().st_size
        if size != shard.bytes:
            return f"{shard.file} has {size} bytes instead of {shard.bytes} (truncated or replaced)"
        if file_sha256(file) != shard.sha256:
            return f"{shard.file} is damaged (its sha256 differs from the manifest's)"
    except FileNotFoundError:
        return f"{shard.file} is missing"
    except OSError as error:
        return f"{shard.file} cannot be read ({error.strerror or error})"
    return None
