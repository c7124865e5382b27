"""Every block of code in the documents is run by something: as a rule here, by `doc_code.Reader`.

A page's reader has what its blocks name: the folders in `THINGS`, unless a block makes them. What a page must have led
to is in `RESULTS`.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_code import ELSEWHERE, PAGES, ROOT, Block, Reader, blocks_of, module_of
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from tiny_curve import CURVE
from tiny_frontier import point, write_sweep
from tiny_pretrained import SHAPE, build
from tiny_runs import QUIET, tiny_recipe
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import midskip
from midskip import MidskipForCausalLM
from midskip.budget.calibrate import save_calibration
from midskip.budget.calibration import Calibration
from midskip.convert import load
from midskip.train import read_recipe, train

POLICIES, REGULARIZERS = (ROOT / "docs" / f"{name}.md" for name in ("policies", "regularizers"))
THINGS: dict[str, Callable[[Path, Any], object]] = {}
RESULTS: dict[str, Callable[[Reader], object]] = {}
DOCUMENTS = [f"Function {i} returns the names of all {i % 7} files.\n" * 5 for i in range(80)]
COVERED = [page for page in PAGES if blocks_of(page) and page.name not in ELSEWHERE]


def thing(name: str) -> Any:
    return lambda make: THINGS.setdefault(name, make)


def result(name: str) -> Any:
    return lambda check: RESULTS.setdefault(name, check)


# ---- what a reader has


@thing("my_texts")
def _text(folder: Path, request: Any, documents: list[str] = DOCUMENTS[:40]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / "some.txt").write_text("<|endoftext|>\n".join(documents), encoding="utf-8")


@thing("unseen_texts")
def _unseen(folder: Path, request: Any) -> None:
    _text(folder, request, DOCUMENTS[40:])


@thing("corpus")
def _corpus(folder: Path, request: Any) -> None:
    folder.mkdir()
    for name in ("train.txt", "valid.txt"):
        (folder / name).write_text("".join(DOCUMENTS), encoding="utf-8")


@thing("SmolLM2-135M")
def _smollm2(folder: Path, request: Any) -> None:
    """A small model of its kind, by the name alone and, as on the hub, behind that of its maker."""
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue("tokenizer")
    changes = {"vocab_size": len(tokenizer), "num_hidden_layers": 6, "max_position_embeddings": 1024}
    build(LlamaConfig(**SHAPE | changes, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    request.getfixturevalue("monkeypatch").setattr(load, "snapshot_download", lambda name, **others: str(folder))


@thing("runs/mine")
def _run(folder: Path, request: Any) -> None:
    """A finished run with a calibration that was never measured."""
    _text(source := Path("texts"), request)
    data = {"length": 64, "vocab_size": 300, "validation_share": 0.2}
    model = {"policy_settings": {"gates": "hard"}, "skipped_kv": "keep"}
    shares = ("target_share", {"target_share": 0.5})
    train(tiny_recipe(source, folder, *shares, model=model, data=data), console=QUIET)
    save_calibration(folder, Calibration.from_dict(CURVE))


@thing("downloaded")
def _downloaded(folder: Path, request: Any) -> None:
    """A run whose policy is a module of somebody else."""
    Path("their_package").mkdir()
    Path("their_package", "policies.py").write_text(module_of(POLICIES, "my_policies.py"), encoding="utf-8")
    importlib.invalidate_caches()
    model = {"policy": "their_package.policies:Thin"}
    train(tiny_recipe(request.getfixturevalue("prepared"), folder, model=model), console=QUIET)
    for name in [name for name in sys.modules if name.startswith("their_")]:
        del sys.modules[name]


@thing("runs/my_sweep")
def _sweep(folder: Path, request: Any) -> None:
    dense = [point([3.0, 3.1, 3.0], 1e5, dense=True), point([2.0, 2.1, 2.0], 1e6, dense=True)]
    write_sweep(folder, {"dense": dense, "gated": [point([2.2, 2.3, 2.2], 5e5)]})


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the files of each push to the hub, which go nowhere."""
    seen: list[list[str]] = []

    def refuse(name: str, **others: Any) -> ModelCard:
        raise EntryNotFoundError("no card")

    def create_commit(self: HfApi, *, operations: list[Any], **others: Any) -> None:
        seen.append(sorted(operation.path_in_repo for operation in operations))

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **others: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", refuse)
    return seen


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, uploads: Any) -> Iterator[Reader]:
    """In an empty folder with the recipes; modules that a page makes are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(ROOT / "recipes", "recipes")
    yield Reader(capsys, names={"uploads": uploads})
    for name in [name for name in sys.modules if name.startswith(("my_", "their_"))]:
        del sys.modules[name]


# ---- what a page must have led to


@result("README.md")
def _readme(reader: Reader) -> None:
    printed = reader.printed
    assert isinstance(reader.names["model"], MidskipForCausalLM) and Path("my_model", "model.safetensors").is_file()
    assert list(printed) == ["prepare", "train", "calibrate", "evaluate", "generate", "bench", "retrofit"]
    assert list(json.loads(Path("runs/retrofit/retrofit.json").read_text())["stages"]) == ["fit"]
    assert json.loads(printed["prepare"])["settings"]["source"] == "my_texts"
    assert "after 2 steps on" in printed["train"] and "\nall numbers  runs/mine/report.json\n" in printed["train"]
    assert len(json.loads(Path("runs/mine/evaluated.json").read_text())["budgets"]) == 3
    assert "as trained" in printed["evaluate"] and "\nall numbers  runs/mine/evaluated.json\n" in printed["evaluate"]
    assert Path("bench", "bench.json").is_file() and Path("bench", "bench.png").is_file()
    assert "".join(printed["generate"].split()).startswith("Thefunctionreturns")  # a terminal breaks lines
    recipe = read_recipe("runs/mine/recipe.yaml")
    assert recipe.data.source == "prepared" and recipe.training.max_steps == 2


@result("policies.md")
def _policies(reader: Reader) -> None:
    """The README names the same policy and regularizer in options."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    Path("my_regularizers.py").write_text(module_of(REGULARIZERS, "my_regularizers.py"), encoding="utf-8")
    policy = re.search(r"`(--model\.policy=\S+)`", readme)
    regularizer = re.search(r"`(--regularizer\.name=\S+)`", readme)
    assert policy and regularizer and "`--resume`" in readme
    recipe = read_recipe("recipes/pydocs-small-dense.yaml", [policy[1], regularizer[1]])
    assert recipe.build_config(300).policy == reader.names["config"].policy == "my_policies:Thin"
    assert recipe.regularizer.name == "my_regularizers:Ratchet"


