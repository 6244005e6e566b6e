"""Randomness as a pure function of where it is used.

Every draw of a training run belongs to a place, such as (run seed, "noise", 51 234th sample), and comes from a
generator that is seeded by that place alone. So a resumed run draws what the uninterrupted one would have drawn, and
an image does not depend on its batch.
"""

import zlib

import numpy as np
import torch


def generator(seed: int, purpose: str, *place: int) -> torch.Generator:
    """Returns a fresh CPU generator for one place. Seed 0 is a seed like any other."""
    words = np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), *place)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))
