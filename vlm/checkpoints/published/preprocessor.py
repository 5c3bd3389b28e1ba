"""What the file of a Hugging Face image processor says about pixels, as ours makes them or refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.checkpoints.published.entries import Entries, read_json, refusal
from vlm.vision.preprocess import CLIP_MEAN, CLIP_STD

_BICUBIC = 3
_ONLY: dict[str, tuple[Any, ...]] = {
    "image_mean": (CLIP_MEAN,),
    "image_std": (CLIP_STD,),
    "resample": (_BICUBIC,),
    "rescale_factor": (1 / 255,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_resize": (True,),
}
_READ = frozenset({"do_center_crop", "do_pad", "size", "crop_size", "image_grid_pinpoints", "image_processor_type"})
_HARMLESS = frozenset(
    {
        "do_convert_rgb",  # every image is RGB here
        *("feature_extractor_type", "processor_class", "_processor_class", "image_processor", "default_to_square"),
        *("aspect_ratio_setting", "data_format", "input_data_format", "device", "disable_grouping", "return_tensors"),
        *("_valid_processor_keys", "image_token", "num_additional_image_tokens", "patch_size", "pad_size"),
        *("vision_feature_select_strategy", "image_seq_length", "backend"),
    }
)
_TYPES = ("CLIP", "Llava", "LlavaNext")
_SUFFIXES = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")


def check_pixels(folder: Path) -> None:
    """Refuses a tower whose pixels are made otherwise than CLIP's."""
    content, file = _read(folder)
    only = {key: value for key, value in _ONLY.items() if key not in ("resample", "do_resize")}
    Entries(_READ | {"resample", "do_resize"}, only, _HARMLESS).check(content, file)


def read_view(folder: Path, *, side: int, pinpoints: Sequence[Sequence[int]] | None) -> str | None:
    """How an image becomes a square view: `pad`, `crop` or `squash`; None: no file says it, or it becomes tiles.

    Args:
        folder: which may hold `preprocessor_config.json`, or `processor_config.json` with the same inside.
        side: of a view, in pixels.
        pinpoints: of the tiles, as `config.json` says.

    Raises:
        UserError: pixels that our transform does not make.
    """
    content, file = _read(folder)
    if not content:
        return None
    Entries(_READ, _ONLY, _HARMLESS).check(content, file)
    kinds = [kind + suffix for kind in _TYPES for suffix in _SUFFIXES]
    stated = content.get("image_processor_type") or content.get("feature_extractor_type") or kinds[0]
    if stated not in kinds:
        raise refusal(file, "image_processor_type", stated, expected=[f"{kind}ImageProcessor" for kind in _TYPES])
    square = {"height": side, "width": side}
    size = _sizes(content.get("size", {"shortest_edge": side}), shortest=True)
    if size not in (square, {"shortest_edge": side}):
        raise refusal(file, "size", content["size"], expected=({"shortest_edge": side}, square))
    is_cropped = content.get("do_center_crop", True)
    if is_cropped and _sizes(content.get("crop_size", side), shortest=False) != square:
        raise refusal(file, "crop_size", content["crop_size"], expected=(square,))
    if stated.startswith("LlavaNext"):
        if (grids := content.get("image_grid_pinpoints", pinpoints)) != pinpoints:
            raise refusal(file, "image_grid_pinpoints", grids, expected=(pinpoints,))
        return None
    if content.get("do_pad") and stated.startswith("Llava"):
        return "pad"
    if size == square:
        return "squash"
    if not is_cropped:
        raise refusal(file, "do_center_crop", False, expected=(True,))
    return "crop"


def says_view(folder: Path) -> bool:
    """Whether there is a file for `read_view`."""
    return bool(_read(folder)[0])


def _read(folder: Path) -> tuple[Mapping[str, Any], Path]:
    file = folder / "processor_config.json"
    inside = (read_json(file) or {}).get("image_processor")
    if isinstance(inside, dict):  # as transformers 5 saves it
        return inside, file
    file = folder / "preprocessor_config.json"
    return read_json(file) or {}, file


def _sizes(value: Any, *, shortest: bool) -> dict[str, int]:
    """A size as a mapping; old files have a number."""
    if isinstance(value, int):
        return {"shortest_edge": value} if shortest else {"height": value, "width": value}
    return {key: number for key, number in value.items() if number is not None} if isinstance(value, dict) else {}
