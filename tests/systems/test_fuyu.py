"""Fuyu-8B against the official numbers and transformers' own classes."""

import json
import math
import shutil
from pathlib import Path
from random import Random
from typing import Any

import vlm  # first: repairs torchvision
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor, PreTrainedTokenizerFast
from transformers.models.persimmon.modeling_persimmon import PersimmonRotaryEmbedding as FuyuRotary

from callbacks.stage_transition import write_stage
from tests.conftest import golden, golden_json
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import picture, samples
from tests.support.systems import PERSIMMON, ROOT, TOKENIZER, fuyu
from vlm.levels import look_up
from vlm.batch import Row, TokenSequence
from vlm.building.network import empty_weights
from vlm.commands.convert import convert
from vlm.commands.export import export
from vlm.checkpoints.published.family import get_family
from vlm.connectors import Linear
from vlm.errors import SampleError, UserError
from vlm.functional import splice
from vlm.language import CausalLM
from vlm.language.causal_lm import label_logits
from vlm.prompts import IMAGE, FuyuTokenizer, get_template
from vlm.sample import ImagePart, Message, Sample, TextPart, parse_sample
from vlm.stages import Stage, Trained
from vlm.systems import Fuyu
from vlm.vision.patches import Patches, channels_last, joined

PARAMETERS = 9_408_238_592
"""Of the released weights: 262,144 x 4,096 twice, 36 layers of 201,400,448, a norm and the projection."""


def persimmon(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "persimmon",
        "vocab_size": config["vocab"],
        "hidden_size": config["hidden"],
        "intermediate_size": config["mlp"],
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "layer_norm_eps": config["ln_eps"],
        "hidden_act": config["act"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": config["partial_rotary_factor"],
        },
    }


def cutter(config: dict[str, Any]) -> Patches:
    return Patches(config["patch"], max_width=config["pw"], max_height=config["ph"])


def test_patches_equal_the_official_ones() -> None:
    """Also where a picture was scaled: one grey level is 0.0078."""
    tensors, meta = golden("fuyu_model__a"), golden_json("fuyu_model__a")
    config = meta["config"]
    patches = cutter(config)
    for entry in meta["images"]:
        image = Image.fromarray(tensors[f"inputs/img{entry['index']}"].numpy())
        found = look_up(patches(image), patches.table)
        assert patches.grid(*image.size) == (entry["cols"], entry["rows"])
        theirs = tensors[f"outputs/img{entry['index']}_patches"]
        torch.testing.assert_close(channels_last(found), theirs, atol=1e-6, rtol=0)
    official = Patches()
    for height, width, new_height, new_width, rows, columns, num_patches, num_tokens in meta[
        "geometry_official_1080x1920_patch30"
    ]:
        assert official.scaled(width, height) == (new_width, new_height)
        assert official.grid(width, height) == (columns, rows)
        assert (columns * rows, (columns + 1) * rows) == (num_patches, num_tokens)


@torch.no_grad()
def test_the_whole_model_equals_the_official_numbers() -> None:
    """4e-6 seen. The official rows are padded on the left, ours lie one after another."""
    tensors, meta = golden("fuyu_model__a"), golden_json("fuyu_model__a")
    config = meta["config"]
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    language: Any = CausalLM(config=persimmon(config)).build().eval()
    own = {name.removeprefix("language_model."): t for name, t in weights.items() if name.startswith("language_model.")}
    language.load_state_dict(own)
    connector: nn.Module = Linear().build(3 * config["patch"] ** 2, config["hidden"])
    connector.load_state_dict({kind: weights[f"vision_embed_tokens.{kind}"] for kind in ("weight", "bias")})

    sequences, wanted, embedded = [], [], []
    for row, mask in enumerate(tensors["inputs/attention_mask"].bool()):
        ids = tensors["inputs/input_ids"][row][mask]
        slots = (ids == config["img_id"]).nonzero().squeeze(1)
        sequences.append(TokenSequence(ids, torch.zeros_like(ids), slots={"image": slots}))
        wanted.append(tensors["outputs/logits"][row][mask])
        embedded.append(tensors["outputs/inputs_embeds"][row][mask])
    packed = Row.pack(sequences, ["image"])
    features = connector(tensors["inputs/image_patches"][0])
    embeds = splice(language.get_input_embeddings()(packed.ids), features, packed.slots["image"])
    torch.testing.assert_close(embeds, torch.cat(embedded), atol=1e-5, rtol=0)
    torch.testing.assert_close(label_logits(language, embeds, packed), torch.cat(wanted), atol=3e-5, rtol=0)


