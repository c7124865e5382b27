"""Lossless drafts give the tokens of greedy search with every block run, in every way that it can be asked."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_drafts import DRAFTS, POLICIES, Make, generate, left_padded, model_that_drafts, prompt, report_of, whole
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


@pytest.fixture
def make(make_model: Make) -> Make:
    return partial(model_that_drafts, make_model)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "eos": {"eos_token_id": [7, 12, 19]},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "min-new-tokens": {"eos_token_id": [7, 12, 19], "min_new_tokens": 25},
    "max-length": {"max_new_tokens": None, "max_length": 30},
    "six-drafts": {"num_draft_tokens": 6},
    "confidence": {"draft_confidence": 0.5},
    "one-token": {"max_new_tokens": 1},
    "chunked-prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.integration
def test_tokens_are_those_of_the_whole_model(make: Make, policy: str, way: str) -> None:
    """Each way with padded rows for one policy, and with a row without pads for the other."""
    padded = (list(WAYS).index(way) + POLICIES.index(policy)) % 2 == 1
    model = make(policy)
    ids_BT, mask_BT = left_padded() if padded else (prompt(1, 9), None)
    options = WAYS[way] | {"attention_mask": mask_BT}
    plain = {name: value for name, value in options.items() if "draft" not in name}
    expected = whole(model, ids_BT, **plain)
    assert torch.equal(generate(model, ids_BT, **(DRAFTS | options)), expected)
    report = report_of(model)
    assert report.num_tokens == expected.shape[1] - 9
    if way in ("greedy", "penalties", "six-drafts"):
        assert 0 < report.num_accepted < report.num_drafted, "some were right, and some were not"


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_end_at_different_steps(make: Make, policy: str) -> None:
    model = make(policy)
    ids_BT, mask_BT = left_padded()
    unstopped = whole(model, ids_BT, attention_mask=mask_BT)[:, 9:].tolist()
    ends = {token: [row.index(token) if token in row else 40 for row in unstopped] for token in range(1, 31)}
    eos = max(ends, key=lambda token: (len(set(ends[token])), max(ends[token]) < 40))
    assert len(set(ends[eos])) == 3
    options = {"attention_mask": mask_BT, "eos_token_id": eos, "return_dict_in_generate": True}
    expected, got = whole(model, ids_BT, **options), generate(model, ids_BT, **(DRAFTS | options))
    assert torch.equal(got.sequences, expected.sequences)
    seen = [output.past_key_values._seen_BC2[:, : output.past_key_values.num_columns] for output in (got, expected)]
    assert torch.equal(*seen), "ids and positions that the cache holds, also of rows that ended"


def test_rows_that_ended_do_not_count(make: Make) -> None:
    model, ids_BT = make(), prompt(8, 9)
    texts = whole(model, ids_BT)[:, 9:].tolist()
    ended = next(row for row in range(1, 8) if texts[row][0] not in texts[0])  # at its first token
    ids_BT, eos = ids_BT[[0, ended]], texts[ended][0]
    for confidence in (0.0, 0.3):
        options = DRAFTS | {"draft_confidence": confidence, "eos_token_id": eos}
        generate(model, ids_BT[:1], **options)
        alone = report_of(model)
        generate(model, ids_BT, **options)
        both = report_of(model)
        assert (both.num_passes, both.num_drafted, both.num_accepted) == (
            alone.num_passes, alone.num_drafted, alone.num_accepted,
        )  # fmt: skip
        assert both.num_accepted > 0


def test_stop_strings(make: Make, learnt: PreTrainedTokenizerFast) -> None:
    model = make(vocab_size=len(learnt))
    ids_1T = prompt(1, 9)
    unstopped = whole(model, ids_1T)
    options = {"tokenizer": learnt, "stop_strings": [learnt.decode(unstopped[0, 25:27])]}
    expected = whole(model, ids_1T, **options)
    assert expected.shape[1] < 49
    assert torch.equal(generate(model, ids_1T, **DRAFTS, **options), expected)
    config = GenerationConfig(stop_strings=options["stop_strings"], max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids_1T, config, tokenizer=learnt, **DRAFTS), expected)


class Noted(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_processors_criteria_and_streamer_get_what_they_get_without(make: Make) -> None:
    """Each token once and in order, so that they may have a state."""
    model, calls = make(), []

    def process(ids_BC: Tensor, scores_BV: Tensor) -> Tensor:
        calls.append(ids_BC.tolist())
        return scores_BV.roll(len(calls), 1)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            calls.append((input_ids.tolist(), len(scores)))
            return torch.full((1,), input_ids.shape[1] >= 40)

    found = []
    for generate_one, more in ((whole, {}), (generate, DRAFTS)):
        calls.clear()
        streamer, ids_1T = Noted(), torch.arange(9)[None]
        output = generate_one(
            model, ids_1T, streamer=streamer, logits_processor=[process], stopping_criteria=[Stop()],
            return_dict_in_generate=True, output_scores=True, output_logits=True, **more,
        )  # fmt: skip
        found.append((output.sequences.tolist(), list(calls), streamer.got, len(output.scores), len(output.logits)))
        found[-1] += (torch.stack(output.scores), torch.stack(output.logits))
    assert found[0][:-2] == found[1][:-2] and found[0][3] == 31
    for plain, drafted in zip(found[0][-2:], found[1][-2:], strict=True):
        torch.testing.assert_close(drafted, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", ["whole", "new", "embedded"])
def test_going_on_from_a_cache_and_from_embeddings(make: Make, given: str) -> None:
    model = make()
    ids_BT, mask_BT = left_padded()
    text_BT, more_BT = torch.cat([ids_BT, prompt(3, 2)], 1), torch.nn.functional.pad(mask_BT, (0, 2), value=1)
    expected = whole(model, text_BT, attention_mask=more_BT)
    if given == "embedded":
        got = generate(
            model, None, inputs_embeds=model.model.embed_tokens(text_BT).detach(), attention_mask=more_BT, **DRAFTS
        )
    else:
        model.model.policy.set_limits(0.0)
        with torch.no_grad():
            cache = model(ids_BT, attention_mask=mask_BT, use_cache=True).past_key_values
        model.set_budget()
        ids = text_BT if given == "whole" else text_BT[:, 9:]
        got = generate(model, ids, attention_mask=more_BT, past_key_values=cache, **DRAFTS)
        assert cache.num_columns == 11 + 39
    assert torch.equal(got[:, -40:], expected[:, -40:])
    assert 0 < report_of(model).num_accepted < report_of(model).num_drafted
