"""`midskip bench`: what it times agrees with the plain twin, what it says is what was measured, and no more."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers.utils import logging

from midskip import MidskipForCausalLM
from midskip.bench import BenchSettings, DisagreementError, bench, bench_run, run_settings
from midskip.bench.agree import _largest, bound, check_llama, check_ours
from midskip.bench.models import Side, build_llama, build_ours, imposed, positions, with_policy
from midskip.bench.results import case_rows, work_of
from midskip.bench.table import case_table
from midskip.bench.tasks import Decode, Prefill, Training, Work
from midskip.bench.timing import interleave, quantile, spread, stretch_mean
from midskip.cli import main
from midskip.data import load_tokenizer
from midskip.nn.layers import Attention
from midskip.report.speed import write_speed_picture
from midskip.testing.policies import FixedDepths

DTYPE = torch.float32


@pytest.fixture(autouse=True)
def _same_logging_after() -> Iterator[None]:
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


def settings(**changes: Any) -> BenchSettings:
    given: dict[str, Any] = {"dtypes": ("float32",), "gates": ("fractional",), "shares": (0.0, 0.5), "device": "cpu"}
    return BenchSettings.of("tiny", **(given | changes))


def ids(num_rows: int = 3, num_columns: int = 20) -> Tensor:
    return torch.randint(61, (num_rows, num_columns))


def side(share: float = 0.5, gates: str = "fractional", **changes: Any) -> Side:
    given = settings(shares=(share,), **changes)
    return imposed(given, build_ours(given, DTYPE), gates)[0]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What a whole run gives, its folder, and what was on the screen."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    screen = Console(file=StringIO(), width=80)
    report = bench(settings(shape={"num_hidden_layers": 5}), folder, screen)
    assert isinstance(screen.file, StringIO)
    return report, folder, screen.file.getvalue()


# ---- the whole


def test_every_case_has_a_row_for_each_side(result: tuple[dict[str, Any], Path, str]) -> None:
    report, folder, _ = result
    assert json.loads((folder / "bench.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    found = [(row["task"], row["batch_size"], row["side"]) for row in report["rows"]]
    ours = ["skip 0", "skip 0.5"]
    both = ["llama", "llama, static cache", *ours]
    expected = [("prefill", 1, name) for name in ["llama", *ours]]
    expected += [("decode", size, name) for size in (1, 3) for name in both]
    assert found == expected + [("training", 2, name) for name in ["llama", *ours]]
    for row in report["rows"]:
        steps = 6 if row["task"] == "decode" else 1
        assert len(row["all_s"]) == 3 and all(len(repeat) == steps for repeat in row["all_s"])
        assert row["time_s"] > 0 and (row["joules"] is None) == (report["energy"]["unavailable"] is not None)
        assert set(row["ratios"]) == {"llama", "fastest_llama", "dense"}


def test_ratios_are_of_what_was_measured(result: tuple[dict[str, Any], Path, str]) -> None:
    report, _, _ = result
    for row in report["rows"]:
        llama, dense = (
            next(one for one in report["rows"] if one["side"] == name and case(one) == case(row))
            for name in ("llama", "skip 0")
        )
        for against, name in ((llama, "llama"), (dense, "dense")):
            ratios = row["ratios"][name]
            assert ratios["of"] == against["side"]
            assert ratios["time"] == row["time_s"] / against["time_s"]
            assert ratios["work"] == pytest.approx(work_of(row) / work_of(against))
            assert ratios["time_over_work"] == pytest.approx(ratios["time"] / ratios["work"])
            assert ratios["flops"] == pytest.approx(row["work"]["flops"] / against["work"]["flops"])
        if row["side"] == "skip 0.5":
            assert 0.3 < row["work"]["executed_share"] < 0.7
            assert row["ratios"]["dense"]["work"] < 0.8


def case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["batch_size"], row["dtype"], row["gates"]


def test_the_report_says_where_and_what_and_names_no_path(result: tuple[dict[str, Any], Path, str]) -> None:
    report, folder, _ = result
    assert {"cpu", "cores", "threads", "python", "torch", "transformers", "midskip", "commit"} <= set(report["machine"])
    assert report["settings"]["shape"]["num_hidden_layers"] == 5
    assert set(report["energy"]) == {"unavailable", "left_out", "idle_watts"}
    text = json.dumps(report)
    assert str(folder) not in text and str(Path.home()) + "/" not in text and str(Path(__file__).parents[1]) not in text


def test_the_screen_shows_work_beside_time(result: tuple[dict[str, Any], Path, str]) -> None:
    report, folder, screen = result
    for words in (
        "prefill: a prompt of 48 tokens; float32, gates fractional", "decode: batch 3, 6 tokens after 24", "blocks run",
        "training: forward and backward of 2 x 24 tokens", "FLOPs a step", "time / bytes read, of Llama",
        "KV allocated, MB", "p50, p95, p99", str(folder / "bench.png"),
    ):  # fmt: skip
        assert words in screen, words
    lines = [line for line in screen.splitlines() if line.startswith("│ blocks run")]
    shares = [f"{row['work']['executed_share']:.1%}" for row in report["rows"]]
    assert [cell.strip() for line in lines for cell in line.split("│")[2:-1]] == shares
    assert "energy: unavailable: " in screen or "joules" in screen


def test_agreement_is_part_of_the_report(result: tuple[dict[str, Any], Path, str]) -> None:
    report, _, _ = result
    assert all(one["difference"] <= one["bound"] for one in report["agreement"])
    what = {(one["side"], one["dtype"]) for one in report["agreement"]}
    assert what >= {(name, dtype) for name in ("skip 0", "skip 0.5") for dtype in ("float32", "float64")}
    assert {"llama", "llama, static cache", "ours with Llama's weights"} <= {one["side"] for one in report["agreement"]}


def test_joules_stand_beside_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a counter of a joule for every pass of a model, and next to nothing at rest."""
    import midskip.energy as energy

    box, call = {"joules": 0.0}, Side.call

    def counted(*arguments: Any, **more: Any) -> Any:
        box["joules"] += 1
        return call(*arguments, **more)

    monkeypatch.setattr(Side, "call", counted)
    monkeypatch.setattr(energy, "cpu_domains", lambda root: [energy.Domain("box", lambda: box["joules"])])
    defaults = energy.EnergyMeter.__init__.__kwdefaults__ or {}
    rest = {"sleep": lambda duration_s: box.update(joules=box["joules"] + 1e-9)}
    monkeypatch.setattr(energy.EnergyMeter.__init__, "__kwdefaults__", defaults | rest)
    screen = Console(file=StringIO(), width=120)
    given = settings(tasks=("decode", "prefill"), batch_sizes=(3,), shares=(0.5,), repeats=1, energy_s=0.01)
    report = bench(given, tmp_path, screen)
    assert report["energy"]["unavailable"] is None and report["energy"]["idle_watts"]["box"] > 0
    for row in report["rows"]:
        joules = row["joules"]
        unit, expected = ("token", 1 / 3) if row["task"] == "decode" else ("prompt", 1)
        assert joules["unit"] == unit and joules["all"] == pytest.approx([expected] * 3, rel=1e-2)
        assert row["ratios"]["llama"]["joules"] == pytest.approx(1, rel=1e-2)
    assert isinstance(screen.file, StringIO)
    assert "joules a token" in screen.file.getvalue() and "at rest (box " in screen.file.getvalue()


