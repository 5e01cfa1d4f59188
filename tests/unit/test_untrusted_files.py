"""Files of somebody else's making: small ones that unfold to gigabytes, pickles in our formats' places, paths that
lead elsewhere. Each is refused by name, before it costs memory, and nothing in it runs."""

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pipeline import learner
from pipeline.datasets import archives, preprocessing
from pipeline.datasets.image_folder import ImageFolder
from pipeline.datasets.omniglot import BACKGROUND, EVALUATION, Omniglot
from pipeline.datasets.prepare import prepare
from pipeline.datasets.preprocessing import Preprocessing, open_picture
from pipeline.errors import DataError
from pipeline.tasks import shards
from pipeline.tasks.shards import ShardEntry, bounds
from pipeline.training import outer
from pipeline.training.checkpoint import CheckpointStore, TrainState
from pipeline.types import MetaState

DRAWING = Preprocessing(kind="drawing", size=28)
SPARE = 64 << 20  # bytes that a process may take beyond what it has; the bombs decode to more


# --- pictures


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A grey PNG of zeros, with `rows` of its rows really there: a few kilobytes, whatever its dimensions."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + width)
    packed = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


BOMBS = {
    "100 megapixels": (png(10_000, 10_000), r"pixels are more than the 64 million"),
    "a terapixel": (png(1_000_000, 1_000_000, rows=1), r"pixels are more than the 64 million"),
    "one long row": (png(60_000_000, 1), r"60000000×1 pixels; the longer side may have 16384"),  # square: 3.6 PB
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_picture_bomb_is_refused_everywhere(bomb: str, tmp_path: Path) -> None:
    content, message = BOMBS[bomb]
    assert len(content) < 120_000
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "bomb.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"bomb\.png: .*{message}"):
        open_picture(folder / "bomb.png")
    with pytest.raises(DataError, match=rf"bomb\.png: .*{message}"):
        prepare(ImageFolder(tmp_path, preprocessing=DRAWING), tmp_path / "out", record={}, strict=True)
    card = SimpleNamespace(preprocessing=DRAWING, name="model")
    with pytest.raises(DataError, match=rf"bomb\.png: .*{message}"):
        learner.Learner.pictures(SimpleNamespace(card=card), [folder / "bomb.png"])  # type: ignore[arg-type]
    source = omniglot_archives(tmp_path / "archives", content, method=zipfile.ZIP_STORED)
    with pytest.raises(DataError, match=rf"{BACKGROUND}\.zip: .*0001_01\.png: .*{message}"):
        prepare(Omniglot(source), tmp_path / "out", record={}, strict=True)


def test_a_picture_within_the_limits_is_read(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(8000, 8000))
    assert open_picture(tmp_path / "large.png").size == (8000, 8000)


def test_refusing_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """In a process that could not decode it."""
    (tmp_path / "bomb.png").write_bytes(BOMBS["a terapixel"][0])
    (tmp_path / "row.png").write_bytes(BOMBS["one long row"][0])
    program = f"""
import resource, sys
from pipeline.datasets.prepare import prepare
from pipeline.datasets.preprocessing import Preprocessing, open_picture
from pipeline.errors import DataError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {SPARE}, used + {SPARE}))
for path in sys.argv[1:]:
    try:
        Preprocessing(kind="drawing", size=28)(open_picture(path))
    except DataError as error:
        print(error)
"""
    files = [str(tmp_path / name) for name in ("bomb.png", "row.png")]
    ran = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "64 million" in ran.stdout
    assert "the longer side" in ran.stdout


def test_only_the_named_formats_are_opened(tmp_path: Path) -> None:
    """Pillow goes by the content: a PostScript file named .png would be run by Ghostscript."""
    Image.new("L", (8, 8)).save(tmp_path / "script.png", "EPS")
    with pytest.raises(DataError, match=r"script\.png: not a picture that can be read"):
        open_picture(tmp_path / "script.png")
    assert preprocessing.FORMATS  # and all of IMAGE_SUFFIXES are among them, see test_datasets.test_file_formats


# --- zip archives


def omniglot_archives(folder: Path, *contents: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    folder.mkdir()
    for part in (BACKGROUND, EVALUATION):
        with zipfile.ZipFile(folder / f"{part}.zip", "w", method) as archive:
            for number, content in enumerate(contents, 1):
                for alphabet in range(7):
                    archive.writestr(f"{part}/{part[7:11]}_{alphabet}/character01/0001_{number:02d}.png", content)
    return folder


def drawing() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (105, 105)).astype(bool)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "method", "message"),
    [
        (bytes(80 << 20), zipfile.ZIP_DEFLATED, r"would be 80 MiB, more than the 64 MiB of a picture file"),
        (bytes(8 << 20), zipfile.ZIP_DEFLATED, r"would be \d{3,4} times as large decompressed"),
        (drawing(), zipfile.ZIP_LZMA, r"compressed with method 14"),
    ],
    ids=["large", "ratio", "method"],
)
def test_a_zip_bomb_is_refused_before_it_is_read(content: bytes, method: int, message: str, tmp_path: Path) -> None:
    source = omniglot_archives(tmp_path / "archives", content, method=method)
    assert (source / f"{BACKGROUND}.zip").stat().st_size < 1 << 20
    with pytest.raises(DataError, match=rf"{BACKGROUND}\.zip: .*_0/character01/0001_01\.png .*{message}"):
        prepare(Omniglot(source), tmp_path / "out", record={}, strict=True)


