"""Models on this machine: a folder of transformers for texts, and systems of this project for images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.procedures.instruct.answers import Rejected
from vlm.procedures.instruct.models import Reply, Turn
from vlm.procedures.instruct.request_batcher import Request, RequestBatcher
from vlm.procedures.instruct.task_specs import Sampling
from vlm.sample import ImagePart, Message, Sample, TextPart


class LocalChat:
    """A causal language model with a chat template.

    Args:
        folder: as `save_pretrained` writes it, with its tokenizer.
        parallel: requests in one batch at most.
        device: cuda where there is one, by default.
        dtype: as the folder says, by default.

    Raises:
        UserError: no such folder, not such a model, or a tokenizer without chat template.
    """

    def __init__(
        self, folder: str | Path, *, parallel: int = 1, device: str | None = None, dtype: str | None = None
    ) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--local {folder}: no folder of a transformers model (it has no config.json)")
        import torch
        from jinja2.exceptions import TemplateError
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = str(folder)
        self._template_error = TemplateError
        self._together = RequestBatcher(self._generate, parallel=parallel)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.network: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=dtype or "auto"
            ).eval()
        except Exception as error:  # whatever the libraries raise over what lies in the folder
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--local {folder}: cannot be opened as a causal language model ({reason})") from error
        if not self.tokenizer.chat_template:
            raise UserError(f"--local {folder}: its tokenizer has no chat template; give a model made for chats")
        try:
            self.network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}; leave it out") from error
        ends = self.network.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends]) - {None}

    def reply(self, turns: Sequence[Turn], *, seed: int, sampling: Sampling) -> Reply:
        # the template has written what the tokenizer would put in front
        ids = self.tokenizer(self._render(turns), add_special_tokens=False).input_ids
        space = getattr(self.network.config, "max_position_embeddings", None)
        if space is not None and len(ids) + sampling.max_tokens > space:
            raise Rejected(f"more than the {space} tokens that the model has room for, --max_tokens included")
        return self._together.ask(ids, seed=seed, sampling=sampling)

    def _generate(self, requests: Sequence[Request]) -> list[Reply]:
        import torch

        sampling, width = requests[0].sampling, max(len(request.prompt) for request in requests)
        some_id = min(self._ends, default=0)  # stands where nobody looks
        ids = torch.full((len(requests), width), some_id)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        with torch.no_grad(), _explained_memory():
            found = self.network.generate(
                ids.to(self.network.device),
                attention_mask=mask.to(self.network.device),
                max_new_tokens=sampling.max_tokens,
                do_sample=False,  # the processors sample, each row from its own seed alone
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=some_id,
                logits_processor=_decoding(sampling).processors([request.seed for request in requests]),
            )[:, width:].tolist()
        return [self._read(row) for row in found]

    def _read(self, ids: list[int]) -> Reply:
        end = next((at for at, token in enumerate(ids) if token in self._ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Reply(text, "length" if end is None else "stop", len(ids) if end is None else end + 1)

    def _render(self, turns: Sequence[Turn]) -> str:
        assert all(turn.picture is None for turn in turns)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except self._template_error as error:
            if messages[0]["role"] != "system":
                raise UserError(f"--local {self.name}: its chat template fails ({error})") from error
        # some templates know no system message: then it begins the first one of the user
        first, *others = [turn for turn in turns if turn.role != "system"]
        return self._render([Turn("user", f"{turns[0].text}\n\n{first.text}"), *others])


class OwnSystem:
    """A trained system of this project that looks at images.

    Args:
        weights: what `vlm predict --weights` takes.
        parallel: requests in one batch at most.
    """

    def __init__(self, weights: str, *, parallel: int = 1, device: str | None = None, dtype: str | None = None) -> None:
        from vlm.loading import open_system

        self.name = weights
        self.module = open_system(weights, device=device, dtype=dtype)
        self._together = RequestBatcher(self._generate, parallel=parallel)

    def reply(self, turns: Sequence[Turn], *, seed: int, sampling: Sampling) -> Reply:
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
        self.module.codec.encode(sample, generate=True)  # a bad one must not take its batch along
        sample.images[0].read(sample)
        return self._together.ask(sample, seed=seed, sampling=sampling)

    def _generate(self, requests: Sequence[Request]) -> list[Reply]:
        # what a sample draws depends on its id: here it is the request that draws
        samples = [replace(request.prompt, id=str(request.seed)) for request in requests]
        sampling = requests[0].sampling
        with _explained_memory():
            texts = self.module.generate(samples, decoding=_decoding(sampling), batch_size=len(samples))
        lengths = [len(self.module.codec.tokenizer.encode(text)[0]) for text in texts]
        return [
            Reply(text, "length" if tokens >= sampling.max_tokens else "stop", tokens)
            for text, tokens in zip(texts, lengths, strict=True)
        ]


def _decoding(sampling: Sampling) -> Any:
    from vlm.language import Decoding

    return Decoding(max_new_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p)


@contextmanager
def _explained_memory() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "a batch does not fit into the device's memory; lower --parallel, or --dtype bfloat16"
        ) from error
