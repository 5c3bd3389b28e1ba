"""The systems there are, in one place: names and paths alone, so that reading it imports nothing.

A new system is its class, which `vlm.systems` exports and which has a line here, and its folder of configurations.
"""

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The recipes of a checkout. An installed package has none: there a recipe is named by its file."""


@dataclass(frozen=True)
class System:
    """What is known of a system before anything of it is imported.

    Attributes:
        class_path: of its LightningModule, and of its `model.yaml`.
        family: path of the class that knows its published folders; None: nothing was published.
        others: paths of further LightningModules of the system: what a stage trains may be another network (the first
            stage of BLIP-2, questions and answers with BLIP).
    """

    class_path: str
    family: str | None = None
    others: tuple[str, ...] = ()

    @property
    def class_paths(self) -> tuple[str, ...]:
        """Of all its LightningModules."""
        return self.class_path, *self.others


_PUBLISHED = "vlm.checkpoints.published"
SYSTEMS: dict[str, System] = {
    "blip": System(
        "vlm.systems.BLIPCaption",
        f"{_PUBLISHED}.blip.BLIPFamily",
        ("vlm.systems.BLIP", "vlm.systems.BLIPVQA", "vlm.systems.BLIPNLVR"),
    ),
    "blip2": System(
        "vlm.systems.BLIP2", f"{_PUBLISHED}.blip2.BLIP2Family", ("vlm.systems.BLIP2QFormer", "vlm.systems.BLIP2T5")
    ),
    "cogagent": System("vlm.systems.CogAgent", f"{_PUBLISHED}.cogagent.CogAgentFamily"),
    "cogvlm": System("vlm.systems.CogVLM", f"{_PUBLISHED}.cogvlm.CogVLMFamily"),
    "fuyu": System("vlm.systems.Fuyu", f"{_PUBLISHED}.fuyu.FuyuFamily"),
    "instructblip": System(
        "vlm.systems.InstructBLIP",
        f"{_PUBLISHED}.instructblip.InstructBLIPFamily",
        others=("vlm.systems.InstructBLIPT5",),
    ),
    "llava": System("vlm.systems.LLaVA", f"{_PUBLISHED}.llava_family.LLaVAFamily"),
    "llava_1_5": System("vlm.systems.LLaVA15", f"{_PUBLISHED}.llava_family.LLaVA15Family"),
    "llava_next": System("vlm.systems.LLaVANext", f"{_PUBLISHED}.llava_family.LLaVANextFamily"),
    "mini_gemini": System("vlm.systems.MiniGemini", f"{_PUBLISHED}.llava_family.MiniGeminiFamily"),
    "minigpt4": System("vlm.systems.MiniGPT4", f"{_PUBLISHED}.minigpt4.MiniGPT4Family"),
    "qwen_vl": System("vlm.systems.QwenVL", f"{_PUBLISHED}.qwen_vl.QwenVLFamily"),
    "vila": System("vlm.systems.VILA", f"{_PUBLISHED}.llava_family.VILAFamily"),
    "xcomposer": System("vlm.systems.XComposer", f"{_PUBLISHED}.xcomposer.XComposerFamily"),
    "xcomposer2": System("vlm.systems.XComposer2", f"{_PUBLISHED}.xcomposer2.XComposer2Family"),
    "xcomposer2_4khd": System("vlm.systems.XComposer2HD4K", f"{_PUBLISHED}.xcomposer2_4khd.XComposer2HD4KFamily"),
}


def recipe_folder(system: str) -> Path:
    """The folder of a system's recipe and stages, and of the overlays in `demo/` that make them laptop size."""
    return CONFIGS / system


def published_systems() -> list[str]:
    """Names of the systems with published folders, sorted."""
    return sorted(name for name, system in SYSTEMS.items() if system.family is not None)
