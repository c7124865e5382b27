"""Weights of the paper's released code (`skip-middle`), in its own naming.

Its rotary embedding turns neighbouring features (2i, 2i + 1), ours the halves (i, i + K/2): the rows of the query and
key projections are reordered on the way. Its forward pass gates no key, which is `skipped_kv="keep"` here; its Hugging
Face wrapper sees the future at batch 1 and fails at batch 2, which is not repeated.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from midskip.convert.load import reading
from midskip.model.config import MidskipConfig
from midskip.model.modeling import MidskipForCausalLM

_CONFIG_KEYS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "max_seq_len",
    "use_scaled_rope",
)  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "input_norm.weight": "model.embed_layernorm.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_feed_forward_norm": "pre_feedforward_layernorm",
    "post_feed_forward_norm": "post_feedforward_layernorm",
}


def from_pretrained(folder: str | Path, skipped_kv: str = "keep") -> MidskipForCausalLM:
    """The model in a Hugging Face folder of the released code: `config.json` and `*.safetensors`.

    Args:
        folder: a local folder.
        skipped_kv: as in `MidskipConfig`; `"keep"` computes what the released code computes.

    Raises:
        ValueError: the folder, its configuration or its weights are not what is expected.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a Hugging Face folder of the released code")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors; convert other formats to safetensors first")
    with reading(folder / "config.json"):
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    weights: dict[str, Tensor] = {}
    for file in files:
        with reading(file, SafetensorError):
            weights.update(load_file(file))
    return from_state_dict({name.removeprefix("model."): x for name, x in weights.items()}, config, skipped_kv)


def from_state_dict(
    state_dict: Mapping[str, Any], config: Mapping[str, Any], skipped_kv: str = "keep"
) -> MidskipForCausalLM:
    """The model with these weights.

    Args:
        state_dict: tensors or arrays, by the released code's names (`layers.0.attention.wq.weight`, ...). Without
            `masks.*` the model is dense.
        config: the released code's settings: dim, n_layers, n_heads, n_kv_heads, vocab_size, norm_eps, rope_theta,
            max_seq_len, use_scaled_rope.
        skipped_kv: as in `MidskipConfig`; `"keep"` computes what the released code computes.

    Returns:
        The model in float32, in evaluation mode.

    Raises:
        ValueError: a setting is missing, or the names or shapes of the weights do not fit the settings.
    """
    missing = [key for key in _CONFIG_KEYS if key not in config]
    if missing:
        raise ValueError(f"the configuration lacks {', '.join(missing)}; expected {', '.join(_CONFIG_KEYS)}")
    if "layers.0.feed_forward.w1.weight" not in state_dict:
        raise ValueError("the weights lack layers.0.feed_forward.w1.weight: are they the released code's?")
    gated = any(name.startswith("masks.") for name in state_dict)
    model = MidskipForCausalLM(
        MidskipConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["dim"],
            intermediate_size=len(state_dict["layers.0.feed_forward.w1.weight"]),
            num_hidden_layers=config["n_layers"],
            num_attention_heads=config["n_heads"],
            num_key_value_heads=config["n_kv_heads"],
            max_position_embeddings=config["max_seq_len"],
            rms_norm_eps=config["norm_eps"],
            rope_parameters={
                **(_LLAMA3_ROPE if config["use_scaled_rope"] else {}),
                "rope_theta": float(config["rope_theta"]),
            },
            norms="sandwich",
            skipped_kv=skipped_kv,
            policy="middle_out" if gated else "dense",
            policy_settings={"start": "released"} if gated else {},
        )
    )
    weights = convert_weights(state_dict, model.config)
    expected = {name: list(x.shape) for name, x in model.state_dict().items()}
    found = {name: list(x.shape) for name, x in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        first = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights do not fit the configuration; the first, {first}: got "
            f"{found.get(first, 'nothing')}, expected {expected.get(first, 'nothing')}"
        )
    model.load_state_dict(weights)
    return model.eval()


def convert_weights(state_dict: Mapping[str, Any], config: MidskipConfig) -> dict[str, Tensor]:
    """The same tensors in float32 by midskip's names and in its order of rows; works for gradients as well.

    Raises:
        ValueError: a name that the released code does not have.
    """
    weights: dict[str, Tensor] = {}
    gates: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for name, value in state_dict.items():
        tensor = torch.as_tensor(value).detach().float()
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        gate = re.fullmatch(r"masks\.(\d+)\.linear\.(weight|bias)", name)
        if gate:
            gates[gate[2]][int(gate[1])] = tensor
        elif name in _NAMES:
            weights[_NAMES[name]] = tensor
        elif layer and layer[2] in _LAYER_NAMES:
            if layer[2] in ("attention.wq", "attention.wk"):
                tensor = tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            weights[f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"] = tensor
        else:
            raise ValueError(f"the released code has no weight named {name!r}")
    for kind, by_layer in gates.items():
        if by_layer:
            rows = [by_layer[layer].reshape(-1) for layer in sorted(by_layer)]
            weights[f"model.policy.{kind}"] = torch.stack(rows) if kind == "weight" else torch.cat(rows)
    return weights
