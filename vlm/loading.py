"""Opening a finished system: `vlm.load`."""

from pathlib import Path
from typing import Any

from vlm.building.instantiate import instantiate, model_of
from vlm.checkpoints.artefact import read_artefact
from vlm.checkpoints.published.open import describe_published, find_weights, is_artefact


def load(path: str | Path) -> Any:
    """Opens a finished system for `generate` and `score`.

    Args:
        path: an artefact, a run folder of a stage (`runs/llava_1_5/2_finetune`) or of a recipe (its last finished
            stage), or a published LLaVA (official or Hugging Face folder, or hub id).

    Returns:
        The system, in eval mode, on the CPU.

    Raises:
        UserError: there is none of these in `path`, it lacks tensors, or the frozen weights it was trained with have
            changed.
    """
    weights = find_weights(path)
    if not is_artefact(weights):
        module = instantiate(describe_published(weights))
        module.weights = weights
        module.configure_model()
        return module
    artefact = read_artefact(weights)
    module = instantiate(model_of(artefact))
    module.surgery = instantiate(artefact.meta.get("surgery", []))
    module.weights = str(artefact.folder)
    module.configure_model()
    return module
