"""Fully sharded training is the same training: gloo ranks against one process.

Tolerances stand beside what was measured; where nothing but the order of sums differs, that is about 1e-6.
"""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

import vlm
import vlm.checkpoints.resume.sharded
import vlm.checkpoints.files.writing
from callbacks import FSDP2Strategy, MixedPrecisionFSDP, ThroughputMonitor
from callbacks.stage_transition import write_stage
from tests.support.ranks import run_ranks
from tests.support.cogagent import cogagent
from tests.support.samples import samples
from tests.support.systems import LLAMA, SYSTEMS, TOKENIZER, make
from tests.support.training import ListSource, Recorder, Steps, full, packs, trainer, weights
from vlm.batch import Batch
from vlm.checkpoints.resume.pointer import read_last
from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
from vlm.checkpoints.resume.sharded import read_sharded
from vlm.checkpoints.files.weights import WeightFiles
from vlm.data import BatchSpec, InstructionData
from vlm.errors import UserError
from vlm.language import CausalLM, Decoding, NewTokens, PeftAdapter
from vlm.module import VisionLanguageModule
from vlm.stages import Stage, Trained
from vlm.systems import CogAgent

MIXED = (
    ((0, 3), (2,), (5, 1), (2, 4)),
    ((0,), (1, 4), (2, 3), (4,)),  # under two ranks, the second one has no picture
    ((1,), (4, 1), (4,), (1, 1)),  # no picture anywhere
)


