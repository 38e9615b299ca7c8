"""Vision transformers: what reads patches is found by running, and one picture is read off its gradients exactly."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import NotApplicable, Observation, Protocol
from unbatch.attacks import PatchSpan
from unbatch.models.vision_transformer import VisionTransformer, build_vision_transformer
from unbatch.network.patches import first_dense_layers, patch_embedding
from unbatch.testing import check_attack

EMBEDDING = ("embed.weight", "embed.bias", "positions", "class_token")


def vit(
    seed: int = 0, *, frozen: Iterable[str] = (), dtype: torch.dtype = torch.float64, **options: object
) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    options = {"patch": 4, "depth": 1, "width": 24} | options
    model = build_vision_transformer((3, 16, 16), 5, rng=rng, **options).to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return model


def pictures(n: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(100 + seed)
    return torch.rand(n, 3, 16, 16, generator=rng, dtype=dtype), torch.randint(5, (n,), generator=rng)


def decibels(found: Tensor, true: Tensor) -> float:
    return float(-10 * (found.double() - true.double()).square().mean().log10())


def off(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).norm() / found.double().norm())


def seen_of(model: nn.Module, x: Tensor, y: Tensor, **how: object) -> Observation:
    return unbatch.observe(model, F.cross_entropy, x, y, **how)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"depth": 3, "bias": False}], ids=str)
def test_one_picture_comes_back_where_positions_are_trained(options: dict[str, object], dtype: torch.dtype) -> None:
    x, y = pictures(dtype=dtype)
    found = PatchSpan()(seen_of(vit(dtype=dtype, **options), x, y))
    assert decibels(found.inputs, x) > (200 if dtype == torch.float64 else 80)
    assert torch.equal(found.labels, y)
    assert off(found.inputs, x) <= float(found.bound[0]) < (1e-9 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"positions": "fixed"}], ids=str)
def test_one_picture_comes_back_though_its_embedding_is_frozen(options: dict[str, object]) -> None:
    frozen = EMBEDDING if options.get("positions") != "fixed" else ()
    x, y = pictures()
    found = PatchSpan()(seen_of(vit(width=96, depth=2, frozen=frozen, **options), x, y))
    assert decibels(found.inputs, x) > 100
    assert off(found.inputs, x) <= float(found.bound[0]) < 1e-3


@pytest.mark.parametrize("pool", ["mean", pytest.param("class", marks=pytest.mark.slow)])
def test_the_embeddings_gradient_makes_it_exact_where_positions_are_fixed(pool: str) -> None:
    """The row space loses half the digits; what the model says is sent back at what was found gives them back."""
    x, y = pictures()
    seen = seen_of(vit(width=96, depth=2, positions="fixed", pool=pool), x, y)
    found = PatchSpan()(seen)
    assert decibels(found.inputs, x) > 210
    assert off(found.inputs, x) <= float(found.bound[0]) < 1e-8
    less = {name: u for name, u in seen.update.items() if name != "embed.weight"}
    rough = PatchSpan()(Observation(model=seen.model, loss=seen.loss, update=less, knowledge=seen.knowledge))
    assert "refined by" not in rough.trace
    assert decibels(rough.inputs, x) < decibels(found.inputs, x) - 20


@pytest.mark.slow
def test_an_altered_gradient_of_the_embedding_refines_nothing() -> None:
    """What is left is the row space's picture, whose bound is true; a large change is not explained by it at all."""
    x, y = pictures()
    seen = seen_of(vit(width=96, depth=2, positions="fixed"), x, y)
    for size in (1e-2, 1e-6):
        noise = torch.randn(seen.update["embed.weight"].shape, generator=torch.Generator().manual_seed(1)).double()
        changed = seen.update | {"embed.weight": seen.update["embed.weight"] * (1 + size * noise)}
        found = PatchSpan()(Observation(model=seen.model, loss=seen.loss, update=changed, knowledge=seen.knowledge))
        assert "refined by" not in found.trace
        assert off(found.inputs, x) <= float(found.bound[0])
        assert bool(found.bound.isfinite()) == (size < 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_bound_is_too_small(dtype: torch.dtype) -> None:
    """At random sizes, positions, poolings, frozen or not; what is not certified is not counted."""
    made = 0
    for seed in range(30):
        rng = torch.Generator().manual_seed(seed)
        width, depth = int(torch.randint(20, 100, (), generator=rng)), int(torch.randint(1, 4, (), generator=rng))
        options = {"pool": ("class", "mean")[seed % 2], "positions": ("learned", "fixed")[seed // 2 % 2]}
        model = vit(seed, width=width, depth=depth, frozen=EMBEDDING * (seed % 3 == 0), dtype=dtype, **options)
        x, y = pictures(seed=seed, dtype=dtype)
        try:
            found = PatchSpan()(seen_of(model, x, y))
        except NotApplicable:
            continue
        made += bool(found.bound.isfinite())
        assert off(found.inputs, x) <= float(found.bound[0]), (seed, found)
    assert made > 10


def test_known_noise_widens_the_bound() -> None:
    x, y = pictures()
    seen = seen_of(vit(bias=False), x, y, defences="noise:sigma=1e-9")
    found = PatchSpan()(seen)
    assert 1e-10 < off(found.inputs, x) <= float(found.bound[0]) < 0.1


def test_noise_that_leaves_no_bound_leaves_a_guess_while_it_explains_the_update() -> None:
    x, y = pictures()
    found = PatchSpan()(seen_of(vit(bias=False), x, y, defences="noise:sigma=1e-4"))
    assert "too coarse" in found.trace["open"]
    assert not bool(found.bound.isfinite().any())
    assert decibels(found.inputs, x) > 12
    with pytest.raises(NotApplicable, match="too coarse"):
        PatchSpan()(seen_of(vit(bias=False), x, y, defences="noise:sigma=1e-3"))


@pytest.mark.parametrize(("width", "free"), [(67, 0), (66, 0), (65, 1), (60, 6)])
def test_dimensions_that_a_frozen_embedding_leaves_open_are_counted(width: int, free: int) -> None:
    """width + 1 columns, of which 17 tokens and the norm's own direction say nothing, for 48 numbers and a spread."""
    x, y = pictures()
    found = PatchSpan()(seen_of(vit(width=width, depth=2, frozen=EMBEDDING), x, y))
    open_ = max(49 - (width + 1 - 17 - 1), 0)
    assert (found.trace["free dimensions of a patch"], open_) == (free, free)
    assert bool(found.bound.isfinite()) == (free == 0)


def test_what_is_known_of_an_open_patch_is_right() -> None:
    x, y = pictures()
    model = vit(width=60, depth=2, frozen=EMBEDDING)
    found = PatchSpan()(seen_of(model, x, y))
    grey = torch.full_like(x, 0.5)
    assert (found.inputs - x).norm() < 0.9 * (grey - x).norm()


def test_more_patches_than_tokens_are_wide_are_refused_with_their_number() -> None:
    x, y = pictures()
    with pytest.raises(
        NotApplicable, match=r"have rank 15: they are told apart up to 15 patches of tokens of width 16|full rank"
    ):
        PatchSpan()(seen_of(vit(width=16, depth=2), x, y))


def test_one_layer_under_a_class_token_sends_back_too_little() -> None:
    """Its patches' queries are not used, and their values are weighed by one number a head."""
    x, y = pictures()
    with pytest.raises(NotApplicable, match="have rank 7, fewer than the 17 tokens"):
        PatchSpan()(seen_of(vit(width=96, depth=1, frozen=EMBEDDING), x, y))


def small_pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four patches of 48 numbers each."""
    x, y = pictures(n, seed)
    return x[:, :, :8, :8], y


def small_vit(seed: int = 0, *, frozen: Iterable[str] = (), **options: object) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    options = {"patch": 4, "depth": 2, "width": 72} | options
    model = build_vision_transformer((3, 8, 8), 5, rng=rng, **options).double()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return model


def held_to(found: unbatch.Reconstruction, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The error of each picture, relative, and the private one that it is; with its label."""
    gaps = (found.inputs[:, None] - x[None]).flatten(2).norm(dim=2) / found.inputs.flatten(1).norm(dim=1)[:, None]
    error, which = gaps.min(1)
    assert sorted(which.tolist()) == list(range(len(x)))
    assert torch.equal(found.labels, y[which])
    return error, which


@pytest.mark.parametrize(
    ("n", "options", "told"),
    [(2, {}, True), (3, {"pool": "mean"}, False), (2, {"frozen": EMBEDDING}, False)],
    ids=str,
)
def test_batches_come_back_token_by_token(n: int, options: dict[str, object], told: bool) -> None:
    """First layers are full of two pictures already: the two dense layers after attention tell their tokens apart."""
    x, y = small_pictures(n)
    seen = seen_of(small_vit(**options), x, y)
    found = PatchSpan()(seen if told else seen.only("input_shape"))
    error, _ = held_to(found, x, y)
    assert float(error.max()) < 1e-7
    assert bool((error <= found.bound).all())
    assert float(found.bound.max()) < 1e-3


@pytest.mark.slow
def test_no_bound_of_a_batch_is_too_small() -> None:
    """At random sizes, poolings and numbers of pictures; more are certified than refused."""
    made = 0
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        width, n = (int(torch.randint(low, high, (), generator=rng)) for low, high in ((80, 120), (2, 5)))
        depth = int(torch.randint(2, 4, (), generator=rng))
        options = {"pool": ("class", "mean")[seed % 2], "width": width, "depth": depth}
        x, y = small_pictures(n, seed)
        try:
            found = PatchSpan()(seen_of(small_vit(seed, frozen=EMBEDDING * (seed % 3 == 0), **options), x, y))
        except NotApplicable:
            continue
        sure = found.bound.isfinite()
        made += bool(sure.all())
        assert bool((held_to(found, x, y)[0] <= found.bound)[sure].all()), (seed, found)
    assert made > 15


def test_a_batch_that_is_no_whole_number_of_pictures_is_refused_with_its_ranks() -> None:
    x, y = pictures(2)
    with pytest.raises(NotApplicable, match="rank 2, and 2 pictures of 17 tokens have 34"):
        PatchSpan()(seen_of(vit(), x, y))  # a class token alone reads the last layer
    with pytest.raises(NotApplicable, match=r"more than one example.*2 pictures.*leave 0 to spare of 3"):
        PatchSpan()(seen_of(vit(width=48, depth=2), x, y).only("input_shape"))
    with pytest.raises(
        NotApplicable, match=r"gives 63 equations, and patches of 48 numbers beside .* of 24 directions"
    ):
        PatchSpan()(seen_of(small_vit(width=64, positions="fixed"), *small_pictures(5)))
    twice = seen_of(small_vit(), small_pictures(1)[0].repeat(2, 1, 1, 1), torch.tensor([1, 1]))
    with pytest.raises(NotApplicable, match="some are the same"):
        PatchSpan()(twice)


def test_a_batch_rounded_to_float32_is_held_to_that() -> None:
    x, y = small_pictures(2)
    seen = seen_of(small_vit(pool="mean").float(), x.float(), y)
    found = PatchSpan()(seen)
    error, _ = held_to(found, x, y)
    assert 1e-9 < float(error.max()) < 1e-2
    assert bool((error <= found.bound).all())


def test_a_changed_update_of_a_batch_is_not_certified() -> None:
    x, y = small_pictures(2)
    seen = seen_of(small_vit(), x, y)
    for name in ("positions", "head.weight"):
        changed = {k: u + 0.01 * (k == name) * torch.ones_like(u) for k, u in seen.update.items()}
        odd = Observation(model=seen.model, loss=seen.loss, update=changed, knowledge=seen.knowledge)
        assert not bool(PatchSpan()(odd).bound.isfinite().any()), name


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(local_steps=1, learning_rate=0.1),
        Protocol(local_steps=1, learning_rate=0.1, weight_decay=0.01),
        Protocol(local_steps=5, learning_rate=0.05, momentum=0.9),
    ],
    ids=str,
)
def test_local_steps_of_sgd_hide_nothing(protocol: Protocol) -> None:
    x, y = pictures()
    found = PatchSpan()(seen_of(vit(), x, y, protocol=protocol))
    assert decibels(found.inputs, x) > 150
    assert off(found.inputs, x) <= float(found.bound[0]) < 1e-6


def test_a_first_step_of_adam_is_read_as_its_gradient_where_it_was_kept_in_float64() -> None:
    x, y = pictures()
    found = PatchSpan()(seen_of(vit(), x, y, protocol=Protocol(local_steps=1, optimiser="adam")))
    assert off(found.inputs, x) <= float(found.bound[0]) < 0.5


def test_adam_and_weight_decay_over_several_steps_are_refused() -> None:
    x, y = pictures()
    for protocol, said in (
        (Protocol(local_steps=2, optimiser="adam"), "adam rescales every entry"),
        (Protocol(local_steps=2, weight_decay=0.1), "weight decay adds"),
    ):
        with pytest.raises(NotApplicable, match=said):
            PatchSpan()(seen_of(vit(), x, y, protocol=protocol))


def test_an_altered_update_is_certified_up_to_one_factor_alone() -> None:
    x, y = pictures()
    seen = seen_of(vit(), x, y)
    clipped = Observation(
        model=seen.model,
        loss=seen.loss,
        update={name: 0.3 * u for name, u in seen.update.items()},
        knowledge=seen.knowledge,
    )
    assert bool(PatchSpan()(clipped).bound.isfinite())
    for name in ("positions", "blocks.0.attention.key.bias", "head.weight"):
        changed = {k: u + 0.01 * (k == name) * torch.ones_like(u) for k, u in seen.update.items()}
        odd = Observation(model=seen.model, loss=seen.loss, update=changed, knowledge=seen.knowledge)
        try:
            found = PatchSpan()(odd)
        except NotApplicable:
            continue
        assert not bool(found.bound.isfinite()), name


class Overlapping(nn.Module):
    """Patches that overlap, a linear embedding of an unfolded, normalised picture, positions of another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vit(width=96)
        self.reads, self.where = nn.Linear(48, 96), nn.Parameter(torch.randn(96, 25))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.reads(F.unfold((x - 0.4) / 0.2, 4, stride=3).transpose(1, 2)) + self.where.T
        seen = torch.ones(1, 25, 25, dtype=torch.bool)
        for block in self.inner.blocks:
            tokens = block(tokens, seen)
        return self.inner.head(self.inner.norm(tokens).mean(1))


def test_nothing_is_told_by_a_name() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Overlapping()
    x, y = pictures()
    front = patch_embedding(model, (3, 16, 16))
    assert (front.weight, front.positions, front.tokens) == ("reads.weight", "where", 25)
    found = PatchSpan()(seen_of(model, x, y))
    assert decibels(found.inputs, x) > 200
    assert off(found.inputs, x) <= float(found.bound[0])
    for name in ("reads.weight", "reads.bias", "where"):
        model.get_parameter(name).requires_grad_(False)
    assert decibels(PatchSpan()(seen_of(model, x, y)).inputs, x) > 100


class Bare(nn.Module):
    """APRIL's network: attention reads the embedded patches themselves, without a norm or a residual."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.inner = small_vit(pool="mean")
        self.norm = nn.LayerNorm(72) if norm else nn.Identity()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner.embed(x).flatten(2).transpose(1, 2) + self.inner.positions
        seen = torch.ones(1, 4, 4, dtype=torch.bool)
        return self.inner.head(self.inner.blocks[0].attention(self.norm(z), seen).square().mean(1))


def april(model: Bare, update: dict[str, Tensor]) -> Tensor:
    """A^T Z = W_q^T dL/dW_q + W_k^T dL/dW_k + W_v^T dL/dW_v, A = dL/d positions, solved for the tokens Z [T, width]."""
    parts = [f"inner.blocks.0.attention.{part}.weight" for part in ("query", "key", "value")]
    right = sum(model.get_parameter(part).detach().T @ update[part] for part in parts)
    return torch.linalg.lstsq(update["inner.positions"][0].T, right, driver="gelsd").solution


def test_april_is_the_system_of_positions_where_there_is_no_norm() -> None:
    """Both have dL/d positions on the left; theirs holds without a norm and a residual alone, and needs W_q, W_k, W_v."""
    x, y = small_pictures(1)
    for norm in (False, True):
        model = Bare(norm=norm)
        seen = seen_of(model, x, y)
        found = PatchSpan()(seen)
        assert "inner.positions" in found.trace["by"]
        assert off(found.inputs, x) <= float(found.bound[0]) < 1e-6
        z = model.inner.embed(found.inputs).flatten(2).transpose(1, 2) + model.inner.positions
        agrees = torch.allclose(april(model, dict(seen.update)), z[0].detach(), atol=1e-7)
        assert agrees == (not norm)


def test_networks_without_patches_are_refused_in_words() -> None:
    x, y = pictures()
    convolutional = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(512, 5)).double()
    with pytest.raises(NotApplicable, match="padding"):
        PatchSpan()(seen_of(convolutional, x, y))
    dense = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).double()
    with pytest.raises(NotApplicable, match="no dense layer or convolution reads the input in windows"):
        PatchSpan()(seen_of(dense, x, y))
    with pytest.raises(NotApplicable, match="no pictures"):
        PatchSpan()(seen_of(nn.Linear(4, 5).double(), torch.rand(1, 4).double(), y))


