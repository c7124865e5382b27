"""A dense model made to skip: the trainings that follow the fit, and the folder of all stages."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import QUIET, write_documents

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.budget.monitor import temporary_limits
from midskip.cli import main
from midskip.convert import to_transformers
from midskip.data import load_tokenizer
from midskip.retrofit import RetrofitSettings, retrofit
from midskip.retrofit.distil import Distiller
from midskip.retrofit.learning import TRAINABLE, learning
from midskip.retrofit.run import _begun
from midskip.retrofit.shares import DrawnShares

Make = Callable[..., MidskipForCausalLM]


# ---- shares that are drawn


def test_drawn_shares_are_held_and_restored() -> None:
    """Where the share that runs falls with the log of the scale, each target is reached."""
    shares = DrawnShares(4, [0.9, 0.7, 0.5], [1.0, 1.0, 1.0], seed=1)
    seen: list[int] = []
    for _ in range(300):
        ran = torch.full((4,), 0.8 - 0.1 * shares.log_scales[shares.drawn].item())
        seen.append(shares.drawn)
        shares.update(ran, ran, ran)
    assert (
        all(sorted(seen[turn : turn + 3]) == [0, 1, 2] for turn in range(0, 300, 3))
        and len({tuple(seen[turn : turn + 3]) for turn in range(0, 300, 3)}) == 6
    )
    torch.testing.assert_close(shares.log_scales, torch.tensor([-1.0, 1.0, 3.0]), rtol=0, atol=0.01)
    again = DrawnShares(4, [0.9, 0.7, 0.5], [1.0, 1.0, 1.0], seed=1)
    again.load_state_dict(json.loads(json.dumps(shares.state_dict())))
    assert again.score_scales == shares.score_scales and again.expected_share == shares.expected_share


def test_a_share_that_cannot_be_reached_leaves_the_scale_finite() -> None:
    shares = DrawnShares(4, [0.1], [1.0])
    for _ in range(200):
        shares.update(*[torch.full((4,), 0.8)] * 3)
    assert shares.score_scales[0] < 2**21
    for wrong in ([], [0.0], [1.5]):
        with pytest.raises(ValueError, match="expected some numbers above 0 and up to 1"):
            DrawnShares(4, wrong, [1.0] * len(wrong))


# ---- the whole


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a calibration, which takes most of the time here."""
    monkeypatch.setattr("midskip.budget.calibrate.GAP", 0.2)


