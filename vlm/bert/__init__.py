from vlm.bert.layer import Attention, BertLayer, BertSize, FeedForward, KeysValues, Lookup, causal_mask, key_mask
from vlm.bert.text import Embeddings, LMHead, draw_bert, written_loss

__all__ = [
    "Attention",
    "BertLayer",
    "BertSize",
    "Embeddings",
    "FeedForward",
    "KeysValues",
    "LMHead",
    "Lookup",
    "causal_mask",
    "draw_bert",
    "key_mask",
    "written_loss",
]
