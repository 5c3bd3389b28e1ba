"""BLIP as it is pre-trained, at the smallest size."""

from typing import Any

from tests.support.blip_tasks import TOKENIZER, TOWER, sizes
from vlm.language import Med
from vlm.systems import BLIP


def blip(**changes: Any) -> BLIP:
    """Images and captions are compared by 16 numbers each; 17 features an image."""
    language = Med(**sizes(dropout=changes.pop("dropout", 0.1), **changes.pop("language", {})))
    arguments: dict[str, Any] = {"vision": TOWER, "tokenizer": TOKENIZER, "dim": 16, "queue": 16, "momentum": 0.9}
    return BLIP(**(arguments | {"language": language, "max_tokens": 40} | changes))
