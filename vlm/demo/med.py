"""Pretrains the text model of the demo's BLIP on training scenes: it reads, checks and writes captions of images.

BLIP learns where to look from 129 million pairs, each of which says one bit about it; a demo has minutes. Here every
word of a caption says something. Some are masked and have to be named; in half of the captions some are exchanged for
others of their kind (another thing, colour, place or word of a sign), and of each it has to be said whether it holds.
[ENC] says whether all of them do. The tower stays as it is, and no question is asked.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from vlm.batch import IGNORE
from vlm.demo import tasks
from vlm.demo.one_cycle import OneCycle
from vlm.demo.scenes import COLORS
from vlm.demo.sprites import NOUNS, WORDS
from vlm.demo.tower import squashed_scene
from vlm.language import Med
from vlm.levels import level_table, levels_of, look_up
from vlm.prompts import BertTokenizer
from vlm.prompts.cleaning import clean_caption
from vlm.stages import Stage, Trained
from vlm.systems import BLIP
from vlm.systems.blip_base import DECODER, ENCODER
from vlm.vision import TimmTower
from vlm.vision.preprocess import CLIP_MEAN, CLIP_STD

STEPS = 800
_RATE = 2e-3
_BATCH = 32
_MASKED_SHARE = 0.35
_WRONG_SHARE = 0.25
_KINDS = (
    *([noun.name for noun in NOUNS], list(COLORS), ["top", "bottom"], ["left", "right"]),
    [word.lower() for word in WORDS],
)
_KIND_OF = {word: kind for kind in reversed(_KINDS) for word in kind}


class Told(NamedTuple):
    """An image and its caption, for each use of the text model; of a batch with B in front, and padded.

    Attributes:
        pixels: float32[3, size, size].
        written: int64[n], the caption as it is, [DEC] in front and [SEP] behind.
        read: int64[m], [ENC] in front, with masks and exchanged words.
        names: int64[m], what stood under the masks, IGNORE elsewhere.
        holds: int64[m], of the words that could be exchanged 1 where it is the caption's own and 0 where it is not; of
            [ENC] whether all are; IGNORE elsewhere.
    """

    pixels: Tensor
    written: Tensor
    read: Tensor
    names: Tensor
    holds: Tensor


class ToldScenes(Dataset):
    """Training scene number `index` as `Told`."""

    def __init__(self, tokenizer: BertTokenizer, *, size: int, num: int) -> None:
        self.tokenizer, self.size, self.num = tokenizer, size, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Told:
        random = Random(f"med {index}")
        image, [(scene, _)] = squashed_scene(random, self.size)
        words = clean_caption(tasks.caption(scene, "en"), 100).split()
        pixels = look_up(levels_of(image), level_table(CLIP_MEAN, CLIP_STD))
        return Told(pixels, *self._told(words, random, is_right=random.random() < 0.5))

    def _told(self, words: Sequence[str], random: Random, *, is_right: bool) -> Iterator[Tensor]:
        written, read, names, holds = [self.tokenizer.token_id(DECODER)], [0], [IGNORE], [IGNORE]
        for word in words:
            own = self.tokenizer.encode(word)[0]
            written += own
            kind, chance = _KIND_OF.get(word.strip(",")), random.random()
            is_masked = kind is not None and chance < _MASKED_SHARE
            is_wrong = kind is not None and not is_right and chance > 1 - _WRONG_SHARE
            if kind is not None and is_wrong:
                other = random.choice([one for one in kind if one != word.strip(",")])
                shown = self.tokenizer.encode(other + "," * word.endswith(","))[0]
            else:
                shown = [self.tokenizer.token_id("[MASK]")] * len(own) if is_masked else own
            read += shown
            names += own if is_masked else [IGNORE] * len(shown)
            holds += [IGNORE if kind is None or is_masked else int(not is_wrong)] * len(shown)
        read[0], holds[0] = self.tokenizer.token_id(ENCODER), int(0 not in holds)
        yield torch.tensor([*written, self.tokenizer.eos_id])
        yield torch.tensor([*read, self.tokenizer.eos_id])
        yield torch.tensor([*names, IGNORE])
        yield torch.tensor([*holds, IGNORE])


def new_blip(*, bert: Path, vit: Path, options: dict[str, Any]) -> BLIP:
    """BLIP before it has seen an image; its text model and whether a pair matches are trained.

    Args:
        bert: folder of the text model it starts from.
        vit: folder of the tower.
        options: of the tower.
    """
    module = BLIP(
        vision=TimmTower("vit_base_patch16_224", class_token=True, final_norm=True, weights=str(vit), options=options),
        language=Med(dim=96, num_layers=4, num_heads=4, mlp_dim=256, vocab_size=702, dropout=0.0, weights=str(bert)),
        tokenizer=BertTokenizer(str(bert), added_tokens=[DECODER, ENCODER]),
        dim=64,
        queue=_BATCH,
    )
    how = Trained(lr=_RATE, weight_decay=0.05)
    module.stage = Stage("pretrained", {"language": how, "heads.match": how})
    module.configure_model()
    return module


def train_med(module: Any, *, steps: int = STEPS) -> Iterator[str]:
    """Trains what the stage of the system trains, in place.

    Yields:
        A line of progress every hundred steps.
    """
    module.stage.set_trainable(module)
    language, tokenizer = module.language, module.codec.tokenizer
    reader = nn.Linear(module.arguments["language"].dim, 2)  # of each word; thrown away
    groups = [*module.stage.optimizer_groups(module), {"params": list(reader.named_parameters()), "lr": _RATE}]
    cycle = OneCycle(torch.optim.AdamW(groups, betas=(0.9, 0.98)), steps=steps)
    data = ToldScenes(tokenizer, size=module.tower.image_size, num=steps * _BATCH)

    def collate(items: Sequence[Told]) -> Told:
        pixels, *texts = zip(*items, strict=True)
        fillers = (tokenizer.pad_id, tokenizer.pad_id, IGNORE, IGNORE)
        padded = [
            pad_sequence(list(own), batch_first=True, padding_value=value)
            for own, value in zip(texts, fillers, strict=True)
        ]
        return Told(torch.stack(pixels), *padded)

    mean = torch.zeros(4)
    for step, told in enumerate(DataLoader(data, batch_size=_BATCH, num_workers=1, collate_fn=collate)):
        with torch.no_grad():
            features = module.vision(told.pixels)
        wanted = told.written[:, 1:].masked_fill(told.written[:, 1:] == tokenizer.pad_id, IGNORE)
        spoken = language.logits(language.write(told.written[:, :-1], features)[wanted != IGNORE])
        seen = language.read(told.read, told.read != tokenizer.pad_id, features)
        is_told = told.holds[:, 1:] != IGNORE
        losses = torch.stack(
            [
                F.cross_entropy(spoken, wanted[wanted != IGNORE]),
                F.cross_entropy(language.logits(seen[told.names != IGNORE]), told.names[told.names != IGNORE]),
                F.cross_entropy(reader(seen[:, 1:][is_told]), told.holds[:, 1:][is_told]),
                F.cross_entropy(module.heads.match(seen[:, 0]), told.holds[:, 0]),
            ]
        )
        cycle.step(losses.sum())
        mean += losses.detach() / 100
        if step % 100 == 99:
            written, named, held, matched = mean.tolist()
            yield f"{step + 1}: written {written:.3f} named {named:.3f} held {held:.3f} matched {matched:.3f}"
            mean.zero_()
    module.eval()
