"""Sentences out of the gradients of Hugging Face models, with and without an adapter, none of which token-span knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unbatch
from unbatch import Knowledge
from unbatch.adapters.huggingface import labels_of, one_input

transformers = pytest.importorskip("transformers")
LENGTH, VOCABULARY = 8, 200
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_labels": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
DENSE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def network(name: str) -> Any:
    """A model of that kind, drawn at random."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        if "llama" in name:
            config = transformers.LlamaConfig(**SMALL, **DENSE, max_position_embeddings=32)
            kind = transformers.LlamaForCausalLM if "language" in name else transformers.LlamaForSequenceClassification
            return kind(config)
        if name == "bert":
            config = transformers.BertConfig(**SMALL, **DENSE, max_position_embeddings=32)
            return transformers.BertForSequenceClassification(config)
        causal = "language" in name  # its head is the embedding, which is GPT-2's default
        config = transformers.GPT2Config(**SMALL, n_positions=32, n_embd=64, n_layer=3 if causal else 2, n_head=4)
        model = (transformers.GPT2LMHeadModel if causal else transformers.GPT2ForSequenceClassification)(config)
        if "half" in name:
            model = model.half()
        if "adapter" in name:
            peft = pytest.importorskip("peft")
            kind = "CAUSAL_LM" if causal else "SEQ_CLS"
            told = peft.LoraConfig(task_type=kind, r=40, target_modules=["c_attn"], fan_in_fan_out=True)
            model = peft.get_peft_model(model, told)
        if "trained" in name:
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=0.02)
        return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("gpt2", 3),
        ("gpt2 with an adapter", 3),
        ("gpt2 with a trained adapter", 3),
        ("gpt2, a language model", 3),
        ("gpt2, a language model with an adapter", 3),
        ("gpt2, a language model with a trained adapter", 3),
        ("gpt2, a language model in half precision", 2),
        ("llama", 3),
        ("llama, a language model", 3),
        ("bert", 2),
    ],
)
def test_sentences_come_back_from_models_that_were_never_heard_of(name: str, n: int) -> None:
    model, loss = one_input(network(name))
    x = torch.randint(2, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(0))
    x[0, 5:] = 0
    y = labels_of(model, x) if "language" in name else torch.tensor([0, 1, 1])[:n]
    told = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    seen, _ = unbatch.observe(model, loss, x, y, knowledge=told, protocol=unbatch.Protocol(mode="eval"))
    found = unbatch.attacks.TokenSpan()(seen)
    assert found.inputs is not None
    assert sorted(found.inputs.tolist()) == sorted(x.tolist())
    assert found.bound is not None
    assert bool(found.bound.isfinite().all()), found.trace


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_one_sentence_comes_back_from_a_step_of_adamw(name: str) -> None:
    """Of the gradient float32 leaves the signs, and its spans are gone: rows of tokens and of positions agree."""
    model, loss = one_input(network(name))
    x, y = torch.randint(2, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1)), torch.tensor([1])
    told = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    step = unbatch.Protocol(local_steps=1, optimiser="adamw", learning_rate=5e-5, weight_decay=0.01, mode="eval")
    seen, _ = unbatch.observe(model, loss, x, y, knowledge=told, protocol=step)
    found = unbatch.attacks.TokenSpan()(seen)
    assert torch.equal(found.inputs, x)
    assert torch.equal(found.labels, y)
    assert found.bound.tolist() == [0.0], found.trace
