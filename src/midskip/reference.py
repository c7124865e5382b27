"""The reference implementation: the model's equations on full rectangles, gates multiplied in, nothing skipped.

One row at a time: T valid tokens, D width, H query heads, G key heads, K head width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from midskip.model.config import PARTS
from midskip.model.layers import Block, RMSNorm
from midskip.model.modeling import MidskipForCausalLM
from midskip.model.packing import PackedBatch
from midskip.model.skip_path import SkipPath
from midskip.policies import Policy
from midskip.policies.difficulty import NUM_KINDS, PRIOR
from midskip.policies.middle_out import LARGEST_EXPONENT, MiddleOut


@dataclass
class ReferenceOutput:
    """The fields of the model's own output, 0 at pads."""

    loss: Tensor | None
    logits: Tensor  # [B, T, V]
    gates: Tensor  # [L, B, T]
    depth_scores: Tensor | None  # [ceil(L/2), B, T]; scores go on growing past 1
    hidden_states: Tensor  # [blocks + 1, B, T, D], the last one after the last norm
    readiness: Tensor | None = None  # [L, B, T], of a policy that tells one, 0 in layers without; see `Decision`


def reference_forward(
    model: MidskipForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> ReferenceOutput:  # fmt: skip
    """The results of `model(input_ids, attention_mask, position_ids, labels=labels)` and its gradients, the slow way.

    The policy `middle_out` is written out here again; any other is asked through `decide`, one document at a time.
    """
    valid_BT = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    config = model.config
    shape = input_ids.shape
    dtype = model.lm_head.weight.dtype
    logits = torch.zeros(*shape, config.vocab_size, dtype=dtype)
    gates = torch.zeros(config.num_skip_units, *shape, dtype=dtype)
    hidden = torch.zeros(config.num_hidden_layers + 1, *shape, config.hidden_size, dtype=dtype)
    scores, readiness, losses = [], [], []
    for b in range(shape[0]):
        columns = valid_BT[b].nonzero().squeeze(1)
        if not len(columns):
            continue
        position_T = torch.arange(len(columns)) if position_ids is None else position_ids.expand(shape)[b, columns]
        run = _run_row(model, input_ids[b, columns], position_T)
        put = torch.zeros(shape[1], len(columns), dtype=dtype)
        put[columns, torch.arange(len(columns))] = 1
        one_hot = torch.zeros(shape[0], dtype=dtype)
        one_hot[b] = 1
        logits = logits + torch.einsum("b,tc,cv->btv", one_hot, put, run.logits)
        gates = gates + torch.einsum("b,tc,lc->lbt", one_hot, put, run.gates)
        hidden = hidden + torch.einsum("b,tc,lcd->lbtd", one_hot, put, run.hidden_states)
        if run.depth_scores is not None:
            scores.append(torch.einsum("b,tc,lc->lbt", one_hot, put, run.depth_scores))
        if run.readiness is not None:
            readiness.append(torch.einsum("b,tc,lc->lbt", one_hot, put, run.readiness))
        if labels is not None:
            for here, after in zip(range(shape[1] - 1), range(1, shape[1]), strict=True):
                if valid_BT[b, here] and valid_BT[b, after] and labels[b, after] != -100:
                    row = run.logits[int((columns == here).nonzero())]
                    losses.append(torch.logsumexp(row, 0) - row[labels[b, after]])
    loss = None if labels is None else (torch.stack(losses).mean() if losses else logits.sum() * 0)
    depth_scores, told = (torch.stack(found).sum(0) if found else None for found in (scores, readiness))
    return ReferenceOutput(loss, logits, gates, depth_scores, hidden, told)


def _run_row(model: MidskipForCausalLM, ids_T: Tensor, position_T: Tensor) -> ReferenceOutput:
    config, body = model.config, model.model
    x_TD = body.embed_tokens.weight[ids_T]
    if isinstance(body.embed_layernorm, RMSNorm):
        x_TD = _rms_norm(x_TD, body.embed_layernorm)
    turn_TK = torch.polar(
        torch.full((len(ids_T), config.head_dim // 2), body.rotary.attention_factor, dtype=x_TD.dtype),
        position_T[:, None].to(x_TD.dtype) * body.rotary.inv_freq.to(x_TD.dtype),
    )
    documents = _documents(position_T)
    sees_TT = torch.zeros(len(ids_T), len(ids_T), dtype=torch.bool)
    for document in documents:
        for t in document:
            sees_TT[t, document[0] : t + 1] = True
    hidden, gates, scores, told = [x_TD], [], [], []
    asked: list[tuple[dict[str, Any], PackedBatch]] = []
    for document in documents:
        batch = PackedBatch.from_rectangle(torch.ones(1, len(document), dtype=torch.bool), position_T[None, document])
        batch.token_N = ids_T[document]
        asked.append(({}, batch))
    priority_T = _priorities(body.policy, ids_T, documents).to(x_TD.dtype)
    for block in body.layers:
        assert isinstance(block, Block)
        for part in PARTS[config.skip_unit]:
            layer = len(gates)
            if isinstance(body.policy, MiddleOut):
                is_first_T = position_T < body.policy.first_tokens
                given = x_TD, priority_T, is_first_T
                output_gate_T = key_gate_T = _middle_out_gate(body.policy, layer, *given, scores, gates)
                taking_T = (scores[-1] >= 1) & (scores[-2] < 1 if len(scores) > 1 else True)
                if body.policy.is_hard:
                    key_gate_T = key_gate_T.detach()  # the surrogate gradient is of what a block adds, not of its keys
            else:
                pairs = [
                    _decided_gates(body.policy, layer, x_TD[document], state, batch)
                    for document, (state, batch) in zip(documents, asked, strict=True)
                ]
                output_gate_T, key_gate_T, taking_T, readiness_T = map(torch.cat, zip(*pairs, strict=True))
                told.append(readiness_T)
            gates.append(output_gate_T)
            before_TD = x_TD
            if config.skipped_kv == "keep":
                key_gate_T = torch.ones_like(key_gate_T)
            if part != "feed_forward":
                x_TD = _attention(block, x_TD, output_gate_T, key_gate_T, turn_TK, sees_TT, config.head_dim)
            if part != "attention":
                x_TD = _feed_forward(block, x_TD, output_gate_T)
            if str(layer) in body.skip_paths:
                path = body.skip_paths[str(layer)]
                assert isinstance(path, SkipPath)
                x_TD = x_TD + taking_T.to(x_TD.dtype)[:, None] * _skip_path(path, before_TD)
        hidden.append(x_TD)
    hidden[-1] = _rms_norm(x_TD, body.norm)
    logits_TV = hidden[-1] @ model.lm_head.weight.T
    depth_scores = torch.stack(scores) if scores else None
    readiness = torch.stack(told) if told and body.policy.is_hard else None
    return ReferenceOutput(None, logits_TV, torch.stack(gates), depth_scores, torch.stack(hidden), readiness)


def _documents(position_T: Tensor) -> list[list[int]]:
    """The tokens of each document of a row: a position that does not rise starts a new one."""
    documents: list[list[int]] = []
    before = -1
    for t, position in enumerate(position_T.tolist()):
        if not documents or position <= before:
            documents.append([])
        documents[-1].append(t)
        before = position
    return documents


def _decided_gates(
    policy: Policy, layer: int, x_TD: Tensor, state: dict[str, Any], batch: PackedBatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gates of outputs and of keys as the policy decides on one document, 0 where a token is not kept, how far each
    takes the skip path, and its readiness to skip."""
    decision = policy.decide(layer, x_TD, state, batch)
    present_T = x_TD.new_ones(len(x_TD)) if decision.keep_N is None else decision.keep_N.to(x_TD.dtype)
    output_gate_T, key_gate_T = (
        present_T if gate is None else torch.where(present_T > 0, gate.to(x_TD.dtype), 0)
        for gate in (decision.output_gate_N, decision.key_gate_N)
    )
    taking_T = 1 - output_gate_T if decision.skip_path_N is None else decision.skip_path_N.to(x_TD.dtype)
    readiness_T = torch.zeros_like(x_TD[:, 0]) if decision.readiness_N is None else decision.readiness_N.to(x_TD.dtype)
    return output_gate_T, key_gate_T, taking_T, readiness_T


def _priorities(policy: Policy, ids_T: Tensor, documents: list[list[int]]) -> Tensor:
    """What hard gates that go by tokens go by: a number drawn for each pair of a token and the one before it; or the
    excess of its loss expected from what `Difficulty` has seen, the mean of the pair, drawn towards that of the token
    alone, drawn towards 0."""
    priority_T = torch.zeros(len(ids_T), dtype=torch.float64)
    if not isinstance(policy, MiddleOut) or policy.weight is not None:
        return priority_T
    is_own = type(policy).priority is not MiddleOut.priority  # of a subclass, which alone knows it
    for document in documents:
        if is_own:
            token_T = ids_T[document]
            previous_T = torch.cat([token_T.new_tensor([-1]), token_T[:-1]])
            priority_T[document] = policy.priority(token_T, previous_T).to(torch.float64)
            continue
        previous = -1
        for t in document:
            token = int(ids_T[t])
            pair = _hash(token, previous)
            if policy.difficulty is None:
                priority_T[t] = (pair >> 11) / 2**18 - 2
            else:
                for seen_2K, kind in zip(policy.difficulty.seen, (token, pair), strict=True):
                    total, count = seen_2K[:, kind % NUM_KINDS].tolist()
                    priority_T[t] = (total + PRIOR * priority_T[t]) / (count + PRIOR)
            previous = token
    return priority_T


def _hash(token: int, previous: int) -> int:
    mixed = (token + 1) * 2654435761 + (previous + 2) * 2246822519
    for multiplier in (668265263, 374761393):
        mixed %= 2**31
        mixed = (mixed ^ (mixed >> 15)) * multiplier
    mixed %= 2**31
    return mixed ^ (mixed >> 13)


def _middle_out_gate(
    policy: MiddleOut, layer: int, x_TD: Tensor, priority_T: Tensor, is_first_T: Tensor, scores: list[Tensor],
    gates: list[Tensor],
) -> Tensor:  # fmt: skip
    """Appends the depth score of this layer to `scores` in the first half; the mirrored gate in the second."""
    if layer >= policy.num_gates:
        return gates[policy.num_layers - 1 - layer]
    bias = policy.bias[layer]
    if policy.weight is None:
        score_T = policy.score_scale * torch.exp((bias - priority_T).clamp(max=LARGEST_EXPONENT))
    elif policy.is_hard:
        weight_D = policy.weight[layer]
        y_TD = x_TD.detach()  # hidden states learn nothing from the surrogate gradient
        if policy.has_linear_gates:
            number_T = -(y_TD @ weight_D) / y_TD.pow(2).mean(-1).sqrt()
        else:
            cosine_T = (y_TD @ weight_D) / (y_TD.pow(2).sum(-1).sqrt() * weight_D.pow(2).sum().sqrt())
            number_T = policy.width**0.5 * cosine_T
        score_T = policy.score_scale * torch.exp((number_T + bias).clamp(max=LARGEST_EXPONENT))
    else:
        score_T = policy.score_scale * torch.relu(x_TD @ policy.weight[layer] + bias)
    if layer:
        score_T = torch.maximum(scores[-1], score_T) if policy.has_linear_gates else scores[-1] + score_T
    depth_score_T = torch.where(is_first_T, 0, score_T)
    if policy.max_layers is not None and _outer_blocks(policy, layer) > policy.max_layers:
        depth_score_T = depth_score_T.clamp(min=1)
    scores.append(depth_score_T)
    soft_T = 1 - scores[-1]
    gate_T = 1 + (soft_T - soft_T.detach()) if policy.is_hard else soft_T  # 1, with the gradient of the soft gate
    return torch.where(scores[-1] < 1, gate_T, 0)  # the slope at S = 1 is 0


def _outer_blocks(policy: MiddleOut, layer: int) -> int:
    """Blocks of a token that enters this layer of the first half."""
    return sum(min(other, policy.num_layers - 1 - other) <= layer for other in range(policy.num_layers))


def _attention(
    block: Block, x_TD: Tensor, output_gate_T: Tensor, key_gate_T: Tensor, turn_TK: Tensor, sees_TT: Tensor,
    head_width: int,
) -> Tensor:  # fmt: skip
    attention = block.self_attn
    y_TD = _rms_norm(x_TD, block.input_layernorm)
    q, k, v = (
        _linear(y_TD, projection).unflatten(-1, (-1, head_width)).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
        q, k = _rms_norm(q, attention.q_norm), _rms_norm(k, attention.k_norm)
    if not attention.rope:
        turn_TK = torch.ones_like(turn_TK)
    repeats = q.shape[0] // k.shape[0]
    q_HTK = _turn(q, turn_TK)
    k_HTK, v_HTK = _turn(k, turn_TK).repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    score_HTT = q_HTK @ k_HTK.transpose(1, 2) / head_width**0.5
    weight_HTT = torch.where(sees_TT, (score_HTT - score_HTT.amax(-1, keepdim=True).detach()).exp() * key_gate_T, 0)
    total_HT1 = weight_HTT.sum(-1, keepdim=True)
    # a token that sees nobody is not present itself: its row is multiplied by gate 0 below
    mixed_HTK = torch.where(total_HT1 > 0, weight_HTT / torch.where(total_HT1 > 0, total_HT1, 1), 0) @ v_HTK
    branch_TD = _linear(mixed_HTK.transpose(0, 1).flatten(1), attention.o_proj)
    if isinstance(block.post_attention_layernorm, RMSNorm):
        branch_TD = _rms_norm(branch_TD, block.post_attention_layernorm)
    return x_TD + output_gate_T[:, None] * branch_TD


def _feed_forward(block: Block, x_TD: Tensor, output_gate_T: Tensor) -> Tensor:
    mlp = block.mlp
    y_TD = _rms_norm(x_TD, block.pre_feedforward_layernorm)
    open_TF = y_TD @ mlp.gate_proj.weight.T
    branch_TD = (open_TF * torch.sigmoid(open_TF) * (y_TD @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    if isinstance(block.post_feedforward_layernorm, RMSNorm):
        branch_TD = _rms_norm(branch_TD, block.post_feedforward_layernorm)
    return x_TD + output_gate_T[:, None] * branch_TD


def _skip_path(path: SkipPath, x_TD: Tensor) -> Tensor:
    rms_T1 = (x_TD.pow(2).mean(-1, keepdim=True) + path.eps).sqrt()
    z_TD = x_TD / rms_T1
    if path.down is not None:
        z_TR = z_TD @ path.down.T
        z_TD = z_TR * torch.sigmoid(z_TR) if path.kind == "adapter" else z_TR
    return rms_T1 * (z_TD @ path.weight.T + path.bias)


def _linear(x: Tensor, projection: nn.Linear) -> Tensor:
    y = x @ projection.weight.T
    return y if projection.bias is None else y + projection.bias


def _rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def _turn(x_HTK: Tensor, turn_TK: Tensor) -> Tensor:
    first, second = x_HTK.chunk(2, -1)
    turned = torch.complex(first.contiguous(), second.contiguous()) * turn_TK
    return torch.cat((turned.real, turned.imag), -1)
