"""InternLM-XComposer: A Vision-Language Large Model for Advanced Text-image Comprehension and Composition (Zhang et
al., 2023)."""

from vlm.systems.queried import QueriedDecoder


class XComposer(QueriedDecoder):
    """A perceive sampler, which is a Q-Former without text, makes 66 tokens of an image.

    ::

        image, squashed to 224 px
          -> EVA-g, class token kept, blocks 0 to 38            float[V, 257, 1408]
          -> ln_vision -> 64 queries look at them (`qformer`)   float[V, 64, 768]
          -> linear, between two flags that are never trained   float[V, 66, D]
          -> behind <|User|>: -> InternLM-7B, which is Llama's class with biases

    Stage 1 trains sampler and language model. From stage 2 on the language model is frozen under an adapter of rank 256
    on q, v, up and down that acts on every token (`callbacks.LoRAInjection`), and is released with it, unmerged; stages
    2 (many tasks) and 3 (instructions and illustrated articles) train the adapter and the sampler.
    """

    system = "xcomposer"
