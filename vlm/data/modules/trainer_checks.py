"""Settings of a Lightning trainer that the data cannot work with."""

import lightning as L

from vlm.data.sampling.batches import BatchSpec
from vlm.errors import UserError


def check_trainer(trainer: L.Trainer) -> None:
    """Raises `UserError` when the trainer would deal the samples itself."""
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise UserError("the data deals its own samples to the ranks; set trainer.use_distributed_sampler: false")
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError("trainer.overfit_batches would replace the sampler; use trainer.limit_train_batches")


def check_packs_of_epoch(trainer: L.Trainer, packs: int, batch: BatchSpec, *, validates: bool) -> None:
    """Raises `UserError` when an epoch would end within a step, or before the first validation.

    Args:
        packs: of the whole epoch, on this rank.
    """
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    used = min(packs, limit) if isinstance(limit, int) else int(packs * limit)
    if used % accumulate or (isinstance(limit, float) and limit < 1 and batch.unit != "samples"):
        raise UserError(
            f"trainer.limit_train_batches={limit} (or fast_dev_run) ends in the middle of an optimizer step; "
            f"give a whole number that is a multiple of trainer.accumulate_grad_batches={accumulate}"
        )
    every = trainer.val_check_interval
    if isinstance(every, int) and every > used and trainer.check_val_every_n_epoch is not None and validates:
        raise UserError(
            f"trainer.val_check_interval={every} is more than the {used} packs of an epoch; lower it, or set "
            "trainer.check_val_every_n_epoch: null to count on over the epochs"
        )
