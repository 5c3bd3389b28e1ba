"""A system in plain Python: asked by dictionaries, trained by a Lightning trainer of one's own."""

import copy
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import vlm
from callbacks import LoRAInjection, StageTransition
from tests.support.samples import pairs, picture
from tests.support.systems import llava_1_5
from tests.support.training import ListSource, trainer, weights
from vlm.data import BatchSpec, InstructionData, VisionLanguageData
from vlm.data.sources.asked import as_samples
from vlm.errors import UserError
from vlm.language import Decoding
from vlm.stages import Stage, Trained
from vlm.systems import Fuyu, LLaVA15

LORA = {"connector": Trained(1e-3), "language.*.lora_*": Trained(1e-3)}


def _data(folder: Path) -> InstructionData:
    return InstructionData([ListSource(pairs(folder, 4))], batch=BatchSpec(2))


@pytest.fixture
def opened() -> LLaVA15:
    module = llava_1_5()
    module.configure_model()
    return module


def test_every_form_of_a_question_is_the_same_question(tmp_path: Path, opened: LLaVA15) -> None:
    path = picture(tmp_path, "a", (50, 40), 1).path
    assert path is not None
    image = Image.open(path)
    text = {"type": "text", "text": "\nWhat is this?"}
    answered = {"from": "gpt", "value": "A ball."}
    asked = [
        {"image": str(path), "prompt": "What is this?"},
        {"image": path, "question": "What is this?"},
        {"image": image, "prompt": "<image>\nWhat is this?"},
        {"images": [path.read_bytes()], "text": "What is this?"},
        {
            "image": str(path),
            "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, answered],
        },
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image}, text]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": str(path)}, text]}]},
        {"images": [image], "messages": [{"role": "user", "content": [{"type": "image"}, text]}]},
    ]
    batches = [
        opened.codec.collate([opened.codec.encode(sample, generate=True)], counts={}) for sample in as_samples(asked)
    ]
    for batch in batches[1:]:
        assert batch.text.ids.tolist() == batches[0].text.ids.tolist()
        assert torch.equal(batch.views["image"].pixels, batches[0].views["image"].pixels)
    assert image.getpixel((0, 0)) is not None  # still open
    alone = opened.generate(asked[0], max_new_tokens=3)
    assert isinstance(alone, str)
    assert opened.generate(asked[:1], max_new_tokens=3) == [alone]
    (scores,) = opened.score([asked[4]])
    assert torch.equal(opened.score(asked[4]), scores)
    assert len(scores) == len(opened.codec.tokenizer.encode("A ball.")[0]) + 1  # and the end


def test_what_is_no_question_is_said_in_one_line(opened: LLaVA15) -> None:
    for asked, said in (
        ("What is this?", "a question is {'image'"),
        (["What is this?"], "sample '0'.*found str"),
        ({"image": "cat.jpg"}, "'prompt' must be a text"),
        ({"image": "cat.jpg", "prompt": "What?"}, "image 'cat.jpg' does not exist"),
        ({"img": "cat.jpg", "prompt": "What?"}, "'img': did you mean 'image'"),
        ({"picture": Image.new("RGB", (9, 9)), "prompt": "What?"}, "'picture': did you mean 'image'"),
        ({"image": 7, "prompt": "What?"}, "must be a path"),
        (
            {
                "image": "a.png",
                "messages": [{"role": "user", "content": [{"type": "image", "path": "b.png"}]}],
            },
            "image",
        ),
    ):
        with pytest.raises(UserError, match=said):
            opened.generate(asked)  # type: ignore[call-overload]
    with pytest.raises(UserError, match="no option 'max_tokens'; there are max_new_tokens"):
        opened.generate({"prompt": "Hello"}, max_tokens=3)


def test_a_trainer_without_a_stage_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"StageTransition, or set module\.stage"):
        trainer(tmp_path, max_epochs=1).fit(llava_1_5(), _data(tmp_path))
    module = llava_1_5()
    module.stage = Stage("nothing", {})
    with pytest.raises(UserError, match="trains nothing"):
        trainer(tmp_path, max_epochs=1).fit(module, _data(tmp_path))
    with pytest.raises(UserError, match=r"train_loader\(module\.codec\)"):
        _data(tmp_path).train_dataloader()
    batches = list(_data(tmp_path).train_loader(module.codec))
    assert [batch.counts["samples"] for batch in batches] == [2, 2]


