"""BLIP's fine-tuned systems at the smallest size, and samples for them."""

import dataclasses
from pathlib import Path
from typing import Any

from tests.support.samples import pairs, picture
from vlm.language import Med, PairMed
from vlm.prompts import BertTokenizer
from vlm.sample import ImagePart, Message, Sample, TextPart
from vlm.systems import BLIPNLVR, BLIPVQA, BLIPCaption
from vlm.vision import TimmTower

TOWER = TimmTower(
    "vit_base_patch16_224",
    class_token=True,
    final_norm=True,
    options={"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 4},
)
SIZE = {"dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64, "vocab_size": 104, "max_positions": 512}
VOCABULARY = Path(__file__).with_name("bert")


def sizes(**changes: Any) -> dict[str, Any]:
    return SIZE | {"dropout": 0.0} | changes


TOKENIZER = BertTokenizer(str(VOCABULARY))


def blip_caption(**changes: Any) -> BLIPCaption:
    """17 features an image, which a decoder looks at."""
    arguments = {
        "vision": TOWER,
        "language": Med(**sizes(encoder=False)),
        "tokenizer": TOKENIZER,
        "max_tokens": 512,
        "label_smoothing": 0.0,  # a score is a log-probability
    }
    return BLIPCaption(**(arguments | changes))


def blip_vqa(**changes: Any) -> BLIPVQA:
    """A decoder looks at what an encoder found in 17 features."""
    arguments = {
        "vision": TOWER,
        "encoder": Med(**sizes(decoder=False)),
        "language": Med(**sizes(encoder=False)),
        "tokenizer": TOKENIZER,
        "max_tokens": 512,
        "label_smoothing": 0.0,
        "seed": 2,  # with which it says different things
    }
    return BLIPVQA(**(arguments | changes))


def blip_nlvr(**changes: Any) -> BLIPNLVR:
    """Two images of 17 features: the first layer takes the mean of both, the second joins them."""
    arguments = {
        "vision": TOWER,
        "language": PairMed(**sizes(merge_from=1)),
        "tokenizer": TOKENIZER,
        "max_tokens": 512,
    }
    return BLIPNLVR(**(arguments | changes))


def answered(folder: Path, count: int = 6) -> list[Sample]:
    """Questions about one image, with one to three answers that count more or less."""
    made = []
    for number, sample in enumerate(pairs(folder, count)):
        asked = Message("user", (ImagePart(), TextPart("what is it? " * (1 + number % 3))))
        answers = tuple((f"a red {'card' * (1 + k)} {number}", 1.0) for k in range(1 + number % 3))
        made.append(dataclasses.replace(sample, messages=(asked, sample.messages[1]), answers=answers))
    return made


def judged(folder: Path, count: int = 6) -> list[Sample]:
    """Sentences about two images, the first of different lengths, true or false."""
    made = []
    for number, sample in enumerate(pairs(folder, count)):
        text = TextPart(f"the ball is {'very ' * (number % 3)}red in image {number}.")
        images = (*sample.images, picture(folder, f"second{number}", (30, 40 + number), 9 * number + 1))
        answer = Message("assistant", (TextPart("True" if number % 2 else "False"),))
        messages = (Message("user", (ImagePart(), ImagePart(), text)), answer)
        made.append(dataclasses.replace(sample, messages=messages, images=images))
    return made


def asked_about(folder: Path) -> list[Sample]:
    """Prompts of very different length about one image, or two."""

    def ask(name: str, text: str, number: int) -> Sample:
        images = tuple(picture(folder, f"asked {name}{k}", (40, 30), 7 * len(text) + k) for k in range(number))
        message = Message("user", (*(ImagePart() for _ in images), TextPart(text)))
        return Sample(name, (message, Message("assistant", (TextPart("yes"),))), images)

    return [
        ask("long", "what? " * 50, 2),
        ask("short", "who?", 1),
        ask("one", "a b c d?", 1),
        ask("far", "no. " * 9, 1),
    ]


def judged_about(folder: Path) -> list[Sample]:
    """Sentences of very different length about two images."""
    made = []
    for number, sample in enumerate(judged(folder, 8)):
        sentence = TextPart("the ball is red. " * (1, 9, 2, 12)[number % 4])
        made.append(
            dataclasses.replace(
                sample, messages=(Message("user", (ImagePart(), ImagePart(), sentence)), sample.messages[1])
            )
        )
    return made
