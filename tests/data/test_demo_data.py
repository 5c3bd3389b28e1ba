"""The embedded data: the same bytes every time, true statements, and held-out sets of new compositions."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import sentencepiece
import torch
from PIL import Image

from safetensors.torch import load_file
from transformers import (
    BertForMaskedLM,
    BertTokenizer,
    GPT2Tokenizer,
    LlamaForCausalLM,
    OPTForCausalLM,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from vlm.batch import IGNORE
from vlm.checkpoints.artefact import read_artefact
from vlm.data import LlavaJson
from vlm.demo import write_demo_data
from vlm.demo.backbones import train_tokenizer
from vlm.demo.chat import ADDED, in_form, tokenizers
from vlm.demo.gui import make_crowded_screen
from vlm.demo.internlm2 import GROUPS, MARKS
from vlm.demo.language import collate
from vlm.demo.looking import new_qformer
from vlm.demo.med import ToldScenes, new_blip
from vlm.demo.scenes import COLORS, SPLITS, make_scene, split_of
from vlm.demo.sprites import ENGLISH_WORDS, LETTERS, NOUNS, WORDS, letter_spans, sprite, word_mask
from vlm.demo.tasks import LANGUAGES, TASKS, as_grid, caption, choose, padded_box, questions
from vlm.demo.texts import PROMPTS
from vlm.demo.tower import padded_place, patch_labels, rows_of_scenes
from vlm.demo.towers import TOWERS
from vlm.errors import UserError
from vlm.prompts import LlamaTokenizer
from vlm.vision import TimmTower
from vlm.vision.preprocess import ImageTransform

ASSETS = Path(__file__).parents[2] / "vlm/demo/assets"
JSON_DIGEST = "779f5391e3b93e22df97f6338fedd65d9b38f73f2afdd2fdb1b69134fc0b16d4"
"""Of the record files made by `_small`. It changes only together with `_VERSION` in `vlm/demo/write.py`."""


def _small(folder: Path, seed: int = 0) -> Path:
    write_demo_data(folder, num_train=30, num_val=10, num_test=10, size=48, seed=seed)
    return folder


def _digest(folder: Path, pattern: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def test_the_same_bytes_for_a_seed(tmp_path: Path) -> None:
    one, two, other = _small(tmp_path / "one"), _small(tmp_path / "two"), _small(tmp_path / "other", seed=1)
    assert _digest(one, "*.*") == _digest(two, "*.*") != _digest(other, "*.*")
    assert len(list(one.glob("images/*.png"))) == 50
    assert _digest(one, "*_[ci]*.json") == JSON_DIGEST


def test_a_folder_is_written_once(tmp_path: Path) -> None:
    folder = _small(tmp_path / "data")
    before = (folder / "train_captions.json").stat().st_mtime_ns
    assert not write_demo_data(folder, num_train=30, num_val=10, num_test=10, size=48)
    assert (folder / "train_captions.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is not empty and does not hold this data"):
        write_demo_data(folder, num_train=31, num_val=10, num_test=10, size=48)
    with pytest.raises(UserError, match="num_test is 0"):
        write_demo_data(tmp_path / "new", num_test=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_every_file_reads_with_the_ordinary_reader(tmp_path: Path) -> None:
    folder = _small(tmp_path / "data")
    for name, num in (("train_captions", 30), ("train_instruct", 30), ("val_instruct", 10), ("test_instruct", 10)):
        source = LlavaJson(folder / f"{name}.json", image_root=folder / "images")
        samples = [source[index] for index in range(len(source))]
        assert len({image.name for sample in samples for image in sample.images}) == num
        assert all(image.read(sample).size == image.size(sample) for sample in samples for image in sample.images)
        assert len({sample.id for sample in samples}) == len(samples)
        if name in ("val_instruct", "test_instruct"):
            assert {sample.task for sample in samples} == set(TASKS)
            assert all(len(sample.answers) == 1 for sample in samples)
            assert all(bool(sample.images) == (sample.task != "text") for sample in samples)
    assert len(list((folder / "pictures").iterdir())) == 6
    sizes = {Image.open(path).size for path in folder.rglob("*.png")}
    assert len(sizes) > 8, "several sizes and aspect ratios, or padding and cropping would do the same"


def test_held_out_is_new_compositions_of_known_words() -> None:
    compositions = {
        (content, color, place): split_of(content, color, place)
        for contents, places in (([noun.name for noun in NOUNS], range(4)), (WORDS, range(2)))
        for content in contents
        for color in COLORS
        for place in places
    }
    for kept in ((0, 1), (0, 2), (1, 2)):  # any two of content, color and place are met in training, all three are not
        trained = {tuple(key[i] for i in kept) for key, split in compositions.items() if split == "train"}
        assert trained == {tuple(key[i] for i in kept) for key in compositions}
    for split in ("val", "test"):
        held_back = [key for key, found in compositions.items() if found == split]
        assert len(held_back) == len(compositions) / len(COLORS)
        assert {color for _, color, _ in held_back} == set(COLORS)
    for split in SPLITS:
        for index in range(200):
            scene = make_scene(Random(index), split=split, size=96)
            found = Counter(thing.split for thing in scene.things)
            assert found == Counter({"train": len(scene.things)}) if split == "train" else found[split] == 1
            assert set(found) <= {"train", split}
            if scene.sign is not None:
                assert scene.sign.split == split


@pytest.mark.parametrize("index", range(12))
def test_what_is_said_is_what_is_drawn(index: int) -> None:
    scene = make_scene(Random(index), split="train", size=192)
    picture = scene.draw()
    assert picture.size == (scene.width, scene.height)
    for thing in scene.things:
        x0, y0, x1, y1 = thing.box
        # a card's left edge has its colour, and the middle of the card is in the half that its place names
        edge = round((x0 + 0.05 * (x1 - x0)) * scene.width), round((y0 + y1) / 2 * scene.height)
        assert picture.getpixel(edge) == COLORS[thing.color]
        assert thing.place == f"{'bottom' if y0 + y1 > 1 else 'top'} {'right' if x0 + x1 > 1 else 'left'}"
    for one, other in ((a, b) for a in scene.things for b in scene.things if a is not b):
        assert (
            one.box[2] <= other.box[0]
            or other.box[2] <= one.box[0]
            or (one.box[3] <= other.box[1] or other.box[3] <= one.box[1])
        ), "no card hides another"
    for language in LANGUAGES:
        asked = questions(scene, language, Random(index))
        assert len({turn.question for turn in asked}) == len(asked), "one answer to every question"
        told = caption(scene, language)
        for thing in scene.things:
            assert (thing.noun.name if language == "en" else thing.noun.chinese) in told
        nouns = Counter(thing.noun for thing in scene.things)
        counted = [int(turn.answer) for turn in asked if turn.task == "count"]
        assert counted == [*nouns.values(), 0]
        assert sum(turn.task == "color" for turn in asked) == sum(count == 1 for count in nouns.values())
        assert [turn.answer for turn in asked if turn.task == "ocr"] == ([scene.sign.word] if scene.sign else [])


def test_boxes_are_on_the_padded_square_that_the_model_sees() -> None:
    for index in range(8):
        scene = make_scene(Random(index), split="train", size=192)
        square = ImageTransform(200, mode="pad").square(scene.draw())
        for thing in scene.things:
            x0, y0, x1, y1 = (float(value) for value in re.findall(r"\d\.\d\d", padded_box(scene, thing.box)))
            assert square.getpixel((round(200 * (x0 + 0.05 * (x1 - x0))), round(100 * (y0 + y1)))) == pytest.approx(
                COLORS[thing.color], abs=12
            )
            labels = patch_labels([(scene, padded_place(scene))], grid=50).unflatten(0, (50, 50))
            middle = labels[int(25 * (y0 + y1)), int(25 * (x0 + x1))].tolist()
            assert middle[:3] == [NOUNS.index(thing.noun), list(COLORS).index(thing.color), -1]
            assert middle[3:7] == pytest.approx([x0, y0, x1, y1], abs=0.006)


def test_the_art_is_there() -> None:
    assert len(NOUNS) == 48
    for noun in NOUNS:
        x0, y0, x1, y1 = sprite(noun).getchannel("A").getbbox()
        assert max(x1 - x0, y1 - y0) > 60, noun.name
    assert len({word_mask(word).tobytes() for word in WORDS}) == len(WORDS) == 40


def test_the_shipped_tokenizer_is_what_the_command_makes() -> None:
    shipped = sentencepiece.SentencePieceProcessor(model_file=str(ASSETS / "llama/tokenizer.model"))
    made = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer())
    pieces = [shipped.id_to_piece(index) for index in range(shipped.vocab_size())]
    assert pieces == [made.id_to_piece(index) for index in range(made.vocab_size())]
    assert len(pieces) == 1200
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert not [piece for piece in pieces if len(piece) > 1 and re.search(r"[\u4e00-\u9fff]", piece)]
    for text in ("What color is the star?", "two  blanks ", " größe 漢字\n\t", "an owl on a red card"):
        assert shipped.decode(shipped.encode(text)) == text
        assert shipped.unk_id() not in shipped.encode(text)
    assert len(shipped.encode("an owl on a red card")) == 6


PARTS = ("bert", "eva", "blip_vit", "opt", "t5")
"""What the systems around BLIP begin with."""
LATER = ("eva02_e", "eva02_l", "internlm2")
"""What CogVLM, CogAgent and XComposer2 begin with."""


def test_the_small_parts_open_as_published_ones_do() -> None:
    for parts, limit in ((PARTS, 6e6), (LATER, 4e6)):
        files = [file for part in parts for file in (ASSETS / part).iterdir()]
        assert sum(file.stat().st_size for file in files) < limit
    for kind, part in (
        (BertForMaskedLM, "bert"),
        (OPTForCausalLM, "opt"),
        (T5ForConditionalGeneration, "t5"),
        (LlamaForCausalLM, "internlm2"),
    ):
        network, report = kind.from_pretrained(ASSETS / part, output_loading_info=True)
        assert not report["missing_keys"] | report["unexpected_keys"]
        assert network.config.vocab_size == network.get_input_embeddings().weight.shape[0]
    towers = {
        "eva": {"layer": -2, "class_token": True},
        "blip_vit": {"layer": -1, "class_token": True, "final_norm": True},
        "eva02_e": {"layer": -2},
        "eva02_l": {"layer": -2},
    }
    for part, how in towers.items():
        tower = TimmTower(TOWERS[part].architecture, options=TOWERS[part].options, **how).build()
        assert {f"trunk.{name}" for name in load_file(ASSETS / part / "model.safetensors")} == {*tower.state_dict()}


def test_the_small_internlm2_has_grouped_queries_and_the_marks_of_its_turns() -> None:
    config = json.loads((ASSETS / "internlm2/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, GROUPS)
    tokenizer = LlamaTokenizer(str(ASSETS / "internlm2"), added_tokens=MARKS)
    assert [tokenizer.token_id(mark) for mark in MARKS] == [1200, 1201]
    assert len(tokenizer) == config["vocab_size"] == 1202, "the model has the marks itself"


def test_the_second_llama_answers_in_the_form_of_each_system_that_asks_it() -> None:
    network, report = LlamaForCausalLM.from_pretrained(
        ASSETS / "llama_chat", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert (ASSETS / "llama_chat/model.safetensors").stat().st_size < 3.1e6
    readers = tokenizers(ASSETS / "llama_chat")
    marked = readers["xcomposer"]
    assert [marked.token_id(mark) for mark in ADDED] == [1200, 1201, 1202, 1203]
    assert len(marked) == network.config.vocab_size == 1204, "the model has the marks itself"
    newline = marked.token_id("<0x0A>")
    for name in ("v1", "minigpt4", "instructblip", "xcomposer_vl", "xcomposer"):
        rows = []
        for number in range(24):
            random = Random(f"asked {number}")
            scene = make_scene(random, split="val", size=96)
            turn = choose(questions(scene, "en", random), random, task="vqa")
            told = as_grid(scene, "en", cells=4)
            rows.append(in_form(name, told, [(turn.question, turn.answer)], readers[name], is_prompt=True))
        batch = collate(rows)
        with torch.no_grad():
            likeliest = network(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        # how an answer ends says in some forms whether it is the last one, which nobody can know
        ends = (labels == IGNORE) | (labels == 2) | (labels == newline) | (labels >= 1200)
        right = ((likeliest == labels) | ends).all(dim=1).float().mean()
        assert right >= 0.4, (name, float(right))  # measured: 0.54 to 0.67, by a guess 0.02


def test_the_small_qformer_has_what_looks_and_nothing_that_reads() -> None:
    module = new_qformer(bert=ASSETS / "bert", eva=ASSETS / "eva", options=TOWERS["eva"].options)
    shipped = read_artefact(ASSETS / "qformer/artefact")
    assert set(shipped.meta["tensors"]) == module.trained_names()
    assert not [
        name for name in shipped.meta["tensors"] if re.search(r"words|positions|\.mlp\.|\.attention\.|head", name)
    ]
    assert module.qformer.queries.shape[1] == 2 * 4 * 4, "a colour and a name of each place"


def test_the_small_text_model_learns_what_holds_of_an_image() -> None:
    module = new_blip(bert=ASSETS / "bert", vit=ASSETS / "blip_vit", options=TOWERS["blip_vit"].options)
    assert set(read_artefact(ASSETS / "med/artefact").meta["tensors"]) == module.trained_names()
    assert (ASSETS / "med/artefact/model.safetensors").stat().st_size < 2e6
    scenes, mask = ToldScenes(module.codec.tokenizer, size=16, num=20), module.codec.tokenizer.token_id("[MASK]")
    right = 0
    for index in range(20):
        told = scenes[index]
        masked = told.names != IGNORE
        assert torch.equal(masked, told.read == mask)
        restored = torch.where(masked, told.names, told.read)
        if told.holds[0] == 1:
            right += 1
            assert torch.equal(restored[1:], told.written[1:])
            assert set(told.holds.tolist()) <= {1, IGNORE}
        else:
            assert (told.holds[1:] == 0).any()
            assert restored.tolist()[1:] != told.written.tolist()[1:]
    assert 0 < right < 20


def test_a_view_says_what_lies_where() -> None:
    for index in range(8):
        image, placed = rows_of_scenes(Random(index), 224)
        labels = patch_labels(placed, grid=16).unflatten(0, (16, 16))
        for row, column in (labels[..., 1] >= 0).nonzero().tolist():
            color, box = list(COLORS)[int(labels[row, column, 1])], labels[row, column, 3:7]
            edge = (box[0] + 0.06 * (box[2] - box[0])).item(), ((box[1] + box[3]) / 2).item()
            assert image.getpixel((int(224 * edge[0]), int(224 * edge[1]))) == pytest.approx(COLORS[color], abs=40)


def test_the_letters_of_a_screen_are_where_they_are_drawn() -> None:
    for word in ENGLISH_WORDS:
        spans = letter_spans(word)
        assert "".join(letter for letter, *_ in spans) == word
        assert [start for _, start, _ in spans] == sorted(start for _, start, _ in spans)
    shown = make_crowded_screen(Random(0), size=96)
    labels = patch_labels([(shown, (0.0, 0.0, 1.0, 1.0))], grid=100)
    words = [content for content in shown.contents if content.word]
    assert len(words) > 15
    for content in words:
        inside = (labels[:, 3:7] - torch.tensor(content.box)).abs().amax(1) < 1e-6
        assert {LETTERS[int(index)] for index in labels[inside, 7] if index >= 0} == set(content.word or "")
    assert {element.split for element in shown.elements} == {"train"}


@pytest.mark.parametrize(
    ("kind", "part", "first"),
    [
        (BertTokenizer, "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]),
        (GPT2Tokenizer, "opt", ["<s>", "<pad>", "</s>", "<unk>"]),
        (T5Tokenizer, "t5", ["<pad>", "</s>", "<unk>"]),
    ],
)
def test_their_tokenizers_know_every_word_of_the_world(kind: type, part: str, first: list[str]) -> None:
    tokenizer = kind.from_pretrained(ASSETS / part)
    assert tokenizer.convert_ids_to_tokens(range(len(first))) == first
    unknown = tokenizer.convert_tokens_to_ids("[UNK]" if part == "bert" else "<unk>")
    for number in range(60):
        scene = make_scene(Random(f"words {number}"), split="test", size=96)
        for language in LANGUAGES:
            asked = questions(scene, language, Random(number))
            texts = [caption(scene, language), *(f"{turn.question} {turn.answer}" for turn in asked), *PROMPTS]
            for text in texts:
                ids = tokenizer(text).input_ids
                assert unknown not in ids, text
    for noun in NOUNS:
        assert len(tokenizer(f"a {noun.name}", add_special_tokens=False).input_ids) <= 5
    marks = {"bert": ("[CLS]", "[SEP]"), "opt": ("</s>", None), "t5": (None, "</s>")}[part]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a dog").input_ids)
    assert (tokens[0] if marks[0] else None, tokens[-1] if marks[1] else None) == marks
    if part == "t5":
        assert len(tokenizer) == 860
        assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [859, 760]
