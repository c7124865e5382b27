"""The models: embed -> (decide -> keep -> block -> put back) for every layer -> head, over packed tokens.

B sequences, T columns, N valid tokens, P predictions, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, initialization
from transformers.generation.utils import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from midskip.budget.measured_on import calibration_of
from midskip.distributed import is_initialized
from midskip.model.cache import SkipCache, unchanged_if_broken_off
from midskip.model.config import PARTS, MidskipConfig, intermediate_sizes
from midskip.model.generation import CachedGeneration
from midskip.model.hub import CardedModel
from midskip.model.inputs import check_others, inputs_for
from midskip.model.layer_cache import LayerCache
from midskip.model.layers import Block, RMSNorm, RotaryEmbedding
from midskip.model.loss import IGNORED, cross_entropy, next_targets
from midskip.model.outputs import MidskipCausalLMOutput, MidskipModelOutput, Packed
from midskip.model.packing import PackedBatch
from midskip.model.skip_path import SkipPath, take_path
from midskip.policies import Decision, PassState, Policy, build_policy


class MidskipPreTrainedModel(CardedModel):
    config: MidskipConfig
    config_class = MidskipConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["difficulty"]  # half precision cannot count so far

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do; transformers would copy the package's files beside each model."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Policy | SkipPath):
            module.reset_parameters(initialization)
        elif isinstance(module, RotaryEmbedding):
            initialization.copy_(module.inv_freq, module.compute())
        else:
            super()._init_weights(module)


class MidskipModel(MidskipPreTrainedModel):
    """The Transformer without its head. Every pass runs on packed tokens: pads have no row, and a token that
    skips a layer has none in that layer."""

    def __init__(self, config: MidskipConfig):
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_layernorm = RMSNorm(width, eps) if config.norms == "sandwich" else nn.Identity()
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_parameters)
        self.policy = build_policy(
            config.policy, config.num_skip_units, width, config.initializer_range, config.policy_settings
        )
        self.layers = nn.ModuleList(
            Block(
                width, hidden, config.num_attention_heads, config.num_key_value_heads,
                config.head_dim, eps, config.norms, config.attention_bias, config.attention_out_bias, config.qk_norm,
                rope=config.no_rope_layers is None or bool(config.no_rope_layers[layer]),
            )
            for layer, hidden in enumerate(intermediate_sizes(config))
        )  # fmt: skip
        self.norm = RMSNorm(width, eps)
        self.policy.has_skip_paths = config.skip_path != "none"
        self.skip_paths = nn.ModuleDict(
            {str(layer): SkipPath(width, config.skip_path, config.skip_path_rank, eps)
             for layer in self.policy.skip_path_layers if self.policy.has_skip_paths}
        )  # fmt: skip
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: SkipCache | None = None,
        use_cache: bool | None = None,
        output_gates: bool = True,
        **others: Any,
    ) -> MidskipModelOutput:
        """Hidden states of every token.

        Args:
            input_ids: int64 [B, T], or `inputs_embeds` [B, T, D] instead.
            attention_mask: bool or int [B, T], 0 for pads, which may stand left or right; none by default.
            position_ids: int64 [B or 1, T], read at valid tokens only; by default each row counts its valid tokens
                from 0. If given, they also tell the documents of a row apart: a valid token whose position is not
                greater than that of the valid token before it starts a new one, and attention never crosses from one
                document to another. (transformers' models start one wherever a position is not the last plus 1, if
                given neither attention_mask nor cache; where each document counts 0, 1, 2, ..., both agree.) With a
                cache a row is one sequence, and its positions have to rise; by default they go on where it stopped.
            output_hidden_states: also give the hidden states between the blocks.
            output_gates: give `gates`, `depth_scores` and `executed`; the passes of `generate()` leave them out.
            past_key_values: a cache of the columns before these; `attention_mask`, if given, then covers both. The
                tokens that run are added to it.
            use_cache: True makes a cache if none is given. By default one is made if `config.use_cache` is True and
                gradients are off, but not for rows of several documents, nor for a policy that looks back.
            others: what else transformers' models take is accepted where Llama makes no use of it (`cache_position`,
                `token_type_ids`) and where it is None or False.

        Raises:
            ValueError: shapes that do not fit, ids outside the vocabulary, more columns or positions than
                `max_position_embeddings`, a cache that does not fit, or one used with gradients on.
            TypeError: another argument that would change the result.
        """
        check_others(others, position_ids)
        with unchanged_if_broken_off(past_key_values):
            packed = self.run(
                input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states, past_key_values, use_cache
            )
        return MidskipModelOutput(last_hidden_state=packed.batch.unpack(packed.h_ND), **packed.outputs(output_gates))

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: SkipCache | None = None,
        use_cache: bool | None = None,
    ) -> Packed:
        """The pass of `forward`, its results still packed. Whoever calls it holds `unchanged_if_broken_off`."""
        batch, cache = inputs_for(
            self, input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, use_cache
        )
        if input_ids is not None:
            input_ids = input_ids.long()  # hashes need all of int64
            batch.token_N = batch.pack(input_ids)
        embeds_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        h_ND = self.embed_layernorm(batch.pack(embeds_BTD))
        batch.rotary = self.rotary(batch.position_N, h_ND.dtype)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = [h_ND] if output_hidden_states else None
        decisions, state = [], PassState()
        for layer, block in enumerate(self.layers):
            for part in PARTS[self.config.skip_unit]:
                unit = len(decisions)
                past = None if cache is None or unit in self.policy.closed_layers else cache.layers[layer]
                decision = self.policy(unit, h_ND, state, batch)
                decisions.append(decision)
                before_ND, h_ND = h_ND, self._run_block(block, h_ND, decision, batch, past, part)
                if str(unit) in self.skip_paths:
                    masks = decision.keep_N, decision.output_gate_N, decision.skip_path_N
                    h_ND = take_path(self.skip_paths[str(unit)], before_ND, h_ND, batch, *masks, self._runs_on_no_rows)
            if hidden_states is not None and layer + 1 < len(self.layers):
                hidden_states.append(h_ND)
        h_ND = self.norm(h_ND)
        if hidden_states is not None:
            hidden_states.append(h_ND)
        packed = Packed(h_ND, batch, decisions, state, hidden_states, cache)
        if cache is not None:
            cache.num_valid_tokens += batch.num_tokens
            cache.num_block_tokens += packed.num_block_tokens
        return packed

    @property
    def _runs_on_no_rows(self) -> bool:
        """Whether what no token reaches runs all the same: its weights are to get a gradient, or others wait."""
        return self.training or is_initialized()

    def _run_block(
        self, block: nn.Module, h_ND: Tensor, decision: Decision, batch: PackedBatch, past: LayerCache | None, part: str
    ) -> Tensor:
        """Take the tokens present, run the block, or a part of it, on them as if the others did not exist, put the
        results back."""
        present = batch.keep(decision.keep_N)
        indices_N = present.indices_N
        gated = self.config.skipped_kv == "drop"
        all_have_keys = not gated and part != "feed_forward"
        for_others = all_have_keys and past is not None  # keys and values of all tokens are wanted later
        if not (present.num_tokens or for_others or self._runs_on_no_rows):
            return h_ND
        x_ND = h_ND if indices_N is None else h_ND.index_select(0, indices_N)
        output_gate_N, key_gate_N = (
            gate if gate is None or indices_N is None else gate.index_select(0, indices_N)
            for gate in (decision.output_gate_N, decision.key_gate_N if gated else None)
        )
        has_others = all_have_keys and indices_N is not None and (present.num_tokens or for_others)
        others_MD = h_ND if has_others else None
        keys = present if others_MD is None else batch
        arguments = (x_ND, others_MD, present, keys, output_gate_N, key_gate_N, past, part)
        if self.gradient_checkpointing and self.training:
            x_ND = self._gradient_checkpointing_func(block.__call__, *arguments)
        else:
            x_ND = block(*arguments)
        if indices_N is None:
            return x_ND
        return h_ND.index_copy(0, indices_N, x_ND.to(h_ND.dtype))  # a copy: a policy or a hook may hold the tensor


class MidskipForCausalLM(MidskipPreTrainedModel, CachedGeneration, GenerationMixin):
    """A causal language model whose tokens skip layers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MidskipConfig):
        super().__init__(config)
        self.model = MidskipModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._warned_of_range = False
        self.post_init()

    def set_budget(self, budget: float | None = None, max_layers: int | None = None) -> None:
        """How much may be computed from now on, in training mode too. Without arguments: the gates as trained.

        What is decided about a token still depends on it and its past alone, not on who shares its batch.

        Args:
            budget: share of the block-tokens that may run on average, in (0, 1]. It becomes a scale of the policy's
                scores, by the calibration in `config.calibration`: of those within the budget the one of the lowest
                loss, which need not be the one that runs most; of a retrofitted model the one that runs that share, all
                at 1.0. Below the shares calibrated the largest scale is taken, with a warning, once.
            max_layers: the most blocks that one token may run, 1 to L, for a latency that is known beforehand.

        Whether live prompts are like the text of the calibration is what a `DriftMonitor` looks at.

        Raises:
            ValueError: a value out of range, a budget without a calibration or with one of other weights (as before a
                fine-tune) or settings, or a policy that has no budget.
        """
        policy = self.model.policy
        if budget is None:
            policy.set_limits(1.0, max_layers)
            return
        calibration = calibration_of(self)
        policy.set_limits(calibration.scale_for(budget), max_layers)
        if budget < calibration.share[-1] and not self._warned_of_range:
            self._warned_of_range = True
            lowest = f"{calibration.share[-1]:.3f}"
            warnings.warn(
                f"the budget of {budget:.3g} is below the range that was calibrated, {lowest} to 1: about {lowest} of "
                "the blocks will run",
                stacklevel=2,
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        past_key_values: SkipCache | None = None,
        use_cache: bool | None = None,
        output_gates: bool = True,
        output_logits: bool = True,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> MidskipCausalLMOutput:
        """Logits of the next token, and their loss.

        Args:
            labels: int64 [B, T], the tokens themselves (they are shifted here); -100 is left out, and so is a token
                that is a pad or follows one. The last token of a document predicts the first of the next.
            logits_to_keep: 0 for all columns, k > 0 for the last k, or an int64 tensor of columns; the head runs on
                those only. With labels it must be 0.
            output_logits: with labels, False gives the loss alone, whose backward pass takes less memory: by the size
                of all logits.
            num_items_in_batch: by which the sum of the losses is divided, as transformers' Trainer asks; by default by
                the number of tokens scored.

        The other arguments, and the errors, are those of `MidskipModel.forward`.
        """
        check_others(others, position_ids)
        if self.training and num_items_in_batch is not None:
            self.model.policy.warn_of_plain_trainer()
        with unchanged_if_broken_off(past_key_values):
            packed = self.model.run(
                input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states, past_key_values, use_cache
            )
            if labels is not None:
                loss, auxiliary_loss, logits = self._losses_and_logits(
                    packed, labels, logits_to_keep, output_logits, num_items_in_batch
                )
            else:
                logits, loss, auxiliary_loss = self._logits(packed, logits_to_keep), None, None
            return MidskipCausalLMOutput(
                loss=loss, logits=logits, auxiliary_loss=auxiliary_loss, **packed.outputs(output_gates)
            )

    def _logits(self, packed: Packed, logits_to_keep: int | Tensor) -> Tensor:
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            return packed.batch.unpack(self.lm_head(packed.h_ND))
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; expected 0 for all columns, or how many of the last")
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.lm_head(packed.batch.unpack(packed.h_ND)[:, columns])

    def _losses_and_logits(
        self, packed: Packed, labels: Tensor, logits_to_keep: int | Tensor, output_logits: bool,
        num_items: int | Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        batch = packed.batch
        if labels.shape != (shape := (batch.batch_size, batch.num_columns)):
            raise ValueError(f"labels has the shape {list(labels.shape)}; expected {list(shape)}")
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            raise ValueError("labels need the logits of all columns: leave logits_to_keep out")
        valid_BT = batch.unpack(torch.ones_like(batch.column_N)).bool()
        h_ND, target_N = packed.h_ND, batch.pack(next_targets(labels, valid_BT))
        policy, observes, auxiliary_loss = self.model.policy, self.training and self.model.policy.is_observing, None
        asked = policy.asks(packed.state) if observes else None
        target_P = target_N
        if asked is not None:  # all in one call of the head, whose weights then get their gradient at once
            asked_MD, indices_M = asked
            h_ND = torch.cat([h_ND, self.model.norm(asked_MD)])
            asked_M = target_N if indices_M is None else target_N.index_select(0, indices_M)
            target_P = torch.cat([target_N, asked_M])
        logits_PV = self.lm_head(h_ND)
        is_held = output_logits or bool(self.lm_head._forward_hooks)  # a hook may hold them
        backend = getattr(self.model.layers[0], "backend", None)  # the loss is compiled if the blocks are
        nats_P = cross_entropy(logits_PV, target_P, overwrite=not is_held, backend=backend)
        nats_N, asked_nats_M = nats_P.split([batch.num_tokens, len(nats_P) - batch.num_tokens])
        scored_N = target_N != IGNORED
        if observes:
            policy.observe(packed.state, nats_N.detach(), scored_N)
            auxiliary_loss = policy.objective(packed.state, nats_N.detach(), scored_N, asked_nats_M)
        loss = nats_N.sum() / (scored_N.sum().clamp(min=1) if num_items is None else num_items)
        return loss, auxiliary_loss, batch.unpack(logits_PV[: batch.num_tokens]) if output_logits else None


AutoConfig.register("midskip", MidskipConfig)
AutoModel.register(MidskipConfig, MidskipModel)
AutoModelForCausalLM.register(MidskipConfig, MidskipForCausalLM)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["midskip"] = "MidskipForCausalLM"  # else label_smoothing_factor shifts no labels
