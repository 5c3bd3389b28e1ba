"""InternLM-XComposer2: Mastering Free-form Text-Image Composition and Comprehension in Vision-Language Large Model
(Dong et al., 2024)."""

from typing import Any

from vlm.language import PartialLoRA
from vlm.systems.spliced import SplicedDecoder


class XComposer2(SplicedDecoder):
    """Image tokens go through the language model with low-rank updates of their own (partial LoRA).

    ::

        image, squashed to 490 px (224 px of the model that composes articles)
          -> CLIP ViT-L/14, output of block 24 of 24, no norm behind it, patches only  float[V, 1225 or 256, 1024]
          -> Linear, GELU, Linear                                                      float[V, 1225 or 256, D]
          -> where the message has it -> InternLM2-7B, which is Llama's class; each linear layer of its blocks is
             W x for a text token and W x + B A x for one of an image                  loss on the answers

    Stage 1 trains tower, connector and partial LoRA, so that the language model speaks as before of everything else.
    Stage 2 trains all of it, the language model at a fifth of the rate.

    Args:
        partial_lora: the updates; None: image tokens are treated as text is.
        **arguments: as in `SplicedDecoder`.
    """

    system = "xcomposer2"

    def __init__(self, *, partial_lora: PartialLoRA | None, **arguments: Any) -> None:
        super().__init__(partial_lora=partial_lora, **arguments)
        if partial_lora is not None:
            self.register_surgery(partial_lora)
