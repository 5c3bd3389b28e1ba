"""What a stage says about itself: `stage.json` of its artefact, and the same in its checkpoints."""

import os
from pathlib import Path
from typing import Any

from vlm.building.followed import reference_to
from vlm.building.instantiate import describe, describe_module
from vlm.building.weight_sources import frozen_parts
from vlm.checkpoints.references import local_paths


def stage_record(module: Any, base: str | Path, *, global_step: int) -> dict[str, Any]:
    """Everything but the tensors that is needed to rebuild a module (see `META_KEYS`).

    Args:
        base: folder that paths in it are relative to.
        global_step: optimizer steps so far, those of the stages it continues among them.
    """
    model = describe_module(module)
    return {
        "system": module.system,
        "stage": module.stage.name,
        "global_step": global_step,
        "model": model,
        "surgery": describe(module.surgery),
        "trained": sorted(module.trained_names()),
        "averaged": bool(module.averages),
        "precision": None if module._trainer is None else str(module._trainer.precision),
        "frozen": frozen_parts(module),
        "ties": dict(module.ties),
        "follows": [_rebased(reference, base) for reference in references(module)],
        "paths": local_paths(model, base),
    }


def references(module: Any) -> list[dict[str, Any]]:
    """How what a stage follows is referred to. It is looked at once: a training does not need it after its start."""
    stage, found = module.references
    if stage is not module.stage:
        found = [reference_to(follow, os.sep) for follow in module.stage.sources]
        module.references = module.stage, found
    return found


def _rebased(reference: dict[str, Any], base: str | Path) -> dict[str, Any]:
    if "absolute" not in reference:  # in the hub
        return reference
    return {**reference, "path": os.path.relpath(reference["absolute"], base)}
