"""FLOPs: the analytic count, the meter, torch's own counter, and the released estimate beside the corrected one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.cost import CONVENTIONS, Flops, LayerWork, Meter, block_flops, dense_flops, head_flops
from midskip.model.packing import PackedBatch

Make = Callable[..., MidskipForCausalLM]
FIXED = "midskip.policies.controls:FixedDepths"
RELEASED = json.loads((Path(__file__).parent / "data" / "flops.json").read_text())

RUNS = {
    "dense": {"policy": "dense"},
    "open": {"gates": "open"},
    "mixed": {"gates": "mixed"},
    "gone": {"gates": "gone"},
    "fixed": {"policy": FIXED, "policy_settings": {"skip_share": 0.4}},
    "wide middle": {"gates": "mixed", "intermediate_size": [24, 40, 56, 40, 24]},
    "all kept, gated": {"policy": FIXED, "policy_settings": {"skip_share": 0.0, "fractional": True}},
}


def counted(
    model: MidskipForCausalLM, ids_BT: Tensor, mask_BT: Tensor | None, position_BT: Tensor | None, backward: bool
) -> int:
    """By torch, which sees no FLOPs in CPU's fused attention: under plain math."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(ids_BT, attention_mask=mask_BT, position_ids=position_BT, labels=ids_BT)
        if backward:
            (output.loss + output.gates.mean()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("run", "shape"),
    [*((run, "ragged") for run in RUNS), *(("mixed", shape) for shape in ("rectangle", "documents"))],
)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_counter_convention_is_torchs_counter(
    make_model: Make, ragged: tuple[Tensor, Tensor], run: str, shape: str, skipped_kv: str
) -> None:
    model = make_model(**RUNS[run], skipped_kv=skipped_kv, num_hidden_layers=5, dtype=torch.float32)
    ids_BT, mask_BT = ragged if shape != "rectangle" else (ragged[0], None)
    position_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]]) if shape == "documents" else None
    with Meter(model) as meter:
        forward = counted(model, ids_BT, mask_BT, position_BT, backward=False)
    assert meter.flops("counter").total == forward
    trained = counted(model, ids_BT, mask_BT, position_BT, backward=True)
    assert trained == meter.flops("counter", backward=True).total == 3 * forward
    assert meter.flops("causal").total < forward or run == "gone"
    lengths = [9] * 7 if mask_BT is None else mask_BT.sum(1).tolist()
    if position_BT is not None:
        assert mask_BT is not None
        lengths = [n for row in mask_BT for n in (row[:3].sum().item(), row[3:8].sum().item(), row[8].item()) if n]
    assert meter.seqlens == lengths and meter.num_tokens == sum(lengths)
    assert meter.dense_flops() == dense_flops(model.config, lengths)
    if run == "dense":
        assert meter.dense_flops("counter") == meter.flops("counter")
        assert meter.dense_flops() == meter.flops()


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_parts_add_up_and_only_their_part_moves(make_model: Make, skipped_kv: str) -> None:
    model, ids_BT = make_model("mixed", skipped_kv=skipped_kv), torch.randint(31, (2, 9))
    with Meter(model) as meter:
        model(ids_BT)
    flops = meter.flops()
    assert flops.blocks == flops.projections + flops.attention + flops.mlp
    assert flops.total == flops.blocks + flops.policy + flops.head == flops.as_dict()["total"]
    assert flops.head == 2 * 18 * 16 * 31
    scored = 18 + meter.query_rows_L[0]  # two of the four layers have a gate, and who left is not scored again
    assert flops.policy == 2 * scored * 16
    assert flops.mlp == sum(meter.query_rows_L) * 6 * 16 * 24
    assert meter.flops("counter").attention > flops.attention
    for part in ("projections", "mlp", "policy", "head"):
        assert getattr(meter.flops("counter"), part) == getattr(flops, part)
    assert (flops + flops) == flops * 2 == Flops(*(2 * x for x in list(flops.as_dict().values())[:-1]))
    assert meter.flops(backward=True) == flops * 3


def pairs_one_by_one(query_BT: Tensor, key_BT: Tensor, document_BT: Tensor) -> tuple[int, int]:
    """(causal, square): pairs of a query and a key of the same document, counted as they are."""
    causal = square = 0
    for b, t in query_BT.nonzero().tolist():
        for column in key_BT[b].nonzero().flatten().tolist():
            if document_BT[b, column] == document_BT[b, t]:
                square += 1
                causal += column <= t
    return causal, square


