"""Standard normals drawn from counters (Philox): every sample's own, whatever else is drawn, in plain PyTorch.

What is drawn is a contract: the same on every device (to float32 rounding) and for any split of a batch over ranks.
Element e of sample s is number e mod 4 of four normals from Philox4x32-10 with the 64-bit key `seed` and the counter
words (e div 4, s mod 2^32, s div 2^32, draw): words w0, w1 give r cos a, r sin a with
r = sqrt(-2 ln((w0 + 1/2) / 2^32)) and a = 2 pi w1 / 2^32, words w2, w3 the other two; w + 1/2 and w are rounded to
float32.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); Box & Muller (1958).
"""

import math
from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF


def philox_normal_of(
    samples: torch.Tensor, seed: int | torch.Tensor, shape: Sequence[int], draw: int | torch.Tensor = 0
) -> torch.Tensor:
    """Standard normals of the given samples, as the module's docstring defines them: [B, *shape], float32.

    samples: [B] int64, any numbers from 0. seed, draw: integers, or int64 tensors of one element. Each draw gives
    further, independent normals of the same samples.
    """
    size = math.prod(shape)
    sample = samples[:, None]
    block = torch.arange((size + 3) // 4, device=samples.device)[None]
    words = _philox4x32((block, sample & _WORD, (sample >> 32) & _WORD, draw), (seed & _WORD, (seed >> 32) & _WORD))
    normals = [normal for pair in (words[:2], words[2:]) for normal in _box_muller(*pair)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :size].reshape(-1, *shape)


def _philox4x32(counter, key):
    """Ten rounds; words are int64 in 0 ... 2^32 - 1, whose products wrap and are masked."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD, (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _box_muller(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluated in float64, so that devices differ in the last bit at most rarely."""
    radius = (-2 * ((first.float() + 0.5) * 2.0**-32).double().log()).sqrt()
    angle = 2 * math.pi * (second.float() * 2.0**-32).double()
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()
