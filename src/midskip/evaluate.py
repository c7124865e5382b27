"""How well a model predicts held-out text, and what that took.

B windows, T columns, N = B * T places in them, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from midskip.budget.monitor import temporary_limits
from midskip.cost import Meter
from midskip.data.labelled import Items
from midskip.data.progress import progress_bar
from midskip.distributed import rank_and_world_size, sum_over_ranks
from midskip.groups import add_groups, group_sizes, results_by_group
from midskip.look import look
from midskip.model.loss import IGNORED, cross_entropy, next_targets
from midskip.model.modeling import MidskipForCausalLM
from midskip.report import TokenDepth


@contextmanager
def in_evaluation(model: MidskipForCausalLM) -> Iterator[None]:
    """Evaluation mode within; afterwards the mode of before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate(
    model: MidskipForCausalLM,
    windows: Items,
    token_bytes: Tensor | None = None,
    batch_size: int = 8,
    progress: bool = False,
    title: str = "Evaluating",
    each: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Loss and work on every window, without any regularizer, under the budget in force if there is one. This is no
    live prompt: a monitor of those does not see it.

    Where `torch.distributed` is initialised every rank has to call this, with the same windows: the batches are dealt
    out among the ranks, and each returns the numbers of them all. Weights may be copies or sharded.

    Args:
        windows: held-out text, made with `drop_last=False` so that every token counts. Dicts of `input_ids`, `labels`
            and maybe `attention_mask` and `position_ids`, each [T], as the model takes them; and maybe `group`, int64
            [T], of each token: -1 for none, else below 1024.
        token_bytes: int64 [V], bytes of text each token stands for; without it there are no bits per byte.
        batch_size: windows of a forward pass.
        progress: show a bar in a terminal, with this title, and a line now and then elsewhere.
        each: called after each batch of this rank with three float64 tensors, of its valid tokens in order: the nats of
            the prediction each made, NaN where it made none; the blocks it ran; its position, as in loss_by_position.
        console: where progress is shown; stderr by default.

    Returns:
        - num_targets: predictions that were scored; loss: their mean cross-entropy in nats; perplexity: its
          exponential; accuracy: share of them whose largest logit is the target's; bits_per_byte: of the text that the
          targets stand for;
        - num_tokens: valid tokens that went in (in windows that overlap, more than there are in the text);
          executed_share: share of block-tokens that ran; share_by_layer [L]; tokens_by_blocks [L + 1]: share of the
          tokens that ran 0, 1, ... L blocks;
        - flops_per_token, dense_flops_per_token: of a forward pass, causal convention, as metered and with nothing
          skipped; kv_bytes_per_token: of the keys and values that a cache in the model's dtype would hold of a token,
          in all layers together;
        - loss_by_position, num_targets_by_position [T]: of the predictions made by tokens at position 0, 1, ... of
          their document (of their window if there are no `position_ids`); loss_by_blocks, num_targets_by_blocks
          [L + 1]: of those made by tokens that ran 0, 1, ... L blocks. A loss is None where there is no target;
        - for windows with `group`, of the predictions made by tokens of group 0, 1, ...: accuracy_by_group,
          loss_by_group, num_targets_by_group; blocks_by_group: mean of the blocks that these tokens ran;
          depth_rank_correlation: Spearman's, of their groups and the blocks they ran, None where either is constant.

    Raises:
        ValueError: nothing to evaluate on.
    """
    if not len(windows):
        raise ValueError("there is no window to evaluate on: give more text")
    rank, world_size = rank_and_world_size()
    batches = range(0, len(windows), batch_size)
    own = batches[rank::world_size]
    sums = _Sums(model, token_bytes, each, "group" in windows[0])
    with in_evaluation(model):
        with Meter(model) as meter, temporary_limits(model):
            for start in progress_bar(own, title, progress and rank == 0, console):
                batch = batch_of(windows, range(start, min(start + batch_size, len(windows))), model.device)
                labels_BT, group_BT = batch.pop("labels"), batch.pop("group", None)
                output = model(**batch, use_cache=False)
                sums.add(output.logits, output.executed, labels_BT, group_BT, **batch)
        if len(own) * world_size < len(batches):
            # not counted: sharded weights wait for all ranks
            model(windows[0]["input_ids"][None, :1].to(model.device), use_cache=False)
    return sums.result(meter, windows[0]["input_ids"].shape[0], world_size)


def batch_of(windows: Items, rows: range, device: torch.device) -> dict[str, Tensor]:
    """Those windows as the model takes them, `labels` among them, each [B, T]."""
    items = [windows[row] for row in rows]
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


class _Sums:
    """What `evaluate` adds up: one float64 tensor on the model's device, read once, at the end."""

    def __init__(
        self, model: MidskipForCausalLM, token_bytes: Tensor | None,
        each: Callable[[Tensor, Tensor, Tensor], None] | None, has_groups: bool = False,
    ):  # fmt: skip
        self.each = each
        self.num_layers, num_positions = model.config.num_skip_units, model.config.max_position_embeddings
        self.token_bytes_V = None if token_bytes is None else token_bytes.to(model.device)
        sizes = {
            "text": 3,  # nats, bytes, targets that have the largest logit
            "metered": 5,  # tokens, rows that ran, FLOPs, dense FLOPs, keys that a cache holds
            "executed": self.num_layers, "tokens_by_blocks": self.num_layers + 1,
            "nats_by_blocks": self.num_layers + 1, "num_targets_by_blocks": self.num_layers + 1,
            "nats_by_position": num_positions, "num_targets_by_position": num_positions,
            **(group_sizes(self.num_layers) if has_groups else {}),
        }  # fmt: skip
        self.all = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=model.device)
        self.parts = dict(zip(sizes, self.all.split(list(sizes.values())), strict=True))

    def add(
        self, logits_BTV: Tensor, executed_LBT: Tensor, labels_BT: Tensor, group_BT: Tensor | None, input_ids: Tensor,
        attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
    ) -> None:  # fmt: skip
        valid_BT = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        position_BT = valid_BT.long().cumsum(1) - 1 if position_ids is None else position_ids
        target_N = next_targets(labels_BT, valid_BT).flatten()
        scored_N = target_N != IGNORED
        loss_N = cross_entropy(logits_BTV.flatten(0, 1), target_N).double()
        correct_N = logits_BTV.argmax(-1).flatten() == target_N
        blocks_N = executed_LBT.sum(0).flatten()
        position_N = torch.where(scored_N, position_BT.flatten(), 0)  # who is not scored adds 0, wherever that is
        parts = self.parts
        parts["text"][0] += loss_N.sum()
        parts["text"][2] += correct_N.sum()
        parts["executed"] += executed_LBT.sum((1, 2))
        parts["tokens_by_blocks"].index_add_(0, blocks_N, valid_BT.flatten().double())
        for name, index_N in (("blocks", blocks_N), ("position", position_N)):
            parts[f"nats_by_{name}"].index_add_(0, index_N, loss_N)
            parts[f"num_targets_by_{name}"].index_add_(0, index_N, scored_N.double())
        if self.token_bytes_V is not None:
            parts["text"][1] += (self.token_bytes_V[target_N.clamp(min=0)] * scored_N).sum()
        if group_BT is not None:
            add_groups(parts, group_BT.flatten(), blocks_N, loss_N, correct_N, scored_N)
        if self.each is not None:
            known = torch.where(scored_N, loss_N, math.nan), blocks_N.double(), position_BT.flatten().double()
            self.each(*(values_N[valid_BT.flatten()] for values_N in known))

    def result(self, meter: Meter, num_columns: int, world_size: int) -> dict[str, Any]:
        """The numbers of all ranks."""
        flops, dense_flops = meter.flops().total, meter.dense_flops().total
        metered = [meter.num_tokens, sum(meter.query_rows_L), flops, dense_flops, sum(meter.cached_rows_L)]
        self.parts["metered"].copy_(torch.tensor(metered, dtype=torch.float64))
        sum_over_ranks(self.all)
        sums = dict(zip(self.parts, self.all.cpu().split([len(part) for part in self.parts.values()]), strict=True))
        nats, num_bytes, num_correct = sums["text"].tolist()
        num_tokens, query_rows, flops, dense_flops, cached_rows = sums["metered"].tolist()
        config = meter.config
        key_bytes = 2 * config.num_key_value_heads * config.head_dim * meter.model.dtype.itemsize
        num_targets_P = sums["num_targets_by_position"]
        if not num_targets_P.any():
            raise ValueError("the windows hold no token to predict, only pads or labels of -100: give more text")
        num_targets = int(num_targets_P.sum())
        num_positions = max(num_columns, int(num_targets_P.nonzero().max()) + 1)
        loss = nats / num_targets
        result = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "accuracy": num_correct / num_targets,
            "num_tokens": int(num_tokens),
            "num_targets": num_targets,
            "executed_share": query_rows / (num_tokens * self.num_layers),
            "share_by_layer": (sums["executed"] / num_tokens).tolist(),
            "tokens_by_blocks": (sums["tokens_by_blocks"] / num_tokens).tolist(),
            "flops_per_token": flops / num_tokens,
            "dense_flops_per_token": dense_flops / num_tokens,
            "kv_bytes_per_token": cached_rows * key_bytes / num_tokens,
        }
        if num_bytes:
            result["bits_per_byte"] = nats / math.log(2) / num_bytes
        for name, length in (("blocks", self.num_layers + 1), ("position", num_positions)):
            counts = [int(count) for count in sums[f"num_targets_by_{name}"][:length].tolist()]
            nats_by = sums[f"nats_by_{name}"][:length].tolist()
            result[f"loss_by_{name}"] = [n / count if count else None for n, count in zip(nats_by, counts, strict=True)]
            result[f"num_targets_by_{name}"] = counts
        return result | (results_by_group(sums) if "tokens_by_group" in sums else {})


