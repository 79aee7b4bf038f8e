"""Networks drawn from a seed and a purpose alone, so that a resumed fit draws what an unbroken one does."""

from torch import nn

from lottery_callbacks.apply_ticket import reinitialise
from lottery_lightning.data.draws import derived_seed


def draw_network(network: nn.Module, *parts: object) -> None:
    """Redraw all of a frozen network by its `reset_parameters`, from `parts` alone; it stays frozen.

    Raises:
        ValueError: a parameter belongs to no module with `reset_parameters`.
    """
    network.requires_grad_(True)  # frozen parameters are left as they are
    reinitialise(network, derived_seed(*parts))
    network.requires_grad_(False)
