"""An index of images: their embeddings, and the nearest ones to a text or an image, exactly, by faiss."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from vlm.errors import UserError
from vlm.procedures.shards.running import COUNTS, MANIFEST

SUFFIX = ".safetensors"


class ImageIndex:
    """What `vlm run index-images` wrote, opened to be asked.

    ::

        INDEX/manifest.json, counts/        who embedded the images, and what could not be read
        INDEX/photos-00000.safetensors      float32[V, D] vectors, int64[V] whose they are; names in its metadata

    Args:
        vectors: float32[V, D], normalised; an image may have several (BLIP-2's queries), of which the best one counts.
        owner: int64[V], image that each belongs to.
        paths: of the images.
        weights: what embeds texts that are asked.
        device: of that.
    """

    def __init__(
        self, vectors: np.ndarray, owner: np.ndarray, paths: Sequence[Path], *, weights: str, device: str | None = None
    ) -> None:
        self.owner, self.paths = owner, list(paths)
        self.weights, self.device = weights, device
        self._scorer: Any = None
        self._index = _faiss().IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    @classmethod
    def open(cls, folder: str | Path, *, device: str | None = None) -> "ImageIndex":
        """Opens the folder of an index.

        Args:
            device: of the network that embeds texts; by default the CPU.

        Raises:
            UserError: it is none, is not finished, or a file of it cannot be read; faiss is not installed.
        """
        folder = Path(folder)
        _faiss()
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            inputs, weights = manifest["inputs"], manifest["settings"]["weights"]
        except FileNotFoundError as error:
            raise UserError(f"{folder}: is no index of images; make one with `vlm run index-images`") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST}: cannot be read ({error}); make the index again") from error
        if manifest["procedure"] != "index-images":
            raise UserError(f"{folder}: was made by `vlm run {manifest['procedure']}`, and is no index of images")
        vectors: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        paths: list[Path] = []
        for name in inputs:
            file = folder / f"{name}{SUFFIX}"
            if not file.exists():
                raise UserError(f"{folder}: {file.name} is missing; start the same `vlm run index-images` to go on")
            try:
                with safe_open(file, framework="np") as opened:
                    found = [Path(path) for path in json.loads(opened.metadata()["images"])]
                    vectors.append(opened.get_tensor("vectors"))
                    owners.append(opened.get_tensor("owner") + len(paths))
            except Exception as error:  # safetensors has its own, without a base of use
                raise UserError(f"{file}: cannot be read ({error}); remove it and make the index again") from error
            paths += found
        vectors = [part for part in vectors if len(part)]
        if not vectors:
            raise UserError(f"{folder}: holds no image that could be read; see {folder / COUNTS}")
        owner = np.concatenate([part for part in owners if len(part)])
        return cls(np.concatenate(vectors), owner, paths, weights=weights, device=device)

    def __len__(self) -> int:
        return len(self.paths)

    def search(
        self, vector: np.ndarray, count: int, *, exclude: Collection[str | Path] = ()
    ) -> list[tuple[Path, float]]:
        """The `count` images nearest to a normalised float32[D], with their similarities, the nearest first.

        Args:
            exclude: paths that are not wanted.
        """
        unwanted = {str(path) for path in exclude}
        asked = np.ascontiguousarray(vector, dtype=np.float32)[None]
        if asked.shape[1] != self._index.d:
            raise UserError(f"an index of {self._index.d} dimensions was asked with {asked.shape[1]}")
        total = int(self._index.ntotal)
        number = min(total, count + len(unwanted))
        while True:
            scores, places = self._index.search(asked, number)
            found: dict[int, float] = {}
            for score, place in zip(scores[0].tolist(), places[0].tolist(), strict=True):
                owner = int(self.owner[place])
                if str(self.paths[owner]) not in unwanted:
                    found.setdefault(owner, score)  # the best of its vectors comes first
            if len(found) >= count or number == total:
                return [(self.paths[owner], score) for owner, score in list(found.items())[:count]]
            number = min(total, 2 * number)  # several vectors were of one image

    def nearest(self, text: str, *, count: int, exclude: Collection[str | Path] = ()) -> list[Path]:
        """The images nearest to a text, the nearest first; fewer than `count` where there are no more."""
        if self._scorer is None:
            from vlm.procedures.scorers import open_scorer

            self._scorer = open_scorer(self.weights, device=self.device)
        vector = self._scorer.embed_texts([text])[0].cpu().numpy()
        return [path for path, _ in self.search(vector, count, exclude=exclude)]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("an index of images needs the faiss library: pip install 'vlm[index]'") from error
    return faiss
