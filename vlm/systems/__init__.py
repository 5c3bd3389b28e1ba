from vlm.systems.blip import BLIP
from vlm.systems.blip2 import BLIP2, BLIP2T5
from vlm.systems.blip2_qformer import BLIP2QFormer
from vlm.systems.blip_caption import BLIPCaption
from vlm.systems.blip_nlvr import BLIPNLVR
from vlm.systems.blip_vqa import BLIPVQA
from vlm.systems.cogagent import CogAgent
from vlm.systems.cogvlm import CogVLM
from vlm.systems.fuyu import Fuyu
from vlm.systems.instructblip import InstructBLIP
from vlm.systems.instructblip_t5 import InstructBLIPT5
from vlm.systems.llava import LLaVA
from vlm.systems.llava_1_5 import LLaVA15
from vlm.systems.llava_next import LLaVANext
from vlm.systems.mini_gemini import MiniGemini
from vlm.systems.minigpt4 import MiniGPT4
from vlm.systems.qwen_vl import QwenVL
from vlm.systems.vila import VILA
from vlm.systems.xcomposer import XComposer
from vlm.systems.xcomposer2 import XComposer2
from vlm.systems.xcomposer2_4khd import XComposer2HD4K

__all__ = [
    "BLIP",
    "BLIP2",
    "BLIP2T5",
    "BLIPNLVR",
    "BLIPVQA",
    "VILA",
    "BLIP2QFormer",
    "BLIPCaption",
    "CogAgent",
    "CogVLM",
    "Fuyu",
    "InstructBLIP",
    "InstructBLIPT5",
    "LLaVA",
    "LLaVA15",
    "LLaVANext",
    "MiniGPT4",
    "MiniGemini",
    "QwenVL",
    "XComposer",
    "XComposer2",
    "XComposer2HD4K",
]