def test_a_trained_model_on_text(make_model: Callable[..., MidskipForCausalLM], tmp_path: Path) -> None:
    model = make_model("mixed", DTYPE, num_hidden_layers=5).eval()
    given = run_settings(model, "mine", tasks=("prefill", "decode"), batch_sizes=(2,), repeats=1, idle_s=0.01)
    assert (given.prompt_tokens, given.context_tokens, given.new_tokens) == (64, 48, 16)
    windows = [{"input_ids": torch.randint(31, (64,)), "attention_mask": torch.ones(64)} for _ in range(4)]
    windows[0]["attention_mask"][-1] = 0  # padded: not used
    given = replace(given, dtypes=("bfloat16", "float32"))
    report = bench_run(given, model, windows, tmp_path, Console(file=StringIO()))
    assert model.dtype == DTYPE  # and not rounded by the way
    assert report["settings"]["run"] == "mine"
    sides = [row["side"] for row in report["rows"] if (row["task"], row["dtype"]) == ("prefill", "float32")]
    assert sides == ["llama", "dense twin", "trained"]
    with torch.no_grad():
        share = (model(windows[1]["input_ids"][None]).gates > 0).double().mean().item()
    trained = next(row for row in report["rows"] if (row["side"], row["dtype"]) == ("trained", "float32"))
    assert trained["work"]["executed_share"] == pytest.approx(share) and 0.1 < share < 0.9
    assert trained["ratios"]["dense"]["of"] == "dense twin" and trained["ratios"]["dense"]["work"] < 1
    with pytest.raises(ValueError, match=r"has 3 windows of 64 tokens; 5 are needed"):
        bench_run(run_settings(model, "mine", batch_sizes=(5,)), model, windows, tmp_path)
    with pytest.raises(ValueError, match=r"100 tokens are asked for and the model takes at most 64"):
        bench_run(run_settings(model, "mine", prompt_tokens=100), model, windows, tmp_path)


