"""A plain `transformers.Trainer` trains these models: padded and packed batches, accumulation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from midskip import MidskipForCausalLM, SkipCache

Make = Callable[..., MidskipForCausalLM]
LENGTHS = (3, 14, 9, 5, 12, 4, 7, 13, 6, 11, 3, 8)
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"policy": "dense"},
    "soft gates": {},
    "hard gates": {"policy_settings": {"gates": "hard"}},
}
LAYER_DROPOUT = {"policy": "early_exit", "policy_settings": {"scores": "straight_through", "layer_dropout": 0.2}}
CHECKPOINTING = {"activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing")
                 else "gradient_checkpointing": True}  # fmt: skip


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Ids that count up, in rows of different lengths; none of them is the pad."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(1, 300, (len(LENGTHS),), generator=generator).tolist()
    return [{"input_ids": list(range(start, start + length))} for start, length in zip(starts, LENGTHS, strict=True)]


@pytest.fixture
def fit(
    make_model: Make, learnt: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], tmp_path: Path
) -> Iterator[Callable[..., Trainer]]:
    """fit("soft gates", 4, collator=..., resume=False, **arguments): a Trainer that took 3 steps from the same model, 4
    rows a batch. (The epsilon is large because AdamW makes full steps of gradients that are nothing but rounding.)"""

    def run(
        policy: str, batch_size: int, *, collator: Any = None, resume: Any = None, callbacks: Any = None, **more: Any
    ) -> Trainer:
        settings: dict[str, Any] = {
            "max_steps": 3, "learning_rate": 0.01, "adam_epsilon": 1e-3, "save_strategy": "no", "report_to": [],
            "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "per_device_eval_batch_size": 5,
        }  # fmt: skip
        trainer = Trainer(
            make_model(vocab_size=320, **(POLICIES | {"layer dropout": LAYER_DROPOUT}).get(policy, {"policy": policy})),
            TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=batch_size, **(settings | more)),
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            eval_dataset=rows,  # pyright: ignore[reportArgumentType]
            data_collator=collator or DataCollatorForLanguageModeling(learnt, mlm=False),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    yield run


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_same(one: Trainer, other: Trainer) -> None:
    """Losses of all steps, which the Trainer adds up in float32, and weights at the end."""
    assert len(losses(one)) == 3 and losses(other) == pytest.approx(losses(one), rel=1e-6)
    weights = other.model.state_dict()
    for name, expected in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-8, msg=lambda text, name=name: name + text)


def mean_nats(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Of every token but the first of each row, one row at a time."""
    nats: list[Tensor] = []
    for row in rows:
        ids_1T = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits_TV = model(ids_1T).logits[0]
        nats.append(torch.nn.functional.cross_entropy(logits_TV[:-1], ids_1T[0, 1:], reduction="none"))
    return torch.cat(nats).mean().item()


@pytest.mark.parametrize("policy", POLICIES)
def test_accumulated_batches_are_one_larger_batch(fit: Callable[..., Trainer], make_model: Make, policy: str) -> None:
    large = fit(policy, 4)
    assert_same(large, fit(policy, 1, gradient_accumulation_steps=4))
    start = make_model(vocab_size=320, **POLICIES[policy]).state_dict()
    assert max((x - start[name]).abs().max() for name, x in large.model.state_dict().items()) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_activation_checkpointing_changes_nothing(fit: Callable[..., Trainer], policy: str) -> None:
    assert_same(fit(policy, 4), fit(policy, 4, **CHECKPOINTING))


@pytest.mark.parametrize("policy", POLICIES)
def test_packed_rows_are_padded_rows(fit: Callable[..., Trainer], policy: str) -> None:
    for more in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        assert_same(fit(policy, 4), fit(policy, 4, collator=DataCollatorWithFlattening(**more)))


def test_the_loss_is_the_mean_over_the_tokens(fit: Callable[..., Trainer], make_model: Make, rows: list[Any]) -> None:
    trainer = fit("soft gates", 12, max_steps=1)
    before = make_model(vocab_size=320).eval()
    assert losses(trainer)[0] == pytest.approx(mean_nats(before, rows), rel=1e-6)
    trainer.args.per_device_eval_batch_size = len(rows)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(mean_nats(trainer.model, rows), rel=1e-9)


def test_predictions_are_logits_alone(fit: Callable[..., Trainer], rows: list[Any]) -> None:
    """What else a pass gives has layers first, and cannot be put together over batches."""
    trainer = fit("hard gates", 4)
    found = trainer.predict(rows)  # pyright: ignore[reportArgumentType]
    assert found.predictions.shape == (len(rows), max(LENGTHS), 320)
    with torch.no_grad():
        logits_1TV = trainer.model(torch.tensor([rows[0]["input_ids"]])).logits
    assert torch.allclose(torch.as_tensor(found.predictions[:1, : LENGTHS[0]]), logits_1TV, atol=1e-9)


@pytest.mark.parametrize("policy", ["mixture_of_depths", "reinforce", "early_exit", "layer dropout", "random"])
def test_what_stays_untrained_is_told(fit: Callable[..., Trainer], policy: str) -> None:
    """Of the others nothing is said: a warning ends a test."""
    with pytest.warns(UserWarning, match="learns beside it, .* stays as it is"):
        fit(policy, 4, max_steps=1)
    with pytest.warns(UserWarning, match="learns beside it, .* stays as it is"):
        fit(policy, 4, max_steps=1, label_smoothing_factor=0.1)


def test_smoothed_labels_are_shifted(fit: Callable[..., Trainer], make_model: Make, rows: list[Any]) -> None:
    found = losses(fit("hard gates", 12, max_steps=1, label_smoothing_factor=0.1))[0]
    model = make_model(vocab_size=320, **POLICIES["hard gates"]).eval()
    log_probs, of_labels = [], []
    for row in rows:
        ids_1T = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs.append(model(ids_1T).logits[0, :-1].log_softmax(-1))
        of_labels.append(log_probs[-1].gather(1, ids_1T[0, 1:, None]))
    expected = -0.9 * torch.cat(of_labels).mean() - 0.1 * torch.cat(log_probs).mean()
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_noise_on_embeddings_is_that_of_the_row(fit: Callable[..., Trainer], rows: list[Any]) -> None:
    """NEFTune: uniform, up to alpha divided by the root of the numbers in a row of T tokens, pads included."""
    seen: list[Tensor] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            plain = named["model"].get_input_embeddings()
            plain.register_forward_hook(
                lambda _, given, output: seen.append((output - plain.weight[given[0]]).detach())
            )

    fit("hard gates", 12, max_steps=1, neftune_noise_alpha=5, callbacks=[Look()])
    largest = seen[0].abs().max() * math.sqrt(max(LENGTHS) * seen[0].shape[2])
    assert seen[0].shape[:2] == (12, max(LENGTHS)) and 4.9 < largest <= 5


@pytest.mark.parametrize("policy", POLICIES)
def test_it_goes_on_from_a_checkpoint_and_loads(fit: Callable[..., Trainer], policy: str, tmp_path: Path) -> None:
    whole = fit(policy, 4, save_strategy="steps", save_steps=2)
    assert_same(whole, fit(policy, 4, resume=str(tmp_path / "run" / "checkpoint-2")))
    whole.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids_BT = torch.randint(1, 320, (2, 9))
    torch.testing.assert_close(loaded(ids_BT).logits, whole.model.eval()(ids_BT).logits, rtol=0, atol=1e-9)
    generated = loaded.generate(ids_BT, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert isinstance(generated.past_key_values, SkipCache), "the Trainer writes use_cache: false"
    assert math.isfinite(generated.past_key_values.executed_share)
