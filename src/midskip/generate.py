"""Text from a trained model, and how deep each of its tokens went.

N tokens of a pass.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from midskip.model.modeling import MidskipForCausalLM


def generate(
    model: MidskipForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    draft_budget: float | None = None,
) -> list[int]:
    """The token ids of the prompt and of what the model goes on with.

    Of the model's `generation_config` only `eos_token_id` counts.

    Args:
        temperature: 0 for the most likely token each time; above, tokens are drawn, more freely the higher it is. From
            0.001 up: below that logits overflow.
        top_k: draw among that many most likely tokens; 0 for all.
        seed: of the draw.
        draft_budget: of lossless drafts, with temperature 0; see `MidskipForCausalLM.generate`.

    Raises:
        ValueError: an empty prompt, one that leaves no room for `max_new_tokens`, or a setting out of range.
    """
    if max_new_tokens < 1 or top_k < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and top_k {top_k}; expected at least 1 and 0")
    if temperature != 0 and not 0.001 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected 0, or a number from 0.001 up")
    if draft_budget is not None and temperature != 0:
        raise ValueError(
            f"temperature is {temperature} and draft_budget is for the most likely tokens: give temperature 0, or no "
            "draft_budget"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected a number from 0 to below 2**63")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not Unicode text: {error}") from error
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    room = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > room:
        fewer = f" or ask for at most {room - len(ids)}" if len(ids) < room else f" to at most {room - 1} tokens"
        raise ValueError(
            f"the prompt has {len(ids)} tokens and {max_new_tokens} more were asked for, but the model takes at most "
            f"{room} together: shorten the prompt{fewer}"
        )
    torch.manual_seed(seed)
    draw = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    ids_1T = torch.tensor([ids], device=model.device)
    with _own_configuration_aside(model):
        output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),  # else transformers takes a token of the pad's id for a pad
            max_new_tokens=max_new_tokens,
            pad_token_id=model.config.pad_token_id or 0,
            use_cache=True,  # whatever the configuration says
            draft_budget=draft_budget,
            **draw,
        )
    return output[0].tolist()


@contextmanager
def _own_configuration_aside(model: MidskipForCausalLM) -> Iterator[None]:
    """Of the model's `generation_config`, which may penalise repetition or set `top_p`, only `eos_token_id` counts."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id if own else None)
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def blocks_counted(model: MidskipForCausalLM) -> Iterator[list[int]]:
    """Gives a list that holds, after the block, how many blocks each token of the one sequence has run that was
    generated in it, without pads. The last token that `generate` gives is not run, and so not in it.

    Raises:
        ValueError: in a pass over several sequences, as beams are.
    """
    counts: list[Tensor] = []  # of each pass, int64 [N]
    blocks: list[int] = []

    def count(_: nn.Module, arguments: tuple[Any, ...], decision: Any) -> None:
        layer, h_ND, _, batch = arguments
        if layer == 0:
            if len(batch.seqlens) != 1:
                raise ValueError(f"blocks are counted of one sequence, and a pass has {len(batch.seqlens)}")
            if batch.first_column < sum(map(len, counts)):  # columns were taken back, or there is no cache
                counts[:] = [torch.cat(counts)[: batch.first_column]]
            counts.append(torch.zeros(len(h_ND), dtype=torch.int64, device=h_ND.device))
        counts[-1] += 1 if decision.keep_N is None else decision.keep_N

    hook = model.model.policy.register_forward_hook(count)
    try:
        yield blocks
    finally:
        hook.remove()
        blocks += torch.cat(counts).tolist() if counts else []
