"""Models on this machine: a folder of transformers for texts, and systems of this project for pictures."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.procedures.instruct.answers import Rejected
from vlm.procedures.instruct.kinds import Sampling
from vlm.procedures.instruct.models import Reply, Turn
from vlm.sample import ImagePart, Message, Sample, TextPart


class LocalChat:
    """A causal language model with a chat template, one request at a time.

    Args:
        folder: as `save_pretrained` writes it, with its tokenizer.
        device: cuda where there is one, by default.
        dtype: as the folder says, by default.

    Raises:
        UserError: no such folder, not such a model, or a tokenizer without chat template.
    """

    def __init__(self, folder: str | Path, *, device: str | None = None, dtype: str | None = None) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--local {folder}: no folder of a transformers model (it has no config.json)")
        import torch
        from jinja2.exceptions import TemplateError
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = str(folder)
        self._template_error = TemplateError
        self._lock = threading.Lock()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.network: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=dtype or "auto"
            ).eval()
        except Exception as error:  # whatever the libraries raise over what lies in the folder
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--local {folder}: cannot be opened as a causal language model ({reason})") from error
        if not self.tokenizer.chat_template:
            raise UserError(
                f"--local {folder}: its tokenizer has no chat template; give a model that follows instructions"
            )
        try:
            self.network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}; leave it out") from error

    def reply(self, turns: Sequence[Turn], *, seed: int, sampling: Sampling) -> Reply:
        import torch

        from vlm.language import Decoding

        prompt = self._render(turns)
        # the template has written what the tokenizer would put in front
        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(self.network.device)
        space = getattr(self.network.config, "max_position_embeddings", None)
        if space is not None and ids.shape[1] + sampling.max_tokens > space:
            raise Rejected(f"more than the {space} tokens that the model has room for, --max_tokens included")
        decoding = Decoding(
            max_new_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed
        )
        with self._lock, torch.no_grad():
            found = self.network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_tokens,
                do_sample=False,  # the processors sample, from the seed alone
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=decoding.processors([seed]),
            )[0, ids.shape[1] :].tolist()
        ends = self.network.generation_config.eos_token_id
        is_ended = bool(found) and found[-1] in (ends if isinstance(ends, list) else [ends])
        text = str(self.tokenizer.decode(found, skip_special_tokens=True))
        return Reply(text, "stop" if is_ended else "length", len(found))

    def _render(self, turns: Sequence[Turn]) -> str:
        assert all(turn.picture is None for turn in turns)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except self._template_error as error:
            if messages[0]["role"] != "system":
                raise UserError(f"--local {self.name}: its chat template fails ({error})") from error
        # some templates know no system message: then it begins the first one of the user
        first, *others = [turn for turn in turns if turn.role != "system"]
        return self._render([Turn("user", f"{turns[0].text}\n\n{first.text}"), *others])


class OwnSystem:
    """A trained system of this project that looks at pictures, one request at a time.

    Args:
        weights: what `vlm predict --weights` takes.
    """

    def __init__(self, weights: str, *, device: str | None = None, dtype: str | None = None) -> None:
        from vlm.predict import open_system

        self.name = weights
        self.module = open_system(weights, device=device, dtype=dtype)
        self._lock = threading.Lock()

    def reply(self, turns: Sequence[Turn], *, seed: int, sampling: Sampling) -> Reply:
        from vlm.language import Decoding

        # its template has a system message of its own, which it was trained with
        instructions = "\n\n".join(turn.text for turn in turns if turn.role == "system")
        rest = [turn for turn in turns if turn.role != "system"]
        messages = []
        for at, turn in enumerate(rest):
            text = f"{instructions}\n\n{turn.text}" if instructions and at == 0 else turn.text
            content = (TextPart(text),) if turn.picture is None else (ImagePart(), TextPart(f"\n{text}"))
            messages.append(Message(turn.role, content))
        (owner,) = (turn.picture for turn in rest if turn.picture is not None)
        sample = Sample(owner.id, tuple(messages), owner.images, source=owner.source)
        decoding = Decoding(
            max_new_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed
        )
        with self._lock:
            (text,) = self.module.generate([sample], decoding=decoding)
        tokens = len(self.module.codec.tokenizer.encode(text)[0])
        return Reply(text, "length" if tokens >= sampling.max_tokens else "stop", tokens)