# ---- refusals


def test_a_wrong_gate_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One key's gate of one layer, in the packed computation alone."""
    ask = Attention.ask

    def wrong(self: Attention, x: Tensor, y: Tensor, queries: Any, keys: Any, key_gate_M: Tensor | None) -> Any:
        if key_gate_M is not None and len(key_gate_M):
            key_gate_M = key_gate_M.clone()
            key_gate_M[0] *= 0.999
        return ask(self, x, y, queries, keys, key_gate_M)

    good = side()
    check_ours(good, ids(), gradients=True)
    monkeypatch.setattr(Attention, "ask", wrong)
    with pytest.raises(DisagreementError, match=r"skip 0.5 \(whole, float64\).*is not timed.*rounding explains"):
        check_ours(good, ids())
    with pytest.raises(DisagreementError):
        bench(settings(tasks=("prefill",)), tmp_path)
    assert not (tmp_path / "bench.json").exists()


def test_a_wrong_weight_is_not_timed() -> None:
    """In the dtype that is timed alone, as a broken kernel would be."""
    good = side(gates="fixed")
    broken = Side(good.name, good.model, stretch=good.stretch)
    check_ours(broken, ids())
    hook = good.model.lm_head.register_forward_hook(
        lambda head, arguments, logits: logits * (1 + 1e-4 * (logits.dtype == DTYPE) * torch.arange(61).remainder(2))
    )
    with pytest.raises(DisagreementError, match=r"skip 0.5 \(whole, float32\)"):
        check_ours(broken, ids())
    hook.remove()


def test_a_wrong_cache_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    good = side()
    monkeypatch.setattr(
        "midskip.nn.layers.attend_past", lambda q_NHK, queries, past: q_NHK * 0 + past.values[0, 0].repeat(1, 1)
    )
    with pytest.raises(DisagreementError, match=r"skip 0.5 \(with its cache, float64\)"):
        check_ours(good, ids())


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    good, real = side(), MidskipForCausalLM.forward

    def forward(self: MidskipForCausalLM, *arguments: Any, **more: Any) -> Any:
        output = real(self, *arguments, **more)
        if output.loss is not None:
            weight = self.model.layers[1].mlp.up_proj.weight
            output.loss = output.loss + 1e-9 * (weight - weight.detach()).sum()
        return output

    check_ours(good, ids(), gradients=True)
    monkeypatch.setattr(MidskipForCausalLM, "forward", forward)
    with pytest.raises(DisagreementError, match=r"training, float64.*gradient of model.layers.1.mlp.up_proj.weight"):
        check_ours(good, ids(), gradients=True)


def test_another_llama_is_not_timed() -> None:
    config = settings().config()
    llama = build_llama(config, DTYPE, "cpu")
    for static in (False, True):
        assert len(check_llama(Side("llama", llama, static=static), config, ids())) == 4
    llama.model.layers[2].self_attn.scaling *= 1.01
    with pytest.raises(DisagreementError, match=r"llama \(whole, float32\)"):
        check_llama(Side("llama", llama), config, ids())


