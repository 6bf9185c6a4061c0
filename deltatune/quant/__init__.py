"""Quantised bases: made in place, made while they load, kept in a file of their own."""

from .base import dequantise as dequantise
from .base import is_quantised as is_quantised
from .base import load_base as load_base
from .base import n_weights as n_weights
from .base import quantise as quantise
from .base import save_base as save_base
