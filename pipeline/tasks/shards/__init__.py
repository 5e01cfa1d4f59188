"""The data set on disk: Parquet shards and a manifest. Write, open, verify, index.

    DATASET/dataset.json            the manifest (class `Manifest`)
    DATASET/shards/00000.parquet    columns class_id int32, class_name string, group string, and by modality
                                    image           `image`     fixed_size_binary(H·W·C), row-major uint8
                                    encoded_image   `image`     binary, a PNG, JPEG or WebP file
                                    vector          `features`  fixed_size_list<float32>[D], NaN = missing
                                    text            `text`      string

A row group holds one class and at most about 4 MB, so a large class has several; the manifest indexes them.
There is no dictionary and no compression: a reader maps the file and takes the rows of images and vectors without
decoding, and any Parquet reader opens it. Pages carry checksums, so a damaged page is found even when it is read
alone. The class splits live in the manifest, never in code that runs at training time.

Files that another program wrote can be indexed where they lie (`adopting`): the manifest's `layout` names their
columns, and a row group may hold several classes. They are decoded at every read, within the limits of `bounds`.

The data set's own digest covers what a model can learn from (shape, classes, examples, splits) and how a picture
becomes such an image (preprocessing), and not how the bytes were packed, so the same raw data gives the same digest
with any Parquet writer.
"""

from pipeline.tasks.shards.manifest import (
    EVERY_CLASS,
    MANIFEST,
    ClassEntry,
    Layout,
    Manifest,
    RowGroup,
    ShardEntry,
    read_manifest,
)
from pipeline.tasks.shards.reader import ShardReader
from pipeline.tasks.shards.spool import Spool, SpoolError
from pipeline.tasks.shards.verify import verify
from pipeline.tasks.shards.writer import ClassExamples, ShardWriter, check_free, staged, whole_shards, write

__all__ = [
    "EVERY_CLASS",
    "MANIFEST",
    "ClassEntry",
    "ClassExamples",
    "Layout",
    "Manifest",
    "RowGroup",
    "ShardEntry",
    "ShardReader",
    "ShardWriter",
    "Spool",
    "SpoolError",
    "check_free",
    "read_manifest",
    "staged",
    "verify",
    "whole_shards",
    "write",
]
