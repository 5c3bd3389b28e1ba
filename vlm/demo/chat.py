"""Makes the demo's second LLaMA: the first one tuned on to answer in the forms of systems that leave it as it is.

A frozen language model answers in no form but those it has met. Here a scene told in words stands where a system puts
its image, and questions about it are asked and answered in that system's own template.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

import torch
from transformers import LlamaForCausalLM

from vlm.batch import IGNORE
from vlm.demo import tasks
from vlm.demo.internlm2 import MARKS, write_tokenizer
from vlm.demo.language import collate
from vlm.demo.learning import by_length, learn
from vlm.demo.scenes import make_scene
from vlm.prompts import LlamaTokenizer, Tokenized, Tokenizer, get_template
from vlm.prompts.template import IMAGE
from vlm.prompts.xcomposer import EOA, EOH
from vlm.sample import ImagePart, Message, TextPart

ADDED = (EOH, EOA, *MARKS)
"""Marks of turns that the first LLaMA has no rows for: those of XComposer and XComposer2."""
FORMS = {
    "v1": 2,
    "minigpt4_caption": 2,
    "minigpt4": 6,
    "instructblip": 6,
    "xcomposer_vl": 4,
    "xcomposer": 1,
    "xcomposer2_plain": 2,
}
"""Template: how often it comes, of as many documents as all of these numbers together."""
STEPS = 500
RATE = 6e-4
_BATCH = 16
_CHINESE_SHARE = 0.3
_LINES_SHARE = 0.25
_CELLS = (2, 3, 4, 4, 4, 5)  # the queries of the demos' Q-Formers begin with four by four places
_TURNS = 8
_CAPTION_SHARE = 0.3
_TALK_SHARE = 0.3
_BARE_SHARE = 0.3
_PROMPT_SHARE = 0.3
Pair = tuple[str, str]


def make_chat_llama(folder: Path, *, llama: Path) -> Iterator[str]:
    """Writes the tokenizer, the configuration and the weights.

    Args:
        llama: folder of the first one.

    Yields:
        A line of progress every hundred steps.
    """
    write_tokenizer(folder, llama=llama, marks=ADDED)
    readers = tokenizers(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.resize_token_embeddings(len(readers["xcomposer"]))
    chosen = by_length(
        lambda index: chat(index, readers), lambda found: len(found.ids), first=0, steps=STEPS, batch=_BATCH
    )
    yield from learn(model, map(collate, chosen), steps=STEPS, rate=RATE)
    model.half().save_pretrained(folder)


def tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """Those of each form, as the systems' configurations describe them."""
    path = str(folder)
    cut_apart = LlamaTokenizer(path)  # MiniGPT-4's: a blank before every piece that is tokenized by itself
    xcomposer = LlamaTokenizer(path, legacy=False, added_tokens=ADDED)
    return {
        "v1": LlamaTokenizer(path, legacy=False),
        "minigpt4_caption": cut_apart,
        "minigpt4": cut_apart,
        "instructblip": LlamaTokenizer(path, bos_token="</s>"),
        **dict.fromkeys(("xcomposer_vl", "xcomposer", "xcomposer2_plain"), xcomposer),
    }


def chat(index: int, readers: Mapping[str, Tokenizer]) -> Tokenized:
    """Text number `index`: a conversation about a training scene that is told in words, in one of the forms.

    Some have one question, and are written as a prompt with its answer where the template has another form for it.
    """
    random = Random(f"chat {index}")
    name = random.choices(list(FORMS), list(FORMS.values()))[0]
    told, asked, caption = _about_a_scene(random)
    is_prompt = random.random() < _PROMPT_SHARE
    num = 1 if is_prompt else random.randint(1, _TURNS)
    pairs = [*asked[: num - 1], caption] if random.random() < _CAPTION_SHARE else asked[:num]
    if name == "minigpt4_caption":
        pairs = [caption]
    return in_form(name, told, pairs, readers[name], is_prompt=is_prompt)


def in_form(name: str, told: str, pairs: Sequence[Pair], tokenizer: Tokenizer, *, is_prompt: bool = False) -> Tokenized:
    """Questions and answers in a template, a scene in words where the image of the first question would stand.

    Args:
        name: of the template.
        told: the scene.
        pairs: what is asked and answered.
        is_prompt: as a system is asked, where that form differs; of one pair.
    """
    template = get_template(name)
    roles = ("user", "assistant")
    messages = [Message(role, (TextPart(text),)) for pair in pairs for role, text in zip(roles, pair, strict=True)]
    messages[0] = Message("user", (ImagePart(), TextPart(f"\n{pairs[0][0]}")))
    ids, labels = template.tokenize(messages, tokenizer)
    if is_prompt and template.generation is not None:
        answer = [label for label in labels if label != IGNORE]
        prompt = template.tokenize(messages[:-1], tokenizer, generate=True).ids
        ids, labels = [*prompt, *answer], [*[IGNORE] * len(prompt), *answer]
    at, scene = ids.index(IMAGE), list(tokenizer.encode(told)[0])
    return Tokenized(
        [*ids[:at], *scene, *ids[at + 1 :]],
        [*labels[:at], *[IGNORE] * len(scene), *labels[at + 1 :]],
    )


def _about_a_scene(random: Random) -> tuple[str, list[Pair], Pair]:
    """A training scene in words; what is asked and answered about it, in no order; the request for its caption."""
    language: tasks.Language = "zh" if random.random() < _CHINESE_SHARE else "en"
    scene = make_scene(random, split="train", size=96)
    asked = tasks.questions(scene, language, random)
    if random.random() < _LINES_SHARE:
        told = tasks.as_lines(scene, language, random)
    else:
        told = tasks.as_grid(scene, language, cells=random.choice(_CELLS))
        asked = [turn for turn in asked if turn.task not in ("refer", "ground")]  # a drawing has no boxes
    if random.random() < _TALK_SHARE:
        asked = [*asked, *tasks.dialogue(random, language)]
    random.shuffle(asked)
    request = f"\n{tasks.SHORT[language]}" if random.random() < _BARE_SHARE else ""
    pairs = [(turn.question.removesuffix(request), turn.answer) for turn in asked]
    return told, pairs, (random.choice(tasks.CAPTION_REQUESTS[language]), tasks.caption(scene, language))
