"""`vlm run imagine`: images of the prompts that a system writes between <h> and </h> (Mini-Gemini, section 3.3).

The system sees an image, or none, and a request with `<GEN>` behind it; what it wants drawn goes to an image generator
of the diffusers library. No image tokens are generated.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vlm.checkpoints.files.atomic import atomic_file
from vlm.data.sources.json_records import RecordFile
from vlm.errors import SampleError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
"""The generator of the paper."""
NEGATIVE = (
    "low quality, low resolution, blurry, compression artifacts, badly drawn, distorted anatomy, wrong number of limbs "
    "or fingers, duplicated subject, cut off at the edge, lettering, watermark, signature"
)
"""What an image should not look like; the published command has a list of its own, which is not repeated here."""
LINES = "pictures.jsonl"


class Generator(Protocol):
    """Draws a prompt."""

    def __call__(self, prompt: str, *, seed: int) -> "Image": ...


class Diffusers:
    """A text-to-image pipeline of the diffusers library.

    Args:
        name: hub id or folder.
        negative: what the image should not show; left out where the pipeline takes none.
        steps: of denoising; None: as many as the pipeline takes by itself.
        size: (width, height) in pixels; None: the same.
        dtype: of the weights: `float16`, `bfloat16` or `float32`.
        variant: of the files, such as `fp16`, where a repository has several.

    Raises:
        UserError: the library is not installed, or there is no such pipeline.
    """

    def __init__(
        self,
        name: str = SDXL,
        *,
        negative: str = NEGATIVE,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        variant: str | None = None,
    ) -> None:
        import torch

        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise UserError("an image generator needs the diffusers library: pip install 'vlm[imagine]'") from error
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if device == "cpu" else "float16")
        try:
            pipeline: Any = DiffusionPipeline.from_pretrained(name, variant=variant, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"--generator {name}: cannot be opened ({str(error).splitlines()[0]})") from error
        self._pipeline = pipeline.to(device=device, dtype=getattr(torch, dtype))
        self._pipeline.set_progress_bar_config(disable=True)
        wanted = {"negative_prompt": negative or None, "num_inference_steps": steps}
        wanted |= dict(zip(("width", "height"), size or (None, None), strict=True))
        known = inspect.signature(self._pipeline.__call__).parameters
        self._options = {key: value for key, value in wanted.items() if value is not None and key in known}

    def __call__(self, prompt: str, *, seed: int) -> "Image":
        import torch

        # drawn on the CPU, so that the image does not depend on the device's own generator
        return self._pipeline(prompt, generator=torch.Generator().manual_seed(seed), **self._options).images[0]


class Answer(NamedTuple):
    """What a system said to a request."""

    id: str
    request: str
    text: str


@dataclass(frozen=True)
class Drawn:
    """How many answers asked for an image, how many were drawn before, and how many asked for none."""

    new: int
    old: int
    none: int


def draw(answers: list[Answer], generator: Generator, folder: str | Path, *, seed: int = 0) -> Drawn:
    """Draws the last marked prompt of each answer as `folder/<id>.png`, and lists them in `pictures.jsonl`.

    Images that are listed already are not drawn again. The seed of an image depends on `seed` and its answer's id.

    Raises:
        UserError: two answers have one name, or the folder lists another prompt under it.
    """
    from vlm.prompts.mini_gemini import find_prompt
    from vlm.seeding import seed_from

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / LINES
    listed = {line["id"]: line["prompt"] for line in _whole_lines(lines)}
    names = {answer.id: _file_name(answer.id) for answer in answers}
    if len(set(names.values())) < len(answers):
        raise UserError("two answers have the same id, or ids that make the same file name; give each its own")
    new = old = none = 0
    for answer in answers:
        prompt = find_prompt(answer.text)
        if prompt is None or not prompt.strip():
            none += 1
            continue
        if answer.id in listed:
            if listed[answer.id] != prompt:
                raise UserError(f"{folder}: has a picture of another prompt for {answer.id!r}; give another folder")
            old += 1
            continue
        image = generator(prompt, seed=seed_from(seed, answer.id))
        picture = folder / f"{names[answer.id]}.png"
        with atomic_file(picture) as file:
            image.save(file, format="PNG")
        line = {"id": answer.id, "picture": picture.name, "prompt": prompt, "request": answer.request}
        with open(lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"answer": answer.text}, ensure_ascii=False) + "\n")
        new += 1
    return Drawn(new, old, none)


def read_answers(path: str | Path) -> Iterator[Answer]:
    """The lines that `vlm predict --out` wrote."""
    file = RecordFile(path, flag=bool)
    for at in range(len(file)):
        record = file[at]
        identity = str(record.get("id", at))
        if not isinstance(record.get("answer"), str):
            found = f"found keys {sorted(map(str, record))}"
            raise SampleError(f"'answer' must be a text, {found}", sample_id=identity, source=str(path))
        yield Answer(identity, str(record.get("prompt", "")), record["answer"])


def main(arguments: list[str]) -> int:
    """`vlm run imagine`; returns 1 when no answer asked for an image."""
    options = _parser().parse_args(arguments)
    if (options.answers is None) == (options.prompt is None):
        raise UserError("give --answers FILE of `vlm predict`, or --prompt TEXT with --weights")
    if options.prompt is not None and options.weights is None:
        raise UserError("--prompt is answered by a system: name it with --weights")
    answers = list(read_answers(options.answers)) if options.answers is not None else [_ask(options)]
    generator = Diffusers(
        options.generator,
        negative=options.negative,
        steps=options.steps,
        size=None if options.size is None else tuple(options.size),
        device=options.device,
        dtype=options.dtype,
        variant=options.variant,
    )
    drawn = draw(answers, generator, options.out, seed=options.seed)
    print(f"{options.out}: {drawn.new} pictures drawn, {drawn.old} there already, {drawn.none} answers ask for none")
    return 0 if drawn.new + drawn.old else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm run imagine", description="Draws what a system wrote between <h> and </h>, with an image generator."
    )
    parser.add_argument("--answers", type=Path, help="JSONL that `vlm predict --out` wrote")
    parser.add_argument("--prompt", help="instead of it: a request, to which <GEN> is added")
    parser.add_argument("--weights", help="with --prompt: who answers it; as in `vlm predict`")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="with --prompt: pictures it is about")
    ocr = "with --prompt: texts that a reader of letters found in the picture, as help"
    parser.add_argument("--ocr", nargs="+", default=[], metavar="TEXT", help=ocr)
    parser.add_argument("--temperature", type=float, default=0.2, help="of the answer (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="the same (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures; one begun earlier goes on")
    parser.add_argument("--generator", default=SDXL, help="hub id or folder of a diffusers pipeline (default SDXL)")
    parser.add_argument("--negative", default=NEGATIVE, help="what no picture should show; '' for nothing")
    parser.add_argument("--steps", type=int, help="of denoising; default: the pipeline's own")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="in pixels; default: the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float16, float32 on a CPU"
    )
    parser.add_argument("--variant", help="of the generator's files: fp16 downloads half of SDXL")
    return parser


def _ask(options: argparse.Namespace) -> Answer:
    from vlm.language import Decoding
    from vlm.loading import open_system
    from vlm.prompts.mini_gemini import asked
    from vlm.sample import ImageFile, parse_sample

    text = asked(options.prompt, ocr=options.ocr, picture=True)
    images = [ImageFile(name=file, path=Path(file)) for file in options.image]
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": f"\n{text}" if images else text})
    record = {"id": "picture", "images": images, "messages": [{"role": "user", "content": content}]}
    sample = parse_sample(record, source="command line", image_root=None)
    decoding = Decoding(max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed)
    module = open_system(options.weights, device=options.device)
    [answer] = module.generate([sample], decoding=decoding)
    print(f"answer: {answer}", file=sys.stderr)
    return Answer("picture", options.prompt, answer)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier start; half a line at its end is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _file_name(identity: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in identity).strip("._")[-100:] or "picture"
