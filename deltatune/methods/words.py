"""Learned words among those of the input, and learned words for the classes behind a masked language model."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.compose import Stack, Tree, preset
from ..core.inits import kaiming, uniform
from ..core.method import Method, param


def first_words(shape, *, base, delta, **_):
    """The vectors of `words`, one for all or one for each; without them N(mean, std^2) of the whole token table."""
    table, words = base.vocabulary, delta.words
    if not words:
        return table.mean() + table.std() * torch.randn(shape)
    if len(words) not in (1, shape[0]):
        raise ValueError(f"{len(words)} words to start {shape[0]} soft tokens from; give one for all or one for each")
    return table[checked(words, table.shape[0])].expand(shape).clone()


def checked(words, n):
    """Token ids as a list. Raises ValueError where the table of `n` has none of that number."""
    if wrong := [i for i in words if not 0 <= i < n]:
        raise ValueError(f"token {wrong[0]} is not one of the table's {n}")
    return list(words)


class InsertedPrompt(Method, name="inserted_prompt"):
    """X' = X with learned tokens among its words: behind a row's first token, around its first `at`, in front of its last.

    Without `at` the first token, which most task heads read, stands in its place. What is above sees the row's own tokens
    alone. In a decoder it stands in the prompt, and runs on whole rows, without a cache.
    """

    paper = "2101.00121"
    category = "additive"
    where = "input"
    helper = True
    reads_call = True
    lr = (3e-4, 5e-2)
    exceptions = {"identity": "soft tokens take a share of the attention from the start"}
    front: int = 5  # how many soft tokens stand behind the row's first token
    before: int = 5  # in front of `at`
    behind: int = 5  # behind `at`
    end: int = 5  # in front of the row's last token
    at: int | None = None  # the number of a token: the mask's, or a separator's
    words: tuple[int, ...] = ()  # tokens whose vectors they start from: one for all, or one for each
    prompt: Tensor = param("k d_in", first_words)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        for key in ("front", "before", "behind", "end"):
            if getattr(config, key) < 0:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least 0")
        return config

    @classmethod
    def fits(cls, config, site):
        return site.stack != "decoder"

    def build(self, base, dtype):
        if not sum(self.counts):
            raise ValueError("front = before = behind = end = 0: there is no soft token to train")
        if not isinstance(getattr(base.module, "get_input_embeddings", lambda: None)(), nn.Embedding):
            raise ValueError("its input is not made of words, among which soft tokens could stand")
        super().build(base, dtype)

    @property
    def counts(self):
        return self.front, self.before, self.behind, self.end

    def dims(self, base):
        return super().dims(base) | {"k": sum(self.counts)}

    def tokens(self, batch):
        return self.prompt[None]

    def gaps(self, batch):
        """(B, k), in front of which of its row's tokens each stands."""
        ids, mask = self.call.ids(self.site.stack), self.call.mask(self.site.stack)
        real = (
            torch.ones(batch.shape[:2], dtype=torch.long, device=batch.device) if mask is None else (mask != 0).long()
        )
        if self.call.n_past or real.shape != batch.shape[:2]:
            raise ValueError(
                f"{self.where_am_i}: {self.name} stands among the words of whole rows under a (B, T) mask, and this call has a "
                f"part of them or another mask; generate with use_cache=False"
            )
        if self.site.is_causal:  # the last of the prompt, which does not move while a row grows
            real = self.call.given(batch.shape[1], self.site, batch.device).expand(real.shape).long()
        first, last = real.argmax(1), real.shape[1] - 1 - real.flip(1).argmax(1)
        at = first if self.at is None else self.place(ids, real)
        gaps = torch.stack([first + 1, at, at + 1, last], 1)
        return gaps[:, [i for i, n in enumerate(self.counts) for _ in range(n)]]

    def place(self, ids, real):
        """(B), where each row has its first `at`. Raises ValueError where one has none."""
        if ids is None:
            raise ValueError(f"{self.where_am_i}: {self.name} looks for token {self.at}, and the call has no input_ids")
        hit = (ids == self.at).long() * real
        if not torch.compiler.is_compiling() and (none := hit.sum(1) == 0).any():
            raise ValueError(
                f"{self.where_am_i}: row {int(none.long().argmax())} has no token {self.at} to stand around"
            )
        return hit.argmax(1)

    @property
    def where_am_i(self):
        return self.site.name or "the model"


