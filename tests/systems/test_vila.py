"""VILA: its data against the published reader, its connectors, its layouts."""

import vlm

import base64
import io
import json
import math
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tests.conftest import GOLDEN, golden_json
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import picture, samples
from tests.support.systems import LLAMA, vila
from tests.support.training import ListSource
from vlm.building.network import empty_weights
from vlm.commands.convert import convert
from vlm.checkpoints.tables.llava import OFFICIAL, llava_table
from vlm.connectors import MLP, Downsample, Linear
from vlm.data import Best, FewShot, LlavaJson, Mmc4, Mmc4Pairs, VisualFlan, WebDataset
from vlm.errors import SampleError, UserError
from vlm.language import CausalLM, Decoding
from vlm.prompts import IMAGE, LlamaTokenizer, get_template
from vlm.recipes import load_recipe
from vlm.sample import parse_sample
from vlm.vision import TimmTower

TOKENIZER = LlamaTokenizer(str(GOLDEN / "_shared/llama_sp_tokenizer.model"), legacy=False, pad_token="<unk>")
V1 = get_template("v1")


def rows(name):
    return golden_json("vila_docs__a", f"{name}.json")


def written(folder: Path, records, name: str = "records.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


# conversations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", rows("vflan"), ids=lambda row: row["answer"].strip())
def test_instructions_of_vflan_as_in_vila(row, tmp_path: Path):
    images = [f"{number}.jpg" for number in row["image_ids"]]
    record = {"question": row["question"], "answer": row["answer"], "image": images}
    source = VisualFlan(written(tmp_path, [record]))
    sample = source[0]
    assert V1.tokenize(sample.messages, TOKENIZER) == (row["input_ids"], row["labels"])
    assert [int(Path(image.name).stem) for image in sample.images] == (row["image_order"] or [])
    assert source.has_image(0) == bool(images)


@pytest.mark.parametrize("row", rows("sft"), ids=["image", "text"])
def test_conversations_as_in_vila(row, tmp_path: Path):
    record = {"conversations": row["conversation"], **({"image": "9.jpg"} if row["has_image"] else {})}
    sample = LlavaJson(written(tmp_path, [record]))[0]
    assert V1.tokenize(sample.messages, TOKENIZER) == (row["input_ids"], row["labels"])


def test_a_batch_of_all_kinds_as_in_vila():
    """Members stand in a row of their own there; a text-only one brings no picture along."""
    collated, mmc4, [coyo] = rows("collator"), rows("mmc4"), rows("coyo")
    ids = [mmc4[0]["input_ids"], mmc4[1]["input_ids"], *coyo["input_ids"], rows("sft")[1]["input_ids"]]
    ids += [rows("vflan")[0]["input_ids"]]
    order = [*mmc4[0]["image_order"], *mmc4[1]["image_order"], *coyo["image_order"], *rows("vflan")[0]["image_order"]]
    for own, row in zip(ids, collated["input_ids"], strict=True):
        assert row == own + [0] * (len(row) - len(own))
    assert collated["image_order"] == order
    assert sum(own.count(IMAGE) for own in ids) == len(order)


def test_no_system_text_is_a_message_that_says_nothing():
    chat = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    spoken = parse_sample({"messages": [{"role": "system", "content": ""}, *chat]})
    assert "".join(span.text for span in V1.render(spoken.messages)) == " USER: Hi ASSISTANT: Hello.</s>"
    assert V1.render(parse_sample({"messages": chat}).messages)[0].text.startswith("A chat between")


# readers ------------------------------------------------------------------------------------------------------------


def png(color="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(stream, "PNG")
    return stream.getvalue()


def test_m3it_flan_and_dialogues(tmp_path: Path):
    dialogue = "Image Descriptions: a boat\nQuestion: Is it big?\nAnswer: yes\nQuestion: What color\nis it?"
    records = [
        {"instruction": "Answer. ", "inputs": "What is this?\n", "outputs": " A boat. ",
         "image_base64_str": [base64.b64encode(png()).decode()]},
        {"inputs": "Translate: Hund", "targets": "dog"},
        {"question": dialogue, "answer": "red", "image": "a.png"},
    ]  # fmt: skip
    source = VisualFlan(written(tmp_path, records))
    assert source.image_mask().tolist() == [True, False, True]
    texts = ["".join(getattr(span, "text", "<>") for span in V1.render(sample.messages)) for sample in source]
    assert texts == [
        " USER: <>\nAnswer. What is this? ASSISTANT:  A boat.</s>",
        " USER: Translate: Hund ASSISTANT: dog</s>",
        " USER: <>\nIs it big? ASSISTANT: yes</s>USER: What coloris it? ASSISTANT: red</s>",
    ]
    assert source[0].images[0].read(source[0]).size == (8, 6)
    named = VisualFlan(written(tmp_path, records), system=None)
    assert V1.render(named[1].messages)[0].text.startswith("A chat between")


def test_flan_is_taken_evenly(tmp_path: Path):
    file = written(tmp_path, [{"id": n, "inputs": f"q{n}", "targets": "a", "image": ["x.png"] * (n % 2)}
                              for n in range(10)])  # fmt: skip
    source = VisualFlan(file, num_samples=4)
    assert [sample.id for sample in source] == ["0", "3", "6", "9"]
    assert source.image_mask().tolist() == [source.has_image(at) for at in range(4)] == [False, True, False, True]
    assert len(VisualFlan(file, num_samples=99)) == 10
    assert [sample.id for sample in VisualFlan(file, num_samples=1)] == ["0"]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"question": "a", "answer": "b", "image": ["x.jpg"] * 9}, "9 pictures, and 8 are the limit"),
        ({"question": "a", "answer": "b", "image": ["no base64!"]}, "neither a path nor base64"),
        ({"answer": "b"}, "'question' is missing"),
        ({"question": "<image>", "answer": "b"}, "the question is empty"),
        ({"question": "Image Descriptions\nQuestion: a\nAnswer: b", "answer": "c", "image": "x.png"}, "in turn"),
    ],
)
def test_bad_instructions_are_refused(record, line, tmp_path: Path):
    with pytest.raises(SampleError, match=line):
        VisualFlan(written(tmp_path, [record]))[0]


