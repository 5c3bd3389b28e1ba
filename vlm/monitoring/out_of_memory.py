"""What would make a run smaller that did not fit."""

from typing import Any

from vlm.building.blocks import recomputed_parts
from vlm.language import PeftAdapter


def suggest_smaller(trainer: Any, module: Any) -> str:
    """The settings of a run that take less memory than what it has now, the cheapest in time first."""
    data = getattr(trainer, "datamodule", None)
    found = [*_packs(data), *_weights(trainer, module), *_shards(trainer)]
    found.append(
        "more devices with trainer.strategy: fsdp2 and callbacks.MixedPrecisionFSDP"
        if trainer.world_size == 1
        else "more devices"
        if module.is_sharded
        else "trainer.strategy: fsdp2 with callbacks.MixedPrecisionFSDP, which shares weights and moments"
    )
    return f"it would take less with {'; '.join(found)}. `vlm plan` with the same options says how much each saves"


def _packs(data: Any) -> list[str]:
    if getattr(data, "max_tokens", None) is not None:
        return [f"a data.max_tokens below {data.max_tokens} (the step stays the same)"]
    if (size := getattr(data, "micro_batch_size", None)) is not None:
        return [f"a data.micro_batch_size below {size} (the step stays the same)"] if size > 1 else []
    return ["data.max_tokens or data.micro_batch_size, which share the same step in more parts"] if data else []


def _shards(trainer: Any) -> list[str]:
    """What `callbacks.FSDP2Strategy` and `MixedPrecisionFSDP` can do without more devices."""
    found = []
    if getattr(trainer.strategy, "reduce_gradients", None) == "step" and trainer.accumulate_grad_batches > 1:
        found.append("reduce_gradients: micro_batch of callbacks.FSDP2Strategy")
    if any(getattr(callback, "cpu_offload", None) is False for callback in trainer.callbacks):
        found.append("cpu_offload: true of callbacks.MixedPrecisionFSDP")
    return found


def _weights(trainer: Any, module: Any) -> list[str]:
    parts = {part: network for part, network in module.named_children() if any(True for _ in network.parameters())}
    found = []
    if str(trainer.precision) == "32-true" and not module.is_sharded:
        found.append("trainer.precision: bf16-mixed")
    if module.stage is None:
        return found
    recomputed, trained = recomputed_parts(module), {name.split(".")[0] for name in module.trained_names()}
    reached = [part for part in parts if part == "language" or (part in trained and part in ("vision", "vision_high"))]
    if kept := [part for part in reached if recomputed.get(part) != 1]:
        found.append(f"stage.recompute: {{{', '.join(f'{part}: true' for part in kept)}}}")
    if module.stage.optimizer.kind == "adamw" and not module.is_sharded:
        found.append("stage.optimizer.kind: adamw_8bit")
    language = parts.get("language")
    adapted = any(isinstance(operation, PeftAdapter) for operation in module.surgery)
    if language is not None and not adapted and any(p.requires_grad for p in language.parameters()):
        found.append("callbacks.LoRAInjection, and the adapter trained instead of the language model")
    return found
