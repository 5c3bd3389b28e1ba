"""`vlm predict`: answers about images from finished or published weights."""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from vlm.commands.questions import Question, about_pictures, file_names, from_file
from vlm.errors import SampleError, UserError

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str]) -> int:
    """Runs `vlm predict ARGUMENTS`; returns 1 when a question could not be answered."""
    options = _parser().parse_args(arguments)
    if (options.prompt is None) == (options.questions is None):
        raise UserError("give --prompt (with --image), or --questions FILE")
    if options.questions is not None and options.image:
        raise UserError("--questions names its own pictures; give it or --image")
    for name in ("batch_size", "max_new_tokens", "num_beams"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: needs at least 1")
    _check_targets(options)
    from vlm.language import Decoding  # imports torch: after what can be said without it

    decoding = Decoding(
        max_new_tokens=options.max_new_tokens, num_beams=options.num_beams, temperature=options.temperature
    )
    if options.questions is not None:
        questions = from_file(options.questions, options.image_root)
    else:
        questions, notes = about_pictures(options.image, options.prompt)
        for note in notes:
            print(note, file=sys.stderr)
    answered = _answered(options.out, questions) if options.resume else set()
    if len(answered) == len(questions):
        print(f"{options.out}: all {len(questions)} questions are answered already")
        return 0
    from vlm.loading import open_system

    module = open_system(options.weights, device=options.device, dtype=options.dtype)
    return _run(module, questions, answered, decoding, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm predict",
        description="Answers about images. With -c FILE instead of --image or --questions: about data.predict_sources, "
        "on any number of devices (docs/command_line.md).",
    )
    weights = (
        "artefact, run folder of a stage or recipe, checkpoint (RUN@200, RUN@last, RUN@best, or a path), or published "
        "folder (official or Hugging Face) or hub id"
    )
    parser.add_argument("--weights", required=True, help=weights)
    asked = "a picture, several, or folders of them; repeat it or list them"
    parser.add_argument("--image", action="extend", nargs="+", default=[], metavar="PATH", help=asked)
    parser.add_argument("--prompt", help="the question about each of them")
    parser.add_argument("--questions", type=Path, help="JSON list or JSONL of {image, prompt}, instead of these two")
    parser.add_argument("--image_root", type=Path, help="where its image paths start; default: its own folder")
    parser.add_argument("--out", type=Path, help="JSONL file to write, line by line: id, image, prompt, answer")
    parser.add_argument("--pictures", type=Path, help="folder for pictures with question, answer and boxes drawn in")
    parser.add_argument("--resume", action="store_true", help="go on with --out and --pictures of a start that stopped")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 samples")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: float32")
    return parser


def _check_targets(options: argparse.Namespace) -> None:
    """Refuses to overwrite, before anything slow begins."""
    out, pictures = options.out, options.pictures
    if options.resume:
        if out is None:
            raise UserError("--resume goes on with an --out file; name it")
        return
    if out is not None and out.exists():
        raise UserError(f"{out}: exists already; go on with it by --resume, remove it, or give another file")
    if pictures is not None and pictures.exists() and (not pictures.is_dir() or any(pictures.iterdir())):
        raise UserError(f"{pictures}: holds something already; go on with it by --resume, or give another folder")
    for folder in options.image if pictures is not None else []:
        if Path(folder).is_dir() and pictures.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--pictures {pictures}: lies in {folder}, whose pictures are asked about; give another")


def _answered(out: Path, questions: Sequence[Question | SampleError]) -> set[int]:
    """Positions of the questions that a file has answers to; half a line at its end is cut off.

    Raises:
        UserError: the file answers other questions.
    """
    if not out.exists():
        return set()
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(out, "r+b") as file:
            file.truncate(len(whole))
    found: Counter[str] = Counter()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found[_key(json.loads(line))] += 1
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{out}: line {number} is no answer of `vlm predict`; give another file") from error
    done = set()
    for at, question in enumerate(questions):
        if isinstance(question, Question) and found[key := _key(_line(question, ""))]:
            found[key] -= 1
            done.add(at)
    if other := +found:
        raise UserError(f"{out}: answers {other.total()} questions that are not asked here; give another file")
    return done


def _line(question: Question, answer: str) -> dict[str, Any]:
    return {"id": question.id, "image": question.image, "prompt": question.prompt, "answer": answer}


def _key(line: dict[str, Any]) -> str:
    return json.dumps([line["id"], line["image"], line["prompt"]])


