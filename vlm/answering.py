"""What can be asked of a built system: answers, log-probabilities, embeddings, whether pairs belong together."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, overload

from lightning.pytorch import LightningModule
from torch import Tensor

from vlm.batch import Batch, Row
from vlm.codec import Codec
from vlm.data.sources.asked import Asked, as_samples
from vlm.errors import UserError
from vlm.evaluation.inference import as_pack, chunks_in_step, decoding_of, evaluating, label_scores
from vlm.evaluation.retrieval import Embeddings, concat_embeddings
from vlm.language import Decoding
from vlm.language.choosing import WeighedChoices
from vlm.sample import Sample


class Answering(LightningModule):
    """A system says here what it makes of a pack, as far as it can; whoever asks for samples gets it in chunks."""

    codec: Codec
    system: ClassVar[str]
    """Name of the system in recipes, artefacts and converters."""

    # -- what a system says

    def label_row(self, batch: Batch) -> Row:
        """The row whose tokens are predicted."""
        return batch.text

    def label_logits(self, batch: Batch) -> Tensor:
        """float[L, vocabulary] at the label positions of `label_row`."""
        raise UserError(f"{self.system} predicts no tokens: evaluate it by its losses, or by retrieval")

    def probe(self, batch: Batch) -> Tensor:
        """Numbers by which two networks are compared: the logits, unless a system has others."""
        return self.label_logits(batch)

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        """What the system says to each sample of a pack that was encoded with `generate=True`."""
        raise UserError(f"{self.system} does not answer: evaluate it by its losses, or by retrieval")

    def weigh(self, batch: Batch, decoding: Decoding) -> list[WeighedChoices]:
        """How likely each choice of each sample is, of a pack that was encoded with `generate=True`."""
        raise UserError(f"{self.system} does not weigh choices: leave out the metrics that compare them")

    def embeddings(self, batch: Batch) -> Embeddings:
        """What the images and texts of a pack are compared by."""
        raise UserError(f"{self.system} has no embeddings of images and texts: evaluate its answers")

    def match_logits(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        """float[N, 2]: that images and texts do not and do belong together, pair by pair, by the states of
        `Embeddings`."""
        raise UserError(f"{self.system} does not look at pairs again; set rerank to 0, or filter with another system")

    # -- use

    @overload
    def generate(
        self, asked: Asked, *, decoding: Decoding | None = ..., batch_size: int = ..., **options: Any
    ) -> str: ...
    @overload
    def generate(
        self, asked: Sequence[Asked], *, decoding: Decoding | None = ..., batch_size: int = ..., **options: Any
    ) -> list[str]: ...

    def generate(
        self,
        asked: Asked | Sequence[Asked],
        *,
        decoding: Decoding | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> str | list[str]:
        """An answer to a question or conversation, or to each of a list of them (`vlm.data.sources.asked`).

        The last message of the assistant, if any, is left out. One that is only begun (`Message.begun`) stays, and what
        comes back is what follows it. The ranks of a sharded system call it together, each with its own samples, as
        many as it has.

        Args:
            decoding: how answers are searched for.
            **options: of `Decoding`, such as `max_new_tokens=64`.

        Raises:
            UserError: a record of another form, an image that cannot be read, an unknown option.
        """
        search, samples = decoding_of(decoding, options), as_samples(asked)
        chunks = chunks_in_step(self, samples, batch_size)
        answers = [answer for chunk in chunks for answer in self._generate(chunk, search)]
        return answers[0] if isinstance(asked, Sample | Mapping) else answers

    def _generate(self, samples: Sequence[Sample], decoding: Decoding) -> list[str]:
        with evaluating(self):
            return self.answers(as_pack(self, samples, generate=True), decoding)[: len(samples)]

    @overload
    def score(self, asked: Asked, *, batch_size: int = ...) -> Tensor: ...
    @overload
    def score(self, asked: Sequence[Asked], *, batch_size: int = ...) -> list[Tensor]: ...

    def score(self, asked: Asked | Sequence[Asked], *, batch_size: int = 8) -> Tensor | list[Tensor]:
        """Log-probability of each trained token of a conversation, or of each of a list: float32[labels of the sample].

        The ranks of a sharded system call it together, each with its own samples, as many as it has.
        """
        chunks = chunks_in_step(self, as_samples(asked), batch_size)
        scores = [found for chunk in chunks for found in self._score(chunk)]
        return scores[0] if isinstance(asked, Sample | Mapping) else scores

    def _score(self, samples: Sequence[Sample]) -> list[Tensor]:
        with evaluating(self):
            batch = as_pack(self, samples, generate=False)
            return label_scores(self.label_logits(batch), self.label_row(batch), len(samples))

    def embed(self, asked: Asked | Sequence[Asked], *, batch_size: int = 8) -> Embeddings:
        """Embeddings of the images and texts of a sample or of several; `owner` counts the samples.

        The ranks of a sharded system call it together, each with its own samples, as many as it has.
        """
        chunks = chunks_in_step(self, as_samples(asked), batch_size)
        return concat_embeddings([(self._embed(chunk), len(chunk)) for chunk in chunks])

    def _embed(self, samples: Sequence[Sample]) -> Embeddings:
        with evaluating(self):
            return self.embeddings(as_pack(self, samples, generate=False))

    def match(self, image_states: Tensor, text_states: Tensor, *, probability: bool = False) -> Tensor:
        """float[N]: how well pairs belong together, by the states of `Embeddings`, which may be on any device.

        The ranks of a sharded system call it together.

        Args:
            probability: that they do, by `match_logits`; without, the logit alone, as retrieval compares pairs.
        """
        logits = self._match(image_states, text_states)
        return logits.float().softmax(-1)[:, 1] if probability else logits[:, 1]

    def _match(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        with evaluating(self):
            return self.match_logits(image_states.to(self.device), text_states.to(self.device))
