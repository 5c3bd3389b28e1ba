"""Texts of BLIP-2: images first, then BOS and a text that goes on where the prompt ends.

Followed: salesforce/LAVIS, `blip2_opt.py` and `blip2_t5.py`; prompts of the paper (Li et al., 2023), sections 4 and 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.batch import IGNORE
from vlm.prompts.spans import ImageMark, Span
from vlm.prompts.template import IMAGE, Form, Template, TextSpan, Tokenized, tokenize
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Message


@dataclass(frozen=True)
class QueriedTemplate(Template):
    """[images] BOS prompt answer, the answer and its end trained; without a prompt BOS is trained too.

    So published: where a prompt is given its tokens are masked from BOS on, elsewhere every token of the text is a
    target, and the last of the queries predicts BOS.
    """

    def turns(self, messages: Sequence[Message], *, generate: bool = False) -> list[list[Span]]:
        turns = super().turns(messages, generate=generate)
        spans = [span for turn in turns for span in turn if not isinstance(span, TextSpan) or span.text]
        images = [span for span in spans if isinstance(span, ImageMark)]
        texts = [span for span in spans if isinstance(span, TextSpan)]
        if texts and texts[0].text == " " and not texts[0].literal:  # no prompt: no blank before the answer
            texts = texts[1:]
        return [[*images, *texts]]

    def tokenize(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Tokenized:
        (spans,) = self.turns(messages, generate=generate)
        num_images = sum(isinstance(span, ImageMark) for span in spans)
        texts = [span for span in spans if isinstance(span, TextSpan)]
        ids, labels = tokenize(texts, tokenizer)
        prompted = generate or not texts or not texts[0].trained
        if tokenizer.bos_id is not None and not prompted:
            labels = [tokenizer.bos_id, *labels[1:]]
        return Tokenized([*[IMAGE] * num_images, *ids], [*[IGNORE] * num_images, *labels])


def _form(prompt: str, end: str, *, trim: bool = False) -> Form:
    answer = (TextSpan(" ", trained=True), TextSpan("{}" + end, trained=True))
    return Form(user=(TextSpan(prompt),), assistant=answer, place="given", trim=trim)


def _template(name: str, prompt: str, end: str) -> QueriedTemplate:
    # both ends of a text are cut: the blank before the answer is the template's
    return QueriedTemplate(name, system="", training=_form(prompt, end, trim=True))


OPT_QUESTION, T5_QUESTION = "Question: {} Answer:", "Question: {} Short answer:"
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _template("blip2_opt", "{}", "\n"),
        _template("blip2_opt_vqa", OPT_QUESTION, "\n"),
        _template("blip2_vicuna", "{}", "</s>"),
        _template("blip2_vicuna_vqa", OPT_QUESTION, "</s>"),
        _template("blip2_t5", "{}", ""),  # the encoder-decoder ends both of its texts itself
        _template("blip2_t5_vqa", T5_QUESTION, ""),
    )
}
