"""`generate()` with a cache gives what it gives without one, in every way that it can be asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    QuantizedCache,
    StaticCache,
    TextIteratorStreamer,
)
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from midskip import MidskipForCausalLM
from midskip.model.cache import SkipCache
from midskip.model.packing import PackedBatch
from midskip.policies import Decision
from midskip.policies.middle_out import MiddleOut

Make = Callable[..., MidskipForCausalLM]
SKIPPED_KV = pytest.mark.parametrize("skipped_kv", ["drop", "keep"])


def prompt(*shape: int) -> Tensor:
    return torch.randint(31, shape)


def left_padded() -> tuple[Tensor, Tensor]:
    mask_BT = torch.ones(4, 9, dtype=torch.long)
    mask_BT[1, :4] = mask_BT[2, :8] = mask_BT[3, :1] = 0
    return prompt(4, 9), mask_BT


def generate(model: MidskipForCausalLM, ids_BT: Tensor | None = None, **options: Any) -> Tensor:
    torch.manual_seed(1)
    return model.generate(ids_BT, **{"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0} | options)


def count_columns(model: MidskipForCausalLM) -> list[int]:
    """The number of columns of every pass from now on."""
    counts: list[int] = []

    def note(_: Any, arguments: tuple, keywords: dict) -> None:
        given = keywords.get("input_ids", arguments[0] if arguments else None)
        counts.append(keywords["inputs_embeds"].shape[1] if given is None else given.shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return counts


# ---- the same as without


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "sampling-several": {"do_sample": True, "num_return_sequences": 3, "top_k": 10, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "beams-several": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beams-sampled": {"num_beams": 3, "do_sample": True},
    "beams-that-stop": {"num_beams": 3, "eos_token_id": 7, "early_stopping": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunked-prefill": {"prefill_chunk_size": 4},
    "one-token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize(
    ("way", "padded", "skipped_kv"),
    [
        *((way, True, "drop") for way in WAYS),
        ("greedy", False, "drop"),
        ("chunked-prefill", False, "drop"),
        ("greedy", True, "keep"),
        ("beams-several", True, "keep"),
    ],
)
def test_it_is_the_same_without_a_cache(make_model: Make, way: str, padded: bool, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = left_padded() if padded else (prompt(2, 9), None)
    options = WAYS[way] | {"attention_mask": mask_BT}
    without = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    expected = generate(model, ids_BT, use_cache=False, **without)
    counts = count_columns(model)
    assert torch.equal(generate(model, ids_BT, **options), expected)
    prefill = [4, 4, 1] if way == "chunked-prefill" else [9]
    assert counts[: len(prefill)] == prefill and set(counts[len(prefill) :]) <= {1}
    assert (expected[:, 9:] > 0).sum() > expected.shape[0] / 2  # some text came


@SKIPPED_KV
def test_a_prompt_of_one_token_and_the_whole_length(make_model: Make, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT = prompt(2, 1)
    expected = generate(model, ids_BT, max_new_tokens=64, use_cache=False)
    assert expected.shape == (2, 65) and torch.equal(generate(model, ids_BT, max_new_tokens=64), expected)


@SKIPPED_KV
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_that_finish_early(make_model: Make, skipped_kv: str, beams: int) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = left_padded()
    unstopped = generate(model, ids_BT, attention_mask=mask_BT, use_cache=False)[:, 9:]
    ends = {token: [row.tolist().index(token) if token in row else 20 for row in unstopped] for token in range(1, 31)}
    eos = max(ends, key=lambda token: len(set(ends[token])))  # the token that most rows meet at different steps
    assert len(set(ends[eos])) >= 3 and min(ends[eos]) < 20
    options = {"attention_mask": mask_BT, "eos_token_id": eos, "num_beams": beams}
    got = generate(model, ids_BT, **options)
    assert torch.equal(got, generate(model, ids_BT, use_cache=False, **options))
    if beams == 1:
        stops = [(row == eos).nonzero()[0].item() if eos in row else 20 for row in got[:, 9:]]
        assert stops == ends[eos]


@SKIPPED_KV
def test_scores_are_the_same(make_model: Make, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = left_padded()
    options = {"attention_mask": mask_BT, "return_dict_in_generate": True, "output_logits": True}
    with_cache: Any = generate(model, ids_BT, **options)
    without: Any = generate(model, ids_BT, use_cache=False, **options)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), rtol=0, atol=1e-5)
    assert isinstance(with_cache.past_key_values, SkipCache) and without.past_key_values is None
    assert with_cache.past_key_values.num_columns == 9 + 19  # the last token is given and not read


@SKIPPED_KV
@pytest.mark.parametrize("assistant", ["lookup", "twin", "another"])
def test_assisted(make_model: Make, assistant: str, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_1T = prompt(1, 4).repeat(1, 3)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if assistant != "lookup":
        layers = 4 if assistant == "twin" else 2  # the other is hardly ever right, and tokens are taken back
        options = {"assistant_model": make_model("mixed", skipped_kv=skipped_kv, num_hidden_layers=layers).eval()}
    expected = generate(model, ids_1T, use_cache=False)
    counts = count_columns(model)
    assert torch.equal(generate(model, ids_1T, **options), expected)
    assert max(counts[1:]) > 1  # more than one token was proposed


# ---- a cache that is handed on


@SKIPPED_KV
@pytest.mark.parametrize("whole", [False, True])
def test_going_on_from_a_cache(make_model: Make, skipped_kv: str, whole: bool) -> None:
    """With the whole text so far, or with the new tokens alone and a mask over all."""
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = left_padded()
    first: Any = generate(model, ids_BT, attention_mask=mask_BT, max_new_tokens=5, return_dict_in_generate=True)
    text_BT = torch.cat([first.sequences, prompt(len(ids_BT), 3)], 1)
    more_BT = torch.nn.functional.pad(mask_BT, (0, 8), value=1)
    expected = generate(model, text_BT, attention_mask=more_BT, use_cache=False)
    counts = count_columns(model)
    given = text_BT if whole else text_BT[:, first.past_key_values.num_columns :]
    got = generate(model, given, attention_mask=more_BT, past_key_values=first.past_key_values)
    assert torch.equal(got[:, given.shape[1] :], expected[:, text_BT.shape[1] :])
    assert counts == [4] + [1] * 19
    assert first.past_key_values._is_user_defined  # on Apple's GPUs transformers takes a step back in such a cache


@SKIPPED_KV
def test_a_cached_prompt_serves_many(make_model: Make, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    shared_1T = prompt(1, 8)
    with torch.no_grad():
        cache = model(shared_1T, use_cache=True).past_key_values
    for _ in range(2):
        text_1T = torch.cat([shared_1T, prompt(1, 3)], 1)
        got = generate(model, text_1T, past_key_values=copy.deepcopy(cache))
        assert torch.equal(got, generate(model, text_1T, use_cache=False))
    assert cache.num_columns == 8
    cache.batch_repeat_interleave(3)
    text_BT = torch.cat([shared_1T.expand(3, -1), prompt(3, 2)], 1)
    assert torch.equal(generate(model, text_BT, past_key_values=cache), generate(model, text_BT, use_cache=False))


def test_new_tokens_alone_need_a_mask(make_model: Make) -> None:
    """transformers takes what it is given for the whole text then, and cuts off as many columns as were cached."""
    model = make_model("mixed").eval()
    with torch.no_grad():
        cache = model(prompt(1, 8), use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match="with at least one token: in generate\\(\\), give the whole text so far, or an at"
    ):
        generate(model, prompt(1, 3), past_key_values=cache)
    assert cache.num_columns == 8


# ---- other ways in and out


@SKIPPED_KV
def test_from_embeddings(make_model: Make, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = left_padded()
    embedded_BTD = model.model.embed_tokens(ids_BT).detach()
    expected = generate(model, ids_BT, attention_mask=mask_BT, use_cache=False)[:, 9:]
    assert torch.equal(generate(model, inputs_embeds=embedded_BTD, attention_mask=mask_BT), expected)


@SKIPPED_KV
def test_streaming(make_model: Make, learnt: PreTrainedTokenizerFast, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv, vocab_size=len(learnt)).eval()
    ids_1T = torch.randint(3, len(learnt), (1, 6))
    expected = generate(model, ids_1T, use_cache=False)
    streamer: Any = TextIteratorStreamer(learnt, skip_prompt=True, timeout=60)
    thread = Thread(target=generate, args=(model, ids_1T), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == learnt.decode(expected[0, 6:]) and text


def test_the_setting_of_the_model(make_model: Make) -> None:
    ids_BT = prompt(1, 5)
    for use_cache, columns in ((True, [5, 1, 1, 1]), (False, [5, 6, 7, 8])):
        model = make_model(use_cache=use_cache).eval()
        counts = count_columns(model)
        generate(model, ids_BT, max_new_tokens=4)
        assert counts == columns


# ---- refusals


def caches(model: MidskipForCausalLM) -> list[Any]:
    quantized = QuantizedCache.__new__(QuantizedCache)  # its backend is another package, not needed to be refused
    return [DynamicCache(), StaticCache(config=model.config, max_cache_len=40), quantized, ((prompt(1),),)]


def test_other_caches_are_refused_by_name(make_model: Make) -> None:
    model = make_model().eval()
    counts = count_columns(model)
    for cache in caches(model):
        message = f"past_key_values is a {type(cache).__name__}; midskip's own .*give a SkipCache"
        with pytest.raises(ValueError, match=message):
            generate(model, prompt(1, 4), past_key_values=cache)
        assert not counts
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(prompt(1, 4), past_key_values=cache)
        counts.clear()


def test_drafts_of_the_first_layers_alone_are_refused(make_model: Make) -> None:
    model = make_model(policy="early_exit").eval()
    with pytest.raises(ValueError, match=r"assistant_early_exit drafts with .* draft_budget"):
        generate(model, prompt(1, 4), assistant_early_exit=2)
    assert model.config.num_hidden_layers == len(model.model.layers)


@pytest.mark.filterwarnings("ignore:.*cache_implementation.*")
def test_every_cache_implementation_is_refused_by_name(make_model: Make) -> None:
    model = make_model().eval()
    counts = count_columns(model)
    plain = model.generation_config
    for kind in (*ALL_CACHE_IMPLEMENTATIONS, "paged"):
        message = f"cache_implementation is '{kind}'; midskip has one kind of cache"
        with pytest.raises(ValueError, match=message):
            generate(model, prompt(1, 4), cache_implementation=kind)
        config = GenerationConfig(max_new_tokens=2, cache_implementation=kind)
        with pytest.raises(ValueError, match=message):
            model.generate(prompt(1, 4), config)
        model.generation_config = config
        with pytest.raises(ValueError, match=message):
            model.generate(prompt(1, 4))
        model.generation_config = plain
    assert not counts


def test_pads_on_the_right_are_refused(make_model: Make) -> None:
    ids_BT, mask_BT = prompt(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"pad on the left \(tokenizer.padding_side = 'left'\)"):
            generate(make_model().eval(), ids_BT, attention_mask=mask_BT, use_cache=use_cache)


def test_drafts_of_the_prompt_are_no_more_than_fit(make_model: Make) -> None:
    model = make_model().eval()
    ids_BT = prompt(1, 28).repeat(1, 2)
    plain = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    assert torch.equal(model.generate(ids_BT, **plain, prompt_lookup_num_tokens=10), model.generate(ids_BT, **plain)), (
        "65 tokens, of which the model reads 64"
    )


def test_continuous_batching_is_refused(make_model: Make) -> None:
    model = make_model().eval()
    with pytest.raises(ValueError, match=r"continuous batching .* give generate\(\) a padded batch"):
        model.generate_batch(inputs=[[3, 4, 5], [6, 7]])


def test_more_than_the_model_takes_is_refused_before_it_begins(make_model: Make) -> None:
    model = make_model().eval()
    counts = count_columns(model)
    embedded_BTD = model.model.embed_tokens(prompt(2, 9)).detach()
    message = "prompt and new tokens make 66 tokens; this model takes at most 64 and one more that it gives and does"
    for given in (
        {"inputs": prompt(2, 9)},
        {"inputs": prompt(2, 9), "use_cache": False},
        {"inputs_embeds": embedded_BTD},
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**given, max_new_tokens=57, pad_token_id=0)
    assert not counts
    model.generate(prompt(2, 9), max_new_tokens=56, pad_token_id=0)


# ---- a policy that reads a token's past


class LooksBack(MiddleOut):
    """Adds to each token the embedding of the one before."""

    looks_back = True

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        before_ND = torch.where(batch.index_in_sequence_N[:, None] > 0, h_ND.roll(1, 0), 0)
        return super().decide(layer, h_ND + before_ND, state, batch)


@SKIPPED_KV
def test_a_policy_that_looks_back_runs_without(make_model: Make, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv, policy=f"{__name__}:LooksBack").eval()
    ids_BT, mask_BT = left_padded()
    expected = generate(model, ids_BT, attention_mask=mask_BT, use_cache=False)
    counts = count_columns(model)
    assert torch.equal(generate(model, ids_BT, attention_mask=mask_BT), expected)
    assert counts == list(range(9, 29))
    with torch.no_grad(), pytest.raises(ValueError, match="the policy LooksBack looks at a token's past"):
        model(ids_BT, use_cache=True)
    with pytest.raises(ValueError, match="the policy LooksBack looks at a token's past"):
        generate(model, ids_BT, past_key_values=SkipCache(model.config))
    with pytest.raises(ValueError, match="give input_ids: the policy looks back and runs without a cache"):
        generate(model, inputs_embeds=model.model.embed_tokens(ids_BT).detach())
