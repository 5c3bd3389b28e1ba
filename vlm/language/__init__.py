from vlm.language.adapters import PeftAdapter
from vlm.language.causal_lm import CausalLM, LanguagePart
from vlm.language.generation import Decoding
from vlm.language.partial_lora import PartialLoRA
from vlm.language.surgery import Surgery
from vlm.language.tokens import NewTokens

__all__ = ["CausalLM", "Decoding", "LanguagePart", "NewTokens", "PartialLoRA", "PeftAdapter", "Surgery"]
