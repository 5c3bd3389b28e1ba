"""From files of samples to packs on a device.

sources (files) -> order, steps (which samples) -> loader (packs) -> one of three data modules.
"""

from importlib import import_module

_HOMES = {
    "BatchSpec": "steps",
    "ChatJson": "sources",
    "GQA": "benchmarks",
    "ImageFolder": "folder",
    "InstructionData": "instruction",
    "LlavaJson": "sources",
    "LlavaQuestions": "benchmarks",
    "LlavaScienceQA": "benchmarks",
    "MessagesJson": "messages",
    "MMBench": "benchmarks",
    "MMVet": "benchmarks",
    "Mixture": "mixing",
    "MmeFolder": "benchmarks",
    "MultitaskData": "multitask",
    "Parquet": "parquet",
    "Pope": "benchmarks",
    "PretrainingData": "pretraining",
    "ScienceQA": "science_qa",
    "SeedBench": "benchmarks",
    "Source": "sources",
    "TextVQA": "benchmarks",
    "VisionLanguageData": "module",
    "VizWiz": "benchmarks",
    "VQAv2": "benchmarks",
    "WithResolution": "resolution",
}


def __getattr__(name: str):
    if name in _HOMES:  # on first use: sources need no torch, the data modules import lightning
        return getattr(import_module(f"vlm.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vlm.data' has no attribute {name!r}")
