"""The names of `functional.names`, at the place from which the callbacks import them."""

from lottery_callbacks.functional.names import (
    canonical,
    computed_from,
    find_parameters,
    further_names,
    named_buffers,
    named_parameters,
    owners,
    plain_modules,
    unwrapped,
)

__all__ = [
    "canonical",
    "computed_from",
    "find_parameters",
    "further_names",
    "named_buffers",
    "named_parameters",
    "owners",
    "plain_modules",
    "unwrapped",
]
