"""What procedures over shards hand on to each other: a line for each image, with the texts about it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from vlm.errors import UserError
from vlm.procedures.shards.inputs import Pair, Shard

Origin = Literal["web", "synthetic", "human"]


@dataclass(frozen=True)
class Text:
    """A text about an image, and where it comes from.

    Attributes:
        source: `web` came with the image, `synthetic` was written by a captioner, `human` by people.
        captioner: fingerprint of who wrote it.
        judge: fingerprint of who judged it.
        score: the judge's.
        kept: whether it stays; None where nobody judged.
        error: why it could not be judged.
    """

    text: str
    source: Origin
    captioner: str | None = None
    judge: str | None = None
    score: float | None = None
    kept: bool | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def row_of(pair: Pair, texts: list[Text]) -> dict[str, Any]:
    """The line of an image: `{"id": ..., "image": ..., "texts": [...]}`."""
    return {"id": pair.id, "image": pair.image.name, "texts": [text.to_json() for text in texts]}


def read_rows(folder: Path, shard: Shard, made_by: str) -> Mapping[str, list[Text]]:
    """{id: texts} that an earlier procedure made of a shard.

    Args:
        made_by: name of that procedure, for messages.

    Raises:
        UserError: they are not there.
    """
    return _read(folder / f"{shard.name}.jsonl", made_by)


@lru_cache(maxsize=64)  # workers read several shards by turns
def _read(file: Path, made_by: str) -> dict[str, list[Text]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # a text may have other ends of lines in it
        rows = [json.loads(line) for line in lines if line]
        return {row["id"]: [Text(**text) for text in row["texts"]] for row in rows}
    except FileNotFoundError as error:
        raise UserError(f"{file}: is not there; finish `vlm run {made_by}` of the same input first") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is no file of `vlm run {made_by}` ({error}); make it again") from error
