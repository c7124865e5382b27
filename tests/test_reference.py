"""Weights of the paper's released code: the same numbers where it is right, clear errors, and its dead gates."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.convert.skip_middle import convert_weights, from_pretrained, from_state_dict

DATA = Path(__file__).parent / "data"
FILES = ("forward_gqa.npz", "forward_mha_scaled_rope.npz")


class Released:
    """Numbers computed with the released code."""

    def __init__(self, file: str) -> None:
        with np.load(DATA / file) as arrays:
            self.arrays = {name: torch.as_tensor(arrays[name]) for name in arrays.files if name != "config"}
            self.config: dict[str, Any] = json.loads(str(arrays["config"]))
        self.state_dict = self.group("state_dict/")
        self.gradients = self.group("grad/")

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in self.arrays.items() if name.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]


@pytest.fixture(scope="module", params=FILES)
def released(request: pytest.FixtureRequest) -> Released:
    return Released(request.param)


@pytest.fixture
def gqa() -> Released:
    return Released("forward_gqa.npz")


def near(got: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5, msg=lambda text: f"{what}: {text}")


def test_forward_and_every_gradient_agree(released: Released) -> None:
    model = from_state_dict(released.state_dict, released.config)
    assert not model.training and model.dtype == torch.float32
    assert (model.config.skipped_kv, model.config.norms, model.config.policy) == ("keep", "sandwich", "middle_out")
    output = model(released["input_ids"], labels=released["labels"], output_hidden_states=True)
    near(output.logits, released["logits"], "logits")
    near(output.gates, released["gates"], "gates")
    near(output.depth_scores.clamp(max=1), released["soft_masks"].clamp(max=1), "depth scores")
    *between, last = released["hidden_states"]
    near(torch.stack(output.hidden_states[1:-1]), torch.stack(between), "hidden states")
    near(output.hidden_states[-1], model.model.norm(last), "last hidden state")
    # the released labels are the tokens already shifted
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), released["labels"].flatten())
    near(loss, released["cross_entropy"], "cross-entropy")
    gate_loss = output.gates.mean((1, 2)).mean()
    near(gate_loss, released["gate_mean_loss"], "gate loss")
    (loss + gate_loss).backward()
    expected = convert_weights(released.gradients, model.config)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        near(parameter.grad, expected[name], f"gradient of {name}")
    assert all(expected[name].norm() > 1e-3 for name in ("lm_head.weight", "model.policy.weight"))
    assert (output.gates == 0).any() and (output.gates > 0).any()


def test_the_files_hold_what_they_are_for(gqa: Released) -> None:
    assert 0.55 < (gqa["gates"] == 0).float().mean() < 0.65
    assert gqa.config["n_kv_heads"] < gqa.config["n_heads"] and not gqa.config["use_scaled_rope"]
    assert Released("forward_mha_scaled_rope.npz").config["use_scaled_rope"]


def test_the_papers_keys_give_other_numbers(released: Released) -> None:
    model = from_state_dict(released.state_dict, released.config, skipped_kv="drop")
    assert model.config.skipped_kv == "drop"
    assert (model(released["input_ids"]).logits - released["logits"]).abs().max() > 0.1


def test_state_without_gates_is_dense(gqa: Released) -> None:
    weights = {name: x for name, x in gqa.state_dict.items() if not name.startswith("masks.")}
    model = from_state_dict(weights, gqa.config)
    assert model.config.policy == "dense" and model.config.policy_settings == {}
    output = model(gqa["input_ids"])
    assert (output.gates == 1).all() and output.depth_scores is None
    assert (output.logits - gqa["logits"]).abs().max() > 0.1


def test_arrays_serve_as_well_as_tensors_in_any_order(gqa: Released) -> None:
    model = from_state_dict({name: x.numpy() for name, x in reversed(gqa.state_dict.items())}, gqa.config)
    near(model(gqa["input_ids"]).logits, gqa["logits"])


def test_converted_tensors_are_float32_and_detached(gqa: Released) -> None:
    model = from_state_dict(gqa.state_dict, gqa.config)
    weights = {name: x.bfloat16().requires_grad_() for name, x in gqa.state_dict.items()}
    converted = convert_weights(weights, model.config)
    assert converted.keys() == model.state_dict().keys()
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in converted.values())


def write_folder(folder: Path, config: dict[str, Any] | None, *weights: dict[str, Tensor]) -> Path:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for number, part in enumerate(weights):
        save_file({name: x.contiguous() for name, x in part.items()}, folder / f"model-{number}.safetensors")
    return folder


def test_hugging_face_folder_loads(gqa: Released, tmp_path: Path) -> None:
    weights = {f"model.{name}": x for name, x in gqa.state_dict.items()}
    config = gqa.config | {"model_type": "skip-middle", "architectures": ["GatedTransformer"]}
    model = from_pretrained(write_folder(tmp_path, config, weights))
    near(model(gqa["input_ids"]).logits, gqa["logits"])
    assert from_pretrained(str(tmp_path), skipped_kv="drop").config.skipped_kv == "drop"


def test_sharded_folder_with_a_bfloat16_embedding_loads(gqa: Released, tmp_path: Path) -> None:
    weights = {f"model.{name}": x for name, x in gqa.state_dict.items()}
    embedding = weights.pop("model.tok_embeddings.weight").bfloat16()
    folder = write_folder(tmp_path, gqa.config, weights, {"model.tok_embeddings.weight": embedding})
    model = from_pretrained(folder)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.model.embed_tokens.weight, embedding.float())
    near(model.lm_head.weight, gqa.state_dict["output.weight"])


def test_loaded_model_saves_as_a_midskip_model(gqa: Released, tmp_path: Path) -> None:
    model = from_state_dict(gqa.state_dict, gqa.config)
    model.save_pretrained(tmp_path)
    again = MidskipForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(gqa["input_ids"]).logits, model(gqa["input_ids"]).logits)


def test_wrong_folders_are_refused(gqa: Released, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no-such has no config.json; expected a Hugging Face folder"):
        from_pretrained(tmp_path / "no-such")
    with pytest.raises(ValueError, match=r"has no config.json"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no \*.safetensors; convert other formats"):
        from_pretrained(write_folder(tmp_path, gqa.config))


def drop(name: str) -> Callable[[dict], None]:
    return lambda found: found.pop(name)


def put(name: str, value: Any) -> Callable[[dict], None]:
    return lambda found: found.update({name: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("output_norm.weight"), "1 weights do not fit .*model.norm.weight: got nothing, expected \\[32\\]"),
        (drop("masks.1.linear.weight"), r"model.policy.weight: got \[2, 32\], expected \[3, 32\]"),
        (drop("layers.0.feed_forward.w1.weight"), "lack layers.0.feed_forward.w1.weight: are they the released code's"),
        (put("layers.9.attention.wq.weight", torch.zeros(32, 32)), r"layers.9.*got \[32, 32\], expected nothing"),
        (
            put("layers.1.attention.wv.weight", torch.zeros(16, 31)),
            r"v_proj.weight: got \[16, 31\], expected \[16, 32\]",
        ),
        (put("lm_head.weight", torch.zeros(97, 32)), "the released code has no weight named 'lm_head.weight'"),
        (put("layers.0.attention.wz.weight", torch.zeros(1)), "no weight named 'layers.0.attention.wz.weight'"),
        (put("layers.0.attention.wq.bias", torch.zeros(1)), "no weight named 'layers.0.attention.wq.bias'"),
    ],
)
def test_wrong_weights_are_refused(gqa: Released, change: Callable[[dict], None], message: str) -> None:
    weights = dict(gqa.state_dict)
    change(weights)
    with pytest.raises(ValueError, match=message):
        from_state_dict(weights, gqa.config)


def test_settings_that_are_missing_are_named(gqa: Released) -> None:
    config = {name: value for name, value in gqa.config.items() if name not in ("dim", "n_kv_heads")}
    with pytest.raises(ValueError, match="the configuration lacks dim, n_kv_heads; expected dim, n_layers"):
        from_state_dict(gqa.state_dict, config)


# ---- gates at the start


def start_of_gates(start: str, seed: int) -> tuple[Tensor, Tensor]:
    """Gates [L, B, T], and whether each token gives its gate a gradient [L/2, B, T], at step 0.

    The 12-layer model of the paper on a sixteenth of its width, with weights four times as large, so that scores are
    as large as there.
    """
    torch.manual_seed(seed)
    model = MidskipForCausalLM(
        MidskipConfig(
            vocab_size=257,
            hidden_size=48,
            intermediate_size=192,
            num_attention_heads=3,
            max_position_embeddings=64,
            initializer_range=0.08,
            policy_settings={"start": start},
        )
    )
    scores: list[Tensor] = []

    def keep(policy: torch.nn.Module, arguments: tuple, decision: Any) -> None:
        layer, _, state, _ = arguments
        if layer < 6:
            state["depth_scores"][-1].retain_grad()
            scores.append(state["depth_scores"][-1])

    model.model.policy.register_forward_hook(keep)
    ids_BT = torch.randint(257, (2, 64))
    output = model(ids_BT, labels=ids_BT)
    output.loss.backward()
    score_N6 = torch.stack([scores[0], *(b - a for a, b in pairwise(scores))], 1)
    gradient_N6 = torch.stack([x.grad for x in scores], 1)
    alive_N6 = (gradient_N6 != 0) & (score_N6 > 0)  # relu passes none where the score is 0
    return output.gates.detach(), alive_N6.T.reshape(6, 2, 64)


def test_released_start_is_mostly_dead_in_the_middle() -> None:
    runs = [start_of_gates("released", seed) for seed in range(12)]
    dead_12 = torch.stack([(gates == 0).float().mean((1, 2)) for gates, _ in runs]).mean(0)
    alive_6 = torch.stack([alive.float().mean((1, 2)) for _, alive in runs]).mean(0)
    assert 0.37 < dead_12.mean() < 0.53  # 42 % were measured with the released code
    assert dead_12[0] < 0.1 and dead_12[5] > 0.75
    assert (dead_12[:6].diff() >= 0).all() and torch.equal(dead_12, dead_12.flip(0))
    assert alive_6[5] < 0.15  # and 94 % of tokens give the innermost gate no gradient


def test_open_start_is_alive_everywhere() -> None:
    for seed in range(2):
        gates, alive = start_of_gates("open", seed)
        assert (gates > 0.89).all() and (gates < 1).all()
        assert alive[:, :, :-1].all()  # the last token predicts nothing
        assert (gates[:6].mean((1, 2)).diff() < 0).all()
