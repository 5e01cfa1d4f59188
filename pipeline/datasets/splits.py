"""Which classes are for meta-training, validation and test: fixed by seed when the data set is prepared.

The split belongs to the data set on disk and never to a training or test script, so no run can train on another
run's test classes. Orders come from hashes of names: adding a class moves no other one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from pipeline.types import SPLITS, Split

TRAIN_VAL_TEST = (1100, 100, 423)  # of Omniglot's 1623 classes: the random split of the papers


def class_splits(groups: Mapping[str, str], *, seed: int) -> dict[str, dict[str, Split]]:
    """What a source of classes in groups has by itself: class name -> group in, name of a split -> class -> part out.

    `random` deals the classes, 70 % for meta-training and 10 % for validation; `group`, where there are three groups or
    more, keeps groups whole.
    """
    splits = {"random": random_split(list(groups), seed=seed, shares=(70, 10, 20))}
    if len(set(groups.values())) >= 3:
        splits["group"] = group_split(groups, seed=seed)
    return splits


def shuffled(names: Collection[str], seed: int) -> list[str]:
    """The names in an order that depends on `seed` and on nothing else."""
    return sorted(names, key=lambda name: (hashlib.sha256(f"{seed}/{name}".encode()).digest(), name))


def random_split(
    names: Collection[str], *, seed: int, shares: tuple[int, int, int] = TRAIN_VAL_TEST
) -> dict[str, Split]:
    """Each name's part, in the proportions of `shares` (exactly those counts if they add up to all the names)."""
    order = shuffled(names, seed)
    total = sum(shares)
    train_end = round(len(order) * shares[0] / total)
    val_end = round(len(order) * (shares[0] + shares[1]) / total)
    parts = (order[:train_end], order[train_end:val_end], order[val_end:])
    return {name: split for split, part in zip(SPLITS, parts, strict=True) for name in part}


def group_split(
    groups: Mapping[str, str], *, seed: int, shares: tuple[int, int, int] = (70, 10, 20)
) -> dict[str, Split]:
    """Whole groups to each part: class name -> group in, class name -> part out.

    Groups are taken in shuffled order, first for test and then for validation, until each has its share of classes;
    three groups or more leave no part empty.
    """
    members: dict[str, int] = {}
    for group in groups.values():
        members[group] = members.get(group, 0) + 1
    order = shuffled(members, seed)
    chosen: dict[str, Split] = {}
    for split, share, left in (("meta_test", shares[2], 2), ("meta_val", shares[1], 1)):
        wanted, have = len(groups) * share / sum(shares), 0
        while len(order) > left and have < wanted:  # a group is left for each part that has none yet
            group = order.pop(0)
            chosen[group] = split  # type: ignore[assignment]
            have += members[group]
    return {name: chosen.get(group, "meta_train") for name, group in groups.items()}


def all_in(names: Collection[str], part: Split = "meta_test") -> dict[str, Split]:
    """Every class in one part: to evaluate on what nothing was trained on."""
    return dict.fromkeys(names, part)
