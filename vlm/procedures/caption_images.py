"""`vlm run caption-images`: a caption, or several, for each image (the Cap of BLIP's CapFilt).

BLIP samples its captions by nucleus sampling (p = 0.9, 5 to 20 tokens, repetition penalty 1.1), because beams write
safe captions that teach less (Li et al., 2022, section 4.2). BLIP-2 has ten of them for an image, to be ranked.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from vlm.errors import UserError
from vlm.options import OptionParser
from vlm.procedures.scorers import fingerprint
from vlm.procedures.shards import Pair, Shard, Text, Work, add_shard_options, run_shards, shards_of
from vlm.procedures.shards.rows import row_of


class CaptionImages(Work):
    """images -> a captioner -> `synthetic` texts.

    What is drawn of a caption depends on the seed, its number and the image's id alone.

    Args:
        module: a system that answers.
        decoding: how captions are searched for.
        number: of captions of an image; of several that are alike one stays.
        prompt: the user's text beside the image; '' leaves it to the system.
    """

    procedure = "caption-images"

    def __init__(self, module: Any, *, weights: str, decoding: Any, number: int = 1, prompt: str = "") -> None:
        super().__init__()
        self.module, self.decoding, self.number, self.prompt = module, decoding, number, prompt
        self.captioner = fingerprint(weights)
        self.settings = {
            "weights": weights,
            "captioner": self.captioner,
            "decoding": asdict(decoding),
            "number": number,
            "prompt": prompt,
        }

    def rows(self, shard: Shard, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        from vlm.seeding import seed_from

        samples = [pair.sample(prompt=self.prompt) for pair in pairs]
        written: list[dict[str, None]] = [{} for _ in pairs]
        for at in range(self.number):
            decoding = replace(self.decoding, seed=seed_from(self.decoding.seed, at) if at else self.decoding.seed)
            answers = self.module.generate(samples, decoding=decoding, batch_size=len(samples))
            for found, answer in zip(written, answers, strict=True):
                if answer.strip():
                    found.setdefault(answer.strip())
        return [
            row_of(pair, [Text(text, "synthetic", captioner=self.captioner) for text in found])
            for pair, found in zip(pairs, written, strict=True)
        ]

    def count(self, rows: Sequence[Any]) -> dict[str, int]:
        return {"captions": sum(len(row["texts"]) for row in rows)}


def main(arguments: list[str]) -> int:
    """`vlm run caption-images INPUT --weights CAPTIONER --out FOLDER`.

    Raises:
        UserError: weights that cannot be opened, or an option that does not fit.
    """
    from vlm.language import Decoding
    from vlm.loading import load

    parser = OptionParser(
        command="vlm run caption-images",
        prog="vlm run caption-images",
        description="Writes captions of images: by nucleus sampling as BLIP did, or by beams.",
    )
    add_shard_options(parser, what="a JSONL file for each shard")
    parser.add_argument("--weights", required=True, help="of the captioner, as in `vlm predict`")
    parser.add_argument("--number", type=int, default=1, help="captions of an image (default %(default)s; BLIP-2: 10)")
    parser.add_argument("--prompt", default="", help="the user's text beside the image; default: the system's own")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of samples; 0: none (default %(default)s)")
    parser.add_argument("--num_beams", type=int, default=1, help="above 1: beams and no samples (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=20, help="of a caption (default %(default)s)")
    parser.add_argument("--min_new_tokens", type=int, default=5, help="of a caption (default %(default)s)")
    parser.add_argument("--repetition_penalty", type=float, default=1.1, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    beams = options.num_beams > 1
    if options.number < 1 or (options.number > 1 and (beams or options.temperature == 0)):
        raise UserError(
            f"vlm run caption-images: --number is {options.number}; it starts at 1, and above it captions are sampled: "
            "leave --num_beams and --temperature 0 out"
        )
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        num_beams=options.num_beams,
        temperature=0.0 if beams else options.temperature,
        top_p=1.0 if beams or options.temperature == 0 else options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    shards = shards_of(options)
    work = CaptionImages(
        load(options.weights),
        weights=options.weights,
        decoding=decoding,
        number=options.number,
        prompt=options.prompt,
    )
    return run_shards(work, shards, options)
