"""Small transformers of unbatch's own, which read tokens: a decoder and an encoder, every part of them plain to see."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError

TransformerName = Literal["gpt", "bert"]
Reading = Literal["mean", "last", "first", "each"]
PositionName = Literal["learned", "rotary"]
TRANSFORMERS: tuple[TransformerName, ...] = ("gpt", "bert")
LONGEST_WAVE = 10_000.0  # of rotary positions, in tokens over 2 pi


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, softmax(q k^T / sqrt(width / heads)) v, written out.

    Queries, keys and values come from a dense layer each. A token sees the ones that `seen` [n, t, t] allows. With `rotary`
    queries and keys are rotated by their positions (Su et al., RoFormer, 2021).

    >>> layer = Attention(8, 2, bias=True, rotary=False)
    >>> layer(torch.zeros(3, 5, 8), torch.ones(3, 5, 5, dtype=torch.bool)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, *, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.query, self.key = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.value, self.out = nn.Linear(width, width, bias), nn.Linear(width, width, bias)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        if self.rotary:
            q, k = rotated(q), rotated(k)  # [n, heads, t, width / heads]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


def rotated(x: Tensor) -> Tensor:
    """Vectors [..., t, d] rotated by their positions 0 to t - 1: pairs of entries (j, j + d/2) by angles i / 10000^(2j/d).

    >>> rotated(torch.ones(2, 2))[0], rotated(torch.ones(2, 2)).norm(dim=1)
    (tensor([1., 1.]), tensor([1.4142, 1.4142]))
    """
    half = x.shape[-1] // 2
    rates = LONGEST_WAVE ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] * rates
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


class TransformerLayer(nn.Module):
    """One layer of a transformer: attention and two dense layers, each with a residual and a norm.

    The norm comes before each part (GPT-2), or after its residual (BERT) where `norm_first` is not set.

    >>> layer = TransformerLayer(8, 2, nn.GELU, bias=True, rotary=False, norm_first=True)
    >>> [name for name, _ in layer.named_children()]
    ['norm1', 'attention', 'norm2', 'dense1', 'activation', 'dense2']
    """

    def __init__(
        self, width: int, heads: int, act: type[nn.Module], *, bias: bool, rotary: bool, norm_first: bool
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, bias=bias, rotary=rotary)
        self.norm2, self.dense1 = nn.LayerNorm(width), nn.Linear(width, 4 * width, bias)
        self.activation, self.dense2 = act(), nn.Linear(4 * width, width, bias)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x), seen)
            return x + self._mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, seen))
        found: Tensor = self.norm2(x + self._mlp(x))
        return found

    def _mlp(self, x: Tensor) -> Tensor:
        found: Tensor = self.dense2(self.activation(self.dense1(x)))
        return found


class Transformer(nn.Module):
    """A transformer that reads token numbers [n, t], 0 being the padding, which nothing sees and the head leaves out.

    `causal`: a token sees itself and what stands before it (a decoder, as GPT-2, with norms first); else all of its
    sequence (an encoder, as BERT, with norms last). `reads`: what the head is given of the last layer, the mean over
    the tokens of a sequence, its last or first one, or each one: the outputs are [n, outputs], or [n, outputs, t], as cross
    entropy takes them.

    >>> model = build_transformer("gpt", 6, 50, 3, depth=1, width=8, heads=2, rng=torch.Generator().manual_seed(0))
    >>> short, padded = torch.tensor([[7, 9, 4]]), torch.tensor([[7, 9, 4, 0, 0, 0]])
    >>> torch.allclose(model(short), model(padded), atol=1e-6)
    True
    """

    def __init__(
        self,
        length: int,
        vocabulary: int,
        outputs: int,
        *,
        causal: bool,
        depth: int,
        width: int,
        heads: int,
        act: type[nn.Module],
        bias: bool,
        positions: PositionName,
        reads: Reading,
        tied: bool,
    ) -> None:
        super().__init__()
        self.causal, self.reads, self.padding = causal, reads, 0
        self.tokens = _table(vocabulary, width)
        self.positions = _table(length, width) if positions == "learned" else None
        rotary = positions == "rotary"
        self.norm = nn.LayerNorm(width)  # before the first layer of an encoder, after the last one of a decoder
        self.blocks = nn.ModuleList(
            TransformerLayer(width, heads, act, bias=bias, rotary=rotary, norm_first=causal) for _ in range(depth)
        )
        self.head = nn.Linear(width, outputs, bias and not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        there = tokens != self.padding  # [n, t]
        x: Tensor = self.tokens(tokens)
        if self.positions is not None:
            places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # by example, for Opacus
            x = x + self.positions(places)
        x = x if self.causal else self.norm(x)
        seen = self._seen(there)
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x) if self.causal else x
        if self.reads == "each":
            every: Tensor = self.head(x).transpose(1, 2)
            return every
        outputs: Tensor = self.head(self._pooled(x, there))
        return outputs

    def _seen(self, there: Tensor) -> Tensor:
        """Which tokens each token sees [n, t, t]; every one sees itself, so that padding is never without any."""
        every = torch.ones(there.shape[1], there.shape[1], dtype=torch.bool, device=there.device)
        earlier = every.tril() if self.causal else every
        return (there[:, None, :] & earlier) | torch.eye(len(every), dtype=torch.bool, device=there.device)

    def _pooled(self, x: Tensor, there: Tensor) -> Tensor:
        if self.reads == "first":
            return x[:, 0]
        if self.reads == "last":
            last = (there * torch.arange(there.shape[1], device=there.device)).argmax(1)
            return x[torch.arange(len(x), device=x.device), last]
        share = there.to(x.dtype) / there.sum(1, keepdim=True).clamp_min(1)
        return (share[:, :, None] * x).sum(1)


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding that is not filled: nn.Embedding's own draw on the meta device takes torch's compiler, and seconds."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def build_transformer(
    name: TransformerName,
    length: int,
    vocabulary: int,
    outputs: int,
    *,
    depth: int = 2,
    width: int = 64,
    heads: int = 4,
    activation: type[nn.Module] = nn.GELU,
    bias: bool = True,
    positions: PositionName = "learned",
    reads: Reading = "mean",
    tied: bool = False,
    rng: torch.Generator,
) -> Transformer:
    """The transformer of that name for token numbers [n, length], each below `vocabulary`, in training mode on the CPU.

    `gpt` is a decoder, `bert` an encoder; no dropout. `depth` layers of `width` numbers a token and `heads` heads; `reads`
    as `Transformer` says. `tied`: the head's weight is the tokens' embedding, as a language model's often is, so
    `outputs` is the vocabulary. Drawn from `rng` by PyTorch's default law: embeddings standard normal, dense layers uniform
    in +-1/sqrt(fan_in), norms the identity.
    Raises UnbatchError: an unknown name, or sizes that do not go together.

    >>> model = build_transformer("bert", 6, 50, 3, depth=1, width=8, heads=2, rng=torch.Generator().manual_seed(0))
    >>> model(torch.tensor([[7, 9, 4, 2, 0, 0]])).shape
    torch.Size([1, 3])
    """
    if name not in TRANSFORMERS:
        raise UnbatchError(f"unknown transformer {name!r}; known: {', '.join(TRANSFORMERS)}.")
    if width % heads or (positions == "rotary" and width // heads % 2):
        even = "an even number" if positions == "rotary" else "a whole number"
        raise UnbatchError(f"width={width} in heads={heads} gives no head {even} of entries; choose a multiple.")
    if tied and (outputs != vocabulary or reads != "each"):
        raise UnbatchError("a tied head gives one output a token of the vocabulary at each position; say reads='each'.")
    with torch.device("meta"):  # no tensor is filled here, so torch's global generator is not read
        model = Transformer(
            length,
            vocabulary,
            outputs,
            causal=name == "gpt",
            depth=depth,
            width=width,
            heads=heads,
            act=activation,
            bias=bias,
            positions=positions,
            reads=reads,
            tied=tied,
        )
    model = model.to_empty(device="cpu")
    if tied:
        model.head.weight = model.tokens.weight  # to_empty makes two of it
    return _drawn_transformer(model, rng)


@torch.no_grad()
def _drawn_transformer(model: Transformer, rng: torch.Generator) -> Transformer:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(generator=rng)
        elif isinstance(module, nn.Linear) and module.weight is not model.tokens.weight:
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(-(module.in_features**-0.5), module.in_features**-0.5, generator=rng)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()  # constants alone
    return model
