"""The model card: README.md of a run folder, and of a model that is pushed to the Hugging Face Hub."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from midskip.budget.calibration import Calibration
from midskip.model.config import MidskipConfig
from midskip.plugins import is_module_name

CARD_FILE, REPORT_FILE, RECIPE_FILE = "README.md", "report.json", "recipe.yaml"
MARK = "<!-- Written by midskip, which replaces this page as long as this line is in it. -->"
PAPER = "[Learning to Skip the Middle Layers of Transformers](https://arxiv.org/abs/2506.21103)"
METRICS = {
    "loss": "Loss, nats a token",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits a byte",
    "executed_share": "Share of block-tokens that ran",
}


def model_card(
    name: str,
    config: MidskipConfig,
    num_parameters: int,
    report: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The page, in Markdown with a header in YAML that the hub reads. Whatever a user has named is shown as plain text.

    Args:
        name: of the repository or folder, as `from_pretrained` takes it.
        config: of the model; its calibration is shown if there is one.
        report: what `midskip train` writes into report.json; without it nothing is said of quality.
        recipe: of the run, as a dictionary.
        tags: for the hub, beside those every model of this package has.
    """
    parts = [f"---\n{_header(name, config, report, recipe, tags)}\n---\n{MARK}", f"# {plain(name)}", _summary(config)]
    parts += _loading(name, config.policy, _is_labelled(report))
    if report is not None:
        parts += _measured(config, num_parameters, report, recipe)
    if config.calibration is not None:
        parts += _calibrated(Calibration.from_dict(config.calibration))
    parts += _architecture(config, num_parameters)
    if report is not None:
        parts += _training(report, recipe)
    return "\n\n".join(parts) + "\n"