def test_patches_are_cut_row_by_row_and_joined_again() -> None:
    image = Image.effect_noise((23, 13), 80).convert("RGB")
    patches = Patches(5, max_width=50, max_height=50)
    found = patches(image)
    assert found.shape == (15, 3, 5, 5)
    whole = joined(found, columns=5)
    assert whole.shape == (3, 15, 25)
    assert torch.equal(found[7], whole[:, 5:10, 10:15])
    assert torch.equal(channels_last(found)[7].reshape(5, 5, 3), whole[:, 5:10, 10:15].permute(1, 2, 0))
    assert (whole[:, 13:] == 1).all()


# -- text


def message(*turns: str, images: int = 1) -> list[Message]:
    roles = ("user", "assistant")
    made = [Message(roles[at % 2], (TextPart(text),)) for at, text in enumerate(turns)]
    made[0] = Message("user", (*[ImagePart()] * images, *made[0].content))
    return made


def test_a_question_stands_behind_its_picture() -> None:
    """As `processing_fuyu.py`: the picture, <s>, the question, <0x04>; the answer and its end are trained."""
    template, tokenizer = get_template("fuyu"), fuyu().codec.tokenizer
    bos, mark, end = (tokenizer.token_id(token) for token in ("<s>", "<0x04>", "|ENDOFTEXT|"))
    question, answer, more = (tokenizer.encode(text)[0] for text in ("What is it?\n", "A boat", "Where?"))
    prompt = [IMAGE, bos, *question, mark]
    ids, labels = template.tokenize(message("\nWhat is it?\n", "A boat"), tokenizer)
    assert ids == [*prompt, *answer, end]
    assert labels == [-100] * len(prompt) + [*answer, end]
    assert template.tokenize(message("What is it?\n", "?"), tokenizer, generate=True).ids == prompt
    assert template.tokenize(message("What is it?\n", "A boat", images=0), tokenizer).ids == [*prompt[1:], *answer, end]
    ids, _ = template.tokenize(message("What is it?\n", "A boat", "Where?", "A boat", images=2), tokenizer)
    assert ids == [IMAGE, *prompt, *answer, end, *more, mark, *answer, end]


def test_places_are_tokens_of_whole_numbers(tmp_path: Path) -> None:
    tokenizer = fuyu().codec.tokenizer
    text = "a <box>12, 3, 60, 48</box> b<point>7, 80</point>"
    ids, spans = tokenizer.encode(text)
    token = tokenizer.token_id
    box = [token("<0x00>"), *(token(number) for number in ("12", "3", "60", "48")), token("<0x01>")]
    point = [token("<0x02>"), token("7"), token("80"), token("<0x03>")]
    assert ids == [*tokenizer.encode("a ")[0], *box, *tokenizer.encode(" b")[0], *point]
    assert [text[a:b] for a, b in spans][-4:] == ["<point>", "7", "80", "</point>"]
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(box[:3]) != text  # cut off: no place
    assert [text[a:b] for a, b in tokenizer.encode("at 60")[1]][-2:] != ["60"]  # elsewhere numbers are digits
    with pytest.raises(UserError, match="no token '500' for a place <point>500, 1</point>"):
        tokenizer.encode("<point>500, 1</point>")
    TOKENIZER.save(tmp_path)
    with pytest.raises(UserError, match=r"has no token '.*'; is it Fuyu's"):
        FuyuTokenizer(str(tmp_path)).encode("a")


def test_places_count_in_halves_of_the_scaled_picture(tmp_path: Path) -> None:
    """value / 2 * scale, rounded; the scale is that of the height, and boxes start with y."""
    Image.new("RGB", (120, 160)).save(tmp_path / "a.png")  # to 30 x 40: a quarter
    record = {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
            {"role": "assistant", "content": [{"type": "box", "box": [16, 32, 104, 120], "unit": "pixel"}]},
        ],
    }
    codec = fuyu().codec
    sample = parse_sample(record, image_root=tmp_path)
    (part,) = codec.render_regions(sample).messages[1].content
    assert part == TextPart("<box>4, 2, 15, 13</box>")
    view = codec.view(120, 160)
    (box,) = codec.find_boxes(part.text, size=view.size)
    assert view.in_picture(box) == pytest.approx((16 / 120, 32 / 160, 104 / 120, 120 / 160))
    assert (codec.num_tokens(120, 160), codec.patches.grid(120, 160)) == (16, (3, 4))
    shown = codec.view(50, 35)  # 5 x 4 patches, the last row half filled
    assert shown.in_view((0.0, 0.0, 1.0, 1.0)) == pytest.approx((0, 0, 1, 35 / 40))