def _run(
    module: Any,
    questions: Sequence[Question | SampleError],
    answered: set[int],
    decoding: Any,
    options: argparse.Namespace,
) -> int:
    from tqdm import tqdm

    alone = len(questions) == 1 and options.out is None and options.num_beams == 1 and sys.stdout.isatty()
    names = file_names(questions)
    open_ones = {at: question for at, question in enumerate(questions) if at not in answered}
    failed = 0
    with ExitStack() as stack:
        out: TextIO | None = None
        if options.out is not None:
            with _writing(options.out):
                options.out.parent.mkdir(parents=True, exist_ok=True)
                out = stack.enter_context(open(options.out, "a", encoding="utf-8"))
        bar = stack.enter_context(
            tqdm(total=len(questions), initial=len(answered), unit="question", disable=True if alone else None)
        )
        for at, answer in _answers(module, open_ones, decoding, options.batch_size, stream=alone):
            bar.update()
            question = questions[at]
            if isinstance(answer, SampleError) or isinstance(question, SampleError):
                failed += 1
                bar.write(f"not answered: {answer}", file=sys.stderr)
                continue
            if options.pictures is not None and question.sample.images:
                with _writing(options.pictures):
                    _draw(options.pictures / f"{names[at]}.jpg", question, answer, module)
            if out is not None:
                with _writing(options.out):
                    out.write(json.dumps(_line(question, answer), ensure_ascii=False) + "\n")
                    out.flush()  # hours of answers survive whatever comes
            elif not alone:
                bar.write(f"{question.id}: {answer}", file=sys.stdout)
    if options.out is not None:
        print(f"written: {options.out} ({len(questions) - failed} answers)")
    if failed:
        print(f"{failed} of {len(questions)} questions could not be answered", file=sys.stderr)
    return 1 if failed else 0


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or give another place, and go on with "
            "--resume"
        ) from error


def _answers(
    module: Any, questions: dict[int, Question | SampleError], decoding: Any, batch_size: int, *, stream: bool
) -> Iterator[tuple[int, str | SampleError]]:
    """(position, answer, or why there is none), in the order of the questions."""
    import torch

    from vlm.evaluation.inference import unreadable

    positions = list(questions)
    for start in range(0, len(positions), batch_size):
        chunk = {at: questions[at] for at in positions[start : start + batch_size]}
        for at, question in chunk.items():
            if isinstance(question, Question):
                chunk[at] = unreadable(module.codec, question.sample) or question
        good = [question.sample for question in chunk.values() if isinstance(question, Question)]
        terminal = _Terminal(module.codec.template.stop) if stream and good else None
        search = decoding if terminal is None else _followed(decoding, module.codec, terminal)
        try:
            answers = module.generate(good, decoding=search, batch_size=batch_size) if good else []
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch_size {batch_size}: does not fit into the device's memory; lower it, or give --dtype bfloat16"
            ) from error
        if terminal is not None:
            terminal.finish(answers[0])
        remaining = iter(answers)
        for at, question in chunk.items():
            yield at, next(remaining) if isinstance(question, Question) else question


def _followed(decoding: Any, codec: Any, terminal: "_Terminal") -> Any:
    from vlm.language.generation import StreamingDecoding

    return StreamingDecoding(**dataclasses.asdict(decoding), on_token=lambda ids: terminal.grow(codec.decode(ids)))


class _Terminal:
    """Shows a growing text, but for an end that may yet become something else."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.shown = 0

    def grow(self, text: str) -> None:
        text = text.rstrip("\ufffd")  # half a character
        begun = (mark[:n] for mark in self.stop for n in range(len(mark), 0, -1) if text.endswith(mark[:n]))
        self._show(text.removesuffix(next(begun, "")))

    def finish(self, text: str) -> None:
        self._show(text)
        print()

    def _show(self, text: str) -> None:
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def _draw(target: Path, question: Question, answer: str, module: Any) -> None:
    from vlm.drawing.annotate import annotate

    images = [image.read(question.sample) for image in question.sample.images]
    boxes = []
    if len(images) == 1:  # of which image a box is, nobody says
        width, height = images[0].size
        view = module.codec.view(width, height)
        for box in module.codec.find_boxes(answer, size=view.size):
            x0, y0, x1, y1 = view.in_picture(box)
            boxes.append((x0 * width, y0 * height, x1 * width, y1 * height))
    target.parent.mkdir(parents=True, exist_ok=True)
    annotate(images, prompt=question.prompt, answer=answer, boxes=boxes).save(target, quality=92)
