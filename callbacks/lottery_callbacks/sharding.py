"""Refusing strategies under which no process holds a whole network."""

import lightning.pytorch as L


def refuse_sharded(trainer: L.Trainer, use: str) -> None:
    """Refuse strategies that shard parameters (FSDP, DeepSpeed, model parallel); to be called in `setup`.

    Raises:
        ValueError: names the strategy, and `use`, what is to be done with ddp instead.
    """
    if trainer.strategy.restore_checkpoint_after_setup:
        raise ValueError(f"{type(trainer.strategy).__name__} shards parameters: {use} with ddp")