def test_the_best_fifth_of_coyo(tmp_path: Path):
    similarities = [0.1, 0.5, 0.4, 0.35, 0.2, 0.45, 0.31, 0.3, 0.5, 0.0]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for at, value in enumerate(similarities):
            facts = {"clip_similarity_vitb32": value, "clip_similarity_vitl14": value}
            for suffix, data in (("png", png()), ("txt", f"{at}".encode()), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"{at}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def kept(best):
        return [int(sample.messages[1].content[0].text) for sample in WebDataset(tmp_path / "0.tar", best=best)]

    assert kept(None) == list(range(10))
    assert kept(Best()) == [1, 8]  # a fifth of all ten
    assert kept(Best(share=0.5)) == [1, 2, 3, 5, 8]
    assert kept(Best(share=1.0)) == [1, 2, 3, 5, 6, 8]  # the sum has to be more than 0.6
    with pytest.raises(UserError, match="sample 0 has no number similarity"):
        kept(Best(keys=["similarity"]))
    with pytest.raises(UserError, match="no pair passes 'best'"):
        kept(Best(above=3.0))


# connectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 5, 24])
def test_downsample_joins_neighbours_down_the_columns(side: int):
    connector = Downsample().build(3, 8)
    features = torch.randn(2, side * side, 3)
    half = (side + 1) // 2
    joined = torch.zeros(2, half * half, 12)
    for column in range(half):
        for row in range(half):
            for number, (y, x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                if 2 * row + y < side and 2 * column + x < side:
                    feature = features[:, (2 * row + y) * side + 2 * column + x]
                    joined[:, column * half + row, 3 * number : 3 * number + 3] = feature
    torch.testing.assert_close(connector(features), connector[1](joined), atol=1e-6, rtol=1e-5)
    assert Downsample().num_tokens(side * side) == half * half


def test_downsample_of_vila_1_5_has_its_published_layers():
    connector = Downsample(depth=2, norm=True).build(6, 8)
    assert {name: tuple(tensor.shape) for name, tensor in connector.state_dict().items()} == {
        "1.weight": (24,),
        "1.bias": (24,),
        "2.weight": (8, 24),
        "2.bias": (8,),
        "4.weight": (8, 8),
        "4.bias": (8,),
    }
    with pytest.raises(UserError, match="5 features are no square map"):
        connector(torch.zeros(1, 5, 6))


def test_a_system_reserves_as_many_tokens_as_the_connector_makes(tmp_path: Path):
    module = vila(connector=Downsample())
    module.configure_model()
    assert module.codec.num_tokens(640, 480) == 4
    pool = samples(tmp_path, 3)
    assert all(score.isfinite().all() for score in module.score(pool))
    items = [module.codec.encode(sample) for sample in pool]
    assert [len(item.text[0].slots["image"]) for item in items] == [4, 0, 8]


def test_pictures_of_a_turn_may_be_many(tmp_path: Path):
    names = [picture(tmp_path, str(n), (30, 20), n).name for n in range(8)]
    record = {"question": "What differs?", "answer": "All.", "image": names}
    module = vila()
    item = module.codec.encode(VisualFlan(written(tmp_path, [record]), image_root=tmp_path)[0])
    assert len(item.text[0].slots["image"]) == 8 * 16


# layouts ------------------------------------------------------------------------------------------------------------


def official_model(folder: Path, connector: str, *, tower: bool) -> dict[str, torch.Tensor]:
    """A tiny checkpoint of VILA v1.0, in names and shapes of LLaVA's class; returns its tensors."""
    torch.manual_seed(3)
    language = LlamaForCausalLM(LlamaConfig(**LLAMA))
    vision = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    layers = {"linear": Linear(), "mlp2x_gelu": MLP(), "mlp_downsample": Downsample(depth=2, norm=True)}[connector]
    projector = layers.build(CLIP["hidden_size"], LLAMA["hidden_size"])
    tensors = {
        **language.state_dict(),
        **{f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()},
    }
    if tower:
        tensors |= {f"model.vision_tower.vision_tower.{at_hub(n)}": t for n, t in vision.state_dict().items()}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = LLAMA | {"mm_projector_type": connector, "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(GOLDEN / "_shared/llama_sp_tokenizer.model", folder / "tokenizer.model")
    return tensors


def at_hub(name: str) -> str:
    return name if name.startswith("vision_model.") else f"vision_model.{name}"


CLIP = {"image_size": 28, "patch_size": 7, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1,
        "intermediate_size": 128, "hidden_act": "quick_gelu"}  # fmt: skip


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("tower", [True, False])
def test_checkpoints_of_v1_come_back_bit_equal(connector: str, tower: bool, tmp_path: Path):
    before = official_model(tmp_path / "official", connector, tower=tower)
    convert(tmp_path / "official", tmp_path / "ours", system="vila", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="vila", target_layout="official")
    assert same(before, load_file(tmp_path / "back" / "model.safetensors"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((tmp_path / "official" / "config.json").read_text())
    if tower:
        module = vlm.load(tmp_path / "ours")
        assert (module.system, module.codec.template.name) == ("vila", "v1")
        assert module.codec.num_tokens(640, 480) == 16
        assert module.generate(samples(tmp_path, 2), decoding=Decoding(max_new_tokens=2))


def part_folders(folder: Path, connector: str, *, aspect: str = "resize") -> dict[str, dict[str, torch.Tensor]]:
    """The same in VILA-1.5's folders."""
    flat = official_model(folder.with_name("flat"), connector, tower=True)
    parts = {"llm": {}, "mm_projector": {}, "vision_tower": {}}
    for name, tensor in flat.items():
        if name.startswith("model.mm_projector."):
            parts["mm_projector"][name.replace("model.mm_projector.", "layers.")] = tensor
        elif name.startswith("model.vision_tower.vision_tower."):
            parts["vision_tower"][name.removeprefix("model.vision_tower.vision_tower.")] = tensor
        else:
            parts["llm"][name] = tensor
    root = {"model_type": "llava_llama", "mm_vision_select_layer": -2, "image_aspect_ratio": aspect}
    configs = {"llm": LLAMA, "mm_projector": {"mm_projector_type": connector}, "vision_tower": CLIP, "": root}
    folder.mkdir()
    for name, config in configs.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        if name:
            save_file({n: t.contiguous() for n, t in parts[name].items()}, folder / name / "model.safetensors")
    shutil.copyfile(GOLDEN / "_shared/llama_sp_tokenizer.model", folder / "llm" / "tokenizer.model")
    return parts


@pytest.mark.parametrize("connector", ["mlp2x_gelu", "mlp_downsample"])
def test_folders_of_1_5_come_back_bit_equal(connector: str, tmp_path: Path):
    parts = part_folders(tmp_path / "official", connector)
    convert(tmp_path / "official", tmp_path / "ours", system="vila", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="vila", target_layout="official")
    for name, before in parts.items():
        assert same(before, load_file(tmp_path / "back" / name / "model.safetensors"))
    for file in tmp_path.glob("official/**/*.json"):
        there = tmp_path / "back" / file.relative_to(tmp_path / "official")
        assert json.loads(there.read_text()) == json.loads(file.read_text())
    assert (tmp_path / "back/llm/tokenizer.model").is_file()
    opened, ours = vlm.load(tmp_path / "official"), vlm.load(tmp_path / "ours")  # as it is, and converted
    pool = samples(tmp_path, 3)
    assert_same_state(ours, opened)
    assert_same_scores(ours.score(pool), opened.score(pool))
    assert opened.system == ours.system == "vila"
    assert opened.codec.transform.mode == "squash"
    assert opened.codec.num_tokens(640, 480) == (4 if connector == "mlp_downsample" else 16)


def test_what_cannot_be_converted_is_said(tmp_path: Path):
    part_folders(tmp_path / "folders", "mlp_downsample")
    with pytest.raises(UserError, match="makes a token of every feature"):
        convert(tmp_path / "folders", tmp_path / "x", system="vila", target_layout="hf")
    with pytest.raises(UserError, match="has the projector mlp_downsample, but llava_1_5 has mlp"):
        convert(tmp_path / "folders", tmp_path / "x", system="llava_1_5", target_layout="ours")
    tower = tmp_path / "folders/vision_tower/model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(tower).items() if "class_embedding" not in name}
    save_file(tensors, tower)
    with pytest.raises(UserError, match="is no CLIP tower"):
        convert(tmp_path / "folders", tmp_path / "x", system="vila", target_layout="ours")


@pytest.mark.parametrize(
    ("connector", "count"),
    # tower 303,507,456 and language model 6,738,415,616 everywhere; then the projector
    [
        ("linear", 7_041_923_072 + 4_198_400),
        ("mlp2x_gelu", 7_041_923_072 + 20_979_712),
        ("mlp_downsample", 7_041_923_072 + 8_192 + 16_781_312 + 16_781_312),
    ],
)
def test_paper_size_has_the_published_tensors(connector: str, count: int):
    description = {"linear": Linear(), "mlp2x_gelu": MLP(), "mlp_downsample": Downsample(depth=2, norm=True)}[connector]
    module = vila(
        vision=TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-2),
        connector=description,
        language=CausalLM(config={"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5}),
    )
    clip = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24,
            "num_attention_heads": 16, "intermediate_size": 4096}  # fmt: skip
    with empty_weights():
        parts = module.build_parts()
        language, vision = LlamaForCausalLM(LlamaConfig(rms_norm_eps=1e-5)), CLIPVisionModel(CLIPVisionConfig(**clip))
    shapes = {"linear": {"": (4096, 1024)}, "mlp2x_gelu": {"0.": (4096, 1024), "2.": (4096, 4096)},
              "mlp_downsample": {"1.": (4096,), "2.": (4096, 4096), "4.": (4096, 4096)}}[connector]  # fmt: skip
    theirs = {name: tuple(tensor.shape) for name, tensor in language.named_parameters()}
    theirs |= {
        f"model.vision_tower.vision_tower.{at_hub(name)}": tuple(tensor.shape)
        for name, tensor in vision.named_parameters()
    }
    for layer, shape in shapes.items():
        theirs |= {f"model.mm_projector.{layer}weight": shape, f"model.mm_projector.{layer}bias": shape[:1]}
    assert sum(math.prod(shape) for shape in theirs.values()) == count
    table = llava_table(OFFICIAL, connector=connector, num_blocks=23, vocab_rows=32000)
    expected = table.check(theirs, side="theirs")
    ours = {f"{part}.{n}": tuple(p.shape) for part, network in parts.items() for n, p in network.named_parameters()}
    assert ours == {name: shape for name, shape in expected.items() if not table.is_carried(name)}
    assert module.codec.num_tokens(640, 480) == (144 if connector == "mlp_downsample" else 576)


# findings -----------------------------------------------------------------------------------------------------------


def test_documents_of_the_ablations(tmp_path: Path):
    record = {"text_list": ["One.", "Two.", "Three."], "image_info": [
        {"image_name": "b.png", "matched_text_index": 2}, {"image_name": "a.png", "matched_text_index": 0},
    ]}  # fmt: skip
    file = written(tmp_path, [record, {"text_list": ["Four."], "image_info": []}, record])
    template = get_template("document")

    def told(sample):
        names = iter(image.name[0] for image in sample.images)
        return "".join(getattr(span, "text", None) or f"<{next(names)}>" for span in template.render(sample.messages))

    assert [told(sample) for sample in Mmc4(file)][:2] == ["<a>One. Two.<b>Three.</s>", "Four.</s>"]
    assert told(Mmc4(file, images_first=True)[0]) == "<a><b>One. Two. Three.</s>"
    pieces = Mmc4Pairs(file)
    assert [told(sample) for sample in pieces] == ["<b>Three.</s>", "<a>One.</s>"] * 2
    assert pieces.image_mask().all()
    assert len(pieces) == 4
    assert len(Mmc4Pairs(file, max_images=1)) == 2


def test_a_literal_mark_in_a_document_is_no_mark():
    content = [{"type": "image"}, {"type": "text", "text": "a <image> tag"}]
    sample = parse_sample({"images": ["a.png"], "messages": [{"role": "document", "content": content}]})
    spans = get_template("document").render(sample.messages)
    assert "".join(getattr(span, "text", "") for span in spans) == "a <IMAGE> tag</s>"


def test_every_finding_is_a_recipe_with_its_demo():
    folder = Path(__file__).parents[2] / "configs/vila/findings"
    files = sorted(folder.glob("*.yaml"))
    assert len(files) >= 10
    used = set()
    for file in files:
        for node in load_recipe(file).nodes:
            assert [overlay for overlay in node.overlays if not overlay.is_file()] == []
            used |= {config.resolve() for config in node.configs}
    assert {path.resolve() for path in folder.glob("changes/*.yaml")} <= used


# solved examples ----------------------------------------------------------------------------------------------------


def asked(name: str, task: str, **more):
    content = [{"type": "image"}, {"type": "text", "text": f"\n{name}?"}]
    return parse_sample({"id": name, "task": task, "images": [f"{name}.png"], "messages": [
        {"role": "user", "content": content}, {"role": "assistant", "content": f"{name}!"}]} | more)  # fmt: skip


def test_examples_stand_in_front_of_a_question():
    pool = ListSource([asked(f"{task}{n}", task) for task in "ab" for n in range(6)])
    few = FewShot(pool, pool, shots=4)
    for at in range(len(few)):
        sample, plain = few[at], pool[at]
        assert sample.messages[-2:] == plain.messages
        assert sample.images[-1:] == plain.images
        examples = [image.name for image in sample.images[:-1]]
        assert len(set(examples)) == 4
        assert plain.images[0].name not in examples
        assert {name[0] for name in examples} == {plain.task}  # of the same task
        texts = "".join(getattr(span, "text", "<>") for span in V1.render(sample.messages, generate=True))
        assert texts.count("<>") == 5
        assert texts.endswith("ASSISTANT:")
        assert few[at] == sample
    assert FewShot(pool, pool, shots=0)[3] == pool[3]
    assert FewShot(pool, pool, seed=1)[0] != few[0]
    with pytest.raises(SampleError, match="found 5 of 6 examples with an answer in list for the task 'a'"):
        FewShot(pool, pool, shots=6)[0]


def test_examples_take_answers_and_regions_along():
    box = [{"type": "box", "box": [0.1, 0.2, 0.5, 0.9]}]
    question = [{"role": "user", "content": [{"type": "image"}, *box]}]
    example = asked(
        "e", "a", messages=question, answers=[{"text": "no", "weight": 1.0}, {"text": "yes", "weight": 9.0}]
    )
    few = FewShot(ListSource([asked("q", "a", messages=question)]), ListSource([example]), shots=1)[0]
    assert [message.role for message in few.messages] == ["user", "assistant", "user"]
    assert few.messages[1].content[0].text == "yes"
    assert [part.image for m in few.messages for part in m.content if hasattr(part, "image")] == [0, 1]
