from vlm.language.causal_lm import CausalLM, LanguagePart
from vlm.language.generation import Decoding
from vlm.language.med import Med
from vlm.language.surgery import PartialLoRA, Surgery
from vlm.language.tokens import NewTokens

__all__ = ["CausalLM", "Decoding", "LanguagePart", "Med", "NewTokens", "PartialLoRA", "Surgery"]
