"""Options that procedures over shards have in common."""

import argparse
from pathlib import Path

from vlm.procedures.shards.inputs import SHARD_SIZE, Shard, find_shards


def add_shard_options(parser: argparse.ArgumentParser, *, what: str, batch_size: int = 32) -> None:
    """The input, where to write, and how it runs.

    Args:
        what: is written.
    """
    parser.add_argument(
        "input", nargs="+", help="tar files (shards/{00000..00099}.tar, shards/*.tar), JSON lists or JSONL, folders"
    )
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {what}; one begun earlier goes on")
    parser.add_argument(
        "--caption_key",
        help="where texts are: txt or a key of KEY.json of a tar (default txt), a key of a record (default caption)",
    )
    parser.add_argument("--image_root", type=Path, help="of lists: folder that paths start at (default: the list's)")
    parser.add_argument(
        "--shard_size", type=int, default=SHARD_SIZE, help="images in a shard of a list or folder (default %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=batch_size, help="images looked at together (default %(default)s)"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images (default %(default)s)")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")


def shards_of(options: argparse.Namespace) -> list[Shard]:
    """The input that the options name."""
    return find_shards(
        options.input,
        shard_size=options.shard_size,
        image_root=options.image_root,
        caption_key=options.caption_key,
        truth_key=getattr(options, "truth_key", None),
    )
