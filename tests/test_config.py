"""MidskipConfig: what is unknown or impossible is refused by name, and what is saved comes back."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from midskip import MidskipConfig, MidskipForCausalLM, MidskipModel
from midskip.model.packing import PackedBatch
from midskip.plugins import load_class
from midskip.policies import Decision, Policy

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


class EvenOnly(Policy):
    """An outside author's: odd layers are skipped by all tokens after the first `spared`."""

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02, *, spared: int = 1) -> None:
        super().__init__(num_layers, width, initializer_range)
        self.spared = spared

    def decide(self, layer: int, h_ND: torch.Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return Decision(batch.position_N < self.spared if layer % 2 else None)


def test_defaults_are_the_papers_model() -> None:
    config = MidskipConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (12, 768, 3072)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (12, 12, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (50257, 1024)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.norms, config.skipped_kv, config.policy) == ("sandwich", "drop", "middle_out")
    assert config.tie_word_embeddings is False and config.policy_settings == {}
    with torch.device("meta"):
        assert round(MidskipForCausalLM(config).num_parameters() / 1e6, 1) == 190.5


@pytest.mark.parametrize(
    "name, hint",
    [
        ("hiden_size", "did you mean 'hidden_size'"),
        ("skipped_k", "did you mean 'skipped_kv'"),
        ("num_layers", "num_hidden_layers|num_labels"),
        ("zebra", "known settings: .*vocab_size"),
    ],
)
def test_unknown_setting_is_refused_with_a_hint(tiny: Callable[..., MidskipConfig], name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"does not know the setting '{name}'; .*({hint})"):
        tiny(**{name: 1})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number of at least 1"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": -16}, "hidden_size is -16"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"intermediate_size": 0}, "intermediate_size is 0; expected a whole number of at least 1, or a list of 4"),
        ({"intermediate_size": [24] * 3}, r"intermediate_size is \[24, 24, 24\]; expected .*or a list of 4, one for"),
        ({"intermediate_size": [24, 24, 24, 0]}, "intermediate_size is .*; expected .*or a list of 4, one for"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": 18}, r"hidden_size \(18\) is not a multiple of num_attention_heads \(4\).*head_dim"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)"),
        ({"hidden_size": 12}, "head_dim is 3; .*make it even"),
        ({"head_dim": 5}, "head_dim is 5; .*make it even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a number above 0"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"initializer_range": -0.1}, "initializer_range is -0.1"),
        ({"norms": "post"}, "norms is 'post'; expected one of 'sandwich', 'pre'"),
        ({"skipped_kv": "some"}, "skipped_kv is 'some'; expected one of 'drop', 'keep'"),
        ({"policy": ""}, "policy is ''; expected a name or"),
        ({"policy_settings": "start"}, "policy_settings is 'start'; expected a dictionary"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected a dictionary"),
        (
            {"rope_parameters": {"rope_theta": -1.0}},
            r"rope_parameters\['rope_theta'\] is -1.0; expected a number above",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, "type 'default' has the keys .*'factor'"),
        ({"rope_parameters": LLAMA3 | {"beta": 1.0}}, "type 'llama3' has the keys .*'beta'.*expected exactly"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            "expected exactly .*'low_freq_factor'",
        ),
        ({"rope_parameters": YARN | {"beta": 1.0}}, "type 'yarn' has the keys .*'beta'.*and maybe .*'truncate'"),
        ({"rope_parameters": YARN | {"truncate": 1}}, r"rope_parameters\['truncate'\] is 1; expected True or False"),
        ({"rope_parameters": YARN | {"mscale": 0}}, r"rope_parameters\['mscale'\] is 0; expected a number above 0"),
        ({"no_rope_layers": [1, 0, 1]}, r"no_rope_layers is \[1, 0, 1\]; expected a list of 4 numbers"),
        ({"no_rope_layers": [1, 0, 1, 2]}, r"no_rope_layers is \[1, 0, 1, 2\]; expected a list of 4 numbers"),
        ({"no_rope_layers": 4}, "no_rope_layers is 4; expected a list of 4 numbers"),
        ({"attention_bias": 1}, "attention_bias is 1; expected True or False"),
        ({"attention_out_bias": "no"}, "attention_out_bias is 'no'; expected True or False"),
        ({"qk_norm": None}, "qk_norm is None; expected True or False"),
        ({"use_cache": 1}, "use_cache is 1; expected True or False"),
        ({"dtype": "float23"}, "dtype is 'float23'; expected the name of a dtype of torch, as 'float32', or None"),
        ({"dtype": 1e-320}, "dtype is 1e-320; expected the name of a dtype"),
        ({"pad_token_id": ""}, "pad_token_id is ''; expected the id of a token, or None"),
        ({"eos_token_id": [1, None]}, r"eos_token_id is \[1, None\]; expected the id of a token"),
        ({"id2label": False}, "id2label is False; expected a dictionary, or None"),
        ({"attn_implementation": "eager"}, "attn_implementation is 'eager'; .*leave it out"),
        ({"return_dict": False}, "return_dict is False; expected True"),
    ],
)
def test_impossible_value_is_refused(tiny: Callable[..., MidskipConfig], changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e39, 10**400], ids=["nan", "inf", "-inf", "1e39", "10**400"]
)
def test_numbers_that_are_none_are_refused(tiny: Callable[..., MidskipConfig], value: float) -> None:
    message = "; expected a finite number that float32 can hold"
    told = re.escape(repr(value))
    for name in ("rms_norm_eps", "initializer_range"):
        with pytest.raises(ValueError, match=f"{name} is {told}{message}"):
            tiny(**{name: value})
    for rope in (YARN, LLAMA3):
        for name in rope.keys() - {"rope_type"}:
            with pytest.raises(ValueError, match=rf"rope_parameters\['{name}'\] is {told}{message}"):
                tiny(rope_parameters=rope | {name: value})
    with pytest.raises(ValueError, match=rf"rope_parameters\['rope_theta'\] is {told}{message}"):
        tiny(rope_theta=value)