@pytest.mark.parametrize("positions", [None, [0, 1, 2, 3, 0, 1, 0, 2, 1]])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_pairs_are_those_that_meet(ragged: tuple[Tensor, Tensor], share: float, positions: list[int] | None) -> None:
    valid_BT = ragged[1].bool()
    batch = PackedBatch.from_rectangle(valid_BT, None if positions is None else torch.tensor([positions]))
    document_BT = batch.unpack(batch.sequence_N)
    kept = batch.keep(torch.rand(batch.num_tokens) < share)
    kept_BT = kept.unpack(torch.ones(kept.num_tokens)).bool()
    for queries, keys, query_BT, key_BT in (
        (batch, batch, valid_BT, valid_BT), (kept, kept, kept_BT, kept_BT), (kept, batch, kept_BT, valid_BT),
    ):  # fmt: skip
        work = LayerWork.of(queries, keys, gated=False)
        assert (work.causal_pairs, work.square_pairs) == pairs_one_by_one(query_BT, key_BT, document_BT)
        assert (work.query_rows, work.key_rows) == (query_BT.sum(), key_BT.sum())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("gates", ["mixed", "gone"])
def test_meter_counts_the_rows_that_the_linear_layers_see(
    make_model: Make, ragged: tuple[Tensor, Tensor], gates: str, skipped_kv: str, mode: str
) -> None:
    model = make_model(gates, skipped_kv=skipped_kv, num_hidden_layers=5).train(mode == "train")
    rows: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            rows[name] = rows.get(name, 0) + arguments[0].shape[0]

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(watch(name))
    with Meter(model) as meter:
        for _ in range(2):
            output = model(*ragged)
    present_L = (output.gates > 0).sum((1, 2)).tolist()
    assert meter.query_rows_L == [2 * count for count in present_L]
    for layer, calls in enumerate(meter.layers):
        at = f"model.layers.{layer}"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            assert rows.get(f"{at}.{name}", 0) == sum(work.query_rows for work in calls)
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            assert rows.get(f"{at}.{name}", 0) == sum(work.key_rows for work in calls)
        all_keys = skipped_kv == "keep" and present_L[layer]
        assert sum(work.key_rows for work in calls) == (2 * 32 if all_keys else 2 * present_L[layer])
    assert meter.head_rows == rows["lm_head"] == 2 * 32 and meter.num_tokens == 2 * 32
    assert meter.executed_share == pytest.approx(sum(present_L) / (5 * 32))


def test_meter_stops_and_starts_again(make_model: Make) -> None:
    model, ids_BT = make_model(), torch.randint(31, (1, 5))
    meter = Meter(model)
    assert meter.executed_share == 0 and meter.flops() == Flops()
    with meter:
        model(ids_BT)
    once = meter.flops()
    model(ids_BT)
    assert meter.flops() == once and once.total > 0
    with meter:
        model(ids_BT)
    assert meter.flops() == once * 2
    meter.reset()
    assert meter.flops() == Flops() and meter.num_tokens == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_meter_counts_no_recomputation(make_model: Make, skipped_kv: str, reentrant: bool) -> None:
    model, ids_BT = make_model(skipped_kv=skipped_kv), torch.randint(31, (2, 7))
    with Meter(model) as plain:
        model(ids_BT, labels=ids_BT).loss.backward()
    # transformers 5.23 deprecates the older name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    calls: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, arguments: calls.append(1))
    with Meter(model) as meter:
        output = model(ids_BT, labels=ids_BT)
        assert meter.flops() == plain.flops() and len(calls) == 1
        output.loss.backward()
    assert len(calls) == 2, "the block was run again"
    assert meter.flops() == plain.flops() and meter.layers == plain.layers and meter.seqlens == plain.seqlens
    model = make_model(skipped_kv=skipped_kv)
    embedded_BTD = model.model.embed_tokens(ids_BT).detach().requires_grad_()
    with Meter(model) as meter:  # all of the model again, its policy and head included
        checkpoint(
            lambda x_BTD: model(inputs_embeds=x_BTD).logits, embedded_BTD, use_reentrant=reentrant
        ).sum().backward()
    assert meter.flops() == plain.flops() and meter.seqlens == plain.seqlens


def test_meter_lets_go_after_an_error(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="vocabulary"), Meter(model) as meter:
        model(torch.tensor([[99]]))
    model(torch.tensor([[9]]))
    assert meter.num_tokens == 0


