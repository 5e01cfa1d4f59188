"""Counter-based random numbers: a pure function of integer keys, the same on CPU and GPU, no state anywhere.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") on int64 tensors, whose
products wrap modulo 2^64 on every device. Uniforms are float64 with 53 bits, and float64 products round the same
way everywhere, so an episode drawn on a GPU is the episode drawn on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _WORD
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)

# no small numbers: those are the samplers' streams
_PASSES = 0x706173736573
_ORDERS = 0x6F7264657273


def _shift_right(x: Tensor, bits: int) -> Tensor:
    shifted = x >> bits  # keeps the sign; SplitMix wants zeros shifted in
    return shifted.bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


def _mix_word(x: int) -> int:
    """The same of a plain integer; on a scalar tensor every operation would cost its dispatch."""
    x &= _WORD
    x = (x ^ (x >> 30)) * _MIX_1 & _WORD
    x = (x ^ (x >> 27)) * _MIX_2 & _WORD
    return _signed(x ^ (x >> 31))


def fold(key: Tensor, word: Tensor | int) -> Tensor:
    """A new key from a key and one more word (broadcast against each other); int64 in, int64 out."""
    mixed = _mix_word(word + _MIX_1) if isinstance(word, int) else _mix(word + _MIX_1)
    return _mix(_mix(key + _GOLDEN) ^ mixed)


def make(*words: int, device: torch.device | str = "cpu") -> Tensor:
    """The scalar key of some integers, e.g. `make(seed, split_number, step)`."""
    key = 0
    for word in words:  # as `fold`
        key = _mix_word(_mix_word(key + _GOLDEN) ^ _mix_word(word + _MIX_1))
    return torch.full((), key, dtype=torch.int64, device=device)  # a fill: a copy to a GPU would wait for it


def of_episodes(seed: int, split: int, step: int | Tensor, slots: Tensor) -> Tensor:
    """The keys of episodes: int64, of the shape of step and slots broadcast against each other."""
    if isinstance(step, int):
        return fold(make(seed, split, step, device=slots.device), slots)
    return fold(fold(make(seed, split, device=slots.device), step), slots)


def bits(key: Tensor, n: int) -> Tensor:
    """`n` independent 64-bit words per key: [...] -> int64 [..., n]."""
    counter = torch.arange(1, n + 1, dtype=torch.int64, device=key.device)
    return _mix(key.unsqueeze(-1) + counter * _GOLDEN)


def uniform(key: Tensor, n: int) -> Tensor:
    """`n` uniforms in [0, 1) per key: [...] -> float64 [..., n]."""
    return _shift_right(bits(key, n), 11).to(torch.float64) * 2.0**-53


def pass_keys(key: Tensor | None, n: int) -> list[Tensor | None]:
    """A key for each of `n` passes through a network, [...] each, apart from all that the sampler draws with `key`."""
    if key is None:
        return [None] * n
    return list(bits(fold(key, _PASSES), n).unbind(-1))


def order(key: Tensor, n: int, number: int) -> Tensor:
    """The `number`-th random order of `n` things for each key: [...] -> int64 [..., n], a permutation of 0 … n − 1."""
    return bits(fold(fold(key, _ORDERS), number), n).argsort(dim=-1, stable=True)


def below(u: Tensor, bound: Tensor | int) -> Tensor:
    """Uniforms [...] in [0, 1) -> integers in [0, bound), for bounds up to 2^53 (bias below bound·2^-53)."""
    return (u * bound).to(torch.int64)  # towards zero: the floor, as both are positive
