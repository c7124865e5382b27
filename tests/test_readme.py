"""The documents: their code and commands run, their lists are whole, their links lead somewhere."""

import ast
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers.utils import logging

import midskip
from midskip.cli import main
from midskip.report import write_idea
from midskip.train import read_recipe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "midskip"
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE, POLICIES, REGULARIZERS = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("architecture", "policies", "regularizers")
)
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = {
    "train": [
        "--data.vocab_size=300", "--data.length=128", "--model.hidden_size=16", "--model.intermediate_size=24",
        "--model.num_hidden_layers=4", "--training.max_steps=2", "--training.per_device_train_batch_size=2",
        "--training.peak_flops=1e12",
    ],
    "bench": [
        "--shape", "tiny", "--dtypes", "float32", "--gates", "fractional", "--repeats", "2", "--shares", "0.5",
        "--batch_sizes", "1",
    ],
    "retrofit": ["--fit_tokens", "512", "--price_tokens", "2048"],
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found, f"no {language} block"
    return found


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the README's reader has: recipes, text, and a checkpoint of the released code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(ROOT / "recipes", "recipes")
    for folder, first in (("my_texts", 0), ("unseen_texts", 40)):
        Path(folder).mkdir()
        documents = [f"Function {i} returns the names of all {i % 7} files.\n" * 5 for i in range(first, first + 40)]
        Path(folder, "some.txt").write_text("<|endoftext|>\n".join(documents), encoding="utf-8")
    Path("skip_middle_checkpoint").mkdir()
    with np.load(ROOT / "tests" / "data" / "forward_gqa.npz") as arrays:
        names = [name for name in arrays.files if name.startswith("state_dict/")]
        weights = {"model." + name.removeprefix("state_dict/"): torch.as_tensor(arrays[name]) for name in names}
        Path("skip_middle_checkpoint", "config.json").write_text(str(arrays["config"]), encoding="utf-8")
    save_file(weights, "skip_middle_checkpoint/model.safetensors")
    verbosity, modules = logging.get_verbosity(), set(sys.modules)
    yield tmp_path
    logging.set_verbosity(verbosity)
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


# README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_lines_of_the_documents_fit() -> None:
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120 or line.startswith("|"), f"{page.name}, line {number}, has {len(line)} characters"


@pytest.mark.usefixtures("workplace")
def test_the_readmes_python_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "torch.Size([6, 2, 16])" in printed
    assert isinstance(names["model"], midskip.MidskipForCausalLM) and "SkipCache(of the tokens that ran" in printed
    assert Path("my_model", "model.safetensors").is_file()


@pytest.mark.usefixtures("workplace")
def test_the_readmes_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks(README, "sh") for line in block.splitlines()]
    made = [line.split()[1] for line in lines if line.startswith("make ")]
    assert made == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in made)
    printed = {}
    for line in lines:
        if not line.startswith("make "):
            program, command, *arguments = shlex.split(line)
            assert program == "midskip"
            status = main([command, *arguments, *TINY.get(command, [])])
            captured = capsys.readouterr()
            assert status == 0, f"{line}: {captured.err}"
            printed.setdefault(command, captured.out)
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


@pytest.mark.usefixtures("workplace")
def test_the_readmes_other_options_are_known() -> None:
    module = next(block for block in blocks(POLICIES, "python") if block.startswith("# my_policies.py"))
    Path("my_policies.py").write_text(module, encoding="utf-8")
    policy = re.search(r"`(--model\.policy=\S+)`", README)
    regularizer = re.search(r"`(--regularizer\.name=\S+)`", README)
    assert policy and regularizer and "`--resume`" in README
    recipe = read_recipe("recipes/pydocs-small-dense.yaml", [policy[1], regularizer[1]])
    assert recipe.build_config(300).policy == "my_policies:Thin"
    assert recipe.regularizer.name == "my_regularizers:Ratchet"


# docs


def tree() -> Iterator[tuple[Path, str]]:
    """The paths in the list of files, and what is said of each."""
    section = ARCHITECTURE.split("\n## Files\n")[1].split("\n## ")[0]
    folders: list[str] = []
    for line in filter(str.strip, section.splitlines()):
        indent, name, text = re.fullmatch(r"( +)(\S+) *(.*)", line).groups()
        depth = len(indent) // 2 - 2
        folders = folders[:depth]
        yield ROOT.joinpath(*folders, name), text
        if name.endswith("/"):
            folders.append(name)
        else:
            assert text, f"nothing is said of {name}"


