"""Numbers and shapes at the edge, against the reference in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_exactness import check_equal
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.model.cache import SkipCache
from midskip.testing import reference_forward

Make = Callable[..., MidskipForCausalLM]


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("gates", ["kept", "one", "gone"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("no_gradients")
def test_activations_of_any_size(
    make_model: Make, ragged: tuple[Tensor, Tensor], dtype: torch.dtype, scale: float, gates: str
) -> None:
    """In one pass and with a cache as in float64, but for rounding: of gates that are all 1, all 0, and of scores that
    come to exactly 1."""
    ids_BT, mask_BT = ragged
    model = make_model(gates, dtype, norms="pre").eval()
    model.model.embed_tokens.weight *= scale
    exact = make_model(gates, norms="pre").eval()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    expected = reference_forward(exact, ids_BT, mask_BT)
    once = model(ids_BT, attention_mask=mask_BT)
    cache, parts = SkipCache(model.config), []
    for columns in (slice(0, 4), slice(4, 5), slice(5, 9)):
        seen = mask_BT[:, : columns.stop]
        parts.append(model(ids_BT[:, columns], attention_mask=seen, past_key_values=cache).logits)
    bound = 32 * torch.finfo(dtype).eps * expected.logits.abs().max()  # a few roundings in each of four layers
    for logits in (once.logits, torch.cat(parts, 1)):
        assert (logits.double() - expected.logits).abs().max() <= bound
    if gates != "one" or dtype == torch.float32:
        torch.testing.assert_close(once.gates.double(), expected.gates.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (1, 1)),
        ({}, (2, 64)),
        ({"vocab_size": 2}, (3, 7)),
        ({"vocab_size": 1}, (2, 3)),
        ({"max_position_embeddings": 1}, (2, 1)),
        ({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "hidden_size": 2}, (2, 5)),
    ],
)
def test_the_smallest_and_the_longest(
    make_model: Make, skipped_kv: str, changes: dict[str, Any], shape: tuple[int, int]
) -> None:
    """Outputs and gradients, one pass and steps."""
    model = make_model("mixed", skipped_kv=skipped_kv, **changes)
    ids_BT = torch.randint(model.config.vocab_size, shape)
    packed, _ = check_equal(model, ids_BT, torch.ones_like(ids_BT))
    with torch.no_grad():
        cache = SkipCache(model.config)
        steps = [model(ids_B1, past_key_values=cache).logits for ids_B1 in ids_BT.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), packed["logits"].detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.usefixtures("no_gradients")
def test_a_thousand_rows_of_one_token(make_model: Make, skipped_kv: str) -> None:
    """Then of two."""
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT = torch.randint(31, (1024, 2))
    pairs_PT = torch.cartesian_prod(torch.arange(31), torch.arange(31))
    expected = model(pairs_PT, use_cache=False).logits[ids_BT[:, 0] * 31 + ids_BT[:, 1]]
    some = reference_forward(model, ids_BT[:5]).logits
    torch.testing.assert_close(expected[:5], some, rtol=0, atol=1e-11)
    cache = SkipCache(model.config)
    steps = [model(ids_BT[:, t : t + 1], past_key_values=cache).logits for t in (0, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-11)
    assert cache.batch_size == 1024 and cache.num_columns == 2
