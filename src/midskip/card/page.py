"""The model card: README.md of a run folder, and of a model that is pushed to the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from midskip.budget.calibration import Calibration
from midskip.budget.measured_on import hashes_of
from midskip.card.costs import calibrated, evaluated, limits, retrofitted, speed
from midskip.card.folder import CARD_FILE, MARK, Measured, read_measured
from midskip.card.markdown import code, decimal, plain, source_name, table
from midskip.model.config import MidskipConfig
from midskip.plugins import is_module_name

PAPER = "[Learning to Skip the Middle Layers of Transformers](https://arxiv.org/abs/2506.21103)"
METRICS = {
    "loss": "Loss, nats a token",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits a byte",
    "executed_share": "Share of block-tokens that ran",
}


def model_card(
    name: str, config: MidskipConfig, num_parameters: int, measured: Measured | None = None, tags: Sequence[str] = ()
) -> str:
    """The page, in Markdown with a header in YAML that the hub reads. Whatever a user has named is shown as plain text.

    Args:
        name: of the repository or folder, as `from_pretrained` takes it.
        config: of the model; its calibration is shown if there is one.
        measured: of this model; without it nothing is said of quality.
        tags: for the hub, beside those every model of this package has.

    Raises:
        ValueError: what was measured has another form than midskip writes.
    """
    try:
        return _model_card(name, config, num_parameters, measured or Measured(), tags)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the model card of {name!r} cannot be made of what lies beside the model ({type(error).__name__}: "
            f"{error}): expected report.json, retrofit.json, evaluated.json and bench.json as midskip writes them; "
            "remove the one that is not"
        ) from error


def _model_card(name: str, config: MidskipConfig, num_parameters: int, measured: Measured, tags: Sequence[str]) -> str:
    report, recipe, curve = measured.report, measured.recipe, config.calibration
    parts = [f"---\n{_header(name, config, measured, tags)}\n---\n{MARK}", f"# {plain(name)}", _summary(config)]
    parts += _loading(name, config.policy, _is_labelled(report))
    if report is not None:
        parts += _measured(config, num_parameters, report, recipe)
    if measured.retrofit is not None and measured.retrofit["stages"]:
        parts += retrofitted(measured.retrofit)
    if curve is not None:
        calibration, found = Calibration.from_dict(curve), measured.evaluated
        parts += calibrated(calibration)
        if found is not None and found.get("calibration") == calibration.fingerprint():
            parts += evaluated(found)
    parts += [] if measured.bench is None else speed(measured.bench)
    parts += _architecture(config, num_parameters)
    if report is not None:
        parts += _training(report, recipe)
    parts += limits(config, report is not None or measured.retrofit is not None, curve is not None)
    return "\n\n".join(parts) + "\n"


def write_card(folder: str | Path, model: PreTrainedModel, name: str | None = None, **known: Any) -> Path | None:
    """Writes the page into the folder of a model, from what was measured of it.

    Args:
        name: of the repository it will lie in; by default the folder's.
        known: of `Measured`, instead of what lies in the folder.

    Returns:
        The file; None where there is one that lacks our mark: it is left as it is.

    Raises:
        ValueError: a file in the folder that cannot be read or shown.
    """
    file = Path(folder, CARD_FILE)
    if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    measured = replace(read_measured(folder, hashes_of(model)), **known)
    config: Any = model.config
    text = model_card(name or Path(folder).resolve().name, config, model.num_parameters(), measured)
    part = file.with_name(f"{CARD_FILE}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(file)  # whole or not there: half a page may lack our mark
    return file


def try_card(folder: str | Path, model: PreTrainedModel, **known: Any) -> None:
    """As `write_card`, at the end of a long command: what is wrong with a file there is a warning."""
    try:
        write_card(folder, model, **known)
    except ValueError as error:
        warnings.warn(f"no model card was written: {error}", stacklevel=2)


# ---- the parts


def _header(name: str, config: MidskipConfig, measured: Measured, tags: Sequence[str]) -> str:
    report, recipe, retrofit = measured.report, measured.recipe, measured.retrofit
    skipping = [] if config.policy == "dense" else ["layer-skipping", "adaptive-computation"]
    data: dict[str, Any] = {
        "library_name": "transformers",
        **({} if _is_labelled(report) else {"pipeline_tag": "text-generation"}),
        "tags": ["midskip", *skipping, *tags],
    }
    source = str(recipe["data"]["source"] if recipe else retrofit["settings"]["data"] if retrofit else "")
    if found := re.match(r"hub:([\w.-]+/[\w.-]+)(:|$)", source):
        data["datasets"] = [found[1]]
    base = str(retrofit["settings"]["model"]) if retrofit and retrofit.get("from_hub") else ""
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        data["base_model"] = base
    results: list[EvalResult] = []
    if report is not None and not _is_labelled(report):
        where = (f"{_text_name(report, recipe)}, held out", found[1] if found else "text")
        results = [_result(*where, metric, report["validation"][metric]) for metric in METRICS
                   if metric in report["validation"]]  # fmt: skip
    elif retrofit and retrofit["stages"]:
        results = _prices(retrofit)
    if results:
        data["model_name"] = name
        data["eval_results"] = results
    return ModelCardData(**data | dict(measured.header)).to_yaml().strip()


def _result(text: str, kind: str, metric: str, value: float, budget: float | None = None) -> EvalResult:
    return EvalResult(
        task_type="text-generation", task_name="Language modelling", dataset_type=kind, dataset_name=text,
        metric_type=metric, metric_name=METRICS[metric] + ("" if budget is None else f", at a budget of {budget:g}"),
        metric_value=value, metric_args=None if budget is None else {"budget": budget},
    )  # fmt: skip


def _prices(retrofit: Mapping[str, Any]) -> list[EvalResult]:
    """Of the last stage, at each budget."""
    prices = list(retrofit["stages"].values())[-1]["prices"]
    return [
        _result(f"{name}, held out", "text", metric, row["texts"][name][metric], row["budget"])
        for name in prices[0]["texts"]
        for row in prices
        for metric in ("loss", "executed_share")
    ]


def _is_labelled(report: Mapping[str, Any] | None) -> bool:
    """Whether the run was on labelled data: no text, no tokenizer."""
    return report is not None and bool(report.get("labelled"))


def _text_name(report: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> str:
    return report.get("text") or ("its text" if recipe is None else source_name(recipe["data"]["source"]))


def _summary(config: MidskipConfig) -> str:
    if config.policy == "dense":
        return "A causal language model of the package midskip. Its policy is `dense`: every token runs every layer."
    cached = "and has no entry in that layer's KV cache" if config.skipped_kv == "drop" else "but for its key and value"
    return (
        "A causal language model whose tokens skip layers, made with the package midskip after "
        f"{PAPER}. A token that skips a layer is not computed there, {cached}."
    )


def _loading(name: str, policy: str, labelled: bool) -> list[str]:
    module = policy.partition(":")[0]
    is_theirs = module != policy and is_module_name(module) and not module.startswith("midskip.")
    trust = f", trust={json.dumps([module])}" if is_theirs else ""
    load = f"""name = {json.dumps(name)}  # this repository, or the folder it lies in
