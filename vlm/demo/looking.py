"""Pretrains the demo's Q-Former on training scenes: each query learns where to look, and for what.

BLIP-2's queries learn it from 129 million pairs with texts, which no laptop repeats. Here the image is divided into
four by four places; of each, one query learns to say the colour and one the name. What reads and writes is left as BERT
has it, and so is the self-attention, which both share.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlm.connectors import QFormer
from vlm.demo.one_cycle import OneCycle
from vlm.demo.scenes import COLORS
from vlm.demo.sprites import NOUNS, WORDS
from vlm.demo.tower import LabelledViews, squashed_scene
from vlm.prompts import BertTokenizer
from vlm.stages import Stage, Trained
from vlm.systems import BLIP2QFormer
from vlm.vision import TimmTower

GRID = 4
STEPS = 1200
_RATE = 2e-3
_BATCH = 32


def new_qformer(*, bert: Path, eva: Path, options: dict[str, Any]) -> BLIP2QFormer:
    """BLIP-2's first stage before it has seen an image; what of its Q-Former looks at images is trained.

    Args:
        bert: folder of the text model it starts from.
        eva: folder of the tower.
        options: of the tower.
    """
    module = BLIP2QFormer(
        vision=TimmTower("eva_giant_patch14_clip_224", layer=-2, class_token=True, weights=str(eva), options=options),
        qformer=QFormer(
            dim=96,
            num_layers=4,
            num_heads=4,
            mlp_dim=256,
            vocab_size=701,
            num_queries=2 * GRID * GRID,
            dropout=0.0,
            text=True,
            head=True,
            weights=str(bert),
        ),
        tokenizer=BertTokenizer(str(bert), added_tokens=["[DEC]"]),
        dim=64,
    )
    how = Trained(lr=_RATE, weight_decay=0.05)
    looks = ("queries", "feature_norm", "layers.*.cross_attention.*", "layers.*.query_mlp.*")
    module.stage = Stage("pretrained", {f"qformer.{name}": how for name in looks})
    module.configure_model()
    return module


class _Readers(nn.Module):
    """Linear readers of the queries: every second one has a colour, the others a thing or a word; thrown away."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.color = nn.Linear(dim, len(COLORS) + 1)
        self.name = nn.Linear(dim, len(NOUNS) + len(WORDS) + 1)

    def forward(self, queries: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, float[2]: share of the places on something whose name and colour are known)."""
        noun, color, word = (labels[..., :3] + 1).long().unbind(-1)
        name = torch.where(word > 0, word + len(NOUNS), noun)
        told = ((self.name(queries[:, 1::2]), name), (self.color(queries[:, ::2]), color))
        loss = torch.stack([F.cross_entropy(logits.flatten(0, 1), wanted.flatten()) for logits, wanted in told])
        right = [(logits.argmax(-1) == wanted)[wanted > 0].float().mean() for logits, wanted in told]
        return loss.sum(), torch.stack(right).detach()


def train_queries(module: Any, *, steps: int = STEPS) -> Iterator[str]:
    """Trains what the stage of the system trains, in place.

    Yields:
        A line of progress every hundred steps.
    """
    module.stage.set_trainable(module)
    readers = _Readers(module.qformer.queries.shape[-1])
    groups = [*module.stage.optimizer_groups(module), {"params": list(readers.named_parameters()), "lr": _RATE}]
    cycle = OneCycle(torch.optim.AdamW(groups, betas=(0.9, 0.98)), steps=steps)
    data = LabelledViews(squashed_scene, size=module.tower.image_size, grid=GRID, num=steps * _BATCH)
    for step, (pixels, labels) in enumerate(DataLoader(data, batch_size=_BATCH, num_workers=1)):
        with torch.no_grad():
            features = module.vision(pixels)
        loss, right = readers(module.qformer.look(features).hidden, labels)
        cycle.step(loss)
        if step % 100 == 99:
            name, color = right.tolist()
            yield f"{step + 1}: name {name:.3f} color {color:.3f}"
    module.eval()
