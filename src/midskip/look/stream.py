"""Text that a model goes on with, token by token, with the depth of each as it comes.

T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from midskip.model.modeling import MidskipForCausalLM


def stream(
    model: MidskipForCausalLM,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    step: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[tuple[list[int], list[int]]]:
    """After the prompt, and after each new token that was run: all ids so far, and the blocks that each of them ran.
    It ends with the model's end of text, or where the model takes no more.

    Args:
        temperature: 0 for the most likely token each time.
        top_k: draw among that many most likely tokens; 0 for all.
        step: gives a context that each pass runs in, such as one of limits; what others do with the model between two
            passes does not matter.

    Raises:
        ValueError: no ids, or more than the model takes.
    """
    room = model.config.max_position_embeddings
    if not 0 < len(ids) <= room:
        raise ValueError(f"the prompt has {len(ids)} tokens; expected 1 to {room}, which is what the model takes")
    ends = model.generation_config.eos_token_id  # as `generate` has it: chat models list more there than in the config
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    looks_back = model.model.policy.looks_back  # then there is no cache, and each pass reads all anew
    generator = torch.Generator(model.device).manual_seed(seed)
    written, blocks = list(ids), []
    given, cache = torch.tensor([written], device=model.device), None
    for left in range(min(max_new_tokens, room - len(ids)), -1, -1):
        with torch.no_grad(), step():
            output = model(given, past_key_values=cache, use_cache=not looks_back, logits_to_keep=1)
        cache, logits_V = output.past_key_values, output.logits[0, -1].float()
        ran = output.executed[:, 0].sum(0).tolist()
        blocks = ran if looks_back else blocks + ran
        yield list(written), list(blocks)
        if not left or (written[-1] in ends and len(written) > len(ids)):
            return
        written.append(_drawn(logits_V, temperature, top_k, generator))
        given = torch.tensor([written if looks_back else written[-1:]], device=model.device)


def text_of_new(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> str:
    """What the tokens from `start` on add to the text of those before: no special tokens, and no bytes at the end that
    are no character yet."""
    before, after = (str(tokenizer.decode(list(part), skip_special_tokens=True)) for part in (ids[:start], ids))
    return after[len(before) :].rstrip("\ufffd")


def _drawn(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if not temperature:
        return int(logits_V.argmax())
    best_K, index_K = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    shares_K = (best_K / temperature).softmax(0)
    return int(index_K[torch.multinomial(shares_K, 1, generator=generator)])
