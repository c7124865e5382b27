"""Whatever is in a configuration, a recipe, a shard, a prepared folder, a run folder, text or a prompt: the command
ends in a result or in one clear line, soon, and changes nothing but its own output.

Each kind of input is a good one that is changed at random, in what it means or in its bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from properties import few, many
from shared_fixtures import TINY
from tiny_runs import QUIET, tiny_recipe, write_documents

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.cli import main
from midskip.data import open_prepared, prepare
from midskip.runs import load_any_run, load_run
from midskip.train import train

LONGEST_S, NUM_FEW, NUM_MANY = 10.0, 43, 1429  # cases of each of seven kinds: about 300 and 10,000
Data = st.DataObject

NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 2**31, 2**53 + 1, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-320, 1e308, math.inf, math.nan]
)
TEXTS = st.sampled_from(["", " ", "x", "none", "bytes", "dense", "a/b", "\0", "\u2028", "a" * 300, "{}", "*"])
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=6)  # no path out of the folder
ATOMS = st.none() | st.booleans() | NUMBERS | TEXTS | ANY_TEXT
VALUES = ATOMS | st.lists(ATOMS, max_size=3) | st.dictionaries(TEXTS, ATOMS, max_size=2)


def changed(data: Data, tree: Any) -> Any:
    """A copy of a tree of dictionaries and lists with one place changed, left out or added."""
    places = list(places_of(tree))
    path = data.draw(st.sampled_from(places), "place")
    how = data.draw(st.sampled_from(["another value", "left out", "added"]), "how")
    copy = json.loads(json.dumps(tree))
    owner: Any = copy
    for part in path[:-1]:
        owner = owner[part]
    if how == "left out":
        del owner[path[-1]]
    elif how == "added" and isinstance(owner, dict):
        owner[data.draw(TEXTS, "name")] = data.draw(VALUES, "value")
    else:
        owner[path[-1]] = data.draw(VALUES, "value")
    return copy


def places_of(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for name, value in parts:
        yield (*path, name)
        yield from places_of(value, (*path, name))


def changed_bytes(data: Data, raw: bytes) -> bytes:
    """With a piece of any length, likely near the beginning, replaced by another, of any bytes."""
    most = data.draw(st.sampled_from([40, len(raw)]), "within")
    start = data.draw(st.integers(0, min(most, len(raw))), "from")
    length = data.draw(st.sampled_from([0, 1, 4, 8, len(raw)]), "length")
    return raw[:start] + data.draw(st.binary(max_size=9), "bytes") + raw[start + length :]


def change_file(data: Data, file: Path) -> None:
    """Take it away, or change what it says or its bytes."""
    how = data.draw(st.sampled_from(["gone", "bytes", *["tree"] * 3] if file.suffix == ".json" else ["gone", "bytes"]))
    if how == "gone":
        file.unlink()
    elif how == "bytes":
        file.write_bytes(changed_bytes(data, file.read_bytes()))
    else:
        file.write_text(json.dumps(changed(data, json.loads(file.read_text()))))


class TooLong(BaseException):
    pass


@contextmanager
def ends_well(folder: Path, output: str | None = None) -> Iterator[None]:
    """With a result, or an error that the command line makes one line of; soon; and no file is changed but those of
    the output."""

    def stop(*_: Any) -> None:
        raise TooLong(f"{LONGEST_S} s")

    def files() -> dict[str, bytes | None]:
        found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
        mine = {name: path for name, path in found.items() if output is None or name.split("/")[0] != output}
        return {name: path.read_bytes() if path.is_file() else None for name, path in mine.items()}

    before, usual = files(), signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)  # of work, however busy the machine is
    try:
        yield
    except (ValueError, OSError) as error:
        assert str(error).strip(), f"{type(error).__name__} says nothing"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, usual)
    after = files()
    assert after.keys() == before.keys() and after == before


# ---- the kinds


def a_configuration(data: Data, good: Path) -> None:
    settings = TINY | {"num_hidden_layers": 2}
    full = MidskipConfig(**settings).to_dict()
    names = [name for name in full if name not in ("auto_map", "transformers_version", "model_type", "return_dict")]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True), "settings"):
        settings[name] = data.draw(VALUES, name)
    with ends_well(good):
        config = MidskipConfig(**settings)
        sizes = [value for value in settings.values() if isinstance(value, int | float)]
        if max(sizes) <= 64:
            model = MidskipForCausalLM(config).eval()
            with torch.no_grad():
                assert model(torch.zeros(1, 1, dtype=torch.int64)).logits.shape == (1, 1, config.vocab_size)


def a_recipe(data: Data, good: Path) -> None:
    tree = yaml.safe_load((good / "recipe.yaml").read_text())
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        tree = changed(data, tree)
    raw = yaml.safe_dump(tree, allow_unicode=True).encode()
    if data.draw(st.sampled_from([False] * 4 + [True]), "not YAML"):
        raw = changed_bytes(data, raw)
        with suppress(ValueError, yaml.YAMLError):  # what is left may still be a recipe
            tree = yaml.safe_load(raw)
    resume = data.draw(st.booleans(), "resume")
    with a_copy(good, "run") as folder:
        shutil.rmtree(folder / "run")
        (folder / "changed.yaml").write_bytes(raw)
        output = tree.get("output") if isinstance(tree, dict) else None
        own = output.split("/")[0] if isinstance(output, str) and output.strip("/.") else "runs"
        with ends_well(folder, own), pytest.MonkeyPatch.context() as patch:
            patch.setattr("midskip.train.run.MidskipTrainer", begun)
            patch.setattr("midskip.train.run.peak_flops", lambda _: (1e12, "a test"))
            with one_line() as lines:
                status = main(["train", "changed.yaml", *(["--resume"] if resume else [])])
            assert status == 2 and len(lines) == 1, (status, lines)


def begun(*args: Any, **kwargs: Any) -> None:
    raise ValueError("begun")


@contextmanager
def one_line() -> Iterator[list[str]]:
    """The lines that a command writes to stderr."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midskip.cli._fail", lambda message, status: lines.append(message) or status)
        patch.setattr("midskip.data.progress.TokenBar.update", lambda *args: None)
        yield lines


