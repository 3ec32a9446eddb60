"""Philox4x32-10 (Salmon et al. 2011) as cuRAND uses it: what a GPU's generator draws, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Salmon et al. 2011, table 2 and section 4.3: the multipliers, and what the key grows by in each round.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

MASK = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)
PER_CALL = 4  # numbers of a thread's stream that one call consumes, however many of them it uses
TWO_POW_MINUS_32 = np.float32(2.0**-32)
TURN = np.float32(2.0**-32 * 2 * np.pi)

Words = NDArray[np.uint64]


def philox(counter: Sequence[Words], key: int) -> list[Words]:
    """The block cipher: four arrays of 32-bit words, and a 64-bit key, to four arrays of random words.

    The words are held in uint64, so that a product fits; they broadcast.
    """
    a, b, c, d = counter
    low, high = key & 0xFFFFFFFF, key >> 32
    first, second = (np.uint64(each) for each in MULTIPLIERS)
    for _ in range(ROUNDS):
        left, right = a * first, c * second
        a, b = (right >> WORD) ^ b ^ np.uint64(low), right & MASK
        c, d = (left >> WORD) ^ d ^ np.uint64(high), left & MASK
        low, high = (low + WEYL[0]) & 0xFFFFFFFF, (high + WEYL[1]) & 0xFFFFFFFF
    return [a, b, c, d]


class PhiloxGenerator:
    """The stream of `torch.randn(..., device="cuda")` after `torch.manual_seed(seed)`, drawn on the CPU.

    seed: -2^63 .. 2^64 - 1. A GPU gives each value a thread of its own as long as it has so many, and that
    is what is drawn here: 40,960 on a T4, about 270,000 on an H100. Larger tensors differ from GPU to GPU.
    Values agree to about 1e-6, for the GPU's sine is an approximation.
    """

    def __init__(self, seed: int) -> None:
        self._key = seed % 2**64
        self._offset = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal values, float32."""
        count = prod(shape)
        threads = np.arange(count, dtype=np.uint64)
        block = self._offset // PER_CALL
        place = (np.uint64(block & 0xFFFFFFFF), np.uint64(block >> 32), threads & MASK, threads >> WORD)
        self._offset += PER_CALL
        first, second, _, _ = philox([np.broadcast_to(word, (count,)) for word in place], self._key)
        return torch.from_numpy(box_muller(first, second)).reshape(tuple(shape))


def box_muller(first: Words, second: Words) -> NDArray[np.float32]:
    """One normal value of two words each: the sine of cuRAND's pair, in its float32 arithmetic."""
    uniform = first.astype(np.float32) * TWO_POW_MINUS_32 + TWO_POW_MINUS_32 / 2
    # The GPU multiplies and adds in one rounding, which float64 gives here.
    angle = second.astype(np.float32).astype(np.float64) * np.float64(TURN) + np.float64(TURN / 2)
    return np.sqrt(np.float32(-2) * np.log(uniform)) * np.sin(angle.astype(np.float32))
