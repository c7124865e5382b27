"""What a model takes to the Hugging Face Hub beside its files, a card that says what was measured of these weights; and
what a folder from there may do when it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import check_peft_version

from midskip.budget.measured_on import calibration_of, hashes_of, settings_of
from midskip.card import CARD_FILE, MARK, Measured, header_of, model_card, read_measured

TEMPLATE = "This model card has been automatically generated."  # in the card transformers makes where there is none


class CardedModel(PreTrainedModel):
    """A model whose `push_to_hub`, and `save_pretrained(..., push_to_hub=True)`, upload a card of its own.

    If the model was loaded from the folder of a run or a retrofit, and has its weights, the card has what was measured
    of it; otherwise it says what the model is and how to load it. A card that somebody wrote, and that is in the
    repository already, stays.
    """

    @classmethod
    def from_pretrained(cls, *arguments: Any, trust: Collection[str] = (), **kwargs: Any) -> Any:
        """As transformers does, but from safetensors alone (`use_safetensors=False` is for other files).

        Args:
            trust: modules that a policy may be imported from because `config.json` says so; see
                `MidskipConfig.from_dict`. A `config` that is given is the caller's own.
        """
        if not isinstance(kwargs.get("config"), PretrainedConfig):
            kwargs["trust"] = trust
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(*arguments, **kwargs)

    def load_adapter(self, *arguments: Any, **kwargs: Any) -> Any:
        """As transformers does; `from_pretrained` calls it where an adapter lies beside a model."""
        check_peft_version("0.20")  # those before import what an adapter's configuration names
        return super().load_adapter(*arguments, **kwargs)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """transformers calls this with everything that is to be uploaded, its own card too."""
        card = Path(working_dir, CARD_FILE)
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if not text or MARK in text or TEMPLATE in text:
            tags = ModelCard(text).data.get("tags") if text else None
            card.write_text(self.model_card(repo_id, tags or (), header_of(text)), encoding="utf-8", newline="\n")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def model_card(self, name: str, tags: Any = (), header: Mapping[str, Any] | None = None) -> str:
        """The model card as `push_to_hub` writes it, in Markdown.

        Args:
            name: of the repository, as `from_pretrained` takes it.
            tags: for the hub, beside our own.
            header: what the card in the repository says of license, language and base model; what the card in the
                folder of the model says of them comes first.
        """
        config: Any = copy.deepcopy(self.config)
        measured, folder = Measured(), self.name_or_path
        if folder and self._is_as_in(Path(folder)):
            measured = read_measured(folder, hashes_of(self))
        elif folder:  # what was measured was another model
            config.calibration = None
        try:
            calibration_of(self)
        except ValueError:  # none, or one of other weights or settings
            config.calibration = None
        measured = replace(measured, header={**(header or {}), **measured.header})
        return model_card(name, config, self.num_parameters(), measured, tags)

    def _is_as_in(self, folder: Path) -> bool:
        """Whether the weights are, bit for bit, those in the folder's files, and who skips what is as its config.json
        says."""
        files = sorted(folder.glob("model*.safetensors"))
        if not files:  # the name of a repository, for one
            return False
        values, _ = PretrainedConfig.get_config_dict(folder)
        trust = [str(values.get("policy")).partition(":")[0]]  # nothing is imported from it
        if settings_of(type(self.config).from_dict(values, trust=trust)) != settings_of(self.config):
            return False
        state, seen = self.state_dict(), set()
        for file in files:
            with safe_open(file, framework="pt") as saved:
                for name in saved.keys():  # noqa: SIM118 - it is no dictionary
                    tensor = state.get(name)
                    if tensor is None or not _same(tensor.cpu(), saved.get_tensor(name)):
                        return False
                    seen.add(name)
        tied = set(self.all_tied_weights_keys)
        return set(state) - seen <= tied


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)
