"""What WARP's reference computes on a RoBERTa: class logits, loss, gradients, and how its prompt and classes start.

    python tests/golden/make_warp.py REFERENCE

where REFERENCE is GitHub's YerevaNN/WARP at COMMIT; beside it torch and transformers alone. The reference stands on an AllenNLP
that nobody publishes: empty shells stand in for its base classes, and a tokenizer of made-up words for RoBERTa's. Its own are
the template, the order and the positions of the tokens, the injector, the model, the pooler, the classifier and the loss. The
file writes tests/golden/warp.json:

    pairs    {logits (2, C), loss, grads} of two pairs of texts with the mask between, under the template of COUNTS; grads holds
             the gradients of prompt (K, D), v (C, D) and b (C)
    singles  the same of two single texts with the mask behind
    start    {mean, std} of the normal distribution that a prompt starts from, {prompt} from words, {v, b} from CLASSES

Weights are not stored: each is `fill` of its name.
"""

import json
import sys
import tempfile
import types
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("warp.json")
COMMIT = "32b455faa7cb9c2f7cd40d45fe24a74c74be0ba9"
D, VOCAB = 16, 48
BOS, PAD, EOS, UNK, MASK = range(5)
COUNTS = {
    "front": 2,
    "before": 1,
    "behind": 3,
    "end": 2,
}  # soft tokens around the first text, the mask, the second text
CLASSES = (7, 11, 9)  # the words of the classes
WORDS = (MASK, MASK, 8, MASK, MASK, 12, MASK, MASK)  # what the soft tokens start from
LABELS = (2, 0)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SIZES |= {"max_position_embeddings": 40, "type_vocab_size": 1, "pad_token_id": PAD}
TEXTS: dict[str, list[tuple[list[int], list[int]]]] = {
    "pairs": [([5, 6, 7, 8], [9, 10]), ([11, 12], [13])],
    "singles": [([5, 6, 7, 8, 9], []), ([14, 15], [])],
}


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine.

    Vectors called weight lie around 1, as a norm's do.
    """
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    spread = (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.4).float().view(shape)
    return spread + (len(shape) == 1 and key.endswith("weight"))


def backbone() -> nn.Module:
    """RoBERTa with its masked language model's head, every tensor by its name; it has dropout, as the paper's has."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    model = RobertaForMaskedLM(RobertaConfig(**SIZES)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model


def batch(kind: str) -> dict[str, Tensor]:
    """The rows without soft tokens, padded on the right, with the class's word as the mask's label."""
    rows = [[BOS, *one, MASK, *two, EOS] for one, two in TEXTS[kind]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    words = torch.tensor([CLASSES[label] for label in LABELS])[:, None]
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.where(ids == MASK, words, -100),
    }


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


class Tokenizer:
    """A word for each number: "w5" is token 5, "Gw5" the same behind a blank."""

    vocab_size, model_max_length = VOCAB, SIZES["max_position_embeddings"] - PAD - 1
    cls_token_id, pad_token_id, unk_token_id, mask_token_id = BOS, PAD, UNK, MASK
    mask_token, all_special_ids = "<mask>", [BOS, PAD, EOS, UNK, MASK]

    def convert_ids_to_tokens(self, i: int) -> str:
        """5 -> "w5" """
        return self.mask_token if i == MASK else f"w{i}"

    def convert_tokens_to_ids(self, token: str) -> int:
        """ "w5" -> 5"""
        return MASK if token == self.mask_token else int(token.removeprefix("G").removeprefix("w"))

    def tokenize(self, text: str) -> list[str]:
        """Of the one text by which the reference finds out how a tokenizer writes blanks."""
        assert text == "zq w"
        return ["z", "q", "Gw"]


class Shell(nn.Module):
    """A base class of AllenNLP without what it does; a model keeps its labels."""

    def __init__(self, vocab: Any = None, **_: Any) -> None:
        super().__init__()
        self.vocab = vocab

    @classmethod
    def register(cls, name: str, **_: Any) -> Any:
        """A decorator that changes nothing."""
        return lambda found: found

    def forward(self, *args: Any) -> None:
        """Of a metric: nothing is counted."""