def depth_of_tokens(
    model: MidskipForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    ids: Sequence[int],
    positions: Sequence[int] | None = None,
) -> list[TokenDepth]:
    """Text, blocks run, gates, scores, FLOPs, and losses in nats of every token of one sequence, or of the documents
    that `positions` tell apart. A monitor of live prompts does not see it. Without a tokenizer the text is the id, and
    no loss is given: the ids are not what is to be predicted. Where a character spans several tokens, each has the text
    of all of them (`token_texts`)."""
    with temporary_limits(model):
        return look(model, tokenizer, ids, positions).tokens


def passages(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase | None, windows: Items, most: int = 4
) -> list[list[TokenDepth]]:
    """`depth_of_tokens` of some windows, evenly spread: of each of `most` parts the first that is not all pads."""
    count, found = min(most, len(windows)), []
    for part in range(count):
        for number in range(part * len(windows) // count, (part + 1) * len(windows) // count):
            window = windows[number]
            valid = window.get("attention_mask", torch.ones_like(window["input_ids"])).bool()
            if valid.any():
                ids, given = window["input_ids"][valid].tolist(), window.get("position_ids")
                positions = None if given is None else given[valid].tolist()
                found.append(depth_of_tokens(model, tokenizer, ids, positions))
                break
    return found
