from vlm.language.adapters import PeftAdapter
from vlm.language.causal_lm import CausalLM, LanguagePart
from vlm.language.cross_attention import CrossAttention
from vlm.language.generation import Decoding
from vlm.language.med import Med
from vlm.language.med_pair import PairMed
from vlm.language.partial_lora import PartialLoRA
from vlm.language.seq2seq import Seq2SeqLM
from vlm.language.surgery import Surgery
from vlm.language.tokens import NewTokens
from vlm.language.visual_expert import VisualExpert

__all__ = [
    "CausalLM",
    "CrossAttention",
    "Decoding",
    "LanguagePart",
    "Med",
    "NewTokens",
    "PairMed",
    "PartialLoRA",
    "PeftAdapter",
    "Seq2SeqLM",
    "Surgery",
    "VisualExpert",
]
