"""InstructBLIP: texts, labels and what is cut, token by token; weights there and back; answers as transformers'."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
import vlm
from safetensors.torch import load_file
from transformers import AutoProcessor, BertTokenizerFast, InstructBlipConfig, InstructBlipForConditionalGeneration

from callbacks.stage_transition import write_stage
from tests.conftest import GOLDEN, golden, golden_json
from tests.support.blip2 import T5, t5_tokenizer
from tests.support.instructblip import LLAMA
from tests.support.samples import picture
from tests.support.systems import build, make
from vlm.batch import IGNORE
from vlm.building.network import empty_weights
from vlm.checkpoints.published.family import get_family
from vlm.codec import step_counts
from vlm.commands.convert import convert
from vlm.commands.export import export
from vlm.evaluation.inference import as_pack, evaluating
from vlm.errors import SampleError, UserError
from vlm.connectors import Linear, QFormer
from vlm.language import CausalLM, Decoding
from vlm.registry import recipe_folder
from vlm.systems import InstructBLIP
from vlm.prompts import LlamaTokenizer, get_template
from vlm.prompts.bert import BertTokenizer
from vlm.sample import ImagePart, Message, Sample, TextPart
from vlm.systems.instructblip import InstructCodec
from vlm.vision import TimmTower, TowerFacts
from vlm.vision.preprocess import ImageTransform

CASE = "instructblip_qformer__a"
HF_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
HF_READER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 66,
    "encoder_hidden_size": 32,
}
VICUNA = LlamaTokenizer(str(GOLDEN / "_shared" / "llama_sp_tokenizer.model"), pad_token="[PAD]", bos_token="</s>")


def ask(folder: Path, question: str, answer: str | None = None, *, images: int = 1) -> Sample:
    files = tuple(picture(folder, f"{number}", (30, 40), number) for number in range(images))
    asked = Message("user", (*(ImagePart() for _ in files), TextPart(f"\n{question}")))
    told = () if answer is None else (Message("assistant", (TextPart(answer),)),)
    return Sample(id="7", messages=(asked, *told), images=files, source="test.json")


def bert_tokenizer(folder: Path, words: list[str]) -> BertTokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return BertTokenizer(str(folder), added_tokens=["[DEC]"])


def codec(tmp_path: Path, **changes) -> InstructCodec:
    meta = golden_json(CASE)
    arguments = {
        "reader": bert_tokenizer(tmp_path / "bert", meta["bert_vocab"]),
        "max_read": 128,
        "max_images": 4,
        "tokenizer": VICUNA,
        "template": dataclasses.replace(get_template("instructblip")),
        "tower": TowerFacts(dim=24, image_size=28, num_tokens=4, grid=4, num_blocks=1, depth=1),
        "transform": ImageTransform(size=28, mode="squash"),
        "augment": None,
        "max_tokens": 2048,
    }
    return InstructCodec(**(arguments | changes))


def test_ids_and_labels_are_the_published_ones(tmp_path: Path) -> None:
    meta, tensors = golden_json(CASE), golden(CASE)
    made = codec(tmp_path)
    asked = [ask(tmp_path, q, a) for q, a in zip(meta["text_input"], meta["text_output"], strict=True)]
    items = [made.encode(sample) for sample in asked]
    batch = made.collate(items, counts=step_counts(items))
    read = batch.rows["qformer"].padded(0)
    mask = tensors["inputs/qformer_attention_mask"].bool()
    assert torch.equal(read.ids, tensors["inputs/qformer_input_ids"])
    assert torch.equal(read.mask, mask)
    for at, item in enumerate(items):
        there = tensors["outputs/llm_attention_mask"][at].bool()
        ids, labels = tensors["outputs/llm_token_ids"][at], tensors["outputs/llm_labels"][at]
        text = item.text[0]
        assert text.slots["image"].tolist() == [0, 1, 2, 3]
        assert text.ids[4:].tolist() == ids[there[4:]].tolist()
        assert text.targets.tolist() == [*labels[there][1:].tolist(), IGNORE]
    assert batch.counts["lm"] == (tensors["outputs/llm_labels"] != IGNORE).sum()
    prompt = made.encode(asked[0], generate=True).text[0]
    assert prompt.ids.tolist() == items[0].text[0].ids[: len(prompt.ids)].tolist()
    assert (prompt.targets == IGNORE).all()


def test_what_is_too_long_is_cut_as_published_and_counted(tmp_path: Path) -> None:
    words = golden_json(CASE)["bert_vocab"]
    template = dataclasses.replace(get_template("instructblip"), max_instruction=8, max_output=6)
    made = codec(tmp_path, template=template, max_read=8)
    question, answer = "how many people are in the park with a dog ?", "two small dogs sitting in the snow"
    item = made.encode(ask(tmp_path, question, answer))
    theirs = BertTokenizerFast.from_pretrained(tmp_path / "bert", truncation_side="left")
    assert len(words) == len(theirs)
    assert item.rows["qformer"][0].ids.tolist() == theirs(question, truncation=True, max_length=8).input_ids
    asked, told = (VICUNA.encode(text)[0] for text in (question, answer))
    assert item.text[0].ids[4:].tolist() == [2, *asked[-7:], *told[:5]]  # the answer has lost its end
    assert item.text[0].targets[-6:].tolist() == [*told[:5], IGNORE]
    assert item.counts == {"lm": 5.0, "cut_instructions": 1.0, "cut_answers": 1.0}
    prompt = made.encode(ask(tmp_path, question, answer), generate=True)
    assert prompt.text[0].ids[4:].tolist() == [2, *asked]  # a prompt is whole, what the Q-Former reads is not
    assert prompt.rows["qformer"][0].ids.tolist() == item.rows["qformer"][0].ids.tolist()
    assert made.encode(ask(tmp_path, "a dog", "two")).counts == {"lm": 2.0}
    assert step_counts([item, item])["cut_answers"] == 2.0


def test_a_conversation_is_a_sequence_for_each_answer(tmp_path: Path) -> None:
    """What is asked later is read by no earlier answer, by the Q-Former neither."""
    made = codec(tmp_path)
    first = ask(tmp_path, "is it red ?", "yes", images=2)
    more = (Message("user", (TextPart("the color"),)), Message("assistant", (TextPart("blue"),), weight=0.5))
    both = made.encode(dataclasses.replace(first, messages=(*first.messages, *more)))
    alone = made.encode(first)
    assert len(both.text) == 2
    assert torch.equal(both.text[0].ids, alone.text[0].ids)
    assert both.counts == {"lm": alone.counts["lm"] + 0.5 * 2}
    second = VICUNA.encode("is it red ?\nyes\nthe color")[0]
    assert both.text[1].ids[8:].tolist() == [2, *second, *VICUNA.encode("blue")[0], 2]
    assert [len(read.ids) for read in both.rows["qformer"]] == [6, 6, 9, 9]  # one for each image of each exchange
    batch = made.collate([both], counts=step_counts([both]))
    assert len(batch.views["image"].pixels) == len(both.rows["qformer"]) == 4
    unheard = dataclasses.replace(first.messages[1], weight=0.0)
    later = made.encode(dataclasses.replace(first, messages=(first.messages[0], unheard, *more)))
    assert later.counts == {"lm": 1.0}
    assert torch.equal(later.text[0].ids, both.text[1].ids)


def test_what_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    made = codec(tmp_path)
    frames = ask(tmp_path, "what is it ?", "two", images=5)
    with pytest.raises(SampleError, match=r"sample '7'.*5 images or frames, this system takes 1 to 4"):
        made.encode(frames)
    with pytest.raises(SampleError, match="has 0 images or frames"):
        made.encode(ask(tmp_path, "what is it ?", "two", images=0))
    with pytest.raises(SampleError, match=r"the instruction is empty; say something .*WithInstructions"):
        made.encode(ask(tmp_path, "", "two"))
    with pytest.raises(SampleError, match="no answer; add one"):
        made.encode(ask(tmp_path, "what ?"))
    assert len(made.encode(dataclasses.replace(frames, **four(frames))).text[0].slots["image"]) == 4 * 4


def four(sample: Sample) -> dict:
    asked = sample.messages[0]
    return {
        "images": sample.images[:4],
        "messages": (dataclasses.replace(asked, content=asked.content[1:]), *sample.messages[1:]),
    }


@pytest.fixture(scope="module", params=["llama", "t5"])
def published(request, tmp_path_factory) -> Path:
    """A tiny folder as transformers writes it, with its tokenizers; ln_vision adds what LAVIS' does."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    lavis = T5 | {"decoder_start_token_id": 0, "dense_act_fn": "gelu"}  # FlanT5's own says gelu_new
    config = InstructBlipConfig(
        vision_config=HF_TOWER,
        qformer_config=HF_READER,
        text_config={"llama": LLAMA | {"model_type": "llama"}, "t5": lavis}[request.param],
        num_query_tokens=4,
    )
    network = InstructBlipForConditionalGeneration(config)
    if request.param == "t5":  # FlanT5's head is a table of its own
        network.language_model.lm_head.weight = torch.nn.Parameter(torch.empty(512, 32))
    for parameter in network.parameters():  # its own rule draws almost nothing
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    for layer in network.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[32:64] = 0
    network.save_pretrained(folder)
    if request.param == "t5":
        for file in Path(t5_tokenizer().path).iterdir():
            shutil.copyfile(file, folder / file.name)
    else:
        shutil.copyfile(GOLDEN / "_shared" / "llama_sp_tokenizer.model", folder / "tokenizer.model")
    bert_tokenizer(folder / "qformer_tokenizer", golden_json(CASE)["bert_vocab"])
    return folder


