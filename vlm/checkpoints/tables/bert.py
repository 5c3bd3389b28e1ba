"""BERT in three published layouts: the Q-Former's, that of BLIP's text models, and BERT's own as base weights.

Where a published layout has one tensor under several names (tied halves, heads that are the word embeddings), ours has
it once; it is written back under all of them. Buffers of position numbers are carried.
"""

from collections.abc import Sequence

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights, read_with_table
from vlm.checkpoints.tables.rules import Rule, Same, rename
from vlm.checkpoints.tables.table import Table


def qformer_rules(
    *, theirs: str = "Qformer.", ours: str = "qformer.", text: bool, head: bool = False
) -> tuple[Rule, ...]:
    """Of a Q-Former with its queries and the norm of the features it looks at, as LAVIS publishes them.

    Args:
        theirs: what stands before `bert` and `cls`.
        text: it reads text (BLIP-2's first stage, InstructBLIP).
        head: it writes text (BLIP-2's first stage).
    """
    layer, block = theirs + "bert.encoder.layer.{i}.", ours + "layers.{i}."
    rules = [
        rename("query_tokens", ours + "queries"),
        rename("ln_vision.{p}", ours + "feature_norm.{p}"),
        rename(theirs + "bert.embeddings.LayerNorm.{p}", ours + "embeddings.norm.{p}"),
        *_attention([layer + "attention."], [block + "attention."]),
        *_attention([layer + "crossattention."], [block + "cross_attention."]),
        *_mlp([layer], [block + "query_mlp."], kind="_query"),
    ]
    if text:
        rules += _mlp([layer], [block + "mlp."])
        rules += _text([theirs + "bert."], [theirs + "cls.predictions."] if head else [], ours)
    return tuple(rules)


def qformer_hub_rules(
    *, theirs: str = "qformer.", ours: str = "qformer.", text: bool = True, words: str | None = None
) -> tuple[Rule, ...]:
    """Of a Q-Former as Hugging Face has it; the norm of features is its tower's.

    Args:
        text: it reads text.
        words: what stands before the tables of words, where they stand apart, as BLIP-2's do (`embeddings.`).
    """
    layer, block = theirs + "encoder.layer.{i}.", ours + "layers.{i}."
    tables = theirs + "embeddings." if words is None else words
    norm = theirs + ("embeddings." if text and words is None else "") + "layernorm.{p}"
    rules: list[Rule] = [
        rename("query_tokens", ours + "queries"),
        rename("vision_model.post_layernorm.{p}", ours + "feature_norm.{p}"),
        rename(norm, ours + "embeddings.norm.{p}"),
        *_attention([layer + "attention."], [block + "attention."], inner="attention"),
        *_attention([layer + "crossattention."], [block + "cross_attention."], inner="attention"),
        *_mlp([layer], [block + "query_mlp."], kind="_query"),
    ]
    if text:
        rules += [
            rename(tables + "word_embeddings.weight", ours + "embeddings.words.weight"),
            rename(tables + "position_embeddings.weight", ours + "embeddings.positions.weight"),
            rename(tables + "position_ids", ours + "position_ids", optional=True),
            *_mlp([layer], [block + "mlp."]),
        ]
    return tuple(rules)


def med_rules(*, encoder: str | None, decoder: str | None, ours: str = "language.") -> tuple[Rule, ...]:
    """Of BLIP's text models, whose halves are tied but for their self-attention.

    Args:
        encoder: what stands before `embeddings` of the one that reads (`text_encoder.`); None: there is none.
        decoder: what stands before `bert` and `cls` of the one that writes (`text_decoder.`); None: there is none.
    """
    halves = [half for half in (encoder, None if decoder is None else decoder + "bert.") if half is not None]
    layers, block = [half + "encoder.layer.{i}." for half in halves], ours + "layers.{i}."
    rules = [
        Same(theirs=tuple(half + "embeddings.LayerNorm.{p}" for half in halves), ours=(ours + "embeddings.norm.{p}",)),
        *_attention([layer + "crossattention." for layer in layers], [block + "cross_attention."]),
        *_mlp(layers, [block + "mlp."]),
        *_text(halves, [] if decoder is None else [decoder + "cls.predictions."], ours),
    ]
    if encoder is not None:
        rules += _attention([layers[0] + "attention."], [block + "attention."])
    if decoder is not None:
        rules += _attention([layers[-1] + "attention."], [block + "decoder_attention."])
    return tuple(rules)


def read_bert(
    files: WeightFiles,
    *,
    attentions: Sequence[str] = ("attention",),
    mlps: Sequence[str] = ("mlp",),
    text: bool = True,
    head: bool = False,
    fresh: Sequence[str] = (),
) -> BaseWeights:
    """A BERT in a network over it, with or without the head that predicts words; a head it lacks starts new.

    Args:
        attentions, mlps, text, head: see `bert_rules`.
        fresh: patterns of what no BERT has.
    """
    keys = files.keys()
    has_head = any(key.startswith("cls.predictions.") for key in keys)
    theirs = "bert." if any(key.startswith("bert.") for key in keys) else ""
    rules = bert_rules(theirs=theirs, attentions=attentions, mlps=mlps, text=text, head=head and has_head)
    return read_with_table(
        Table(layout="BERT", rules=rules), files, fresh=(*fresh, *(("head",) if head and not has_head else ()))
    )


