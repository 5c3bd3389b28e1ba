"""Running a system on samples outside of training."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.batch import Batch, Row
from vlm.building.precision import autocast
from vlm.codec import Codec, step_counts
from vlm.errors import SampleError, UserError
from vlm.language import Decoding
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart


def make_filler(codec: Codec) -> Sample:
    """A sample that nobody asked about, for a rank that has none: a text, with an image where the system needs one."""
    images: tuple[ImageFile, ...] = ()
    if codec.needs_image:
        file = io.BytesIO()
        Image.new("RGB", (32, 32)).save(file, "PNG")
        images = (ImageFile("filler", data=file.getvalue()),) * codec.min_images
    asked = Message("user", (*(ImagePart() for _ in images), TextPart(".")))
    answer = Message("assistant", (TextPart(codec.answers[0] if codec.answers else "."),))
    return Sample("filler", (asked, answer), images, source="")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, no gradients and all of `module` in eval mode; afterwards each child is in the mode it was in.

    A network that keeps frozen weights in half precision computes as its trainer does.
    """
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), autocast(module):
            yield
    finally:
        for child, training in modes:
            child.training = training


def chunks_in_step(module: Any, samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Chunks of at most `size` samples; empty ones where another rank of a sharded system has more."""
    chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
    return chunks + [()] * (int(module.over_ranks(len(chunks), "max")) - len(chunks))


def as_pack(module: Any, samples: Sequence[Sample], *, generate: bool) -> Batch:
    """A pack of the samples, or of a filler where there are none, on the module's device."""
    items = [module.codec.encode(sample, generate=generate) for sample in samples or [make_filler(module.codec)]]
    counts = step_counts(items)
    counts["images"] = module.over_ranks(counts["images"], "sum")
    return module.codec.collate(items, counts=counts).to(module.device)


def unreadable(codec: Codec, sample: Sample) -> SampleError | None:
    """What is wrong with a sample that is to be asked about: one bad image must not take its batch along."""
    try:
        codec.encode(sample, generate=True)
        for image in sample.images:
            image.read(sample)
    except SampleError as error:
        return error
    return None


def answer_each(
    module: Any, samples: Sequence[Sample | SampleError], *, decoding: Any, batch_size: int
) -> list[str | SampleError]:
    """An answer to each sample, or why there is none. The ranks of a sharded system call it together."""
    found = [s if isinstance(s, SampleError) else unreadable(module.codec, s) or s for s in samples]
    good = [sample for sample in found if isinstance(sample, Sample)]
    answers = iter(module.generate(good, decoding=decoding, batch_size=batch_size))
    return [sample if isinstance(sample, SampleError) else next(answers) for sample in found]


def decoding_of(decoding: Decoding | None, options: Mapping[str, Any]) -> Decoding:
    """How answers are searched for, with options of it given by name.

    Raises:
        UserError: there is no such option.
    """
    known = [field.name for field in fields(Decoding)]
    if unknown := sorted(options.keys() - set(known)):
        raise UserError(f"generate: there is no option {unknown[0]!r}; there are {', '.join(known)}")
    return replace(decoding or Decoding(), **options)


def label_scores(logits: Tensor, row: Row, num_samples: int) -> list[Tensor]:
    """Log-probability of each label token, by sample.

    Args:
        logits: float[L, vocabulary].

    Returns:
        Per sample float32[its labels], in the order of its sequences.
    """
    values = logits.float().log_softmax(-1).gather(1, row.targets[:, None]).squeeze(1)
    sequence = torch.searchsorted(row.cu_seqlens[1:].to(torch.int64), row.label_positions, right=True)
    owner = row.owner[sequence]
    return [values[owner == sample] for sample in range(num_samples)]