def test_the_first_dense_layers_are_the_ones_before_attention() -> None:
    model = vit()
    found = first_dense_layers(model, patch_embedding(model, (3, 16, 16)), (3, 16, 16))
    assert [weight for weight, _ in found.weights] == [
        f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")
    ]
    assert (found.others, found.rows.tolist()) == (1, list(range(1, 17)))


def test_the_model_is_the_same_for_the_same_generator_and_pads_no_picture() -> None:
    one, other = vit(), vit()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert isinstance(one, VisionTransformer)
    with pytest.raises(unbatch.UnbatchError, match="no whole number of patches"):
        build_vision_transformer((1, 9, 9), 3, patch=2, rng=torch.Generator())


def test_patch_span() -> None:
    check_attack(PatchSpan)


def test_layers_that_mix_the_tokens_of_a_picture_are_refused_in_words() -> None:
    """An MLP-Mixer's first dense layer reads one channel of every token."""
    torch.manual_seed(0)
    mixer = nn.Sequential(
        nn.Conv2d(3, 24, 4, 4), nn.Flatten(2), nn.Linear(4, 4), nn.GELU(), nn.Flatten(), nn.Linear(96, 5)
    )
    obs, _ = unbatch.observe(mixer, F.cross_entropy, torch.rand(2, 3, 8, 8), torch.tensor([1, 4]))
    with pytest.raises(NotApplicable, match="read vectors of 4 numbers and its tokens have 24"):
        PatchSpan()(obs)
