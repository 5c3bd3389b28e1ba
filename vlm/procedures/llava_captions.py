"""`vlm run llava-captions`: captions as conversations, LLaVA's data of stage 1 (chat.json of CC3M-595K)."""

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

import yaml

import vlm
from vlm.procedures.captions import CaptionFile, write_records
from vlm.seeding import seed_from

Requests = Literal["brief", "detailed"]


@cache
def requests(kind: Requests) -> tuple[str, ...]:
    """LLaVA's requests for a description of a picture: 11 brief ones, 16 detailed ones."""
    file = Path(vlm.__file__).parent / "prompts/llava_requests.yaml"  # the package beside it would import torch
    return tuple(yaml.safe_load(file.read_text(encoding="utf-8"))[kind])


def conversations(file: CaptionFile, *, kind: Requests = "brief", seed: int = 0) -> Iterator[dict[str, Any]]:
    """A conversation of one turn per caption.

    Which request is made, and whether it stands before the image or behind it (paper, equation 2), is drawn from the
    seed and the record's id alone (its place in the file where it has none), so no other record has a say in it.

    Raises:
        SampleError: a record without image or caption.
    """
    for index, record in enumerate(file):
        name = record.get("id", index)
        random = Random(seed_from(seed, str(name)))
        request = random.choice(requests(kind))
        human = f"{request}\n<image>" if random.random() < 0.5 else f"<image>\n{request}"
        yield {
            "id": name,
            "image": file.text(record, index, "image"),
            "conversations": [
                {"from": "human", "value": human},
                {"from": "gpt", "value": file.text(record, index, file.key)},
            ],
        }


def main(arguments: list[str]) -> int:
    """`vlm run llava-captions SRC DST`."""
    parser = argparse.ArgumentParser(
        prog="vlm run llava-captions", description="Captions as LLaVA's conversations of one turn."
    )
    parser.add_argument("src", help="JSON list or JSONL of records with 'image' and a caption")
    parser.add_argument("dst", help="file to write. A name in .jsonl gives JSONL")
    parser.add_argument("--replace", action="store_true", help="write over an older file; without, it must not exist")
    parser.add_argument("--caption_key", default="caption", help="where a record has its caption (default %(default)s)")
    parser.add_argument("--requests", choices=("brief", "detailed"), default="brief", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    file = CaptionFile(options.src, key=options.caption_key)
    count = write_records(
        options.dst, conversations(file, kind=options.requests, seed=options.seed), replace=options.replace
    )
    print(f"{options.dst}: {count} conversations")
    return 0