def test_the_list_of_files_is_whole() -> None:
    listed = dict(tree())
    for path, text in listed.items():
        assert path.exists(), f"{path} is listed and nowhere else"
        if path.is_dir():
            for name in re.findall(r"[\w-]+\.(?:md|yaml)", text):
                assert (path / name).is_file(), f"{name} is listed and not in {path}"
    # what a folder's own __init__ gives is said of its files
    files = {path for path in PACKAGE.parent.rglob("*.py") if path.name != "__init__.py" or path.parent == PACKAGE}
    assert {path for path in listed if path.suffix == ".py"} == files
    names = [
        "".join(parts)
        for pattern in listed[ROOT / "recipes"].split(", ")
        for parts in product(*(part.strip("{}").split(",") for part in re.findall(r"{[^}]+}|[^{}]+", pattern)))
    ]
    assert sorted(names) == [recipe.stem for recipe in RECIPES]


@pytest.mark.usefixtures("workplace")
def test_the_examples_of_policies_and_regularizers_run() -> None:
    names: dict[str, object] = {}
    for block in blocks(POLICIES, "python") + blocks(REGULARIZERS, "python"):
        if module := re.match(r"# (my_\w+\.py)\n", block):
            Path(module[1]).write_text(block, encoding="utf-8")
        elif not block.startswith("class "):
            exec(compile(block, "policies.md", "exec"), names)
    assert isinstance(names["config"], midskip.MidskipConfig)
    regularizer = names["regularizer"]
    assert isinstance(regularizer, midskip.regularizers.Regularizer)
    gates_LBT = torch.full((8, 2, 3), 0.75)
    assert regularizer.loss(gates_LBT) == 0
    regularizer.update(gates_LBT.mean((1, 2)), torch.zeros(8))
    assert regularizer.loss(gates_LBT).item() == pytest.approx(0.75e-3)
    assert regularizer.state_dict() == {"price": pytest.approx([1e-3] * 8)}


def interfaces() -> list[ast.ClassDef]:
    stubs = [
        block
        for page in (ARCHITECTURE, POLICIES, REGULARIZERS)
        for block in blocks(page, "python")
        if block.startswith("class ")
    ]
    return [node for block in stubs for node in ast.parse(block).body if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("shown", interfaces(), ids=lambda node: node.name)
def test_the_signatures_shown_are_the_real_ones(shown: ast.ClassDef) -> None:
    nodes = [node for file in PACKAGE.rglob("*.py") for node in ast.parse(file.read_text(encoding="utf-8")).body]
    (real,) = (node for node in nodes if isinstance(node, ast.ClassDef) and node.name == shown.name)
    methods = {node.name: node for node in real.body if isinstance(node, ast.FunctionDef)}
    fields = [ast.unparse(node) for node in real.body if isinstance(node, ast.AnnAssign)]
    for node in shown.body:
        if isinstance(node, ast.AnnAssign):
            assert ast.unparse(node) in fields
        else:
            assert isinstance(node, ast.FunctionDef) and node.name in methods
            method = methods[node.name]
            assert ast.unparse(node.args) == ast.unparse(method.args)
            assert node.returns is None or ast.unparse(node.returns) == ast.unparse(method.returns)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests|docs|recipes|benchmarks|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"
    parts = "|".join(folder.name for folder in PACKAGE.iterdir() if folder.is_dir())
    for name in re.findall(rf"`((?:{parts})/[\w./-]+)`", text):
        assert (PACKAGE / name).exists(), f"{page.name} names {name}, which is not there"


def test_the_picture_of_the_idea_is_the_one_we_draw(tmp_path: Path) -> None:
    write_idea(tmp_path / "idea.svg")
    assert (tmp_path / "idea.svg").read_bytes() == (ROOT / "docs" / "idea.svg").read_bytes()


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == midskip.__version__ and citation["cff-version"] == "1.2.0"
    assert f"## [{midskip.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
