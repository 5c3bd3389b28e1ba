"""The loss of many labels of many words, some of them at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.ranks import run_ranks
from tests.support.systems import LLAMA, RATE, SYSTEMS, build, make
from tests.support.training import Recorder, packs, trainer
from tests.support.varlen import gradients
from vlm.codec import step_counts
from vlm.language import CausalLM
from vlm.language.label_loss import _ends_in_its_head

FEW = 3 * 32000
"""Logits of three labels, in the place of `vlm.functional.MOST_LOGITS`."""
CASES: dict[str, tuple[str, dict | None]] = {
    "trained": ("llava_1_5", None),
    "frozen": ("llava_1_5", {"connector": RATE}),
    "tied": ("tied", None),
    "T5": ("blip2_t5", None),
    "MED": ("blip_vqa", None),
    "Q-Former": ("blip2_qformer", None),
}


class _Logits(TorchDispatchMode):
    """Notes of how many labels there are logits at once."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.labels = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._log_softmax.default and args[0].shape[-1] == self.vocabulary:
            self.labels = max(self.labels, len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_all_logits(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, train = CASES[case]
    module = build(name, train)
    items = [module.codec.encode(sample) for sample in SYSTEMS[name].pool(tmp_path, 4)]
    batch = module.codec.collate(items, counts=step_counts(items))
    tables = (
        p for n, p in module.named_parameters() if n.endswith(("embed_tokens.weight", "shared.weight", "words.weight"))
    )
    vocabulary = len(next(tables))
    labels = module.label_row(batch).label_positions.numel()
    for precision, bound in (("32-true", 1e-5), ("bf16-mixed", 0.02)):
        made = []
        for most in (vocabulary * labels, vocabulary * 3):
            monkeypatch.setattr("vlm.functional.MOST_LOGITS", most)
            with _Logits(vocabulary) as logits:
                made.append(gradients(module, batch, precision))
            assert logits.labels == most // vocabulary
        (loss, whole), (found_loss, found) = made
        assert found_loss == pytest.approx(loss, rel=1e-6)
        size = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
        for key, gradient in whole.items():
            assert (found[key] - gradient).norm() <= bound * gradient.norm() + 1e-6 * size, (precision, key)


def test_a_head_whose_scores_are_changed_makes_all_of_them() -> None:
    """Asked of the model's own code: Gemma 2 caps them, Granite scales them where its configuration says so."""

    def ends(**entries: Any) -> bool:
        with torch.device("meta"):
            return _ends_in_its_head(CausalLM(config=LLAMA | entries).build())

    for kind in ("llama", "mistral", "qwen2", "gemma", "mixtral", "persimmon"):
        assert ends(model_type=kind, num_key_value_heads=4, head_dim=8), kind
    assert ends(model_type="opt")
    assert not ends(model_type="gemma2", head_dim=8)
    assert not ends(model_type="granite", logits_scaling=8.0)


def _steps(folder: Path) -> list[tuple[list[float], list[dict[str, Tensor]]]]:
    """A sharded step with all logits at once, and one with those of three labels."""
    made = []
    for most in (2**26, FEW):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vlm.functional.MOST_LOGITS", most)
            module, recorder = make("llava_1_5"), Recorder()
            run = trainer(folder, world=2, fsdp="32-true", max_epochs=1, callbacks=[recorder])
            run.fit(module, packs(module, folder, [[[0, 1], [2, 3]]], world=2, rank=distributed.get_rank()))
        made.append((recorder.losses, recorder.gradients))
    return made


@pytest.mark.slow
def test_a_sharded_head(tmp_path: Path) -> None:
    (loss, [whole]), (found_loss, [found]) = run_ranks(_steps, 2, tmp_path)[0]
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for key, gradient in whole.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-7)
