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
from torch import Tensor, distributed

from vlm.batch import SampleInfo
from vlm.errors import UserError
from vlm.evaluation.judges import Judge

_BEHIND = -100.0
"""Added to the score of a pair that is not looked at again; published code takes this alone, and so leaves the order of
such pairs to chance."""


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


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """float[I, T] scores of all pairs of float[I, D] or float[I, Q, D] and float[T, D]."""
    if images.ndim == 2:
        return images @ texts.T
    return torch.einsum("iqd,td->iqt", images, texts).amax(1)


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
        everyone = _exchange(None if own is None else own.shared())
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
        scores = similarities(torch.cat([part.image for part in ranks]), torch.cat([part.text for part in ranks]))
        if self.rerank:
            scores = self._look_again(module, scores, own, everyone)
        number: dict[str, int] = {}
        shown = torch.tensor([number.setdefault(name, len(number)) for part in ranks for name in part.images])
        meant = torch.tensor([number[name] for part in ranks for name in part.texts])
        places = {"TR": _first_right(scores, shown, meant), "IR": _first_right(scores.T, meant, shown)}
        images = (name for part in ranks for name in part.images)
        self.found = [
            {"image": name, "texts before the first right one": before}
            for name, before in zip(images, places["TR"].tolist(), strict=True)
        ]
        return {f"{name}@{k}": float((found < k).float().mean()) for name, found in places.items() for k in self.ranks}

    def records(self) -> list[dict[str, Any]]:
        return self.found

    def _look_again(
        self, module: Any, scores: Tensor, own: "_Kept | None", everyone: "Sequence[_Kept | None]"
    ) -> Tensor:
        """float[I, T]: the scores of the best pairs, looked at by the rank that has the image."""
        ranks = [part for part in everyone if part is not None]
        if any(part.text_state is None or part.state_shape is None for part in ranks):
            raise UserError(f"evaluation: {module.system} does not look at pairs again; set rerank to 0")
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for dim in (0, 1):
            chosen.scatter_(dim, scores.topk(min(self.rerank, scores.shape[dim]), dim=dim).indices, True)
        pairs = list(chosen.split([0 if part is None else len(part.images) for part in everyone]))
        places = [part.nonzero() for part in pairs]
        rank = distributed.get_rank() if len(everyone) > 1 else 0
        states = torch.cat([part.text_state for part in ranks if part.text_state is not None])
        images = own.image_state if own is not None else None
        if images is None:  # the others wait for a sharded network together
            images = torch.zeros(1, *(ranks[0].state_shape or ()))
        mine = places[rank]
        looked_at = torch.zeros(len(mine))
        for start in range(0, max(len(part) for part in places), self.batch_size):
            chunk = mine[start : start + self.batch_size]
            asked = chunk if len(chunk) else torch.zeros(1, 2, dtype=torch.int64)
            said = module.match(images[asked[:, 0]], states[asked[:, 1]]).float().cpu()
            looked_at[start : start + len(chunk)] = said[: len(chunk)]
        again = scores + _BEHIND
        again[chosen] = torch.cat(_exchange(looked_at)) + scores[chosen]  # both run over images, then over texts
        return again


class _Kept(NamedTuple):
    """What one rank has heard: `Embeddings` of all its packs, and which image each of them shows or means."""

    image: Tensor
    text: Tensor
    images: list[str]
    texts: list[str]
    text_state: Tensor | None
    image_state: Tensor | None
    state_shape: tuple[int, ...] | None = None

    def shared(self) -> "_Kept":
        """What other ranks need of it."""
        shape = None if self.image_state is None else tuple(self.image_state.shape[1:])
        return self._replace(image_state=None, state_shape=shape)


def _joined(heard: Sequence[tuple[Embeddings, list[SampleInfo]]]) -> _Kept | None:
    parts = [(said, [info.group or info.id for info in infos]) for said, infos in heard if infos]
    if not parts:
        return None

    def states(name: str) -> Tensor | None:
        found = [getattr(said, name) for said, _ in parts]
        return None if found[0] is None else torch.cat(found)

    return _Kept(
        torch.cat([said.image for said, _ in parts]),
        torch.cat([said.text for said, _ in parts]),
        [name for _, names in parts for name in names],
        [names[at] for said, names in parts for at in said.owner.tolist()],
        states("text_state"),
        states("image_state"),
    )


def _first_right(scores: Tensor, asked: Tensor, candidates: Tensor) -> Tensor:
    """int64[N]: how many candidates stand before the best right one, of float[N, C] scores; of equals the first."""
    found = [
        (candidates[row.argsort(descending=True, stable=True)] == wanted).nonzero()[0, 0]
        for row, wanted in zip(scores, asked, strict=True)
    ]
    return torch.stack(found)


def _exchange(value: Any) -> list[Any]:
    """A value of every rank, in their order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
