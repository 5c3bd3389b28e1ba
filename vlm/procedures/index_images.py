"""`vlm run index-images`: embeddings of a folder's images, in which `vlm run compose` looks for illustrations."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

from vlm.errors import UserError
from vlm.options import OptionParser
from vlm.procedures.image_index import SUFFIX, ImageIndex
from vlm.procedures.scorers import Scorer, fingerprint, open_scorer
from vlm.procedures.shards import Pair, Shard, Work, add_shard_options, run_shards, shards_of

__all__ = ["ImageIndex", "IndexImages", "main"]


class IndexImages(Work):
    """images -> CLIP or a system with embeddings -> their vectors and absolute paths, a file for each shard."""

    procedure = "index-images"
    suffix = SUFFIX

    def __init__(self, scorer: Scorer, *, weights: str) -> None:
        super().__init__()
        self.scorer = scorer
        self.settings = {"weights": weights, "fingerprint": fingerprint(weights)}

    def rows(self, shard: Shard, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        vectors = self.scorer.embed_images([pair.image for pair in pairs])  # [B, D] or [B, Q, D]
        root = shard.image_root or (shard.path if shard.path.is_dir() else shard.path.parent)
        vectors = vectors.cpu().unflatten(0, (len(pairs), 1)) if vectors.ndim == 2 else vectors.cpu()
        return [
            {"path": str((root / pair.image.name).resolve()), "vectors": own}
            for pair, own in zip(pairs, vectors, strict=True)
        ]

    def write(self, file: BinaryIO, shard: Shard, rows: Sequence[Mapping[str, Any]]) -> None:
        vectors = torch.cat([row["vectors"] for row in rows]) if rows else torch.zeros(0, 1)
        owner = torch.tensor([at for at, row in enumerate(rows) for _ in row["vectors"]], dtype=torch.int64)
        names = {"images": json.dumps([row["path"] for row in rows], ensure_ascii=False)}
        file.write(save({"vectors": vectors.contiguous(), "owner": owner}, metadata=names))


def main(arguments: list[str]) -> int:
    """`vlm run index-images FOLDER --weights X --out INDEX`.

    Raises:
        UserError: images in tar files, or weights without embeddings.
    """
    parser = OptionParser(
        command="vlm run index-images",
        prog="vlm run index-images",
        description="Embeds images, so that the nearest ones to a text can be found (`vlm run compose --index`).",
    )
    add_shard_options(parser, what="the index")
    parser.add_argument(
        "--weights", required=True, help="a folder of transformers' CLIP, or a system with embeddings (BLIP)"
    )
    options = parser.parse_args(arguments)
    shards = shards_of(options)
    if inside := next((shard for shard in shards if shard.count is None), None):
        raise UserError(f"{inside.path}: an index holds paths of image files; unpack the tar file first")
    work = IndexImages(open_scorer(options.weights), weights=str(Path(options.weights)))
    return run_shards(work, shards, options)
