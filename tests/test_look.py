"""A model looked at while it reads: records of tokens, forced passes, text as it is written.

L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from midskip import MidskipForCausalLM
from midskip.budget.monitor import temporary_limits
from midskip.cost import Meter
from midskip.evaluate import evaluate
from midskip.generate import blocks_counted, generate
from midskip.look import Look, Outcome, look, stream, what_if
from midskip.look.forced import forced, one_earlier
from midskip.look.stream import text_of_new
from midskip.policies import Decision

KINDS: list[dict[str, Any]] = [
    {},
    {"skipped_kv": "keep"},
    {"policy_settings": {"gates": "hard", "scores": "hidden_states"}, "skip_path": "linear"},
    {"policy": "independent", "skip_unit": "sublayer", "intermediate_size": [24, 40, 56, 24]},
    {"policy": "static", "policy_settings": {"share": 0.5}},
    {"policy": "dense"},
]


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(31, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def looked(model: MidskipForCausalLM, ids: list[int]) -> Look:
    """With losses, which need a tokenizer: any will do."""
    from midskip.data import bytes_tokenizer

    return look(model, bytes_tokenizer(), ids)


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_flops_of_tokens_add_up_to_what_is_metered(
    make_model: Callable[..., MidskipForCausalLM], changes: dict[str, Any]
) -> None:
    model = make_model(**changes).eval()
    found = look(model, None, ids_of(150))  # two windows of 64 and one of 22
    with Meter(model) as meter:
        for start in range(0, 150, 64):
            model(torch.tensor([ids_of(150)[start : start + 64]]), use_cache=False)
    costs = [token.flops for token in found.tokens]
    assert None not in costs
    assert sum(cost for cost in costs if cost) == pytest.approx(meter.flops().total, rel=1e-12)
    assert found.flops == meter.flops().total and found.dense_flops == meter.dense_flops().total
    key_bytes = 2 * model.config.num_key_value_heads * model.config.head_dim * 8
    assert found.kv_bytes == sum(meter.key_rows_L) * key_bytes
    assert found.executed_share == pytest.approx(meter.executed_share)


def test_flops_of_a_token_are_its_own(make_model: Callable[..., MidskipForCausalLM]) -> None:
    """Alone at the end of a text it costs what the text costs more for it."""
    model, ids = make_model("mixed").eval(), ids_of(40)
    whole, shorter = (look(model, None, some) for some in (ids, ids[:-1]))
    policy = 2 * model.config.hidden_size * 40  # what is shared among the tokens
    cost = whole.tokens[-1].flops
    assert cost is not None and abs(cost - (whole.flops - shorter.flops)) <= policy


def test_losses_and_ranks_are_those_of_the_next_token(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model, ids = make_model("mixed").eval(), ids_of(100)
    tokens = looked(model, ids).tokens
    for start in (0, 64):
        logits_TV = model(torch.tensor([ids[start : start + 64]]), use_cache=False).logits[0].double()
        for column, token in enumerate(tokens[start : start + 64]):
            if start + column == 99:
                assert token.next_loss_nats is None and token.next_rank is None
                continue
            target = ids[start + column + 1]
            loss = -logits_TV[column].log_softmax(0)[target].item()
            order = logits_TV[column].argsort(descending=True).tolist()
            assert token.next_loss_nats == pytest.approx(loss, abs=1e-6)
            assert token.next_rank == order.index(target) + 1
            assert tokens[start + column + 1].loss_nats == token.next_loss_nats
    assert tokens[0].loss_nats is None


def test_mean_loss_is_that_of_evaluate(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model, ids = make_model("mixed").eval(), ids_of(64)
    window = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    assert looked(model, ids).loss_nats == pytest.approx(evaluate(model, [window])["loss"], abs=1e-9)


def test_scores_say_who_is_skipped(make_model: Callable[..., MidskipForCausalLM]) -> None:
    tokens = look(make_model("mixed").eval(), None, ids_of(50)).tokens
    for token in tokens:
        assert [score < 1 for score in token.scores] == [gate > 0 for gate in token.gates]
        assert token.scores == token.scores[::-1], "a layer and its mirror share a gate"
    assert {token.blocks for token in tokens} > {2}


def test_limits_are_given_back(calibrated: MidskipForCausalLM) -> None:
    calibrated.set_budget(0.5, 3)
    before = calibrated.model.policy.score_scale
    with pytest.raises(KeyError), temporary_limits(calibrated, score_scale=0.0):
        assert look(calibrated, None, ids_of(9)).executed_share == 1
        raise KeyError
    assert (calibrated.model.policy.score_scale, calibrated.model.policy.max_layers) == (before, 3)


def numbers(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.layers, outcome.next_loss_nats, outcome.next_rank, outcome.later_nats


@pytest.mark.parametrize("gates", ["soft", "hard"])
def test_a_lone_token_forced_is_as_under_limits(make_model: Callable[..., MidskipForCausalLM], gates: str) -> None:
    """Where nobody else is there, to run everything is scale 0, and to leave earlier a ceiling."""
    settings = {"gates": gates} | ({"scores": "hidden_states"} if gates == "hard" else {})
    model = make_model("open" if gates == "soft" else "kept", policy_settings=settings).eval()
    found = what_if(model, [5], 0, next_id=7)
    with temporary_limits(model, score_scale=0.0):
        assert numbers(found["everything"]) == numbers(what_if(model, [5], 0, 7)["as_it_is"])
    with temporary_limits(model, 1.0, 2):
        assert numbers(found["one_earlier"]) == numbers(what_if(model, [5], 0, 7)["as_it_is"])
    assert found["one_earlier"].layers == (True, False, False, True)
    assert found["one_earlier"].flops < found["as_it_is"].flops <= found["everything"].flops


def test_one_token_forced_changes_it_and_what_comes_after(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model, ids = make_model("mixed").eval(), ids_of(30)
    tokens = looked(model, ids).tokens
    column = next(at for at, token in enumerate(tokens) if 0 < token.blocks < 4 and at > 5)
    found = what_if(model, ids, column)
    plain, everything, earlier = (found[name] for name in ("as_it_is", "everything", "one_earlier"))
    assert plain.next_loss_nats == pytest.approx(tokens[column].next_loss_nats)
    later = sum(token.next_loss_nats or 0 for token in tokens[column + 1 :])
    assert plain.later_nats == pytest.approx(later)
    assert sum(everything.layers) == 4 and sum(earlier.layers) == sum(plain.layers) - 2
    assert len({one.next_loss_nats for one in found.values()}) == 3
    assert len({one.later_nats for one in found.values()}) == 3, "those after it see its keys"
    assert [len(hooks) for hooks in (model.model.policy._forward_hooks,)] == [0]


def test_who_ran_nothing_cannot_leave_earlier(make_model: Callable[..., MidskipForCausalLM]) -> None:
    found = what_if(make_model("gone").eval(), ids_of(9), 8)
    assert set(found) == {"as_it_is", "everything"}
    assert found["as_it_is"].next_loss_nats is None and found["as_it_is"].later_nats == 0, "nothing follows"


def test_the_layer_left_is_the_innermost() -> None:
    assert one_earlier((True,) * 5, True) == (True, True, False, True, True)
    assert one_earlier((True, True, False, True, True), True) == (True, False, False, False, True)
    assert one_earlier((True, False, True, False), False) == (True, False, False, False)
    assert one_earlier((True,) * 2, False) == (True, False), "two layers, each other's mirrors by place only"
    assert one_earlier((False,) * 4, True) is None


@pytest.mark.parametrize("kind", ["middle_out", "independent", "early_exit"])
def test_a_policy_says_whether_layers_are_mirrored(make_model: Callable[..., MidskipForCausalLM], kind: str) -> None:
    model = make_model(policy="random", policy_settings={"kind": kind, "share": 0.5}).eval()
    assert model.model.policy.is_mirrored is (kind == "middle_out")
    found = what_if(model, ids_of(9), 8)
    layers = found["as_it_is"].layers
    assert any(layers), "else there is nothing to leave out"
    assert sum(layers) - sum(found["one_earlier"].layers) == (2 if kind == "middle_out" else 1)


def test_a_skip_path_is_taken_where_the_token_now_leaves() -> None:
    """Of three tokens, the last leaves at layer 2 as decided, and is made to leave at layer 1."""
    keep_N, path_N = torch.tensor([True, True, True]), torch.tensor([False, False, False])
    layers = (True, False, False, True)
    taken = []
    for layer in range(4):
        decided = Decision(keep_N, skip_path_N=path_N)
        path = forced(decided, 2, torch.zeros(3, 8), layer, layers).skip_path_N
        assert path is not None
        taken.append(path.tolist())
    assert taken == [[False] * 3, [False, False, True], [False] * 3, [False] * 3]
    assert path_N.tolist() == [False] * 3, "what was decided is not written over"


def test_a_column_outside_the_window_is_refused(make_model: Callable[..., MidskipForCausalLM]) -> None:
    with pytest.raises(ValueError, match="column is 9 of a window of 9 tokens"):
        what_if(make_model("mixed").eval(), ids_of(9), 9)
    with pytest.raises(ValueError, match="no text to look at"):
        look(make_model("mixed").eval(), None, [])


def test_text_comes_as_generate_writes_it_and_as_deep(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer("the cat")["input_ids"]
    *_, (written, blocks) = stream(model, ids, 12, temperature=0)
    with blocks_counted(model) as counted:
        whole = generate(model, tokenizer, "the cat", 12, temperature=0)
    assert written == whole and blocks[:-1] == counted
    assert blocks == [token.blocks for token in look(model, tokenizer, written).tokens]


def test_it_ends_where_generate_does(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Chat models name more ends of text in their generation_config than in their config."""
    *_, (written, _) = stream(model, [3] * 5, 12, temperature=0)
    model.generation_config.eos_token_id = [2, written[7]]
    *_, (ended, _) = stream(model, [3] * 5, 12, temperature=0)
    assert ended == written[: written.index(written[7], 5) + 1]


