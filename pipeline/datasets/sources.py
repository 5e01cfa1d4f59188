"""The sources of raw data that `metapipe data prepare` knows, each with options of its own.

A new source is a class of options with `open`, beside the source's code, and one line in SOURCES. The command's
options, its help and its errors come from the fields.
"""

from __future__ import annotations

import importlib
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from pipeline.config import Section, validate
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.datasets.source import Source


ADDRESS = re.compile(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)  # also behind the current folder


class SourceOptions(Section):
    """What one source needs to know. Each field is an option of the command, its description the option's help.

    A field `directory` is the command's argument DIR: the folder or file of the raw data.
    """

    @abstractmethod
    def open(self, *, seed: int) -> Source:
        """The source. seed: of what it draws. Raises DataError or ConfigError before anything is read at length."""

    def record(self) -> dict[str, Any]:
        """What of the options decides the data set's content, for its manifest. Not where the raw data lay.

        A switch that is off is not mentioned, so that a new one leaves older data sets as they were.
        """
        told = self.model_dump(mode="json", exclude={"directory", "download"})
        return {name: value for name, value in told.items() if value is not None and value is not False}


class FolderOptions(SourceOptions):
    """Of a source that reads files."""

    directory: Path | None = Field(None, description="Folder of the official files.")

    def folder(self) -> Path:
        """Raises ConfigError where none was given."""
        if self.directory is None:
            described = type(self).model_fields["directory"].description
            raise ConfigError(f"DIR is missing: {(described or '').rstrip('.')}.")
        return _checked(self.directory)


class DownloadOptions(FolderOptions):
    """Of a source whose files can be fetched as well."""

    download: bool = Field(False, description="Fetch the official files into DIR first (default: raw/ beside --out).")

    def folder(self) -> Path:
        if self.directory is None:
            raise ConfigError("DIR is missing: give the folder of the official files, or fetch them with --download.")
        return _checked(self.directory)


def _checked(directory: Path) -> Path:
    """Raises ConfigError: an address, of which a path makes http:/HOST/…"""
    found = ADDRESS.search(str(directory))
    if found and not directory.exists():
        scheme, rest = found.groups()
        raise ConfigError(
            f"DIR {scheme}://{rest}: raw data must lie in a folder of this machine, or one that it sees. Download it "
            "and give that folder."
        )
    return directory


class Entry(NamedTuple):
    """A line of the registry."""

    help: str
    options: str  # module:class of its options, imported when the source is asked for


SOURCES = {
    "glyphs": Entry(
        "Characters of many scripts, drawn here from fonts; nothing to download.",
        "pipeline.datasets.glyphs:GlyphsOptions",
    ),
    "omniglot": Entry(
        "Omniglot's official archives: 1623 handwritten characters.", "pipeline.datasets.omniglot:OmniglotOptions"
    ),
    "digits": Entry(
        "scikit-learn's handwritten digits, to evaluate on; nothing to download.",
        "pipeline.datasets.digits:DigitsOptions",
    ),
    "clinc150": Entry(
        "CLINC150: sentences of 150 intents in 10 domains.", "pipeline.datasets.clinc150:Clinc150Options"
    ),
    "csv": Entry(
        "Rows of CSV files: numbers, categories or texts, with a column of labels.",
        "pipeline.datasets.tables.source:CsvOptions",
    ),
    "parquet": Entry(
        "Rows of Parquet files: numbers, categories, vectors, texts or pictures, with a column of labels.",
        "pipeline.datasets.tables.source:ParquetOptions",
    ),
    "images": Entry(
        "Your own pictures: DIR/CLASS/* or DIR/GROUP/CLASS/*.", "pipeline.datasets.image_folder:ImageFolderOptions"
    ),
    "mnist": Entry("MNIST's official files: digits.", "pipeline.datasets.mnist:MnistOptions"),
    "fashion-mnist": Entry("Fashion-MNIST's official files: clothing.", "pipeline.datasets.mnist:FashionMnistOptions"),
    "kmnist": Entry("KMNIST's official files: cursive Japanese.", "pipeline.datasets.mnist:KmnistOptions"),
    "cifar-fs": Entry("CIFAR-100 in the split of Bertinetto et al. 2019.", "pipeline.datasets.cifar:CifarFSOptions"),
    "fc100": Entry(
        "CIFAR-100 by superclass: the split of Oreshkin et al. 2018.", "pipeline.datasets.cifar:FC100Options"
    ),
    "mini-imagenet": Entry(
        "Ravi and Larochelle's lists with images, or the caches.", "pipeline.datasets.mini_imagenet:MiniImageNetOptions"
    ),
    "fake": Entry("Pictures of noise, for a first try.", "pipeline.datasets.fake:FakeOptions"),
}


# Families whose tasks are drawn and not read, as somebody might look for them here -> what to write instead.
PROCEDURAL = {
    "sinusoid": "task: {family: sinusoid}, or with a frequency task: {family: regression, function: sinusoid}",
    "linear": "task: {family: regression, function: linear}",
    "harmonic": "task: {family: regression, function: harmonic}",
    "step": "task: {family: regression, function: step}",
}


def procedural(name: str) -> ConfigError:
    """What to tell who prepares one of PROCEDURAL."""
    return ConfigError(
        f"data prepare {name}: these functions are drawn as they are needed, so there is nothing to prepare. Write in "
        f"the experiment's configuration {PROCEDURAL[name]}; the same configuration and seed give everybody the same "
        "tasks."
    )


def options_of(name: str) -> type[SourceOptions]:
    """The class of a source's options. Raises ConfigError: no such source."""
    if name not in SOURCES:
        raise ConfigError(f"{name}: no such source of data; choose one of {', '.join(SOURCES)}.")
    module, _, cls = SOURCES[name].options.partition(":")
    options: type[SourceOptions] = getattr(importlib.import_module(module), cls)
    return options


def read_options(name: str, given: Mapping[str, Any]) -> SourceOptions:
    """A source's options from what was given. Raises ConfigError: no such source, an unknown option, a wrong value."""
    return validate(options_of(name), given, source=f"data prepare {name}")
