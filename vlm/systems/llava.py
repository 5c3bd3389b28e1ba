"""LLaVA: Visual Instruction Tuning (Liu et al., 2023)."""

from vlm.systems.spliced import SplicedDecoder


class LLaVA(SplicedDecoder):
    """An image is 256 tokens beside the question.

    ::

        image, shortest edge to 224 px, centre crop
          -> CLIP ViT-L/14, output of block 23 of 24, patches only      float[V, 256, 1024]
          -> Linear                                                     float[V, 256, D]
          -> in the place of <image> in the user's first turn
          -> Vicuna; loss on the answers

    Stage 1 trains the connector on captions; stage 2 trains connector and language model on conversations.
    """

    system = "llava"
