"""SCALING.md says what the scripts of infra/scaling say: fitted values, measurements, simulation and predictions."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "infra" / "scaling"))  # it is run as a folder, `python infra/scaling`

from cost_model import cost
from disagreement import GRID
from saturation import saturation
from scenarios import GPUS, SCENARIOS, Scenario

FOLDER = REPOSITORY / "infra" / "scaling"
DOCUMENT = (REPOSITORY / "infra" / "SCALING.md").read_text(encoding="utf-8")
COLUMNS = [(scenario, growing) for scenario in SCENARIOS.values() for growing in (False, True)]
NUMBER = re.compile(r"([\d.]+)(k?)")


def rows(first_heading: str) -> dict[str, list[str]]:
    """The lines of the table that has this first line, by their first cell."""
    _, _, after = DOCUMENT.partition(first_heading + "\n")
    assert after, f"SCALING.md has no table {first_heading!r}"
    table = after.partition("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {line[0]: line[1:] for line in cells}


def per_rate(cell: str) -> list[str]:
    """Low, middle and high of a cell like `7.1k **25k** 71k`; one value stands for all three."""
    values = cell.replace("*", "").split()
    return values * 3 if len(values) == 1 else values


def heading(title: str) -> str:
    return next(line for line in DOCUMENT.splitlines() if line.startswith(title) and line.count("conv4, M = ") == 1)


def test_fitted_values_and_residuals() -> None:
    """Every number that `fit` prints from measurements.json; its first line is told in words besides."""
    printed = subprocess.run(
        [sys.executable, str(FOLDER), "fit"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    told = {line.strip() for line in DOCUMENT.splitlines()}
    numbers = [line for line in printed[1:] if line]
    assert len(numbers) > 15
    assert [line for line in numbers if line not in told] == []


def test_closed_form_of_the_simulated_settings() -> None:
    """The simulated column takes ten seconds; tests/unit/test_scaling.py holds the two together."""
    table = rows("| setting | closed form ms | simulated ms ± 95 % | off by | with noisy messages: off by |")
    for title, setting in GRID.items():
        found = cost(setting)
        assert float(table[title][0]) == pytest.approx(1e3 * (found.step - found.occasional), abs=1e-3)


def test_columns_stand_for_the_scenarios() -> None:
    for title in ("| GPUs | conv4", "| | conv4"):
        cells = [cell.strip() for cell in heading(title).strip("|").split("|")][1:]
        assert len(cells) == len(COLUMNS)
        for cell, (scenario, growing) in zip(cells, COLUMNS, strict=True):
            batch = f"{scenario.tasks_per_gpu} a GPU" if growing else f"M = {scenario.meta_batch_size}"
            assert cell.endswith(batch)


@pytest.mark.parametrize("gpus", GPUS)
def test_predicted_rates(gpus: int) -> None:
    """Within the rounding of what is written, whose last digit may be off by one."""
    cells = rows(heading("| GPUs | conv4"))[str(gpus)]
    for cell, (scenario, growing) in zip(cells, COLUMNS, strict=True):
        for written, rate in zip(per_rate(cell), scenario.rates, strict=True):
            found = cost(scenario.setting(gpus, rate=rate, growing=growing)).tasks_per_second
            assert found == pytest.approx(_value(written), abs=_last_digit(written)), (cell, rate)


@pytest.mark.parametrize(("scenario", "growing"), COLUMNS)
def test_saturation_points(scenario: Scenario, growing: bool) -> None:
    column = COLUMNS.index((scenario, growing))
    table = {name: per_rate(cells[column]) for name, cells in rows(heading("| | conv4")).items()}
    for position, rate in enumerate(scenario.rates):

        def make(workers: int, rate: float = rate) -> object:
            return scenario.setting(workers, rate=rate, growing=growing)

        found = saturation(make, growing=growing)  # type: ignore[arg-type]
        assert {name: str(point or "–") for name, point in found.items()} == {
            name: table[name][position] for name in found
        }


def test_the_picture_is_small() -> None:
    assert (FOLDER / "prediction.png").stat().st_size < 100_000


def _value(written: str) -> float:
    match = NUMBER.fullmatch(written)
    assert match, written
    return float(match[1]) * (1000 if match[2] else 1)


def _last_digit(written: str) -> float:
    match = NUMBER.fullmatch(written)
    assert match, written
    return 10.0 ** -len(match[1].partition(".")[2]) * (1000 if match[2] else 1)