def test_places_are_rounded_as_published() -> None:
    """np.round(value / 2 * scale) with the scale as a float32, also where that is half a number."""
    random, codec = Random(1), fuyu().codec
    for _ in range(500):
        width, height = random.randint(20, 200), random.randint(20, 200)
        left, top = random.randint(0, width - 4), random.randint(0, height - 4)
        right, bottom = random.randint(left + 3, width), random.randint(top + 3, height)
        scale = np.float32(codec.patches.scaled(width, height)[1] / height).item()
        official = [int(np.round(value / 2 * scale)) for value in (top, left, bottom, right)]
        box = ((left / width, top / height), (right / width, bottom / height))
        text = codec.template.regions.write("box", [box], size=codec.view(width, height).size)
        assert text == f"<box>{', '.join(map(str, official))}</box>"


def test_pictures_that_cannot_be_cut_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1)).save(tmp_path / "line.png")
    record = {"images": ["line.png"], "messages": [{"role": "user", "content": [{"type": "image"}]},
                                                   {"role": "assistant", "content": "A line."}]}  # fmt: skip
    with pytest.raises(SampleError, match=r"line\.png.*2000x1 pixels.*no pixel wide or high"):
        fuyu().codec.encode(parse_sample(record, image_root=tmp_path))
    with pytest.raises(UserError, match="multiple of the patch's 30 pixels"):
        Patches(30, max_width=100)


# -- checkpoints


def released(folder: Path, *, rows: int = 1280) -> tuple[Path, Any]:
    """transformers' own class with tokenizer and processor, saved in the published names; and the class."""
    text = PERSIMMON | {"vocab_size": rows}
    torch.manual_seed(4)
    config = FuyuConfig(text_config=text, patch_size=10, image_token_id=fuyu().codec.tokenizer.token_id("|SPEAKER|"))
    model = FuyuForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "saved")
    (folder / "hf").mkdir()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "hf/model.safetensors")
    shutil.copyfile(folder / "saved/config.json", folder / "hf/config.json")
    old = folder / "official"
    old.mkdir()
    names = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
             "model.vision_embed_tokens.": "vision_embed_tokens."}  # fmt: skip
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        tensors[names[prefix] + name.removeprefix(prefix)] = tensor.contiguous()
    save_file(tensors, old / "model.safetensors")
    shutil.copyfile(folder / "hf/config.json", old / "config.json")
    for target in (folder / "hf", old):
        shutil.copyfile(ROOT / "vlm/demo/assets/fuyu/tokenizer.json", target / "tokenizer.json")
        size = {"size": {"width": 60, "height": 40}}
        (target / "preprocessor_config.json").write_text(json.dumps(size))
    return old, model


@torch.no_grad()
def test_logits_ids_and_patches_equal_those_of_transformers(tmp_path: Path) -> None:
    """1e-6 seen. Sizes that fit, that fill no whole patch, and one that is scaled down."""
    source, model = released(tmp_path)
    module = vlm.load(source)
    processor = FuyuProcessor(
        FuyuImageProcessor(size={"width": 60, "height": 40}, patch_size={"width": 10, "height": 10}),
        PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json")),
    )
    # torchvision, which the processor scales with, rounds once more on processors without these; one grey level seen
    scales_bytes = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    for width, height in ((60, 40), (33, 21), (9, 40), (90, 41), (700, 117), (31, 400)):
        is_scaled = width > 60 or height > 40
        image = picture(tmp_path, f"{width}x{height}", (width, height), width)
        sample = Sample("s", tuple(message("What is it?\n", "A boat.")), (image,))
        item = module.codec.encode(sample, generate=True)
        batch = module.codec.collate([item], counts={"images": 1.0})
        inputs = processor(images=image.read(sample), text="What is it?\n", return_tensors="pt")
        ids = batch.text.ids.clone()
        ids[batch.text.slots["image"]] = model.config.image_token_id
        assert ids.tolist() == inputs["input_ids"][0].tolist()
        patches = channels_last(batch.views["image"].pixels)
        theirs = inputs.get("pixel_values", inputs.get("image_patches"))
        bound = 1e-6 if scales_bytes or not is_scaled else 2 / 255 + 1e-6
        torch.testing.assert_close(patches, theirs.view_as(patches), atol=bound, rtol=0)
        logits = model(input_ids=ids[None], pixel_values=patches[None]).logits[0]
        packed = Row.pack([TokenSequence(batch.text.ids, torch.zeros_like(ids), slots=item.text[0].slots)], ["image"])
        found = label_logits(module.language, module.embed_row(batch), packed)
        torch.testing.assert_close(found, logits, atol=2e-5, rtol=0)


