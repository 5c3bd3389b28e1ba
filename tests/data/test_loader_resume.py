"""The loader in a real Lightning loop: wherever a checkpoint is written, the resumed run is the same run."""

import warnings

import vlm  # noqa: F401  before lightning
import lightning as L
import pytest
import torch

from tests.support.fake_codec import ByteCodec, samples
from vlm.data import BatchSpec, InstructionData
from vlm.errors import UserError
from vlm.evaluation.judges import Judges


class Model(L.LightningModule):
    """One weight. Notes the samples of every optimizer step."""

    in_batch_terms = ()

    def __init__(self, crash_at=None):
        super().__init__()
        self.codec = ByteCodec()
        self.judges = Judges()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.window, self.log_of_steps = [], []
        self.crash_at = crash_at

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == self.crash_at:
            raise RuntimeError("power cut")
        assert batch.packs == self.trainer.world_size * self.trainer.accumulate_grad_batches
        self.batch_idx = batch_idx
        self.window += [info.id for info in batch.samples if not info.filler]
        difference = batch.text.targets.float() / 100 - self.weight
        return difference.square().sum() / batch.counts["lm"] * batch.packs

    def on_before_optimizer_step(self, optimizer):
        self.log_of_steps.append((self.current_epoch, tuple(sorted(self.window)), float(self.weight), self.batch_idx))
        self.window = []

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    def __init__(self, path, hook, at):
        self.path, self.hook, self.at = path, hook, at

    def _save(self, trainer, hook, at):
        if (hook, at) == (self.hook, self.at):
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self._save(trainer, "batch_end", (trainer.current_epoch, batch_idx))

    def on_validation_end(self, trainer, module):
        self._save(trainer, "validation_end", (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx))

    def on_train_epoch_end(self, trainer, module):
        self._save(trainer, "epoch_end", trainer.current_epoch)

    def on_train_epoch_start(self, trainer, module):
        self._save(trainer, "epoch_start", trainer.current_epoch)

    def on_exception(self, trainer, module, exception):
        if self.hook == "exception":
            trainer.save_checkpoint(self.path)


