"""LLaVA, LLaVA-1.5 and LLaVA-NeXT: official <-> ours <-> Hugging Face.

Three Hugging Face layouts exist: files on the hub, files that transformers 5 saves (the tower without its
`vision_model.` level), and the names of a model in memory. The official layout may or may not hold the tower.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vlm.checkpoints.tables.clip import clip_rules, clip_unused
from vlm.checkpoints.tables.mini_gemini import own_rules
from vlm.checkpoints.tables.mixtral import expert_rules
from vlm.checkpoints.tables.rules import Rows, Rule, rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

Connector = str
"""`linear`, `mlp_downsample`, or `mlp2x_gelu` with as many layers as its number says."""

_PROJECTOR = {
    "linear": {"": "connector."},
    "mlp_downsample": {"1.": "connector.1.", "2.": "connector.2.", "4.": "connector.4."},
}
_HF_PROJECTOR = {"linear_1.": "connector.0.", "linear_2.": "connector.2."}


@dataclass(frozen=True)
class Layout:
    """Prefixes of one published layout.

    Attributes:
        name: `official`, `hf`, `hf_saved` or `hf_memory`.
        language: before `embed_tokens`, `layers` and `norm`.
        head: of the vocabulary projection.
        vision: before the tower's `embeddings` and `encoder`.
        connector: before the projector's own names.
        newline: LLaVA-NeXT's token at the end of a row of tiles.
    """

    name: str
    language: str
    head: str
    vision: str
    connector: str
    newline: str

    @property
    def is_hf(self) -> bool:
        return self.name.startswith("hf")


OFFICIAL = Layout(
    "official",
    "model.",
    "lm_head.",
    "model.vision_tower.vision_tower.vision_model.",
    "model.mm_projector.",
    "model.image_newline",
)
HF = Layout(
    "hf",
    "language_model.model.",
    "language_model.lm_head.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
    "image_newline",
)
HF_SAVED = replace(HF, name="hf_saved", vision="vision_tower.")
HF_MEMORY = Layout(
    "hf_memory",
    "model.language_model.",
    "lm_head.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "model.image_newline",
)
LAYOUTS = {layout.name: layout for layout in (OFFICIAL, HF, HF_SAVED, HF_MEMORY)}
LAYOUTS["folders"] = replace(OFFICIAL, name="folders")  # VILA-1.5, read and written under official names


def detect_layout(keys: Iterable[str]) -> Layout:
    """The layout a checkpoint's names belong to.

    Raises:
        UserError: none of the known ones.
    """
    keys = list(keys)
    for layout in (OFFICIAL, HF, HF_MEMORY):
        if any(key.startswith(layout.connector) for key in keys):
            if layout is HF and not any(key.startswith(HF.vision) for key in keys):
                return HF_SAVED
            return layout
    raise UserError(f"no projector of LLaVA among the tensors ({', '.join(keys[:3])}, ...); is it another system?")


def detect_connector(keys: Iterable[str]) -> Connector:
    """Which projector an official or Hugging Face checkpoint holds."""
    keys = set(keys)
    if f"{OFFICIAL.connector}weight" in keys:
        return "linear"
    if f"{OFFICIAL.connector}1.weight" in keys:  # a norm behind the joined features
        return "mlp_downsample"
    depth = next((depth for depth in itertools.count(1) if f"{OFFICIAL.connector}{2 * depth}.weight" not in keys), 0)
    return f"mlp{depth if depth > 1 else 2}x_gelu"


def mlp_depth(connector: Connector) -> int:
    """Layers of an `mlp<n>x_gelu`; 0 of another projector."""
    found = re.fullmatch(r"mlp(\d+)x_gelu", connector)
    return int(found[1]) if found else 0


def check_connector(layout: Layout, connector: Connector) -> None:
    """Raises a `UserError` where a layout cannot hold a connector."""
    if layout.is_hf and connector == "mlp_downsample":
        raise UserError(
            "the Hugging Face class LlavaForConditionalGeneration makes a token of every feature: a model with the "
            "downsampling projector of VILA-1.5 cannot be written for it; use --to official"
        )
    if layout.is_hf and connector == "linear":
        raise UserError(
            "the Hugging Face class LlavaForConditionalGeneration always has a two-layer projector: a model with the "
            "linear projector of LLaVA cannot be written for it; use --to official"
        )
    if layout.is_hf and mlp_depth(connector) > 2:
        raise UserError(
            "the Hugging Face class LlavaForConditionalGeneration always has a two-layer projector: a model with "
            f"{connector} cannot be written for it; use --to official"
        )


def llava_table(
    layout: Layout,
    *,
    connector: Connector,
    num_blocks: int,
    vocab_rows: int,
    tied: bool = False,
    newline: bool = False,
    mining: bool = False,
    num_experts: int = 0,
) -> Table:
    """Every name of a LLaVA checkpoint.

    Args:
        layout: one of `LAYOUTS`.
        connector: `linear` (LLaVA), `mlp2x_gelu` (LLaVA-1.5; another number of layers too) or `mlp_downsample`
            (VILA-1.5).
        num_blocks: tower blocks the system computes: 23 of 24 for layer -2.
        vocab_rows: our vocabulary. Hugging Face adds `<image>` and `<pad>` and rounds up to a multiple of 64.
        tied: the vocabulary projection is the embedding table and has no tensor of its own.
        newline: there is one (LLaVA-NeXT).
        mining: there is a second tower that features mine (Mini-Gemini); official layout alone.
        num_experts: of Mixtral's layers.

    Raises:
        UserError: the layout cannot hold this connector.
    """
    return Table(
        layout=f"LLaVA {layout.name}",
        rules=(
            *_projector_rules(layout, connector),
            *clip_rules(theirs=layout.vision),
            *(own_rules() if mining else ()),
            *(_expert_rules(layout, num_experts) if num_experts else ()),
            *_language_rules(layout, vocab_rows=vocab_rows, tied=tied),
            *((rename(layout.newline, "newline.weight"),) if newline else ()),
        ),
        unused=(
            *clip_unused(num_blocks=num_blocks),
            f"language.{{rest}}[{vocab_rows}:]",
            "language.model.layers.{i}.self_attn.rotary_emb.inv_freq",  # a buffer in files of older transformers
        ),
        may_lack=() if layout.is_hf else ("vision", "vision_high"),
    )


def _projector_rules(layout: Layout, connector: Connector) -> tuple[Rule, ...]:
    check_connector(layout, connector)
    layers = {f"{2 * layer}.": f"connector.{2 * layer}." for layer in range(mlp_depth(connector))}
    names = _HF_PROJECTOR if layout.is_hf else _PROJECTOR.get(connector, layers)
    return tuple(
        rename(f"{layout.connector}{theirs}{kind}", f"{ours}{kind}")
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    )


def _expert_rules(layout: Layout, num_experts: int) -> tuple[Rule, ...]:
    return expert_rules(theirs=layout.language, ours="language.model.", num_experts=num_experts)


def _language_rules(layout: Layout, *, vocab_rows: int, tied: bool) -> tuple[Rule, ...]:
    tables = [
        (layout.language + "embed_tokens.weight", "language.model.embed_tokens.weight", False),
        (layout.head + "weight", "language.lm_head.weight", tied),
    ]
    padded = -(-(vocab_rows + 2) // 64) * 64
    return (
        *(
            Rows(
                theirs=(theirs,),
                ours=(ours, f"{ours}[{vocab_rows}:]"),
                rows=vocab_rows,
                published_rows=padded,
                optional=optional,
            )
            if layout.is_hf
            else rename(theirs, ours, optional=optional)
            for theirs, ours, optional in tables
        ),
        rename(layout.language + "layers.{i}.{rest}", "language.model.layers.{i}.{rest}"),
        rename(layout.language + "norm.weight", "language.model.norm.weight"),
    )
