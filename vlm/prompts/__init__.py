"""Conversation formats and tokenizers."""

from vlm.errors import UserError
from vlm.prompts import blip2, cogvlm, fuyu, instructblip, llava, mini_gemini, minigpt4, qwen, xcomposer, xcomposer2
from vlm.prompts.bert import BertTokenizer
from vlm.prompts.documents import DOCUMENTS
from vlm.prompts.fuyu import FuyuTokenizer
from vlm.prompts.opt import OPTTokenizer
from vlm.prompts.t5 import T5Tokenizer
from vlm.prompts.template import IMAGE, Form, ImageMark, Template, TextSpan, Tokenized, tokenize
from vlm.prompts.tiktoken import QwenTokenizer
from vlm.prompts.tokenizer import HubTokenizer, LlamaTokenizer, Tokenizer

__all__ = [
    "IMAGE",
    "BertTokenizer",
    "Form",
    "FuyuTokenizer",
    "HubTokenizer",
    "ImageMark",
    "LlamaTokenizer",
    "OPTTokenizer",
    "QwenTokenizer",
    "T5Tokenizer",
    "Template",
    "TextSpan",
    "Tokenized",
    "Tokenizer",
    "get_template",
    "tokenize",
]


def get_template(name: str) -> Template:
    """The published template of that name.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    modules = (blip2, cogvlm, fuyu, instructblip, llava, mini_gemini, minigpt4, qwen, xcomposer, xcomposer2)
    templates = {DOCUMENTS.name: DOCUMENTS} | {k: v for module in modules for k, v in module.TEMPLATES.items()}
    if name not in templates:
        raise UserError(f"unknown template {name!r}; use one of {', '.join(sorted(templates))}")
    return templates[name]
