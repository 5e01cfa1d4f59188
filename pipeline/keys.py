"""Counter-based random numbers: a pure function of integer keys, the same on CPU and GPU, no state anywhere.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") on int64 tensors, whose
products wrap modulo 2^64 on every device. Uniforms are float64 with 53 bits, and float64 products round the same
way everywhere, so an episode drawn on a GPU is the episode drawn on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> keeps the sign; SplitMix wants zeros shifted in


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def fold(key: Tensor, word: Tensor | int) -> Tensor:
    """A new key from a key and one more word (broadcast against each other); int64 in, int64 out."""
    if isinstance(word, int):
        # filled in there: a copy from the host would wait for all that a GPU has queued
        word = torch.full((), _signed(word), dtype=torch.int64, device=key.device)
    return _mix(_mix(key + _GOLDEN) ^ _mix(word + _MIX_1))


def make(*words: int, device: torch.device | str = "cpu") -> Tensor:
    """The scalar key of some integers, e.g. `make(seed, split_number, step)`."""
    key = torch.zeros((), dtype=torch.int64, device=device)
    for word in words:
        key = fold(key, word)
    return key


def bits(key: Tensor, n: int) -> Tensor:
    """`n` independent 64-bit words per key: [...] -> int64 [..., n]."""
    counter = torch.arange(1, n + 1, dtype=torch.int64, device=key.device)
    return _mix(key.unsqueeze(-1) + counter * _GOLDEN)


def uniform(key: Tensor, n: int) -> Tensor:
    """`n` uniforms in [0, 1) per key: [...] -> float64 [..., n]."""
    return _shift_right(bits(key, n), 11).to(torch.float64) * 2.0**-53


def below(u: Tensor, bound: Tensor | int) -> Tensor:
    """Uniforms [...] in [0, 1) -> integers in [0, bound), for bounds up to 2^53 (bias below bound·2^-53)."""
    return torch.floor(u * bound).to(torch.int64)
