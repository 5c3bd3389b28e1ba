"""The small files of a Hugging Face LLaVA folder: tokenizer, processor, chat template, generation settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import AddedToken, Regex, normalizers

from vlm.errors import UserError
from vlm.language import Decoding
from vlm.prompts import LlamaTokenizer
from vlm.prompts.jinja import IMAGE_TOKEN, chat_template
from vlm.prompts.template import IMAGE, TextSpan
from vlm.sample import ImagePart, Message, TextPart
from vlm.vision.preprocess import ImageTransform
from vlm.vision.tiling import AnyRes

PAD_TOKEN = "<pad>"
_BLANK = "▁"
OTHER_PIXELS = (
    "its processor lays images with transparency (RGBA, LA, palettes with a transparent colour) on white, where "
    "transparency is dropped here, and cuts 16 bits of grey off to white, of which the upper 8 are taken here: give it "
    'such images as `image.convert("RGBA").convert("RGB")`, or as 8 bits; all others come out the same'
)
"""What people have to know who give images to what is exported."""


def write_tokenizer(folder: Path, codec: Any, *, num_rows: int, tiles: AnyRes | None = None) -> tuple[int, int]:
    """Tokenizer files with `<image>` and `<pad>` added, and the chat template.

    Args:
        codec: of the system.
        num_rows: rows of its embedding table.
        tiles: of an image, where it has more than one view.

    Returns:
        Ids of `<image>` and `<pad>`: the first two that the tokenizer does not use.

    Raises:
        UserError: the Hugging Face tokenizer could not give the ids that the system was trained on.
    """
    if len(codec.tokenizer) > num_rows:
        raise UserError(f"the tokenizer has {len(codec.tokenizer)} tokens, the language model only {num_rows} rows")
    codec.tokenizer.save(folder)
    file = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    marks = [AddedToken(token, normalized=False, special=True) for token in (IMAGE_TOKEN, PAD_TOKEN)]
    backend.add_special_tokens(marks)
    if isinstance(codec.tokenizer, LlamaTokenizer) and not codec.tokenizer.legacy:
        # Text behind an image is tokenized as a text of its own and starts with a blank, text behind `</s>` does not.
        # A normalizer sees each piece alone; of these pieces only the one behind an image starts with white space.
        blank = normalizers.Replace(Regex(r"\A(?=\s)"), _BLANK)
        backend.normalizer = normalizers.Sequence([blank, backend.normalizer])
    backend.save(str(file))
    config_file = folder / "tokenizer_config.json"
    more = {
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "pad_token": PAD_TOKEN,
        "padding_side": "left",
        "processor_class": _processor_class(tiles),
    }
    _write(config_file, json.loads(config_file.read_text(encoding="utf-8")) | more)
    (folder / "chat_template.jinja").write_text(chat_template(codec.template), encoding="utf-8")
    _check_ids(codec, backend)
    image_id, pad_id = backend.token_to_id(IMAGE_TOKEN), backend.token_to_id(PAD_TOKEN)
    assert image_id is not None
    assert pad_id is not None
    return image_id, pad_id


def write_processor(
    folder: Path,
    codec: Any,
    *,
    patch_size: int,
    pad_id: int,
    tiles: AnyRes | None = None,
    class_token: bool = False,
) -> None:
    """`processor_config.json`, `preprocessor_config.json` and `generation_config.json`.

    Raises:
        UserError: the Hugging Face image processor cannot make these pixels.
    """
    _write(
        folder / "processor_config.json",
        {
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,  # the class token; "default" takes it away again
            "patch_size": patch_size,
            "processor_class": _processor_class(tiles),
            "vision_feature_select_strategy": "full" if class_token else "default",
        },
    )
    _write(folder / "preprocessor_config.json", _image_processor(codec.transform, tiles))
    tokenizer = codec.tokenizer
    marks = [tokenizer.encode(mark)[0] for mark in codec.template.stop]
    ends = {tokenizer.eos_id, *(ids[0] for ids in marks if len(ids) == 1)}
    settings = Decoding().transformers_config(end_ids=sorted(ends), pad_id=pad_id)
    settings.bos_token_id = tokenizer.bos_id
    settings.save_pretrained(folder)


def sizes_cut_otherwise(tiles: AnyRes, *, largest: int) -> list[tuple[int, int]]:
    """(width, height) of the images of which Hugging Face's `unpad_image` keeps other features of the tiles.

    Both scale the picture's free side to the map; the published code cuts decimals off where the port rounds to seven
    first, so that a whole number that came out a hair too small makes the difference. Grids are chosen alike: the
    exported list has our order, and the port counts height first in it.

    Args:
        largest: side in pixels up to which sizes are looked at.
    """
    sides = np.arange(1.0, largest + 1)
    width, height = sides[:, None], sides[None]
    found = []
    for columns, rows in tiles.grids:
        across, down = columns * tiles.patches, rows * tiles.patches
        is_wide = width / height > across / down
        shown = np.where(is_wide, height * (across / width), width * (down / height))
        free = np.where(is_wide, down, across)
        cut, rounded = ((free - side.astype(int)) // 2 for side in (shown, np.round(shown, 7)))
        pairs = ((int(x) + 1, int(y) + 1) for x, y in np.argwhere(cut != rounded))
        found += [size for size in pairs if tiles.grid(*size) == (columns, rows)]
    return sorted(found)


def _processor_class(tiles: AnyRes | None) -> str:
    return "LlavaProcessor" if tiles is None else "LlavaNextProcessor"


def _image_processor(transform: ImageTransform, tiles: AnyRes | None) -> dict[str, Any]:
    side = {"height": transform.size, "width": transform.size}
    shared = {
        "processor_class": _processor_class(tiles),
        "do_convert_rgb": True,
        "do_resize": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
    if tiles is not None:
        return shared | {
            "image_processor_type": "LlavaNextImageProcessor",
            "do_center_crop": False,
            "do_pad": True,  # the number of views, not an image
            "image_grid_pinpoints": [[tiles.tile * rows, tiles.tile * columns] for columns, rows in tiles.grids],
            "resample": int(Image.Resampling.BICUBIC),
            "size": side,
        }
    if transform.pad_color not in (None, tuple(int(channel * 255) for channel in transform.mean)):
        raise UserError(
            f"pad_color {transform.pad_color}: the Hugging Face LlavaImageProcessor pads with the mean colour alone"
        )
    return shared | {
        "image_processor_type": "LlavaImageProcessor",
        "do_center_crop": transform.mode == "crop",
        "do_pad": transform.mode == "pad",
        "resample": int(Image.Resampling[transform.interpolation.upper()]),
        "size": {"shortest_edge": transform.size} if transform.mode == "crop" else side,
    }


def _check_ids(codec: Any, backend: tokenizers.Tokenizer) -> None:
    """Compares the ids of conversations of every form before anybody relies on them."""
    user, answer = Message("user", (TextPart("What is it? 1 2"),)), Message("assistant", (TextPart("A boat, here."),))
    seen = Message("user", (ImagePart(), TextPart("\nWhat is it?")))
    bare = Message("user", (ImagePart(),))
    two = Message("user", (ImagePart(), TextPart("and"), ImagePart(), ImagePart(), TextPart(" differ?\n")))
    image_id = backend.token_to_id(IMAGE_TOKEN)
    for messages in ([user], [seen], [bare], [two], [seen, answer, user], [bare, answer, user, answer, user]):
        spans = codec.template.render(messages, generate=True)
        text = "".join(span.text if isinstance(span, TextSpan) else IMAGE_TOKEN for span in spans)
        ids = codec.template.tokenize(messages, codec.tokenizer, generate=True).ids
        if backend.encode(text).ids != [image_id if token == IMAGE else token for token in ids]:
            raise UserError(
                f"no Hugging Face tokenizer gives the ids that this system was trained on: {text!r} comes out "
                f"otherwise with the tokenizer of {codec.tokenizer.path} and template {codec.template.name}"
            )


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
