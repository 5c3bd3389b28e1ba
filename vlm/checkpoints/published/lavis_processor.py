"""What transformers needs besides the weights of BLIP-2 and InstructBLIP: `<image>` as a token, and a processor.

Its classes have a token for each query in the text, whose embeddings the features replace. The network here has none:
of a stage that was not published before, `<image>` is written as the first id that its tokenizer does not use.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken
from torch import Tensor

from vlm.checkpoints.published.one_folder import OpenedFolder
from vlm.prompts.jinja import IMAGE_TOKEN

_TABLES = ("embed_tokens.weight", "shared.weight", "lm_head.weight")


def image_id(module: Any) -> int:
    """Id of `<image>` in the files of a system of ours."""
    tokenizer = module.codec.tokenizer
    known = tokenizer.added_id(IMAGE_TOKEN)
    return len(tokenizer) if known is None else known


def num_rows(module: Any) -> int:
    """Rows of the table of tokens in the files: Vicuna's has none for `<image>` and padding."""
    return max(module.language.config.vocab_size, image_id(module) + 1)


def with_rows(opened: OpenedFolder, rows: int) -> OpenedFolder:
    """The tables of tokens with as many rows; new ones are the mean of the others, so that no answer takes them."""

    def is_short(name: str) -> bool:
        is_table = name.startswith("language.") and name.endswith(_TABLES)
        return is_table and opened.shapes[name][0] < rows

    def widened() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in opened.stream():
            if is_short(name):
                new = tensor.float().mean(0, keepdim=True).to(tensor.dtype).expand(rows - len(tensor), -1)
                tensor = torch.cat([tensor, new])
            yield name, tensor

    shapes = {name: (rows, *shape[1:]) if is_short(name) else shape for name, shape in opened.shapes.items()}
    return opened if shapes == opened.shapes else replace(opened, shapes=shapes, stream=widened)


def write_image_processor(folder: Path, module: Any, *, processor: str) -> None:
    """`preprocessor_config.json` of a system of ours."""
    side = module.tower.image_size
    content = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": processor,
        "size": {"height": side, "width": side},
        "image_mean": list(module.codec.transform.mean),
        "image_std": list(module.codec.transform.std),
        "resample": 3,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }
    _write(folder / "preprocessor_config.json", content)


def write_processor(folder: Path, module: Any, *, processor: str) -> None:
    """Of a system that answers: `<image>` in the tokenizer's files, which lie there already, and the processor.

    Args:
        processor: its class.
    """
    write_image_processor(folder, module, processor=processor)
    queries = module.arguments["qformer"].num_queries
    _write(folder / "processor_config.json", {"processor_class": processor, "num_query_tokens": queries})
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    assert backend.token_to_id(IMAGE_TOKEN) == image_id(module)
    backend.save(str(folder / "tokenizer.json"))
    file = folder / "tokenizer_config.json"
    # answers go on from the end of a row
    _write(file, json.loads(file.read_text(encoding="utf-8")) | {"padding_side": "left", "processor_class": processor})


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
