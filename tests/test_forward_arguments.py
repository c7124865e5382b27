"""A forward pass takes and gives what transformers' models take and give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from midskip import MidskipForCausalLM, meter
from midskip.evaluate import depth_of_tokens, evaluate
from midskip.model.cache import SkipCache
from midskip.model.outputs import Packed
from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy

Make = Callable[..., MidskipForCausalLM]


class KeysOnly(Policy):
    """Odd positions run each layer for their keys alone: their own output gate is 0."""

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return Decision(None, (batch.position_N % 2 == 0).to(torch.float64), None)


class LooksBack(Policy):
    looks_back = True

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return Decision()


def prompt(*shape: int) -> Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(1))


def test_a_loop_written_by_hand_decodes_with_the_cache_that_a_pass_gives(make_model: Make) -> None:
    model, ids_BT = make_model().eval(), prompt(2, 9)
    with torch.no_grad():
        expected = model.generate(ids_BT, max_new_tokens=6, do_sample=False, pad_token_id=0)
        output = model(ids_BT)
        for _ in range(6):
            ids_BT = torch.cat([ids_BT, output.logits[:, -1:].argmax(-1)], 1)
            output = model(ids_BT[:, -1:], past_key_values=output.past_key_values)
    assert torch.equal(ids_BT, expected)
    assert isinstance(output.past_key_values, SkipCache) and output.past_key_values.num_columns == 15


def test_when_a_pass_makes_a_cache_unless_told(make_model: Make) -> None:
    model, ids_BT = make_model().eval(), prompt(2, 6)
    left_BT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    counted_BT = (left_BT.cumsum(1) - 1).masked_fill(left_BT == 0, 1)
    documents_BT = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert model(ids_BT).past_key_values is None, "with gradients there is none"
    with torch.no_grad():
        assert model(ids_BT, attention_mask=left_BT, position_ids=counted_BT).past_key_values is not None
        assert model(ids_BT, position_ids=documents_BT).past_key_values is None
        assert model(ids_BT, use_cache=False).past_key_values is None
        assert make_model(policy=f"{__name__}:LooksBack").eval()(ids_BT).past_key_values is None
        assert make_model(use_cache=False).eval()(ids_BT).past_key_values is None


@torch.no_grad()
def test_ids_of_32_bits_give_the_same_gates(make_model: Make) -> None:
    model, ids_BT = make_model(policy_settings={"gates": "hard"}).eval(), prompt(4, 10)
    model.model.policy.bias.data.fill_(-0.5)
    wide = model(ids_BT, use_cache=False)
    for use_cache in (False, True):
        narrow = model(ids_BT.int(), use_cache=use_cache)
        assert torch.equal(narrow.executed, wide.executed) and 0 < wide.executed_share < 1


def test_shapes_that_do_not_fit_are_refused_by_name(make_model: Make) -> None:
    model, ids_BT = make_model().eval(), prompt(2, 6)
    for position_ids in (torch.arange(6), torch.tensor(3), torch.zeros(3, 6).long(), torch.zeros(3, 2, 6).long()):
        with pytest.raises(ValueError, match="position_ids has the shape"):
            model(ids_BT, position_ids=position_ids)
    for attention_mask in (torch.ones(3, 6), torch.ones(2, 5), torch.ones(6)):
        with pytest.raises(ValueError, match="attention_mask has the shape"):
            model(ids_BT, attention_mask=attention_mask, position_ids=torch.arange(6).expand(2, 6))


def test_a_replica_of_data_parallel_is_refused(make_model: Make) -> None:
    replica = make_model()._replicate_for_data_parallel()  # what nn.DataParallel makes of each module
    replica.model = replica.model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"could not gather what it gives: start the script by `torchrun` or"):
        replica(prompt(2, 8))


def test_what_llama_makes_no_use_of_may_be_given(make_model: Make) -> None:
    model, ids_BT = make_model().eval(), prompt(2, 6)
    expected = model(ids_BT, labels=ids_BT)
    found = model(
        ids_BT, labels=ids_BT, output_attentions=False, head_mask=None, cache_position=torch.arange(6),
        token_type_ids=torch.zeros_like(ids_BT), num_items_in_batch=5,
    )  # fmt: skip
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss * 10 / 5)
    with pytest.raises(ValueError, match="packed attention never holds its weights"):
        model(ids_BT, output_attentions=True)
    with pytest.raises(TypeError, match="got an argument 'labes' that this model does not know"):
        model(ids_BT, labes=ids_BT)


def test_a_plain_trainer_weighs_accumulated_passes_by_their_tokens(make_model: Make, tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in prompt(4, 8)]
    rows[0]["labels"][2:] = -100  # a pass with fewer tokens to predict

    def trained(batch_size: int) -> dict[str, Tensor]:
        model = make_model(dtype=torch.float32)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch_size, gradient_accumulation_steps=4 // batch_size,
            max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
        return dict(model.named_parameters())

    together, apart = trained(4), trained(1)
    for name, parameter in together.items():
        torch.testing.assert_close(apart[name], parameter, rtol=1e-4, atol=1e-6)


def test_generation_does_not_ask_for_gates(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_BT = make_model().eval(), prompt(2, 6)
    whole, none = model(ids_BT), model(ids_BT, output_gates=False)
    assert none.gates is none.depth_scores is none.executed is None and torch.equal(none.logits, whole.logits)
    assert torch.equal(whole.executed, whole.gates > 0)
    monkeypatch.setattr(Packed, "gates_LBT", None)  # whoever asks for them fails
    model.generate(ids_BT, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_token_with_output_gate_0_that_is_kept_counts_as_run(make_model: Make) -> None:
    model, ids_BT = make_model(policy=f"{__name__}:KeysOnly").eval(), prompt(2, 6)
    with meter(model) as work:
        output = model(ids_BT)
    assert (output.gates[..., 1::2] == 0).all() and output.executed.all()
    assert output.executed_share == work.executed_share == 1
    windows = [{"input_ids": ids, "labels": ids} for ids in ids_BT]
    measured = evaluate(model, windows)
    assert measured["executed_share"] == 1 and measured["share_by_layer"] == [1.0] * 4
    assert measured["tokens_by_blocks"] == [0, 0, 0, 0, 1]

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return chr(97 + ids[0])

    assert {token.blocks for token in depth_of_tokens(model, Letters(), ids_BT[0].tolist())} == {4}  # pyright: ignore[reportArgumentType]
