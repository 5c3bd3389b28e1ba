"""`vlm run filter-pairs`: which texts belong to their images, by a matching head (the Filt of BLIP's CapFilt).

A text stays if the head says with a probability of at least one half that it matches. Web texts and synthetic ones are
judged each for itself: of an image both may stay, one, or none (Li et al., 2022, section 3.3).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm.errors import SampleError, UserError
from vlm.options import OptionParser
from vlm.procedures.scorers import fingerprint, judged_texts
from vlm.procedures.shards import Pair, Shard, Text, Work, add_shard_options, read_rows, run_shards, shards_of
from vlm.procedures.shards.rows import row_of
from vlm.sample import Sample


class FilterPairs(Work):
    """images, their texts and captions -> embeddings -> matching head -> the same texts, each with its score.

    Args:
        module: a system that matches pairs.
        captions: what `caption-images` made of the same input; None: only texts that came with the images.
        threshold: least probability of a text that is kept.
    """

    procedure = "filter-pairs"

    def __init__(self, module: Any, *, weights: str, captions: Path | None = None, threshold: float = 0.5) -> None:
        super().__init__()
        self.module, self.captions, self.threshold = module, captions, threshold
        self.judge = fingerprint(weights)
        self.settings = {
            "weights": weights,
            "judge": self.judge,
            "captions": None if captions is None else str(captions),
            "threshold": threshold,
        }

    def rows(self, shard: Shard, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        written = read_rows(self.captions, shard, "caption-images") if self.captions is not None else {}
        texts = [[*(Text(text, "web") for text in pair.texts), *written.get(pair.id, ())] for pair in pairs]
        judged = self._judged(pairs, texts)
        rows = [row_of(pair, own) for pair, own in zip(pairs, judged, strict=True)]
        return [
            row if pair.belongs is None else row | {"belongs": pair.belongs}
            for row, pair in zip(rows, pairs, strict=True)
        ]

    def _judged(self, pairs: Sequence[Pair], texts: Sequence[Sequence[Text]]) -> list[list[Text]]:
        """The texts of each image, each of them judged with it; a text that the system does not take is not kept."""
        faults = [
            judged_texts(self.module, [pair.sample(text.text) for text in own])
            for pair, own in zip(pairs, texts, strict=True)
        ]
        good = [
            [text.text for text, fault in zip(own, wrong, strict=True) if fault is None]
            for own, wrong in zip(texts, faults, strict=True)
        ]
        scores = iter(self._match([pair.sample(*own) for pair, own in zip(pairs, good, strict=True) if own]))
        return [
            [self._with_score(text, fault, scores) for text, fault in zip(own, wrong, strict=True)]
            for own, wrong in zip(texts, faults, strict=True)
        ]

    def _with_score(self, text: Text, fault: SampleError | None, scores: Iterator[float]) -> Text:
        if fault is not None:
            return replace(text, judge=self.judge, kept=False, error=fault.reason)
        score = next(scores)
        return replace(text, judge=self.judge, score=round(score, 6), kept=score >= self.threshold)

    def _match(self, samples: Sequence[Sample]) -> list[float]:
        """How likely each text of the samples belongs to its image; an image is encoded once for all of its texts."""
        if not samples:
            return []
        found = self.module.embed(samples, batch_size=len(samples))
        if found.image_state is None or found.text_state is None:
            raise UserError(f"vlm run filter-pairs: {self.module.system} has no matching head; filter with another one")
        pairs = zip(found.owner.split(len(samples)), found.text_state.split(len(samples)), strict=True)
        parts = [self.module.match(found.image_state[owner], text, probability=True) for owner, text in pairs]
        scores: list[float] = torch.cat(parts).tolist()
        return scores

    def count(self, rows: Sequence[Any]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for text in (text for row in rows for text in row["texts"]):
            found[f"{text['source']}_{'kept' if text['kept'] else 'dropped'}"] += 1
            found["not_judged"] += "error" in text
        for row in rows:
            for text in row["texts"] if "belongs" in row else ():
                if text["source"] == "web":
                    found[f"{'right' if row['belongs'] else 'wrong'}_{'kept' if text['kept'] else 'dropped'}"] += 1
        return dict(sorted(found.items()))

    def figures(self, totals: Mapping[str, int]) -> dict[str, float]:
        """Precision and recall of the web texts, where it is known which of them belong to their images."""
        right = totals.get("right_kept", 0)
        kept, there = right + totals.get("wrong_kept", 0), right + totals.get("right_dropped", 0)
        noise = totals.get("wrong_kept", 0) + totals.get("wrong_dropped", 0)
        if not there + noise:
            return {}
        return {
            "precision": right / kept if kept else 0.0,
            "recall": right / there if there else 0.0,
            "noise_before": noise / (there + noise),
        }


def main(arguments: list[str]) -> int:
    """`vlm run filter-pairs INPUT --weights FILTER [--captions FOLDER] --out FOLDER`.

    Raises:
        UserError: weights that cannot be opened.
    """
    from vlm.loading import load

    parser = OptionParser(
        command="vlm run filter-pairs",
        prog="vlm run filter-pairs",
        description="Judges texts of images by a matching head: those stay whose match is likely.",
    )
    add_shard_options(parser, what="a JSONL file for each shard")
    parser.add_argument("--weights", required=True, help="of the filter: a system that matches pairs (BLIP)")
    parser.add_argument("--captions", type=Path, help="folder that `vlm run caption-images` made of the same input")
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability (default %(default)s)")
    parser.add_argument(
        "--truth_key",
        help="of records that say whether their texts belong to their images: reports precision and recall",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold <= 1:
        raise UserError(f"vlm run filter-pairs: --threshold is {options.threshold}; it is a probability")
    shards = shards_of(options)
    work = FilterPairs(
        load(options.weights), weights=options.weights, captions=options.captions, threshold=options.threshold
    )
    return run_shards(work, shards, options)
