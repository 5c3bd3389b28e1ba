"""From files of samples to packs on a device.

sources (files) -> order, steps (which samples) -> loader (packs) -> one of three data modules.
"""

from importlib import import_module

_HOMES = {
    "BatchSpec": "steps",
    "Best": "formats.shards",
    "ChartQA": "formats.questions",
    "ChatJson": "sources",
    "CocoCaptions": "formats.captions",
    "DocVQA": "formats.questions",
    "FewShot": "few_shot",
    "GQA": "benchmarks",
    "Grouped": "grouped",
    "GroundedCaptions": "formats.captions",
    "ImageFolder": "folder",
    "ImagePairs": "formats.questions",
    "InstructionData": "instruction",
    "KarpathyCaptions": "formats.captions",
    "LlavaJson": "sources",
    "LlavaQuestions": "benchmarks",
    "LlavaScienceQA": "benchmarks",
    "MathVista": "benchmarks",
    "MessagesJson": "messages",
    "Mixture": "mixing",
    "MMBench": "benchmarks",
    "Mmc4": "formats.documents",
    "Mmc4Pairs": "formats.documents",
    "MmeFolder": "benchmarks",
    "MMMU": "benchmarks",
    "MMVet": "benchmarks",
    "MultitaskData": "multitask",
    "Obelics": "formats.documents",
    "Parquet": "parquet",
    "PlainText": "formats.documents",
    "Pope": "benchmarks",
    "PretrainingData": "pretraining",
    "QwenJson": "formats.qwen",
    "QwenQuestions": "formats.qwen",
    "QwenReferring": "formats.qwen",
    "ReferringExpressions": "formats.regions",
    "ScienceQA": "science_qa",
    "ScienceQAPictures": "benchmarks",
    "ScreenElements": "formats.regions",
    "SeedBench": "benchmarks",
    "Source": "sources",
    "TextLines": "formats.regions",
    "TextVQA": "benchmarks",
    "VisionLanguageData": "module",
    "VisualFlan": "formats.flan",
    "VizWiz": "benchmarks",
    "VQAv2": "benchmarks",
    "VQAv2Training": "formats.questions",
    "WebDataset": "formats.shards",
    "WithResolution": "resolution",
}


def __getattr__(name: str):
    if name in _HOMES:  # on first use: sources need no torch, the data modules import lightning
        return getattr(import_module(f"vlm.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vlm.data' has no attribute {name!r}")
