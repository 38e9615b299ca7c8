"""A step of the Hugging Face Trainer is captured, whatever its accumulation and optimiser, and audited."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unbatch
from unbatch import Truth, UnbatchError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from unbatch.adapters.trainer import StepCallback  # noqa: E402 (skipped without transformers)

LENGTH, VOCABULARY = 8, 200
pytestmark = pytest.mark.filterwarnings("ignore:.pin_memory.:UserWarning")


class Texts(torch.utils.data.Dataset):
    """Sentences of random tokens, as the Trainer takes them."""

    def __init__(self, n: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(2, VOCABULARY, (n, LENGTH), generator=rng)
        self.labels = torch.arange(n) % 2

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[at], "labels": self.labels[at]}


def network(**more: Any) -> Any:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            num_labels=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            n_positions=32,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **more,
        )
        return transformers.GPT2ForSequenceClassification(config)


def trained(callback: StepCallback, data: Texts, folder: Path, **how: Any) -> Any:
    told: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": len(data), "report_to": [], "use_cpu": True}
    args = transformers.TrainingArguments(output_dir=str(folder), save_strategy="no", disable_tqdm=True, **(told | how))
    trainer = transformers.Trainer(model=network(), args=args, train_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


def test_a_step_of_the_trainer_ends_in_a_report(tmp_path: Path) -> None:
    data, callback = Texts(3), StepCallback()
    trained(callback, data, tmp_path)
    assert callback.step.optimiser == "AdamW"
    seen = callback.observation(knowledge=unbatch.Knowledge(input_range=(0, VOCABULARY - 1), padding=0))
    truth = Truth(inputs=data.tokens, labels=data.labels)
    audit = unbatch.audit(seen, truth=truth, attacks=["token-span"], analyses=())
    assert audit.recovered() == {(0, 0), (0, 1), (0, 2)}


def test_the_trainer_s_own_clipping_is_seen(tmp_path: Path) -> None:
    data, callback = Texts(3), StepCallback()
    trained(callback, data, tmp_path)
    seen = callback.observation()
    assert callback.step.factor is not None
    assert seen.knowledge.clip == pytest.approx(1.0, rel=1e-3)  # its default
    factor, left = seen.fit(data.tokens, data.labels)
    assert factor == pytest.approx(callback.step.factor, rel=1e-4)
    assert left < 1e-5


def test_accumulated_batches_are_one_and_a_later_step_is_captured(tmp_path: Path) -> None:
    data, callback = Texts(4), StepCallback(number=2)
    assert repr(callback) == "<StepCallback of step 2: not yet taken>"
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    trained(callback, data, tmp_path, max_steps=2, **how)
    seen = callback.observation()
    assert (callback.step.passes, seen.knowledge.batch_size, callback.step.factor) == (2, 4, 1)
    factor, left = seen.fit(data.tokens, data.labels)
    assert round(factor, 4) in (
        1,
        2,
    )  # this model of transformers 5 sums the batches' means, others divide by the labels
    assert left < 1e-5
    assert not torch.equal(seen.model.score.weight, network().score.weight)  # after a step already
    with pytest.raises(UnbatchError, match="had a state from earlier steps"):
        callback.observation(sent="difference")
    assert "StepCallback of step 2: <CapturedStep of GPT2ForSequenceClassification: AdamW" in repr(callback)


def test_the_first_step_s_difference_is_that_of_adamw(tmp_path: Path) -> None:
    data, callback = Texts(2), StepCallback()
    trained(callback, data, tmp_path, max_grad_norm=0.0, weight_decay=0.01, learning_rate=1e-3)
    seen = callback.observation(sent="difference")
    assert seen.knowledge.optimiser == "adamw"
    assert "weight_decay" not in seen.knowledge  # that of biases and norms is another: both are known, and taken off
    assert seen.residual(data.tokens, data.labels) < 0.05  # a difference of float32 keeps that much of such a step


def test_a_step_that_training_did_not_come_to_says_so(tmp_path: Path) -> None:
    callback = StepCallback(number=3)
    trained(callback, Texts(2), tmp_path)
    with pytest.raises(UnbatchError, match="has taken 1 steps since the callback was given, and step 3 was"):
        callback.observation()
    with pytest.raises(UnbatchError, match="counted from 1"):
        StepCallback(number=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_a_plain_loop_on_an_adapter_has_the_model_s_own_loss() -> None:
    peft = pytest.importorskip("peft")
    told = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model, data = peft.get_peft_model(network(), told), Texts(2)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with unbatch.capture(model, optimiser) as step:
        model(input_ids=data.tokens, attention_mask=torch.ones_like(data.tokens), labels=data.labels).loss.backward()
        optimiser.step()
    assert step.observation().residual(data.tokens, data.labels) < 1e-5
    assert step.observation(sent="difference").residual(data.tokens, data.labels) < 1e-3
