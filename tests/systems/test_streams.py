"""Two streams of views from one decode of an image, and features that depend on the batch: what CogAgent and
InstructBLIP need of the core, in one small system."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.samples import samples
from tests.support.systems import RATE, llava_1_5
from vlm.batch import Batch, TokenSequence
from vlm.codec import Encoded, ViewStream, step_counts
from vlm.sample import ImageFile, Message, Sample, TextPart
from vlm.stages import Stage
from vlm.systems import LLaVA15
from vlm.systems.spliced import SplicedCodec
from vlm.vision import RandomCropFlip
from vlm.vision.preprocess import ImageTransform


class FineCodec(SplicedCodec):
    """Every image once more at another size; the question as a row of its own; fewer tokens an image in training."""

    def __init__(self, *, high: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.high = ImageTransform(size=high, mode=self.transform.mode)
        self.seeds: list[int | None] = []

    def image_tokens(self, sample: Sample, *, seed: int | None = None) -> list[int]:
        return [tokens - (0 if seed is None else seed % 3) for tokens in super().image_tokens(sample)]

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        ids = torch.tensor(self.tokenizer.encode(sample.messages[0].content[-1].text)[0])
        asked = TokenSequence(ids, torch.full_like(ids, -100))
        return replace(super().encode(sample, seed=seed, generate=generate), rows={"asked": (asked,)})

    def streams(self, sample: Sample, *, seed: int | None = None) -> dict[str, ViewStream]:
        self.seeds.append(seed)
        return super().streams(sample, seed=seed) | {"high": ViewStream(self.high, self.high.table)}


class Fine(LLaVA15):
    """Features move with the mean of the fine view and with the question of the image's sample."""

    system = "fine"

    def __init__(self, *, high: int = 56, **kwargs: Any) -> None:
        super().__init__(high=high, **kwargs)

    def make_codec(self) -> FineCodec:
        return FineCodec(high=self.arguments["high"], **self.codec_arguments())

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        return super().view_sizes | {"high": (self.arguments["high"],) * 2}

    def encode_images(self, batch: Batch) -> Tensor:
        low, high, asked = super().encode_images(batch), batch.views["high"], batch.rows["asked"]
        sample = high.sample_of_image[high.image_of_view]
        last = asked.ids[asked.cu_seqlens[1:].long() - 1]
        questions = self.language.get_input_embeddings()(last)[sample]
        return low + high.pixels.to(low.dtype).mean((1, 2, 3))[:, None, None] + questions[:, None]


@pytest.fixture(scope="module")
def system() -> Fine:
    module = Fine(**llava_1_5().arguments)
    module.stage = Stage("test", {"vision": RATE, "connector": RATE, "language": RATE})
    module.configure_model()
    return module.double()


def ask(sample: Sample, text: str) -> Sample:
    first, *others = sample.messages
    return replace(sample, messages=(Message("user", (*first.content[:-1], TextPart(text))), *others))


def test_each_image_is_decoded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its views in both streams are of the same cut."""
    pool, reads = samples(tmp_path), Counter[str]()
    read = ImageFile.read

    def counted(self: ImageFile, sample: Sample) -> Image.Image:
        reads.update([self.name])
        return read(self, sample)

    augment = RandomCropFlip(size=28)
    codec = Fine(**llava_1_5(augment=augment).arguments).codec
    assert isinstance(codec, FineCodec)
    images = [(i, at, file) for i, sample in enumerate(pool) for at, file in enumerate(sample.images)]
    for seeds in ([None] * len(pool), range(len(pool))):
        items = [codec.encode(sample, seed=seed) for sample, seed in zip(pool, seeds, strict=True)]
        codec.seeds.clear()
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile, "read", counted)
            batch = codec.collate(items, counts=step_counts(items))
        assert codec.seeds == list(seeds)
        assert list(batch.views) == ["image", "high"]
        for name, transform in (("image", codec.transform), ("high", codec.high)):
            views = batch.views[name]
            assert views.sample_of_image.tolist() == [i for i, _, _ in images]
            assert views.image_of_view.tolist() == list(range(len(images)))
            assert views.pixels.shape == (len(images), 3, transform.size, transform.size)
        if seeds[0] is None:
            plain = llava_1_5().codec.collate(items, counts={}).views["image"]
            assert torch.equal(batch.views["image"].pixels, plain.pixels)
        else:  # a cut of 28 pixels, as it is and enlarged
            for cut, levels in zip(batch.views["image"].values, batch.views["high"].values, strict=True):
                assert torch.equal(levels, codec.high(Image.fromarray(cut.permute(1, 2, 0).numpy())))
    assert set(reads.values()) == {2}


def test_tokens_of_an_image_may_depend_on_the_seed(tmp_path: Path) -> None:
    sample, codec = samples(tmp_path)[2], Fine(**llava_1_5().arguments).codec
    widths = [len(codec.encode(sample, seed=seed).text[0].slots["image"]) for seed in (None, 0, 1, 2)]
    assert widths == [32, 32, 30, 28]


def loss_and_gradients(module: Fine, *packs: list[Sample], of: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    counts = step_counts([module.codec.encode(sample) for sample in of])
    module.zero_grad()
    total = 0.0
    for pack in packs:
        batch = module.codec.collate([module.codec.encode(sample) for sample in pack], counts=counts)
        loss = module.losses(batch)["lm"]
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}


def test_images_are_encoded_with_their_sample_in_sight(system: Fine, tmp_path: Path) -> None:
    """A pack equals its samples, one without images sees both streams blank, and the question matters."""
    pool = [ask(sample, f"What is {'abc'[i % 3]}") for i, sample in enumerate(samples(tmp_path))]
    whole, expected = loss_and_gradients(system, pool, of=pool)
    alone, single = loss_and_gradients(system, *([sample] for sample in pool), of=pool)
    assert whole == pytest.approx(alone, rel=1e-6)  # summed in float32
    for name, gradient in expected.items():
        torch.testing.assert_close(single[name], gradient, rtol=1e-9, atol=1e-12)
    without = [sample for sample in pool if not sample.images]
    _, reached = loss_and_gradients(system, without, of=pool)
    assert reached.keys() == expected.keys()
    assert not any(gradient.any() for name, gradient in reached.items() if name.startswith(("vision", "connector")))
    items = [system.codec.encode(ask(pool[0], text)) for text in ("What is a", "What is b")]
    first, second = (system.image_features(system.codec.collate([item], counts={})) for item in items)
    assert not torch.allclose(first, second)


def test_arguments_nobody_takes_are_refused() -> None:
    with pytest.raises(TypeError, match="Fine takes no argument 'hihg'"):
        Fine(**llava_1_5().arguments, hihg=3)
