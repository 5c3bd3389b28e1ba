"""`vlm run rank-captions`: the captions nearest to their image, as BLIP-2 prepares its data (Li et al., 2023).

Ten synthetic captions of a BLIP captioner and the web text are ranked by the similarity of CLIP ViT-L/14's embeddings;
the best two stay as training data, of which one is drawn at each step (section 3.4 of the paper).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.evaluation.retrieval_table import similarities
from vlm.options import OptionParser
from vlm.procedures.scorers import Scorer, SystemScorer, fingerprint, judged_texts, open_scorer
from vlm.procedures.shards import Pair, Shard, Text, Work, add_shard_options, read_rows, run_shards, shards_of
from vlm.procedures.shards.rows import row_of


class RankCaptions(Work):
    """images, their texts and captions -> embeddings -> the same texts, the most similar first, `keep` of them kept.

    Args:
        captions: what `caption-images` made of the same input.
        keep: how many texts of an image stay.
    """

    procedure = "rank-captions"

    def __init__(self, scorer: Scorer, *, weights: str, captions: Path, keep: int = 2) -> None:
        super().__init__()
        self.scorer, self.captions, self.keep = scorer, captions, keep
        self.judge = fingerprint(weights)
        self.settings = {"weights": weights, "judge": self.judge, "captions": str(captions), "keep": keep}

    def rows(self, shard: Shard, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        written = read_rows(self.captions, shard, "caption-images")
        images = self.scorer.embed_images([pair.image for pair in pairs])
        rows = []
        for at, pair in enumerate(pairs):
            if not written.get(pair.id):
                raise UserError(
                    f"{self.captions / f'{shard.name}.jsonl'}: has no candidates for {pair.id!r}; caption this input "
                    "again, in a new folder"
                )
            texts = [*(Text(text, "web") for text in pair.texts), *written[pair.id]]
            rows.append(row_of(pair, self._ranked(images[at : at + 1], pair, texts)))
        return rows

    def _ranked(self, image: Any, pair: Pair, texts: Sequence[Text]) -> list[Text]:
        """The texts in their order; of equal ones the first, and what cannot be embedded at the end."""
        faults = (
            judged_texts(self.scorer.module, [pair.sample(text.text) for text in texts])
            if isinstance(self.scorer, SystemScorer)
            else [None] * len(texts)
        )
        good = [text for text, fault in zip(texts, faults, strict=True) if fault is None]
        bad = [
            replace(text, judge=self.judge, kept=False, error=fault.reason)
            for text, fault in zip(texts, faults, strict=True)
            if fault is not None
        ]
        if not good:
            return bad
        scores = similarities(image, self.scorer.embed_texts([text.text for text in good]))[0].tolist()
        order = sorted(range(len(good)), key=lambda at: -scores[at])
        return [
            replace(good[at], judge=self.judge, score=round(scores[at], 6), kept=place < self.keep)
            for place, at in enumerate(order)
        ] + bad

    def count(self, rows: Sequence[Any]) -> dict[str, int]:
        texts = [text for row in rows for text in row["texts"]]
        return {
            f"{source}_{how}": sum(text["source"] == source and text["kept"] == kept for text in texts)
            for source in ("web", "synthetic")
            for how, kept in (("kept", True), ("dropped", False))
        }


def main(arguments: list[str]) -> int:
    """`vlm run rank-captions INPUT --captions FOLDER --weights CLIP --out FOLDER`.

    Raises:
        UserError: weights without embeddings, or an option that does not fit.
    """
    parser = OptionParser(
        command="vlm run rank-captions",
        prog="vlm run rank-captions",
        description="Ranks captions by the similarity of image and text, and keeps the best ones.",
    )
    add_shard_options(parser, what="a JSONL file for each shard")
    parser.add_argument("--captions", type=Path, required=True, help="folder that `vlm run caption-images` made")
    parser.add_argument(
        "--weights", required=True, help="a folder of transformers' CLIP, or a system with embeddings (BLIP)"
    )
    parser.add_argument("--keep", type=int, default=2, help="texts of an image that stay (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.keep < 1:
        raise UserError(f"vlm run rank-captions: --keep is {options.keep}; it must be at least 1")
    shards = shards_of(options)
    work = RankCaptions(
        open_scorer(options.weights), weights=options.weights, captions=options.captions, keep=options.keep
    )
    return run_shards(work, shards, options)