FLOOR = 200.0  # below the likeliest class: exp(-200) is no share of a softmax in any dtype, and no loss is infinite


def class_words(shape, *, base, delta, **_):
    """The output layer's rows of the classes' words, or a linear layer's start."""
    return kaiming(shape) if delta.start == "random" else base.weight[checked(delta.classes, base.weight.shape[0])]


def class_biases(shape, *, base, delta, **_):
    """The output layer's biases of the classes' words, or a linear layer's start."""
    if delta.start == "random":
        return uniform("d_in")(shape, delta=delta)
    return torch.zeros(shape) if base.bias is None else base.bias[list(delta.classes)]


class Verbaliser(Method, name="verbaliser"):
    """l_y = v_y . g(h) + b_y at the word of class y, g(h) what the output layer reads; no other word is possible.

    So the masked language model's own loss at the mask (labels are -100 elsewhere, and there the class's word) is the
    cross entropy of softmax(l) over the classes alone.
    """

    paper = "2101.00121"
    category = "additive"
    where = "lm_head"
    helper = True
    kinds = frozenset({"linear"})
    lr = (1e-4, 1e-2)
    exceptions = {
        "identity": "words that are no class leave the output from the start",
        "learns": "the suite measures a distance to random numbers, which the words that are no class are far from",
    }
    classes: tuple[int, ...] = (0, 1)  # the tokens that stand for the classes
    start: Literal["words", "random"] = "words"  # from the tokens' own rows, or as a linear layer
    v: Tensor = param("n_classes d_in", class_words)
    b: Tensor = param("n_classes", class_biases)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if len(config.classes) < 2 or len(set(config.classes)) < len(config.classes):
            raise ValueError(f"{cls.name}: classes must name two tokens or more, each once, not {config.classes}")
        return config

    @classmethod
    def fits(cls, config, site):
        return site.role == "lm_head" and site.d_out > site.d_in  # the decoder, and not the transform in front of it

    def build(self, base, dtype):
        checked(self.classes, self.site.d_out)
        super().build(base, dtype)

    def dims(self, base):
        return super().dims(base) | {"n_classes": len(self.classes)}

    def post(self, y, x):
        found = F.linear(x, self.v, self.b)
        floor = found.detach().amax(-1, keepdim=True) - FLOOR
        return floor.expand_as(y).index_copy(-1, torch.tensor(self.classes, device=y.device), found)


@preset(
    "warp",
    paper="2101.00121",
    category="additive",
    lr=(3e-4, 5e-2),
    exceptions={"identity": "soft tokens take a share of the attention from the start"},
)
def warp(
    front: int = 5,  # how many soft tokens stand behind the row's first token
    before: int = 5,  # in front of `at`
    behind: int = 5,  # behind `at`
    end: int = 5,  # in front of the row's last token
    at: int | None = None,  # the number of the mask token; without it they stand around the row's first token
    words: tuple[int, ...] = (),  # tokens whose vectors they start from: one for all, or one for each
    classes: tuple[int, ...] = (),  # the tokens that stand for the classes; without them the task head is trained
    start: Literal["words", "random"] = "words",  # the classes' vectors, from the tokens' own or as a linear layer
) -> Tree:
    """Learned words around the text and its mask, and p(y|x) = softmax(v_y . g(h_mask) + b_y) over learned classes.

    The paper trains with the frozen model's dropout off: set the backbone's to 0 before.
    """
    prompt = InsertedPrompt(front=front, before=before, behind=behind, end=end, at=at, words=words)
    return Stack(prompt, Verbaliser(classes=classes, start=start)) if classes else prompt
