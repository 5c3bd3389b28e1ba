"""LLaVA-1.5 against the official splice and against transformers' Llava."""

import shutil
from pathlib import Path

import vlm
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.conftest import GOLDEN, golden
from tests.support.parity import assert_same_scores, assert_same_state, check_logits_loss_and_gradients
from tests.support.samples import samples
from tests.support.systems import LLAMA, TOKENIZER, llava_1_5
from vlm.building.network import empty_weights
from vlm.commands.convert import convert
from vlm.checkpoints.tables.llava import LAYOUTS, llava_table
from vlm.codec import step_counts
from vlm.connectors import MLP
from vlm.functional import splice
from vlm.language import CausalLM, Decoding
from vlm.systems import LLaVA15
from vlm.vision import TimmTower

PARTS = ("vision", "connector", "language")


@pytest.mark.parametrize("case", ["llava_splice_flat__a"])
def test_splice_equals_the_official_one(case: str) -> None:
    tensors = golden(case)
    weights = {k.removeprefix("weights/model."): v for k, v in tensors.items() if k.startswith("weights/")}
    features = [tensors[f"inputs/tower_features_{i}"] for i in range(3)]
    codec = llava_1_5().codec
    connector = MLP().build(20, 32)
    connector.load_state_dict({k.removeprefix("mm_projector."): v for k, v in weights.items() if "mm_proj" in k})
    for i in range(3):
        keep = tensors["inputs/attention_mask"][i].bool()
        marked = tensors["inputs/input_ids"][i][keep].tolist()
        widths = [features[i].shape[1]] * marked.count(-200)
        ids, labels, slots = codec.reserve(marked, tensors["inputs/labels"][i][keep].tolist(), widths)
        picture = connector(features[i]).flatten(0, 1) if len(slots) else torch.zeros(0, 32)
        ours = splice(
            weights["embed_tokens.weight"][torch.tensor(ids)], picture, torch.tensor(slots, dtype=torch.int64)
        )
        real = tensors["outputs/attention_mask"][i].bool()
        torch.testing.assert_close(ours, tensors["outputs/inputs_embeds"][i][real], atol=1e-5, rtol=0)
        assert labels.tolist() == tensors["outputs/labels"][i][real].tolist()
        assert list(range(len(ids))) == tensors["outputs/position_ids"][i][real].tolist()


def hf_llava(family: str, changes: dict, *, width: int = 32, heads: int = 4) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=28,
        patch_size=7,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    text = {**LLAMA, **changes, "model_type": family, "vocab_size": 32064}
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=text, image_token_index=32000)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "hidden_size": 64, "rms_norm_eps": 1e-5, "rope_parameters": None}),
        ("mistral", {"sliding_window": 20}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_logits_loss_and_gradients_equal_transformers(family: str, changes: dict, tmp_path: Path) -> None:
    changes = {key: value for key, value in changes.items() if value is not None}
    reference = hf_llava(family, changes)
    tied = changes.get("tie_word_embeddings", False)
    table = llava_table(LAYOUTS["hf_memory"], connector="mlp2x_gelu", num_blocks=2, vocab_rows=32000, tied=tied)
    module = llava_1_5(language=CausalLM(config={**LLAMA, **changes, "model_type": family}))
    published = {n: t for n, t in reference.state_dict().items() if not (tied and n == "lm_head.weight")}
    check_logits_loss_and_gradients(
        module, reference, tmp_path, parts=PARTS, published=published, to_ours=lambda items: table.to_ours(items)[0]
    )


@pytest.mark.parametrize("tied", [False, True])
def test_converted_checkpoints_compute_the_same(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    # 64 wide heads, as in every CLIP: the official layout does not say how many heads there are
    reference = hf_llava("llama", {"tie_word_embeddings": tied}, width=128, heads=2)
    reference.save_pretrained(tmp_path / "hf")
    shutil.copyfile(GOLDEN / "_shared" / "llama_sp_tokenizer.model", tmp_path / "hf" / "tokenizer.model")
    convert(tmp_path / "hf", tmp_path / "ours", system="llava_1_5", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "official", system="llava_1_5", target_layout="official")
    convert(tmp_path / "official", tmp_path / "again", system="llava_1_5", target_layout="ours")
    convert(tmp_path / "again", tmp_path / "back", system="llava_1_5", target_layout="hf")

    module, again = vlm.load(tmp_path / "ours"), vlm.load(tmp_path / "again")
    items = [module.codec.encode(sample) for sample in samples(tmp_path, 3)]
    batch = module.codec.collate(items, counts=step_counts(items))
    with torch.no_grad():
        ours = module.label_logits(batch)
        assert_same_state(again, module)
        assert_same_scores([again.label_logits(batch)], [ours])
        back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
        end = int(batch.text.cu_seqlens[1])
        ids = batch.text.ids[:end].clone()
        ids[batch.text.slots["image"][:16]] = 32000
        mine = batch.text.label_positions[batch.text.label_positions < end]
        for model in (reference, back):
            theirs = model(input_ids=ids[None], pixel_values=batch.views["image"].pixels[:1]).logits[0, mine, :32000]
            torch.testing.assert_close(ours[: len(mine)], theirs, atol=2e-5, rtol=1e-4)
    assert module.generate(samples(tmp_path, 2), decoding=Decoding(max_new_tokens=3))


def test_paper_size_has_the_published_tensors() -> None:
    """Built and carried tensors together are those of the Hugging Face checkpoint, name by name and shape by shape."""
    module = LLaVA15(
        vision=TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-2),
        connector=MLP(),
        language=CausalLM(config={"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5}),
        tokenizer=TOKENIZER,
        template="v1",
    )
    with empty_weights():
        parts = module.build_parts()
        reference = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config={"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5},
                vision_config={
                    "model_type": "clip_vision_model",
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                    "patch_size": 14,
                    "image_size": 336,
                },
            )
        )
    ours = {f"{part}.{n}": tuple(p.shape) for part, network in parts.items() for n, p in network.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in reference.named_parameters()}
    assert sum(p.numel() for p in reference.parameters()) == 7_063_427_072
    table = llava_table(LAYOUTS["hf_memory"], connector="mlp2x_gelu", num_blocks=23, vocab_rows=32000)
    expected = table.check(theirs, side="theirs")
    assert ours == {name: shape for name, shape in expected.items() if not table.is_carried(name)}
    assert module.codec.num_tokens(640, 480) == 576