class Token:
    """A word of a text."""

    def __init__(self, text: str, text_id: int, type_id: int = 0, **_: Any) -> None:
        self.text, self.text_id, self.type_id = text, text_id, type_id


class Texts:
    """AllenNLP's tokenizer, as much of it as makes one segment."""

    single_sequence_start_tokens, single_sequence_end_tokens = [BOS], [EOS]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tokenizer = self._tokenizer = Tokenizer()

    @classmethod
    def register(cls, name: str) -> Any:
        """A decorator that changes nothing."""
        return lambda found: found

    def add_special_tokens(self, tokens: list[Token]) -> list[Token]:
        """<s> text </s>"""
        return [Token("<s>", BOS), *tokens, Token("</s>", EOS)]

    def tokens_to_indices(self, tokens: list[Token], vocabulary: Any) -> dict[str, list[int]]:
        """Numbers, mask, segments."""
        return {"token_ids": [t.text_id for t in tokens], "mask": [1] * len(tokens), "type_ids": [0] * len(tokens)}


class Labels:
    """The classes, in their order."""

    def get_vocab_size(self, namespace: str) -> int:
        """How many."""
        return len(CLASSES)

    def get_token_index(self, name: str, namespace: str) -> int:
        """The number of one."""
        return int(name)


def shells() -> None:
    """Put what stands in for AllenNLP where the reference imports it from."""
    named: dict[str, Any] = {"Token": Token}
    named |= dict.fromkeys(
        ("Tokenizer", "PretrainedTransformerTokenizer", "TokenIndexer", "PretrainedTransformerIndexer"), Texts
    )
    util = types.SimpleNamespace(
        get_text_field_mask=lambda t: None, get_token_ids_from_text_field_tensors=lambda t: None
    )
    named |= {"util": util, "get_text_field_mask": util.get_text_field_mask, "overrides": lambda function: function}
    names = (
        "overrides allennlp allennlp.common allennlp.common.lazy allennlp.data allennlp.data.tokenizers allennlp.models"
    )
    names += (
        " allennlp.models.model allennlp.modules allennlp.modules.seq2vec_encoders allennlp.nn allennlp.nn.regularizers"
    )
    names += " allennlp.modules.token_embedders allennlp.modules.token_embedders.token_embedder allennlp.nn.util"
    names += " allennlp.training allennlp.training.metrics allennlp.common.util allennlp.predictors"
    names += " allennlp.predictors.predictor allennlp.data.token_indexers"
    plain = {
        "FromParams",
        "Lazy",
        "TextFieldTensors",
        "Vocabulary",
        "IndexedTokenList",
        "InitializerApplicator",
        "Metric",
    }
    for name in names.split():
        module: Any = types.ModuleType(name)
        module.__path__ = []
        module.__getattr__ = lambda key: named.get(key) or (type(key, (), _PLAIN) if key in plain else Shell)
        sys.modules[name] = module


_PLAIN: dict[str, Any] = {
    "__class_getitem__": classmethod(lambda cls, item: cls),
    "__call__": lambda self, *args: None,
}


class Embedder(nn.Module):
    """AllenNLP's embedder of one field."""

    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self._token_embedders = {"tokens": tokens}
        self.tokens = tokens

    def get_output_dim(self) -> int:
        """D"""
        return D

    def forward(self, field: dict[str, Tensor]) -> Tensor:
        """(B, T, D)"""
        return self.tokens(**field)


def template() -> list[Any]:
    """The README's, by COUNTS; the reference gives each soft token the number of a word that no text has."""
    names = iter(range(VOCAB - 1, 0, -1))
    parts: list[Any] = []
    for key, then in zip(COUNTS, (None, "<mask>", None, ...), strict=True):
        parts += [next(names) - VOCAB for _ in range(COUNTS[key])] + ([] if then is ... else [then])
    return parts


