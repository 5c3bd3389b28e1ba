"""`vlm run filter-pairs`: which texts belong to their images, by a matching head (the Filt of BLIP's CapFilt).

A text stays if the head says with a probability of at least one half that it matches. Web texts and synthetic ones are
judged each for itself: of an image both may stay, one, or none (Li et al., 2022, section 3.3).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.options import OptionParser
from vlm.procedures.scorers import fingerprint, judged_texts
from vlm.procedures.shards import Pair, Shard, Text, Work, add_shard_options, read_rows, run_shards, shards_of
from vlm.procedures.shards.rows import row_of


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
        asked = [
            (at, text)
            for at, pair in enumerate(pairs)
            for text in (*(Text(text, "web") for text in pair.texts), *written.get(pair.id, ()))
        ]
        judged: list[list[Text]] = [[] for _ in pairs]
        for start in range(0, len(asked), len(pairs)):
            part = asked[start : start + len(pairs)]
            scores = self._scores([pairs[at] for at, _ in part], [text for _, text in part])
            for (at, _), text in zip(part, scores, strict=True):
                judged[at].append(text)
        rows = [row_of(pair, texts) for pair, texts in zip(pairs, judged, strict=True)]
        return [
            row if pair.belongs is None else row | {"belongs": pair.belongs}
            for row, pair in zip(rows, pairs, strict=True)
        ]

    def _scores(self, pairs: Sequence[Pair], texts: Sequence[Text]) -> list[Text]:
        """The texts, each judged with its image."""
        samples = [pair.sample(text.text) for pair, text in zip(pairs, texts, strict=True)]
        faults = judged_texts(self.module, samples)
        good = [sample for sample, fault in zip(samples, faults, strict=True) if fault is None]
        scores = iter(self._match(good) if good else [])
        judged = []
        for text, fault in zip(texts, faults, strict=True):
            if fault is not None:
                judged.append(replace(text, judge=self.judge, kept=False, error=fault.reason))
                continue
            score = next(scores)
            judged.append(replace(text, judge=self.judge, score=round(score, 6), kept=score >= self.threshold))
        return judged

    def _match(self, samples: Sequence[Any]) -> list[float]:
        found = self.module.embed(samples, batch_size=len(samples))
        if found.image_state is None or found.text_state is None:
            raise UserError(f"vlm run filter-pairs: {self.module.system} has no matching head; filter with another one")
        scores: list[float] = self.module.match(
            found.image_state[found.owner], found.text_state, probability=True
        ).tolist()
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
