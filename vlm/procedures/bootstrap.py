"""`vlm run bootstrap`: what a filter kept, as a set to train on (the end of BLIP's CapFilt).

The bootstrapped set is D = {(image, web text kept)} + {(image, synthetic text kept)} + {(image, human text)}
(Li et al., 2022, section 3.3). An image with two texts is there twice.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from vlm.data.sources.webdataset import MemberImage
from vlm.errors import UserError
from vlm.options import OptionParser
from vlm.procedures.shards import (
    Pair,
    Shard,
    Text,
    Work,
    add_shard_options,
    find_shards,
    join_shards,
    read_rows,
    run_shards,
    shards_of,
)
from vlm.procedures.shards.rows import Origin
from vlm.procedures.shards.running import MANIFEST

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}


class Bootstrap(Work):
    """A tar file for each shard, as `vlm.data.WebDataset` reads it::

        00000.tar:  000000-0.jpg  000000-0.txt  000000-0.json  000000-1.jpg ...

    `KEY.json` has the text once more, and its provenance: `id` of the image, `source`, `captioner`, `judge`, `score`.
    Images are the bytes that they were.

    Args:
        filtered: what `filter-pairs` or `rank-captions` made of the input.
        human: shards whose texts are all kept.
    """

    procedure = "bootstrap"
    suffix = ".tar"
    decodes = False

    def __init__(self, filtered: Path, *, human: Sequence[Shard] = ()) -> None:
        super().__init__()
        self.filtered = filtered
        self.human = {shard.name for shard in human}
        self.settings = {"filtered": str(filtered), "made_by": made_by(filtered)}

    def rows(self, shard: Shard, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        if shard.name in self.human:
            return [{"pair": pair, "text": Text(text, "human")} for pair in pairs for text in pair.texts]
        judged = read_rows(self.filtered, shard, self.settings["made_by"]["procedure"])
        return [{"pair": pair, "text": text} for pair in pairs for text in judged.get(pair.id, ()) if text.kept]

    def count(self, rows: Sequence[Any]) -> dict[str, int]:
        found: Counter[Origin] = Counter(row["text"].source for row in rows)
        return {"images": len({row["pair"].id for row in rows}), "pairs": len(rows), **dict(sorted(found.items()))}

    def write(self, file: BinaryIO, shard: Shard, rows: Sequence[Mapping[str, Any]]) -> None:
        with tarfile.open(fileobj=file, mode="w") as tar:
            images: Counter[str] = Counter()
            for row in rows:
                pair, text = row["pair"], row["text"]
                images[pair.id] += 1
                key = f"{len(images) - 1:06d}-{images[pair.id] - 1}"
                content = _content(pair)
                facts = {"caption": text.text, "id": pair.id, "image": pair.image.name, **text.to_json()}
                del facts["text"]
                _add(tar, f"{key}.{_suffix(content)}", content)
                _add(tar, f"{key}.txt", text.text.encode())
                _add(tar, f"{key}.json", json.dumps(facts, ensure_ascii=False).encode())


def main(arguments: list[str]) -> int:
    """`vlm run bootstrap INPUT --filtered FOLDER [--human FILE ...] --out FOLDER`.

    Raises:
        UserError: nothing is filtered there.
    """
    parser = OptionParser(
        command="vlm run bootstrap",
        prog="vlm run bootstrap",
        description="Writes the pairs that a filter kept, and pairs of people, as tar files to train on.",
    )
    add_shard_options(parser, what="a tar file for each shard")
    parser.add_argument(
        "--filtered",
        type=Path,
        required=True,
        help="folder of `vlm run filter-pairs` or `rank-captions`, of this input",
    )
    parser.add_argument("--human", nargs="+", default=[], metavar="FILE", help="pairs of people, which all stay")
    parser.add_argument("--human_root", type=Path, help="of lists of them: folder that their images' paths start at")
    options = parser.parse_args(arguments)
    human = (
        find_shards(options.human, shard_size=options.shard_size, image_root=options.human_root)
        if options.human
        else []
    )
    shards = join_shards(shards_of(options), human)
    return run_shards(Bootstrap(options.filtered, human=human), shards, options)


def made_by(folder: Path) -> dict[str, Any]:
    """Which procedure made a folder, and by which settings.

    Raises:
        UserError: none did, or one that judges nothing.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        procedure, settings = manifest["procedure"], manifest["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: has no {MANIFEST} of a procedure; filter the pairs first") from error
    if procedure not in ("filter-pairs", "rank-captions"):
        raise UserError(f"{folder}: was made by `vlm run {procedure}`, which judges nothing; filter the pairs first")
    return {"procedure": procedure, "settings": settings}


def _content(pair: Pair) -> bytes:
    """The image's file as it is."""
    image = pair.image
    assert image.path is not None
    if not isinstance(image, MemberImage):
        return image.path.read_bytes()
    with image.path.open("rb") as file:
        file.seek(image.start)
        return file.read(image.length)


def _suffix(content: bytes) -> str:
    """By what the file is, whatever it was called."""
    with Image.open(io.BytesIO(content)) as image:
        return _SUFFIXES.get(image.format or "", "jpg")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
