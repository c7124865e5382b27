"""Text that is generated: against a computation by hand, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from midskip import MidskipForCausalLM
from midskip.evaluate import depth_of_tokens
from midskip.generate import blocks_counted, generate

MakeModel = Callable[..., MidskipForCausalLM]


@torch.no_grad()
def test_without_temperature_each_token_is_the_most_likely(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer("the cat")["input_ids"]
    prompt_length = len(ids)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in ids
    for seed in (0, 1):
        assert generate(model, tokenizer, "the cat", 8, temperature=0, seed=seed) == ids
    assert generate(model, tokenizer, "the cat", 8, temperature=1.0, top_k=1, seed=5) == ids
    assert len(set(ids[prompt_length:])) > 1
    # a configuration that draws otherwise, as the pretrained model's may, stays what it is and does not count
    model.generation_config.update(repetition_penalty=9.0, top_p=0.01)
    assert generate(model, tokenizer, "the cat", 8, temperature=0) == ids
    assert len({tuple(generate(model, tokenizer, "the cat", 8, 9.0, 0, seed)) for seed in range(3)}) > 1
    assert model.generation_config.repetition_penalty == 9.0


@torch.no_grad()
def test_a_token_with_the_pads_id_is_no_pad(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """As in models without a pad of their own, where 0 or any token may stand for it."""
    ids = tokenizer("the cat")["input_ids"]
    model.config.pad_token_id, model.generation_config.eos_token_id = ids[-1], None
    expected = list(ids)
    for _ in range(3):
        expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert generate(model, tokenizer, "the cat", 3, temperature=0) == expected


def test_the_seed_decides_the_draw(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def draw(seed: int, **settings: Any) -> list[int]:
        torch.rand(5)  # the caller's generator is no part of it
        return generate(model, tokenizer, "the cat", 12, seed=seed, **settings)

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in range(4)}) == 4
    assert draw(3, temperature=0.001, top_k=0) == generate(model, tokenizer, "the cat", 12, temperature=0)
    prompt = tokenizer("the cat")["input_ids"]
    assert draw(3)[: len(prompt)] == prompt and len(draw(3)) <= len(prompt) + 12


@torch.no_grad()
def test_a_text_may_end_before_its_limit(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].expand(len(tokenizer), -1))
    state_D = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, 0]  # the same whatever the tokens
    model.lm_head.weight.zero_()[tokenizer.eos_token_id] = state_D
    ids = generate(model, tokenizer, "the cat", 8, temperature=0)
    assert ids == [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("use_cache", [True, False])
def test_blocks_are_counted_as_the_text_is_made(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, use_cache: bool
) -> None:
    ids_1T = torch.tensor([tokenizer("the cat")["input_ids"]])
    with blocks_counted(model) as blocks:
        whole = model.generate(ids_1T, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=use_cache)  # pyright: ignore[reportAttributeAccessIssue]
    expected = [token.blocks for token in depth_of_tokens(model, tokenizer, whole[0].tolist())]
    assert blocks == expected[:-1] and len(set(blocks)) > 1
    with pytest.raises(ValueError, match="blocks are counted of one sequence, and a pass has 2"), blocks_counted(model):
        model(ids_1T.expand(2, -1))


def test_a_prompt_of_the_greatest_length_is_taken(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = "z" * 63  # as many tokens, and the model takes 64
    assert len(tokenizer(prompt)["input_ids"]) == 63
    assert len(generate(model, tokenizer, prompt, 1)) == 64
    message = r"the prompt has 63 tokens and 2 more .* at most 64 together: shorten the prompt or ask for at most 1"
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompt, 2)
    with pytest.raises(ValueError, match=r"the prompt has 70 tokens .* shorten the prompt to at most 63 tokens"):
        generate(model, tokenizer, "z" * 70, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "the prompt is empty; give at least one character"),
        ({"prompt": "a\udcff"}, "the prompt is not Unicode text"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0 .*expected at least 1"),
        ({"top_k": -1}, r"top_k -1; expected at least 1 and 0"),
        ({"temperature": -0.5}, r"temperature is -0\.5; expected 0, or a number from 0\.001 up"),
        ({"temperature": 1e-40}, "temperature is 1e-40; expected"),
        ({"temperature": math.nan}, "temperature is nan; expected"),
        ({"temperature": math.inf}, "temperature is inf; expected"),
        ({"seed": -1}, r"seed is -1; expected a number from 0"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; expected"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, **({"prompt": "the cat"} | settings))
