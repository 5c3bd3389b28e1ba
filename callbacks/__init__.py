"""Plug-ins of the Lightning Trainer, one class per file."""

import vlm  # noqa: F401  (before lightning: repairs torchvision on CPU builds of torch)

from callbacks.answer_writer import AnswerWriter
from callbacks.bad_samples import BadSamples
from callbacks.compiled_blocks import CompiledBlocks
from callbacks.ema import EMA
from callbacks.evaluation import Evaluation
from callbacks.feature_cache import FeatureCache
from callbacks.fsdp import MixedPrecisionFSDP
from callbacks.fsdp_strategy import FSDP2Strategy
from callbacks.health import Health
from callbacks.log_cadence import LogCadence
from callbacks.lora import LoRAInjection
from callbacks.out_of_memory import OutOfMemory
from callbacks.partial_lora import PartialLoRAInjection
from callbacks.predictions import Predictions
from callbacks.progress import Progress
from callbacks.resume_checkpoint import ResumeCheckpoint
from callbacks.stage_transition import StageTransition
from callbacks.throughput_monitor import ThroughputMonitor

__all__ = [
    "EMA",
    "AnswerWriter",
    "BadSamples",
    "CompiledBlocks",
    "Evaluation",
    "FSDP2Strategy",
    "FeatureCache",
    "Health",
    "LoRAInjection",
    "LogCadence",
    "MixedPrecisionFSDP",
    "OutOfMemory",
    "PartialLoRAInjection",
    "Predictions",
    "Progress",
    "ResumeCheckpoint",
    "StageTransition",
    "ThroughputMonitor",
]
