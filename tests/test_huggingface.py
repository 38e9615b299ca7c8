"""Models of transformers and PEFT: one input, the Trainer's own loss, and the same gradient."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unbatch
from unbatch.adapters.huggingface import TrainerLoss, labels_of, of_hugging_face, one_input
from unbatch.command.settings import Asked, target_of
from unbatch.network.precision import in_double, outputs_of
from unbatch.network.tracing import trace

transformers = pytest.importorskip("transformers")

PAD, WORDS, LENGTH, CLASSES = 0, 30, 6, 3
TOKENS = {"vocab_size": WORDS, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "num_labels": CLASSES}
SIZE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def gpt2(**options: object) -> object:
    return transformers.GPT2Config(n_positions=16, n_embd=8, n_layer=2, n_head=2, **(TOKENS | options))


def bert(**options: object) -> object:
    return transformers.BertConfig(max_position_embeddings=16, **SIZE, **(TOKENS | options))


def llama(**options: object) -> object:
    return transformers.LlamaConfig(max_position_embeddings=16, num_key_value_heads=1, **SIZE, **(TOKENS | options))


def vit(**options: object) -> object:
    return transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **(SIZE | {"num_labels": 3} | options))


def made(auto: str, config: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"AutoModelFor{auto}").from_config(config).eval()


def tokens(side: str = "right") -> Tensor:
    """Three rows, of which two are shorter: padded at that side."""
    rows = torch.randint(3, WORDS, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    for row, missing in ((0, 2), (1, 3)):
        rows[row, slice(-missing, None) if side == "right" else slice(0, missing)] = PAD
    return rows


MODELS = {
    f"{kind.__name__}-{auto}": (auto, kind)
    for kind, autos in {
        gpt2: ("CausalLM", "SequenceClassification", "TokenClassification"),
        bert: ("MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification"),
        llama: ("CausalLM", "SequenceClassification", "TokenClassification"),
        vit: ("ImageClassification",),
    }.items()
    for auto in autos
}


def batch(auto: str, side: str = "right") -> tuple[Tensor, Tensor]:
    """Inputs and labels, some of which are ignored."""
    rng = torch.Generator().manual_seed(2)
    if auto == "ImageClassification":
        return torch.rand(3, 1, 8, 8, generator=rng), torch.tensor([0, 2, 2])
    x = tokens(side)
    if auto == "SequenceClassification":
        return x, torch.tensor([0, 2, 2])
    labels = torch.randint(CLASSES, x.shape, generator=rng) if auto == "TokenClassification" else x.clone()
    labels[x == PAD] = -100
    labels[2, 3] = -100  # one that is ignored though it is no padding
    return x, labels


def trainer_gradient(model: nn.Module, x: Tensor, y: Tensor, **more: object) -> dict[str, Tensor]:
    """What the Trainer computes: the model's own loss, with the tokenizer's mask."""
    model = copy.deepcopy(model)
    given = {"pixel_values": x} if x.ndim == 4 else {"input_ids": x, "attention_mask": (x != PAD).long()}
    model(**given, labels=y, **more).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(update: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    assert list(update) == list(own)
    for name, gradient in own.items():
        expected = torch.zeros_like(update[name]) if gradient is None else gradient
        torch.testing.assert_close(update[name], expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_the_update_is_the_trainers_gradient(name: str, side: str) -> None:
    auto, config = MODELS[name]
    own = made(auto, config())
    x, y = batch(auto, side)
    model, loss = one_input(own)
    seen, _ = unbatch.observe(model, loss, x, y, protocol=unbatch.Protocol(mode="eval"))
    assert_same(seen.update, trainer_gradient(own, x, y))


def test_num_items_in_batch_divides_the_sum() -> None:
    own = made("CausalLM", gpt2())
    x, y = batch("CausalLM")
    model, loss = one_input(own, num_items_in_batch=100)
    seen, _ = unbatch.observe(model, loss, x, y, protocol=unbatch.Protocol(mode="eval"))
    assert_same(seen.update, trainer_gradient(own, x, y, num_items_in_batch=100))
    counted = int((y[:, 1:] != -100).sum())
    torch.testing.assert_close(
        TrainerLoss("next token", items=counted)(model(x), y), TrainerLoss("next token")(model(x), y)
    )


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
        ({"num_labels": 3, "problem_type": "regression"}, torch.tensor([[0.5, 1.0, 2.0]] * 3)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.tensor([[0.0, 1.0, 1.0]] * 3)),
    ],
    ids=["one number", "several numbers", "several labels"],
)
def test_other_problems_of_a_whole_input(options: dict[str, object], labels: Tensor) -> None:
    for auto, config in (("SequenceClassification", bert), ("ImageClassification", vit)):
        own = made(auto, config(**options))
        x, _ = batch(auto)
        model, loss = one_input(own)
        seen, _ = unbatch.observe(model, loss, x, labels, protocol=unbatch.Protocol(mode="eval"))
        assert_same(seen.update, trainer_gradient(own, x, labels))


def test_tied_weights_are_sent_once_and_the_model_is_not_changed() -> None:
    own = made("CausalLM", gpt2())
    forward, config = type(own).forward, own.config.to_dict()
    model, _ = one_input(own)
    assert type(own).forward is forward
    assert own.config.to_dict() == config
    assert of_hugging_face(own)
    assert not of_hugging_face(model)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in own.named_parameters()]
    assert "lm_head.weight" not in names
    assert model.lm_head.weight is own.transformer.wte.weight
    own.tie_weights()


def test_labels_of_a_language_model_leave_padding_out() -> None:
    model, _ = one_input(made("CausalLM", gpt2()))
    x = tokens("right")
    assert torch.equal(labels_of(model, x) == -100, x == PAD)
    closing = torch.tensor([[1, 2, 5, 1, 1]])
    begins, _ = one_input(made("CausalLM", gpt2(pad_token_id=1)))  # as GPT-2's users set it: bos, eos and pad are one
    assert labels_of(begins, closing).tolist() == [[1, 2, 5, -100, -100]]


@pytest.mark.parametrize("name", ["gpt2-CausalLM", "llama-CausalLM", "bert-MaskedLM", "vit-ImageClassification"])
def test_what_attacks_do_to_a_network_works(name: str) -> None:
    """Forward derivatives, derivatives of the gradient, and float64."""
    auto, config = MODELS[name]
    model, loss = one_input(made(auto, config()))
    x, y = batch(auto)
    double = in_double(model)
    x = x.double() if x.is_floating_point() else x
    parameters = dict(double.named_parameters())
    outputs = outputs_of(double, x)
    assert outputs.dtype == torch.float64
    gradient = torch.autograd.grad(loss(outputs, y), list(parameters.values()), create_graph=True, allow_unused=True)
    square = sum(g.square().sum() for g in gradient if g is not None)
    again = torch.autograd.grad(square, list(parameters.values()), allow_unused=True)
    along = {key: p.detach() for key, p in parameters.items()}
    _, forward = torch.func.jvp(lambda state: outputs_of(double, x, state), (along,), (along,))
    held = [p.requires_grad_() for p in (p.detach().clone() for p in along.values())]
    step = 1e-6
    moved = {key: p * (1 + step) for key, p in along.items()}
    less = {key: p * (1 - step) for key, p in along.items()}
    difference = (outputs_of(double, x, moved) - outputs_of(double, x, less)) / (2 * step)
    torch.testing.assert_close(forward, difference, rtol=1e-6, atol=1e-8)
    assert any(bool(g.any()) for g in again if g is not None)
    assert len(held) == len(along)


@pytest.mark.parametrize("kernel", ["flex_attention", "eager"])
def test_attention_that_cannot_be_differentiated_twice_runs_by_another_kernel(kernel: str) -> None:
    own = made("CausalLM", llama())
    x, y = batch("CausalLM")
    expected = trainer_gradient(own, x, y)
    own.set_attn_implementation(kernel)
    for module in own.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    model, loss = one_input(own)
    assert own.config._attn_implementation == kernel
    assert any(getattr(module, "gradient_checkpointing", False) for module in own.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    seen, _ = unbatch.observe(model, loss, x, y, protocol=unbatch.Protocol(mode="eval"))
    assert_same(seen.update, expected)
    gradient = torch.autograd.grad(
        loss(outputs_of(model, x, twice=True), y), model.model.norm.weight, create_graph=True
    )
    assert torch.autograd.grad(gradient[0].square().sum(), model.model.norm.weight)[0].any()


def test_a_lora_adapter_alone_is_sent() -> None:
    peft = pytest.importorskip("peft")
    for auto, config, targets, task in (
        ("CausalLM", gpt2, ["c_attn"], "CAUSAL_LM"),
        ("SequenceClassification", bert, ["query", "value"], "SEQ_CLS"),
        ("ImageClassification", vit, ["q_proj", "v_proj"], None),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D
            own = peft.get_peft_model(
                made(auto, config()), peft.LoraConfig(r=2, target_modules=targets, task_type=task, lora_dropout=0.0)
            ).eval()
        x, y = batch(auto)
        model, loss = one_input(own)
        seen, _ = unbatch.observe(model, loss, x, y, protocol=unbatch.Protocol(mode="eval"))
        assert_same(seen.update, trainer_gradient(own, x, y))
        adapters = [name for name in seen.update if "lora_" in name]
        assert adapters
        assert all("lora_" in name or "classifier" in name for name in seen.update)


OWN = """
from transformers import AutoModelForImageClassification, ViTConfig