@result("regularizers.md")
def _regularizers(reader: Reader) -> None:
    regularizer = reader.names["regularizer"]
    assert isinstance(regularizer, midskip.regularizers.Regularizer)
    gates_LBT = torch.full((8, 2, 3), 0.75)
    assert regularizer.loss(gates_LBT) == 0
    regularizer.update(gates_LBT.mean((1, 2)), torch.zeros(8))
    assert regularizer.loss(gates_LBT).item() == pytest.approx(0.75e-3)
    assert regularizer.state_dict() == {"price": pytest.approx([1e-3] * 8)}


@result("huggingface.md")
def _huggingface(reader: Reader) -> None:
    names = reader.names
    assert [len(texts) for texts in names["texts"]] == [1, 1]
    assert names["texts"][0][0]["generated_text"].startswith("The function")
    assert type(MidskipForCausalLM.from_pretrained("tuned")) is MidskipForCausalLM
    assert names["trainer"].state.global_step == 4
    assert isinstance(names["adapted"], PeftModel) and Path("adapter", "adapter_config.json").is_file()
    assert type(names["merged"]) is MidskipForCausalLM
    assert ["README.md" in files for files in names["uploads"]] == [True, True]
    assert "model.safetensors" in names["uploads"][0]
    card = Path("runs/mine/README.md").read_text(encoding="utf-8")
    assert all(f"\n## {part}\n" in card for part in ("Measured", "A budget at run time", "Speed"))
    assert '"somebody/skipper"' in card and "\n### Measured on text\n" in card


@result("retrofit.md")
def _retrofit(reader: Reader) -> None:
    assert type(reader.names["plain"]) is LlamaForCausalLM and Path("smollm2", "tokenizer_config.json").is_file()
    assert (reader.names["gated"](torch.ones(1, 3, dtype=torch.long)).gates == 1).all()
    assert reader.names["model"].last_drafts is not None and "retrofit" in reader.printed


@result("sweeps.md")
def _sweeps(reader: Reader) -> None:
    assert sum(point.num_runs() for point in reader.names["sweep"].points) == 5 * (3 + 2)


@result("training.md")
def _training(reader: Reader) -> None:
    found = reader.names["report"]
    assert found["text"] == "my_data:Recall" and found["validation"]["num_targets"] == 200 * (32 - 5)
    assert "accuracy" in found["validation"] and "accuracy_by_group" not in found["validation"]


# ---- the tests


@pytest.mark.usefixtures("no_pictures", "on_the_cpu")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # transformers' default, without a GPU
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
@pytest.mark.parametrize("page", COVERED, ids=lambda page: page.name)
@pytest.mark.integration
def test_the_code_of_a_page_runs(page: Path, reader: Reader, request: pytest.FixtureRequest) -> None:
    code = "".join(block.text for block in blocks_of(page))
    for name, make in THINGS.items():
        if name in code and not re.search(rf"--output[= ]{name}(?![\w/-])", code):
            make(Path(name), request)
    reader.read(page)
    assert reader.ran == [str(block) for block in blocks_of(page)]
    if page.name in RESULTS:
        RESULTS[page.name](reader)


def test_what_runs_elsewhere_is_there() -> None:
    pages = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    for what, file in ELSEWHERE.items():
        assert what in pages or any(re.search(rf"^{what}", text, re.MULTILINE) for text in pages.values()), what
        assert what in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} runs no {what}"


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("", "midskip train", "nothing runs a block without a language"),
        ("toml", "[project.entry-points.other]\na = 'b:C'", "other"),
        ("rust", "fn main() {}", "nothing runs rust"),
        ("sh", "docker run midskip", "nothing runs 'docker run midskip'"),
        ("sh", "make nothing", "make nothing"),
        ("sh", "midskip train none.yaml", "none.yaml"),
        ("sh", "pip install 'midskip[none]'", "none"),
        ("python", "assert not print, 3", "3"),
        ("python", "class Policy:\n    def decide(self) -> None: ...", "Policy.decide"),
    ],
)
def test_a_block_that_nothing_runs_fails(
    language: str, text: str, message: str, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doc_code.blocks_of", lambda page: [Block(page, 1, language, text)])
    with pytest.raises(AssertionError, match=re.escape(message)):
        reader.read(Path("page.md"))


def test_commands_that_are_not_fenced_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text, message in (("a\n\n    midskip train\n", "fence it"), ("```sh\nmidskip train\n", "does not end")):
        page.write_text(text)
        with pytest.raises(AssertionError, match=message):
            blocks_of(page)