def fit(tmp_path, *, callbacks=(), resume=None, crash_at=None, model=None, data=None, **options):
    model = model or Model(crash_at)
    defaults = {"devices": 1, "max_epochs": 3, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **(defaults | options),
    )
    data = data() if data else InstructionData([samples(22)], batch=BatchSpec(8), val_sources=[samples(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=False)
    return model


PLACES = [
    ("epoch_start", 1),
    ("batch_end", (0, 0)),  # in the middle of the first window
    ("batch_end", (0, 1)),
    ("batch_end", (1, 2)),
    ("batch_end", (1, 3)),
    ("batch_end", (1, 4)),
    ("batch_end", (1, 5)),  # the last of an epoch
    ("validation_end", (1, 5)),
    ("epoch_end", 0),
    ("exception", (1, 2)),  # first half of a window: the pack was handed out, but not trained on
    ("exception", (1, 3)),
    ("exception", (1, 5)),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole")).log_of_steps


@pytest.mark.parametrize(("hook", "at"), PLACES)
def test_a_checkpoint_written_anywhere_resumes_exactly(tmp_path, whole, hook, at):
    path = tmp_path / "x.ckpt"
    assert len(whole) == 9
    if hook == "exception":
        with pytest.raises(RuntimeError, match="power cut"):
            fit(tmp_path, callbacks=[SaveAt(path, hook, at)], crash_at=at)
    else:
        assert fit(tmp_path, callbacks=[SaveAt(path, hook, at)]).log_of_steps == whole
    resumed = fit(tmp_path, resume=path)
    done = torch.load(path, weights_only=False)["global_step"]
    assert resumed.log_of_steps == whole[done:]  # the samples and, bit for bit, the weights
    loop = resumed.trainer.fit_loop.epoch_loop
    assert loop._batches_that_stepped == 9  # the step that loggers write
    assert loop.batch_progress.total.completed == 18


@pytest.mark.parametrize("validate_every", [2, 3])
def test_validation_in_the_middle_of_an_epoch_disturbs_nothing(tmp_path, whole, validate_every):
    path = tmp_path / "x.ckpt"
    options = {"val_check_interval": validate_every}
    callback = SaveAt(path, "validation_end", (1, validate_every - 1))
    assert fit(tmp_path, callbacks=[callback], **options).log_of_steps == whole
    done = torch.load(path, weights_only=False)["global_step"]
    assert fit(tmp_path, resume=path, **options).log_of_steps == whole[done:]


@pytest.mark.parametrize("accumulate", [1, 3, 4])
@pytest.mark.parametrize(("hook", "at"), [("batch_end", (1, 3)), ("batch_end", (1, 2)), ("epoch_end", 1)])
def test_resume_with_another_accumulation(tmp_path, whole, accumulate, hook, at):
    path = tmp_path / "x.ckpt"
    fit(tmp_path, callbacks=[SaveAt(path, hook, at)])
    resumed = fit(tmp_path, resume=path, accumulate_grad_batches=accumulate).log_of_steps
    done = torch.load(path, weights_only=False)["global_step"]
    assert [step[:2] for step in resumed] == [step[:2] for step in whole[done:]]
    assert [step[2] for step in resumed] == pytest.approx([step[2] for step in whole[done:]], abs=1e-6)


def test_epochs_of_different_length_are_seen_whole(tmp_path):
    def data():
        return InstructionData([samples(40)], batch=BatchSpec(92, "tokens"))

    full = fit(tmp_path, data=data).log_of_steps
    per_epoch = [[ids for epoch, ids, *_ in full if epoch == e] for e in range(3)]
    assert len({len(steps) for steps in per_epoch}) > 1
    assert all(sorted(i for ids in steps for i in ids) == sorted(str(i) for i in range(40)) for steps in per_epoch)
    longer = next(epoch for epoch, steps in enumerate(per_epoch) if len(steps) > len(per_epoch[0]))
    # in the longer epoch, where the first one ended
    for hook, at in [("batch_end", (longer, len(per_epoch[0]) * 2 - 1)), ("epoch_end", 0), ("epoch_end", 1)]:
        path = tmp_path / f"{at}.ckpt"
        fit(tmp_path, data=data, callbacks=[SaveAt(path, hook, at)])
        done = torch.load(path, weights_only=False)["global_step"]
        assert fit(tmp_path, data=data, resume=path).log_of_steps == full[done:]


def test_limited_epochs(tmp_path, whole):
    limited = fit(tmp_path, limit_train_batches=4).log_of_steps
    assert [step[1] for step in limited] == [whole[i][1] for i in (0, 1, 3, 4, 6, 7)]
    with pytest.raises(UserError, match=r"multiple of trainer\.accumulate_grad_batches=2"):
        fit(tmp_path, limit_train_batches=3)
    with pytest.raises(UserError, match=r"multiple of trainer\.accumulate_grad_batches=2"):
        fit(tmp_path, limit_train_batches=0.5)
    with pytest.raises(UserError, match="overfit_batches"):
        fit(tmp_path, overfit_batches=2)


def test_a_low_precision_trainer_leaves_the_batch_as_it_is(tmp_path):
    class Checked(Model):
        def training_step(self, batch, batch_idx):
            assert batch.text.weights.dtype == batch.views["image"].pixels.dtype == torch.float32
            return super().training_step(batch, batch_idx)

    for precision in ("bf16-true", "bf16-mixed"):
        assert fit(tmp_path, model=Checked(), precision=precision, max_epochs=1).log_of_steps


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_predict_delivers_lists_of_samples(tmp_path, precision):
    class Names(Model):
        def predict_step(self, batch, batch_idx):
            return [sample.id for sample in batch]

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        precision=precision,
    )
    data = InstructionData([samples(4)], batch=BatchSpec(2), predict_sources=[samples(10)], val_batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trainer.predict(Names(), datamodule=data)
    assert found == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]


class SharedModel(Model):
    def training_step(self, batch, batch_idx):
        gathered = [None] * 2
        torch.distributed.all_gather_object(gathered, [info.id for info in batch.samples if not info.filler])
        loss = super().training_step(batch, batch_idx)
        self.window = self.window[: -len(gathered[self.global_rank]) or None] + gathered[0] + gathered[1]
        return loss


def test_two_processes_take_the_same_steps_as_one(tmp_path, whole):
    def run(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = SharedModel()
            trainer = L.Trainer(
                accelerator="cpu",
                devices=2,
                strategy="ddp_fork",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path,
                callbacks=[Dump(tmp_path / "steps.pt"), SaveAt(tmp_path / "two.ckpt", "batch_end", (1, 1))],
                max_epochs=3,
                **options,
            )
            data = InstructionData([samples(22)], batch=BatchSpec(8), val_sources=[samples(3)])
            trainer.fit(model, datamodule=data)

    run(use_distributed_sampler=False)
    steps = torch.load(tmp_path / "steps.pt")
    assert [tuple(step[:2]) for step in steps] == [step[:2] for step in whole]
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in whole], abs=1e-6)
    resumed = fit(tmp_path, resume=tmp_path / "two.ckpt").log_of_steps  # on one device with two micro-batches
    assert [step[:2] for step in resumed] == [step[:2] for step in whole[5:]]
    assert [step[2] for step in resumed] == pytest.approx([step[2] for step in whole[5:]], abs=1e-6)
    with pytest.raises(Exception, match=r"set trainer\.use_distributed_sampler: false"):
        run(use_distributed_sampler=True)


class Dump(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            torch.save(module.log_of_steps, self.path)