class Asking(CogAgent):
    """Answers questions in the middle of a validation step; its layers are told all there is."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.asked = ask(self, Path(self.trainer.default_root_dir))
        super().validation_step(batch, batch_idx, dataloader_idx)


def build(case: str) -> VisionLanguageModule:
    """A system by its name, or a variant of LLaVA-1.5."""
    if case in SYSTEMS:
        return make(case)
    if case == "frozen language model":  # but its partial LoRA
        return make("xcomposer2", SYSTEMS["xcomposer2"].stages["1_pretrain"].train)
    if case == "connector alone":
        return make("llava_1_5", {"connector": Trained(lr=1e-2)})
    if case == "lora":
        module = make("llava_1_5", {"connector": Trained(lr=1e-2), "adapters": Trained(lr=1e-2)})
        module.surgery = [PeftAdapter(rank=2, alpha=4, parts="both")]
        return module
    if case == "dropout":
        return make("llava_1_5", language=CausalLM(config={**LLAMA, "attention_dropout": 0.2}))
    if case == "new tokens":
        tokenizer = replace(TOKENIZER, pad_token="[PAD]", added_tokens=("<im_patch>", "<im_start>", "<im_end>"))
        train = {
            part: Trained(lr=1e-2) for part in ("connector", "language.model.embed_tokens.added", "language.lm_head")
        }
        module = make("llava", train, tokenizer=tokenizer, template="v0_first_marked")
        module.surgery = [NewTokens()]
        return module
    assert case == "asking"
    module = Asking(**cogagent().arguments)
    module.surgery = list(SYSTEMS["cogagent"].surgery)
    module.stage = Stage("test", SYSTEMS["cogagent"].last.train)
    return module


def here() -> tuple[int, int]:
    """Number of ranks and this one; (1, 0) outside of a group."""
    if not distributed.is_initialized():
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()


# -- training


def train(
    folder: Path, case: str, fsdp: str | MixedPrecisionFSDP | None, steps: Steps = MIXED, **options: Any
) -> dict[str, Any]:
    world, rank = here()
    module, recorder = build(case), Recorder()
    run = trainer(
        folder,
        world=world,
        fsdp=fsdp,
        max_epochs=1,
        accumulate_grad_batches=len(steps[0]) // world,
        gradient_clip_val=0.5,
        log_every_n_steps=1,
        callbacks=[ThroughputMonitor(), recorder],
        **options,
    )
    run.fit(module, packs(module, folder, steps, world=world, rank=rank))
    norm = run.callback_metrics["grad_norm/total"].item()
    validated = run.validate(module, packs(module, folder, steps[:2], world=world, rank=rank), verbose=False)
    moments = [state["exp_avg"].dtype for state in run.optimizers[0].state.values()] if run.optimizers else []
    return {
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "clipped": recorder.clipped,
        "weights": weights(module),
        "norm": norm,
        "validated": validated[0]["val/loss"],
        "dtypes": {name: parameter.dtype for name, parameter in module.named_parameters()},
        "trained": module.trained_names(),
        "moments": set(moments),
        "units": sorted(name for name, child in module.named_modules() if isinstance(child, FSDPModule)),
        "ties": module.ties,
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, atol: float) -> None:
    assert ours.keys() == theirs.keys()
    worst, name = max(
        ((ours[name] - tensor).abs().max().item() / max(1.0, tensor.abs().max().item()), name)
        for name, tensor in theirs.items()
    )
    print(name, worst)
    assert worst <= atol, name


GRADIENTS, WEIGHTS = {"xcomposer": 1e-4}, {"xcomposer": 1e-4}
"""Biases of its output projections have gradients of size 1. The norm that clips is a float32 sum of 2 million numbers,
which in two orders differs by 4e-5 of itself, and with it the next step: 3.6e-5 was seen in its gradients."""


ALIKE = ("llava", "llava_next", "vila", "vila_downsample", "mini_gemini", "blip2", "minigpt4", "xcomposer")
"""Systems of a kind of which another one is among the quick tests."""


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n, system in SYSTEMS.items() if system.mixes),
        "connector alone",
        "new tokens",
    ],
)
def test_training_equals_one_process(case: str, tmp_path: Path) -> None:
    """Accumulation, clipping by norm, ranks and whole steps without pictures, validation after fit."""
    samples(tmp_path)  # before the ranks would write the same files
    one = train(tmp_path, case, None)
    for sharded in run_ranks(train, 2, tmp_path, case, "32-true"):
        assert sharded["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert sharded["validated"] == pytest.approx(one["validated"], rel=1e-6)
        assert len(sharded["gradients"]) == len(MIXED)
        assert any(gradient.any() for gradient in sharded["gradients"][0].values())
        for kind in ("gradients", "clipped"):
            for theirs, ours in zip(one[kind], sharded[kind], strict=True):
                same(ours, theirs, atol=GRADIENTS.get(case, 5e-6))
        same(sharded["weights"], one["weights"], atol=WEIGHTS.get(case, 1e-5))
        vocabulary = [] if case == "tied" else ["language.lm_head", "language.model.embed_tokens"]
        if case in ("llava_1_5", "tied"):
            blocks = [f"{stack}.{i}" for stack in ("language.model.layers", "vision.trunk.blocks") for i in range(2)]
            assert sharded["units"] == sorted(["", *blocks, *vocabulary])
        if case == "tied":
            assert sharded["ties"] == {"language.lm_head.weight": "language.model.embed_tokens.weight"}
            tied = sharded["weights"]
            assert torch.equal(tied["language.lm_head.weight"], tied["language.model.embed_tokens.weight"])


# -- use


def ask(module: Any, folder: Path) -> dict[str, Any]:
    """Each rank asks about its own samples, and another number of them; the second rank alone has no picture."""
    world, rank = here()
    pool = samples(folder)
    mine = [[pool[0], pool[3], pool[2]], [pool[1]]]
    answers = []
    for one, questions in enumerate(mine) if world == 1 else [(rank, mine[rank])]:
        for beams in (1, 3):
            decoding = Decoding(max_new_tokens=4 + 5 * one, num_beams=beams)
            answers.append(module.generate(questions, decoding=decoding, batch_size=2))
        answers.append(module.score(questions, batch_size=2))
    answers.append(module.generate([]))
    answers.append(module.generate(pool[:2] if rank == 1 or world == 1 else [], decoding=Decoding(max_new_tokens=3)))
    return answers


def _use(folder: Path, fsdp: str | None) -> tuple[list, list]:
    world, rank = here()
    module = build("asking")
    run = trainer(folder, world=world, fsdp=fsdp, max_epochs=1, accumulate_grad_batches=2 // world)
    step = (((0, 3), (2, 1)),)
    loaders = [packs(module, folder, step, world=world, rank=rank) for _ in range(2)]
    run.fit(module, *loaders)
    return module.asked, ask(module, folder)


def test_answers_and_scores_equal_one_process(tmp_path: Path) -> None:
    """Greedy and beam search and scores, inside a validation step and after fit; ranks end at different lengths."""
    samples(tmp_path)
    ranks = run_ranks(_use, 2, tmp_path, "32-true")
    for when, one in enumerate(_use(tmp_path, None)):
        (greedy0, beams0, scores0), (greedy1, beams1, scores1) = one[:3], one[3:6]
        first, second = ranks[0][when], ranks[1][when]
        assert first[:2] == [greedy0, beams0]
        assert second[:2] == [greedy1, beams1]
        assert greedy0 != beams0
        for ours, theirs in zip(first[2] + second[2], scores0 + scores1, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
        assert first[3:] == [[], []]
        assert second[3:] == one[6:]
        assert len(one[-1]) == 2


# -- checkpoints


def run_saved(
    folder: Path,
    run_folder: Path,
    case: str,
    fsdp: str | None,
    *,
    resume: Path | None = None,
    max_steps: int = 4,
    keep: int = -1,
    **options: Any,
) -> dict[str, Any]:
    """Steps of 3 samples out of 6 through the data module; a checkpoint after each."""
    world, _ = here()
    module = build(case)
    checkpoints = ModelCheckpoint(
        run_folder, "{step}", every_n_train_steps=1, save_top_k=keep, save_on_train_epoch_end=False
    )
    data = InstructionData([ListSource(samples(folder))], batch=BatchSpec(3), seed=5)
    run = trainer(
        folder,
        world=world,
        fsdp=fsdp,
        max_steps=max_steps,
        enable_checkpointing=True,
        callbacks=[checkpoints],
        plugins=[AtomicCheckpointIO()],
        accumulate_grad_batches=2 if world == 1 else 1,
        **options,
    )
    run.fit(module, data, ckpt_path=resume)
    states = run.optimizers[0].state_dict()["state"].values()
    moments = [full(value) for state in states for name, value in sorted(state.items())]
    return weights(module) | {f"moment {i}": value for i, value in enumerate(moments)}


def _resume_here(folder: Path) -> dict[str, Any]:
    """Bit for bit with the same ranks, dropout on."""
    whole = run_saved(folder, folder / "dropout", "dropout", "32-true")
    resumed = run_saved(
        folder, folder / "again", "dropout", "32-true", resume=folder / "dropout" / "step=2.ckpt", keep=1
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    return run_saved(folder, folder / "two", "tied", "32-true")


def test_resume_under_any_number_of_ranks(tmp_path: Path) -> None:
    samples(tmp_path)
    whole = run_ranks(_resume_here, 2, tmp_path)[0]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["last", "step=4.ckpt"]
    folder = tmp_path / "two"
    assert read_last(folder) == folder / "step=4.ckpt"
    middle = folder / "step=2.ckpt"
    names = {key for file in middle.glob("*.safetensors") for key, _ in WeightFiles(file).items()}
    assert not [name for name in names if "vision" in name]  # frozen
    assert [name for name in names if name.startswith("state_dict/")]
    opened = vlm.load(folder / "step=4.ckpt").state_dict()
    assert all(torch.equal(opened[name], whole[name]) for name in opened.keys() & whole.keys())
    assert {name for name in whole if "moment " not in name} <= opened.keys(), "put together from the ranks' rows"
    for world in (1, 3):
        resumed = run_ranks(run_saved, world, tmp_path, tmp_path / str(world), "tied", "32-true", resume=middle)
        for ours in resumed:
            same(ours, whole, atol=1e-6)
    # from and to a single file
    same(run_saved(tmp_path, tmp_path / "one", "tied", None, resume=middle), whole, atol=1e-6)
    file = tmp_path / "one" / "step=3.ckpt"
    assert file.is_file()
    same(run_ranks(run_saved, 2, tmp_path, tmp_path / "back", "tied", "32-true", resume=file)[1], whole, atol=1e-6)


def _fail(pictures: Path, folder: Path) -> str:
    """The third save fails on the first rank; training goes on to a later one when it is started again."""
    _, rank = here()
    (folder / ".tmp-step=2.ckpt-0123abcd").mkdir(parents=True, exist_ok=True)  # a killed save
    run_saved(pictures, folder, "connector alone", "32-true", max_steps=2)
    write, save = vlm.checkpoints.files.writing._write_shard, torch.save

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 0:
        vlm.checkpoints.files.writing._write_shard = no_space
        vlm.checkpoints.resume.sharded.torch.save = no_space
    with pytest.raises(UserError) as raised:
        run_saved(pictures, folder, "connector alone", "32-true", resume=folder / "step=2.ckpt")
    vlm.checkpoints.files.writing._write_shard, vlm.checkpoints.resume.sharded.torch.save = write, save
    distributed.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step=1.ckpt", "step=2.ckpt"]
    run_saved(pictures, folder, "connector alone", "32-true", resume=read_last(folder), max_steps=3)
    return str(raised.value)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """That of the first rank; of the second one in `test_saving`."""
    samples(tmp_path)
    for message in run_ranks(_fail, 2, tmp_path, tmp_path / "run"):
        assert "no space left" in message
    folder = tmp_path / "run"
    assert read_last(folder) == folder / "step=3.ckpt"
    (folder / "step=3.ckpt" / "rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"step=3\.ckpt: is not complete"):
        read_sharded(folder / "step=3.ckpt")


# -- building


class _Writer(L.Callback):
    """Writes the artefact as it is before and after a validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        write_stage(self.folder / "start", pl_module, global_step=0, is_writer=trainer.is_global_zero)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        write_stage(self.folder / "validated", pl_module, global_step=0, is_writer=trainer.is_global_zero)


