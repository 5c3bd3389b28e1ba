import vlm  # first: repairs torchvision

import errno
import json
import os
import pickle
import subprocess
import time
import weakref
from pathlib import Path

import pytest
import torch
import vlm.checkpoints.files.writing
from safetensors.torch import load_file, save_file

from tests.conftest import PATIENCE
from tests.support.ranks import SERVER
from vlm.checkpoints.files import atomic
from vlm.checkpoints.artefact import STAGE_FILE, read_artefact, write_artefact
from vlm.checkpoints.files.atomic import atomic_directory, atomic_file, remove_leftovers
from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.report import LoadReport, Resized
from vlm.checkpoints.files.identity import hash_tensor
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.files.writing import write_safetensors
from vlm.checkpoints.published.open import find_weights
from vlm.errors import UserError
from vlm.hub import is_reachable
from vlm.prompts import LlamaTokenizer

META = {"system": "llava", "stage": "1_align", "global_step": 7, "model": {"class_path": "x", "init_args": {}}}


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5).to(torch.bfloat16),
        "a.bias": torch.randn(3),
        "b.ids": torch.arange(4)[None],
        "b.mask": torch.tensor([True, False, True]),
        "b.scale": torch.tensor(2.5, dtype=torch.float16),
        "b.none": torch.zeros(0, 4),
    }


def same(one, other):
    assert sorted(one) == sorted(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


# --- containers


def containers(folder, tensors):
    """Every container of the same tensors: name -> path."""
    kinds = {kind: folder / kind for kind in ("safe", "shards", "bin", "bin_shards", "nested", "legacy")}
    for path in kinds.values():
        path.mkdir()
    save_file(tensors, kinds["safe"] / "model.safetensors")
    write_safetensors(kinds["shards"] / "model.safetensors", tensors.items(), max_shard_bytes=40)
    torch.save(tensors, kinds["bin"] / "pytorch_model.bin")
    torch.save({"lr": 0.1}, kinds["bin"] / "training_args.bin")
    halves = [dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])]
    weight_map = {}
    for number, half in enumerate(halves):
        torch.save(half, kinds["bin_shards"] / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(half, f"pytorch_model-{number}.bin")
    index = kinds["bin_shards"] / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save({"model": tensors, "epoch": 3}, kinds["nested"] / "model.pth")
    torch.save(tensors, kinds["legacy"] / "model.pth", _use_new_zipfile_serialization=False)
    return kinds


def test_containers_hold_the_same(tmp_path, tensors):
    for kind, path in containers(tmp_path, tensors).items():
        files = WeightFiles(path)
        assert files.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}, kind
        same(dict(files.items()), tensors)
    same(dict(WeightFiles(tmp_path / "nested" / "model.pth").items()), tensors)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    with pytest.raises(UserError, match=r"no tensor 'c' among 6"):
        files.get("c")


def test_written_file_is_read_by_safetensors(tmp_path, tensors):
    transposed = tensors["a.weight"].T
    write_safetensors(tmp_path / "x.safetensors", [*tensors.items(), ("t", transposed)], metadata={"origin": "test"})
    same(load_file(tmp_path / "x.safetensors"), {**tensors, "t": transposed})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_one_tensor_at_a_time_is_gathered(tmp_path, tensors, monkeypatch):
    made = []

    def gather(tensor):
        assert not [before for before in made if before() is not None], "an earlier one is still held"
        made.append(weakref.ref(whole := tensor.clone()))
        return whole

    monkeypatch.setattr(vlm.checkpoints.files.writing, "gather", gather)
    write_safetensors(tmp_path / "x.safetensors", tensors.items(), hashes=(hashes := {}))
    assert len(made) == len(tensors)
    assert hashes == {name: hash_tensor(tensor) for name, tensor in tensors.items()}


def test_hash_sees_dtype_shape_and_bits():
    zeros = torch.zeros(2, 2)
    different = [zeros, zeros.half(), zeros.bfloat16(), torch.zeros(4), -zeros, torch.zeros(2, 3)]
    assert len({hash_tensor(tensor) for tensor in different}) == len(different)
    matrix = torch.randn(4, 6, dtype=torch.bfloat16)
    assert hash_tensor(matrix.T) == hash_tensor(matrix.T.contiguous())


class Malicious:
    def __reduce__(self):
        return os.system, ("false",)


