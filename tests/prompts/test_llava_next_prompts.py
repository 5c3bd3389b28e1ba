"""LLaVA-NeXT over Llama 3, against a transcription of `preprocess_llama3` on transformers' own chat template."""

import shutil
from pathlib import Path

import vlm  # noqa: F401
import pytest
from transformers import PreTrainedTokenizerFast

from tests.conftest import GOLDEN
from vlm.batch import IGNORE
from vlm.prompts import IMAGE, HubTokenizer, get_template
from vlm.sample import ImagePart, Message, TextPart

MARKS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
CHAT = (
    "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + (message.content | trim) + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONVERSATIONS = {
    "picture": [
        "<image>\nWhat is it?\n\nLook closely.",
        "A cat.\n\nIt sleeps.",
        "And below?",
        "A dog, 12 kg.",
    ],
    "white space": [" Hello, 1 + 2? \n", "\n 3, I think. "],
    "marks": ["What does <|eot_id|> mean?", "The end of a turn."],
    "several": ["<image>\n<image>\nWhat differs?", "Nothing."],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a byte-level BPE with Llama 3's marks."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copyfile(GOLDEN / "_shared" / "mpt_bpe_tokenizer.json", folder / "plain.json")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "plain.json"),
        bos_token=MARKS[0],
        eos_token=MARKS[4],
        additional_special_tokens=list(MARKS),
        chat_template=CHAT,
    )
    tokenizer.save_pretrained(folder)
    return folder


def messages(turns: list[str]) -> list[Message]:
    made = []
    for at, text in enumerate(turns):
        parts = [part for piece in text.split("<image>") for part in (ImagePart(), TextPart(piece))][1:]
        content = tuple(part for part in parts if not (isinstance(part, TextPart) and not part.text))
        made.append(Message(("user", "assistant")[at % 2], content))
    return made


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_labels_of_llama_3(name: str, folder: Path) -> None:
    published = PreTrainedTokenizerFast.from_pretrained(folder)
    published.add_tokens(["<image>"], special_tokens=True)

    def ids_of(role: str, content: str) -> list[int]:
        ids = published.apply_chat_template([{"role": role, "content": content}], return_dict=False)
        if not any(mark in content for mark in MARKS):
            return ids
        # there a text that spells a mark ends its own turn; here it is text
        inner = published(f"\n\n{content}", add_special_tokens=False, split_special_tokens=True).input_ids
        return [*ids[: ids.index(published.convert_tokens_to_ids("<|end_header_id|>")) + 1], *inner, ids[-1]]

    turns = CONVERSATIONS[name]
    ids = ids_of("system", SYSTEM)
    labels = [IGNORE] * len(ids)
    for at, text in enumerate(turns):
        role = ("user", "assistant")[at % 2]
        turn = ids_of(role, text)[1:]  # a BOS of its own
        ids += turn
        labels += turn if role == "assistant" else [IGNORE] * len(turn)
    marks = {*published.convert_tokens_to_ids(list(MARKS)), published.convert_tokens_to_ids("\n\n")}
    labels = [token if token in marks else label for token, label in zip(ids, labels, strict=True)]
    image = published.convert_tokens_to_ids("<image>")
    ids = [IMAGE if token == image else token for token in ids]
    tokenizer = HubTokenizer(str(folder), add_bos=True, eos_token="<|eot_id|>", pad_token="<|end_of_text|>")
    found = get_template("llava_llama_3").tokenize(messages(turns), tokenizer)
    assert found.ids == ids
    assert found.labels[1:] == labels[1:], "nothing predicts the BOS"
    assert IGNORE in found.labels[1:]

    asked = get_template("llava_llama_3").tokenize(messages(turns[:1]), tokenizer, generate=True).ids
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": turns[0]}]
    prompt = published.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    if not any(mark in turns[0] for mark in MARKS):
        assert asked == [IMAGE if token == image else token for token in prompt]