def test_learned_gates_are_compared_up_to_the_first_that_rounds_over(
    make_model: Callable[..., MidskipForCausalLM],
) -> None:
    logits_BTV, gates_LBT = torch.ones(2, 4, 3, dtype=torch.float64), torch.ones(2, 2, 4)
    got_BTV, other_LBT = logits_BTV.clone(), gates_LBT.clone()
    got_BTV[0, 2:] = 9  # from where a gate of row 0 differs
    got_BTV[1, 3] *= 1.5
    other_LBT[1, 0, 2] = 0
    assert _largest(got_BTV, logits_BTV, other_LBT, gates_LBT) == (pytest.approx(0.5), 6)
    assert _largest(got_BTV, logits_BTV, None, gates_LBT) == (pytest.approx(8), 8)
    assert _largest(got_BTV, logits_BTV, other_LBT * 0, gates_LBT)[0] == float("inf")  # nothing is no agreement

    model = make_model("mixed", torch.bfloat16, num_hidden_layers=5).eval()
    found = check_ours(Side("trained", model), torch.randint(31, (2, 14)))
    assert {one.num_tokens for one in found if one.dtype == "float64"} == {28}


def test_the_bound_follows_from_dtype_shape_and_condition() -> None:
    config = settings().config()
    assert bound(torch.bfloat16, config, 5.0) == 2**-8 * 5 * 16**0.5
    assert bound(torch.float32, config, 3.0) == 2**-24 * 3 * (16 + 6 * 32 + 48) ** 0.5
    assert bound(torch.float32, config, 0.1) == bound(torch.float32, config, 1.0)


# ---- sides and work


def test_rows_of_a_batch_have_depths_of_their_own() -> None:
    given = settings()
    model = imposed(given, build_ours(given, DTYPE), "fixed")[1]
    with torch.no_grad():
        cache = model.prefilled(ids(), 20)
        gates_LBT = model.call(ids(), use_cache=False).gates
        later_LB = model.call(ids(3, 1), cache, use_cache=True).gates[..., 0]
    assert not torch.equal(gates_LBT[:, 0], gates_LBT[:, 1])
    assert cache.batch_size == 3
    first_B = positions(ids(3, 21), model.stretch)[:, -1]
    policy = model.model.model.policy
    assert isinstance(policy, FixedDepths)
    whole = model.model(torch.zeros(3, 1, dtype=torch.long), position_ids=first_B[:, None]).gates[..., 0]
    assert torch.equal(later_LB > 0, whole > 0)  # decoding goes on with each row's own positions


def test_sides_share_their_weights() -> None:
    given = settings()
    dense = build_ours(given, DTYPE)
    sides = imposed(given, dense, "fractional")
    for one in sides:
        for name, parameter in one.model.named_parameters():
            assert parameter.data_ptr() == dense.get_parameter(name).data_ptr(), name
    assert dense.config.policy == "dense" and sides[1].model.config.policy_settings["skip_share"] == 0.5


@pytest.mark.parametrize("kind", [Prefill, Decode, Training])
def test_work_of_llama_is_what_the_meter_counts_on_our_dense_model(kind: Any) -> None:
    given = settings(norms="pre")
    dense = Side("ours", with_policy(build_ours(given, DTYPE), "dense", {}))
    llama = Side("llama", build_llama(given.config(), DTYPE, "cpu"))
    task = kind(ids(3, 15), 5) if kind is Decode else kind(ids(3, 15))
    with torch.set_grad_enabled(task.trains):
        ours, theirs = task.work(dense), task.work(llama)
        assert theirs.executed_share == ours.executed_share == 1
        for name in ("flops", "rows_by_layer", "causal_pairs", "weight_bytes"):
            assert getattr(theirs, name) == getattr(ours, name), name
        if kind is Decode:
            assert theirs.cache_bytes == ours.cache_bytes
            step = task.begin(llama)
            cache = [step(number) for number in range(5)][-1].past_key_values
            assert theirs.kv_used_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_a_stretch_begins_from_the_same_cache_each_time() -> None:
    task, one = Decode(ids(2, 12), 3), side()
    with torch.no_grad():
        first, second = task.begin(one), task.begin(one)
        logits = [first(number).logits for number in range(3)]
        again = [second(number).logits for number in range(3)]
        whole = one.call(task.ids_BT, use_cache=False).logits[:, 9:]
    assert all(torch.equal(a, b) for a, b in zip(logits, again, strict=True))
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)