def test_plain_lightning_trains_checks_and_goes_on(tmp_path: Path) -> None:
    module, data = llava_1_5(), _data(tmp_path)
    data.val_sources = data.sources
    module.stage = Stage("mine", {"connector": Trained(1e-3)})
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val/loss", save_last=True)
    first = trainer(tmp_path, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
    first.fit(module, data)
    assert first.global_step == 4
    assert first.validate(module, data, verbose=False)[0]["val/loss"] == pytest.approx(
        first.callback_metrics["val/loss"].item(), rel=1e-6
    )
    data.predict_sources, module.decoding = data.sources, Decoding(max_new_tokens=2)
    answers = first.predict(module, data)
    assert answers is not None
    assert sum(len(batch) for batch in answers) == 4
    state = torch.load(keep.last_model_path, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"connector"}
    opened = LLaVA15.load_from_checkpoint(keep.last_model_path)
    assert all(torch.equal(tensor, weights(module)[name]) for name, tensor in weights(opened).items())
    with pytest.raises(UserError, match="'vision' is in the checkpoint"):
        LLaVA15.load_from_checkpoint(keep.last_model_path, vision=None)
    with pytest.raises(UserError, match="holds a LLaVA15; open it with"):
        Fuyu.load_from_checkpoint(keep.last_model_path)
    # the same cell again: on from these weights, with the schedule of a run of its own
    module._total_steps = 4
    trainer(tmp_path, max_epochs=1).fit(module, data)
    assert module.total_steps() == 2
    # another module goes on from the file, bit for bit
    again = llava_1_5()
    again.stage = Stage("mine", {"connector": Trained(1e-3)})
    second = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    second.fit(again, _data(tmp_path), ckpt_path=keep.last_model_path)
    assert second.global_step == 4
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in state.items())


def test_an_opened_system_is_trained_on_and_opens_again(tmp_path: Path) -> None:
    data = _data(tmp_path)
    first = StageTransition("1_align", {"connector": Trained(1e-2)})
    trainer(tmp_path / "1", max_epochs=1, callbacks=[first]).fit(llava_1_5(), data)
    module = vlm.load(tmp_path / "1", dtype="bfloat16")
    assert next(module.parameters()).dtype == torch.bfloat16
    assert module.generate({"prompt": "Hello"}, max_new_tokens=2) is not None
    before = weights(vlm.load(tmp_path / "1"))

    def callbacks() -> list[L.Callback]:
        return [LoRAInjection(rank=2, alpha=4, targets=[r"language\..*q_proj"]), StageTransition("2_mine", LORA)]

    kept = ModelCheckpoint(tmp_path / "kept elsewhere", save_last=True)
    for more in ({}, {"callbacks": [*callbacks(), kept], "enable_checkpointing": True}):
        # the second start trains on with the network as it is
        trainer(tmp_path / "2", max_epochs=1, **({"callbacks": callbacks()} | more)).fit(module, data)
    of_checkpoint = weights(vlm.load(kept.last_model_path))
    assert all(torch.equal(tensor, of_checkpoint[name]) for name, tensor in weights(module).items())
    assert module.trained_names() >= {n for n in before if n.startswith("connector.")}
    loaded = vlm.load(tmp_path / "2")
    assert all(torch.equal(tensor, weights(loaded)[name]) for name, tensor in weights(module).items())
    assert all(torch.equal(tensor, weights(loaded)[n]) for n, tensor in before.items() if not n.startswith("connector"))
    third = StageTransition("3_other", {"language": Trained(1e-3)})
    with pytest.raises(UserError, match="built for stage '2_mine'; for stage '3_other'"):
        trainer(tmp_path / "3", max_epochs=1, callbacks=[third]).fit(module, data)


def test_what_travels_can_be_copied(opened: LLaVA15, tmp_path: Path) -> None:
    sample = pairs(tmp_path, 1)[0]
    ids = opened.codec.encode(sample).text[0].ids
    for codec in (copy.deepcopy(opened.codec), pickle.loads(pickle.dumps(opened.codec))):
        assert torch.equal(codec.encode(sample).text[0].ids, ids)


def test_names_are_listed_and_open() -> None:
    assert set(vlm.__all__) <= set(dir(vlm))
    assert vlm.systems.LLaVA15 is LLaVA15
    assert vlm.data.VisionLanguageData is VisionLanguageData
    for room in (vlm, vlm.data):
        for name in room.__all__:
            assert getattr(room, name) is not None
    with pytest.raises(UserError, match="dtype int8"):
        vlm.load(".", dtype="int8")