def a_shard(data: Data, good: Path) -> None:
    with a_copy(good, "shards", "text") as folder:
        for file in data.draw(st.lists(st.sampled_from(sorted((folder / "shards").glob("*.bin"))), min_size=1)):
            file.write_bytes(changed_bytes(data, file.read_bytes()))
        open_it(folder)


def a_prepared_folder(data: Data, good: Path) -> None:
    with a_copy(good, "shards", "text") as folder:
        files = [path for path in sorted((folder / "shards").rglob("*")) if path.is_file()]
        change_file(data, data.draw(st.sampled_from(files), "file"))
        open_it(folder)


def open_it(folder: Path) -> None:
    with ends_well(folder):
        text = open_prepared("shards")
        text.check(QUIET)
        windows = text.windows("training", 16)
        assert len(windows[0]["input_ids"]) == 16
        text.windows("validation", 16)[0]


def a_run_folder(data: Data, good: Path) -> None:
    with a_copy(good, "run") as folder:
        names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.yaml"]
        names += ["generation_config.json", "report.json"]
        change_file(data, folder / "run" / data.draw(st.sampled_from([*names, *["config.json"] * 4]), "file"))
        with ends_well(folder), torch.no_grad():
            model, tokenizer = load_any_run("run")
            model(torch.zeros(1, 1, dtype=torch.int64))
            if tokenizer is not None:
                tokenizer.decode(tokenizer("The cat")["input_ids"])


