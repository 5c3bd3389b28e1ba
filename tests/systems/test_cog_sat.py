"""CogVLM's and CogAgent's first releases, files of SwissArmyTransformer, against their Hugging Face files."""

import json
import shutil
from pathlib import Path
from typing import Any

import vlm
import pytest
import torch
from safetensors.torch import load_file

from tests.systems.test_cogagent import published_folder as cogagent_folder
from tests.systems.test_cogvlm import published_folder as cogvlm_folder
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.family import find_family, get_family, look_into
from vlm.commands.convert import convert
from vlm.errors import UserError

LAYER = {
    *("transformer.layers.1.input_layernorm.weight", "transformer.layers.1.post_attention_layernorm.weight"),
    *("transformer.layers.1.attention.query_key_value.weight", "transformer.layers.1.attention.dense.weight"),
    *("transformer.layers.1.mlp.dense_h_to_4h.weight", "transformer.layers.1.mlp.dense_4h_to_h.weight"),
    *("mixins.mlp.gate_proj.1.weight", "mixins.mlp.vision_gate_proj.1.weight"),
    *("mixins.mlp.vision_dense_h_to_4h_list.1.weight", "mixins.mlp.vision_dense_4h_to_h_list.1.weight"),
    *("mixins.rotary.vision_query_key_value_list.1.weight", "mixins.rotary.vision_dense_list.1.weight"),
}
CROSS = {
    *(f"transformer.layers.1.cross_attention.{part}.weight" for part in ("query", "key_value", "dense")),
    "transformer.layers.1.post_cross_attention_layernorm.weight",
}
"""What a layer of the language model has, written out from the authors' code."""
PARTS = {
    *("transformer.word_embeddings.weight", "transformer.final_layernorm.weight", "mixins.lm.lm_head.weight"),
    *("mixins.eva.boi", "mixins.eva.eoi", "mixins.eva.linear_proj.norm1.bias"),
    *(f"mixins.eva.vit_model.transformer.{part}_embeddings.weight" for part in ("word", "position")),
    "mixins.eva.vit_model.mixins.patch_embedding.proj.bias",
    "mixins.eva.vit_model.transformer.layers.0.attention.query_key_value.bias",
    "mixins.eva.vit_model.transformer.layers.0.mlp.dense_4h_to_h.bias",
}
FINE = {"mixins.eva.pos_embed", "mixins.encoder.pos_embed", "mixins.encoder.vit.model.blocks.0.mlp.ffn_ln.bias"}


def sat_folder(folder: Path, official: Path, system: str, **changes: Any) -> Path:
    """A released folder as SwissArmyTransformer has it."""
    family, config = get_family(system), json.loads((official / "config.json").read_text())
    ours, carried = family.table("official", config).to_ours(load_file(official / "model.safetensors").items())
    weights = family.table("sat", config).from_ours(ours, carried)
    (folder / "1").mkdir(parents=True)
    torch.save({"module": weights, "iteration": 1}, folder / "1/mp_rank_00_model_states.pt")
    (folder / "latest").write_text("1\n")
    vision, heads = config["vision_config"], config["num_attention_heads"]
    stated: dict[str, Any] = {
        "model_class": "CogVLMModel", "tokenizer_type": "vicuna-7b-v1.5", "text_processor_version": "chat_old",
        "num_layers": config["num_hidden_layers"], "hidden_size": config["hidden_size"], "num_attention_heads": heads,
        "vocab_size": config["vocab_size"], "layernorm_order": "pre", "model_parallel_size": 1,
        "max_sequence_length": config["max_position_embeddings"], "use_bias": False,
        "inner_hidden_size": config["intermediate_size"], "image_length": vision["num_positions"] - 1,
        "eva_args": {
            "model_class": "EVA2CLIPModel", "num_layers": vision["num_hidden_layers"],
            "hidden_size": vision["hidden_size"], "num_attention_heads": vision["num_heads"], "vocab_size": 1,
            "layernorm_order": "post", "model_parallel_size": 1, "max_sequence_length": vision["num_positions"],
            "inner_hidden_size": vision["intermediate_size"], "use_final_layernorm": False, "layernorm_epsilon": 1e-6,
            "row_parallel_linear_final_bias": False, "image_size": [vision["image_size"]] * 2, "pre_len": 1,
            "post_len": 0, "in_channels": 3, "patch_size": vision["patch_size"],
        },
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if system == "cogagent":
        stated |= {
            "model_class": "CogAgentModel", "is_decoder": [True] * config["num_hidden_layers"], "encoder_args": {},
            "cross_attn_hidden_size": config["cross_hidden_size"], "cross_image_pix": config["cross_image_size"],
            "cross_hidden_size_per_attention_head": config["cross_compute_hidden_size"] // heads,
            "use_neft_noise": True, "cross_vision": config["cross_vision"],
        }  # fmt: skip
    (folder / "model_config.json").write_text(json.dumps(stated | changes))
    for file in ("tokenizer.json", "tokenizer_config.json"):  # the release has none: those of Vicuna go beside
        shutil.copyfile(official / file, folder / file)
    return folder


@pytest.mark.parametrize("system", ["cogvlm", "cogagent"])
def test_first_releases_are_those_of_hugging_face(tmp_path: Path, system: str) -> None:
    make = {"cogvlm": cogvlm_folder, "cogagent": cogagent_folder}[system]
    official = make(tmp_path / "official", template_version="chat" if system == "cogvlm" else "chat_old")
    source = sat_folder(tmp_path / "sat", official, system)
    files = WeightFiles(source)
    assert find_family(look_into(source, files)).system == system
    fine = system == "cogagent"
    expected = LAYER | (CROSS if fine else set())
    assert {name for name in files.keys() if ".1." in name and "vit" not in name} == expected  # noqa: SIM118
    assert (PARTS | (FINE if fine else set())) <= set(files.keys())

    convert(source, tmp_path / "ours", system=system, target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system=system, target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (official, tmp_path / "back"))
    assert before.keys() - after.keys() == {name for name in before if "inv_freq" in name}
    assert [name for name in after if not torch.equal(before[name], after[name])] == []
    assert vlm.load(tmp_path / "back").codec.template.name == "cogvlm_chat_old"


def test_what_is_not_computed_here_is_refused(tmp_path: Path) -> None:
    official = cogvlm_folder(tmp_path / "official")
    for number, (change, message) in enumerate(
        (
            ({"use_bias": True}, "use_bias is true"),
            ({"eva_args": {}}, "has no eva_args.hidden_size"),
            ({"text_processor_version": "vqa"}, "text_processor_version is 'vqa', and only base, chat_old is known"),
            ({"new": 1}, "new is 1"),
        )
    ):
        source = sat_folder(tmp_path / f"sat_{number}", official, "cogvlm", **change)
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "ours", system="cogvlm", target_layout="ours")
    (source / "1/mp_rank_01_model_states.pt").touch()
    with pytest.raises(UserError, match="2 parts of a model split over as many devices"):
        WeightFiles(source)
    (source / "model_config.json").unlink()
    (source / "1/mp_rank_01_model_states.pt").unlink()
    with pytest.raises(UserError, match=r"no model_config.json; fetch it too"):
        convert(source, tmp_path / "ours", system="cogvlm", target_layout="ours")
