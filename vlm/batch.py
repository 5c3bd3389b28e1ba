"""What travels from the loader to a system: text as padding-free rows, images as views.

Shape legend (used in every docstring of the project)::

    N  tokens in a row           S  sequences in a row        L  label positions in a row
    V  views of one stream       B  samples in a pack         P  tokens of one view       D  width

A *pack* is the part of one optimizer step that one device computes at once. Its sequences lie one after another in one
`Row`; attention stays inside a sequence through `cu_seqlens`. Nothing is padded; `Row.padded` exists for the short text
encoders and T5, whose attention needs a rectangle.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlm.levels import look_up

IGNORE = -100
"""Target of a position that is not trained."""
EVENTS = ("cut_documents", "dropped_images", "cut_instructions", "cut_answers")
"""What happened to samples on their way into the step; logged beside the losses."""
NOT_TERMS = ("samples", "images", *EVENTS)
"""Entries of `Batch.counts` that are no denominator of a loss term."""
Negatives = Literal["pack", "step"]
"""What a sample is compared with by an in-batch objective: the samples of its pack, or of all packs of the step."""


@dataclass(frozen=True)
class TokenSequence:
    """One sequence before it is laid into a row.

    Attributes:
        ids: int64[n] input tokens; the ids at `slots` are never looked at.
        targets: int64[n], the token that position i has to predict, `IGNORE` where nothing is trained
            (see `next_token_targets` for decoders).
        weight: factor on the loss of every trained position of this sequence (BLIP's answers: count / 10), or
            float32[n], one for each position (answers of a conversation that count more or less).
        slots: per stream of views, int64[k] positions that image features take, in the order of the features.
        owner: position of the sample in its pack that the sequence belongs to; set by `Row.pack`'s caller.
        positions: int64[n], where they are not 0, 1, 2, ... (CogVLM: the tokens of an image share one).
        visual: int64[k] in ascending order, the tokens that layers treat as an image, where these are not the slots
            (CogVLM: the mark before an image is one, the mark behind it is text).
    """

    ids: Tensor
    targets: Tensor
    weight: float | Tensor = 1.0
    slots: Mapping[str, Tensor] = field(default_factory=dict)
    owner: int = 0
    positions: Tensor | None = None
    visual: Tensor | None = None


def next_token_targets(labels: Tensor) -> Tensor:
    """Labels that sit on their own token (the Hugging Face convention) as targets of the position before.

    Args:
        labels: int64[n], `IGNORE` where not trained. The first one can never be predicted and is dropped.
    """
    return torch.cat([labels[1:], labels.new_full((1,), IGNORE)])


class Padded(NamedTuple):
    """A row as a rectangle: int64[S, max_len] ids (right-padded) and bool[S, max_len] mask."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Row:
    """Sequences laid one after another.

    Attributes:
        ids: int64[N].
        positions: int64[N], by default counted from 0 inside each sequence.
        cu_seqlens: int32[S + 1], where sequences start; the last entry is N.
        max_len: length of the longest sequence, a plain int (varlen attention asks for one without a GPU sync).
        label_positions: int64[L], positions whose output is trained. Kept as indices so that the step selects them
            before the vocabulary projection without a GPU sync.
        targets: int64[L], the token each of them has to predict.
        weights: float32[L], factor on each one's loss.
        slots: per stream of views, int64[K] positions that take image features, in the order of the features.
        owner: int64[S], sample in the pack that each sequence belongs to.
        visual: int64[K], the tokens that layers treat as an image, in ascending order; by default all slots.
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_len: int
    label_positions: Tensor
    targets: Tensor
    weights: Tensor
    slots: Mapping[str, Tensor]
    owner: Tensor
    visual: Tensor

    @classmethod
    def pack(cls, sequences: Sequence[TokenSequence], streams: Sequence[str] = ()) -> "Row":
        """Lays `sequences` one after another; `streams` names the view streams that have an entry in `slots`."""
        if not sequences:
            raise ValueError("a row needs at least one sequence")
        lengths = torch.tensor([len(sequence.ids) for sequence in sequences])
        starts = lengths.cumsum(0) - lengths
        targets = torch.cat([sequence.targets for sequence in sequences])
        label_positions = (targets != IGNORE).nonzero().squeeze(1)
        ones = (torch.ones(len(sequence.ids), dtype=torch.float32) for sequence in sequences)
        weights = torch.cat([one * sequence.weight for one, sequence in zip(ones, sequences, strict=True)])
        empty = torch.zeros(0, dtype=torch.int64)

        def positions(sequence: TokenSequence) -> Tensor:
            return torch.arange(len(sequence.ids)) if sequence.positions is None else sequence.positions

        def visual(sequence: TokenSequence) -> Tensor:
            slots = [sequence.slots.get(name, empty) for name in streams] or [empty]
            return torch.cat(slots).unique() if sequence.visual is None else sequence.visual

        return cls(
            ids=torch.cat([sequence.ids for sequence in sequences]),
            positions=torch.cat([positions(sequence) for sequence in sequences]),
            cu_seqlens=torch.cat([starts, lengths.sum()[None]]).to(torch.int32),
            max_len=int(lengths.max()),
            label_positions=label_positions,
            targets=targets[label_positions],
            weights=weights[label_positions],
            slots={
                name: torch.cat([s.slots.get(name, empty) + start for s, start in zip(sequences, starts, strict=True)])
                for name in streams
            },
            owner=torch.tensor([sequence.owner for sequence in sequences]),
            visual=torch.cat([visual(s) + start for s, start in zip(sequences, starts, strict=True)]),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Row":
        return _to_device(self, device, non_blocking)

    def padded(self, pad_id: int) -> Padded:
        """The same sequences as a right-padded rectangle, for text encoders of at most 128 tokens and for T5."""
        ids = self.ids.new_full((len(self.owner), self.max_len), pad_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        index = self.padded_index()
        ids.view(-1)[index] = self.ids
        mask.view(-1)[index] = True
        return Padded(ids, mask)

    def padded_index(self) -> Tensor:
        """int64[N]: where each token of the row stands in the flattened rectangle of `padded`."""
        bounds = self.cu_seqlens.to(torch.int64)
        place = torch.arange(len(self.ids), device=self.ids.device)
        sequence = torch.searchsorted(bounds[1:], place, right=True)
        return place - bounds[sequence] + sequence * self.max_len


@dataclass(frozen=True)
class Views:
    """Pictures of one resolution that go through one tower together.

    Attributes:
        values: uint8[V, 3, H, W], levels of colours, which `table` normalises; or float32[V, 3, H, W], normalised.
        image_of_view: int64[V], image (counted over the pack) that each view shows.
        sample_of_image: int64[I], sample in the pack that each image belongs to.
        grid: per image (columns, rows) of its tiles; (1, 1) when it is one view.
        size: per image (width, height) in pixels of the original.
        layout: int64[K], which feature each image token shows, counted over the features of all views; the numbers
            behind the last feature stand for what the system puts between them (a newline). None: every feature in
            order.
        cu_seqlens: int32[S + 1], where the features of each sequence start, of a stream that layers look at.
        max_len: most of these features of a sequence, a plain int.
        table: float32[3, 256], what each level becomes (`vlm.levels`).
        whole: float32[I, 3, H, W], normalised: a view of each image that `values` lacks, in front of the tiles of its
            `grid`.
        keys: of each view, a name for its pixels, where features are kept under it; empty elsewhere.
    """

    values: Tensor
    image_of_view: Tensor
    sample_of_image: Tensor
    grid: tuple[tuple[int, int], ...]
    size: tuple[tuple[int, int], ...]
    layout: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_len: int = 0
    table: Tensor | None = None
    whole: Tensor | None = None
    keys: tuple[str, ...] = ()

    @property
    def pixels(self) -> Tensor:
        """float32[V, 3, H, W], normalised; made where `values` are, each time that it is asked for."""
        pixels = self.values if self.table is None else look_up(self.values, self.table)
        if self.whole is None:
            return pixels
        tiles = pixels.split([columns * rows for columns, rows in self.grid])
        return torch.cat([view for image in zip(self.whole[:, None], tiles, strict=True) for view in image])

    @classmethod
    def blank(cls, height: int, width: int, *, device: torch.device | str) -> "Views":
        """One view without content, of an image of the first sample."""
        first = torch.zeros(1, dtype=torch.int64, device=device)
        values = torch.zeros(1, 3, height, width, device=device)
        return cls(values, image_of_view=first, sample_of_image=first, grid=((1, 1),), size=((width, height),))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Views":
        return _to_device(self, device, non_blocking)


@dataclass(frozen=True)
class SampleInfo:
    """What a person needs to find a sample again, and what metrics need to judge an answer to it."""

    id: str
    source: str
    task: str | None = None
    group: str | None = None
    answers: tuple[tuple[str, float], ...] = ()
    choices: tuple[str, ...] = ()
    filler: bool = False
    """True for a copy with no label that keeps a device busy in a step with fewer samples than devices."""


@dataclass(frozen=True)
class Batch:
    """One pack.

    Attributes:
        text: the row of the language model (decoder-only systems), of the encoder (T5) or of the text tower (BLIP).
        rows: further rows: `decoder` (T5), `qformer` (InstructBLIP), `answers` (BLIP VQA), `candidates` (ranking).
        views: images by stream: `image`, `high` (CogAgent).
        samples: one entry per sample.
        counts: denominators of the *whole optimizer step*, over all devices and micro-batches: one entry per loss
            term (`lm`, `itc`, ...) plus `NOT_TERMS`. Plain numbers: no collective, no GPU sync.
        labels: per-sample tensors of in-batch objectives: `image_id` int64[B] (retrieval).
        packs: number of packs in the step, so that a mean over packs can be turned into the sum over the step.
        judged_by: who judges what is said to this pack (`vlm.evaluation.judges`); None where its loss is wanted.
        negatives: see `Negatives`; None where packs are balanced and samples never meet.
        pack: number of this pack in its step. With `negatives` all packs of a step have as many samples.
        seed: of the step, the same in all of its packs; None in evaluation.
        real: bool[B], False for fillers, which belong in no in-batch term; made from `samples`.
    """

    text: Row
    rows: Mapping[str, Row]
    views: Mapping[str, Views]
    samples: tuple[SampleInfo, ...]
    counts: Mapping[str, float]
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    packs: int = 1
    judged_by: str | None = None
    negatives: Negatives | None = None
    pack: int = 0
    seed: int | None = None
    real: Tensor = None  # type: ignore[assignment]  # never None: see `__post_init__`

    def __post_init__(self) -> None:
        if self.real is None:
            object.__setattr__(self, "real", torch.tensor([not info.filler for info in self.samples]))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return _to_device(self, device, non_blocking)


def _to_device(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Mapping):
        return {name: _to_device(item, device, non_blocking) for name, item in value.items()}
    if isinstance(value, (Row, Views, Batch)):
        moved = {f.name: _to_device(getattr(value, f.name), device, non_blocking) for f in dataclasses.fields(value)}
        return type(value)(**moved)
    return value