def a_document(data: Data, good: Path) -> None:
    kind = data.draw(st.sampled_from([".txt", ".jsonl", ".txt.gz", ".parquet"]), "kind")
    if kind == ".jsonl":
        record = st.fixed_dictionaries({"text": st.text(max_size=9) | ATOMS}) | VALUES
        raw = b"\n".join(json.dumps(one).encode() for one in data.draw(st.lists(record, max_size=5), "records"))
        raw = changed_bytes(data, raw) if data.draw(st.booleans(), "not JSON") else raw
    else:
        raw = data.draw(st.text(max_size=40), "text").encode() if kind == ".txt" else b""
        raw += data.draw(st.binary(max_size=40), "bytes")
    settings: dict[str, Any] = {"tokenizer": data.draw(st.sampled_from(["bytes", "bpe"]), "tokenizer")}
    for name, values in {
        "validation_share": NUMBERS, "max_tokens": NUMBERS, "shard_tokens": NUMBERS, "text_field": TEXTS,
        "vocab_size": st.sampled_from([-1, 0, 1, 257, 300]), "validation": TEXTS,
    }.items():  # fmt: skip
        if data.draw(st.sampled_from([False, False, True]), name):
            settings[name] = data.draw(values, name)
    with a_copy(good, "text") as folder:
        (folder / f"it{kind}").write_bytes(raw)
        with ends_well(folder, "out"):
            prepare(f"it{kind},text", "out", console=QUIET, **settings)


def a_prompt(data: Data, good: Path) -> None:
    options = {
        "prompt": st.text(st.characters(), max_size=30),
        "max_new_tokens": st.integers(1, 4) | ATOMS,
        "temperature": st.floats() | ATOMS,
        "top_k": st.integers(0, 5) | ATOMS,
        "seed": ATOMS,
        "budget": NUMBERS,
        "draft_budget": NUMBERS,
        "max_layers": NUMBERS,
        "on_drift": st.sampled_from(["keep", "error", "as_trained", "x"]),
    }
    arguments = ["generate", "run", "--max_new_tokens=2"]
    names = data.draw(st.lists(st.sampled_from(list(options)), max_size=3, unique=True), "options")
    for name in ("prompt", *(name for name in names if name != "prompt")):
        arguments.append(f"--{name}={data.draw(options[name], name)}")
    with a_copy(good, "run") as folder, ends_well(folder), one_line() as lines, pytest.MonkeyPatch.context() as patch:
        patch.setattr("midskip.runs.load_run", lambda *_: loaded(good))
        status = main(arguments)
        assert (status, len(lines)) in ((0, 0), (1, 1), (2, 1)), (status, lines)


def loaded(good: Path) -> Any:
    if good not in _LOADED:
        _LOADED[good] = load_run(good / "run")
    return _LOADED[good]


_LOADED: dict[Path, Any] = {}
KINDS: list[Callable[[Data, Path], None]] = [
    a_configuration, a_recipe, a_shard, a_prepared_folder, a_run_folder, a_document, a_prompt,
]  # fmt: skip


# ---- the tests


@contextmanager
def a_copy(good: Path, *names: str) -> Iterator[Path]:
    """A folder with copies of these, and where commands run meanwhile."""
    with tempfile.TemporaryDirectory(dir=good.parent) as name, pytest.MonkeyPatch.context() as patch:
        for one in names:
            shutil.copytree(good / one, Path(name, one))
        patch.chdir(name)
        yield Path(name)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, what is prepared of it, a recipe for that, and its run."""
    folder = tmp_path_factory.mktemp("malformed") / "good"
    folder.mkdir()
    text = write_documents(folder / "text", 30)
    prepare(str(text), folder / "shards", vocab_size=300, validation_share=0.2, shard_tokens=400, console=QUIET)
    model = {"policy_settings": {"gates": "hard", "scores": "hidden_states"}, "num_hidden_layers": 2}
    recipe = tiny_recipe(folder / "shards", folder / "run", model=model, data={"length": 40}, max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midskip.train.report.write_picture", lambda *args, **kwargs: None)
        train(recipe, console=QUIET)
    tiny_recipe("../good/shards", "out", model=model, data={"length": 40}, max_steps=1).save(folder / "recipe.yaml")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("on_the_cpu")
def test_some(kind: Callable[[Data, Path], None], good: Path) -> None:
    few(NUM_FEW)(given(st.data())(lambda data: kind(data, good)))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("on_the_cpu")
def test_many(kind: Callable[[Data, Path], None], good: Path) -> None:
    many(NUM_MANY)(given(st.data())(lambda data: kind(data, good)))()
