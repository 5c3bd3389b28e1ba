"""Noun phrases of captions: spaCy's where it is installed, or those of a few rules."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from vlm.english import INSTALL, MODEL, has_english, open_english
from vlm.errors import UserError


class Extractor(NamedTuple):
    """Finds noun phrases.

    Attributes:
        name: what a report says was used.
        phrases: the phrases of every caption, in lower case, in order, repeated as often as they stand there.
    """

    name: str
    phrases: Callable[[Iterable[str]], Iterator[list[str]]]


def get_extractor(name: str = "auto") -> Extractor:
    """An extractor by name: `spacy`, `rules`, or `auto` for spaCy if it and its model are installed, else the rules.

    Raises:
        UserError: spaCy is asked for and not there.
    """
    if name == "auto":
        name = "spacy" if has_english() else "rules"
    if name == "rules":
        return Extractor("rules", lambda captions: map(rule_phrases, captions))
    assert name == "spacy", name
    if not has_english():
        raise UserError(f"--extractor spacy: spaCy or its model is not installed; {INSTALL}, or take --extractor rules")
    import spacy

    nlp = open_english(disable=["ner", "lemmatizer"])

    def phrases(captions: Iterable[str]) -> Iterator[list[str]]:
        for document in nlp.pipe(captions, batch_size=256):
            yield [chunk.text.lower() for chunk in document.noun_chunks]

    return Extractor(f"spaCy {spacy.__version__}, {MODEL} {nlp.meta['version']}", phrases)


_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*|<\w+>|[^\w\s]")
# Words that no noun phrase holds, but for the first ones, which may only begin one
_BEGINNINGS = "a an the this that these those my your his her its our their some any each every another"
_OTHERS = """
about above across after against along among around as at away back before behind below beneath beside between
beyond by down during for from in inside into like near next of off on onto out outside over past since than through
throughout to toward towards under underneath until up upon via with within without
and but if nor or so while because when where who whom whose which what why how there here
i me you he him she it we us they them himself herself itself themselves myself someone something everyone
am is are was were be been being has have had do does did can could will would shall should may might must
not no very too also just only then now still already again ever never
get gets got go goes going went make makes made take takes took taken see sees saw seen show shows shown
sit sits sat stand stands stood lie lies lay walk walks walked run runs ran ride rides rode hold holds held look
looks looked play plays played wear wears wore come comes came say says said
"""
_BEGIN, _NEVER = frozenset(_BEGINNINGS.split()), frozenset(_OTHERS.split())


def rule_phrases(caption: str) -> list[str]:
    """Noun phrases without a grammar: the words between those that cannot stand in one.

    A phrase ends at punctuation, at a preposition, conjunction, pronoun, auxiliary or one of the commonest verbs of
    captions, before an article or possessive (which stays with what follows it), and before a word in -ing that is not
    its first. A word in -ing or -ly alone is no phrase, nor is an article.

    "A man riding a brown horse in the park." -> a man, a brown horse, the park
    """
    found: list[list[str]] = [[]]
    for match in _WORD.finditer(caption.lower()):
        word = match[0]
        if word in _NEVER or not word[0].isalnum():
            found.append([])
        elif word in _BEGIN:
            found.append([word])
        elif word.endswith("ing") and len(word) > 4 and any(w not in _BEGIN for w in found[-1]):
            found += [[], []]
        else:
            found[-1].append(word)
    return [" ".join(words) for words in found if any(map(_is_noun_like, words))]


def _is_noun_like(word: str) -> bool:
    return word not in _BEGIN and not (word.endswith(("ing", "ly")) and len(word) > 4)
