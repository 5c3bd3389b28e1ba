"""`--weights` of the commands that look at a stage."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

UNTRAINED = "untrained"
"""Value of --weights for a system without any training of ours."""


def options_from_weights(options: Sequence[str]) -> list[str]:
    """What weights know about themselves, as options that configuration files and other options come after."""
    from vlm.building.instantiate import model_of
    from vlm.checkpoints.published.open import describe_published, find_weights, is_artefact
    from vlm.checkpoints.resume.opened import read_trained

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--weights")
    try:
        weights = parser.parse_known_args(list(options))[0].weights
    except argparse.ArgumentError:
        return []  # said by the parser of all options
    if weights is None or weights == UNTRAINED:
        return ["--stage.name", UNTRAINED, "--stage.train", "{}"]
    found = find_weights(weights)
    if is_artefact(found):
        artefact = read_trained(found)
        model, stage, folder = model_of(artefact), artefact.meta["stage"], artefact.run
    else:
        model, stage = describe_published(found).model, "published"
        folder = Path("runs") / Path(found).name
    known = {
        "stage.name": stage,
        "stage.train": "{}",
        "trainer.default_root_dir": str(folder),
        "seed_everything": str(model["init_args"].pop("seed", 0)),
        "model": json.dumps(model),
    }
    return [word for key, value in known.items() for word in (f"--{key}", value)]
