"""The model card of a run folder and of a model that is pushed: its numbers, and that no text of a user formats it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from tiny_cards import evaluated, pushed_card, retrofitted, timed
from tiny_curve import CURVE
from tiny_runs import QUIET, tiny_recipe
from transformers import AutoModelForCausalLM

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.budget.calibration import Calibration
from midskip.budget.measured_on import hashes_of
from midskip.card import MARK, Measured, model_card, read_measured, read_run, source_name
from midskip.cli import main
from midskip.runs import load_run
from midskip.train import train


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with hard gates and a dense model beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midskip.train.report.write_picture", lambda *args, **kwargs: None)
        recipe = tiny_recipe(
            prepared, tmp_path_factory.mktemp("runs") / "my_run", "target_share", {"target_share": 0.5},
            model={"policy_settings": {"gates": "hard"}}, dense_layers=[2],
        )  # fmt: skip
        train(recipe, console=QUIET)
    return Path(recipe.output)


def assert_measured(text: str, run: Path) -> None:
    """The card has the numbers of the run's report, for people and for the hub."""
    report = json.loads((run / "report.json").read_text())
    found = report["validation"]
    metrics = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert metrics == {name: found[name] for name in ("loss", "perplexity", "bits_per_byte", "executed_share")}
    (dense,) = report["dense"]
    for row, share in ((found, found["executed_share"]), (dense, 1.0)):
        numbers = f"{row['loss']:.4f} | {row['bits_per_byte']:.4f} | {row['flops_per_token']:,.0f} | {share:.1%} |"
        assert numbers in text
    assert "dense, 2 layers" in text and f"{report['num_parameters']:,}" in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert yaml.safe_load(recipe)["training"] == written["training"] and "output" not in yaml.safe_load(recipe)


def test_a_run_folder_has_a_card_with_its_numbers(run: Path) -> None:
    text = (run / "README.md").read_text()
    assert_measured(text, run)
    assert (
        ModelCard(text).data.library_name == "transformers" and ModelCard(text).data.pipeline_tag == "text-generation"
    )
    assert "# my\\_run" in text and str(run.parent) not in text, "no path of this machine"
    assert "this model, 4 layers" in text and "set_budget" not in text
    dense = (run / "dense-2" / "README.md").read_text()
    assert "every token runs every layer" in dense and "**dense, 2 layers**" in dense


def test_a_push_from_a_run_folder_takes_them_along(run: Path, hub: dict[str, Any]) -> None:
    model, _ = load_run(run)
    model.push_to_hub("somebody/skipper", tags=["mine"])
    assert {"config.json", "model.safetensors", "load_midskip.py", "README.md"} <= set(hub["files"])
    text = pushed_card(hub)
    assert_measured(text, run)
    assert "# somebody/skipper" in text and 'name = "somebody/skipper"' in text
    assert {"midskip", "mine"} <= set(ModelCard(text).data.tags)


def test_saving_with_a_push_takes_them_along(run: Path, hub: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="somebody/skipper")
    assert_measured(pushed_card(hub), run)
    assert (tmp_path / "saved" / "README.md").read_bytes() == hub["files"]["README.md"]


@pytest.mark.parametrize("change", ["weights", "dtype", "settings"])
def test_another_model_has_no_numbers(run: Path, hub: dict[str, Any], change: str) -> None:
    """Other weights, or the same that skip in another way."""
    model, _ = load_run(run)
    model.config.calibration = CURVE
    if change == "weights":
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3
    elif change == "settings":
        model = MidskipForCausalLM.from_pretrained(run, skipped_kv="keep")
    else:
        model.bfloat16()
    model.push_to_hub("somebody/skipper")
    text = pushed_card(hub)
    assert ModelCard(text).data.eval_results is None
    assert "## Measured" not in text and "budget" not in text and "## Architecture" in text


