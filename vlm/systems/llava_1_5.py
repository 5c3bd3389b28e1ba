"""LLaVA-1.5: Improved Baselines with Visual Instruction Tuning (Liu et al., 2023)."""

from vlm.systems.spliced import SplicedDecoder


class LLaVA15(SplicedDecoder):
    """An image is 576 tokens in front of the question.

    ::

        image, padded to square, 336 px
          -> CLIP ViT-L/14, output of block 23 of 24, patches only      float[V, 576, 1024]
          -> Linear, GELU, Linear                                       float[V, 576, D]
          -> in the place of <image> in "USER: <image>\\n{question} ASSISTANT: {answer}</s>"
          -> Vicuna v1.5; loss on the answers and their end tokens

    Stage 1 trains the connector on captions (template `plain`: the image, then its caption; images are cropped).
    Stage 2 trains connector and language model on conversations (template `v1`; images are padded).
    """

    system = "llava_1_5"
