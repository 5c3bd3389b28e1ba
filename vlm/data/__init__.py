"""From files of samples to packs on a device.

sources (files) -> order, steps (which samples) -> loader (packs) -> one of three data modules.
"""

from importlib import import_module

_HOMES = {
    "AOKVQA": "sources.image_texts",
    "AndroidInTheWild": "sources.agents",
    "BatchSpec": "sampling.batches",
    "Best": "sources.webdataset",
    "BlipQuestions": "sources.blip",
    "CaptionList": "sources.image_texts",
    "ChartQA": "sources.questions",
    "ChatJson": "sources.base",
    "ChoiceQuestions": "sources.image_texts",
    "CocoCaptions": "sources.captions",
    "DocVQA": "sources.questions",
    "FewShot": "wrappers.few_shot",
    "GQA": "benchmarks",
    "GroundedCaptions": "sources.captions",
    "Grouped": "wrappers.grouped",
    "HallusionBench": "benchmarks",
    "HubDataset": "sources.hub",
    "ImageFolder": "sources.folder",
    "ImagePairs": "sources.questions",
    "InstructionData": "modules.instruction",
    "KarpathyCaptions": "sources.captions",
    "LabelledImages": "sources.image_texts",
    "LlavaJson": "sources.base",
    "LlavaQuestions": "benchmarks",
    "LlavaScienceQA": "benchmarks",
    "MathVista": "benchmarks",
    "MessagesJson": "sources.messages",
    "Mind2Web": "sources.agents",
    "Mixture": "sampling.mixture",
    "MMBench": "benchmarks",
    "Mmc4": "sources.documents",
    "Mmc4Pairs": "sources.documents",
    "MmeFolder": "benchmarks",
    "MMMU": "benchmarks",
    "MMVet": "benchmarks",
    "MultitaskData": "modules.multitask",
    "NLVR2": "sources.blip",
    "OCRBench": "benchmarks",
    "Obelics": "sources.documents",
    "OCRVQA": "sources.scene_text",
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
    "ScienceQAChoices": "sources.science_qa",
    "ScienceQAPictures": "benchmarks",
    "ScreenElements": "sources.regions",
    "ScreenSpot": "sources.agents",
    "SeedBench": "benchmarks",
    "Source": "sources.base",
    "TDIUC": "benchmarks",
    "TextCaps": "sources.scene_text",
    "TextLines": "sources.regions",
    "TextVQA": "benchmarks",
    "TextVQATokens": "sources.scene_text",
    "VideoCaptions": "sources.video",
    "VideoQuestions": "sources.video",
    "VisionLanguageData": "modules.base",
    "VisualDialog": "sources.dialog",
    "VisualFlan": "sources.flan",
    "Visual7W": "sources.visual7w",
    "VizWiz": "benchmarks",
    "VQAv2": "benchmarks",
    "VQAv2Training": "sources.questions",
    "WebDataset": "sources.webdataset",
    "WithImages": "wrappers.with_images",
    "WithInstructions": "wrappers.instructed",
    "WithResolution": "wrappers.resolution",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:  # on first use: sources need no torch, the data modules import lightning
        return getattr(import_module(f"vlm.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vlm.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
