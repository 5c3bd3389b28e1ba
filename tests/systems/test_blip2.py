"""BLIP-2: texts and labels as published; weights there and back; logits and answers as transformers'; paper size."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm
import yaml
from safetensors.torch import load_file
from transformers import AutoProcessor, Blip2Config, Blip2ForConditionalGeneration

from callbacks.stage_transition import write_stage
from tests.support.blip2 import EVA, OPT, T5, blip2, blip2_t5, opt_tokenizer, t5_tokenizer
from tests.support.blip2 import READER as QUERIES
from tests.support.blip2_qformer import blip2_qformer
from tests.support.instructblip import READS
from tests.support.samples import picture
from vlm.batch import IGNORE
from vlm.building.network import empty_weights
from vlm.checkpoints.published.blip2 import BLIP2Family
from vlm.commands.convert import convert
from vlm.commands.export import export
from vlm.connectors import Linear, QFormer
from vlm.errors import SampleError, UserError
from vlm.language import CausalLM, Decoding, Seq2SeqLM
from vlm.recipes.catalogue import find_recipe
from vlm.recipes.reading import load_recipe
from vlm.registry import recipe_folder
from vlm.sample import ImagePart, Message, Sample, TextPart
from vlm.stages import InitFrom, Stage, Trained
from vlm.systems import BLIP2, BLIP2T5
from vlm.vision import TimmTower

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
READER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "encoder_hidden_size": 32,
}


def ask(folder: Path, question: str, answer: str | None = None) -> Sample:
    asked = Message("user", (ImagePart(), *((TextPart(question),) if question else ())))
    told = () if answer is None else (Message("assistant", (TextPart(answer),)),)
    return Sample("7", (asked, *told), (picture(folder, "7", (30, 40), 1),), source="test.json")


def test_every_token_of_a_caption_is_a_target_and_no_token_of_a_prompt(tmp_path: Path) -> None:
    tokenizer = opt_tokenizer()
    caption = blip2().codec.encode(ask(tmp_path, "", " a red bus ")).text[0]
    told = tokenizer.encode("a red bus\n")[0]
    bos, newline = tokenizer.token_id("</s>"), tokenizer.eos_id
    assert tokenizer.decode([newline]) == "\n"
    assert caption.ids[4:].tolist() == [bos, *told]
    assert caption.slots["image"].tolist() == [0, 1, 2, 3]
    assert caption.targets.tolist() == [*[IGNORE] * 3, bos, *told, IGNORE]  # the last query predicts the start
    prompted = blip2().codec.encode(ask(tmp_path, "a photo of", "a red bus")).text[0]
    whole, prompt = (tokenizer.encode(text)[0] for text in ("a photo of a red bus\n", "a photo of"))
    assert prompted.ids[4:].tolist() == [bos, *whole]
    answer = whole[len(prompt) :]
    assert prompted.targets.tolist() == [*[IGNORE] * (4 + len(prompt)), *answer, IGNORE]
    asked = blip2(template="blip2_opt_vqa").codec.encode(ask(tmp_path, "what color?"), generate=True).text[0]
    assert asked.ids[4:].tolist() == [bos, *tokenizer.encode("Question: what color? Answer:")[0]]
    short = blip2(max_text=5).codec.encode(ask(tmp_path, "", "a red bus and a red bus"))
    assert len(short.text[0].ids) == 4 + 5
    assert short.counts == {"lm": 5.0, "cut_answers": 1.0}
    t5 = blip2_t5(template="blip2_t5_vqa").codec.encode(ask(tmp_path, "what color?", "red"))
    question, red = (t5_tokenizer().encode(text)[0] for text in ("Question: what color? Short answer:", "red"))
    assert t5.text[0].ids[4:].tolist() == [*question, 1]
    assert t5.rows["decoder"][0].ids.tolist() == [0, *red]
    assert t5.rows["decoder"][0].targets.tolist() == [*red, 1]


@torch.no_grad()
@pytest.mark.parametrize(("make", "template"), [(blip2, "blip2_opt_vqa"), (blip2_t5, "blip2_t5_vqa")])
def test_a_q_former_reads_the_question(make: Any, template: str, tmp_path: Path) -> None:
    """The user's text between BERT's marks, without the prompt, as long as texts may be; each image with its own."""
    with pytest.raises(UserError, match=r"qformer\.text and qformer_tokenizer belong together"):
        make(qformer_tokenizer=READS)
    queries = QFormer(**QUERIES, text=True, vocab_size=701)
    module = make(qformer=queries, qformer_tokenizer=READS, max_text=12, template=template)
    module.configure_model()
    module.eval()
    short, long = (ask(tmp_path, text, "red") for text in ("what is at the top left?", "what is it? " * 9))
    items = [module.codec.encode(sample, generate=True) for sample in (short, long)]
    asked, cut = (READS.encode(text)[0] for text in ("what is at the top left?", "what is it? " * 9))
    marks = READS.token_id("[CLS]"), READS.token_id("[SEP]")
    reads = [item.rows["qformer"][0].ids.tolist() for item in items]
    assert reads == [[marks[0], *asked, marks[1]], [marks[0], *cut[:10], marks[1]]]
    found = module.encode_images(module.codec.collate(items, counts={}))
    seen = module.vision(module.codec.collate(items, counts={}).views["image"].pixels)
    for row, ids in enumerate(reads):
        ids = torch.tensor([ids])
        alone = module.qformer.match(seen[row : row + 1], ids, torch.ones_like(ids).bool())[:, : queries.num_queries]
        # padded to the longer one in a batch: 1e-7 seen
        torch.testing.assert_close(found[row], module.connector(alone)[0], atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3  # of the same image
    with pytest.raises(SampleError, match="has no image for the Q-Former to look at"):
        module.codec.encode(Sample("1", short.messages[1:]))


def test_fine_tuning_for_questions_reads_with_the_first_stage(tmp_path: Path) -> None:
    """By the recipe: what reads comes from stage 1, what looks from stage 2."""
    first = blip2_qformer(vision=EVA, qformer=QFormer(**QUERIES, text=True, head=True, vocab_size=701), tokenizer=READS)
    second = blip2(seed=1)
    for name, module in (("1_qformer", first), ("2_opt", second)):
        parts = ("qformer", "connector") if name == "2_opt" else ("qformer",)
        module.stage = Stage(name, {part: Trained(lr=1e-3) for part in parts})
        module.configure_model()
        write_stage(tmp_path / name, module, global_step=1)
    [stage] = [node for node in load_recipe(find_recipe("blip2")).nodes if node.name == "3_vqa"]
    follows = [InitFrom(str(tmp_path / entry.stage), entry.parts, leave_out=entry.leave_out) for entry in stage.follows]
    module = blip2(qformer=QFormer(**QUERIES, text=True, vocab_size=701), qformer_tokenizer=READS)
    module.stage = Stage("3_vqa", {"qformer": Trained(lr=1e-3)}, follows=follows)
    module.configure_model()
    taken, looks = module.qformer.state_dict(), second.qformer.state_dict()
    assert all(torch.equal(taken[name], tensor) for name, tensor in looks.items())
    reads = {name for name in taken if name not in looks}
    assert reads == {name for name in taken if ".mlp." in name or name.startswith(("embeddings.w", "embeddings.p"))}
    given = first.qformer.state_dict()
    assert all(torch.equal(taken[name], given[name]) for name in reads)
    assert not any(name.startswith("qformer") for name in module.load_report.new)


@pytest.fixture(scope="module", params=["opt", "t5"])
def published(request, tmp_path_factory) -> Path:
    """A tiny folder as transformers writes it, with its tokenizer; ln_vision adds what LAVIS' does."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    text = {"opt": OPT, "t5": T5 | {"decoder_start_token_id": 0}}[request.param]
    config = Blip2Config(vision_config=TOWER, qformer_config=READER, text_config=text, num_query_tokens=4)
    network = Blip2ForConditionalGeneration(config)
    if request.param == "t5":  # FlanT5's head is a table of its own
        network.language_model.lm_head.weight = torch.nn.Parameter(torch.empty(512, 32))
    for parameter in network.parameters():  # its own rule draws almost nothing
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    for layer in network.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[32:64] = 0
    network.save_pretrained(folder)
    tokenizer = {"opt": opt_tokenizer, "t5": t5_tokenizer}[request.param]()
    for file in Path(tokenizer.path).iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def test_logits_and_answers_are_those_of_transformers(published: Path, tmp_path: Path) -> None:
    module = vlm.load(str(published))
    theirs = Blip2ForConditionalGeneration.from_pretrained(published).eval()
    theirs.vision_model.post_layernorm.eps = 1e-5  # as LAVIS has it; the Hugging Face class takes the tower's 1e-6
    sample = ask(tmp_path, "a photo of", "a red bus")
    item = module.codec.encode(sample)
    batch = module.codec.collate([item], counts=item.counts)
    mark = 511
    theirs.config.image_token_id = theirs.config.image_token_index = mark
    shown = {"pixel_values": batch.views["image"].pixels}
    ids = torch.cat([torch.full((4,), mark), batch.text.ids[4:]])[None]
    told = {"decoder_input_ids": batch.rows["decoder"].ids[None]} if "decoder" in batch.rows else {}
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **shown, **told).logits[0]
        ours = module.label_logits(batch)
    # sums in another order: some 1e-6 of logits of size 5
    torch.testing.assert_close(ours, logits[module.label_row(batch).label_positions], atol=3e-5, rtol=1e-5)
    asked = module.codec.encode(sample, generate=True).text[0].ids[4:]
    asked = torch.cat([torch.full((4,), mark), asked])[None]
    search = {"max_new_tokens": 8, "num_beams": 3, "length_penalty": -1.0}
    eos = module.codec.tokenizer.eos_id
    with torch.no_grad():
        written = theirs.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            eos_token_id=eos,
            pad_token_id=mark,
            decoder_start_token_id=0,
            **shown,
            **search,
        )[0]
    answer = module.generate([sample], decoding=Decoding(**search))[0]
    written = [token for token in written.tolist() if token != mark][len(asked[0]) - 4 if not told else 1 :]
    assert answer == module.codec.decode(written)


