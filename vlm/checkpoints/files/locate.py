"""Where the tensors of a checkpoint lie: files of a folder, shards of an index, a repository of the hub."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from vlm.errors import UserError
from vlm.hub import is_reachable

CARRIED = "carried.safetensors"
"""Tensors a published layout has and the computation never uses; beside the weights, never one of them."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OTHER_PICKLES = {"training_args.bin", "optimizer.bin", "scheduler.bin", "random_states.bin"}
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.tiktoken"]


def find_files(path: Path) -> tuple[list[Path], list[str] | None]:
    """The weight files of a folder or file and, where an index names the tensors, those names.

    Raises:
        UserError: no weight files, a broken index, or a missing shard.
    """
    refuse_peft_folder(path)
    if path.is_file():
        return ([path], None) if not path.name.endswith(".index.json") else _indexed(path)
    indices = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.bin.index.json"))
    whole = path / "model.safetensors"
    if len(indices) == 1 and not whole.exists():
        return _indexed(indices[0])
    files = [whole] if whole.exists() else [file for file in sorted(path.glob("*.safetensors")) if file.name != CARRIED]
    if not files:
        pickles = (file for suffix in ("bin", "pth", "pt") for file in sorted(path.glob(f"*.{suffix}")))
        files = [file for file in pickles if file.name not in _OTHER_PICKLES] or _named_latest(path)
    if not files:
        raise UserError(f"{path}: no *.safetensors, *.bin, *.pth or *.pt file in it; is it the right folder?")
    return files, None


def _named_latest(path: Path) -> list[Path]:
    """Where `latest` names the folder with the weights, as in training with DeepSpeed."""
    latest = path / "latest"
    if not latest.is_file():
        return []
    folder = path / latest.read_text(encoding="utf-8").strip()
    files = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(files) > 1:
        raise UserError(f"{folder}: holds {len(files)} parts of a model split over as many devices; merge them first")
    return files


def refuse_peft_folder(path: Path) -> None:
    """Refuses a folder that holds an adapter and not the model that it is laid over.

    Raises:
        UserError: it is one.
    """
    file = path / "adapter_config.json"
    if not file.is_file() or any(not name.name.startswith("adapter_") for name in path.glob("*.safetensors")):
        return
    if any(path.glob("*.index.json")) or any(path.glob("pytorch_model*.bin")):
        return
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    raise UserError(
        f"{path}: is an adapter of peft (adapter_config.json) and no model; its base is {base or 'not named there'}: "
        "merge it with peft (merge_and_unload, then save_pretrained) and give that folder"
    )


def _indexed(index: Path) -> tuple[list[Path], list[str]]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{index}: is no index of shards ({error!r}); fetch it again") from error
    if bad := [name for name in weight_map.values() if Path(name).name != name]:
        raise UserError(f"{index}: {bad[0]!r} leads out of the folder")
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{index.parent}: shard {preview(missing)} is missing; fetch it again")
    return files, list(weight_map)


def download(hub_id: str, revision: str | None) -> Path:
    """Fetches a hub repository (or finds it in the local cache): safetensors, or else pickles, and the small files.

    Raises:
        UserError: no hub id, not reachable, or a repository without weights.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise UserError(f"{hub_id}: no such file or folder")
    from huggingface_hub import snapshot_download

    reachable = is_reachable()
    try:
        for weights in (["*.safetensors"], ["*.bin", "*.pth"]):  # not both: a repository often holds the same twice
            folder = Path(
                snapshot_download(
                    hub_id, revision=revision, allow_patterns=weights + _SMALL_FILES, local_files_only=not reachable
                )
            )
            if any(True for pattern in weights for _ in folder.glob(pattern)):
                return folder
    except Exception as error:  # the hub client raises many kinds: offline, unknown, gated, no network
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        if not reachable:
            reason = f"no connection, or HF_HUB_OFFLINE is set; fetch it where there is one: `hf download {hub_id}`"
        raise UserError(f"{hub_id}: neither a folder here nor reachable on the hub ({reason})") from error
    raise UserError(f"{hub_id}: the repository holds no weight files")


def preview(names: Iterable[str], shown: int = 5) -> str:
    """The first few names and how many there are, for messages."""
    names = list(names)
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")
