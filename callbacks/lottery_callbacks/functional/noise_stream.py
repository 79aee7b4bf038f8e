"""Noise step after step, drawn for many steps at once, that goes on from a saved state to the same bits."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from lottery_callbacks.functional.alpha_stable import Draw

BLOCK = 1 << 16  # numbers drawn at once: those of one step, if they are more


class NoiseStream:
    """Numbers of one shape for each step, by a generator of their own, in memory that is used again and again.

    Args:
        draw: of a shape, a generator and perhaps a tensor to fill, what draws.
        shape: of the numbers of a step.
        device: of the generator.
        seed: any text; another one gives other noise.
    """

    def __init__(self, draw: Draw, shape: tuple[int, ...], device: torch.device | str, seed: str) -> None:
        self._draw, self.seed = draw, seed
        self.steps = max(1, BLOCK // max(1, torch.Size(shape).numel()))
        self._shape = (self.steps, *shape)
        self.generator = torch.Generator(device).manual_seed(_number(seed))
        self._block: Tensor | None = None
        self._begin, self._used = self.generator.get_state(), 0  # the state before the block, and how many steps of it

    def next(self) -> Tensor:
        """The numbers of the next step; theirs to change who asked, and gone when many more were asked for."""
        if self._block is None or self._used == self.steps:
            self._begin, self._used = self.generator.get_state(), 0
            self._block = self._draw(self._shape, self.generator, self._block)
        self._used += 1
        return self._block[self._used - 1]

    def state_dict(self) -> dict[str, Any]:
        """What `load` goes on from: of the generator before the present block, and the steps of it that are gone."""
        return {"device": self.generator.device.type, "begin": self._begin, "used": self._used}

    def load(self, state: dict[str, Any], otherwise: str) -> bool:
        """Go on from `state`, at the cost of drawing a block; whether that is possible.

        The state of another kind of device is not: then new noise begins, seeded with `otherwise` as well.
        """
        if state["device"] != self.generator.device.type:
            self.generator.manual_seed(_number(f"{self.seed} {otherwise}"))
            return False
        self._begin, self._used = state["begin"].cpu(), state["used"]
        self.generator.set_state(self._begin)
        if self._used:
            self._block = self._draw(self._shape, self.generator, self._block)
        return True


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
