"""InternLM-XComposer's ids and labels against the official ones (`xcomposer1_templates__a`).

The published `tokenizer.model` is not here. Those of its pieces that the case has are, with their ids: no blank is put
before a text, and `<TOKENS_UNUSED_n>` are tokens of their own.
"""

import vlm  # noqa: F401

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from tests.conftest import golden_json
from vlm.prompts import HubTokenizer, get_template
from vlm.prompts.template import IMAGE, Tokenized
from vlm.prompts.xcomposer import EOA, EOH
from vlm.sample import ImagePart, Message, TextPart

CASE = golden_json("xcomposer1_templates__a", "data.json")
PIECES = {
    "meta": 5648, "▁instruction": 7739, "\n": 364, "You": 2770, "▁are": 657, "▁an": 589, "▁AI": 15358,
    "▁assistant": 17993, "▁whose": 6843, "▁name": 963, "▁is": 505, "▁": 262, "浦": 62412, "语": 60735, ".\n": 756,
    "-": 285, "▁a": 395, "▁convers": 7659, "ational": 1813, "▁language": 4287, "▁model": 1762, "▁that": 560,
    "▁developed": 8020, "▁by": 684, "▁Shanghai": 36956, "▁Laboratory": 31288, "▁(": 451, "上海": 67738,
    "人工智能": 75808, "实验室": 70730, ").": 699, "▁It": 1226, "▁designed": 6342, "▁to": 442, "▁be": 517,
    "▁helpful": 11100, ",": 328, "▁honest": 10894, "▁and": 454, "▁harmless": 51978, "▁can": 777,
    "▁understand": 3696, "▁communicate": 19187, "▁fluent": 19829, "ly": 4563, "▁in": 435, "▁the": 410,
    "▁chosen": 12032, "▁user": 1341, "▁such": 1893, "▁as": 569, "▁English": 6519, "中文": 68242,
    "conversation": 60248, "▁<": 497, "|": 352, "User": 1621, ">:": 27232, "Bot": 23845, "这是什么": 85881,
    "What": 3993, "▁it": 563, "?\n": 5426, "▁A": 493, "▁red": 2674, "▁bus": 5982, "▁hi": 15720, "▁hello": 24176,
    "▁there": 1194, "▁b": 424, "▁ok": 5554, "next": 3761, "<unk>": 0, "<s>": 1, "</s>": 2, EOH: 103027, EOA: 103028,
}  # fmt: skip
CONTROL = {"<unk>", "<s>", "</s>", EOH, EOA}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HubTokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(PIECES, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    words = sorted(PIECES.keys() - CONTROL, key=len, reverse=True)
    escaped = "|".join("".join(f"\\{c}" if c in "|().?-" else c for c in word) for word in words)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(escaped), behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    folder: Path = tmp_path_factory.mktemp("internlm")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}')
    return HubTokenizer(str(folder), add_bos=True, added_tokens=["<s>", EOH, EOA])


def message(role: str, text: str, *, image: bool = False, begun: bool = False) -> Message:
    return Message(role, ((ImagePart(),) if image else ()) + (TextPart(text),), begun=begun)


def wide(tokens: Tokenized, slots: int) -> tuple[list[int], list[int]]:
    """Ids and labels with -1 at the positions that the image takes."""
    ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(*tokens, strict=True):
        ids += [-1] * slots if token == IMAGE else [token]
        labels += [-100] * slots if token == IMAGE else [label]
    return ids, labels


def masked(ids: list[int]) -> list[int]:
    """Labels of a row by its marks, as `mask_human_targets` finds them."""
    labels, start, last = list(ids), 0, {103027: 0, 103028: 0}
    for at, token in enumerate(ids):
        if token == 103027:
            labels[start : at + 6] = [-100] * len(labels[start : at + 6])
            start = at + 6
        elif token == 103028:
            start = at + 1
        elif token == 2:
            return labels[: at + 1] + [-100] * (len(ids) - at - 1)
        last[token] = at
    return (
        labels[: last[103028] + 1] + [-100] * (len(ids) - last[103028] - 1) if last[103028] > last[103027] else labels
    )