def test_published_weights_there_and_back(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "ours", system="blip2", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "hf", system="blip2", target_layout="hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    convert(tmp_path / "ours", tmp_path / "official", system="blip2", target_layout="official")
    trained = load_file(tmp_path / "official" / "model.safetensors")
    projection = "t5_proj" if "t5_proj.weight" in trained else "opt_proj"
    assert torch.equal(trained["query_tokens"], before["query_tokens"])
    assert torch.equal(trained[f"{projection}.weight"], before["language_projection.weight"])
    assert {name.split(".")[0] for name in trained} == {"Qformer", "query_tokens", "ln_vision", projection}
    source = tmp_path / "blip2_pretrained.pth"
    torch.save({"model": trained}, source)
    with pytest.raises(UserError, match=r"trained alone; say with --vision where eva_vit_g.pth lies"):
        convert(source, tmp_path / "no", system="blip2", target_layout="ours")
    convert(source, tmp_path / "over", system="blip2", target_layout="ours", vision="eva", base="opt")
    convert(tmp_path / "over", tmp_path / "again", system="blip2", target_layout="official")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_an_exported_stage_is_asked_through_its_processor(kind: str, tmp_path: Path) -> None:
    """Ids and pixels of ours, and answers as ours; the table of tokens has a row for `<image>`, which ours lacks."""
    if kind == "opt":
        module = blip2(language=CausalLM(config=OPT | {"vocab_size": len(opt_tokenizer())}))
    else:
        module = blip2_t5(seed=2, language=Seq2SeqLM(config=T5 | {"vocab_size": len(t5_tokenizer())}))
    module.stage = Stage("2", {part: Trained(lr=1e-3) for part in ("qformer", "connector")})
    module.configure_model()
    write_stage(tmp_path / "run", module, global_step=1)
    report = export(tmp_path / "run", tmp_path / "hf")
    assert not any("opened again" in note for note in report.notes)
    sample = ask(tmp_path, "a photo of")
    item = module.codec.encode(sample, generate=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    given = processor(images=sample.images[0].read(sample), text="a photo of", return_tensors="pt")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert given["input_ids"].tolist() == [[*[image] * 4, *item.text[0].ids[4:].tolist()]]
    pixels = module.codec.collate([item], counts={}).views["image"].pixels
    torch.testing.assert_close(given["pixel_values"], pixels, atol=1e-5, rtol=0)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    theirs.vision_model.post_layernorm.eps = 1e-5  # as LAVIS has it
    assert theirs.config.image_token_id == image < theirs.config.text_config.vocab_size
    search = {"max_new_tokens": 6, "eos_token_id": module.codec.tokenizer.eos_id, "decoder_start_token_id": 0}
    written = theirs.generate(**given, **search, pad_token_id=image)[0].tolist()
    answer = module.generate([sample], decoding=Decoding(max_new_tokens=6))[0]
    assert answer
    assert module.codec.decode([token for token in written[-6:] if token not in (0, image)]) == answer


def shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Of a network that is not built."""
    with empty_weights():
        parts = module.build_parts()
    return {f"{part}.{n}": tuple(t.shape) for part, network in parts.items() for n, t in network.state_dict().items()}


def test_flan_t5_has_the_names_and_shapes_of_transformers_at_paper_size() -> None:
    """Over FlanT5-XL; LAVIS' tensors alone are the Q-Former's without words, the norm and the projection."""
    sizes = yaml.safe_load((Path(vlm.__file__).parent / "planning/published.yaml").read_text())["language_models"]
    xl = sizes["flan-t5-xl"]["config"]
    with torch.device("meta"):
        network = Blip2ForConditionalGeneration(Blip2Config(text_config=xl, num_query_tokens=32))
        network.language_model.lm_head.weight = torch.nn.Parameter(torch.empty(xl["vocab_size"], xl["d_model"]))
    theirs = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    table = BLIP2Family().table("hf", {})
    found = table.check(theirs, side="theirs")
    arguments = yaml.safe_load((recipe_folder("blip2") / "model.yaml").read_text())["model"]["init_args"]
    module = BLIP2T5(
        vision=TimmTower(**arguments["vision"]["init_args"] | {"weights": None}),
        qformer=QFormer(),
        connector=Linear(),
        language=Seq2SeqLM(config=xl),
        tokenizer=t5_tokenizer(),
        template="blip2_t5",
    )
    ours = shapes_of(module)
    carried = {name for name in found if table.is_carried(name)}
    assert ours == {name: shape for name, shape in found.items() if name not in carried}
    tied = {"language.encoder.embed_tokens.weight", "language.decoder.embed_tokens.weight"}
    count = sum(torch.Size(shape).numel() for name, shape in ours.items() if name not in tied)
    # Hugging Face's folder has 3,942,446,592, of which a zero bias of keys in each of 39 blocks
    assert count == 985_894_528 + 105_165_056 + 768 * 2048 + 2048 + 2_849_757_184  # tower, Q-Former, projection, FlanT5
    assert count + 39 * 1408 == 3_942_446_592
    trained = {name: shape for name, shape in ours.items() if name.startswith(("qformer.", "connector."))}
    official = BLIP2Family().table("official", {"projection": "t5_proj"}).check(trained, side="ours")
    assert {"t5_proj.weight", "query_tokens", "ln_vision.bias"} <= official.keys()


def test_paper_size_has_the_published_numbers() -> None:
    """BLIP-2 with OPT-2.7B: the official tensors with the language model, and Hugging Face's folder."""
    language = {
        "model_type": "opt",
        "vocab_size": 50304,
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    module = BLIP2(
        vision=TimmTower("eva_giant_patch14_clip_224", layer=-2, class_token=True),
        qformer=QFormer(),
        connector=Linear(),
        language=CausalLM(config=language),
        tokenizer=opt_tokenizer(),
        template="blip2_opt",
    )
    shapes = {name: shape for name, shape in shapes_of(module).items() if name != "language.lm_head.weight"}  # tied
    BLIP2Family().table("hf", {}).check(shapes, side="ours")
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    # Hugging Face adds a zero bias of keys to each of 39 blocks
    assert count + 39 * 1408 == 3_744_761_856
    # official: 50,272 rows, and no bias of keys
    assert count - 32 * 2560 == 3_744_625_024