# ---- statistics


def test_quantiles() -> None:
    values = [float(number) for number in random.Random(0).sample(range(101), 101)]
    assert [quantile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [0, 50, 95, 99, 100]
    assert quantile([1.0, 2.0], 0.25) == 1.25 and quantile([7.0], 0.99) == 7
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3, "lower": 2, "upper": 4}
    for wrong in ([], [1.0]):
        with pytest.raises(ValueError, match="quantile"):
            quantile(wrong, 1.5)


def test_the_mean_of_a_stretch_is_of_the_medians_of_its_steps() -> None:
    assert stretch_mean([[1.0, 10.0], [2.0, 20.0], [300.0, 12.0]]) == (2 + 12) / 2


def test_sides_take_turns_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, calls, begun = 0.0, [], []

    def begin(name: str) -> Callable[[], Callable[[int], None]]:
        def step(number: int) -> None:
            nonlocal now_s
            calls.append((name, number))
            now_s += {"a": 1.0, "b": 2.0}[name] * (number + 1)

        def make() -> Callable[[int], None]:
            nonlocal now_s
            begun.append(name)
            now_s += 100  # making ready is not timed
            return step

        return make

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    ticks: list[int] = []
    seconds = interleave(
        {name: begin(name) for name in "ab"}, 3, 20, random.Random(0), lambda: None, lambda: ticks.append(1)
    )
    assert seconds == {"a": [[1, 2, 3]] * 20, "b": [[2, 4, 6]] * 20}
    assert len(begun) == len(ticks) == 2 * 21  # one turn is warm-up
    assert [number for _, number in calls] == [0, 0, 1, 1, 2, 2] * 21
    firsts = [calls[place][0] for place in range(0, len(calls), 2)]
    assert 20 < firsts.count("a") < 43  # the order is drawn


def test_rows_of_known_times() -> None:
    works = {
        "llama": Work(1.0, 100, [1], 1, 60, 40, 10, 20),
        "llama, static cache": Work(1.0, 100, [1], 1, 60, 40, 10, 20),
        "skip 0.5": Work(0.5, 60, [1], 1, 35, 15, 5, 12),
    }
    times = {"llama": [[4.0, 4.0]], "llama, static cache": [[2.0, 3.0]], "skip 0.5": [[1.0, 2.0]]}
    joules = {"llama": [8.0], "llama, static cache": [9.0], "skip 0.5": [2.0]}
    sides = [Side(name, None, 0.5 if "skip" in name else None) for name in works]
    rows = case_rows({"dtype": "float32", "gates": "fixed"}, Decode(ids(2, 5), 2), sides, times, works, joules)
    ratios = rows[-1]["ratios"]
    assert ratios["llama"] == {
        "of": "llama", "time": 1.5 / 4, "median_time": 1.5 / 4, "flops": 0.6, "work": 0.5, "time_over_work": 0.75,
        "kv_used_bytes": 0.5, "kv_allocated_bytes": 0.6, "joules": 0.25,
    }  # fmt: skip
    assert ratios["fastest_llama"]["of"] == "llama, static cache" and ratios["fastest_llama"]["time"] == 0.6
    assert "dense" not in ratios
    assert rows[-1]["step_s"] == {"median": 1.5, "p95": pytest.approx(1.95), "p99": pytest.approx(1.99)}
    screen = Console(file=StringIO(), width=120)
    rows[-1]["side"] = "skip \x1b[31m[bold]"
    screen.print(case_table(rows))
    assert isinstance(screen.file, StringIO)
    text = screen.file.getvalue()
    assert "\x1b" not in text and "[31m[bold]" in text
    cells = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in text.splitlines() if "│" in line}
    assert cells["of Llama, static cache"] == "0.600" and cells["time / bytes read, of Llama"] == "0.750"


