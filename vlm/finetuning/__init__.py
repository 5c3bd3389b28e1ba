"""`vlm fit --weights X --data FILE`: settings of a fine-tuning, made of what weights and data say about themselves."""

from vlm.finetuning.options import FineTuning, read_options

__all__ = ["FineTuning", "read_options"]
