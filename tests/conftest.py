"""Every test runs offline, and each worker on one thread: two workers on two cores, not four threads on them."""

import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch here, and for every process that a test starts

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

WORDS = ["good", "great", "fine", "nice", "best", "bad", "poor", "awful", "sad", "worst"]
WORDS += ["a", "the", "film", "book", "meal", "was", "is", "very", "not", "so"]


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a BERT of two layers that knows twenty words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("backbone")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), vocab={w: i for i, w in enumerate(vocab)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 240 reviews whose label is in their words."""
    draw = random.Random(0)
    rows = ["review,stars"]
    for i in range(240):
        label = i % 2
        tone = WORDS[:5] if label else WORDS[5:10]
        rows.append(
            f"{' '.join([draw.choice(tone), *draw.choices(WORDS[10:], k=5), draw.choice(tone)])} {i},{'up' if label else 'down'}"
        )
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