@pytest.fixture
def dense(tmp_path: Path, make_model: Make) -> Path:
    """The folder of a dense model and its tokenizer, beside text."""
    write_documents(tmp_path / "text", 150)
    write_documents(tmp_path / "held_out", 151)
    tokenizer = load_tokenizer("bytes")
    model = make_model(
        policy="dense", norms="pre", num_hidden_layers=5, vocab_size=len(tokenizer), dtype=torch.float32,
        max_position_embeddings=128,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def settings_of(dense: Path, **changes: Any) -> RetrofitSettings:
    given = {
        "model": str(dense),
        "data": str(dense.parent / "text"),
        "validation": {"text": str(dense.parent / "held_out")},
        "output": str(dense.parent / "out"),
        "length": 128,
        "fit_tokens": 1024,
        "price_tokens": 2048,
        "batch_size": 2,
    }
    return RetrofitSettings(**given | changes)


def test_a_copy_of_the_text_is_not_held_out(dense: Path) -> None:
    shutil.copytree(dense.parent / "text", dense.parent / "copy")
    with pytest.raises(ValueError, match=r"copy' holds the same text as .*text': give --validation text"):
        retrofit(settings_of(dense, validation={"text": str(dense.parent / "copy")}), QUIET)


def test_a_folder_that_one_was_killed_in_as_it_wrote_its_first_file_is_not_somebody_elses(dense: Path) -> None:
    settings = settings_of(dense)
    folder = Path(settings.output)
    folder.mkdir()
    (folder / "retrofit.json.part").write_text('{"half')
    assert _begun(folder, settings)["stages"] == {}
    (folder / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        _begun(folder, settings)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.integration
def test_stages_follow_each_other_and_are_not_run_twice(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("midskip.data.progress.LINE_S", 0.0)
    fitted = retrofit(settings_of(dense), QUIET)
    told = capsys.readouterr().err
    assert "Leaving out layers: 3 of 3" in told and "Calibrating" in told, "a line now and then off a terminal"
    folder = dense.parent / "out"
    model = MidskipForCausalLM.from_pretrained(folder)
    assert list(fitted["stages"]) == ["fit"] and model.config.calibration is not None
    ids = torch.arange(20)[None]
    with torch.no_grad():
        model.set_budget(1.0)
        whole = MidskipForCausalLM.from_pretrained(dense)(ids).logits
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=0)
    monkeypatch.setattr("midskip.retrofit.run.fit", lambda *_, **__: pytest.fail("the fit runs a second time"))
    both = retrofit(settings_of(dense, distil_steps=30, learning_rate=3e-3, save_steps=10), QUIET)
    assert list(both["stages"]) == ["fit", "distil"]
    losses = [row[0] for row in both["stages"]["distil"]["history"]]
    assert len(losses) == 30 and sum(losses[-10:]) < sum(losses[:10])
    distilled = MidskipForCausalLM.from_pretrained(folder)
    changed = {name for name, x in distilled.state_dict().items() if not torch.equal(x, model.state_dict()[name])}
    assert all(".skip_paths." in name or ".policy." in name for name in changed)
    assert {name.split(".")[1] for name in changed} == {"skip_paths", "policy"}
    for row in both["stages"]["distil"]["prices"]:
        assert row["texts"]["text"]["executed_share"] <= row["budget"] + 0.05
    monkeypatch.setattr("midskip.retrofit.run.load_to_skip", lambda *_, **__: pytest.fail("everything is done"))
    assert retrofit(settings_of(dense, distil_steps=30, learning_rate=3e-3, save_steps=10), QUIET) == both
    for stage in ("distil", "finetune"):  # of one killed at its very end, and of a stage that is not asked for here
        (folder / "checkpoints" / stage / "checkpoint-1").mkdir(parents=True)
    (folder / ".midskip.lock").touch()
    assert retrofit(settings_of(dense, distil_steps=30, learning_rate=3e-3, save_steps=10), QUIET) == both
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["finetune"]
    assert not (folder / ".midskip.lock").exists()
    with pytest.raises(ValueError, match=r"holds a retrofit with other settings \(outer: 1 -> 2; "):
        retrofit(settings_of(dense, outer=2), QUIET)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.integration
@pytest.mark.parametrize(("name", "folder"), [("data", "text"), ("validation text", "held_out")])
def test_a_later_stage_refuses_text_that_has_changed(dense: Path, name: str, folder: str) -> None:
    retrofit(settings_of(dense), QUIET)
    (dense.parent / folder / "more.txt").write_text("what was not there before\n" * 200)
    assert list(retrofit(settings_of(dense), QUIET)["stages"]) == ["fit"], "what is done reads no text"
    with pytest.raises(ValueError, match=f"the text of {name} has changed since the retrofit in .* began"):
        retrofit(settings_of(dense, distil_steps=2), QUIET)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.integration
def test_killed_trainings_go_on_as_if_they_had_not_been(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transformers' own Llama, here; once in each of the two trainings, and once between them."""
    to_transformers(MidskipForCausalLM.from_pretrained(dense)).save_pretrained(dense)
    at_once = {"distil_steps": 8, "save_steps": 2, "finetune_steps": 5}
    report = retrofit(settings_of(dense, **at_once), QUIET)
    calls, compute_loss = [], Distiller.compute_loss

    def killed(self: Distiller, *arguments: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) in (6, 14):
            raise KeyboardInterrupt
        return compute_loss(self, *arguments, **more)

    other = settings_of(dense, output=str(dense.parent / "other"), **at_once)
    removals = []

    def removed(folder: Path, **given: Any) -> None:
        removals.append(folder)
        if len(removals) == 2:  # the checkpoints of the first training stay
            raise KeyboardInterrupt
        shutil.rmtree(folder, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "compute_loss", killed)
        patch.setattr("midskip.retrofit.run.remove_folder", removed)
        for done in (["fit"], ["fit", "distil"], ["fit", "distil"]):
            with pytest.raises(KeyboardInterrupt):
                retrofit(other, QUIET)
            torch.manual_seed(len(calls))  # nothing hangs on it
            assert list(json.loads((dense.parent / "other" / "retrofit.json").read_text())["stages"]) == done
        again = retrofit(other, QUIET)
    assert len(calls) == 6 + 4 + 4 + 3 and not (dense.parent / "other" / "checkpoints").exists()
    expected, got = (load_file(dense.parent / name / "model.safetensors") for name in ("out", "other"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert again["stages"]["finetune"]["prices"] == report["stages"]["finetune"]["prices"]


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("finetune", ["lora", "all"])
@pytest.mark.integration
def test_finetuning_moves_the_originals_weights_after_the_routers_have_settled(dense: Path, finetune: str) -> None:
    given: dict[str, Any] = {"distil_steps": 2, "finetune": finetune, "finetune_learning_rate": 1e-3}
    report = retrofit(settings_of(dense, **given), QUIET)
    distilled = MidskipForCausalLM.from_pretrained(dense.parent / "out").state_dict()
    original = report["stages"]["fit"]["prices"][0]["texts"]["text"]["loss"]
    report = retrofit(settings_of(dense, **given, finetune_steps=40), QUIET)
    losses = [row[0] for row in report["stages"]["finetune"]["history"]]
    assert sum(losses[-14:]) < 0.9 * sum(losses[:14])
    assert 1.0 in {row[2] for row in report["stages"]["finetune"]["history"]}
    for row in report["stages"]["finetune"]["prices"]:
        assert row["texts"]["text"]["price"] == pytest.approx(row["texts"]["text"]["loss"] - original)
    finetuned = MidskipForCausalLM.from_pretrained(dense.parent / "out").state_dict()
    changed = {name for name, x in finetuned.items() if not torch.equal(x, distilled[name])}
    assert finetuned.keys() == distilled.keys() and "model.layers.2.mlp.up_proj.weight" in changed
    assert ("model.layers.2.input_layernorm.weight" in changed) is (finetune == "all")


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("choice", ["spans", "exits", "layers"])
@pytest.mark.integration
def test_routers_learn_unless_layers_are_left_out_for_all(dense: Path, choice: str) -> None:
    report = retrofit(settings_of(dense, choice=choice, distil_steps=3, learning_rate=3e-2, shares=[0.8, 0.72]), QUIET)
    budgets = [row["budget"] for row in report["stages"]["distil"]["prices"]]
    assert 0.9 in budgets and 0.72 in budgets and budgets == sorted(budgets, reverse=True), "those trained for, too"
    before, after = (load_file(dense.parent / "out" / name / "model.safetensors") for name in ("fit", "distil"))
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert any(".skip_paths." in name for name in changed)
    assert any(".policy." in name for name in changed - {"model.policy.num_steps"}) is (choice != "layers")
    assert all(".policy." in name or ".skip_paths." in name for name in changed)


@torch.no_grad()
@pytest.mark.parametrize("what", TRAINABLE)
def test_the_original_stays_at_hand_while_others_learn(make_model: Make, what: str) -> None:
    model = make_model(policy="independent", norms="pre", skipped_kv="keep", skip_path="linear", vocab_size=64)
    ids = torch.randint(64, (2, 12))
    with temporary_limits(model, score_scale=0.0):
        whole = model(ids).logits
    with learning(model, what, lora_rank=2) as original:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        with original() as same:
            torch.testing.assert_close(same(ids).logits, whole, rtol=0, atol=0)
        learnt = model(ids).logits
    assert not torch.equal(learnt, whole)
    torch.testing.assert_close(model(ids).logits, learnt, rtol=0, atol=1e-9)  # adapters are merged
    assert not any(".lora_" in name for name in model.state_dict())


@pytest.mark.usefixtures("on_the_cpu")
def test_the_command_names_texts(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path may have an = of its own."""
    monkeypatch.chdir(dense.parent)
    Path("a=b").mkdir()
    Path("a=b/v.txt").write_text("too short", encoding="utf-8")
    given = ["--validation", "./a=b/v.txt", "--validation", "budget=a=b/v.txt", "--fit_tokens", "1024"]
    command = ["retrofit", "dense", "--data", "text", "--output", "out", "--length", "128", "--price_tokens", "2048"]
    assert main([*command, *given]) == 2  # too little text, said before anything runs
    assert "a=b/v.txt' has" in capsys.readouterr().err and not Path("out").exists()
    shutil.copy("text/0.txt", "a=b/v.txt")
    assert main([*command, *given]) == 0
    report = json.loads(Path("out/retrofit.json").read_text())
    assert list(report["stages"]["fit"]["prices"][0]["texts"]) == ["text 1", "budget"] and not report["from_hub"]
    card = Path("out/README.md").read_text()
    assert "| budget | 0.75 |" in card and "budget (a=b/v.txt)" in card and "## A budget at run time" in card


@pytest.mark.usefixtures("on_the_cpu")
def test_what_is_refused_before_anything_runs(dense: Path) -> None:
    skipping = dense.parent / "skipping"
    MidskipForCausalLM(MidskipConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)).save_pretrained(
        skipping
    )
    for changes, message in (
        ({"model": str(dense / "no" / "ne")}, "is no folder here"),
        ({"model": str(skipping)}, r"already skips \(policy 'middle_out'\); expected a dense one"),
        ({"length": 256}, "length is 256; the model takes at most 128 tokens"),
        ({"price_tokens": 100}, "price_tokens is 100, which holds 0 windows of 128 tokens"),
        ({"fit_tokens": 10**6}, "tokens; expected at least 999936, 7812 windows of 128"),
        ({"validation": {}}, "there is no held-out text"),
        (
            {"data": "pydocs", "validation": {"a": "pydocs"}},
            "is both for training and for validation.*give --validation text that is",
        ),
        ({"finetune_steps": 3}, "routers have to settle before the other weights move: give distil_steps too"),
        (
            {"shares": [0.9, 0.4]},
            r"shares is \[0.9, 0.4\]; of 5 layers and 128 tokens, outer 1 and first_tokens 2 alone",
        ),
        (
            {"first_tokens": 100},
            "share is 0.75; of 5 layers and 128 tokens, outer 1 and first_tokens 100 alone are 0.869",
        ),
        ({"order": "adjacent"}, "order is 'adjacent' and choice 'tokens'; an order is of choice 'layers'"),
    ):
        with pytest.raises(ValueError, match=message):
            retrofit(settings_of(dense, **changes), QUIET)
        assert not (dense.parent / "out").exists()
    before = (dense / "config.json").read_bytes()
    for output, message in ((dense, "which holds other files; give a new or empty"), (dense / "config.json", "a file")):
        with pytest.raises(ValueError, match=message):
            retrofit(settings_of(dense, output=str(output)), QUIET)
    assert (dense / "config.json").read_bytes() == before