def test_a_model_without_a_run_has_a_plain_card(make_model: Callable[..., Any], hub: dict[str, Any]) -> None:
    model = make_model(gates=None, dtype=torch.float32, policy_settings={"start": "spread"})
    model.push_to_hub("somebody/plain")
    text = pushed_card(hub)
    assert re.findall(r"^## .*", text, re.MULTILINE) == ["## How to load it", "## Architecture", "## Limits"]
    assert "| policy: who skips | middle\\_out (start: spread) |" in text and "| layers | 4 |" in text
    assert "skip\\_unit" not in text and "skip\\_path" not in text
    text = make_model(skip_unit="sublayer", skip_path="linear").model_card("mine")
    assert "(skip\\_unit) | sublayer |" in text and "(skip\\_path) | linear |" in text


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_known_again(make_model: Callable[..., Any], tmp_path: Path, tied: bool) -> None:
    make_model(dtype=torch.float32, tie_word_embeddings=tied, calibration=CURVE).save_pretrained(tmp_path / "saved")
    loaded = MidskipForCausalLM.from_pretrained(tmp_path / "saved")
    assert "set_budget" in loaded.model_card("mine")
    with torch.no_grad():
        loaded.lm_head.weight[0, 0] += 1
    assert "set_budget" not in loaded.model_card("mine")


