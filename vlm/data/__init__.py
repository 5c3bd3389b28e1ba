"""From files of samples to packs on a device.

sources (files) -> order, steps (which samples) -> loader (packs) -> one of three data modules.
"""

from importlib import import_module

_HOMES = {
    "BatchSpec": "sampling.batches",
    "Best": "sources.webdataset",
    "ChartQA": "sources.questions",
    "ChatJson": "sources.base",
    "CocoCaptions": "sources.captions",
    "DocVQA": "sources.questions",
    "FewShot": "wrappers.few_shot",
    "GQA": "benchmarks",
    "Grouped": "wrappers.grouped",
    "GroundedCaptions": "sources.captions",
    "HubDataset": "sources.hub",
    "ImageFolder": "sources.folder",
    "ImagePairs": "sources.questions",
    "InstructionData": "modules.instruction",
    "KarpathyCaptions": "sources.captions",
    "LlavaJson": "sources.base",
    "LlavaQuestions": "benchmarks",
    "LlavaScienceQA": "benchmarks",
    "MathVista": "benchmarks",
    "MessagesJson": "sources.messages",
    "Mixture": "sampling.mixture",
    "MMBench": "benchmarks",
    "Mmc4": "sources.documents",
    "Mmc4Pairs": "sources.documents",
    "MmeFolder": "benchmarks",
    "MMMU": "benchmarks",
    "MMVet": "benchmarks",
    "MultitaskData": "modules.multitask",
    "Obelics": "sources.documents",
    "Parquet": "sources.parquet",
    "PlainText": "sources.documents",
    "Pope": "benchmarks",
    "PretrainingData": "modules.pretraining",
    "QBench": "benchmarks",
    "QwenJson": "sources.qwen",
    "QwenQuestions": "sources.qwen",
    "QwenReferring": "sources.qwen",
    "ReferringExpressions": "sources.regions",
    "ScienceQA": "sources.science_qa",
    "ScienceQAPictures": "benchmarks",
    "ScreenElements": "sources.regions",
    "SeedBench": "benchmarks",
    "Source": "sources.base",
    "TextLines": "sources.regions",
    "TextVQA": "benchmarks",
    "VisionLanguageData": "modules.base",
    "VisualFlan": "sources.flan",
    "VizWiz": "benchmarks",
    "VQAv2": "benchmarks",
    "VQAv2Training": "sources.questions",
    "WebDataset": "sources.webdataset",
    "WithResolution": "wrappers.resolution",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:  # on first use: sources need no torch, the data modules import lightning
        return getattr(import_module(f"vlm.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vlm.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
