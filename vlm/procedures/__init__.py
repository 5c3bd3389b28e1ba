"""`vlm run NAME ...`: procedures of the papers that make data."""

from importlib import import_module

from vlm.errors import UserError

PROCEDURES = {
    "android-screens": ("android_screens", "images and episodes of Android in the Wild's records (CogAgent)"),
    "bootstrap": ("bootstrap", "a set of what a filter kept, and pairs of people (BLIP's CapFilt)"),
    "caption-images": ("caption_images", "captions of images, by samples or beams (BLIP, BLIP-2)"),
    "compose": ("compose", "illustrated articles (InternLM-XComposer and -XComposer2)"),
    "filter-captions": ("filter_captions", "a balanced part of noisy captions (LLaVA's CC3M-595K)"),
    "filter-pairs": ("filter_pairs", "which texts belong to their images, by a matching head (BLIP)"),
    "imagine": ("imagine", "pictures of the prompts that Mini-Gemini writes between <h> and </h>"),
    "index-images": ("index_images", "an index of a folder's images, for `compose`"),
    "instruct": ("instruct", "instruction data written by a model (LLaVA, LLaVA-NeXT, MiniGPT-4, Mini-Gemini)"),
    "llava-captions": ("llava_captions", "captions as LLaVA's conversations of one turn"),
    "mind2web-screens": ("mind2web_screens", "screenshots and tasks of Multimodal-Mind2Web's tables (CogAgent)"),
    "rank-captions": ("rank_captions", "the captions nearest to their image, by CLIP (BLIP-2)"),
}
"""Name on the command line: module here that has `main(arguments)`, and what it makes."""

OVER_SHARDS = frozenset({"bootstrap", "caption-images", "filter-pairs", "index-images", "rank-captions"})
"""Those that share their work among all processes of torchrun or SLURM; the others are one process."""


def main(arguments: list[str]) -> int:
    """`vlm run NAME ...`; returns the exit status.

    Raises:
        UserError: there is no such procedure.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, PROCEDURES))
        print("usage: vlm run PROCEDURE ...\n")
        for name, (_, what) in PROCEDURES.items():
            print(f"  {name:<{width}}  {what}")
        return 0
    name, *others = arguments
    if name not in PROCEDURES:
        raise UserError(f"vlm run {name}: no such procedure; choose one of {', '.join(PROCEDURES)}")
    return import_module(f"vlm.procedures.{PROCEDURES[name][0]}").main(others)