def test_a_policy_that_looks_back_writes_too(model: MidskipForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(stream(model, [3] * 9, 5, temperature=0))
    monkeypatch.setattr(type(model.model.policy), "looks_back", True)
    assert list(stream(model, [3] * 9, 5, temperature=0)) == expected


def test_new_text_is_what_new_tokens_add(lossless: PreTrainedTokenizerFast) -> None:
    """Also where it continues a character of the prompt, and where its bytes are none yet."""
    before, after = (lossless(text)["input_ids"] for text in ("the cafe", "\u0301 \u00e9t\u00e9"))
    assert text_of_new(lossless, [*before, *after], len(before)) == "\u0301 \u00e9t\u00e9"
    half = lossless("\u4e2d")["input_ids"][:-1]
    ends = [lossless.eos_token_id, *half]
    assert text_of_new(lossless, [*before, *after, *ends], len(before)) == "\u0301 \u00e9t\u00e9"


def test_text_comes_token_by_token_within_the_models_room(model: MidskipForCausalLM) -> None:
    entered = []

    @contextmanager
    def step() -> Any:
        entered.append(len(entered))
        yield

    seen = [(len(ids), len(blocks)) for ids, blocks in stream(model, [3] * 60, 100, seed=1, step=step)]
    assert seen == [(count, count) for count in range(60, 60 + len(seen))] and seen[-1][0] <= 64
    assert entered == list(range(len(seen)))
    assert list(stream(model, [3] * 9, 5, seed=1)) == list(stream(model, [3] * 9, 5, seed=1))
    with pytest.raises(ValueError, match="has 65 tokens; expected 1 to 64"):
        next(stream(model, [3] * 65, 1))