def test_gated_keys_cost_one_feature_a_head(tiny: Callable[..., MidskipConfig]) -> None:
    config = tiny()
    plain, gated = (block_flops(config, LayerWork(3, 3, 6, 9, gated)) for gated in (False, True))
    assert gated.attention * 4 == plain.attention * 5  # head_dim is 4
    assert gated.projections == plain.projections and gated.mlp == plain.mlp


def test_unknown_convention_is_refused(tiny: Callable[..., MidskipConfig]) -> None:
    assert CONVENTIONS == ("causal", "counter")
    with pytest.raises(ValueError, match="convention is 'square'; expected one of 'causal', 'counter'"):
        dense_flops(tiny(), [3], convention="square")


def test_head_rows_can_be_given(tiny: Callable[..., MidskipConfig]) -> None:
    config = tiny()
    assert dense_flops(config, [5, 3], head_rows=2).head == head_flops(config, 2).head == 2 * 2 * 16 * 31
    assert dense_flops(config, [5, 3], head_rows=2).blocks == dense_flops(config, [5, 3]).blocks


# ---- the released estimate (arXiv 2506.21103, its code), which counts each block twice

LENGTH = 1024


def papers_model(num_layers: int = 12, num_key_heads: int = 12) -> MidskipConfig:
    return MidskipConfig(num_hidden_layers=num_layers, num_key_value_heads=num_key_heads)


def released_elementwise(config: MidskipConfig) -> int:
    """What the released estimate adds for a token in a block beside its matrix products, before doubling: four norms,
    the rotary embedding of queries and keys, and the rest, whose parts the file does not tell apart."""
    norms = 4 * (4 * config.hidden_size + 10)
    rotary = 3 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return norms + rotary + 221_184


def released_flops(config: MidskipConfig, gated: bool, sparsity: float) -> float:
    """The released estimate of a sequence, from our count of the block's matrix products."""
    block = dense_flops(config, [LENGTH], convention="counter").blocks // config.num_hidden_layers
    block_twice = 2 * (block + LENGTH * released_elementwise(config))
    num_gates = config.num_hidden_layers // 2
    outside = head_flops(config, LENGTH).head + LENGTH * 2 * (4 * config.hidden_size + 10)
    gates = LENGTH * (num_gates * (2 * config.hidden_size + 1) - 1) if gated else 0
    return (1 - sparsity) * config.num_hidden_layers * block_twice + outside + gates


def test_released_estimate_is_reproduced_from_twice_our_blocks() -> None:
    assert len(RELEASED) == 28
    for row in RELEASED:
        config = papers_model(row["n_layers"], row["n_kv_heads"])
        estimate = released_flops(config, row["gated"], row["sparsity"])
        assert estimate == pytest.approx(row["flops_per_sequence"], abs=1), row


def test_released_blocks_are_twice_the_corrected_ones() -> None:
    rows = [row for row in RELEASED if row["n_kv_heads"] == 12 and not row["gated"]]
    by_layers = {row["n_layers"]: row["flops_per_sequence"] for row in rows}
    released_block = (by_layers[12] - by_layers[2]) / 10
    ours = dense_flops(papers_model(), [LENGTH], convention="counter")
    ratio = released_block / (ours.blocks / 12)
    assert 2.0 < ratio < 2.03  # twice, and about 2 % of elementwise work
    released_rest = by_layers[12] - 12 * released_block
    assert 1 < released_rest / ours.head < 1.001  # the head is counted once


def test_half_sparsity_reads_minus_44_and_is_minus_39_percent() -> None:
    config = papers_model()
    rows = [row for row in RELEASED if (row["n_layers"], row["n_kv_heads"], row["gated"]) == (12, 12, True)]
    gated = {row["sparsity"]: row["flops_per_sequence"] for row in rows}
    per_unit = (gated[0.0] - gated[0.25]) / 0.25
    assert (gated[0.0] - gated[0.6]) / 0.6 == pytest.approx(per_unit, rel=1e-9)  # linear in sparsity
    assert 0.5 * per_unit / gated[0.0] == pytest.approx(0.437, abs=0.001)
    ours = dense_flops(config, [LENGTH], convention="counter")
    assert 0.5 * ours.blocks / ours.total == pytest.approx(0.387, abs=0.001)
    causal = dense_flops(config, [LENGTH])
    assert 0.5 * causal.blocks / causal.total == pytest.approx(0.380, abs=0.001)
