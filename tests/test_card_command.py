"""`midskip card`: all that was measured of a model, on its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_cards import evaluated, pushed_card, retrofitted, timed
from tiny_curve import CURVE

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.budget.measured_on import hashes_of
from midskip.card import MARK, Measured, model_card, try_card, write_card
from midskip.cli import main


@pytest.fixture
def whole(saved_model: Path, tmp_path: Path) -> Path:
    """A folder of a model with all that can have been measured of it."""
    folder = shutil.copytree(saved_model, tmp_path / "my_model")
    times = timed(weights=hashes_of(MidskipForCausalLM.from_pretrained(folder)))
    for name, found in (("retrofit", retrofitted()), ("evaluated", evaluated()), ("bench", times)):
        (folder / f"{name}.json").write_text(json.dumps(found))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"calibration": CURVE}))
    return folder


def test_the_command_shows_all_that_was_measured(whole: Path, hub: dict[str, Any]) -> None:
    assert main(["card", str(whole), "--name", "somebody/skipper"]) == 0
    text = (whole / "README.md").read_text()
    for row in (
        "| stories | 1 | 50.0% | 100.0% | 3.2500 | +0.0000 |",
        "| stories | 0.5 | 50.0% | 50.0% | 3.5000 | +0.2500 |",
        "| as trained | 49.0% | 2.7500 |",
        "| 0.5 | 49.0% | 2.8750 |",
        "| prefill | 1 | 512 | trained | 52.50 | 0.750 | 0.625 | 50.0% |",
        f"| {CURVE['share'][0]:.3f} | {CURVE['loss'][0]:.4f} |",
    ):
        assert f"\n{row}" in text
    assert "on 64,000 tokens" in text and "22,000 tokens of stories" in text and "one prompt may run more" in text
    results = ModelCard(text).data.eval_results
    losses = {result.metric_args["budget"]: result.metric_value for result in results if result.metric_type == "loss"}
    assert losses == {1.0: 3.25, 0.5: 3.5} and len(results) == 4
    MidskipForCausalLM.from_pretrained(whole).push_to_hub("somebody/skipper")
    assert pushed_card(hub) == text, "the same card"


def test_times_under_a_budget_are_said_to_be(whole: Path) -> None:
    file = whole / "bench.json"
    for max_layers, told in ((None, "As trained, beside"), (2, "Under a budget or `max_layers`, beside")):
        found = json.loads(file.read_text())
        found["limits"]["max_layers"] = max_layers
        file.write_text(json.dumps(found))
        assert main(["card", str(whole)]) == 0 and f"\n{told}" in (whole / "README.md").read_text()


def test_times_of_other_weights_are_not_shown(whole: Path) -> None:
    model = MidskipForCausalLM.from_pretrained(whole)
    write_card(whole, model.bfloat16())
    assert "## Speed" in (whole / "README.md").read_text(), "the same weights"
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    write_card(whole, model)
    assert "## Speed" not in (whole / "README.md").read_text()


def test_the_command_refuses_what_it_cannot_show(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {"as_trained": {}, "budgets": [], "calibration": evaluated()["calibration"]}
    (whole / "evaluated.json").write_text(json.dumps(broken))
    assert main(["card", str(whole)]) == 2 and not (whole / "README.md").exists()
    assert "cannot be made of what lies beside the model (KeyError: 'executed_share')" in capsys.readouterr().err
    (whole / "evaluated.json").unlink()
    (whole / "README.md").write_text("My own words.")
    assert main(["card", str(whole)]) == 2 and (whole / "README.md").read_text() == "My own words."
    assert "has a README.md that midskip did not write, or that is yours now" in capsys.readouterr().err


def test_budgets_of_another_calibration_are_not_shown(whole: Path) -> None:
    """As of weights from before a fine-tune."""
    config = json.loads((whole / "config.json").read_text())
    curve = {name: few[:3] if isinstance(few, list) else few for name, few in CURVE.items()}
    curve |= {"share": [1.0, 0.9, 0.8], "loss": [1.0, 1.1, 1.2]}
    (whole / "config.json").write_text(json.dumps(config | {"calibration": curve}))
    assert main(["card", str(whole)]) == 0
    text = (whole / "README.md").read_text()
    assert "Measured on text" not in text and "| 0.800 | 1.2000 | 2 |" in text
    assert "`model.set_budget(0.8)` lets the model run at most 0.8 " in text, "a budget that it can run at"


def test_at_the_end_of_a_run_a_bad_file_is_a_warning(whole: Path) -> None:
    (whole / "bench.json").write_text("{")
    model = MidskipForCausalLM.from_pretrained(whole)
    with pytest.warns(UserWarning, match="no model card was written: .*bench.json' cannot be read"):
        try_card(whole, model)
    (whole / "bench.json").unlink()
    (whole / "README.md").write_bytes("Caf\u00e9".encode("latin-1"))
    try_card(whole, model)
    assert (whole / "README.md").read_bytes() == b"Caf\xe9", "it is not ours"


def test_the_command_refuses_numbers_of_other_weights(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MidskipForCausalLM.from_pretrained(whole)
    model.config.calibration = CURVE | {"weights": hashes_of(model)}
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    model.save_pretrained(whole)
    assert main(["card", str(whole)]) == 2 and not (whole / "README.md").exists()
    assert "was measured on other weights than it has now" in capsys.readouterr().err


def test_license_and_language_of_a_user_stay(whole: Path, hub: dict[str, Any]) -> None:
    assert main(["card", str(whole)]) == 0
    card = ModelCard((whole / "README.md").read_text())
    card.data.license, card.data.language, card.data.base_model = "mit", ["en", "no"], "somebody/dense"
    card.data.license_name = "My Licence 1.0"
    (whole / "README.md").write_text(str(card).replace("'no'", "no"))  # which YAML takes for False
    assert main(["card", str(whole)]) == 0
    hub["card"] = f"---\nlicense: bsd-3-clause\nlicense_link: https://a.example/b?id=3#a\n---\n{MARK}\n# An earlier one"
    MidskipForCausalLM.from_pretrained(whole).push_to_hub("somebody/skipper")
    for text in ((whole / "README.md").read_text(), pushed_card(hub)):
        data = ModelCard(text).data
        assert (data.license, data.language, data.base_model) == ("mit", ["en", "no"], "somebody/dense")
        assert data.license_name == "My Licence 1.0"
    assert ModelCard(pushed_card(hub)).data.license_link == "https://a.example/b?id=3#a"


@pytest.mark.parametrize(
    ("model", "from_hub", "base"),
    [("org/Small-1.5B", True, "org/Small-1.5B"), ("runs/whole", False, None), ("../x/y", True, None)],
)
def test_the_original_of_a_retrofit_is_its_base_model(model: str, from_hub: bool, base: str | None) -> None:
    found = retrofitted() | {"from_hub": from_hub}
    found["settings"]["model"] = model
    assert ModelCard(model_card("mine", MidskipConfig(), 7, Measured(retrofit=found))).data.get("base_model") == base


# of https://github.com/huggingface/hub-docs/blob/main/modelcard.md, the keys of a card's header, and of what is in it
