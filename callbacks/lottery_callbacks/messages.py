"""Messages of one line: `describe` and `one_of` of `functional.messages`; `inform` and `warn` print one."""

import logging
import sys
import warnings

from lottery_callbacks.functional.messages import describe, one_of

__all__ = ["describe", "inform", "one_of", "warn"]


def inform(message: str) -> None:
    """Print one line: through Lightning, once for all processes, where the program uses it; else through `logging`.

    A plain program shows warnings alone unless it configures `logging`, so the line is one there.
    """
    lightning = sys.modules.get("lightning.pytorch.utilities.rank_zero")
    if lightning is not None:
        lightning.rank_zero_info(message)
    else:
        logging.getLogger("lottery_callbacks").warning(message)


def warn(message: str) -> None:
    """Warn in one line: through Lightning, once for all processes, where the program uses it."""
    lightning = sys.modules.get("lightning.pytorch.utilities.rank_zero")
    if lightning is not None:
        lightning.rank_zero_warn(message)
    else:
        warnings.warn(message, stacklevel=3)