def test_unknown_rope_type_is_refused(tiny: Callable[..., MidskipConfig]) -> None:
    for kind in ("dynamic", "spiral"):
        with pytest.raises(
            ValueError, match=f"rope_type'\\] is '{kind}'; expected one of 'default', 'linear', 'llama3'"
        ):
            tiny(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})


def test_heads_are_filled_in_and_old_rope_names_are_read(tiny: Callable[..., MidskipConfig]) -> None:
    config = tiny(num_key_value_heads=None)
    assert (config.num_key_value_heads, config.head_dim) == (4, 4)
    assert tiny(hidden_size=18, head_dim=6).head_dim == 6
    assert tiny(rope_theta=500.0).rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    old = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert tiny(rope_theta=500000.0, rope_scaling=old).rope_parameters == LLAMA3


def test_settings_given_are_not_shared(tiny: Callable[..., MidskipConfig]) -> None:
    settings = {"start": "open"}
    config = tiny(policy_settings=settings)
    settings["start"] = "released"
    assert config.policy_settings == {"start": "open"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norms": "pre", "skipped_kv": "keep", "policy": "dense", "tie_word_embeddings": True, "head_dim": 6},
        {"attention_bias": True, "attention_out_bias": True, "qk_norm": True, "no_rope_layers": [1, 1, 1, 0]},
        {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.5}},
        {
            "policy_settings": {"start": "released"},
            "rope_parameters": LLAMA3,
            "pad_token_id": 0,
            "eos_token_id": [1, 2],
        },
    ],
)
def test_saved_configuration_comes_back(tiny: Callable[..., MidskipConfig], tmp_path: Path, changes: dict) -> None:
    config = tiny(**changes)
    config.save_pretrained(tmp_path)
    for loaded in (MidskipConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MidskipConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    again = MidskipConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_settings_given_while_loading_are_checked_and_filled_in(
    tiny: Callable[..., MidskipConfig], tmp_path: Path
) -> None:
    MidskipForCausalLM(tiny(policy="dense")).save_pretrained(tmp_path / "dense")
    for given, message in (
        ({"skipped_kv": "kept"}, r"skipped_kv is 'kept'; expected one of"),
        ({"skip_unit": "sublayers"}, r"skip_unit is 'sublayers'; expected one of"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ({"policy_settings": 3}, r"policy_settings"),
    ):
        with pytest.raises(ValueError, match=message):
            MidskipForCausalLM.from_pretrained(tmp_path / "dense", **given)
    model = MidskipForCausalLM.from_pretrained(tmp_path / "dense", policy="early_exit", skip_path="adapter")
    assert model.config.skip_path_rank == 64
    model.save_pretrained(tmp_path / "adapter")
    again = MidskipForCausalLM.from_pretrained(tmp_path / "adapter")
    for path in ("linear", "none"):
        config = MidskipConfig.from_pretrained(tmp_path / "adapter", skip_path=path)
        assert config.skip_path == path and config.skip_path_rank is None
    assert MidskipConfig.from_pretrained(tmp_path / "adapter", num_key_value_heads=None).num_key_value_heads == 4
    config, unused = AutoConfig.from_pretrained(tmp_path / "adapter", norms="pre", depth=3, return_unused_kwargs=True)
    assert config.norms == "pre" and unused == {"depth": 3}
    place = {"_name_or_path": ""}
    assert again.config.to_dict() | place == model.config.to_dict() | place


def test_unknown_key_in_a_file_is_refused(tiny: Callable[..., MidskipConfig], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"norms"', '"normz"'))
    with pytest.raises(ValueError, match="does not know the setting 'normz'; did you mean 'norms'"):
        MidskipConfig.from_pretrained(tmp_path)


def test_auto_classes_build_the_models(tiny: Callable[..., MidskipConfig]) -> None:
    assert type(AutoModel.from_config(tiny())) is MidskipModel
    assert type(AutoModelForCausalLM.from_config(tiny())) is MidskipForCausalLM


@pytest.mark.parametrize(
    "policy, settings, message",
    [
        (
            "middle_in",
            {},
            "unknown policy 'middle_in'; expected one of 'dense', 'middle_out', ",
        ),
        ("no.such.module:Class", {}, "policy 'no.such.module:Class' cannot be loaded: No module"),
        ("midskip.policies:Nobody", {}, "cannot be loaded: .*Nobody.*is its module installed"),
        ("torch.nn:Linear", {}, "policy 'torch.nn:Linear' is .*expected a subclass of midskip.policies.base.Policy"),
        ("middle_out", {"begin": 1}, "policy 'middle_out' does not know the setting 'begin'; it knows 'start'"),
        ("middle_out", {"width": 1}, "policy 'middle_out' does not know the setting 'width'"),
        ("middle_out", {"start": "shut"}, "start is 'shut'; expected one of 'open', .*'released'"),
        ("dense", {"start": "open"}, "policy 'dense' does not know the setting 'start'; it knows none"),
        (f"{__name__}:EvenOnly", {"saved": 1}, "does not know the setting 'saved'; it knows 'spared'"),
    ],
)
def test_wrong_policy_or_setting_is_refused(
    tiny: Callable[..., MidskipConfig], policy: str, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MidskipModel(tiny(policy=policy, policy_settings=settings))


def test_outside_policy_by_import_path(tiny: Callable[..., MidskipConfig], tmp_path: Path) -> None:
    model = MidskipForCausalLM(tiny(policy=f"{__name__}:EvenOnly", policy_settings={"spared": 3})).eval()
    assert type(model.model.policy) is EvenOnly
    ids_BT = torch.randint(31, (2, 5))
    present = model(ids_BT).gates > 0
    assert present[::2].all() and present[1::2, :, :3].all() and not present[1::2, :, 3:].any()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust=[__name__])
    assert torch.equal(loaded(ids_BT).logits, model(ids_BT).logits)


def test_load_class_names_what_it_is_for() -> None:
    assert load_class("torch.nn:Linear", nn.Module, "layer", ()) is nn.Linear
    with pytest.raises(ValueError, match=r"layer '\.nn:Linear' is relative; expected the whole name of a module"):
        load_class(".nn:Linear", nn.Module, "layer", ())
    with pytest.raises(ValueError, match="unknown layer 'x'; expected one of 'a', 'b' or"):
        load_class("x", nn.Module, "layer", ("a", "b"))