def test_a_zip_that_understates_an_entrys_size_is_no_way_around(tmp_path: Path) -> None:
    """What is read is bounded by the declared size; the checksum then gives it away."""
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(64 << 20))
    content = path.read_bytes()
    size = struct.pack("<I", 64 << 20)
    assert content.count(size) == 2  # in the entry's own header and in the directory
    path.write_bytes(content.replace(size, struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        with (
            archives.PictureArchive(path) as archive,
            pytest.raises(DataError, match=r"liar\.zip: a\.png cannot be read"),
        ):
            archive.read("a.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_an_encrypted_entry_is_told(tmp_path: Path) -> None:
    source = omniglot_archives(tmp_path / "archives", drawing())
    path = source / f"{BACKGROUND}.zip"
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"0001_01\.png is encrypted"):
        prepare(Omniglot(source), tmp_path / "out", record={}, strict=True)


def test_more_entries_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_ENTRIES", 3)
    with pytest.raises(DataError, match=r"holds 7 entries, more than the 3 that are read"):
        Omniglot(omniglot_archives(tmp_path / "archives", drawing()))


# --- shards


def with_shard(data: Path, edit: Callable[[Path], object]) -> Path:
    """The data set with its first shard changed and its manifest brought in step, as an attacker would."""
    manifest = data / shards.MANIFEST
    content = json.loads(manifest.read_text())
    file = data / content["shards"][0]["file"]
    edit(file)
    content["shards"][0] |= {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(content))
    return file


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data"


def refused(data: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        shards.verify(data)
    with shards.ShardReader(data, shards.read_manifest(data)) as reader, pytest.raises(DataError, match=message):
        reader.read_class(0)  # as a worker reads, without verifying


@pytest.mark.parametrize("how", ["compressed", "dictionary"])
def test_a_shard_that_unfolds_is_refused_by_its_footer(how: str, data: Path) -> None:
    """The same rows in a form whose length says nothing about the memory they take."""

    def edit(file: Path) -> None:
        table = pq.read_table(file)
        options = {"compression": "zstd"} if how == "compressed" else {"compression": "none", "use_dictionary": True}
        pq.write_table(table, file, row_group_size=8, **options)

    with_shard(data, edit)
    refused(data, r"00000\.parquet: row group 0 cannot be read \(row group 0 is compressed")


def test_a_row_group_of_too_many_images_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW_GROUP_BYTES", 8 * 144 - 1)
    refused(data, r"00000\.parquet: row group 0 cannot be read \(row group 0 is of 8 images, too many")


def test_images_of_another_length_are_refused(data: Path) -> None:
    def edit(file: Path) -> None:
        table = pq.read_table(file)
        column = table.column("image").cast(pa.binary())
        pq.write_table(table.set_column(3, "image", column), file, compression="none", use_dictionary=False)

    with_shard(data, edit)
    refused(data, r"00000\.parquet: row group 0 cannot be read \(its images are not of 144 bytes each")


def test_a_link_out_of_the_data_set_is_not_followed(data: Path, tmp_path: Path) -> None:
    file = data / "shards" / "00000.parquet"
    outside = tmp_path / "outside.parquet"
    os.rename(file, outside)
    file.symlink_to(outside)
    refused(data, r"00000\.parquet.* a link to a place outside")
    file.unlink()
    (data / "shards").rename(tmp_path / "moved")
    outside.rename(tmp_path / "moved" / file.name)
    (data / "shards").symlink_to(tmp_path / "moved")
    refused(data, r"00000\.parquet.* a link to a place outside")


def test_links_within_the_data_set_and_to_it_are_followed(data: Path, tmp_path: Path) -> None:
    file = data / "shards" / "00000.parquet"
    os.rename(file, data / "shards" / "elsewhere.parquet")
    file.symlink_to("elsewhere.parquet")
    (tmp_path / "link").symlink_to(data)
    shards.verify(tmp_path / "link")


NASTY = [
    *("/etc/passwd", "//host/share", "..", "../x", "shards/../../x", "./x", "shards//x", "shards/", ".", ""),
    *("C:\\x", "C:/x", "c:x", "\\\\host\\share", "shards\\x", "NUL:", "x\x00.parquet", "x\n", "\nx", "x\r", " x", "x "),
    *("file:///etc/passwd", "s3://bucket/x", "http://host/x", "%2e%2e/x", "..%2fx", "~/x", "~root", "$HOME/x"),
    *(".hidden", "a/.b/c", "x*", "x?y", "x#y", "-rf", "a/-rf", "．．/x", "a\u2215b", "a\u202eb", "\ud800"),
]


@pytest.mark.parametrize("path", NASTY, ids=ascii)
def test_a_manifest_cannot_name_a_file_elsewhere(path: str) -> None:
    with pytest.raises(ValueError, match=r"file\n"):
        ShardEntry(file=path, bytes=1, sha256="0" * 64)


pieces = st.sampled_from(
    ["..", ".", "/", "\\", "\x00", "C:", "~", "s3://", "%2e", "shards", "00000.parquet", " ", "\n"]
)


@given(path=st.text() | st.lists(pieces | st.text(max_size=3), max_size=8).map("".join))
@example(path="shards/00000.parquet")
def test_whatever_a_manifest_may_name_lies_inside(path: str) -> None:
    try:
        ShardEntry(file=path, bytes=1, sha256="0" * 64)
    except ValueError:
        return
    root = Path("/data/set")
    inside = Path(os.path.normpath(root / path))
    assert inside.is_relative_to(root)
    assert inside != root
    assert inside == root / path  # and is spelled in one way only
    assert path.isascii()
    assert path.isprintable()
    assert not set(path) & set("\\:%~*?#$ ")


# --- pickles in our formats' places


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Evil(path)))  # the weapon works
    path.unlink()
    return path


def pickled(trace: Path, how: str) -> bytes:
    if how == "plain":
        return pickle.dumps(Evil(trace))
    stream = io.BytesIO()
    torch.save({"params": Evil(trace), "buffers": {}}, stream, _use_new_zipfile_serialization=how == "torch")
    return stream.getvalue()


@pytest.mark.parametrize("how", ["plain", "torch", "torch, old format"])
def test_a_pickle_in_a_checkpoints_place(how: str, trace: Path, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    params = {"w": torch.zeros(2, requires_grad=True)}
    optimizer = outer.make_optimizer(outer.OuterConfig(), params)
    store.save(TrainState(step=5, meta=MetaState(params, {}), optimizer=optimizer), data_digest="d")
    file = store.path(5) / "state.pt"
    file.write_bytes(pickled(trace, how))
    meta = store.meta(5) | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (store.path(5) / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError) as caught:
        store.load(5)
    assert str(caught.value).startswith(f"{file}: ")
    assert "weights_only" not in str(caught.value)  # torch's message advises how to load it all the same
    assert not trace.exists()


@pytest.mark.parametrize("how", ["plain", "torch"])
def test_a_pickle_in_a_shards_place(how: str, trace: Path, data: Path) -> None:
    file = with_shard(data, lambda file: file.write_bytes(pickled(trace, how)))
    refused(data, rf"{file.name}: row group 0 cannot be read")
    assert not trace.exists()


def test_a_pickle_in_a_manifests_place(trace: Path, data: Path) -> None:
    (data / shards.MANIFEST).write_bytes(pickled(trace, "plain"))
    with pytest.raises(DataError, match=r"dataset\.json: not readable as JSON"):
        shards.read_manifest(data)
    assert not trace.exists()


def test_pickles_in_a_shards_schema_are_not_loaded(trace: Path, data: Path) -> None:
    """What pyarrow once unpickled: an extension type's serialized form in the file's metadata."""

    def edit(file: Path) -> None:
        table = pq.read_table(file)
        extension = {
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickled(trace, "plain"),
        }
        field = table.schema.field("image").with_metadata(extension)
        schema = table.schema.set(table.schema.get_field_index("image"), field)
        pq.write_table(table.cast(schema), file, row_group_size=8, compression="none", use_dictionary=False)

    with_shard(data, edit)
    with shards.ShardReader(data, shards.read_manifest(data)) as reader:
        reader.read_class(0)
    assert not trace.exists()


@pytest.mark.parametrize("name", [learner.MODEL_FILE, learner.STATE_FILE])
@pytest.mark.parametrize("how", ["plain", "torch"])
def test_a_pickle_in_a_models_place(how: str, name: str, trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / learner.MODEL_FILE).write_text("{}")
    (folder / learner.STATE_FILE).write_bytes(b"\x02" + bytes(7) + b"{}")  # safetensors without a tensor
    (folder / name).write_bytes(pickled(trace, how))
    with pytest.raises(DataError, match=rf"{folder}"):
        learner.Learner.from_folder(folder)
    assert not trace.exists()