def write_card(folder: str | Path, config: MidskipConfig, num_parameters: int) -> None:
    """Writes the page into a run folder, from its report and its recipe. One that lacks our mark is left as it is."""
    file = Path(folder, CARD_FILE)
    if file.is_file() and MARK not in file.read_text(encoding="utf-8"):
        return
    text = model_card(Path(folder).resolve().name, config, num_parameters, *read_run(folder))
    part = file.with_name(f"{CARD_FILE}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(file)  # whole or not there: half a page may lack our mark


def read_run(folder: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Report and recipe of a run folder; None for what it has not.

    Raises:
        ValueError: a report or a recipe that cannot be read.
    """
    found: list[Any] = []
    for name, read in ((REPORT_FILE, json.loads), (RECIPE_FILE, yaml.safe_load)):
        file = Path(folder, name)
        try:
            found.append(read(file.read_text(encoding="utf-8")) if file.is_file() else None)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(
                f"{str(file)!r} cannot be read: {error}; it is shown in the model card: remove it"
            ) from error
    of_a_run = ({"validation", "training"}, {"data", "regularizer"})  # others, as the demo's report, are not shown
    report, recipe = (
        values if isinstance(values, dict) and all(isinstance(values.get(key), dict) for key in keys) else None
        for values, keys in zip(found, of_a_run, strict=True)
    )
    return report, recipe


def plain(text: object) -> str:
    """Text in which Markdown and HTML find nothing to format, in one line."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return re.sub(r"([\\`*_\[\]{}|~$])", r"\\\1", html.escape(shown, quote=False))


def source_name(source: str) -> str:
    """What a text or a tokenizer is called: of a path that begins at the root or at home, its last part alone."""
    prefix = "hub:" if source.startswith("hub:") else ""
    path = source.removeprefix(prefix)
    return prefix + (Path(path).name if path.startswith(("/", "~", "..")) else path)


# ---- the parts


def _header(
    name: str, config: MidskipConfig, report: Mapping[str, Any] | None, recipe: Mapping[str, Any] | None,
    tags: Sequence[str],
) -> str:  # fmt: skip
    skipping = [] if config.policy == "dense" else ["layer-skipping", "adaptive-computation"]
    data: dict[str, Any] = {
        "library_name": "transformers",
        **({} if _is_labelled(report) else {"pipeline_tag": "text-generation"}),
        "tags": ["midskip", *skipping, *tags],
    }
    source = "" if recipe is None else str(recipe["data"]["source"])
    if found := re.match(r"hub:([\w.-]+/[\w.-]+)(:|$)", source):
        data["datasets"] = [found[1]]
    if report is not None and not _is_labelled(report):
        data["model_name"] = name
        data["eval_results"] = [
            EvalResult(
                task_type="text-generation", task_name="Language modelling", dataset_type=found[1] if found else "text",
                dataset_name=f"{_text_name(report, recipe)}, held out", metric_type=metric, metric_name=title,
                metric_value=report["validation"][metric],
            )
            for metric, title in METRICS.items()
            if metric in report["validation"]
        ]  # fmt: skip
    return ModelCardData(**data).to_yaml().strip()


def _is_labelled(report: Mapping[str, Any] | None) -> bool:
    """Whether the run was on labelled data: no text, no tokenizer."""
    return report is not None and bool(report.get("labelled"))


def _text_name(report: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> str:
    return report.get("text") or ("its text" if recipe is None else source_name(recipe["data"]["source"]))


def _summary(config: MidskipConfig) -> str:
    if config.policy == "dense":
        return "A causal language model of the package midskip. Its policy is `dense`: every token runs every layer."
    return (
        "A causal language model whose tokens skip layers, made with the package midskip after "
        f"{PAPER}. A token that skips a layer is not computed there and has no entry in that layer's KV cache."
    )


def _loading(name: str, policy: str, labelled: bool) -> list[str]:
    module = policy.partition(":")[0]
    is_theirs = module != policy and is_module_name(module) and not module.startswith("midskip.")
    options = "trust_remote_code=True" + (f", trust={json.dumps([module])}" if is_theirs else "")
    code = f"""import torch
from transformers import AutoModelForCausalLM

name = {json.dumps(name)}  # this repository, or the folder it lies in
model = AutoModelForCausalLM.from_pretrained(name, {options})
print(model(torch.tensor([[0, 1, 2]])).logits.shape)"""
    if not labelled:
        code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

name = {json.dumps(name)}  # this repository, or the folder it lies in
model = AutoModelForCausalLM.from_pretrained(name, {options})
tokenizer = AutoTokenizer.from_pretrained(name)
ids = tokenizer("The", return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))"""
    needed = "The package `midskip` has to be installed: it is the model's code."
    if is_theirs:
        needed += " So has the module of its policy, which `trust` names: it is not part of `midskip`."
    return ["## How to load it", needed, _code(code, "python")]


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
    table = [
        (
            name, f"{count:,}", f"{row['loss']:.4f}", _decimal(row.get("bits_per_byte")),
            f"{row['flops_per_token']:,.0f}", f"{share:.1%}",
        )
        for name, count, row, share in rows
    ]  # fmt: skip
    columns = ("model", "parameters", "loss, nats a token", "bits a byte", "FLOPs a token", "block-tokens that ran")
    by_layer = ", ".join(f"{share:.0%}" for share in found["share_by_layer"])
    notes = (
        f"Share of the tokens that ran each layer, from the first: {by_layer}. With nothing skipped a token would take "
        f"{found['dense_flops_per_token']:,.0f} FLOPs. FLOPs are of the matrix products of a forward pass, a "
        "multiply-add as two, metered."
    )
    if report.get("dense"):
        notes += " The dense models were trained on the same text, for as many steps."
    what = "items" if _is_labelled(report) else "text"
    intro = f"On the held-out {what} of {plain(text)}: {found['num_targets']:,} predictions. One run, one seed."
    if _is_labelled(report):
        intro += f" {found['accuracy']:.1%} of the labels have the largest logit."
    return ["## Measured", intro, _table(columns, table), notes]


def _calibrated(calibration: Calibration) -> list[str]:
    rows = [
        (f"{share:.3f}", f"{loss:.4f}", f"{score_scale:.4g}")
        for share, loss, score_scale in zip(calibration.share, calibration.loss, calibration.score_scale, strict=True)
    ]
    intro = (
        "`model.set_budget(0.5)` lets the model run at most half of its block-tokens on average, by this curve, "
        f"measured on {calibration.num_tokens:,} tokens of {plain(source_name(calibration.text))}."
    )
    return [
        "## A budget at run time",
        intro,
        _table(("share that ran", "loss, nats a token", "scale of the scores"), rows),
    ]


def _architecture(config: MidskipConfig, num_parameters: int) -> list[str]:
    settings = ", ".join(f"{key}: {value}" for key, value in config.policy_settings.items())
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
    return ["## Architecture", _table(("", ""), [(plain(left), plain(right)) for left, right in rows])]


def _training(report: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> list[str]:
    training = report["training"]
    parts = [f"{training['steps']:,} optimizer steps over {training['num_tokens']:,} tokens."]
    if recipe is not None and recipe["regularizer"]["name"] != "none":
        parts[0] += f" Regularizer of the gates: {plain(recipe['regularizer']['name'])}."
    signs = [f"{plain(sign['what'])} (step {sign['step']})" for sign in training.get("collapse", {}).values()]
    if signs:
        parts.append(f"**Signs of a collapse were seen in training**: {'; '.join(signs)}.")
    if recipe is not None:
        shown = {key: value for key, value in recipe.items() if key != "output"}
        places = {key: recipe["data"].get(key) for key in ("source", "validation", "tokenizer")}
        shown["data"] = recipe["data"] | {key: source_name(place) for key, place in places.items() if place}
        parts += ["The recipe:", _code(yaml.safe_dump(shown, sort_keys=False).strip(), "yaml")]
    return ["## Training", *parts]


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(text: str, language: str) -> str:
    """A block that no backticks in the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