def _write(folder: Path, out: Path, case: str, fsdp: str | None) -> dict[str, Tensor]:
    world, rank = here()
    module = build(case)
    run = trainer(folder, world=world, fsdp=fsdp, max_epochs=1, num_sanity_val_steps=1, callbacks=[_Writer(out)])
    loaders = [packs(module, folder, [[[0], [3], [2]]], world=world, rank=rank) for _ in range(2)]
    run.fit(module, *loaders)
    return module.frozen_hashes


@pytest.mark.parametrize("case", ["tied", "frozen language model", "cogvlm", "new tokens"])
def test_the_first_artefact_is_that_of_one_process(case: str, tmp_path: Path) -> None:
    """What a network starts from does not depend on the ranks, nor on the dtype it computes in."""
    samples(tmp_path)
    hashes = _write(tmp_path, tmp_path / "one", case, None)
    assert hashes
    assert run_ranks(_write, 3, tmp_path, tmp_path / "three", case, "bf16-mixed") == [hashes] * 3
    for when in ("start", "validated"):
        files = sorted(path.name for path in (tmp_path / "one" / when).iterdir())
        assert files == ["model.safetensors", "stage.json"]
        for name in files:
            expected = (tmp_path / "one" / "start" / name).read_bytes()
            assert (tmp_path / "three" / when / name).read_bytes() == expected


