"""`vlm run filter-captions`: LLaVA's balanced part of CC3M (595K of 3.3M pairs).

The rule (Visual Instruction Tuning, appendix): count in how many captions each noun phrase stands; phrases rarer than
`min_frequency` are passed over, for other phrases cover them; from the rarest phrase upward add the captions that have
it, of a phrase with more than `cap` captions `cap` by lot.
"""

import argparse
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from vlm.errors import UserError
from vlm.procedures.captions import CaptionFile, write_records
from vlm.procedures.noun_phrases import get_extractor
from vlm.seeding import seed_from


@dataclass(frozen=True)
class Selection:
    """What was kept and why.

    Attributes:
        kept: places of the captions, ascending.
        num_captions: how many there were.
        num_phrases: different noun phrases.
        num_rare: those rarer than the least frequency.
        num_capped: those of which only some captions were drawn.
    """

    kept: list[int]
    num_captions: int
    num_phrases: int
    num_rare: int
    num_capped: int


def select(phrases: Iterable[Iterable[str]], *, min_frequency: int = 3, cap: int = 100, seed: int = 0) -> Selection:
    """Applies the rule.

    What is drawn of a phrase depends on the seed, the phrase and its captions alone. The union does not depend on the
    order in which phrases are taken up.

    Args:
        phrases: of every caption; one that stands twice in a caption counts once.
    """
    captions_of: dict[str, array[int]] = {}
    count = 0
    for index, found in enumerate(phrases):
        count += 1
        for phrase in set(found):
            captions_of.setdefault(phrase, array("I")).append(index)
    kept = bytearray(count)
    rare = capped = 0
    for phrase, captions in captions_of.items():
        chosen: Iterable[int] = captions
        if len(captions) < min_frequency:
            rare += 1
            continue
        if len(captions) > cap:
            capped += 1
            chosen = Random(seed_from(seed, phrase)).sample(captions, cap)
        for index in chosen:
            kept[index] = 1
    return Selection([i for i, keep in enumerate(kept) if keep], count, len(captions_of), rare, capped)


def main(arguments: list[str]) -> int:
    """`vlm run filter-captions SRC DST`."""
    parser = argparse.ArgumentParser(
        prog="vlm run filter-captions",
        description="Keeps captions so that frequent noun phrases do not outweigh others.",
    )
    parser.add_argument("src", help="JSON list or JSONL of records with a caption")
    parser.add_argument("dst", help="file to write. A name in .jsonl gives JSONL")
    parser.add_argument("--replace", action="store_true", help="write over an older file; without, it must not exist")
    parser.add_argument("--min_frequency", type=int, default=3, help="pass over rarer phrases (default %(default)s)")
    parser.add_argument("--cap", type=int, default=100, help="captions drawn per phrase (default %(default)s)")
    parser.add_argument("--caption_key", default="caption", help="where a record has its caption (default %(default)s)")
    parser.add_argument(
        "--extractor",
        choices=("auto", "spacy", "rules"),
        default="auto",
        help="of noun phrases; auto: spaCy where it and its model are installed (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("min_frequency", "cap"):
        if getattr(options, name) < 1:
            raise UserError(f"filter-captions: --{name} is {getattr(options, name)}; it must be at least 1")
    file = CaptionFile(options.src, key=options.caption_key)
    extractor = get_extractor(options.extractor)
    chosen = select(
        extractor.phrases(file.captions()), min_frequency=options.min_frequency, cap=options.cap, seed=options.seed
    )
    write_records(options.dst, (file[index] for index in chosen.kept), replace=options.replace)
    share = len(chosen.kept) / chosen.num_captions
    print(f"{options.dst}: {len(chosen.kept)} of {chosen.num_captions} captions ({share:.1%})")
    print(
        f"noun phrases by {extractor.name}: {chosen.num_phrases}, {chosen.num_rare} of them in fewer than "
        f"{options.min_frequency} captions, {chosen.num_capped} in more than {options.cap}"
    )
    return 0