def vit():
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=10,
    )
    return AutoModelForImageClassification.from_config(config)
"""


def test_the_command_line_takes_a_model_beside_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_hugging_face.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    (client,) = target_of(Asked(case="digits:batch=2", model="own_hugging_face:vit")).what
    assert client.loss == TrainerLoss("whole input", None)
    assert client.name == "own_hugging_face:vit on digits:batch=2"
    (other,) = target_of(Asked(case="digits:batch=2", model="own_hugging_face:vit", loss="squared-error")).what
    assert other.loss != client.loss


def test_a_picture_behind_their_vision_transformer_is_read() -> None:
    """Its positions are found by running it, under their names, with an adapter on top or frozen below."""
    model, loss = one_input(made("ImageClassification", vit(hidden_size=16)).double())
    x, y = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64), torch.tensor([2])
    seen, _ = unbatch.observe(model, loss, x, y, protocol=unbatch.Protocol(mode="eval"))
    found = unbatch.attacks.PatchSpan()(seen)
    assert float((found.inputs - x).norm() / x.norm()) <= float(found.bound[0]) < 1e-9
    assert "vit.embeddings.position_embeddings" in found.trace["by"]


def test_pictures_are_traced() -> None:
    model, _ = one_input(made("ImageClassification", vit()))
    names = [call.name for call in trace(model, (1, 8, 8)).calls]
    assert any("query" in name or "q_proj" in name for name in names)


def test_what_is_no_such_model_is_refused_in_words() -> None:
    with pytest.raises(unbatch.UnbatchError, match="one_input"):
        unbatch.observe(made("ImageClassification", vit()), nn.functional.cross_entropy, *batch("ImageClassification"))
    with pytest.raises(unbatch.UnbatchError, match="no AutoModelForCausalLM"):
        one_input(transformers.AutoModel.from_config(bert()))
    own = made("SequenceClassification", gpt2())
    with pytest.raises(unbatch.UnbatchError, match=r"set model\.config\.pad_token_id"):
        one_input(own, pad_token_id=5)

    class Doubled(type(own)):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.loss = None if out.loss is None else 2 * out.loss
            return out

    with pytest.raises(unbatch.UnbatchError, match="on a random batch"):
        one_input(Doubled(own.config).eval())
