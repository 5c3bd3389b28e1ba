"""What is said about a scene, in English and in Chinese: captions, questions with one answer, small talk."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Literal

from vlm.demo.scenes import COLORS, Box, Scene, Thing
from vlm.demo.sprites import NOUNS, Noun

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
TASKS = ("caption", "vqa", "color", "position", "count", "ocr", "refer", "ground", "text")

SHORT = {"en": "Answer the question using a single word or phrase.", "zh": "请用一个词或短语回答。"}
"""LLaVA-1.5's request for a short answer, on a line of its own behind the question."""
REGION = {"en": "Provide a short description for this region.", "zh": "请简短描述这个区域。"}
LOCATE = {
    "en": "Provide the bounding box coordinate of the region this sentence describes.",
    "zh": "请给出这句话所描述区域的边界框坐标。",
}
CAPTION_REQUESTS = {
    "en": ("Describe the image concisely.", "Provide a brief description of the given image.",
           "Summarize the visual content of the image."),
    "zh": ("请简要描述这张图片。", "这张图片里有什么？"),
}  # fmt: skip
_CHINESE = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "top left": "左上", "top right": "右上", "bottom left": "左下", "bottom right": "右下",
    "left": "左", "right": "右", "top": "上", "bottom": "下",
}  # fmt: skip
OPTIONS = {
    "vqa": [noun.name for noun in NOUNS],
    "color": list(COLORS),
    "position": [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")],
    "count": [str(number) for number in range(5)],
}
"""What an English answer of a task may be."""
_OPPOSITES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_MAX_COUNT = 4
_MAX_CHOICES = 4


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `new` where the answer is about a composition that training does not show."""

    task: str
    question: str
    answer: str
    new: bool = False


def as_lines(scene: Scene, language: Language, random: Random) -> str:
    """The scene as sentences that tell all the image shows, in no order."""
    lines = [f"{_at(thing, language)} {padded_box(scene, thing.box)}" for thing in scene.things]
    if scene.sign is not None:
        lines.append(_sign(scene, language))
    random.shuffle(lines)
    return "\n".join(lines)


def as_grid(scene: Scene, language: Language, *, cells: int = 7) -> str:
    """The scene as a drawing in words: row by row, what the middle of each cell of the padded image lies on."""
    side = max(scene.width, scene.height)
    shift_x, shift_y = (side - scene.width) / 2, (side - scene.height) / 2
    content = [(thing.box, f"{_word(thing.color, language)} {_name(thing.noun, language)}") for thing in scene.things]
    if scene.sign is not None:
        content.append((scene.sign.box, f"{_word(scene.sign.color, language)} {scene.sign.word}"))
    middles = [(index + 0.5) / cells * side for index in range(cells)]

    def cell(x: float, y: float) -> str:
        for (x0, y0, x1, y1), text in content:
            if x0 <= (x - shift_x) / scene.width < x1 and y0 <= (y - shift_y) / scene.height < y1:
                return text
        return "."

    return "\n".join(" ".join(cell(x, y) for x in middles) for y in middles)


def caption(scene: Scene, language: Language) -> str:
    """Everything that is in the image, from the top left to the bottom right."""
    parts = {(thing.row, thing.column): _at(thing, language) for thing in scene.things}
    if scene.sign is not None:
        parts[scene.sign.row, 0] = _sign(scene, language)
    phrases = [parts[key] for key in sorted(parts)]
    return (", " if language == "en" else "，").join(phrases)


def questions(scene: Scene, language: Language, random: Random) -> list[Turn]:
    """All questions about a scene that have exactly one answer; the nouns that are counted and absent by lot."""
    found: list[Turn] = []
    nouns, colors = Counter(thing.noun for thing in scene.things), Counter(thing.color for thing in scene.things)
    pairs = Counter((thing.noun, thing.color) for thing in scene.things)
    english = language == "en"

    def short(task: str, question: str, answer: str, new: bool) -> None:
        found.append(Turn(task, f"{question}\n{SHORT[language]}", answer, new))

    for thing in scene.things:
        new = thing.split != "train"
        name, color, place = _name(thing.noun, language), _word(thing.color, language), _word(thing.place, language)
        short("vqa", f"What is at the {place}?" if english else f"{place}是什么？", name, new)
        if colors[thing.color] == 1:
            short("vqa", f"What is on the {color} card?" if english else f"{color}卡片上是什么？", name, new)
        if nouns[thing.noun] == 1:
            question = f"What color is the card of the {name}?" if english else f"{name}的卡片是什么颜色？"
            short("color", question, color, new)
            short("position", f"Where is the {name}?" if english else f"{name}在哪里？", place, new)
        if pairs[thing.noun, thing.color] == 1:
            box, phrase = padded_box(scene, thing.box), _phrase(thing, language)
            found.append(Turn("refer", f"{REGION[language]} {box}", phrase, new))
            found.append(Turn("ground", f"{LOCATE[language]} {phrase}", box, new))
    absent = random.choice([noun for noun in NOUNS if noun not in nouns])
    for noun in (*nouns, absent):
        question = f"How many {noun.plural} are there?" if english else f"有几个{noun.chinese}？"
        new = any(thing.noun is noun and thing.split != "train" for thing in scene.things)
        short("count", question, str(nouns[noun]), new or noun is absent)
    if scene.sign is not None:
        new = scene.sign.split != "train"
        short("ocr", "What does the sign say?" if english else "牌子上写着什么？", scene.sign.word, new)
    return found


def choose(turns: Iterable[Turn], random: Random, *, task: str) -> Turn | None:
    """One question of a task by lot; of counts, each number as likely as the others as far as the scene allows it."""
    pool = [turn for turn in turns if turn.task == task]
    if task == "count":
        wanted = sorted({turn.answer for turn in pool})
        # a count of none can be asked of every image, a count of four of few
        weights = [{"0": 0.25, "1": 0.25}.get(answer, 1.0) for answer in wanted]
        answer = random.choices(wanted, weights)[0]
        pool = [turn for turn in pool if turn.answer == answer]
    return random.choice(pool) if pool else None


def choices(answer: str, pool: Iterable[str], random: Random) -> list[str]:
    """Two to four options in any order, the answer among them."""
    others = sorted(set(pool) - {answer})
    found = [answer, *random.sample(others, min(len(others), random.randint(1, _MAX_CHOICES - 1)))]
    random.shuffle(found)
    return found


def padded_box(scene: Scene, box: Box) -> str:
    """LLaVA's form of a box: shares of the padded square's side, two decimals."""
    side = max(scene.width, scene.height)
    shift_x, shift_y = (side - scene.width) / 2, (side - scene.height) / 2
    x0, y0, x1, y1 = box
    values = (x0 * scene.width + shift_x, y0 * scene.height + shift_y, x1 * scene.width + shift_x,
              y1 * scene.height + shift_y)  # fmt: skip
    return "[" + ", ".join(f"{value / side:.2f}" for value in values) + "]"


def dialogue(random: Random, language: Language) -> list[Turn]:
    """One or two turns that need no image."""
    number, addend = random.randrange(10), random.randrange(10)
    word, noun, color = random.choice(list(_OPPOSITES)), random.choice(NOUNS), random.choice(list(COLORS))
    if language == "en":
        pairs = [
            (f"What is {number} plus {addend}?", str(number + addend)),
            (f"What is the opposite of {word}?", _OPPOSITES[word]),
            (f"What is the plural of {noun.name}?", noun.plural),
            (f"How do you write {noun.name} in Chinese?", noun.chinese),
            (f"Is {color} a color or a thing?", "a color"),
            (f"Is {noun.name} a color or a thing?", "a thing"),
        ]
    else:
        pairs = [
            (f"{number}加{addend}等于几？", str(number + addend)),
            (f"{_CHINESE[word]}的反义词是什么？", _CHINESE[_OPPOSITES[word]]),
            (f"{noun.chinese}用英语怎么说？", noun.name),
            (f"{_CHINESE[color]}用英语怎么说？", color),
        ]
    return [Turn("text", *pair) for pair in random.sample(pairs, random.choice((1, 2)))]


def conversation(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Question and answer pairs in LLaVA's form."""
    return [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)]


def _word(word: str, language: Language) -> str:
    return word if language == "en" else _CHINESE[word]


def _name(noun: Noun, language: Language) -> str:
    return noun.name if language == "en" else noun.chinese


def _phrase(thing: Thing, language: Language) -> str:
    if language == "zh":
        return f"{_CHINESE[thing.color]}卡片上的{thing.noun.chinese}"
    return f"{_a(thing.noun.name)} on {_a(thing.color)} card"


def _at(thing: Thing, language: Language) -> str:
    if language == "zh":
        return f"{_CHINESE[thing.place]}是{_phrase(thing, language)}"
    return f"{_phrase(thing, language)} at the {thing.place}"


def _sign(scene: Scene, language: Language) -> str:
    sign = scene.sign
    assert sign is not None
    color = _word(sign.color, language)
    return f"{_a(color)} sign that says {sign.word}" if language == "en" else f"{color}的牌子上写着{sign.word}"


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
