"""The data set on disk: Parquet shards and a manifest. Write, open, verify, index.

    DATASET/dataset.json            the manifest (class `Manifest`)
    DATASET/shards/00000.parquet    columns class_id int32, class_name string, group string,
                                    image fixed_size_binary(H·W·C), row-major uint8

A row group holds one class and at most about 4 MB, so a large class has several; the manifest indexes them.
Images are fixed-size binary without dictionary or compression: a reader maps the file and takes rows without
decoding, and any Parquet reader opens it. Pages carry checksums, so a damaged page is found even when it is read
alone. The class splits live in the manifest, never in code that runs at training time.

The data set's own digest covers what a model can learn from (shape, classes, pixels, splits) and how a picture
becomes such an image (preprocessing), and not how the bytes were packed, so the same raw data gives the same digest
with any Parquet writer.
"""

from pipeline.tasks.shards.manifest import MANIFEST, ClassEntry, Manifest, RowGroup, ShardEntry, read_manifest
from pipeline.tasks.shards.reader import ShardReader
from pipeline.tasks.shards.verify import verify
from pipeline.tasks.shards.writer import check_free, write

__all__ = [
    "MANIFEST",
    "ClassEntry",
    "Manifest",
    "RowGroup",
    "ShardEntry",
    "ShardReader",
    "check_free",
    "read_manifest",
    "verify",
    "write",
]
