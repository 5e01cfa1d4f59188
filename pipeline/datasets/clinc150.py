"""CLINC150: 150 intents of users of a voice assistant, 15 in each of 10 domains, 150 sentences each.

Larson et al. 2019, "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction". A class is an intent
with all its sentences (the file's train, val and test ones); out-of-scope sentences belong to none and are left out.
Two class splits: `domain` keeps domains whole and is the same whatever the seed (5 domains for meta-training, 2 for
validation, 3 for test), so that results can be compared; `random` is by seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.datasets.source import Examples, Modality, Problem, RawClass, Source
from pipeline.datasets.sources import FolderOptions
from pipeline.datasets.splits import group_split, random_split
from pipeline.errors import DataError
from pipeline.types import Split

SENTENCES, DOMAINS = "data_full.json", "domains.json"
PARTS = ("train", "val", "test")
DOMAIN_SEED, DOMAIN_SHARES = 0, (5, 2, 3)


class Clinc150Options(FolderOptions):
    """Of CLINC150."""

    directory: Path | None = Field(None, description=f"Folder that holds {SENTENCES} and {DOMAINS}.")

    def open(self, *, seed: int) -> Clinc150:
        return Clinc150(self.folder())


class Clinc150(Source):
    """Intents and their sentences. Raises DataError: the files are not there, or not as they are published."""

    modality: Modality = "text"

    def __init__(self, folder: Path) -> None:
        domain_of = {intent: domain for domain, intents in _read(folder / DOMAINS, list).items() for intent in intents}
        self._sentences: dict[str, list[str]] = {}
        self._groups: dict[str, str] = {}
        content = _read(folder / SENTENCES, list)
        for entry in (entry for part in PARTS for entry in content.get(part, ())):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
                raise DataError(f"{folder / SENTENCES}: {entry!r:.80} is no pair of a sentence and its intent.")
            sentence, intent = entry
            if intent not in domain_of:
                raise DataError(f"{folder / DOMAINS}: intent {intent!r} of {SENTENCES} is in no domain.")
            name = f"{domain_of[intent]}/{intent}"
            self._groups[name] = domain_of[intent]
            self._sentences.setdefault(name, []).append(sentence)
        if not self._sentences:
            raise DataError(f"{folder / SENTENCES}: holds no sentences under {', '.join(PARTS)}.")

    def classes(self) -> Iterator[RawClass]:
        for name in sorted(self._sentences):
            yield RawClass(name, self._groups[name], self._sentences[name])

    def read(self, items: Sequence[Any]) -> tuple[Examples, list[Problem]]:
        good = [isinstance(item, str) and bool(item.strip()) for item in items]
        texts = [item for item, is_one in zip(items, good, strict=True) if is_one]
        bad = [item for item, is_one in zip(items, good, strict=True) if not is_one]
        return texts, [Problem(repr(item)[:80], "is no sentence") for item in bad]

    def splits(self, *, seed: int) -> dict[str, dict[str, Split]]:
        return {
            "domain": group_split(self._groups, seed=DOMAIN_SEED, shares=DOMAIN_SHARES),
            "random": random_split(list(self._groups), seed=seed, shares=DOMAIN_SHARES),
        }


def _read(file: Path, entries: type) -> dict[str, Any]:
    """A JSON object of lists. Raises DataError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file. Give the folder that holds {SENTENCES} and {DOMAINS}.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict) or not all(isinstance(value, entries) for value in content.values()):
        raise DataError(f"{file}: not as CLINC150 is published.")
    return content
