"""VILA: On Pre-training for Visual Language Models (Lin et al., 2024)."""

from vlm.systems.spliced import SplicedDecoder


class VILA(SplicedDecoder):
    """Pictures between texts, and a language model that was trained on them before it was instructed.

    ::

        images, padded to square, 336 px
          -> CLIP ViT-L/14, output of block 23 of 24, patches only      float[V, 576, 1024]
          -> Linear (paper), or Linear, GELU, Linear (released)         float[V, 576, D]
             or 2 x 2 neighbours joined, Linear                         float[V, 144, D]
          -> where they stand in a document, or in the user's turn
          -> Llama-2 (paper), Vicuna v1.5 (released); loss on all text of documents, on the answers of conversations

    Stage 0 trains the connector on captions (template `plain`). Stage 1 trains connector and language model on
    interleaved documents and pairs (template `document`). Stage 2 trains both on visual conversations, with text-only
    ones mixed back in, which pass no image at all (template `v1`).
    """

    system = "vila"
