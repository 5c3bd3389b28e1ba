"""Finding the texts of an image and the image of a text among all of a test set.

As in ALBEF, BLIP and BLIP-2: embeddings give a score to every pair; where the system can look at a pair more closely,
the `rerank` best of every image and every text are scored again, by the sum of both, and all others come behind them in
the order they had.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.batch import SampleInfo
from vlm.errors import UserError
from vlm.evaluation.judges import Judge
from vlm.evaluation.retrieval_table import Kept, Pairs, Table, rank_of
from vlm.monitoring.over_ranks import exchange


class Embeddings(NamedTuple):
    """What a system makes of a pack of images with texts.

    Attributes:
        image: float[B, D], normalised, or float[B, Q, D]; of several queries the best one counts (BLIP-2).
        text: float[T, D], normalised.
        owner: int64[T], sample in the pack that each text belongs to.
        image_state: float[B, ...], what `match` sees of an image; None: pairs are not looked at again.
        text_state: [T, ...], what `match` sees of a text; of one shape in all packs.
    """

    image: Tensor
    text: Tensor
    owner: Tensor
    image_state: Tensor | None = None
    text_state: Tensor | None = None

    def of_samples(self, samples: Sequence[int]) -> "Embeddings":
        """Those of some samples of the pack, numbered anew; `samples` ascends."""
        kept = torch.tensor([*samples], dtype=torch.int64, device=self.owner.device)
        texts = torch.isin(self.owner, kept).nonzero().squeeze(1)
        return Embeddings(
            self.image[kept],
            self.text[texts],
            torch.searchsorted(kept, self.owner[texts]),
            None if self.image_state is None else self.image_state[kept],
            None if self.text_state is None else self.text_state[texts],
        )


def concat_embeddings(parts: Sequence[tuple[Embeddings, int]]) -> Embeddings:
    """Embeddings of several packs, each with its number of samples; what a pack has beyond them is cut off."""
    found = [said.of_samples(range(size)) for said, size in parts]
    starts = itertools.accumulate((size for _, size in parts), initial=0)
    owners = [said.owner + start for said, start in zip(found, starts, strict=False)]

    def joined(name: str) -> Any:
        values = [getattr(said, name) for said in found]
        return None if values[0] is None else torch.cat(values)

    return Embeddings(joined("image"), joined("text"), torch.cat(owners), joined("image_state"), joined("text_state"))


class Retrieval(Judge):
    """Recall of image-text retrieval in both directions: TR@k, the share of images with one of their own texts among
    the k best, and IR@k, the share of texts with their own image among the k best.

    Samples are images with at least one text, in `answers` or as the system's codec has it; samples with one `group`
    show the same image. What is kept of a rank's samples lies on the CPU of that rank; embeddings and texts are
    exchanged, images are not.

    Args:
        ranks: the k.
        rerank: how many of the best pairs of every image and every text are looked at again (`match`); 0: none.
        batch_size: pairs that are looked at together.
    """

    wants_answers = False

    def __init__(self, ranks: Sequence[int] = (1, 5, 10), rerank: int = 0, batch_size: int = 64) -> None:
        if not ranks or min(ranks) < 1 or rerank < 0 or batch_size < 1:
            found = f"{list(ranks)}, {batch_size} and {rerank}"
            raise UserError(f"Retrieval: ranks and batch_size start at 1 and rerank at 0, found {found}")
        self.ranks, self.rerank, self.batch_size = tuple(ranks), rerank, batch_size
        self.heard: list[tuple[Embeddings, list[SampleInfo]]] = []
        self.found: list[dict[str, Any]] = []

    def start(self, device: torch.device) -> None:
        self.heard, self.found = [], []

    def ask(self, module: Any, batch: Any) -> Embeddings:
        embeddings: Embeddings = module.embeddings(batch)
        return embeddings

    def hear(self, said: Embeddings, samples: Sequence[SampleInfo]) -> None:
        kept = [at for at, sample in enumerate(samples) if not sample.filler]
        on_cpu = Embeddings(*(None if value is None else value.cpu() for value in said))  # type: ignore[arg-type]
        self.heard.append((on_cpu.of_samples(kept), [samples[at] for at in kept]))

    @torch.no_grad()
    def finish(self, module: Any) -> dict[str, float]:
        own = _joined(self.heard)
        everyone = exchange(None if own is None else own.shared())
        ranks = [part for part in everyone if part is not None]
        if not ranks:
            return {}
        if lost := {name for part in ranks for name in part.images} - {name for part in ranks for name in part.texts}:
            raise UserError(f"evaluation: sample {min(lost)!r} has no text to find; add one, or leave the sample out")
        name, times = Counter(name for part in ranks for name in part.images).most_common(1)[0]
        if times > 1:
            raise UserError(
                f"evaluation: image {name!r} is there {times} times, so texts of it would find another one; list it "
                "once, with all of its texts"
            )
        table = Table(everyone, self._look_again(module, own, everyone) if self.rerank else None)
        places = {name: torch.cat(exchange(found)) for name, found in table.first_right().items()}
        images = (name for part in ranks for name in part.images)
        self.found = [
            {"image": name, "texts before the first right one": before}
            for name, before in zip(images, places["TR"].tolist(), strict=True)
        ]
        return {f"{name}@{k}": float((found < k).float().mean()) for name, found in places.items() for k in self.ranks}

    def records(self) -> list[dict[str, Any]]:
        return self.found

    def _look_again(self, module: Any, own: Kept | None, everyone: Sequence[Kept | None]) -> Pairs:
        """The best pairs of every image and of every text, looked at by the rank that has the image."""
        ranks = [part for part in everyone if part is not None]
        if any(part.text_state is None or part.state_shape is None for part in ranks):
            raise UserError(f"evaluation: {module.system} does not look at pairs again; set rerank to 0")
        table = Table(everyone)
        chosen = torch.cat(exchange(table.best(self.rerank))).unique()  # by image, then by text
        pairs = torch.stack([chosen // len(table.texts), chosen % len(table.texts)], dim=1)
        ends = torch.tensor([0 if part is None else len(part.images) for part in everyone]).cumsum(0)
        shares = torch.tensor_split(pairs, torch.searchsorted(pairs[:, 0].contiguous(), ends)[:-1])
        states = torch.cat([part.text_state for part in ranks if part.text_state is not None])
        images = own.image_state if own is not None else None
        if images is None:  # the others wait for a sharded network together
            images = torch.zeros(1, *(ranks[0].state_shape or ()))
        mine = shares[rank_of(everyone)]
        looked_at = torch.zeros(len(mine))
        for start in range(0, max(len(share) for share in shares), self.batch_size):
            chunk = mine[start : start + self.batch_size]
            asked = chunk - torch.tensor([table.own_images.start, 0]) if len(chunk) else torch.zeros(1, 2).long()
            said = module.match(images[asked[:, 0]], states[asked[:, 1]]).float().cpu()
            looked_at[start : start + len(chunk)] = said[: len(chunk)] + table.scores_of(chunk)
        return Pairs(pairs, torch.cat(exchange(looked_at)))


def _joined(heard: Sequence[tuple[Embeddings, list[SampleInfo]]]) -> Kept | None:
    parts = [(said, [info.group or info.id for info in infos]) for said, infos in heard if infos]
    if not parts:
        return None

    def states(name: str) -> Tensor | None:
        found = [getattr(said, name) for said, _ in parts]
        return None if found[0] is None else torch.cat(found)

    return Kept(
        torch.cat([said.image for said, _ in parts]),
        torch.cat([said.text for said, _ in parts]),
        [name for _, names in parts for name in names],
        [names[at] for said, names in parts for at in said.owner.tolist()],
        states("text_state"),
        states("image_state"),
    )
