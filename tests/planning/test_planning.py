"""What `vlm plan` says, against networks that run."""

import json
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vlm
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cli
from callbacks import EMA
from tests.support.systems import LLAMA, SYSTEMS, llava_1_5
from vlm.building.build import assemble
from vlm.checkpoints.artefact import read_artefact
from vlm.codec import step_counts
from vlm.commands.plan import machine_of
from vlm.connectors import MLP
from vlm.language import CausalLM, PeftAdapter
from vlm.language.attention import planned_for_a_gpu
from vlm.planning.depth import at_full_depth
from vlm.planning.fake import fake_batch, fake_weights, fakes
from vlm.planning.machine import Machine, find_gpu
from vlm.planning.memory import memory_of
from vlm.planning.operators import ATTENTION
from vlm.planning.packs import PackCosts, Precision
from vlm.planning.parameters import optimizer_bytes, sizes_of
from vlm.planning.samples import Samples, samples_of
from vlm.planning.step import COPIES, cost_of_pack
from vlm.recipes import TrainingStage, find_recipe, load_recipe, systems
from vlm.registry import CONFIGS
from vlm.registry import SYSTEMS as REGISTERED
from vlm.stages import AdamW, Stage, Trained
from vlm.vision import TimmTower

STAGES = [(system, stage) for system in REGISTERED for stage in SYSTEMS[system].stages]


def on_meta(make: Callable[..., Any], train: dict[str, Trained], **changes: Any) -> Any:
    module = make(**changes)
    module.stage = Stage("x", train)
    with torch.device("meta"):
        assemble(module)
    return module


def saved_bytes(module: Any, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes of the distinct storages that the forward pass keeps, weights left out."""
    held = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    return sum(-(-s.nbytes() // 512) * 512 for key, s in kept.items() if key not in held), loss


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_parameters_flops_and_activations_are_those_of_the_network(name: str, stage: str, tmp_path: Path) -> None:
    """Of every system and stage, at tiny size: real tensors, torch's counter, and its hooks on what is kept."""
    system = SYSTEMS[name]
    train = system.stages[stage].train
    real = system.make()
    real.stage = Stage(stage, train)
    real.configure_model()
    items = [real.codec.encode(sample) for sample in system.pool(tmp_path, 6)]
    batch = real.codec.collate(items, counts=step_counts(items))
    extra = {packet: (lambda *a, out_val=None, f=f, **_: f(*a)) for packet, f in ATTENTION.items()}
    for function in extra.values():
        function._get_raw = True
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        kept, loss = saved_bytes(real, lambda: real.training_step(batch, 0))
        loss.backward()

    planned = on_meta(system.make, train)
    cost = cost_of_pack(planned, batch)
    assert cost.total_flops == counter.get_total_flops()
    assert sum(cost.kept.values()) == pytest.approx(kept, rel=0.1)

    sizes = sizes_of(planned)
    for part, network in real.named_children():
        parameters = list(network.parameters())
        trained = [p for p in parameters if p.requires_grad]
        assert sizes[part].trained == sum(p.numel() for p in trained)
        assert sizes[part].frozen == sum(p.numel() for p in parameters) - sizes[part].trained
        assert sizes[part].gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
        assert sizes[part].weights == sum(t.nbytes for t in (*parameters, *network.buffers()))
    optimizer = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad])
    real.on_before_optimizer_step(optimizer)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for n, t in state.items() if n != "step"]
    assert optimizer_bytes(planned, AdamW()) == sum(t.nbytes for t in moments)