def _mistakes(folder: Path) -> list[str]:
    def message(strategy: Any = "auto", *, callbacks: Any = (), train: Any = None, **options: Any) -> str:
        module = build("connector alone")
        if train is not None:
            module.stage = Stage("test", train)
        run = trainer(folder, strategy=strategy, callbacks=callbacks, **options)
        with pytest.raises(UserError) as raised:
            run.fit(module, packs(module, folder, [[[0]]]))
        return str(raised.value)

    module = build("connector alone")
    module.temperature = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError) as scalar:
        MixedPrecisionFSDP().shard(module, init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))
    return [
        message("fsdp2"),
        message(callbacks=[MixedPrecisionFSDP()]),
        message("fsdp2", callbacks=[MixedPrecisionFSDP()], precision="bf16-mixed"),
        message(FSDP2Strategy(ranks_per_shard_group=2), callbacks=[MixedPrecisionFSDP()]),
        str(scalar.value),
        *(
            message(how, callbacks=callbacks, train={"projector": Trained(lr=1.0)})
            for how, callbacks in (("auto", ()), ("ddp", ()), ("fsdp2", [MixedPrecisionFSDP()]))
        ),
    ]


def test_mistakes_are_named(tmp_path: Path) -> None:
    samples(tmp_path)
    [messages] = run_ranks(_mistakes, 1, tmp_path)
    assert "needs the callback callbacks.MixedPrecisionFSDP" in messages[0]
    assert "needs trainer.strategy: fsdp2" in messages[1]
    assert "use trainer.precision: 32-true, not bf16-mixed" in messages[2]
    assert "ranks_per_shard_group: 2 does not divide the 1 ranks" in messages[3]
    assert "temperature is a scalar" in messages[4]
    assert all("projector" in message for message in messages[5:])
    with pytest.raises(UserError, match="timeout_minutes must be more than 0, found -1"):
        FSDP2Strategy(timeout_minutes=-1)
