"""Step strings: "500it" counts optimizer steps, "10ep" counts epochs."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    """A point of training. `Step.parse("10ep").in_iterations(per_epoch=917)` is 9170."""

    count: int
    unit: Literal["it", "ep"]

    @classmethod
    def parse(cls, text: str) -> "Step":
        """Read "500it" or "10ep".

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"(\d+)(it|ep)", str(text).strip())
        if not match:
            raise ValueError(f"{text!r} is no step string: write iterations as '500it' or epochs as '10ep'")
        return cls(int(match[1]), "it" if match[2] == "it" else "ep")

    def in_iterations(self, per_epoch: int) -> int:
        """Optimizer steps, where an epoch has `per_epoch` of them."""
        return self.count * (per_epoch if self.unit == "ep" else 1)

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"
