"""Names of classes that would mislead: no text, control characters, or two that only look different.

What a program cannot tell apart (one name in two Unicode normal forms) is a name given twice. What a person might not
(case alone) is reported, and both classes are kept: folders `a` and `A` may well be two letters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

from pipeline.datasets.source import Problem

MAX_LENGTH = 200  # characters
BOTH_KEPT = "both are kept"  # ends the reason of a problem that leaves nothing out


def shown(name: str) -> str:
    """A file's name as text that can be written anywhere: bytes that are not UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def label_problem(name: str) -> str | None:
    """What is wrong with the name of a class; None: nothing."""
    if not name.strip():
        return "a class without a name"
    if len(name) > MAX_LENGTH:
        return f"a name of {len(name)} characters; {MAX_LENGTH} are the most"
    if any(unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn") for character in name):
        return "a name with control characters or bytes that are not UTF-8; rename it"
    return None


def check_names(
    names: Iterable[str], *, problem: Callable[[str], str | None] = label_problem
) -> tuple[list[str], list[Problem]]:
    """The names that can be used, in order, and what is wrong with the others or odd about these.

    problem: what is wrong with a name by itself.
    """
    kept: list[str] = []
    problems: list[Problem] = []
    normalized: dict[str, str] = {}
    folded: dict[str, str] = {}
    for name in names:
        reason = problem(name)
        same = normalized.get(unicodedata.normalize("NFC", name))
        if reason is None and same is not None:
            reason = f"the same name as class {same} in another Unicode form or twice; rename or merge them"
        if reason is not None:
            problems.append(Problem(f"class {shown(name)!r}", f"{reason} (left out)"))
            continue
        kept.append(name)
        normalized[unicodedata.normalize("NFC", name)] = name
        key = unicodedata.normalize("NFKC", name).casefold()
        if key in folded:
            problems.append(
                Problem(f"class {name!r}", f"differs from class {folded[key]!r} by case or form alone; {BOTH_KEPT}")
            )
        folded.setdefault(key, name)
    return kept, problems


def check_classes(
    members: Sequence[tuple[str, str]], *, label: str, group: str | None
) -> tuple[dict[str, tuple[str, str]], list[Problem]]:
    """Name -> (group, label) of the classes that can be used, in order, and what is wrong with the others.

    members: each class's (group, label), neither with a `label_problem`. label, group: the columns that say them;
    without a group the label is the name, else GROUP/LABEL, which two pairs may have in common.
    """
    named: dict[str, tuple[str, str]] = {}
    problems: list[Problem] = []
    for member in members:
        name = member[1] if group is None else "/".join(member)
        first = named.setdefault(name, member)
        if first != member:
            (group_a, label_a), (group_b, label_b) = first, member
            reason = (
                f"{group} {group_b!r} with {label} {label_b!r} has the name that {group} {group_a!r} with {label} "
                f"{label_a!r} has; rename one (the rows of the former are left out)"
            )
            problems.append(Problem(f"class {name!r}", reason))
    kept, odd = check_names(named, problem=lambda name: None)
    return {name: named[name] for name in kept}, problems + odd
