"""How well a model predicts held-out text, and what that took.

B sequences, T columns, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from midskip.cost import Meter, dense_flops
from midskip.data import TokenWindows
from midskip.data.corpus import progress_bar
from midskip.model import MidskipForCausalLM
from midskip.report import TokenDepth


@torch.no_grad()
def evaluate(
    model: MidskipForCausalLM,
    windows: TokenWindows,
    token_bytes: Tensor | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, Any]:
    """Loss and work on every window, without any regulariser.

    Args:
        windows: held-out text, made with `drop_last=False` so that every token counts.
        token_bytes: int64 [V], bytes of text each token stands for; without it there are no bits per byte.

    Returns:
        loss: mean cross-entropy in nats of the tokens predicted; perplexity; bits_per_byte of the text they stand for;
        num_tokens: valid tokens that went in; executed_share: share of block-tokens that ran; share_by_layer [L];
        tokens_by_blocks [L + 1]: share of the tokens that ran 0, 1, ... L blocks; flops_per_token and
        dense_flops_per_token: of a forward pass, causal convention, as metered and with nothing skipped.
    """
    num_layers, device = model.config.num_hidden_layers, model.device
    nats = num_bytes = num_targets = dense = 0
    present_L, by_blocks = torch.zeros(num_layers), torch.zeros(num_layers + 1)
    was_training = model.training
    model.eval()
    with Meter(model) as meter:
        starts = range(0, len(windows), batch_size)
        for start in progress_bar(starts, "Evaluating", progress):
            rows = [windows[i] for i in range(start, min(start + batch_size, len(windows)))]
            batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
            output = model(**batch)
            labels = batch["labels"][:, 1:]
            scored = labels != -100
            nats += output.loss.item() * int(scored.sum())
            num_targets += int(scored.sum())
            num_bytes += int(token_bytes[labels[scored].cpu()].sum()) if token_bytes is not None else 0
            valid_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            present_LN = output.gates[:, valid_BT] > 0
            present_L += present_LN.sum(1).cpu()
            by_blocks += torch.bincount(present_LN.sum(0).cpu(), minlength=num_layers + 1)
            dense += dense_flops(model.config, valid_BT.sum(1).tolist()).total
    model.train(was_training)
    loss = nats / num_targets
    result = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "num_tokens": meter.num_tokens,
        "executed_share": meter.executed_share,
        "share_by_layer": (present_L / meter.num_tokens).tolist(),
        "tokens_by_blocks": (by_blocks / meter.num_tokens).tolist(),
        "flops_per_token": meter.flops().total / meter.num_tokens,
        "dense_flops_per_token": dense / meter.num_tokens,
    }
    if num_bytes:
        result["bits_per_byte"] = nats / math.log(2) / num_bytes
    return result


@torch.no_grad()
def depth_of_tokens(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> list[TokenDepth]:
    """Text, blocks run, gates and loss (of predicting it, in nats) of every token of one sequence."""
    ids_1T = torch.tensor([list(ids)], device=model.device)
    output = model(ids_1T)
    losses = -output.logits[0, :-1].float().log_softmax(-1).gather(1, ids_1T[0, 1:, None]).squeeze(1)
    gates_TL = output.gates[:, 0].T.cpu()
    return [
        TokenDepth(str(tokenizer.decode([token])), int((gates_L > 0).sum()), loss, tuple(gates_L.tolist()))
        for token, gates_L, loss in zip(ids, gates_TL, [None, *losses.tolist()], strict=True)
    ]