def test_moving_averages_take_four_bytes_of_each_trained_parameter() -> None:
    """Each rank has its share of them; the callback tells the plan that they are kept."""
    module = on_meta(llava_1_5, TRAIN)
    nothing: Any = SimpleNamespace(alive={})
    machines = [Machine(find_gpu("80")), Machine(find_gpu("80"), 8, "fsdp2")]
    before = [memory_of(module, nothing, machine).total for machine in machines]
    module.averages = {} if EMA.keeps_averages else None
    after = [memory_of(module, nothing, machine).total for machine in machines]
    trained = sum(size.trained for size in sizes_of(module).values())
    assert [b - a for a, b in zip(before, after, strict=True)] == [4 * trained, -(-4 * trained // 8)]


DEEP = CausalLM(config=LLAMA | {"num_hidden_layers": 15})
TRAIN = {"connector": Trained(1e-3), "language": Trained(1e-3)}


@pytest.mark.parametrize("recomputed", [False, True, 3])
def test_deep_networks_follow_from_a_few_of_their_blocks(recomputed: bool | int, tmp_path: Path) -> None:
    language = CausalLM(config=DEEP.config, checkpointing=recomputed)
    module = on_meta(llava_1_5, TRAIN, language=language)
    items = [module.codec.encode(sample) for sample in SYSTEMS["llava_1_5"].pool(tmp_path, 6)]
    batch = module.codec.collate(items, counts=step_counts(items))

    def run() -> Any:
        return cost_of_pack(module, batch, autocast=torch.bfloat16)

    whole, followed = run(), at_full_depth(module, run)
    assert followed == whole
    assert ("language", "again") in whole.flops if recomputed else ("language", "again") not in whole.flops
    assert len(module.language.model.layers) == 15


@pytest.mark.parametrize(
    ("most", "recomputed"), [(2**26, True), (7 * LLAMA["vocab_size"], False)], ids=["whole", "in_parts"]
)
def test_the_worst_moment_is_what_the_allocator_had(
    most: int, recomputed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real tensors forward and backward, measured. With more labels than have logits at once, gradients of the head
    meet, and their sum takes a third."""
    monkeypatch.setattr("vlm.functional.MOST_LOGITS", most)
    language = CausalLM(config=LLAMA, checkpointing=recomputed)
    real = llava_1_5(language=language)
    real.stage = Stage("x", TRAIN)
    real.configure_model()
    items = [real.codec.encode(sample) for sample in SYSTEMS["llava_1_5"].pool(tmp_path, 6)]
    batch = real.codec.collate(items, counts=step_counts(items))
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        real.training_step(batch, 0).backward()
    changes = (e.nbytes() for e in events.profiler.kineto_results.events() if e.name() == "[memory]")
    cost = cost_of_pack(on_meta(llava_1_5, TRAIN, language=language), batch)
    assert sum(cost.alive.values()) == pytest.approx(max(accumulate(changes)), rel=0.04)


@pytest.mark.parametrize("most", [2**26, 7 * LLAMA["vocab_size"]], ids=["whole", "in_parts"])
def test_packs_of_other_sizes_follow_from_others(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of like samples; of others they are average packs."""
    monkeypatch.setattr("vlm.functional.MOST_LOGITS", most)
    module = on_meta(llava_1_5, TRAIN)
    sample = next(sample for sample in SYSTEMS["llava_1_5"].pool(tmp_path, 8) if len(sample.images) == 1)
    items = [module.codec.encode(sample)] * 12
    costs = PackCosts(module, Samples(items, None, None, "", measured=True), Precision())
    for count in (3, 12):
        exact = cost_of_pack(module, module.codec.collate(items[:count], counts=step_counts(items[:count])))
        found = costs.of(count * items[0].num_tokens)
        assert sum(found.alive.values()) == pytest.approx(sum(exact.alive.values()), rel=0.02), count
        again = costs.per_sample(count * items[0].num_tokens).get(("head", "again"), 0)
        assert found.total_flops == pytest.approx(exact.total_flops, rel=0.001), count
        assert count * again == pytest.approx(exact.flops.get(("head", "again"), 0), rel=0.001), count


def test_experts_count_for_the_tokens_they_get(tmp_path: Path) -> None:
    """Two of four experts see each token; what they cost follows from what wider ones cost more."""
    costs = []
    for width in (32, 96):
        experts = {
            "model_type": "mixtral",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": width,
        }
        module = on_meta(llava_1_5, TRAIN, language=CausalLM(config=LLAMA | experts))
        items = [module.codec.encode(sample) for sample in SYSTEMS["llava_1_5"].pool(tmp_path, 3)]
        batch = module.codec.collate(items, counts=step_counts(items))
        costs.append(cost_of_pack(module, batch, weights=torch.bfloat16).flops)
    more = 2 * LLAMA["num_hidden_layers"] * 2 * len(batch.text.ids) * 3 * LLAMA["hidden_size"] * (96 - 32)
    for when, times in (("forward", 1), ("backward", 2)):
        assert costs[1]["language", when] - costs[0]["language", when] == times * more


SEVEN = {
    "vision": TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-2),
    "connector": MLP(),
    "max_tokens": 2048,
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_at_7b(adapter: bool, recomputed: bool, autocast: torch.dtype | None, tmp_path: Path) -> None:
    """Against torch's own hooks on what the whole of LLaVA-1.5-7B keeps, under fake tensors."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    module = llava_1_5(**SEVEN, language=CausalLM(config=LLAMA | sizes | heads, checkpointing=recomputed))
    module.stage = Stage("x", {"connector": Trained(1e-3), "adapters": Trained(1e-3)} if adapter else TRAIN)
    if adapter:
        module.register_surgery(PeftAdapter(rank=64, alpha=128, parts="language"))
    with torch.device("meta"):
        assemble(module)
    items = [module.codec.encode(sample) for sample in SYSTEMS["llava_1_5"].pool(tmp_path, 2)]
    batch = module.codec.collate(items, counts=step_counts(items))
    cost = at_full_depth(module, lambda: cost_of_pack(module, batch, autocast=autocast))
    with (
        fakes(),
        fake_weights(module),
        planned_for_a_gpu(),
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        kept, loss = saved_bytes(module, lambda: module.training_step(fake_batch(batch), 0))
        del loss
    assert sum(cost.kept.values()) == pytest.approx(kept, rel=0.1)
    if recomputed and not adapter and autocast:
        _check_by_arithmetic(module, cost, tokens=batch.text.ids.shape[0])


def _check_by_arithmetic(module: Any, cost: Any, *, tokens: int) -> None:
    """Of 7.05 billion parameters, of which 6.76 are trained: 16 bytes for each of these, 4 for each other, rounded
    copies of what is trained, and what a block keeps of a token when it is recomputed."""
    one = memory_of(module, cost, Machine(find_gpu("141")))
    eight = memory_of(module, cost, Machine(find_gpu("80"), 8, "fsdp2"))
    for found, expected in ((one, (28.2, 27.0, 54.1)), (eight, (3.5, 3.4, 6.8))):
        held = [found.fixed[what] / 1e9 for what in ("weights", "gradients", "optimizer")]
        assert held == pytest.approx(expected, abs=0.06)
    assert one.pack["weights in the compute dtype"] / 1e9 == pytest.approx(13.5, rel=0.03)
    assert cost.kept["language"] / tokens / 1024 == pytest.approx(545, rel=0.05)


MACHINES = [
    (file.parent.name, file.stem, named["how"])
    for file in sorted(CONFIGS.glob("*/[0-9]*.yaml"))
    for named in re.finditer(r"# 8 x 80 GB(?: with (?P<how>FSDP2.*?))?;", file.read_text(encoding="utf-8"))
]
STRATEGY = {
    None: (),
    "FSDP2": ("--trainer.strategy=fsdp2",),
    "FSDP2, reduce_gradients: micro_batch": (
        "--trainer.strategy.class_path=callbacks.FSDP2Strategy",
        "--trainer.strategy.init_args.reduce_gradients=micro_batch",
    ),
}
"""By the words of a stage's file."""


@pytest.mark.slow
@pytest.mark.parametrize(("system", "stage", "how"), MACHINES)
def test_published_stages_fit_the_machine_they_name(
    system: str, stage: str, how: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = plan(capsys, "--recipe", system, "--stage", stage, "--gpu=80", "--devices=8", *STRATEGY[how])
    assert found["fits"], found["memory"]


def test_every_published_stage_names_a_machine() -> None:
    named = {(system, stage) for system, stage, _ in MACHINES}
    assert named == {
        (name, node.name)
        for name in systems()
        for node in load_recipe(find_recipe(name)).nodes
        if isinstance(node, TrainingStage)
    }


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert cli.main(["plan", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_stage_inherits_what_its_recipe_did_to_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    """InternLM-XComposer's third stage trains the adapter of its second, whose artefact is not there."""
    stages = [
        plan(capsys, "--recipe", "xcomposer", "--stage", stage, "--demo")[0] for stage in ("2_multitask", "3_instruct")
    ]
    assert stages[0]["parameters"] == stages[1]["parameters"]
    assert stages[1]["parameters"]["language"]["trained"] > 0


def test_paper_size_without_files(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither weights nor tokenizer nor data are here: sizes are exact, and what is estimated is said."""
    (found,) = plan(capsys, "--recipe", "llava_1_5", "--stage", "1_align", "--gpu", "141", "--devices", "8")
    assert found["parameters"] == {
        "vision": {"trained": 0, "frozen": 290_909_184},
        "connector": {"trained": 20_979_712, "frozen": 0},
        "language": {"trained": 0, "frozen": 6_738_415_616},
    }
    assert found["samples"]["image_tokens"] == 576
    assert (found["samples"]["epoch"], found["samples"]["measured"]) == (558_128, False)
    assert found["batch"]["steps"] == -(-558_128 // 256)
    assert (found["batch"]["samples_of_a_pack"] * found["batch"]["micro_batches"]) == 32
    language = next(entry for entry in found["downloads"] if entry["part"] == "language")
    assert (language["path"], language["bytes"], language["here"]) == (
        "lmsys/vicuna-7b-v1.5", 2 * 6_738_415_616, False,
    )  # fmt: skip
    assert any("lmsys/vicuna-7b-v1.5" in note and "five letters" in note for note in found["notes"])
    # frozen linear weights in bfloat16, tables in float32: 7B in 2 bytes, and the embeddings of 32,000 words in 4
    assert found["memory"]["weights"] == pytest.approx(2 * 7.03e9 + 2 * 32000 * 4096 + 2 * 20_979_712, rel=0.01)
    assert found["memory"]["optimizer"] == 2 * 4 * 20_979_712
    total = sum(found["flops_per_sample"].values()) * 558_208
    assert found["hours"] == pytest.approx(total / (989e12 * 0.4 * 8) / 3600, rel=0.01)


def test_weights_that_are_here_on_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An artefact with LoRA on two records, planned for a GPU wherever the plan is made."""
    weights = Path(vlm.__file__).parent / "demo/assets/fuyu/artefact"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "mine.json").write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(2)]))
    (found,) = plan(capsys, "--weights", str(weights), "--data", str(tmp_path / "mine.json"), "--lora", "--gpu", "24")
    assert (found["stage"], found["fits"], found["samples"]["measured"]) == ("fuyu lora", True, True)
    tensors = dict(read_artefact(weights).items())
    held = sum(tensor.numel() for tensor in tensors.values())
    assert sum(part["frozen"] for part in found["parameters"].values()) == held
    adapters = found["parameters"]["language"]["trained"]
    assert found["memory"]["optimizer"] == 2 * 4 * adapters > 0
    table = tensors["language.model.embed_tokens.weight"].numel()
    assert found["memory"]["weights"] == pytest.approx(4 * adapters + 2 * held + 2 * table, rel=0.01)


def test_overlays_of_a_cluster() -> None:
    """How many share a copy; nodes have 8 GPUs where nobody says how many."""
    files = [CONFIGS / "llava_1_5" / name for name in ("model.yaml", "2_finetune.yaml")]

    def sharing(overlay: str) -> int:
        paths = [*files, CONFIGS / "cluster" / f"{overlay}.yaml"]
        view = cli._describe([word for path in paths for word in ("-c", str(path))], on_gpu=True)
        return machine_of(view, find_gpu("80"), 1 if overlay == "one_gpu" else 16).shards

    assert [sharing(name) for name in ("one_gpu", "ddp", "fsdp2", "hybrid")] == [1, 1, 16, 8]


def test_tokens_are_those_of_the_data(tmp_path: Path) -> None:
    from vlm.data import BatchSpec, InstructionData, LlavaJson

    records = [
        {"id": str(n), "conversations": [{"from": "human", "value": "Say " + "a " * n}, {"from": "gpt", "value": "b"}]}
        for n in range(10)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = InstructionData([LlavaJson(tmp_path / "data.json")], batch=BatchSpec(4))
    codec = llava_1_5().codec
    found = samples_of(codec, data, system="llava_1_5", stage="x", looked_at=10)
    exact = sum(codec.encode(sample).num_tokens for sample in data.samples)
    assert (sum(found.tokens), found.draws, found.steps, found.measured) == (exact, 10, 3, True)
    few = samples_of(codec, data, system="llava_1_5", stage="x", looked_at=4)
    assert (len(few.items), few.draws) == (4, 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "llava_1_5", "--gpu", "big"], "--gpu big: one of 24"),
        (
            ["--weights", "some/where", "--data", "mine.json"],
            "some/where: is not on this disk, and a plan downloads noth",
        ),
        (["--recipe", "nothing"], "--recipe nothing: no such system"),
        (["--recipe", "llava_1_5", "--devices", "0"], "--devices must be more than 0"),
        (
            ["--recipe", "llava_1_5", "--stage", "1_align", "--model.init_args.language.init_args.path=a/b"],
            "a/b is not on this disk",
        ),
    ],
)
def test_errors_are_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_copies_of_frozen_weights_are_not_planned(tmp_path: Path) -> None:
    """Under autocast a frozen weight in float32 is rounded anew and kept for the backward pass; one in bfloat16 not."""
    from vlm.building.precision import keep_frozen_in

    module = on_meta(llava_1_5, {"connector": Trained(1e-3)})
    items = [module.codec.encode(sample) for sample in SYSTEMS["llava_1_5"].pool(tmp_path, 2)]
    batch = module.codec.collate(items, counts=step_counts(items))
    before = cost_of_pack(module, batch, autocast=torch.bfloat16).kept[COPIES]
    keep_frozen_in(module, torch.bfloat16)
    after = cost_of_pack(module, batch, autocast=torch.bfloat16).kept.get(COPIES, 0)
    trained = 2 * sum(p.numel() for p in module.connector.parameters())
    assert after <= trained + 512 * 8 < before