def test_logits_and_answers_are_those_of_transformers(published: Path, tmp_path: Path) -> None:
    module = vlm.load(str(published))
    theirs = InstructBlipForConditionalGeneration.from_pretrained(published).eval()
    theirs.vision_model.post_layernorm.eps = 1e-5  # as LAVIS has it; the Hugging Face class takes the tower's 1e-6
    sample = ask(tmp_path, "what color is the bus ? short answer :", "blue")
    batch = module.codec.collate([item := module.codec.encode(sample)], counts=item.counts)
    is_t5 = "decoder" in batch.rows
    mark = 511 if is_t5 else 32000
    read, ids = batch.rows["qformer"].ids[None], batch.text.ids[4:]
    ids = torch.cat([torch.full((4,), mark), ids])[None]
    theirs.config.image_token_id = theirs.config.image_token_index = mark
    shown = {"pixel_values": batch.views["image"].pixels, "qformer_input_ids": read}
    shown["qformer_attention_mask"] = torch.ones_like(read)
    told = {"decoder_input_ids": batch.rows["decoder"].ids[None]} if is_t5 else {}
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **shown, **told).logits[0]
        ours = module.label_logits(batch)
    # sums in another order: 6e-7 measured on logits up to 3.4 (T5: none)
    torch.testing.assert_close(ours, logits[module.label_row(batch).label_positions], atol=2e-5, rtol=1e-5)
    asked = module.codec.encode(sample, generate=True).text[0].ids[4:]
    asked = torch.cat([torch.full((4,), mark), asked])[None]
    search = {"max_new_tokens": 8, "num_beams": 3, "length_penalty": -1.0, "repetition_penalty": 1.5}
    with torch.no_grad():
        written = theirs.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            eos_token_id=module.codec.tokenizer.eos_id,
            pad_token_id=mark,
            decoder_start_token_id=0,
            **shown,
            **search,
        )[0]
    answer = module.generate([sample], decoding=Decoding(**search))[0]
    assert answer
    written = written[1:] if is_t5 else written[-8:]
    assert answer == module.codec.decode(written[written != mark].tolist())