def test_the_picture_needs_points(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no points"):
        write_speed_picture(tmp_path / "empty.png", {"decode": {"a": []}})
    write_speed_picture(tmp_path / "one.png", {"decode": {"a": [(0.5, 0.6)]}}, "a $title")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


# ---- options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "shape is 'huge'; expected one of paper, small, tiny"),
        (["--tasks", "prefill,sleep"], "tasks has 'sleep'; expected some of prefill, decode, training"),
        (["--tasks", "prefill,prefill"], "none of them twice"),
        (["--dtypes", "int8"], "dtypes has 'int8'"),
        (["--gates", "open"], "gates has 'open'; expected some of fixed, fractional"),
        (["--shares", "0,1.5"], "shares has 1.5; expected shares of skipped block-tokens, from 0 to below 1"),
        (["--shares", "nan"], "shares has nan"),
        (["--batch_sizes", "1,0"], "0 is less than 1"),
        (["--repeats", "0"], "0 is less than 1"),
        (["--norms", "post"], "norms"),
        (["--device", "toaster"], "device is 'toaster'; expected cpu, cuda or cuda:N"),
        (["--hidden_size", "33"], "hidden_size (33)"),
        (["--data", "text"], "give its run folder by --run"),
        (["--run", "nowhere"], "there is no folder 'nowhere'"),
        (["--batch_sizes", "1000000", "--tasks", "decode"], "GB free: give smaller --batch_sizes"),
        (["--output", "a_file"], "which is a file; expected a folder"),
        (["--speed", "fast"], "unrecognized arguments: --speed fast"),
    ],
)
def test_options_that_cannot_be_used(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    size = [] if {"--shape", "--run"} & set(arguments) else ["--shape", "tiny"]
    assert main(["bench", *size, "--device", "cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_smallest_sizes(tmp_path: Path) -> None:
    sizes = {"prompt_tokens": 1, "context_tokens": 1, "new_tokens": 1, "batch_sizes": (1,), "repeats": 1}
    report = bench(settings(tasks=("prefill", "decode"), **sizes), tmp_path, Console(file=StringIO()))
    assert len(report["rows"]) == 7
    with pytest.raises(ValueError, match="needs a token to predict"):
        settings(tasks=("training",), **sizes)


def test_settings_that_a_run_brings_itself(make_model: Callable[..., MidskipForCausalLM]) -> None:
    with pytest.raises(ValueError, match="--shares is of models with imposed depths; a run has its own"):
        run_settings(make_model(), "mine", shares=(0.5,))
    changed = BenchSettings.of("paper", {"num_hidden_layers": 3}, device="cpu", repeats=None)
    assert (changed.shape["num_hidden_layers"], changed.repeats) == (3, 9)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--shape tiny --tasks prefill --shares 0.5 --dtypes float32 --gates fixed --repeats 1 --device cpu"
    assert main(["bench", *arguments.split(), "--num_hidden_layers", "3", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [row["side"] for row in report["rows"]] == ["llama", "skip 0.5"]
    assert report["settings"]["shape"]["num_hidden_layers"] == 3
    assert "time to first token" in capsys.readouterr().out


def test_the_command_on_a_run(
    make_model: Callable[..., MidskipForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer("bytes")
    make_model("mixed", DTYPE, vocab_size=len(tokenizer), num_hidden_layers=5).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    (tmp_path / "text.txt").write_text("A token skips the middle layers, or it does not. " * 20, encoding="utf-8")
    arguments = ["bench", "--run", str(tmp_path / "mine"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    arguments += ["--tasks", "decode", "--batch_sizes", "2", "--repeats", "1", "--new_tokens", "3"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [row["side"] for row in report["rows"]] == ["llama", "llama, static cache", "dense twin", "trained"]
    assert report["settings"]["run"] == "mine" and str(tmp_path) not in json.dumps(report)
    assert report["rows"][0]["num_columns"] == 64 and report["rows"][0]["num_steps"] == 3
    capsys.readouterr()
    assert main([*arguments, "--shares", "0.5"]) == 2
    assert "a run has its own: leave it out" in capsys.readouterr().err
