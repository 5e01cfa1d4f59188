"""scikit-learn's digits as a data set."""

from __future__ import annotations

import numpy as np

from pipeline.datasets import sources


def test_every_drawing_is_the_librarys() -> None:
    from sklearn.datasets import load_digits

    source, shipped = sources.read_options("digits", {"size": 8}).open(seed=0), load_digits()
    classes = list(source.classes())
    assert [raw.name for raw in classes][:2] == ["zero", "one"]
    assert source.splits(seed=0) == {"all_test": {raw.name: "meta_test" for raw in classes}}
    rows = [list(raw.items) for raw in classes]
    assert sorted(row for items in rows for row in items) == list(range(1797))
    for digit, items in enumerate(rows):
        assert set(shipped.target[items]) == {digit}
        ours, problems = source.read(items)
        assert isinstance(ours, np.ndarray)
        assert not problems
        assert ours.shape == (len(items), 8, 8, 1)
        assert (ours.max(axis=(1, 2, 3)) == 255).all(), "contrast is stretched"
        theirs = shipped.images[items]
        ink = theirs.min(axis=(1, 2)) == 0
        stretched = theirs * 255 / theirs.max(axis=(1, 2), keepdims=True)
        assert float(np.abs(ours[..., 0] - stretched)[ink].max()) < 2
    large, _ = sources.read_options("digits", {}).open(seed=0).read(rows[3][:2])
    assert np.shape(large) == (2, 28, 28, 1)
