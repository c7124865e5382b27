"""LoRA of `peft`: trained by a plain Trainer, saved, loaded, merged; what of the policy it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from midskip import MidskipConfig, MidskipForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def fitted(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, **lora: Any) -> PeftModel:
    """The model with an adapter that was trained for a few steps."""
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **lora))
    rows = [{"input_ids": list(range(start, start + 5 + start % 7))} for start in range(1, 300, 25)]
    settings: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.1, "report_to": [], "save_strategy": "no"}
    Trainer(
        adapted,
        TrainingArguments(str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **settings),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()
    return adapted.eval()


def trained(model: PeftModel) -> set[str]:
    """Names of the modules or parameters that the adapter trains."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name.split(".lora_")[0].split(".")[-1] if ".lora_" in name else name.split(".", 3)[-1] for name in names}


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    ids_BT = torch.arange(1, 25).view(2, 12)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :4] = 0
    return model(input_ids=ids_BT, attention_mask=mask_BT).logits


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(["q_proj", "v_proj"], {"q_proj", "v_proj"}), ("all-linear", LINEAR), (["up_proj"], {"up_proj"})],
    ids=["q and v", "all-linear", "up"],
)
def test_an_adapter_is_trained_saved_loaded_and_merged(
    saved_model: Path, learnt: PreTrainedTokenizerFast, tmp_path: Path, targets: Any, expected: set[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_model)
    before = logits_of(base)
    assert base(torch.arange(1, 25)[None]).executed_share < 0.95
    model = fitted(base, learnt, tmp_path / "run", target_modules=targets)
    assert trained(model) == expected, "nothing of the policy: its parameters are no linear layers"
    assert all(parameter.any() for name, parameter in model.named_parameters() if ".lora_B." in name), "each is used"
    logits = logits_of(model)
    assert (logits - before).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits_of(model), before)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_model), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded.eval()), logits, rtol=0, atol=1e-5)
    arguments: Any = {"input_ids": torch.arange(1, 9)[None], "max_new_tokens": 4, "do_sample": False}
    generated = model.generate(**arguments)
    merged: Any = model.merge_and_unload()
    assert type(merged) is MidskipForCausalLM
    torch.testing.assert_close(logits_of(merged), logits, rtol=0, atol=1e-4)
    assert torch.equal(merged.generate(**arguments), generated)


def test_soft_gates_are_trained_if_the_policy_is_named(
    tiny: Any, learnt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config: MidskipConfig = tiny(vocab_size=320, policy_settings={"start": "spread"})
    MidskipForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: parameter.clone() for name, parameter in base.model.policy.named_parameters()}
    model = fitted(base, learnt, tmp_path / "run", target_modules=["v_proj"], modules_to_save=["policy"])
    copies = {f"policy.modules_to_save.default.{name}" for name in before}
    assert trained(model) == {"v_proj", *copies}
    logits = logits_of(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    torch.testing.assert_close(logits_of(loaded.eval()), logits, rtol=0, atol=1e-5)
    whole: Any = model.base_model.model
    whole.set_budget(max_layers=2)  # reaches the policy that is in force
    assert not torch.equal(logits_of(model), logits)
    whole.set_budget()
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits, rtol=0, atol=1e-4)
    for name, parameter in merged.model.policy.named_parameters():
        assert not torch.equal(parameter, before[name]), name
