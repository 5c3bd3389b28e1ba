"""Images of a folder that can be asked for by text: vectors of a CLIP, the nearest of them by faiss."""

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm.checkpoints.files.atomic import atomic_directory
from vlm.errors import SampleError, UserError
from vlm.sample import ImageFile, Sample

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_FACTS, _VECTORS = "index.json", "vectors.npy"
_BATCH = 32


class Encoder:
    """A CLIP, or a model of its kind, in the Hugging Face tools.

    Args:
        name: folder or hub id; one that reads Chinese for Chinese captions.

    Raises:
        UserError: there is none.
    """

    def __init__(self, name: str, *, device: str | None = None) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.name = name
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model: Any = AutoModel.from_pretrained(name)
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"--encoder {name}: cannot be opened ({str(error).splitlines()[0]})") from error
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise UserError(f"--encoder {name}: is a {type(model).__name__}, which does not compare texts with images")
        self.model = model.to(self.device).eval()

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """float32[N, D] of length 1."""
        return self._unit(self.model.get_image_features, self.processor(images=list(images), return_tensors="pt"))

    def text(self, text: str) -> np.ndarray:
        """float32[1, D] of length 1; what is longer than the model reads is cut off."""
        limit = self.model.config.text_config.max_position_embeddings
        return self._unit(
            self.model.get_text_features,
            self.tokenizer([text], return_tensors="pt", truncation=True, max_length=limit),
        )

    @torch.no_grad()
    def _unit(self, embed: Any, inputs: Any) -> np.ndarray:
        found = embed(**inputs.to(self.device))
        found = getattr(found, "pooler_output", found)  # a tensor before transformers 5
        return torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy()


class ImageIndex:
    """The images of a folder.

    Args:
        vectors: float32[N, D] of length 1, one for each file.
    """

    def __init__(self, encoder: Encoder, files: Sequence[Path], vectors: np.ndarray) -> None:
        try:
            import faiss
        except ImportError as error:
            raise UserError("an index of images needs faiss: pip install 'vlm[index]'") from error
        self.encoder, self.files = encoder, list(files)
        self.search = faiss.IndexFlatIP(vectors.shape[1])
        self.search.add(vectors)

    @classmethod
    def of(cls, folder: Path, encoder: Encoder, kept: Path) -> "ImageIndex":
        """The index of all images below a folder, from `kept` where it was made before.

        Files that cannot be read are named and left out.

        Raises:
            UserError: no image, or `kept` holds the index of other ones.
        """
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        facts = {"images": str(folder), "encoder": encoder.name, "listed": [str(path) for path in files]}
        if kept.exists():
            content = json.loads((kept / _FACTS).read_text(encoding="utf-8")) if (kept / _FACTS).is_file() else {}
            if {name: content.get(name) for name in facts} != facts:
                raise UserError(f"{kept}: is not the index of these images by {encoder.name}; give another --index")
            return cls(encoder, [Path(path) for path in content["read"]], np.load(kept / _VECTORS))
        read: list[Path] = []
        vectors = []
        for names, images in _batches(files):
            vectors.append(encoder.images(images))
            read += names
        if not read:
            raise UserError(f"{folder}: has no image that can be read; an index needs some")
        stacked = np.concatenate(vectors)
        with atomic_directory(kept) as temporary:
            np.save(temporary / _VECTORS, stacked)
            (temporary / _FACTS).write_text(json.dumps(facts | {"read": [str(path) for path in read]}) + "\n")
        return cls(encoder, read, stacked)

    def nearest(self, text: str, *, count: int, exclude: Collection[str]) -> list[Path]:
        """The images nearest to a text, the nearest first; fewer than `count` where there are no more."""
        wanted = min(len(self.files), count + len(exclude))
        _, places = self.search.search(self.encoder.text(text), wanted)
        found = (self.files[place] for place in places[0])
        return [path for path in found if str(path) not in exclude][:count]


def _batches(files: Sequence[Path]) -> Iterator[tuple[list[Path], list[Any]]]:
    names: list[Path] = []
    images: list[Any] = []
    for path in files:
        sample = Sample(path.name, (), source=str(path.parent))
        try:
            images.append(ImageFile(name=path.name, path=path).read(sample))
        except SampleError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        names.append(path)
        if len(names) == _BATCH:
            yield names, images
            names, images = [], []
    if names:
        yield names, images
