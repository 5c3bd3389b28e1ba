"""The Jinja text of every template against `Template.render`."""

import vlm  # noqa: F401
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from vlm.errors import UserError
from vlm.prompts import TextSpan, get_template
from vlm.prompts.jinja import IMAGE_TOKEN, chat_template
from vlm.prompts.llava import TEMPLATES
from vlm.sample import ImagePart, Message, TextPart

TEXTS = st.text(alphabet="ab\n \"'{}\\<é中", max_size=6)
PARTS = st.one_of(st.just(ImagePart()), TEXTS.map(TextPart))
USER = st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: Message("user", tuple(parts)))
ANSWER = TEXTS.map(lambda text: Message("assistant", (TextPart(text),)))
SYSTEM = TEXTS.map(lambda text: Message("system", (TextPart(text),)))


def as_json(message: Message) -> dict:
    parts = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]
    only_text = len(parts) == 1 and parts[0]["type"] == "text"
    return {"role": message.role, "content": parts[0]["text"] if only_text else parts}


IN_FRONT = [name for name, template in TEMPLATES.items() if template.training.place == "front"]


@pytest.mark.parametrize("name", IN_FRONT)
@settings(max_examples=60, deadline=None)
@given(
    system=st.none() | SYSTEM,
    early=st.lists(ANSWER, max_size=1),
    turns=st.lists(st.tuples(USER, ANSWER), min_size=1, max_size=3),
    generate=st.booleans(),
)
def test_jinja_renders_as_the_template_does(name, system, early, turns, generate):
    messages = [*([system] if system else []), *early, *(message for turn in turns for message in turn)]
    messages = messages[:-1] if generate else messages
    try:
        spans = get_template(name).render(messages, generate=generate)
    except UserError:
        return  # an empty turn
    ours = "".join(span.text if isinstance(span, TextSpan) else IMAGE_TOKEN for span in spans)
    (theirs,), _ = render_jinja_template(
        [[as_json(message) for message in messages]],
        chat_template=chat_template(get_template(name)),
        add_generation_prompt=generate,
    )
    assert theirs == ours


def test_messages_out_of_order_are_refused():
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(Exception, match="take turns"):
        render_jinja_template([two], chat_template=chat_template(get_template("v1")))


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - set(IN_FRONT)))
def test_a_template_that_jinja_cannot_say_is_refused(name):
    with pytest.raises(UserError, match=f"template '{name}': .* where it puts an image"):
        chat_template(get_template(name))
