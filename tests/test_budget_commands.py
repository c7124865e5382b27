"""A budget at run time from the command line: measured, evaluated, generated under."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_curve import CURVE
from transformers import PreTrainedTokenizerFast

from midskip import MidskipForCausalLM
from midskip.budget.calibrate import calibrate
from midskip.budget.calibration import Calibration
from midskip.budget.monitor import BudgetDriftError, DriftMonitor
from midskip.cli import main
from midskip.evaluate import depth_of_tokens

Make = Callable[..., MidskipForCausalLM]


@pytest.fixture
def run(make_model: Make, learnt: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A run folder without recipe, with two texts beside it."""
    folder = tmp_path / "run"
    make_model("mixed", torch.float32, vocab_size=len(learnt)).save_pretrained(folder)
    learnt.save_pretrained(folder)
    for name, word in (("here", "the cat sat on mat"), ("there", "Function returns 名前 names")):
        documents = [f"{word} {i % 7}, and {word[::-1]} {i}.\n" * 4 for i in range(40)]
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>\n".join(documents), encoding="utf-8")
    return folder


@pytest.mark.integration
def test_calibrate_evaluate_and_generate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.json").read_text()
    files = {file.name: file.read_bytes() for file in run.iterdir()}
    arguments = [str(run), "--data", str(tmp_path / "here.txt"), "--batch_size", "64"]
    assert main(["calibrate", *arguments, "--lowest", "0.4", "--max_tokens", "2600", "--name", "cats", "--json"]) == 0
    captured = capsys.readouterr()
    curve = json.loads(captured.out)
    assert Calibration.from_dict(curve).text == "cats" and 2048 <= curve["num_tokens"] <= 2700
    assert curve["share"][-1] < 0.55
    after = json.loads((run / "config.json").read_text())
    assert after["calibration"] == curve
    after["calibration"] = None
    assert json.dumps(after, indent=2) + "\n" == before, "nothing else changed, nor its order"
    assert {file.name for file in run.iterdir()} == set(files)
    assert all((run / name).read_bytes() == file for name, file in files.items() if name != "config.json")

    picture = tmp_path / "curve.png"
    there = [str(run), "--data", str(tmp_path / "there.txt"), "--batch_size", "64"]
    assert main(["evaluate", *there, "--budgets", "0.6,1", "--picture", str(picture), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    score_scales = [Calibration.from_dict(curve).scale_for(budget) for budget in (0.6, 1.0)]
    assert [(row["budget"], row["score_scale"]) for row in result["budgets"]] == list(
        zip((0.6, 1.0), score_scales, strict=True)
    )
    as_trained = result["as_trained"]
    assert (as_trained["budget"], as_trained["score_scale"]) == (None, 1.0)
    assert [as_trained[name] for name in ("executed_share", "loss")] == [result["executed_share"], result["loss"]]
    there_share, there_loss = Calibration.from_dict(curve).at(1.0)
    assert as_trained["calibration"] == {"text": "cats", "executed_share": there_share, "loss": there_loss}
    assert main(["evaluate", *there, "--budgets", "0.6,1"]) == 0
    out = capsys.readouterr().out
    assert "there: cats" in out and "A budget is an average over text like the calibration's" in out
    assert f"all numbers  {run / 'evaluated.json'}" in out
    assert result["budgets"][0]["executed_share"] != pytest.approx(result["executed_share"])
    assert picture.read_bytes().startswith(b"\x89PNG")

    file = run / "config.json"  # with a curve on which the whole model is best
    file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": CURVE}))
    shares = []
    for more in ([], ["--budget", "1"], ["--max_layers", "2"], ["--budget", "1", "--max_layers", "2"]):
        assert main(["generate", str(run), "--prompt", "the cat", "--max_new_tokens", "5", *more]) == 0
        text, share, legend = capsys.readouterr().out.rstrip("\n").rsplit("\n", 2)
        assert text.startswith("the cat") and share.endswith("% of the blocks ran") and legend.startswith("blocks run")
        shares.append(float(share.split("%")[0]))
    assert shares[1] == 100 and shares[2] <= 50 and shares[3] == 50 and 0 < shares[0] < 100


def test_budgets_that_cannot_be_used_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midskip.data.encode_source", lambda *_, **__: pytest.fail("the text was read first"))
    here = [str(run), "--data", str(tmp_path / "here.txt")]
    for arguments, message in (
        (["calibrate", *here, "--lowest", "2"], "lowest is 2.0"),
        (["evaluate", *here, "--budgets", "0.5"], "has no calibration"),
        (["evaluate", *here, "--budgets", "a"], "--budgets"),
        (["evaluate", *here, "--picture", "a.png"], "give --budgets too"),
        (["evaluate", *here, "--budgets", "0.5", "--picture", str(tmp_path / "no" / "a.png")], "there is no folder"),
        (["generate", str(run), "--prompt", "a", "--budget", "0.5"], "has no calibration"),
        (["generate", str(run), "--prompt", "a", "--max_layers", "9"], "max_layers is 9"),
        (
            ["generate", str(run), "--prompt", "a", "--on_drift", "error"],
            "no budget whose drift to look for: add --budget",
        ),
        (["generate", str(run), "--prompt", "a", "--on_drift", "panic"], "invalid choice: 'panic'"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err, err


def test_a_folder_that_cannot_be_written_is_refused_before_the_measurement(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midskip.budget.calibrate.calibrate", lambda *args, **kwargs: pytest.fail("it was measured"))
    (run / "config.json.part").mkdir()  # who runs the tests may write anywhere else
    assert main(["calibrate", str(run), "--data", str(tmp_path / "here.txt")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"midskip: error: the calibration could not be saved in '{run}' (") and err.count("\n") == 1


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.integration
def test_the_best_model_is_calibrated_with_its_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine_and_trusted.py").write_text(
        "from midskip.policies.middle_out import MiddleOut as Mine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    config = json.loads((run / "config.json").read_text()) | {"policy": "mine_and_trusted:Mine"}
    (run / "config.json").write_text(json.dumps(config))
    shutil.copytree(run, run / "best")
    if not same:
        model = MidskipForCausalLM.from_pretrained(run, trust=["mine_and_trusted"])
        with torch.no_grad():
            model.model.policy.weight += 0.05
        model.save_pretrained(run / "best")
    seen = []

    def counted(*arguments: Any, **more: Any) -> Calibration:
        seen.append(arguments)
        return calibrate(*arguments, **more)

    monkeypatch.setattr("midskip.budget.calibrate.calibrate", counted)
    arguments = [str(run), "--data", str(tmp_path / "here.txt"), "--batch_size", "64", "--max_tokens", "2600"]
    assert main(["calibrate", *arguments, "--lowest", "0.6", "--trust", "mine_and_trusted"]) == 0
    out = capsys.readouterr().out
    assert f"of the best model  {run / 'best' / 'config.json'}\n" in out
    curves = [json.loads((folder / "config.json").read_text())["calibration"] for folder in (run, run / "best")]
    assert (curves[0] == curves[1]) is same and len(seen) == (1 if same else 2)
    for folder in (run, run / "best"):
        MidskipForCausalLM.from_pretrained(folder, trust=["mine_and_trusted"]).set_budget(0.7)


def test_a_best_model_that_cannot_be_calibrated_is_a_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, run / "best")
    (run / "best" / "model.safetensors").unlink()
    arguments = [str(run), "--data", str(tmp_path / "here.txt"), "--batch_size", "64", "--max_tokens", "2600"]
    assert main(["calibrate", *arguments, "--lowest", "0.6"]) == 0
    assert "the model in best was not calibrated: " in capsys.readouterr().err
    MidskipForCausalLM.from_pretrained(run).set_budget(0.7)


def test_drift_ends_generation_with_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "config.json"
    odd = CURVE | {"share": [1.0, 0.003, 0.002, 0.001], "share_std": [0.0] * 4, "block_tokens": 2}
    odd["share_by_bucket"] = [[share] * 12 for share in odd["share"]]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": odd}))
    arguments = ["generate", str(run), "--prompt", "the cat sat on the mat", "--max_new_tokens", "2"]
    assert main([*arguments, "--budget", "0.002", "--on_drift", "error"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "live prompts have left the band of the calibration on 'news'" in err


@pytest.mark.parametrize("options", [[], ["--temperature", "0", "--draft_budget", "0.5"]])
def test_a_text_is_printed_as_it_is(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """No line is broken, and code is no emoji."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"skipped_kv": "keep", "calibration": CURVE}))
    monkeypatch.setenv("COLUMNS", "12")
    text = "y[0:100:5] z[:key:]"
    assert main(["generate", str(run), "--prompt", text, "--max_new_tokens", "4", *options]) == 0
    assert capsys.readouterr().out.startswith(text)


def test_records_are_read_where_the_run_or_the_option_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, told = run.parent / "text.jsonl", []
    file.write_text("".join(json.dumps({"body": f"the cat sat {i}"}) + "\n" for i in range(40)), encoding="utf-8")
    assert main(["evaluate", str(run), "--data", str(file)]) == 2
    assert "(text_field)" in capsys.readouterr().err
    for options in (["--text_field", "body"], []):
        assert main(["evaluate", str(run), "--data", str(file), "--json", *options]) == 0
        told.append(json.loads(capsys.readouterr().out)["loss"])
        (run / "recipe.yaml").write_text("output: run\ndata: {source: a.jsonl, text_field: body}\n")
    assert told[0] == told[1]


def test_depth_of_tokens_is_not_live(run: Path, learnt: PreTrainedTokenizerFast) -> None:
    model = MidskipForCausalLM.from_pretrained(run)
    model.config.calibration = CURVE | {"loss_std": [0.0] * 4, "block_tokens": 1}
    with DriftMonitor(model.eval(), "error"):
        depth_of_tokens(model, learnt, list(range(20)))
        with pytest.raises(BudgetDriftError):
            model(torch.arange(20)[None])
