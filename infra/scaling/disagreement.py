"""Where the closed form and the simulation are compared: small and large rings, uneven shares, each resource at its
limit and, for the feed, in balance with computing, where taking the maximum of expectations is furthest off."""

from __future__ import annotations

from typing import NamedTuple

from cost_model import Compute, Feed, Network, Setting, cost
from scenarios import SCENARIOS
from step_simulation import simulate

WORK = 20_000_000
LINK_NOISE = 0.3  # of single messages; the closed form has none
_LOOP = Network(bandwidth=1e9, latency=1e-4)
_BASE = Setting(4, 32, 448_020.0, Compute(0.01, 0.005, 0.1), _LOOP)
_CONV4, _STREAMED = SCENARIOS["conv4"], SCENARIOS["streamed"]
_IN_BALANCE = Feed(bytes_per_task=0.01 * 1e9, node_bandwidth=1e9)  # reads a task in the time it takes to compute it

GRID: dict[str, Setting] = {
    "1 worker": _BASE.with_(workers=1),
    "2 workers": _BASE.with_(workers=2),
    "4 workers": _BASE,
    "3 workers, 32 tasks (uneven)": _BASE.with_(workers=3),
    "24 workers, 32 tasks (uneven)": _BASE.with_(workers=24),
    "32 workers, one task each": _BASE.with_(workers=32),
    "no noise": _BASE.with_(compute=Compute(0.01, 0.005)),
    "half noise": _BASE.with_(workers=8, compute=Compute(0.01, 0.005, 0.5)),
    "feed in balance with computing": _BASE.with_(feed=_IN_BALANCE, compute=Compute(0.01, 0.0, 0.1)),
    "64 GPUs, conv4": _CONV4.setting(64, rate=4_000, growing=False),
    "1024 GPUs, conv4": _CONV4.setting(1024, rate=4_000, growing=False),
    "256 GPUs, streamed": _STREAMED.setting(256, rate=100, growing=True),
}


class Compared(NamedTuple):
    closed: float  # seconds per step, without validation and checkpoints
    simulated: float
    half_width: float

    @property
    def relative(self) -> float:
        return self.closed / self.simulated - 1


def compare(setting: Setting, *, seed: int = 0, link_cv: float = 0.0) -> Compared:
    """As many steps as a few seconds allow: every one takes 2 W² messages."""
    steps = min(max(WORK // setting.workers**2, 100), 100_000)
    found = cost(setting)
    simulated = simulate(setting, steps=steps, seed=seed, link_cv=link_cv)
    return Compared(found.step - found.occasional, simulated.mean, simulated.half_width)