def test_a_curve_of_other_weights_is_not_shown(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Also where the weights are those of the folder that the model was loaded from."""
    model = make_model(dtype=torch.float32)
    model.config.calibration = CURVE | {"weights": hashes_of(model)}
    assert "set_budget" in model.model_card("mine")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert "set_budget" not in model.model_card("mine")
    model.save_pretrained(tmp_path / "saved")
    assert "set_budget" not in MidskipForCausalLM.from_pretrained(tmp_path / "saved").model_card("mine")


def test_a_card_that_somebody_wrote_stays(run: Path, hub: dict[str, Any]) -> None:
    model, _ = load_run(run)
    hub["card"] = "---\nlicense: mit\n---\nMy own words."
    model.push_to_hub("somebody/skipper")
    assert pushed_card(hub).endswith("My own words.")
    hub["card"] = f"---\ntags: [old]\n---\n{MARK}\n# An earlier run"
    model.push_to_hub("somebody/skipper")
    assert "earlier" not in pushed_card(hub) and "old" in ModelCard(pushed_card(hub)).data.tags
    assert_measured(pushed_card(hub), run)


def test_calibrating_a_run_adds_the_curve(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (run / name).read_text() for name in ("README.md", "config.json")}
    monkeypatch.setattr("midskip.budget.calibrate.calibrate", lambda *args, **kwargs: Calibration.from_dict(CURVE))
    try:
        assert main(["calibrate", str(run)]) == 0
        text = (run / "README.md").read_text()
        (run / "README.md").write_text("My own words.")
        assert main(["calibrate", str(run)]) == 0
        assert (run / "README.md").read_text() == "My own words."
    finally:
        for name, earlier in before.items():
            (run / name).write_text(earlier)
    assert_measured(text, run)
    for share, loss in zip(CURVE["share"], CURVE["loss"], strict=True):
        assert f"| {share:.3f} | {loss:.4f} |" in text


DOCUMENTED = {
    "language", "license", "license_name", "license_link", "library_name", "tags", "datasets", "metrics", "base_model",
    "pipeline_tag", "thumbnail", "new_version", "base_model_relation", "model-index",
}  # fmt: skip
OF_RESULTS = {
    "task": {"type", "name"},
    "dataset": {"type", "name", "config", "split", "revision", "args"},
    "metrics": {"type", "value", "name", "config", "args", "verified", "verifyToken"},
}
NEEDED = {"task": {"type"}, "dataset": {"type", "name"}, "metrics": {"type", "value"}}


@pytest.mark.parametrize("kind", ["run", "retrofit", "model"])
def test_the_header_is_one_that_the_hub_takes(run: Path, kind: str) -> None:
    """Known keys alone, each of its type, and the same after a round trip."""
    measured = {"run": read_measured(run, None), "retrofit": Measured(retrofit=retrofitted()), "model": Measured()}[
        kind
    ]
    card = ModelCard(model_card("somebody/skipper", MidskipConfig(), 7, measured, ["mine"]))
    header = yaml.safe_load(card.content.split("---\n")[1])
    assert header.keys() <= DOCUMENTED
    assert all(isinstance(tag, str) for tag in header["tags"])
    again = ModelCardData(**header)
    assert again.to_dict() == card.data.to_dict() and yaml.safe_load(again.to_yaml()) == header
    index = header.get("model-index", [])
    assert len(index) == (kind != "model")
    for result in (result for model in index for result in model["results"]):
        assert result.keys() == OF_RESULTS.keys()
        for part, known in OF_RESULTS.items():
            for values in result[part] if part == "metrics" else [result[part]]:
                assert NEEDED[part] <= values.keys() <= known
        assert all(isinstance(metric["value"], float) for metric in result["metrics"])


EVIL = [
    "<img src=x onerror=1>",
    "[a](javascript:1)",
    "`x`",
    "a\n```\n# b",
    "a | b",
    "*c* _d_ ~~e~~",
    "![f](g)",
    "--> h",
]


def rows_of(tokens: list[Any]) -> list[list[str]]:
    """Cells of the rows of all tables."""
    rows: list[list[str]] = []
    for before, token in pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            rows[-1].append(token.content)
    return rows


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_no_text_formats_the_page(run: Path, evil: str) -> None:
    report, recipe = read_run(run)
    assert report is not None and recipe is not None
    signs = {"loss": {"step": 3, "what": evil}}
    report |= {"text": evil, "training": report["training"] | {"collapse": signs}}
    recipe |= {"regularizer": {"name": evil, "settings": {"a": evil, evil: 1}}, "dense_layers": [evil]}
    config = MidskipConfig(policy=evil, policy_settings={evil: evil}, calibration=CURVE | {"text": evil})
    bench = timed(evil)
    budgets = evaluated(evil) | {"calibration": Calibration.from_dict(config.calibration).fingerprint()}
    measured = Measured(report, recipe, retrofitted(evil), budgets, bench, {"license": evil})
    text = model_card(evil, config, 7, measured, [evil])
    card = ModelCard(text)
    assert card.data.tags[-1] == evil and card.data.eval_results[0].dataset_name == f"{evil}, held out"
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)
    inner = [child for token in tokens for child in token.children or ()]
    links = {str(token.attrs["href"]) for token in inner if token.type == "link_open"}
    assert links == {"https://arxiv.org/abs/2506.21103"}
    assert [token.content.strip() for token in tokens if token.type == "html_block"] == [MARK]
    assert not {token.type for token in inner} & {"html_inline", "image", "em_open", "s_open"}
    assert {token.content for token in inner if token.type == "code_inline"} <= {
        "midskip", "import midskip", "trust", "AutoModelForCausalLM", "pipeline", "model.set_budget(0.5)",
        "midskip retrofit",
    }  # fmt: skip
    code = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in code] == ["python", "yaml"]
    assert yaml.safe_load(code[1].content)["regularizer"] == recipe["regularizer"]
    compile(code[0].content, "card", "exec")
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 10
    assert {len(row) for row in rows_of(tokens)} == {2, 3, 6, 8}, "no text ends a cell"
    cells = "".join(token.content + "\n" for token in inner if token.type == "text")
    assert " ".join(evil.split()) in " ".join(cells.split()) or "`" in evil


@pytest.mark.parametrize(
    ("source", "name"),
    [("pydocs", "pydocs"), ("/home/me/texts", "texts"), ("~/a/*.txt", "*.txt"), ("org/tokens", "org/tokens"),
     ("hub:org/set:config", "hub:org/set:config"), ("hub:/home/me/set", "hub:set"),
     ("a/b.txt, /home/me/c.txt,~/d.txt", "a/b.txt,c.txt,d.txt")],
)  # fmt: skip
def test_a_text_is_called_without_the_folders_of_a_machine(source: str, name: str) -> None:
    assert source_name(source) == name


def test_a_data_set_of_the_hub_is_named(run: Path) -> None:
    report, recipe = read_run(run)
    assert report is not None and recipe is not None
    recipe["data"]["source"] = "hub:somebody/texts:small:train"
    recipe["model"]["init_from"] = "/home/me/runs/first"
    card = model_card("mine", MidskipConfig(), 7, Measured(report, recipe))
    assert "init_from: first\n" in card and "/home/me" not in card, "no path of a machine"
    data = ModelCard(card).data
    assert data.datasets == ["somebody/texts"] and data.eval_results[0].dataset_type == "somebody/texts"


def test_a_report_that_is_broken_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json' cannot be read: .*: remove it"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["a: 1\n", "[]\n"])
def test_a_report_and_a_recipe_of_something_else_are_not_shown(tmp_path: Path, text: str) -> None:
    for name in ("report.json", "recipe.yaml"):
        (tmp_path / name).write_text(json.dumps(yaml.safe_load(text)))
    assert read_run(tmp_path) == (None, None)
