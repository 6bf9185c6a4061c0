"""Texts as batches: encoded once, padded to the longest of their batch, batched by length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]  # input_ids and its companions, and `labels`


class Rows(torch.utils.data.Dataset[Row]):
    """Encoded rows, in their split's order."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]


def encode(
    texts: Sequence[Sequence[str]], targets: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Rows:
    """One row per example: one text, or a pair as the tokenizer joins two."""
    columns = list(zip(*texts, strict=True))
    coded = tokenizer(*(list(c) for c in columns), truncation=True, max_length=max_length)
    return Rows([{k: v[i] for k, v in coded.items()} | {"labels": targets[i]} for i in range(len(targets))])


class Collate:
    """Pads rows to a batch of tensors, and counts the real tokens that went through."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, regression: bool) -> None:
        self.tokenizer, self.regression = tokenizer, regression
        self.n_tokens = 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad([{k: v for k, v in r.items() if k != "labels"} for r in rows], return_tensors="pt")
        batch["labels"] = torch.tensor(
            [r["labels"] for r in rows], dtype=torch.float32 if self.regression else torch.long
        )
        self.n_tokens += int(batch["attention_mask"].sum())
        return dict(batch)


def some(rows: Rows, collate: Collate, n: int, batch: int, seed: int, device: Any) -> list[dict[str, Tensor]]:
    """Batches of at most `n` of the rows, which the seed draws."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n].tolist()
    parts = (order[at : at + batch] for at in range(0, len(order), batch))
    return [{k: v.to(device) for k, v in collate([rows[i] for i in part]).items()} for part in parts]


@torch.inference_mode()
def predict(model: nn.Module, rows: Rows, collate: Collate, batch: int) -> Tensor:
    """(n, C) outputs in the rows' order, fp32 on the CPU; computed in order of length, so that little is padding."""
    was = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    parts = []
    for at in range(0, len(order), batch):
        inputs = collate([rows[i] for i in order[at : at + batch]])
        inputs.pop("labels")
        parts.append(model(**{k: v.to(device) for k, v in inputs.items()}).logits.float().cpu())
    model.train(was)
    outputs = torch.cat(parts)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return outputs[back]