def read_qformer(files: WeightFiles, *, text: bool, head: bool = False) -> BaseWeights:
    """A Q-Former as LAVIS publishes it among other trained tensors, which are dropped."""
    rules = qformer_rules(ours="", text=text, head=head)
    others = ("t5_proj", "opt_proj", "llm_proj", "vision_proj", "text_proj", "itm_head", "temp")
    dropped = (rename(f"{name}.{{p}}", None) for name in others)
    table = Table(
        layout="LAVIS",
        rules=(*rules, *dropped, rename("temp", None)),
        unused=bert_unused(ours=""),
        sparse=("layers.{i}.cross_attention.{rest}",),
    )
    return read_with_table(table, files)


def bert_rules(
    *,
    theirs: str = "bert.",
    attentions: Sequence[str] = ("attention",),
    mlps: Sequence[str] = ("mlp",),
    text: bool = True,
    head: bool = False,
) -> tuple[Rule, ...]:
    """Of a BERT by itself, as base weights: what our layers have several of starts as copies of its one.

    Segments, the pooler and the head for sentence pairs are dropped: no published system computes with them. The norms
    of old files are called `gamma` and `beta`.

    Args:
        theirs: what stands before its embeddings and layers.
        attentions: our self-attentions.
        mlps: our feed-forward networks.
        text: we have words.
        head: we have the head that predicts them.
    """
    layer, block = theirs + "encoder.layer.{i}.", "layers.{i}."
    own = [block + name + "." for name in attentions], [block + name + "." for name in mlps]
    rules = [*_attention([layer + "attention."], own[0]), *_mlp([layer], own[1])]
    rules.append(rename(theirs + "embeddings.LayerNorm.{p}", "embeddings.norm.{p}"))
    if text:
        rules += _text([theirs], ["cls.predictions."] if head else [], "")
    rules = [variant for rule in rules for variant in _old_names(rule)]
    unused = (
        theirs + "embeddings.{rest}",
        theirs + "pooler.{rest}",
        "cls.predictions.{rest}",
        "cls.seq_relationship.{rest}",
    )
    return (*rules, *(rename(name, None) for name in unused))


def bert_unused(*, ours: str) -> tuple[str, ...]:
    """What the published layouts have and nothing computes with."""
    return (ours + "position_ids", ours + "decoder_position_ids")


def _text(halves: Sequence[str], heads: Sequence[str], ours: str) -> list[Rule]:
    """Words and positions of one or two halves, and the head over the words, if there is one."""
    words = [half + "embeddings.word_embeddings.weight" for half in halves]
    rules: list[Rule] = [
        Same(
            theirs=(*words, *(head + "decoder.weight" for head in heads)),
            ours=(ours + "embeddings.words.weight",),
        ),
        Same(
            theirs=tuple(half + "embeddings.position_embeddings.weight" for half in halves),
            ours=(ours + "embeddings.positions.weight",),
        ),
    ]
    for half, name in zip(halves, ("position_ids", "decoder_position_ids"), strict=False):
        rules.append(rename(half + "embeddings.position_ids", ours + name, optional=True))
    for head in heads:
        rules += [
            rename(head + "transform.dense.{p}", ours + "head.dense.{p}"),
            rename(head + "transform.LayerNorm.{p}", ours + "head.norm.{p}"),
            Same(theirs=(head + "bias", head + "decoder.bias"), ours=(ours + "head.bias",)),
        ]
    return rules


def _attention(theirs: Sequence[str], ours: Sequence[str], *, inner: str = "self") -> list[Rule]:
    names = {
        f"{inner}.query": "query",
        f"{inner}.key": "key",
        f"{inner}.value": "value",
        "output.dense": "dense",
        "output.LayerNorm": "norm",
    }
    return _same(theirs, ours, names)


def _mlp(theirs: Sequence[str], ours: Sequence[str], *, kind: str = "") -> list[Rule]:
    names = {
        f"intermediate{kind}.dense": "fc1",
        f"output{kind}.dense": "fc2",
        f"output{kind}.LayerNorm": "norm",
    }
    return _same(theirs, ours, names)


def _same(theirs: Sequence[str], ours: Sequence[str], names: dict[str, str]) -> list[Rule]:
    return [
        Same(
            theirs=tuple(f"{prefix}{published}.{{p}}" for prefix in theirs),
            ours=tuple(f"{prefix}{own}.{{p}}" for prefix in ours),
        )
        for published, own in names.items()
    ]


def _old_names(rule: Rule) -> list[Rule]:
    """A rule of norms under the names of today's files and of old ones; another rule as it is."""
    if "LayerNorm.{p}" not in rule.theirs[0]:
        return [rule]
    renamed = (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias"))
    return [
        Same(
            theirs=tuple(name.replace("{p}", published) for name in rule.theirs),
            ours=tuple(name.replace("{p}", own) for name in rule.ours),
            optional=True,
        )
        for published, own in renamed
    ]
