"""What a token that skips a layer gets instead of it (`skip_path`)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_exactness import check_equal
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from midskip import MidskipConfig, MidskipForCausalLM, meter
from midskip.testing import check_policy

Make = Callable[..., MidskipForCausalLM]
FIXED = "midskip.policies.controls:FixedDepths"
MODELS: dict[str, dict[str, Any]] = {
    "middle_out": {"gates": "mixed"},
    "middle_out, hard": {"gates": "mixed", "policy_settings": {"gates": "hard"}},
    "fixed, fractional": {"policy": FIXED, "policy_settings": {"skip_share": 0.4, "fractional": True}},
}


def build(make_model: Make, kind: str, **changes: Any) -> MidskipForCausalLM:
    model = make_model(**MODELS[kind], **changes)
    for parameter in model.model.skip_paths.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("num_layers", "skip_path", "skipped_kv"), [(1, "linear", "drop"), (4, "adapter", "keep"), (3, "low_rank", "drop")]
)
@pytest.mark.parametrize("kind", MODELS)
def test_they_equal_the_reference(
    make_model: Make, ragged: tuple[Tensor, Tensor], kind: str, skipped_kv: str, num_layers: int, skip_path: str
) -> None:
    model = build(make_model, kind, num_hidden_layers=num_layers, skipped_kv=skipped_kv, skip_path=skip_path)
    with_path, _ = check_equal(model, *ragged)
    path = model.model.skip_paths["0"]
    nn.init.zeros_(path.weight)  # pyright: ignore[reportArgumentType]
    without, _ = check_equal(model, *ragged)
    assert not torch.equal(with_path["logits"], without["logits"])


@pytest.mark.parametrize(
    ("name", "skip_path", "skip_unit", "skipped_kv"),
    [
        ("independent", "linear", "block", "keep"),
        ("independent", "low_rank", "sublayer", "drop"),
        ("early_exit", "adapter", "block", "drop"),
    ],
)
@pytest.mark.integration
def test_the_contract(name: str, skip_path: str, skip_unit: str, skipped_kv: str) -> None:
    check_policy(name, num_layers=3, skipped_kv=skipped_kv, skip_unit=skip_unit, skip_path=skip_path)


@torch.no_grad()
def test_a_new_path_gives_nothing(make_model: Make, ragged: tuple[Tensor, Tensor]) -> None:
    plain = make_model(gates="mixed").eval()
    paths = make_model(gates="mixed", skip_path="adapter", seed=1).eval()
    paths.load_state_dict(plain.state_dict(), strict=False)
    ids_BT, mask_BT = ragged
    torch.testing.assert_close(paths(ids_BT, mask_BT).logits, plain(ids_BT, mask_BT).logits, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("skip_path", ["linear", "adapter"])
def test_work_is_counted(make_model: Make, ragged: tuple[Tensor, Tensor], skip_path: str) -> None:
    """A token that leaves takes one path for all the layers that it skips."""
    model = build(make_model, "middle_out", skip_path=skip_path, skip_path_rank=5 if skip_path == "adapter" else None)
    model.float().eval()
    ids_BT, mask_BT = ragged
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, meter(model) as work:
        output = model(ids_BT, attention_mask=mask_BT, use_cache=False)
    assert work.flops("counter").total == counter.get_total_flops()
    width, middle = model.config.hidden_size, (model.config.num_hidden_layers - 1) // 2
    skipping = int((mask_BT.bool() & ~output.executed[middle]).sum())
    a_token = 2 * width * width if skip_path == "linear" else 4 * 5 * width
    assert work.flops().skip_paths == skipping * a_token > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_path": "map"}, "skip_path is 'map'; expected one of 'none', 'linear', 'low_rank', 'adapter'"),
        ({"skip_path": "linear", "skip_path_rank": 8}, "skip_path_rank is 8 with skip_path 'linear', which has none"),
        ({"skip_path": "adapter", "skip_path_rank": 0}, "skip_path_rank is 0; expected a whole number of at least 1"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MidskipConfig(**settings)
