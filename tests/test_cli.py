"""The command line: every command on real input, and one clear line for input that cannot be used."""

import json
import re
import shutil
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from tags import Tags

from midskip.cli import COMMANDS, main
from midskip.runs import load_run

# Documents that try to be markup, and to steer a terminal.
DOCUMENTS = [
    f'Number {i}: <script>alert({i})</script> & "></i></b><img src=x onerror=alert(1)> \x1b[31mred\x1b[0m.\n'
    for i in range(24)
]
RECIPE = """
data: {vocab_size: 300, length: 32, validation_share: 0.2}
model: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 5, num_attention_heads: 2}
regularizer: {name: target_share, settings: {target_share: 0.5, ramp_steps: 2}}
training:
  {max_steps: 4, per_device_train_batch_size: 2, save_steps: 2, logging_steps: 1, eval_steps: 2, report_to: [],
  peak_flops: 1e12}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text/, recipe.yaml and run/, a finished run of a model of five layers."""
    place = tmp_path_factory.mktemp("place")
    (place / "text").mkdir()
    (place / "text" / "all.txt").write_text("<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    (place / "recipe.yaml").write_text(RECIPE + f"output: {place / 'run'}\n")
    assert main(["train", str(place / "recipe.yaml"), f"--data.source={place / 'text'}"]) == 0
    return place


@pytest.fixture
def error(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """error(*arguments, status=2): what the command says of input that it cannot use, on one line of stderr."""

    def run(*arguments: object, status: int = 2) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("midskip: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in err and "\x1b" not in err
        return err.removeprefix("midskip: error: ").rstrip()

    return run


# What works


def test_an_odd_number_of_layers_trains(place: Path) -> None:
    report = json.loads((place / "run" / "report.json").read_text())
    share_L = report["validation"]["share_by_layer"]
    assert len(share_L) == 5 and share_L[:2] == share_L[:2:-1]
    model, _ = load_run(place / "run")
    state = json.loads((place / "run" / "checkpoint-4" / "regularizer.json").read_text())
    policy = model.model.policy
    assert (policy.bias - policy.open_bias).tolist() == pytest.approx(state["bias"]) and len(state["bias"]) == 3


def test_train_prints_its_report_and_goes_on(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"--data.source={place / 'text'}", f"--output={tmp_path / 'run'}", "--training.max_steps=2"]
    for extra in ([], ["--resume"]):
        assert main(["train", str(place / "recipe.yaml"), *overrides, *extra, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["training"]["steps"] == 2


def test_train_says_what_a_person_wants_to_know_and_where_the_rest_is(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("long-" * 30 + "\x1b[31m[bold]") / "run"
    overrides = [f"--data.source={place / 'text'}", f"--output={folder}", "--training.max_steps=2"]
    assert main(["train", str(place / "recipe.yaml"), *overrides, "--dense_layers=[2]"]) == 0
    out, err = capsys.readouterr()
    assert not {"\x1b", "\r"} & set(out + err) and len(out.splitlines()) <= 20
    report = json.loads((folder / "report.json").read_text())
    found, (dense,) = report["validation"], report["dense"]
    assert "after 2 steps on" in out and "middle_out, 5 layers" in out and "dense, 2 layers" in out
    for name, shown in (("loss", "{:.4f}"), ("bits_per_byte", "{:.4f}"), ("flops_per_token", "{:,.0f}")):
        assert shown.format(found[name]) in out and shown.format(dense[name]) in out, name
    assert f"{found['executed_share']:.1%}" in out and re.search(r"training .* \d+(\.\d)? s ", out)
    lines = dict(line.split("  ", 1) for line in out.splitlines()[-5:])
    paths = {name.strip(): Path(path.strip().replace("␛", "\x1b")) for name, path in lines.items()}
    files = {"page": "page.html", "picture": "picture.png", "history": "history.jsonl", "all numbers": "report.json"}
    assert paths == {"model": folder, **{name: folder / file for name, file in files.items()}}
    assert all(path.exists() for path in paths.values())
    assert "step 2/2: held-out loss" in err and "step 2/2: saved checkpoint-2" in err


def test_train_goes_on_with_another_recipe_only_if_told(
    place: Path, tmp_path: Path, error: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "page.html").unlink()  # it was killed before its end
    arguments = [place / "recipe.yaml", f"--data.source={place / 'text'}", f"--output={tmp_path / 'run'}", "--resume"]
    message = error("train", *arguments, "--training.learning_rate=0.01")
    assert "not the one this run began with (training.learning_rate: 0.003 -> 0.01)" in message
    assert message.endswith("or accept it with --accept_changes")
    changed = [*map(str, arguments), "--training.learning_rate=0.01", "--accept_changes"]
    assert main(["train", *changed, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["training"]["steps"] == 4
    assert "learning_rate: 0.01\n" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_the_best_model_is_evaluated_like_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads((place / "run" / "best" / "evaluation.json").read_text())
    assert best == json.loads((place / "run" / "report.json").read_text())["best"] and best["step"] in (2, 4)
    assert main(["evaluate", str(place / "run" / "best"), "--data", str(place / "text"), "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["loss"] < 7
    assert main(["evaluate", str(place / "run" / "best"), "--json"]) == 0, "on the held-out text of its run"
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(best["loss"], rel=1e-6)


def test_evaluate_gives_the_numbers_of_the_report(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "numbers.json"
    assert main(["evaluate", str(place / "run"), "--batch_size", "2", "--output", str(written), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(written.read_text())
    assert result.pop("text") == "held-out text of the run"
    assert result == json.loads((place / "run" / "report.json").read_text())["validation"]
    assert main(["evaluate", str(place / "run"), "--data", str(place / "text"), "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert not (place / "run" / "evaluated.json").exists(), "it was printed"
    assert main(["evaluate", str(place / "run"), "--data", str(place / "text")]) == 0
    out = capsys.readouterr().out
    assert json.loads((place / "run" / "evaluated.json").read_text()) == everything
    assert out.endswith(f"\nall numbers  {place / 'run' / 'evaluated.json'}\n") and f"{everything['loss']:.4f}" in out
    assert len(out.splitlines()) < 15
    assert everything["num_tokens"] > 3 * result["num_tokens"], "all of the text, not a share of it"


def test_generate_goes_on_with_the_prompt(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("0", "0", "1"):
        options = ["--max_new_tokens", "12", "--temperature", "2.5", "--seed", seed]
        assert main(["generate", str(place / "run"), "--prompt", "Number 中e\u0301", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert (
        texts[0].startswith("Number 中e\u0301")
        and "\ufffd" not in texts[0]
        and texts[0].endswith("blocks run  0  1  2  3  4  5 \n")
    )


def test_a_prompt_is_read_from_a_file_or_standard_input(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Number 中\nand"
    (tmp_path / "prompt.txt").write_text(f"{text}\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(f"{text}\r\n".encode()), encoding="latin-1"))
    said = []
    for prompt in (["--prompt", text], ["--prompt", "-"], ["--prompt_file", str(tmp_path / "prompt.txt")]):
        assert main(["generate", str(place / "run"), *prompt, "--max_new_tokens", "4"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith(text) and said == [said[0]] * 3


# Text that would be more than text


@torch.no_grad()
@pytest.mark.parametrize("colour", [False, True])
def test_no_text_of_a_model_steers_the_terminal(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, colour: bool
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    model, tokenizer = load_run(tmp_path / "run")
    escape = tokenizer("\x1b")["input_ids"]
    assert len(escape) == 1
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].expand(len(tokenizer), -1))
    # the same whatever the tokens
    state_D = model.model(torch.tensor([[5, 6]], device=model.device)).last_hidden_state[0, 0]
    model.lm_head.weight.zero_()[escape] = state_D
    model.save_pretrained(tmp_path / "run")
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLORTERM", "truecolor")
    options = ["--max_new_tokens", "4", "--temperature", "0"]
    assert main(["generate", str(tmp_path / "run"), "--prompt", "[bold]a\x1b]0;b\x07", *options]) == 0
    out = capsys.readouterr().out
    assert ("\x1b[" in out) is colour
    # what is left without rich's own colours
    for code in sorted({part.split("m")[0] for part in out.split("\x1b[")[1:]}, key=len, reverse=True):
        assert set(code) <= set("0123456789;")
        out = out.replace(f"\x1b[{code}m", "")
    assert out.splitlines()[0] == "[bold]a␛]0;b␇␛␛␛␛"
    assert "\x1b" not in out and "\x07" not in out


def test_the_page_of_a_run_escapes_its_documents(place: Path) -> None:
    page = (place / "run" / "page.html").read_text(encoding="utf-8")
    read = Tags(page)
    assert not read.tags & {"script", "img"}
    assert "<script>alert(" in read.text and '"></i></b><img src=x onerror=alert(1)>' in read.text
    assert "␛[31mred" in read.text and "\x1b" not in page
    assert "<script" not in page and "<img" not in page


def test_an_error_is_one_line_of_harmless_text(error: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    assert error("train", tmp_path / "empty.yaml", "--training.\x1b[31m\n[bold]=3") == (
        "the recipe cannot be used: unrecognized arguments: --training.␛[31m [bold]=3"
    )
    (tmp_path / "recipe.yaml").write_text("training: {steps: [\n")
    assert error("train", tmp_path / "recipe.yaml").startswith("the recipe cannot be used: while parsing")


# What is refused


def test_commands_and_options_that_are_none(error: Callable[..., str], place: Path) -> None:
    assert error("trian") == f"there is no command 'trian'; expected one of {', '.join(COMMANDS)}"
    for command, *arguments in (
        ("demo", "--step", "3"),
        ("demo", "--steps", "0"),
        ("demo", "--steps", "three"),
        ("evaluate", place / "run", "--budgets", "0.3,x"),
        ("evaluate",),
        ("evaluate", place / "run", "--batch_size", "0"),
        ("generate", place / "run"),
        ("generate", place / "run", "--prompt", "a", "--max_new_tokens", "0"),
        ("generate", place / "run", "--prompt", "a", "--temp", "1"),
    ):
        message = error(command, *arguments)
        assert message.endswith(f"; `midskip {command} --help` tells more")
        assert "invalid" not in message, "the name of a function of ours tells a user nothing"


def test_recipes_that_cannot_be_used(error: Callable[..., str], place: Path, tmp_path: Path) -> None:
    assert error("train", tmp_path / "none.yaml").endswith("none.yaml'; expected a YAML file")
    (tmp_path / "recipe.yaml").write_text("training: {learning_rat: 1}\n")
    assert "'learning_rat'" in error("train", tmp_path / "recipe.yaml")
    recipe = place / "recipe.yaml"
    assert "--training.learning_rat=1" in error("train", recipe, "--training.learning_rat=1")
    assert "training.max_steps is 0; expected at least 1" in error("train", recipe, "--training.max_steps=0")
    assert "unrecognized arguments" in error("train", recipe, tmp_path / "recipe.yaml")
    missing = "the following arguments are required: RECIPE.yaml; `midskip train --help` tells more"
    assert error("train") == error("train", "--resume", "--training.max_steps=3") == missing
    assert "training.max_steps is 0" in error("train", "--training.max_steps=0", recipe), "it may stand anywhere"


def test_where_an_own_policy_fails_is_told(
    error: Callable[..., str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that is none is found in the first pass; an error of its own code has a place."""
    body = "from midskip.policies import Decision, Policy\n\n\nclass {0}(Policy):\n"
    body += "    def decide(self, layer, h_ND, state, batch):\n        return {1}\n\n\n"
    failing = {"Above": "Decision(None, h_ND[:, 0] * 0 + 2)", "Unpacks": "[x for x, y in [[1]]]"}
    (tmp_path / "policies_that_fail.py").write_text("".join(body.format(*one) for one in failing.items()))
    monkeypatch.syspath_prepend(str(tmp_path))
    given = ["train", place / "recipe.yaml", f"--data.source={place / 'text'}", "--regularizer.name=none"]
    given += ["--regularizer.settings={}", "--model.policy_settings={}"]
    said = [
        error(*given, f"--output={tmp_path / name}", f"--model.policy=policies_that_fail:{name}") for name in failing
    ]
    assert said[0].startswith("the policy Above, asked about layer 0: output_gate_N reaches from 2 to 2 where kept")
    assert said[1] == "not enough values to unpack (expected 2, got 1) (in policies_that_fail.py, line 14)"


def test_text_that_cannot_be_used(error: Callable[..., str], place: Path, tmp_path: Path) -> None:
    empty, latin, short = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "short.txt"
    empty.write_text(" \n")
    latin.write_bytes("déjà vu".encode("latin-1"))
    short.write_text("two words")
    (tmp_path / "folder").mkdir()
    for source, words in (
        (tmp_path / "none", "the path does not exist"),
        (tmp_path / "folder", "holds no file of that kind"),
        (empty, "holds no text"),
        (latin, "is not UTF-8 text: byte 0xe9 at offset 1"),
        (short, "which make 0 windows of 32 tokens"),
    ):
        options = (f"--data.source={source}", f"--output={tmp_path / 'run'}")
        assert words in error("train", place / "recipe.yaml", *options)
        assert [path.name for path in tmp_path.glob("run/*")] == (["text"] if source == short else [])
        if source != short:
            assert words in error("evaluate", place / "run", "--data", source)
            assert words in error("demo", "--source", source, "--output", tmp_path / "demo")
            assert not (tmp_path / "demo").exists()


def test_prompts_that_cannot_be_used(error: Callable[..., str], place: Path) -> None:
    def refused(prompt: str, *options: str) -> str:
        return error("generate", place / "run", "--prompt", prompt, *options)

    assert "tokens and 100 more were asked for, but the model takes at most 32" in refused("Number")
    assert refused("Number " * 50, "--max_new_tokens", "1").endswith("shorten the prompt to at most 31 tokens")
    assert refused("Number 1", "--max_new_tokens", "40").rpartition("or ask for at most ")[2] in map(str, range(20, 32))
    (place / "latin.txt").write_bytes(b"d\xe9j\xe0")
    assert "latin.txt' is not UTF-8 text" in error("generate", place / "run", "--prompt_file", place / "latin.txt")
    assert "not allowed with" in refused("a", "--prompt_file", str(place / "latin.txt"))
    assert "there is no file '" in error("generate", place / "run", "--prompt_file", place / "none.txt")
    assert refused("") == "the prompt is empty; give at least one character"
    assert refused("a\udcff", "--max_new_tokens", "1").startswith("the prompt is not Unicode text")
    assert "temperature is -1.0" in refused("a", "--temperature", "-1")


def test_folders_that_cannot_be_used(error: Callable[..., str], place: Path, tmp_path: Path) -> None:
    for command, *options in (("evaluate",), ("generate", "--prompt", "a")):
        assert "there is no folder" in error(command, tmp_path / "none", *options)
        assert "holds no finished run" in error(command, place / "text", *options)
        shutil.copytree(place / "run", tmp_path / command)
        (tmp_path / command / "model.safetensors").unlink()
        message = error(command, tmp_path / command, *options)
        assert "(it lacks model.safetensors): go on with `midskip train ... --resume`" in message
        (tmp_path / command / "model.safetensors").write_bytes(b"no weights")
        assert "cannot be read" in error(command, tmp_path / command, *options)
    recipe, source = place / "recipe.yaml", f"--data.source={place / 'text'}"
    assert "already holds a run; go on with it by --resume" in error("train", recipe, source)
    assert "is finished, with another recipe (training.seed: 0 -> 9)" in error(
        "train", recipe, source, "--resume", "--training.seed=9"
    )
    assert "holds other files" in error("train", recipe, source, f"--output={place / 'text'}")
    assert "which is a file" in error("train", recipe, source, f"--output={recipe}")
    assert "Not a directory" in error("train", recipe, source, f"--output={recipe / 'run'}")
    assert "holds other files" in error("demo", "--output", place / "text")
    assert "which is a file" in error("demo", "--output", recipe)


def test_numbers_that_cannot_be_written_are_printed_all_the_same(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(place / "run"), "--output", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["num_tokens"] > 0
    assert err.startswith("midskip: error: ") and "No space left on device" in err and err.count("\n") == 1
    assert main(["evaluate", str(place / "run"), "--output", str(tmp_path / "none" / "numbers.json")]) == 2
    out, err = capsys.readouterr()
    assert not out and "none' for --output: make it first" in err, "before it begins"


def test_a_run_that_fails_has_a_status_of_its_own(
    place: Path, tmp_path: Path, error: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = (f"--data.source={place / 'text'}", f"--output={tmp_path / 'run'}", "--training.max_grad_norm=0")
    message = error("train", place / "recipe.yaml", *options, "--training.learning_rate=1e30", status=1)
    assert message.startswith("step 2 is not finite (cross-entropy ")
    assert message.endswith("a checkpoint from before, if there is one, is kept")

    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("midskip.commands.train.run", interrupted)
    capfd.readouterr()
    assert main(["train"]) == 130
    assert capfd.readouterr() == ("", "midskip: interrupted\n")
