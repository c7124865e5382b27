"""What transformers does with a model: gradient checkpointing, autocast, saving, loading and generation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from midskip import MidskipConfig, MidskipForCausalLM, MidskipModel

Make = Callable[..., MidskipForCausalLM]
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def prompt(*shape: int) -> Tensor:
    return torch.randint(3, 31, shape)


# ---- training


def checkpoint(model: MidskipForCausalLM, reentrant: bool) -> None:
    # transformers 5.23 deprecates the older name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize(
    ("norms", "checkpointing"), [("sandwich", "none"), ("pre", "reentrant"), ("sandwich", "not reentrant")]
)
@pytest.mark.parametrize("gates", ["late", "gone"])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_a_block_without_tokens_gets_zero_gradients(
    make_model: Make, skipped_kv: str, gates: str, norms: str, checkpointing: str
) -> None:
    model = make_model(gates, skipped_kv=skipped_kv, norms=norms, num_hidden_layers=5)
    if checkpointing != "none":
        checkpoint(model, checkpointing == "reentrant")
    called: list[int] = []
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda module, arguments, output, layer=layer: called.append(layer))
    ids_BT = prompt(2, 7)
    output = model(ids_BT, labels=ids_BT)
    empty = [layer for layer in range(5) if not output.gates[layer].any()]
    assert empty == ([0, 1, 2, 3, 4] if gates == "gone" else [1, 2, 3])
    assert called == [0, 1, 2, 3, 4]
    (output.loss + output.gates.mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if any(f"layers.{layer}." in name for layer in empty):
            assert (parameter.grad == 0).all(), name
    assert model.lm_head.weight.grad.norm() > 0
    if gates == "late":
        assert all(p.grad.norm() > 0 for n, p in model.model.layers[0].named_parameters() if "mlp" in n)
    model.eval()
    called.clear()
    expected = model(ids_BT).logits
    assert called == [layer for layer in range(5) if layer not in empty]
    torch.testing.assert_close(expected, output.logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model: Make, skipped_kv: str, reentrant: bool) -> None:
    ids_BT, mask_BT = prompt(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask_BT[0, :2] = 0
    found, calls = [], []
    for checkpointing in (False, True):
        model = make_model(skipped_kv=skipped_kv)
        if checkpointing:
            checkpoint(model, reentrant)
        seen: list[int] = []
        model.model.layers[0].register_forward_pre_hook(lambda module, arguments, seen=seen: seen.append(1))
        output = model(ids_BT, attention_mask=mask_BT, labels=ids_BT)
        (output.loss + output.gates.square().mean()).backward()
        found.append({name: x.grad for name, x in model.named_parameters()})
        calls.append(len(seen))
    assert calls == [1, 2]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-12, atol=1e-12, msg=name)
    assert found[0]["model.policy.weight"].norm() > 0


def test_gates_stay_float32_under_autocast(make_model: Make) -> None:
    model, ids_BT = make_model(dtype=torch.float32), prompt(2, 7)
    plain = model(ids_BT, labels=ids_BT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids_BT, labels=ids_BT)
    assert output.logits.dtype == torch.bfloat16
    assert output.gates.dtype == output.depth_scores.dtype == output.loss.dtype == torch.float32
    assert torch.equal(output.gates[0], plain.gates[0])  # before the first block nothing is rounded
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.05, atol=0)
    output.loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == torch.float32 for x in model.parameters())


# ---- saving


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norms", ["sandwich", "pre"])
def test_saved_model_gives_identical_logits(make_model: Make, tmp_path: Path, norms: str, tied: bool) -> None:
    model = make_model(dtype=torch.float32, norms=norms, tie_word_embeddings=tied, skipped_kv="keep").eval()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids_BT = prompt(2, 7)
    expected = model(ids_BT)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.bin"))
    for loader in (MidskipForCausalLM, AutoModelForCausalLM):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert type(loaded) is MidskipForCausalLM and not loaded.training and loaded.config.skipped_kv == "keep"
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        output = loaded(ids_BT)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.gates, expected.gates)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is MidskipModel
    assert torch.equal(body(ids_BT).last_hidden_state, model.model(ids_BT).last_hidden_state)


def test_loading_keeps_trained_gates_and_norms(make_model: Make, tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = MidskipForCausalLM.from_pretrained(tmp_path)
    for (name, got), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_loads_as_bfloat16(make_model: Make, tmp_path: Path) -> None:
    model = make_model("open", dtype=torch.float32, num_hidden_layers=2).eval()
    model.save_pretrained(tmp_path)
    ids_BT = prompt(2, 64)
    loaded = MidskipForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in loaded.parameters())
    output, expected = loaded(ids_BT, output_hidden_states=True), model(ids_BT)
    assert output.logits.dtype == output.hidden_states[-1].dtype == torch.bfloat16
    assert output.gates.dtype == output.depth_scores.dtype == torch.float32
    error = (output.logits.float() - expected.logits).norm() / expected.logits.norm()
    assert 0 < error < 0.03
    assert (output.gates - expected.gates).abs().max() < 0.02
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, output.logits)


def test_rotary_angles_are_never_rounded(make_model: Make) -> None:
    model = make_model(dtype=torch.float32, hidden_size=64)
    exact = model.model.rotary.inv_freq.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(model.to(dtype).model.rotary.inv_freq, exact)


def test_start_of_the_weights(tiny: Callable[..., MidskipConfig]) -> None:
    model = MidskipForCausalLM(tiny(hidden_size=64, initializer_range=0.05, policy_settings={"start": "released"}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("policy.bias"):
            assert (parameter == 0).all()
        else:
            assert 0.04 < parameter.std() < 0.06, name


# ---- generation


def by_hand(model: MidskipForCausalLM, ids_BT: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        ids_BT = torch.cat((ids_BT, model(ids_BT).logits[:, -1:].argmax(-1)), 1)
    return ids_BT


def test_greedy_generation_is_full_forwards(make_model: Make) -> None:
    model, ids_BT = make_model(dtype=torch.float32).eval(), prompt(2, 5)
    expected = by_hand(model, ids_BT, 8)
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids_BT, max_new_tokens=8, do_sample=False, use_cache=use_cache), expected)
    assert len(expected[:, 5:].unique()) > 2
    found = model.generate(
        ids_BT, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True,
        output_hidden_states=True,
    )  # fmt: skip
    assert len(found.logits) == len(found.hidden_states) == 3 and len(found.hidden_states[0]) == 5


def test_head_runs_on_one_row_a_step(make_model: Make) -> None:
    model, rows = make_model(dtype=torch.float32).eval(), []
    model.lm_head.register_forward_hook(lambda module, arguments, output: rows.append(output.shape[:-1].numel()))
    model.generate(prompt(2, 5), max_new_tokens=3, do_sample=False)
    assert rows == [2, 2, 2]


def test_left_padded_batch_generates_as_each_alone(make_model: Make) -> None:
    model = make_model(dtype=torch.float64, **TOKENS | {"eos_token_id": None}).eval()
    prompts = [prompt(1, length) for length in (7, 4, 1)]
    ids_BT = torch.cat([F.pad(ids, (7 - ids.shape[1], 0)) for ids in prompts])
    mask_BT = torch.cat([F.pad(torch.ones_like(ids), (7 - ids.shape[1], 0)) for ids in prompts])
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        together = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=6, **options)
        for b, ids in enumerate(prompts):
            alone = model.generate(ids, max_new_tokens=6, **options)
            assert torch.equal(together[b, 7:], alone[0, ids.shape[1] :]), (options, b)


def test_sampling_follows_its_seed(make_model: Make) -> None:
    model, ids_BT = make_model(dtype=torch.float32).eval(), prompt(2, 5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(ids_BT, max_new_tokens=10, do_sample=True, top_k=0))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (2, 15)


def test_beam_search_finds_no_worse_than_greedy(make_model: Make) -> None:
    model, ids_BT = make_model(dtype=torch.float64).eval(), prompt(2, 5)

    def score(ids_BT: Tensor) -> Tensor:
        log_BTV = model(ids_BT).logits.log_softmax(-1)[:, 4:-1]
        return log_BTV.gather(2, ids_BT[:, 5:, None]).sum((1, 2))

    greedy = model.generate(ids_BT, max_new_tokens=3, do_sample=False)
    beams = model.generate(ids_BT, max_new_tokens=3, do_sample=False, num_beams=31)
    assert (score(beams) >= score(greedy) - 1e-9).all()
    assert not torch.equal(beams, greedy)


def test_generation_stops_at_the_end_token(make_model: Make) -> None:
    model, ids_BT = make_model(dtype=torch.float32, pad_token_id=0).eval(), prompt(1, 5)
    free = by_hand(model, ids_BT, 8)[0, 5:].tolist()
    end = free[3]
    found = model.generate(ids_BT, max_new_tokens=8, do_sample=False, eos_token_id=end)[0, 5:].tolist()
    assert found == free[: free.index(end) + 1]


def test_a_model_that_was_quantized_at_loading_is_saved_and_loaded(make_model: Make, tmp_path: Path) -> None:
    @register_quantization_config("nothing")
    class NothingConfig(QuantizationConfigMixin):
        def __init__(self, **_: Any) -> None:
            self.quant_method = "nothing"

    @register_quantizer("nothing")
    class Nothing(HfQuantizer):
        """Leaves the weights as they are."""

        is_trainable = True

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

    model = make_model()
    model.save_pretrained(tmp_path / "one")
    loaded = MidskipForCausalLM.from_pretrained(tmp_path / "one", quantization_config=NothingConfig())
    loaded.save_pretrained(tmp_path / "two")
    again = MidskipForCausalLM.from_pretrained(tmp_path / "two")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
