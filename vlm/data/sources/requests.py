"""How a question is put: published requests, and the places in them."""

import re

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def asked(question: str, request: str) -> str:
    """The question as a request puts it: in the place of its `{}`, else on a line before it."""
    if "{}" in request:
        return request.replace("{}", question, 1)
    return f"{question}\n{request}" if request else question


def filled(form: str, **fields: str) -> str:
    """A form with each `{name}` that is one of the fields replaced."""
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda match: fields[match[1]], form)
