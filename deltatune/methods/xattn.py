"""The cross-attentions of an encoder-decoder."""

from ..core.method import Method


class XAttn(Method, name="xattn"):
    """theta' = theta, the cross-attentions' projections alone trained in place; with new words `where="cross,embed"`.

    The paper's code takes in the norm beside each too: name it, `where=["cross", "encoder_attn_layer_norm"]`.
    """

    paper = "2104.08771"
    category = "partial"
    where = "cross"
    in_place = True
    lr = (1e-5, 1e-3)