def test_both_layouts_come_back_bit_equal(tmp_path: Path) -> None:
    released(tmp_path)
    for layout, other in (("official", "hf"), ("hf", "official")):
        convert(tmp_path / layout, tmp_path / f"{layout}_ours", system="fuyu", target_layout="ours")
        for target in (layout, other):
            made = tmp_path / f"{layout}_{target}"
            convert(tmp_path / f"{layout}_ours", made, system="fuyu", target_layout=target)
            before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / target, made))
            assert before.keys() == after.keys()
            assert [name for name in before if not torch.equal(before[name], after[name])] == []
            assert (made / "tokenizer.json").read_bytes() == (tmp_path / layout / "tokenizer.json").read_bytes()
    pool = samples(tmp_path, 3)
    first, *others = (vlm.load(tmp_path / name) for name in ("official", "hf", "official_ours"))
    for other in others:
        assert_same_state(other, first)
        assert_same_scores(other.score(pool), first.score(pool))
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "official", broken)
    tensors = load_file(broken / "model.safetensors")
    assert tensors.keys() == load_file(tmp_path / "saved/model.safetensors").keys()  # as transformers saves
    del tensors["vision_embed_tokens.bias"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match="missing, and the Fuyu official layout needs it"):
        convert(broken, tmp_path / "x", system="fuyu", target_layout="ours")


@torch.no_grad()
def test_an_exported_stage_opens_in_transformers(tmp_path: Path) -> None:
    module = fuyu()
    module.stage = Stage("1_finetune", {"connector": Trained(1.0), "language": Trained(1.0)})
    module.configure_model()
    write_stage(tmp_path / "run/1_finetune/artefact", module, global_step=1)
    export(tmp_path / "run", tmp_path / "exported")
    model, info = FuyuForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    image = picture(tmp_path, "p", (44, 30), 3)
    sample = Sample("s", tuple(message("What is it?\n", "A boat.")), (image,))
    processor = FuyuProcessor.from_pretrained(tmp_path / "exported")
    inputs = processor(images=image.read(sample), text="What is it?\n", return_tensors="pt")
    item = module.codec.encode(sample, generate=True)
    batch = module.codec.collate([item], counts={"images": 1.0})
    ids = batch.text.ids.clone()
    ids[batch.text.slots["image"]] = model.config.image_token_id
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    patches = channels_last(batch.views["image"].pixels)
    logits = model.eval()(input_ids=ids[None], pixel_values=patches[None]).logits[0]
    packed = Row.pack([TokenSequence(batch.text.ids, torch.zeros_like(ids), slots=item.text[0].slots)], ["image"])
    torch.testing.assert_close(
        label_logits(module.language, module.embed_row(batch), packed), logits, atol=2e-5, rtol=0
    )
    again = vlm.load(tmp_path / "exported")
    assert_same_state(again, module)
    assert_same_scores(again.score([sample]), module.score([sample]))


def test_paper_size_has_the_published_tensors() -> None:
    """Names and shapes of transformers' class with the published settings, which are its defaults."""
    with torch.device("meta"):
        theirs = FuyuForCausalLM(FuyuConfig(text_config={"rope_theta": 25000.0, "partial_rotary_factor": 0.5}))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    module = Fuyu(
        patches=Patches(),
        language=CausalLM(config=get_family("fuyu").describe_folder({}, ROOT / "vlm/demo/assets/fuyu")["init_args"][
            "language"]["init_args"]["config"]),
        tokenizer=FuyuTokenizer("adept/fuyu-8b"),
    )  # fmt: skip
    module.codec.tokenizer = fuyu().codec.tokenizer
    with empty_weights():
        parts = module.build_parts()
    ours = {f"{part}.{n}": tuple(t.shape) for part, network in parts.items() for n, t in network.state_dict().items()}
    assert get_family("fuyu").table("hf", {}).check(shapes, side="theirs") == ours
    rotary = parts["language"].model.rotary_emb
    # a power, which processors round apart in its last bit
    torch.testing.assert_close(rotary.inv_freq, FuyuRotary(theirs.config.text_config).inv_freq, atol=0, rtol=1e-6)
    assert sum(math.prod(shape) for shape in ours.values()) == PARAMETERS
    assert module.codec.num_tokens(1920, 1080) == 2340