def started(prompts: list[Any], **options: Any) -> Any:
    """The reference's classifier over its own model of the backbone, in fp64."""
    from arp.injector import ArpInjector
    from arp.models import ArpClassifier
    from arp.poolers import AtIndexPooler
    from arp.pretrained_mlm import PretrainedMLM

    torch.manual_seed(0)
    classes = options.pop("classifier_init", None)
    with tempfile.TemporaryDirectory() as folder:
        backbone().save_pretrained(folder)
        plain = backbone()
        injector = ArpInjector(
            plain.roberta.embeddings.word_embeddings, Tokenizer(), prompts, optimized_prompts=True, **options
        )
        mlm = PretrainedMLM(
            folder,
            train_parameters="only_prompts",
            arp_injector=injector,
            on_logits="pre_decoder_layer_norm",
            eval_mode=True,
        )
    return ArpClassifier(Labels(), Embedder(mlm), AtIndexPooler(D, 1), classifier_init=classes).double()


def rows(kind: str, prompts: list[Any]) -> dict[str, Tensor]:
    """The reference's rows: soft tokens in their places, then moved to the front with their positions."""
    from arp.token_indexers import PretrainedTransformerPermuteIndexer
    from arp.tokenizers import ArpTokenizer

    texts = ArpTokenizer(prompts=prompts, as_one_segment=True)
    indexer = PretrainedTransformerPermuteIndexer(optimize_prompts=prompts)
    found = []
    for one, two in TEXTS[kind]:
        given = [[Token(f"w{i}", i) for i in text] for text in (one, two)]
        found.append(indexer.tokens_to_indices(texts.add_special_tokens(*given), None))
    longest = max(len(row["token_ids"]) for row in found)
    pads = {"token_ids": PAD, "mask": 0, "type_ids": 0, "position_ids": 0}
    return {
        key: torch.tensor([row[key] + [pad] * (longest - len(row[key])) for row in found]) for key, pad in pads.items()
    }


def adapted(kind: str) -> dict[str, Any]:
    """The reference on one batch."""
    prompts = template()
    model = started(prompts)
    injector = model._text_field_embedder.tokens.embeddings_layer.word_embeddings
    trained = {
        "prompt": injector.prompt_params,
        "v": model._classification_layer.weight,
        "b": model._classification_layer.bias,
    }
    with torch.no_grad():
        for key, p in trained.items():
            p.copy_(fill(key, p.shape))
    out = model(rows(kind, prompts), label=torch.tensor(LABELS))
    out["loss"].backward()
    grads = {key: listed(p.grad) for key, p in trained.items()}
    return {"logits": listed(out["logits"]), "loss": out["loss"].item(), "grads": grads}


def starts() -> dict[str, Any]:
    """How the reference's tensors start."""
    table = started(template(), prompt_better_init=True)._text_field_embedder.tokens.embeddings_layer.word_embeddings
    mean, std = table.embedder.weight.mean().item(), table.embedder.weight.std().item()
    words = iter(WORDS)
    worded = [[p, f"w{w}"] if isinstance(p, int) and (w := next(words)) != MASK else p for p in template()]
    classes = {str(i): f"w{word}" for i, word in enumerate(CLASSES)}
    model = started(worded, prompt_better_init="<mask>", classifier_init=classes)
    prompt = model._text_field_embedder.tokens.embeddings_layer.word_embeddings.prompt_params
    layer = model._classification_layer
    return {"mean": mean, "std": std, "prompt": listed(prompt), "v": listed(layer.weight), "b": listed(layer.bias)}


if __name__ == "__main__":
    import transformers

    backbone()  # its imports look around, and must not find the shells
    sys.path.insert(0, sys.argv[1])
    shells()

    card: dict[str, Any] = {
        "command": "python tests/golden/make_warp.py REFERENCE",
        "reference": {"repository": "YerevaNN/WARP", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "start": starts(),
    }
    card |= {kind: adapted(kind) for kind in TEXTS}
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