def test_bad_containers_are_user_errors(tmp_path, tensors):
    kinds = containers(tmp_path, tensors)
    whole = (kinds["safe"] / "model.safetensors").read_bytes()
    (kinds["safe"] / "model.safetensors").write_bytes(whole[:-7])
    zipped = (kinds["bin"] / "pytorch_model.bin").read_bytes()
    (kinds["bin"] / "pytorch_model.bin").write_bytes(zipped[: len(zipped) // 2])
    next(kinds["shards"].glob("*00002-of*")).unlink()
    torch.save({"a": torch.zeros(1), "x": Malicious()}, kinds["nested"] / "model.pth")
    (kinds["legacy"] / "model.pth").write_bytes(pickle.dumps([1]))
    (tmp_path / "empty").mkdir()
    leads_out = json.dumps({"weight_map": {"a": "../safe/model.safetensors"}})
    (kinds["bin_shards"] / "pytorch_model.bin.index.json").write_text(leads_out)
    for path, message in {
        kinds["safe"]: r"model\.safetensors: is truncated",
        kinds["bin"]: r"pytorch_model\.bin: is truncated",
        kinds["shards"]: r"shard model-00002-of-\d+\.safetensors is missing",
        kinds["nested"]: "it could run code",
        kinds["legacy"]: "model.pth",
        kinds["bin_shards"]: "leads out of the folder",
        tmp_path / "empty": r"no \*\.safetensors",
        tmp_path / "nowhere" / "at" / "all": "no such file or folder",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            WeightFiles(path)
        assert "\n" not in str(caught.value)


def test_hub_id_from_the_local_cache(tmp_path, tensors, monkeypatch):
    import huggingface_hub.constants as constants

    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    torch.save(tensors, snapshot / "pytorch_model.bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    same(dict(WeightFiles("some/model").items()), tensors)
    same(dict(WeightFiles("some/model", revision="main").items()), tensors)
    with pytest.raises(UserError, match=r"other/model: neither a folder here nor reachable"):
        WeightFiles("other/model")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """Its client would try again for half a minute, file by file."""
    tried, slept = [], []

    def refuse(address, timeout):
        tried.append(address)
        raise OSError

    monkeypatch.setattr("time.sleep", slept.append)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", refuse)
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    is_reachable.cache_clear()
    try:
        for _ in range(3):
            with pytest.raises(UserError, match=r"`hf download other/model`"):
                WeightFiles("other/model")
            with pytest.raises(UserError, match=r"`hf download other/model`"):
                LlamaTokenizer("other/model").encode("a")
        assert len(tried) == 1
        assert not slept, "between tries"
    finally:
        is_reachable.cache_clear()


def test_an_adapter_is_no_model(tmp_path, tensors):
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "liuhaotian/llava-v1.5-7b"}')
    (tmp_path / "non_lora_trainables.bin").write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    for use in (find_weights, WeightFiles):
        with pytest.raises(
            UserError, match=r"an adapter of peft .* and no model; its base is liuhaotian/llava-v1.5-7b: merge"
        ):
            use(tmp_path)


# --- artefacts


def test_artefact_round_trip(tmp_path, tensors):
    carried = {"vision.trunk.norm.weight": torch.ones(3)}
    meta = {
        **META,
        "trained": ["a.weight"],
        "frozen": {"vision": {"source": "clip", "fingerprint": "f0"}},
        "note": "kept",
    }
    written = write_artefact(tmp_path / "artefact", tensors=iter(tensors.items()), meta=meta, carried=carried)
    artefact = read_artefact(tmp_path / "artefact", system=["llava", "vila"])
    artefact.verify()
    same(dict(artefact.items()), tensors)
    same(artefact.carried, carried)
    assert artefact.meta["note"] == "kept"
    assert artefact.meta["ties"] == {}
    assert (
        artefact.meta["versions"]["torch"] == torch.__version__
        or artefact.meta["versions"]["torch"] in torch.__version__
    )
    # contents decide, not the number of files
    sharded = write_artefact(tmp_path / "b", tensors=tensors.items(), meta=meta, carried=carried, max_shard_bytes=40)
    assert written.fingerprint == artefact.fingerprint == sharded.fingerprint
    meta["frozen"]["vision"]["fingerprint"] = "f1"
    assert write_artefact(tmp_path / "c", tensors=tensors.items(), meta=meta).fingerprint != written.fingerprint


def test_broken_artefacts_are_user_errors(tmp_path, tensors):
    def make(name):
        write_artefact(tmp_path / name, tensors=tensors.items(), meta=META, carried={"c": torch.ones(1)})
        return tmp_path / name

    def edit(folder, **changes):
        meta = json.loads((folder / STAGE_FILE).read_text()) | changes
        (folder / STAGE_FILE).write_text(json.dumps(meta))

    (make("half") / STAGE_FILE).unlink()
    edit(make("format"), format=99)
    (make("json") / STAGE_FILE).write_text("{")
    (make("carried") / CARRIED).unlink()
    edit(make("names"), tensors={"other": "0"})
    make("system")
    for name, message in {
        "half": r"has no stage\.json.*vlm convert",
        "format": "format 99",
        "json": r"stage\.json: is not readable JSON",
        "carried": r"carried\.safetensors is missing",
        "names": r"a\.weight.*only in one",
        "system": "artefact of 'llava', expected blip",
        "absent": "no such folder",
    }.items():
        with pytest.raises(UserError, match=message):
            read_artefact(tmp_path / name, system="blip" if name == "system" else None)
    flipped = {**tensors, "a.bias": tensors["a.bias"] + 1}
    write_safetensors(make("hash") / "model.safetensors", flipped.items())
    with pytest.raises(UserError, match=r"'a\.bias' is not the one that was written"):
        read_artefact(tmp_path / "hash").verify()


def test_artefact_is_replaced_as_a_whole(tmp_path, tensors, monkeypatch):
    folder = tmp_path / "artefact"
    write_artefact(folder, tensors=tensors.items(), meta=META)

    def broken():
        yield "a", torch.zeros(1)
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_artefact(folder, tensors=broken(), meta=META)
    same(dict(read_artefact(folder).items()), tensors)
    for exchange in (True, False):  # with and without a filesystem that swaps two names
        if not exchange:
            monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
        value = torch.full((1,), float(exchange))
        write_artefact(folder, tensors=[("a", value)], meta=META)
        same(dict(read_artefact(folder).items()), {"a": value})
        assert [path.name for path in tmp_path.iterdir()] == ["artefact"]


# --- load report


def test_load_report():
    report = LoadReport(
        loaded=["vision.a", "vision.b", "language.c"],
        resized={"vision.pos_embed": Resized((1, 257, 8), (1, 577, 8), "bicubic")},
        new=["connector.0.weight", "connector.0.bias"],
        carried=["vision.norm.weight"],
    )
    lines = report.render().splitlines()
    assert lines[0].split() == ["part", "loaded", "resized", "new", "carried"]
    assert [line.split() for line in lines[1:4]] == [
        ["connector", "-", "-", "2", "-"],
        ["language", "1", "-", "-", "-"],
        ["vision", "2", "1", "-", "1"],
    ]
    assert lines[4] == "resized: vision.pos_embed 1x257x8 -> 1x577x8, bicubic"


# --- atomic files and checkpoints


def test_failures_leave_the_old_and_no_rubbish(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(error):
        with atomic_file(tmp_path / "file", num_bytes=5000) as half:
            half.write(b"new")
            raise error

    with pytest.raises(KeyError):
        fail(KeyError())
    with pytest.raises(UserError, match=r"no space left in .*: 5,000 bytes are needed"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match="is a file where a folder"), atomic_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".tmp-step=3.ckpt-00112233").write_text("half")
    (tmp_path / ".old-artefact").mkdir()  # killed between the two renames of a replacement
    with atomic_file(tmp_path / "other") as file:
        assert len(remove_leftovers(tmp_path)) == 1, "a write in progress is no leftover"
        file.write(b"x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other", "artefact"}


def test_io_refuses_what_a_resume_could_not_read(tmp_path):
    from vlm.checkpoints.resume.pointer import read_last
    from vlm.checkpoints.resume.single_file import AtomicCheckpointIO

    io = AtomicCheckpointIO()
    with pytest.raises(UserError, match=r"checkpoint\['callbacks'\]\['mine'\]\[1\] is a pathlib\.\w+"):
        io.save_checkpoint({"callbacks": {"mine": [1, Path("x")]}}, tmp_path / "a.ckpt")
    assert read_last(tmp_path) is None
    state = {"state_dict": {"w": torch.randn(3)}, "global_step": 3, "size": torch.Size([2])}
    io.save_checkpoint(state, tmp_path / "a.ckpt")
    same(io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)["state_dict"], state["state_dict"])
    torch.save({"x": Malicious()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="not opened"):
        io.load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"half\.ckpt: is damaged"):
        io.load_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(UserError, match="no such checkpoint"):
        io.load_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "last").write_text("gone.ckpt\n")
    with pytest.raises(UserError, match=r"names the checkpoint 'gone\.ckpt'"):
        read_last(tmp_path)


def test_pointer_follows_saves_and_removals(tmp_path):
    from vlm.checkpoints.resume.pointer import read_last
    from vlm.checkpoints.resume.single_file import AtomicCheckpointIO

    io = AtomicCheckpointIO()
    for step in (1, 2, 3):
        io.save_checkpoint({"step": step}, tmp_path / f"step={step}.ckpt")
        os.utime(tmp_path / f"step={step}.ckpt", (step, step))
    io.remove_checkpoint(tmp_path / "step=1.ckpt")
    assert read_last(tmp_path).name == "step=3.ckpt"
    io.remove_checkpoint(tmp_path / "step=3.ckpt")
    assert read_last(tmp_path).name == "step=2.ckpt"
    io.remove_checkpoint(tmp_path / "step=2.ckpt")
    assert read_last(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_keeps_the_previous_checkpoint(small_disk):
    from vlm.checkpoints.resume.pointer import read_last
    from vlm.checkpoints.resume.single_file import AtomicCheckpointIO

    io = AtomicCheckpointIO()
    state = {"w": torch.randn(1_000_000)}
    io.save_checkpoint(state, small_disk / "step=1.ckpt")
    with pytest.raises(
        UserError, match=r"no space left in .*disk: 8,000,000 bytes are needed, 4,\d+,\d+ bytes are free"
    ):
        io.save_checkpoint({"w": torch.randn(2_000_000)}, small_disk / "step=2.ckpt")
    assert {path.name for path in small_disk.iterdir()} == {"step=1.ckpt", "last"}
    same(io.load_checkpoint(read_last(small_disk)), state)
    with pytest.raises(UserError, match="no space left"):
        write_artefact(small_disk / "artefact", tensors=[("w", torch.randn(2_000_000))], meta=META)
    assert {path.name for path in small_disk.iterdir()} == {"step=1.ckpt", "last"}


def save_forever(folder: str, step: int) -> None:
    from vlm.checkpoints.resume.single_file import AtomicCheckpointIO

    torch.set_num_threads(1)
    io = AtomicCheckpointIO()
    while True:
        step += 1
        tensor = torch.full((300_000,), float(step))
        io.save_checkpoint({"step": step, "w": tensor}, f"{folder}/step={step}.ckpt")
        io.remove_checkpoint(f"{folder}/step={step - 2}.ckpt")
        write_artefact(f"{folder}/artefact", tensors=[("w", tensor)], meta={**META, "global_step": step})


def test_kill_during_save(tmp_path):
    from vlm.checkpoints.resume.pointer import read_last
    from vlm.checkpoints.resume.single_file import AtomicCheckpointIO

    io = AtomicCheckpointIO()
    step = leftovers = 0
    for delay in (0.0, 0.001, 0.002, 0.004, 0.008, 0.016):
        process = SERVER.Process(target=save_forever, args=(str(tmp_path), step))
        process.start()
        deadline = time.monotonic() + PATIENCE
        while read_last(tmp_path) is None or not (tmp_path / "artefact").exists():
            assert time.monotonic() < deadline
        before = read_last(tmp_path)
        while read_last(tmp_path) == before or not any(tmp_path.glob(".tmp-step*")):  # kill in the middle of a write
            assert time.monotonic() < deadline
        time.sleep(delay)
        process.kill()
        process.join()
        leftovers += len(list(tmp_path.glob(".tmp-*")))
        checkpoint = io.load_checkpoint(read_last(tmp_path))
        assert torch.equal(checkpoint["w"], torch.full((300_000,), float(checkpoint["step"])))
        assert checkpoint["step"] > step
        read_artefact(tmp_path / "artefact").verify()
        for path in tmp_path.glob("step=*.ckpt"):
            io.load_checkpoint(path)
        step = checkpoint["step"]
    assert leftovers, "no kill fell into a write"
    io.save_checkpoint({"step": step}, tmp_path / "end.ckpt")
    assert not list(tmp_path.glob(".tmp-*"))


def test_lightning_saves_and_resumes_through_it(tmp_path):
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel

    from vlm.checkpoints.resume.pointer import read_last
    from vlm.checkpoints.resume.single_file import AtomicCheckpointIO

    def trainer(steps):
        return pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            default_root_dir=tmp_path,
            plugins=[AtomicCheckpointIO()],
            callbacks=[ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )

    trainer(3).fit(BoringModel())
    last = read_last(tmp_path / "checkpoints")
    assert last is not None
    assert last.name == "epoch=0-step=2.ckpt"
    resumed = trainer(4)
    resumed.fit(BoringModel(), ckpt_path=last)
    assert resumed.global_step == 4
    assert read_last(tmp_path / "checkpoints").name.endswith("step=4.ckpt")
