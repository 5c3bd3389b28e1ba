"""A template of ours as the Jinja text that the Hugging Face tools keep beside a tokenizer."""

import json
import re

from vlm.errors import UserError
from vlm.prompts.template import Form, Template

IMAGE_TOKEN = "<image>"

_JOINED = """
{%- macro joined(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro num_images(content) -%}
  {{- 0 if content is string else content | selectattr('type', 'equalto', 'image') | list | length -}}
{%- endmacro -%}
"""
_CONTENT = """
{%- macro TITLE(content) -%}
  {%- set text = joined(content) -%}
  {%- set count = num_images(content) | int -%}
  {%- if count == 0 -%}
    {{- text -}}
  {%- elif count == 1 -%}
    {{- IMAGE -}}
    {%- if text.strip() -%}{{- "\\n" + text.strip() -}}{%- endif -%}
  {%- else -%}
    {%- for part in content -%}
      {%- if loop.previtem is defined and not (part.type == 'text' and loop.previtem.type == 'text')
        and not (loop.previtem.type == 'text' and not loop.previtem.text[-1:].strip())
        and not (part.type == 'text' and not part.text[:1].strip()) -%}
        {{- "\\n" -}}
      {%- endif -%}
      {{- part.text if part.type == 'text' else IMAGE -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
_PICTURES = """
{%- macro TITLE(content) -%}
  {%- for part in range(num_images(content) | int) -%}{{- IMAGE -}}{%- endfor -%}
{%- endmacro -%}
"""
_CONVERSATION = """
{%- set state = namespace(system=SYSTEM, turn=0) -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {%- if not loop.first -%}{{- raise_exception('a system message may only come first') -}}{%- endif -%}
    {%- set state.system = joined(message.content) -%}
  {%- elif message.role == 'assistant' and state.turn == 0 -%}
    {%- if KEEPS_GREETING -%}
      {{- (OPENING if state.system else BARE) + ANSWER_BEFORE + (joined(message.content) TRIM) + ANSWER_AFTER -}}
      {%- set state.turn = 2 -%}
    {%- endif -%}
  {%- elif message.role != ('assistant' if state.turn % 2 else 'user') -%}
    {{- raise_exception('user and assistant have to take turns') -}}
  {%- else -%}
    {%- set opening = (OPENING if state.system else BARE) if state.turn == 0 else '' -%}
    {%- if message.role == 'user' -%}
      {{- BETWEEN if state.turn else OPENING_BEFORE -}}
      {%- set text = content(message.content) TRIM -%}
      {{- USER_BEFORE + OPENING_INSIDE + text + USER_AFTER if SPOKEN else OPENING_INSIDE + text -}}
    {%- else -%}
      {{- ANSWER_BEFORE + (joined(message.content) TRIM) + ANSWER_AFTER -}}
    {%- endif -%}
    {%- set state.turn = state.turn + 1 -%}
  {%- endif -%}
{%- endfor -%}
{{- END -}}
"""


def chat_template(template: Template) -> str:
    """Jinja text that renders a conversation as `template.render` does, `<image>` at each image mark.

    With `add_generation_prompt` it is `template.render(messages, generate=True)` of a conversation that ends with the
    user, else that of training. Messages are in the form of `vlm.sample`.
    """
    training = _conversation(template, template.training, generate=False)
    generation = _conversation(template, template.generation or template.training, generate=True)
    blocks = [_JOINED, "{%- if add_generation_prompt -%}", generation, "{%- else -%}", training, "{%- endif -%}"]
    return "\n".join(block.strip() for block in blocks) + "\n"


def _conversation(template: Template, form: Form, *, generate: bool) -> str:
    if form.place != "front" or form.tight or not (isinstance(form.opening, str) and isinstance(form.bare, str)):
        raise UserError(
            f"template {template.name!r}: a chat template of the Hugging Face tools cannot say where it puts an image; "
            "export a model that was trained with another template"
        )
    user_before, _, user_after = "".join(span.text for span in form.user).partition("{}")
    answer_before, _, answer_after = "".join(span.text for span in form.assistant).partition("{}")
    cue = next((i for i, span in enumerate(form.assistant) if span.trained), len(form.assistant))
    end = form.assistant[:cue] if generate else form.closing
    opening = " + state.system + ".join(_quoted(text) for text in form.opening.split("{}"))
    texts = {
        "TITLE": "content",
        "IMAGE": _quoted(form.image.replace("{}", IMAGE_TOKEN)),
        "SYSTEM": _quoted(template.system),
        "OPENING_BEFORE": "''" if form.opening_in_turn else "opening",
        "OPENING_INSIDE": "opening" if form.opening_in_turn else "''",
        "OPENING": f"({opening})",
        "BARE": _quoted(form.bare),
        "BETWEEN": _quoted(form.between),
        "USER_BEFORE": _quoted(user_before),
        "USER_AFTER": _quoted(user_after),
        "KEEPS_GREETING": "true" if template.keeps_greeting else "false",
        "SPOKEN": _spoken(template, generate=generate),
        "ANSWER_BEFORE": _quoted(answer_before),
        "ANSWER_AFTER": _quoted(answer_after),
        "TRIM": "| trim" if form.trim else "",
        "END": _quoted("".join(span.text for span in end)),
    }
    text = (_CONTENT if template.instructed or generate else _PICTURES) + _CONVERSATION
    parts = re.split(rf"\b({'|'.join(texts)})\b", text)
    return "".join(texts.get(part, part) for part in parts).strip()


def _spoken(template: Template, *, generate: bool) -> str:
    """Whether the user's turn is written in its form; an image alone stands bare where training leaves text out."""
    if template.instructed:
        return "true"
    return "joined(message.content).strip()" if generate else "false"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Jinja does not know surrogate pairs
