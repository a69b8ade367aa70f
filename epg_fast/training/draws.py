"""Random draws as a pure function of (seed, iteration, place in the global batch).

Nothing is kept between iterations, so a resumed run draws what the uninterrupted one would have, and the draws of a
sample do not depend on how many ranks share the batch.
"""

from __future__ import annotations

import numpy as np
import torch

_STREAMS = ("noise", "level", "label", "index", "dropout")
# Samples that share one generator seeding. A rank draws whole chunks and keeps its part.
_CHUNK = 16


class Draws:
    """Draws for samples start..start+count-1 of one iteration's global batch."""

    def __init__(self, seed: int, iteration: int, start: int, count: int, device: torch.device):
        self.seed, self.iteration, self.start, self.count, self.device = seed, iteration, start, count, device

    def part(self, start: int, count: int) -> Draws:
        """Draws of `count` of these samples, from the `start`-th on."""
        return Draws(self.seed, self.iteration, self.start + start, count, self.device)

    def normal(self, stream: str, *shape: int) -> torch.Tensor:
        """Standard normal [count, *shape], float32."""
        return self._chunked(
            stream, lambda generator: torch.randn(_CHUNK, *shape, generator=generator, device=self.device)
        )

    def uniform(self, stream: str) -> torch.Tensor:
        """Uniform in [0,1): [count], float32."""
        return self._chunked(stream, lambda generator: torch.rand(_CHUNK, generator=generator, device=self.device))

    def integer(self, stream: str, high: int) -> int:
        """One integer in 0..high-1 for the whole batch, the same on every rank."""
        return int(np.random.default_rng(self._key(stream, 0)).integers(high))

    def per_rank_seed(self, stream: str) -> int:
        """A seed that differs between ranks."""
        return _fold(self._key(stream, self.start))

    def _chunked(self, stream, draw):
        first, last = self.start // _CHUNK, (self.start + self.count - 1) // _CHUNK
        generator = torch.Generator(self.device)
        chunks = [draw(generator.manual_seed(_fold(self._key(stream, c)))) for c in range(first, last + 1)]
        offset = self.start - first * _CHUNK
        return torch.cat(chunks)[offset : offset + self.count]

    def _key(self, stream, place):
        return [self.seed, self.iteration, _STREAMS.index(stream), place]


def _fold(key: list[int]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
