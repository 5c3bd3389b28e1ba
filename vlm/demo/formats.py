"""`vlm demo-data FOLDER --format NAME|all`: the embedded world in the layouts that data sets are published in."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from vlm.checkpoints.files.atomic import atomic_directory
from vlm.demo import tasks
from vlm.demo.blip_formats import write_blip
from vlm.demo.gui_files import write_gui
from vlm.demo.large_pages import write_large_pages
from vlm.demo.pages import Placed, make_chart, make_page, make_screen
from vlm.demo.scenes import Scene
from vlm.demo.write import scenes
from vlm.errors import UserError

NOISE = 0.3
"""Share of the web pairs whose caption belongs to another image; `noisy` in their .json says which."""
FACTS = "demo_data.json"
_VERSION = 2
Scenes = dict[str, Scene]


def write_format(folder: str | Path, name: str, *, num: int = 200, size: int = 96, seed: int = 0) -> bool:
    """Writes training scenes in one layout, images in `images/`.

    Args:
        folder: appears when everything in it is written.
        name: one of `FORMATS`.
        num: scenes, pages, charts or screens.
        size: mean length of a picture's shorter side in pixels.
        seed: of everything drawn by lot.

    Returns:
        Whether anything was written: False if the folder holds just this data.

    Raises:
        UserError: no such format, the folder holds something else, or a number makes no sense.
    """
    if name not in FORMATS:
        raise UserError(f"demo-data: unknown format {name!r}; use one of {', '.join(FORMATS)}")
    for key, value, least in (("num", num, 2), ("size", size, 32)):
        if value < least:
            raise UserError(f"demo-data: {key} is {value}; it must be at least {least}")
    folder = Path(folder)
    facts = {"version": _VERSION, "format": name, "num": num, "size": size, "seed": seed}
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        found = folder / FACTS
        if found.is_file() and json.loads(found.read_text()) == facts:
            return False
        raise UserError(f"{folder}: is not empty and does not hold this data; choose or empty another folder")
    with atomic_directory(folder) as temporary:
        (temporary / "images").mkdir()
        FORMATS[name](temporary, num, size, seed)
        if not any((temporary / "images").iterdir()):
            (temporary / "images").rmdir()
        (temporary / FACTS).write_text(json.dumps(facts) + "\n")
    return True


def _drawn(folder: Path, num: int, size: int, seed: int) -> Scenes:
    """Training scenes, drawn into `images/`."""
    found = dict(scenes("train", num=num, size=size, seed=seed))
    for name, scene in found.items():
        scene.draw().save(folder / "images" / f"{name}.png")
    return found


def _json(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _lines(folder: Path, name: str, records: list[Any]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / name).write_text(text, encoding="utf-8")


def _pixels(scene: Scene, box: tuple[float, float, float, float]) -> list[float]:
    x0, y0, x1, y1 = box
    values = (x0 * scene.width, y0 * scene.height, x1 * scene.width, y1 * scene.height)
    return [round(value, 2) for value in values]


def _coco_captions(folder: Path, num: int, size: int, seed: int) -> None:
    found = _drawn(folder, num, size, seed)
    captions = [tasks.caption(scene, language) for scene in found.values() for language in tasks.LANGUAGES]
    images = [
        {"id": number, "file_name": f"{name}.png", "width": scene.width, "height": scene.height}
        for number, (name, scene) in enumerate(found.items())
    ]
    annotations = [{"id": at, "image_id": at // 2, "caption": caption} for at, caption in enumerate(captions)]
    _json(folder, "captions.json", {"images": images, "annotations": annotations})


def _vqav2(folder: Path, num: int, size: int, seed: int) -> None:
    questions, annotations = [], []
    for number, (name, scene) in enumerate(_drawn(folder, num, size, seed).items()):
        random = Random(f"vqav2 {seed} {name}")
        (folder / "images" / f"{name}.png").rename(folder / "images" / f"demo_{number:012d}.png")
        turn = random.choice([turn for turn in tasks.questions(scene, "en", random) if turn.task == "vqa"])
        question = turn.question.removesuffix(f"\n{tasks.SHORT['en']}")
        questions.append({"question_id": 10 * number, "image_id": number, "question": question})
        people = [{"answer_id": at + 1, "answer": turn.answer if at else "unknown"} for at in range(10)]
        annotations.append({"question_id": 10 * number, "image_id": number, "answers": people})
    _json(folder, "questions.json", {"questions": questions})
    _json(folder, "annotations.json", {"annotations": annotations})


def _refs(folder: Path, num: int, size: int, seed: int) -> None:
    records = []
    for name, scene in _drawn(folder, num, size, seed).items():
        thing = Random(f"refs {seed} {name}").choice(scene.things)
        x0, y0, x1, y1 = _pixels(scene, thing.box)
        sentences = [f"the {thing.noun.name} at the {thing.place}", f"the {thing.color} card at the {thing.place}"]
        records.append(
            {"id": name, "image": f"{name}.png", "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
             "sentences": sentences}
        )  # fmt: skip
    _json(folder, "refs.json", records)


def _grit(folder: Path, num: int, size: int, seed: int) -> None:
    records = []
    for name, scene in _drawn(folder, num, size, seed).items():
        caption, entries = "", []
        for thing in scene.things:
            caption += ", " if caption else ""
            phrase = f"{thing.noun.name} on {thing.color}"
            entries.append([len(caption), len(caption) + len(phrase), *thing.box, 0.99])
            caption += phrase
        nouns = [[start, start + len(t.noun.name), *box, 0.9]
                 for t, (start, _, *box, _) in zip(scene.things, entries, strict=True)]  # fmt: skip
        records.append(
            {"id": name, "image": f"{name}.png", "caption": caption, "ref_exps": entries, "noun_chunks": nouns}
        )
    _lines(folder, "grit.jsonl", records)


def _quad(line: Placed) -> list[int]:
    x0, y0, x1, y1 = line.box
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _ocr(folder: Path, num: int, size: int, seed: int) -> None:
    records = []
    for number in range(num):
        page, lines = make_page(Random(f"page {seed} {number}"), size=size)
        page.save(folder / "images" / f"page_{number}.png")
        found = [{"text": line.text, "quad": _quad(line)} for line in lines]
        records.append({"id": f"page_{number}", "image": f"page_{number}.png", "lines": found})
    _lines(folder, "ocr.jsonl", records)


def _document_qa(folder: Path, num: int, size: int, seed: int) -> None:
    records = []
    for number in range(num):
        page, lines = make_page(Random(f"page {seed} {number}"), size=size)
        page.save(folder / "images" / f"page_{number}.png")
        which = Random(f"question {seed} {number}").choice(("first", "last"))
        answer = lines[0 if which == "first" else -1].text
        records.append(
            {"questionId": number, "question": f"What is the {which} word?", "image": f"page_{number}.png",
             "answers": [answer, answer.lower()]}
        )  # fmt: skip
    _json(folder, "docvqa.json", {"dataset_name": "embedded world", "data": records})


def _chart_qa(folder: Path, num: int, size: int, seed: int) -> None:
    records = []
    for number in range(num):
        chart, heights = make_chart(Random(f"chart {seed} {number}"), size=size)
        chart.save(folder / "images" / f"chart_{number}.png")
        pairs = [("Which bar is the tallest?", max(heights, key=heights.__getitem__)),
                 ("Which bar is the shortest?", min(heights, key=heights.__getitem__)),
                 ("How many bars are there?", str(len(heights)))]  # fmt: skip
        query, label = Random(f"question {seed} {number}").choice(pairs)
        records.append({"imgname": f"chart_{number}.png", "query": query, "label": label})
    _json(folder, "chartqa.json", records)


def _screens(folder: Path, num: int, size: int, seed: int) -> None:
    records = []
    for number in range(num):
        screen, buttons = make_screen(Random(f"screen {seed} {number}"), size=size)
        screen.save(folder / "images" / f"screen_{number}.png")
        elements = [{"html": f"<button>{button.text}</button>", "box": list(button.box)} for button in buttons]
        records.append({"id": f"screen_{number}", "image": f"screen_{number}.png", "elements": elements})
    _lines(folder, "screens.jsonl", records)


def _pairs(folder: Path, num: int, size: int, seed: int) -> None:
    found = list(_drawn(folder, num, size, seed).items())
    records = []
    for (one, first), (other, second) in zip(found, [*found[1:], found[0]], strict=True):
        left, right = len(first.things), len(second.things)
        answer = "the first" if left > right else "the second" if right > left else "neither"
        records.append(
            {"id": f"{one}_{other}", "images": [f"{one}.png", f"{other}.png"],
             "question": "Which picture shows more things?", "answer": answer}
        )  # fmt: skip
    _lines(folder, "pairs.jsonl", records)


def _articles(found: Scenes) -> list[list[tuple[str, Scene]]]:
    """Scenes in articles of up to three."""
    entries = list(found.items())
    return [entries[at : at + 3] for at in range(0, len(entries), 3)]


def _mmc4(folder: Path, num: int, size: int, seed: int) -> None:
    records = []
    for article in _articles(_drawn(folder, num, size, seed)):
        sentences = ["This is an article about cards.", *(f"{tasks.caption(s, 'en')}." for _, s in article)]
        images = [{"image_name": f"{name}.png", "matched_text_index": at + 1, "matched_sim": 0.9}
                  for at, (name, _) in enumerate(article)]  # fmt: skip
        records.append({"url": "", "text_list": sentences, "image_info": images})
    _lines(folder, "mmc4.jsonl", records)


def _obelics(folder: Path, num: int, size: int, seed: int) -> None:
    records = []
    for article in _articles(_drawn(folder, num, size, seed)):
        images: list[str | None] = []
        texts: list[str | None] = []
        for name, scene in article:
            images += [f"{name}.png", None]
            texts += [None, tasks.caption(scene, "en")]
        records.append({"images": images, "texts": texts})
    _lines(folder, "obelics.jsonl", records)


def _png(scene: Scene) -> bytes:
    stream = io.BytesIO()
    scene.draw().save(stream, "PNG")
    return stream.getvalue()


def _webdataset(folder: Path, num: int, size: int, seed: int) -> None:
    found = list(scenes("train", num=num, size=size, seed=seed))
    half = (len(found) + 1) // 2
    for shard, entries in enumerate((found[:half], found[half:])):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for at, (name, scene) in enumerate(entries):
                noisy = Random(f"noise {seed} {name}").random() < NOISE
                other = entries[(at + 1) % len(entries)][1]
                caption = tasks.caption(other if noisy else scene, "en")
                content = json.dumps({"caption": caption, "noisy": noisy, "url": "", **_similarities(noisy, name)})
                for suffix, data in (("png", _png(scene)), ("txt", caption.encode()), ("json", content.encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def _similarities(noisy: bool, name: str) -> dict[str, float]:
    """What two CLIPs would say of a web pair, as COYO names it: a wrong caption is less similar, as a rule."""
    random = Random(f"similarity {name}")
    middle = 0.26 if noisy else 0.34
    return {f"clip_similarity_{model}": round(random.gauss(middle, 0.03), 4) for model in ("vitb32", "vitl14")}


def _parquet(folder: Path, num: int, size: int, seed: int) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("demo-data: the format parquet needs pyarrow; pip install 'vlm[data]'") from error
    rows = [
        {
            "id": name,
            "images": [{"bytes": _png(scene), "path": None}],
            "messages": [{"role": "user", "content": "<image>"},
                         {"role": "assistant", "content": tasks.caption(scene, "en")}],
        }
        for name, scene in scenes("train", num=num, size=size, seed=seed)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet", row_group_size=100)


def _text(folder: Path, num: int, size: int, seed: int) -> None:
    found = [tasks.caption(scene, "en") for _, scene in scenes("train", num=num, size=size, seed=seed)]
    _lines(folder, "text.jsonl", [{"text": line} for line in found])
    (folder / "text.txt").write_text("".join(f"{line}\n" for line in found), encoding="utf-8")


def _compositions(folder: Path, num: int, size: int, seed: int) -> None:
    from vlm.demo.articles import write_articles  # imports torch

    write_articles(folder, num, size, seed)


FORMATS: dict[str, Callable[[Path, int, int, int], None]] = {
    "blip": write_blip,
    "coco_captions": _coco_captions,
    "vqav2": _vqav2,
    "refs": _refs,
    "grit": _grit,
    "ocr": _ocr,
    "document_qa": _document_qa,
    "chart_qa": _chart_qa,
    "screens": _screens,
    "gui": write_gui,
    "large_pages": write_large_pages,
    "pairs": _pairs,
    "mmc4": _mmc4,
    "obelics": _obelics,
    "webdataset": _webdataset,
    "parquet": _parquet,
    "text": _text,
    "articles": _compositions,
}