model = MidskipForCausalLM.from_pretrained(name{trust})"""
    example = f"""import torch
from midskip import MidskipForCausalLM

{load}
print(model(torch.tensor([[0, 1, 2]])).logits.shape)"""
    if not labelled:
        example = f"""from midskip import MidskipForCausalLM
from transformers import AutoTokenizer

{load}
tokenizer = AutoTokenizer.from_pretrained(name, config=model.config)
ids = tokenizer("The", return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))"""
    needed = (
        "The package `midskip` has to be installed: it is the model's code. No code of this repository runs. After "
        "`import midskip`, transformers' `AutoModelForCausalLM` and `pipeline` know the model too."
    )
    if is_theirs:
        needed += " So has the module of its policy, which `trust` names: it is not part of `midskip`."
    return ["## How to load it", needed, code(example, "python")]


def _measured(
    config: MidskipConfig, num_parameters: int, report: Mapping[str, Any], recipe: Mapping[str, Any] | None
) -> list[str]:
    found = report["validation"]
    text = _text_name(report, recipe)
    kind = "dense" if config.policy == "dense" else "this model"
    rows = [(f"**{kind}, {config.num_hidden_layers} layers**", num_parameters, found, found["executed_share"])]
    rows += [
        (f"dense, {row['num_hidden_layers']} layers", row["num_parameters"], row, 1.0)
        for row in report.get("dense", ())
    ]
    cells = [
        (
            name, f"{count:,}", f"{row['loss']:.4f}", decimal(row.get("bits_per_byte")),
            f"{row['flops_per_token']:,.0f}", f"{share:.1%}",
        )
        for name, count, row, share in rows
    ]  # fmt: skip
    columns = ("model", "parameters", "loss, nats a token", "bits a byte", "FLOPs a token", "block-tokens that ran")
    unit = "sublayer" if config.skip_unit == "sublayer" else "layer"
    by_layer = ", ".join(f"{share:.0%}" for share in found["share_by_layer"])
    notes = (
        f"Share of the tokens that ran each {unit}, from the first: {by_layer}. With nothing skipped a token would "
        f"take {found['dense_flops_per_token']:,.0f} FLOPs. FLOPs are of the matrix products of a forward pass, a "
        "multiply-add as two, metered."
    )
    if report.get("dense"):
        notes += " The dense models were trained on the same text, for as many steps."
    what = "items" if _is_labelled(report) else "text"
    intro = f"On the held-out {what} of {plain(text)}: {found['num_targets']:,} predictions. One run, one seed."
    if _is_labelled(report):
        intro += f" {found['accuracy']:.1%} of the labels have the largest logit."
    return ["## Measured", intro, table(columns, cells), notes]


def _architecture(config: MidskipConfig, num_parameters: int) -> list[str]:
    settings = ", ".join(f"{key}: {value}" for key, value in sorted(config.policy_settings.items()))
    policy = f"{config.policy} ({settings})" if settings else config.policy
    rows = [
        ("parameters", f"{num_parameters:,}"),
        ("layers", f"{config.num_hidden_layers}"),
        ("hidden size, feed-forward size", f"{config.hidden_size}, {config.intermediate_size}"),
        ("query heads, key heads, head width",
         f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}"),
        ("vocabulary, positions", f"{config.vocab_size:,}, {config.max_position_embeddings:,}"),
        ("norms", config.norms),
        ("keys and values of a token that skips (skipped_kv)", config.skipped_kv),
        ("policy: who skips", policy),
    ]  # fmt: skip
    if config.skip_unit != "block":
        rows.append(("what a token skips (skip_unit)", config.skip_unit))
    if config.skip_path != "none":
        rows.append(("in the place of what is skipped (skip_path)", config.skip_path))
    return ["## Architecture", table(("", ""), [(plain(left), plain(right)) for left, right in rows])]


def _without_places(value: Any) -> Any:
    """The same, with paths that begin at the root or at home by their last part alone."""
    if isinstance(value, str):
        return source_name(value)
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    return [_without_places(one) for one in value] if isinstance(value, list | tuple) else value


def _training(report: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> list[str]:
    training = report["training"]
    parts = [f"{training['steps']:,} optimizer steps over {training['num_tokens']:,} tokens."]
    if recipe is not None and recipe["regularizer"]["name"] != "none":
        parts[0] += f" Regularizer of the gates: {plain(recipe['regularizer']['name'])}."
    signs = [f"{plain(sign['what'])} (step {sign['step']})" for sign in training.get("collapse", {}).values()]
    if signs:
        parts.append(f"**Signs of a collapse were seen in training**: {'; '.join(signs)}.")
    if recipe is not None:
        shown = _without_places({key: value for key, value in recipe.items() if key != "output"})
        parts += ["The recipe:", code(yaml.safe_dump(shown, sort_keys=False).strip(), "yaml")]
    return ["## Training", *parts]
