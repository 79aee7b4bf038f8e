"""Random weights by address: any weight of a random network alone, on any device, without drawing those before it.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) encrypts a counter of four 32-bit
words under a key of two, in ten rounds; here in torch's int64, whose products wrap as the algorithm's do. The words are
the same on every device, and nothing reads or changes a random state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
PIECE = 1 << 15  # numbers worked on at once, so that they stay in the cache


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter: int64 tensors that broadcast, of 0 to 2^32 - 1 as the key's two.

    >>> [f"{int(word):08x}" for word in philox([torch.tensor(0)] * 4, (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter
    for turn in range(10):
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        keys = [(word + turn * weyl) & WORD for word, weyl in zip(key, WEYL, strict=True)]
        a, b = (right >> 32 & WORD) ^ b ^ keys[0], right & WORD
        c, d = (left >> 32 & WORD) ^ d ^ keys[1], left & WORD
    return a, b, c, d


def uniform(seed: int, layer: int, sublayer: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The random weights at these rows and columns of a sublayer of a layer, uniform on (-1, 1), as float32.

    Each is an odd multiple of 2^-24, made of the high 24 bits of the first word of Philox at the counter (row, column,
    layer, sublayer) under the seed as key: never 0, exact in float32, and symmetric about 0.

    Args:
        seed: 0 <= seed < 2^64.
        layer: 0 <= layer < 2^32, as `sublayer`, rows and columns.
        sublayer: which of the layer's random matrices.
        rows: integers, which broadcast with `columns`; the answer has the common shape.
        columns: integers.

    >>> uniform(0, 0, 0, torch.arange(2), torch.tensor(7)).mul(2**24).tolist()
    [-2701937.0, 11147581.0]

    Raises:
        ValueError: the seed, the layer or the sublayer is out of range.
    """
    if not 0 <= seed < 2**64 or not (0 <= layer <= WORD and 0 <= sublayer <= WORD):
        raise ValueError(
            f"seed={seed}, layer={layer}, sublayer={sublayer}: choose 0 or more, below 2^64, 2^32 and 2^32"
        )
    key = (seed & WORD, seed >> 32)
    rows, columns = torch.broadcast_tensors(rows.long(), columns.long())
    values = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    flat, place = values.view(-1), [torch.tensor(word, device=rows.device) for word in (layer, sublayer)]
    for piece, row, column in zip(
        flat.split(PIECE), rows.reshape(-1).split(PIECE), columns.reshape(-1).split(PIECE), strict=True
    ):
        odd = (philox([row, column, *place], key)[0] >> 8) * 2 + (1 - (1 << 24))
        piece.copy_(odd).mul_(2.0**-24)
    return values
