"""Qwen-VL: A Versatile Vision-Language Model for Understanding, Localization, Text Reading, and Beyond (Bai et al.,
2023)."""

from vlm.systems.spliced import SplicedDecoder


class QwenVL(SplicedDecoder):
    """An image is 256 tokens at any resolution, and places in it are text.

    ::

        image, squashed to 224 px (stage 1) or 448 px
          -> ViT-bigG/14, all blocks, no class token; positions of 16 x 16     float[V, 256 or 1024, 1664]
          -> 256 learned queries look at them once (`vlm.connectors.Resampler`) float[V, 256, D]
          -> between <img> and </img> -> Qwen-7B, which is Qwen2's class       loss on captions, answers, boxes

    Stage 1 trains tower and resampler on captions (template `qwen_vl`). Stage 2 trains everything on seven tasks, each
    pack one of them. Stage 3 freezes the tower and trains the rest on conversations (template `qwen_vl_chat`).
    """

    system = "qwen_vl"
