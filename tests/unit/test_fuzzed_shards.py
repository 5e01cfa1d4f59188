"""Manifests and shards of any bytes are read, or refused with a DataError (see tests/fuzz_shards.py for long runs)."""

import ast
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.tasks import shards
from pipeline.tasks.shards import footer
from tests import fuzz_shards

REPOSITORY = Path(__file__).resolve().parents[2]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fuzzed")
    return {kind: fuzz_shards.make(kind, folder) for kind in fuzz_shards.KINDS}


@pytest.mark.parametrize("kind", fuzz_shards.KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_refused_or_harmless(kind: str, data: st.DataObject, data_sets: dict[str, Path]) -> None:
    folder = data_sets[kind]
    name = data.draw(st.sampled_from([shards.MANIFEST, shards.read_manifest(folder).shards[0].file]))
    whole = (folder / name).read_bytes()
    try:
        chance = data.draw(st.randoms(use_true_random=False))
        fuzz_shards.attack(folder, folder / name, fuzz_shards.changed(whole, chance))
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("kind", ["image", "vector", "adopted text"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_changed_values_are_refused_or_harmless(kind: str, data: st.DataObject, data_sets: dict[str, Path]) -> None:
    """With a digest that fits, as an attacker writes it."""
    file = data_sets[kind] / shards.MANIFEST
    whole = file.read_bytes()
    chance = data.draw(st.randoms(use_true_random=False))
    content = fuzz_shards.changed_json(json.loads(whole), chance)
    try:
        fuzz_shards.attack(data_sets[kind], file, fuzz_shards.in_step(content) if isinstance(content, dict) else b"[]")
    finally:
        file.write_bytes(whole)


@settings(max_examples=40, deadline=None)
@given(content=json_values)
def test_any_json_is_no_manifest(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("json")
    (folder / shards.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError):
        shards.read_manifest(folder)
    shutil.rmtree(folder)


def test_deep_json_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / shards.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(DataError, match="not readable as JSON"):
        shards.read_manifest(tmp_path)


def test_reading_changed_bytes_takes_bounded_memory() -> None:
    """In a process of its own, which ends where pyarrow ends it, and where it asks for more than a gigabyte."""
    command = [sys.executable, "-m", "tests.fuzz_shards", "adopted vector", "0"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    counts = ast.literal_eval(ran.stdout.removeprefix("adopted vector"))
    assert counts["tried"] == fuzz_shards.LEAST
    assert counts["told"] > fuzz_shards.LEAST / 3, "hardly any change did harm"


def test_a_footer_is_read_as_pyarrow_reads_it(data_sets: dict[str, Path]) -> None:
    for folder in data_sets.values():
        file = folder / shards.read_manifest(folder).shards[0].file
        metadata = pq.ParquetFile(file).metadata
        found = footer.row_groups(file)
        assert len(found) == metadata.num_row_groups
        for number, group in enumerate(found):
            theirs = metadata.row_group(number)
            assert group.rows == theirs.num_rows
            for index, chunk in enumerate(group.chunks):
                column = theirs.column(index)
                assert chunk == footer.Chunk(
                    column.path_in_schema.split(".")[0],
                    {"UNCOMPRESSED": 0, "SNAPPY": 1}[column.compression],
                    column.total_uncompressed_size,
                    column.total_compressed_size,
                    column.data_page_offset,
                    column.has_dictionary_page,
                )


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=60))
def test_a_footer_of_any_bytes(content: bytes) -> None:
    try:
        assert isinstance(footer.parse(content), list)
    except ValueError as error:
        assert "damaged" in str(error)  # noqa: PT017


def test_changes_are_changes() -> None:
    content = bytes(range(100))
    different = sum(fuzz_shards.changed(content, random.Random(seed)) != content for seed in range(50))
    assert different > 40
