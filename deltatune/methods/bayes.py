"""Updates that are uncertain: trained as points, with a distribution around them afterwards."""

from .lora import LoRA


class LaplaceLoRA(LoRA, name="laplace_lora"):
    """W' = W + (alpha / r) B A, trained as LoRA; after training A, B ~ N(trained, (F + tau I)^-1).

    F is the Fisher information in Kronecker factors; `deltatune.laplace` finds it and predicts from it. A forward, and so a
    merge, is that of the mean.
    """

    paper = "2308.13111"