def test_the_mask_of_the_published_code() -> None:
    for case in CASE["mask_human_targets"]:
        assert masked(case["ids"]) == case["targets"]


@pytest.mark.parametrize("case", CASE["train"], ids=["image", "text"])
def test_ids_and_labels_of_training(case: dict, tokenizer: HubTokenizer) -> None:
    for row, text in enumerate(case["text_input"]):
        turns = text.split(" <|")[1:]
        messages = []
        for at, turn in enumerate(turns):
            role = ("user", "assistant")[at % 2]
            said = turn.partition(">: ")[2]
            # `data_mix.py` leaves out the last newline, which this text has
            said = said if at == len(turns) - 1 else said.removesuffix("\n")
            messages.append(message(role, said, image=case["has_img"] and at == 0))
        ids, labels = wide(get_template("xcomposer").tokenize(messages, tokenizer), case["image_positions"])
        length = sum(case["attention_mask"][row])
        assert ids == case["ids"][row][:length]
        assert labels == case["targets"][row][:length]


@pytest.mark.parametrize("case", CASE["conv2text"], ids=range(len(CASE["conv2text"])))
def test_texts_of_fine_tuning(case: dict) -> None:
    """Turned to text as `align_text` does it, a conversation of the data is what the template writes."""
    turns = case["conversations"]
    messages = [message("user" if t["from"] == "human" else "assistant", t["value"]) for t in turns]
    first = TextPart(turns[0]["value"].removeprefix("<image>"))
    messages[0] = Message("user", (ImagePart(), first))
    spans = get_template("xcomposer").render(messages)
    written = "".join(getattr(span, "text", "<image>") for span in spans)
    marked = case["text"].replace("<|Bot|>", f"{EOH} <|Bot|>").replace(" <|User|>", f"{EOA} <|User|>")
    assert written == f" <|User|>:<image>{marked}{EOA}</s>"


def test_prompts_of_the_chat(tokenizer: HubTokenizer) -> None:
    first, later = CASE["chat_prompts"]
    asked = [message("user", first["query"], image=True)]
    template = get_template("xcomposer")
    assert wide(template.tokenize(asked, tokenizer, generate=True), 3)[0] == first["ids"]
    start = first["ids"].index(497)
    vl = wide(get_template("xcomposer_vl").tokenize(asked, tokenizer, generate=True), 3)[0]
    assert vl == [1, *first["ids"][start:]]  # without the meta block
    said = [*asked, message("assistant", "ok"), message("user", later["query"])]
    ids = wide(template.tokenize(said, tokenizer, generate=True), 3)[0]
    history = [*first["ids_history_form"], 1, PIECES["▁ok"]]
    assert ids == [*history, *later["ids"][len(later["history_ids"][0]) :]]
    again = [*said, message("assistant", "ok"), message("user", "next")]
    ids = wide(template.tokenize(again, tokenizer, generate=True), 3)[0]
    assert ids == [*history, *later["ids_history_form"], 1, PIECES["▁ok"], *later["ids"][3:]]
    begun = template.tokenize([*asked, message("assistant", "A red", begun=True)], tokenizer, generate=True)
    assert wide(begun, 3)[0] == [*first["ids"], PIECES["▁A"], PIECES["▁red"]]


WORDS = st.lists(st.sampled_from(["A", "red", "bus", "浦语", "\n", "hi", EOH, "</s>", "zzz"]), min_size=1).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_conversation_is_masked_as_published(
    tokenizer: HubTokenizer, exchanges: list[tuple[str, str]], image: bool
) -> None:
    messages = []
    for at, (question, answer) in enumerate(exchanges):
        messages += [message("user", question, image=image and at == 0), message("assistant", answer)]
    ids, labels = wide(get_template("xcomposer_vl").tokenize(messages, tokenizer), 4)
    assert labels == [-100 if token == -1 else label for token, label in zip(ids, masked(ids), strict=True)]
    assert ids.count(103027) == ids.count(103028) == len(exchanges)  # what the data spells is text
