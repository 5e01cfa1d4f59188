"""Row groups of somebody else's making, decoded within a limit of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.tasks.shards.footer import RowGroupFooter

MAX_ROW_GROUP_BYTES = 64 << 20  # decoded; a larger one is not of our writing
UNFOLDED = 16  # row groups' bytes that a batch may unfold to before it is refused; with 1, batches were of a row or two


def bounded_table(
    file: pq.ParquetFile, footers: Sequence[RowGroupFooter], number: int, columns: Sequence[str]
) -> pa.Table:
    """Some columns of a row group. Raises ValueError and pyarrow's errors: more than a row group may be, or damaged."""
    batches = list(bounded_batches(file, footers, number, columns))
    if not batches:
        raise ValueError(f"row group {number} is empty")
    return pa.Table.from_batches(batches)


def bounded_batches(
    file: pq.ParquetFile, footers: Sequence[RowGroupFooter], number: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """The batches of a row group, as long as they are no more than a row group may be.

    No value is longer than its column is in the file. So a batch unfolds to UNFOLDED times the limit at most, however
    it is encoded, and is refused then.
    """
    if number >= len(footers):
        raise ValueError(f"the file has {len(footers)} row groups")
    names = {path.split(".")[0] for path in columns}
    sizes = (max(chunk.uncompressed, chunk.compressed) for chunk in footers[number].chunks if chunk.column in names)
    rows = max(1, UNFOLDED * MAX_ROW_GROUP_BYTES // max(sum(sizes), 1))
    left = MAX_ROW_GROUP_BYTES
    for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=list(columns)):
        left -= batch.nbytes
        if left < 0:
            raise ValueError(f"row group {number} holds more than {MAX_ROW_GROUP_BYTES >> 20} MiB")
        yield batch
