"""Embeddings of images and texts for procedures: by transformers' CLIP, or by any system that has them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlm.checkpoints.files.identity import fingerprint_of_files
from vlm.errors import SampleError, UserError
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart


class CLIPScorer(nn.Module):
    """CLIP (Radford et al., 2021), as BLIP-2 ranks captions with it.

    Args:
        folder: of a `CLIPModel`, its tokenizer and its image processor.

    Raises:
        UserError: something of it is missing.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        super().__init__()
        try:
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: is no folder of CLIP ({str(error).splitlines()[0]})") from error
        self.max_tokens = int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def embed_images(self, images: Sequence[ImageFile]) -> Tensor:
        """float32[N, D], normalised."""
        read = [image.read(_showing(image)) for image in images]
        pixels = self.processor(images=read, return_tensors="pt")["pixel_values"].to(self.model.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """float32[N, D], normalised; a text over CLIP's limit is cut off, as CLIP is used everywhere."""
        given = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.model.device)
        mask = given["attention_mask"]
        pooled = self.model.text_model(input_ids=given["input_ids"], attention_mask=mask).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)


class SystemScorer(nn.Module):
    """A system with embeddings (BLIP, BLIP-2 of stage 1).

    Raises:
        UserError: the system has none.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def embed_images(self, images: Sequence[ImageFile]) -> Tensor:
        """float32[N, D] or of several queries float32[N, Q, D], normalised."""
        embedded = self.module.embed([_showing(image) for image in images], batch_size=len(images))
        return embedded.image.float()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """float32[N, D], normalised."""
        blank = ImageFile("blank", image=Image.new("RGB", (32, 32)))  # a sample has to have one
        embedded = self.module.embed(_showing(blank, *texts))
        return embedded.text.float()


Scorer = CLIPScorer | SystemScorer


def open_scorer(weights: str, *, device: str | None = None) -> Scorer:
    """Transformers' CLIP of a folder, or a system; on the CPU where no device is given.

    Raises:
        UserError: it is neither.
    """
    if _is_clip(weights):
        clip = CLIPScorer(Path(weights))
        return clip if device is None else clip.to(device)
    from vlm.loading import load

    return SystemScorer(load(weights, device=device))


def fingerprint(weights: str) -> str:
    """By which whoever wrote or judged a text is known again."""
    from vlm.checkpoints.published.open import find_weights, is_artefact
    from vlm.checkpoints.resume.opened import read_trained

    if _is_clip(weights):
        return fingerprint_of_files(sorted(Path(weights).glob("*.safetensors")) or sorted(Path(weights).glob("*.bin")))
    found = find_weights(weights)
    if is_artefact(found):
        return read_trained(found).fingerprint
    files = sorted(file for file in Path(found).rglob("*") if file.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    return fingerprint_of_files(files) if files else str(found)


def judged_texts(module: Any, samples: Sequence[Sample]) -> list[SampleError | None]:
    """What is wrong with each text: one that a system does not take must not cost the others."""

    def fault(sample: Sample) -> SampleError | None:
        try:
            module.codec.encode(sample)
        except SampleError as error:
            return error
        return None

    return [fault(sample) for sample in samples]


def _is_clip(weights: str) -> bool:
    config = Path(weights) / "config.json"
    try:
        return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "clip"
    except (ValueError, AttributeError):
        return False


def _showing(image: ImageFile, *texts: str) -> Sample:
    given = texts or (".",)  # a sample has to have one
    messages = (Message("user", (ImagePart(),)), Message("assistant", (TextPart(given[0]),)))
    return Sample(image.name, messages, (image,), answers=tuple((text, 1.0) for text in given))