def test_published_weights_there_and_back(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "ours", system="instructblip", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "hf", system="instructblip", target_layout="hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    texts = [json.loads((folder / "config.json").read_text())["text_config"] for folder in (published, tmp_path / "hf")]
    assert texts[0].get("dense_act_fn") == texts[1].get("dense_act_fn")
    assert (tmp_path / "hf" / "qformer_tokenizer" / "vocab.txt").is_file()
    convert(tmp_path / "ours", tmp_path / "official", system="instructblip", target_layout="official")
    trained = load_file(tmp_path / "official" / "model.safetensors")
    projection = "t5_proj" if texts[0]["model_type"] == "t5" else "llm_proj"
    assert torch.equal(trained["query_tokens"], before["query_tokens"])
    assert torch.equal(trained[f"{projection}.weight"], before["language_projection.weight"])
    assert {name.split(".")[0] for name in trained} == {"Qformer", "query_tokens", "ln_vision", projection}
    torch.save({"model": trained}, tmp_path / "instruct_blip_trimmed.pth")
    source = tmp_path / "instruct_blip_trimmed.pth"
    with pytest.raises(UserError, match=r"trained alone; say with --vision where eva_vit_g.pth lies"):
        convert(source, tmp_path / "no", system="instructblip", target_layout="ours")
    parts = {"vision": "eva", "base": "language"}
    convert(source, tmp_path / "over", system="instructblip", target_layout="ours", **parts)
    convert(tmp_path / "over", tmp_path / "again", system="instructblip", target_layout="official")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


def test_names_shapes_and_numbers_at_paper_size() -> None:
    family, vicuna = get_family("instructblip"), {"vocab_size": 32001, "intermediate_size": 11008, "hidden_size": 4096}
    vicuna |= {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32}
    config = InstructBlipConfig(qformer_config={"vocab_size": 30523}, text_config=vicuna, num_query_tokens=32)
    with torch.device("meta"):
        theirs = {n: tuple(t.shape) for n, t in InstructBlipForConditionalGeneration(config).state_dict().items()}
    assert sum(map(math.prod, theirs.values())) == 7_913_210_624
    found = family.table("hf", {}).check(theirs, side="theirs")
    carried = {name for name in found if family.table("hf", {}).is_carried(name)}
    assert sum(math.prod(found[name]) for name in carried) == 39 * 1408  # the bias of keys, which is zero
    published = yaml.safe_load((recipe_folder("instructblip") / "model.yaml").read_text())["model"]["init_args"]
    module = InstructBLIP(
        vision=TimmTower(**published["vision"]["init_args"] | {"weights": None}),
        qformer=QFormer(**published["qformer"]),
        connector=Linear(),
        language=CausalLM(config=vicuna),
        tokenizer=VICUNA,
        qformer_tokenizer=BertTokenizer("."),
        image="squash",
    )
    with empty_weights():
        parts = module.build_parts()
    ours = {f"{part}.{n}": tuple(t.shape) for part, built in parts.items() for n, t in built.state_dict().items()}
    assert ours == {name: shape for name, shape in found.items() if name not in carried}
    assert sum(map(math.prod, ours.values())) == 7_913_155_712
    trained = {name: shape for name, shape in ours.items() if name.startswith(("qformer.", "connector."))}
    assert family.table("official", {"projection": "llm_proj"}).check(trained, side="ours").keys() >= {
        "llm_proj.weight",
        "query_tokens",
    }


def test_flan_t5_reads_the_instruction_and_ranks_outputs(tmp_path: Path) -> None:
    """Cut as T5's tokenizers cut, logits as transformers', and choices as one by one."""
    module = build("instructblip_t5")
    for parameter in module.language.parameters():
        parameter.data.mul_(3)  # so that losses differ
    made, tokenizer = module.codec, module.codec.tokenizer
    asked = [ask(tmp_path, text, "red") for text in ("what color is it ?", "where is the thing and where is it ?")]
    item = made.encode(asked[0])
    question = tokenizer.encode("what color is it ?")[0]
    assert item.text[0].ids.tolist() == [*[0] * 4, *question, tokenizer.eos_id]
    assert item.rows["decoder"][0].targets.tolist() == [*tokenizer.encode("red")[0], tokenizer.eos_id]
    made.template = dataclasses.replace(made.template, max_instruction=5, max_output=2)
    cut = made.encode(ask(tmp_path, "what color is it ?", "red red red"))
    assert cut.text[0].ids.tolist()[4:] == [*question[-4:], tokenizer.eos_id]
    assert len(cut.rows["decoder"][0].targets) == 2
    assert (cut.counts["cut_instructions"], cut.counts["cut_answers"]) == (1.0, 1.0)
    made.template = get_template("instructblip")

    candidates = ["red", "a red bus", "blue", "the thing in the picture", "no"]
    wanted = []
    for sample in asked:
        losses = []
        for text in candidates:
            told = dataclasses.replace(sample, messages=(sample.messages[0], Message("assistant", (TextPart(text),))))
            losses.append(-module.score([told])[0].sum().item())
        wanted.append(candidates[losses.index(min(losses))])
    assert module.generate(asked, decoding=Decoding(candidates=tuple(candidates), weighed="sum")) == wanted
    chosen = [dataclasses.replace(sample, choices=tuple(candidates)) for sample in asked]
    letters = ["ABCDE"[candidates.index(text)] for text in wanted]
    assert module.generate(chosen, decoding=Decoding(options="{choice}", weighed="sum")) == letters
    with pytest.raises(SampleError, match="has 0 'choices' to rank"):
        module.generate(asked, decoding=Decoding(options="{choice}"))


@pytest.mark.parametrize("count", [5, 40])
def test_choices_are_weighed_as_one_by_one(count: int, tmp_path: Path) -> None:
    """Behind a prompt each, or, if there are many, side by side behind one; without an end mark, as `predict_class`."""
    module = build("instructblip")
    for parameter in module.language.parameters():
        parameter.data.mul_(3)  # so that losses differ
    choices = tuple(f"{['red', 'blue', 'no'][at % 3]} {at}" for at in range(count))
    asked = [
        dataclasses.replace(ask(tmp_path, text, "red"), choices=choices)
        for text in ("what color is it ?", "where is the thing and where is it ?")
    ]
    decoding = Decoding(options="{choice}", weighed="sum")
    with evaluating(module):
        weighed = module.weigh(as_pack(module, asked, generate=True), decoding)
    for sample, found in zip(asked, weighed, strict=True):
        told = [Message("assistant", (TextPart(choice),)) for choice in choices]
        scored = module.score([dataclasses.replace(sample, messages=(sample.messages[0], one)) for one in told])
        wanted = torch.stack([-score[:-1].sum() for score in scored])
        # sums in another order: 4e-6 seen on losses up to 40
        torch.testing.assert_close(found.losses, wanted, atol=5e-5, rtol=1e-5)
        assert found.likeliest == (choices if count > 26 else "ABCDE")[int(wanted.argmin())]
    assert module.generate(asked, decoding=decoding) == [found.likeliest for found in weighed]


@torch.no_grad()
def test_an_exported_stage_is_asked_through_its_processor(tmp_path: Path) -> None:
    """Ids of both readers and answers are ours; Vicuna's table has no row for `<image>`."""
    module = make("instructblip", language=CausalLM(config=LLAMA | {"vocab_size": 32000}))
    module.configure_model()
    write_stage(tmp_path / "run", module, global_step=1)
    report = export(tmp_path / "run", tmp_path / "hf")
    assert not any("opened again" in note for note in report.notes)
    sample = ask(tmp_path, "what color is the bus ? short answer :")
    item = module.codec.encode(sample, generate=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    text = "what color is the bus ? short answer :"
    given = processor(images=sample.images[0].read(sample), text=text, return_tensors="pt")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert given["input_ids"].tolist() == [[*[image] * 4, *item.text[0].ids[4:].tolist()]]
    assert given["qformer_input_ids"].tolist() == [item.rows["qformer"][0].ids.tolist()]
    theirs = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    theirs.vision_model.post_layernorm.eps = 1e-5  # as LAVIS has it
    assert theirs.config.image_token_id == image < theirs.config.text_config.vocab_size
    written = theirs.generate(**given, max_new_tokens=6, eos_token_id=module.codec.tokenizer.eos_id, pad_token_id=image)
    answer = module.generate([sample], decoding=Decoding(max_new_tokens=6))[0]
    assert answer
    assert module.codec.decode([token for token in written[0][-6:].tolist() if token != image]) == answer
