"""A dense model made to skip: the fit in closed form, the training that follows, and the folder of both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import QUIET, write_documents
from torch import Tensor

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.cli import main
from midskip.convert import to_transformers
from midskip.data import load_tokenizer
from midskip.data.labelled import Items
from midskip.evaluate import evaluate, limits_kept
from midskip.retrofit import RetrofitSettings, retrofit
from midskip.retrofit.distil import Distiller, divergence
from midskip.retrofit.fit import FitReport, fit
from midskip.retrofit.moments import Moments
from midskip.retrofit.shares import DrawnShares
from midskip.retrofit.watch import Watch

Make = Callable[..., MidskipForCausalLM]
SETTINGS = {"router": "linear", "outer": 1, "first_tokens": 1}


def to_skip(make_model: Make, **changes: Any) -> MidskipForCausalLM:
    given = {"num_hidden_layers": 5, "norms": "pre", "skipped_kv": "keep", "skip_path": "linear"}
    return make_model(policy="independent", policy_settings=SETTINGS, **(given | changes)).eval()


def windows(count: int = 6, length: int = 12) -> Items:
    ids = torch.randint(31, (count, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


# ---- regression


def test_moments_give_least_squares() -> None:
    torch.manual_seed(0)
    z_ND = torch.randn(50, 4)
    y_NK = z_ND @ torch.randn(4, 3) + torch.randn(3) + 0.3 * torch.randn(50, 3)
    moments = Moments(4, 3)
    for rows in torch.arange(50).split(20):
        moments.add(z_ND[rows], y_NK[rows])
    weight_KD, constant_K = moments.solve(0.0)
    z_NE = torch.cat([z_ND, torch.ones(50, 1)], 1).double()
    expected_EK = torch.linalg.lstsq(z_NE, y_NK.double()).solution
    torch.testing.assert_close(torch.cat([weight_KD.T, constant_K[None]]), expected_EK, rtol=1e-5, atol=1e-5)
    left_K = (y_NK - z_NE @ expected_EK).square().sum(0) / (y_NK - y_NK.mean(0)).square().sum(0)
    torch.testing.assert_close(moments.explained(weight_KD, constant_K), 1 - left_K, rtol=1e-4, atol=1e-4)
    assert moments.solve(10.0)[0].norm() < weight_KD.norm()


# ---- what layers add


@torch.no_grad()
@pytest.mark.parametrize("skip_unit", ["block", "sublayer"])
def test_a_watch_sees_what_a_layer_would_add(make_model: Make, skip_unit: str) -> None:
    """To a token that skips it too, while the pass goes on as if nobody looked."""
    model = to_skip(make_model, skip_unit=skip_unit)
    torch.nn.init.normal_(model.model.skip_paths["2"].weight)  # pyright: ignore[reportArgumentType]
    model.model.policy.bias.zero_()
    batch = torch.stack([window["input_ids"] for window in windows(3)])
    inside = range(1, model.model.policy.num_layers - 1)
    seen: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    with Watch(model, inside, lambda layer, *found: seen.update({layer: found})):
        watched = model(batch, use_cache=False)
    assert list(seen) == list(inside)
    torch.testing.assert_close(watched.logits, model(batch, use_cache=False).logits, rtol=0, atol=0)
    h_ND, added_ND, keep_N = seen[2]
    assert keep_N is not None and 0 < int(keep_N.sum()) < len(keep_N)
    model.model.policy.bias[1] = -1e4  # now layer 2 runs for all
    with Watch(model, inside, lambda layer, *found: seen.update({layer: found})):
        model(batch, use_cache=False)
    assert seen[2][2] is None or bool(seen[2][2].all())
    torch.testing.assert_close(h_ND, seen[2][0], rtol=0, atol=0)
    torch.testing.assert_close(added_ND, seen[2][1], rtol=0, atol=1e-12)


# ---- the fit


@torch.no_grad()
@pytest.mark.parametrize(
    ("skip_path", "skip_unit", "choice"),
    [("linear", "block", "tokens"), ("low_rank", "block", "tokens"), ("linear", "sublayer", "layers")],
)
def test_the_fit_repairs_and_leaves_the_rest_alone(
    make_model: Make, skip_path: str, skip_unit: str, choice: str
) -> None:
    model = to_skip(
        make_model, skip_path=skip_path, skip_unit=skip_unit, skip_path_rank=4 if "low" in skip_path else None
    )
    before = {name: x.clone() for name, x in model.state_dict().items()}
    whole = _nothing_skipped(model)
    report = fit(model, windows(24), share=0.75, choice=choice, num_cost_windows=2)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert all(".skip_paths." in name or ".policy." in name for name in changed) and changed
    torch.testing.assert_close(_nothing_skipped(model), whole, rtol=0, atol=0)
    result = evaluate(model, windows(24))
    assert result["executed_share"] == pytest.approx(0.75, abs=0.08)
    _check_report(report, model, choice)
    repaired = _gap(model, whole)
    for parameter in model.model.skip_paths.parameters():
        parameter.zero_()
    assert repaired < 0.8 * _gap(model, whole)


def _check_report(report: FitReport, model: MidskipForCausalLM, choice: str) -> None:
    inner = list(range(1, model.model.policy.num_layers - 1))
    assert report.layers == inner
    if choice == "layers":
        assert set(report.order) <= set(inner) and len(report.order) == len(report.cost) > 1
    else:
        assert all(0 < error < 10 for error in report.error) and len(report.cost) == len(inner)


def _nothing_skipped(model: MidskipForCausalLM) -> Tensor:
    with limits_kept(model):
        model.model.policy.set_limits(0.0)
        return _logits(model)


def _logits(model: MidskipForCausalLM) -> Tensor:
    return model(torch.stack([window["input_ids"] for window in windows(4)]), use_cache=False).logits


def _gap(model: MidskipForCausalLM, whole: Tensor) -> float:
    return (_logits(model) - whole).square().mean().item()


@torch.no_grad()
def test_a_low_rank_fit_of_full_rank_is_the_linear_one(make_model: Make) -> None:
    linear, low_rank = (
        to_skip(make_model, skip_path=kind, skip_path_rank=rank) for kind, rank in (("linear", None), ("low_rank", 16))
    )
    for model in (linear, low_rank):
        fit(model, windows(12), refits=0, num_cost_windows=1)
    for layer in ("1", "2", "3"):
        path = low_rank.model.skip_paths[layer]
        product = path.weight @ path.down  # pyright: ignore[reportOperatorIssue]
        torch.testing.assert_close(product, linear.model.skip_paths[layer].weight, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("skip_path", ["linear", "low_rank"])
def test_a_refit_changes_the_maps_of_tokens_that_skip_and_no_others(make_model: Make, skip_path: str) -> None:
    """Also where nobody runs a layer, and the model does not call it."""
    maps = []
    for refits in (0, 1):
        model = to_skip(make_model, skip_path=skip_path, skip_path_rank=4 if "low" in skip_path else None)
        model.model.policy.first_tokens = 0
        order = fit(model, windows(24), share=0.9, choice="layers", refits=refits, num_cost_windows=2).order
        maps.append({int(layer): path(torch.ones(1, 16).double()) for layer, path in model.model.skip_paths.items()})
    assert not torch.equal(maps[0][order[0]], maps[1][order[0]])
    torch.testing.assert_close(maps[0][order[-1]], maps[1][order[-1]], rtol=1e-6, atol=1e-9)


def test_forced_tokens_teach_routers_nothing(make_model: Make) -> None:
    model = to_skip(make_model)
    policy = model.model.policy
    torch.nn.init.constant_(policy.bias, 2.0)  # pyright: ignore[reportArgumentType]
    ids = torch.stack([window["input_ids"] for window in windows(2)])
    for forced, learns in ((ids.shape[1], False), (1, True)):
        policy.first_tokens = forced
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert bool(policy.bias.grad.any()) == learns  # pyright: ignore[reportOptionalMemberAccess]


def test_what_the_fit_refuses(make_model: Make) -> None:
    with pytest.raises(ValueError, match="skip_path is 'adapter'; only 'linear' and 'low_rank' can be fitted"):
        fit(to_skip(make_model, skip_path="adapter"), windows())
    with pytest.raises(ValueError, match="a fit needs 'independent' with"):
        fit(make_model(), windows())
    with pytest.raises(ValueError, match=r"share is 0\.3; expected a share of the blocks above 0\.4"):
        fit(to_skip(make_model), windows(), share=0.3)


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


# ---- training


def test_the_divergence_is_that_of_distributions() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(divergence(logits, target), expected.mean())
    torch.testing.assert_close(divergence(logits, target, valid), expected[valid].mean())
    assert divergence(target, target).abs() < 1e-12


# ---- the whole


@pytest.fixture
def dense(tmp_path: Path, make_model: Make) -> Path:
    """The folder of a dense model and its tokenizer, beside text."""
    write_documents(tmp_path / "text", 150)
    tokenizer = load_tokenizer("bytes")
    model = make_model(
        policy="dense", norms="pre", num_hidden_layers=5, vocab_size=len(tokenizer), dtype=torch.float32,
        max_position_embeddings=128,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def settings_of(dense: Path, **changes: Any) -> RetrofitSettings:
    text = str(dense.parent / "text")
    given = {
        "output": str(dense.parent / "out"),
        "length": 128,
        "fit_tokens": 1024,
        "price_tokens": 2048,
        "batch_size": 2,
    }
    return RetrofitSettings(**{"model": str(dense), "data": text, "validation": {"text": text}} | given | changes)


@pytest.mark.usefixtures("on_the_cpu")
def test_stages_follow_each_other_and_are_not_run_twice(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = retrofit(settings_of(dense), QUIET)
    folder = dense.parent / "out"
    model = MidskipForCausalLM.from_pretrained(folder)
    assert list(fitted["stages"]) == ["fit"] and model.config.calibration is not None
    ids = torch.arange(20)[None]
    with limits_kept(model), torch.no_grad():
        model.model.policy.set_limits(0.0)
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
    with pytest.raises(ValueError, match=r"holds a retrofit with other settings \(outer: 1 -> 2; "):
        retrofit(settings_of(dense, outer=2), QUIET)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_killed_training_goes_on_as_if_it_had_not_been(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transformers' own Llama, here."""
    to_transformers(MidskipForCausalLM.from_pretrained(dense)).save_pretrained(dense)
    at_once = {"distil_steps": 8, "save_steps": 3}
    retrofit(settings_of(dense, **at_once), QUIET)
    calls, compute_loss = [], Distiller.compute_loss

    def killed(self: Distiller, *arguments: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return compute_loss(self, *arguments, **more)

    other = settings_of(dense, output=str(dense.parent / "other"), **at_once)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "compute_loss", killed)
        retrofit(other, QUIET)
    retrofit(other, QUIET)
    expected, got = (load_file(dense.parent / name / "model.safetensors") for name in ("out", "other"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


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
    assert list(report["stages"]["fit"]["prices"][0]["texts"]) == ["text 1", "budget"]


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
    ):
        with pytest.raises(ValueError, match=message):
            retrofit(settings_of(dense, **changes), QUIET)
        assert not (dense.parent / "out").exists()
