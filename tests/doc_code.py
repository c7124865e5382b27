"""Runs the fenced blocks of a page of the documents, from its top to its bottom, as its reader would."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from midskip.cli import main
from midskip.plugins import GROUPS
from midskip.sweep import read_sweep

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "midskip"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
# what other tests run: all of a page, or lines that begin so
ELSEWHERE = {"lm_eval": "test_hf_lm_eval.py", "midskip app": "test_app_browser.py", "serving.md": "test_serving.py"}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
SHORT = {"max_steps": 2, "per_device_train_batch_size": 2, "peak_flops": 1e12, "report_to": []}
TINY = {  # what is added to a command, so that it takes a moment
    "train": [
        "--data.vocab_size=300", "--data.length=128", "--training.max_steps=2",
        "--training.per_device_train_batch_size=2", "--training.peak_flops=1e12",
        *(f"--model.{name}={size}" for name, size in (SMALL | {"num_attention_heads": 4}).items()),
    ],
    "bench": ["--shape", "tiny", "--gates", "fractional", "--shares", "0.5"],
    "bench --run": ["--tasks", "prefill", "--prompt_tokens", "16"],
    "retrofit": ["--fit_tokens", "512", "--price_tokens", "2048"],
    "generate": ["--max_new_tokens", "12"],
    "sweep": ["--list"],
}  # fmt: skip
TIMED = ["--dtypes", "float32", "--repeats", "2", "--batch_sizes", "1"]


@dataclass
class Block:
    """A fenced block: where its text begins, in which language, and the text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Those of a page. Commands of ours in an indented block would be seen by nothing, and are refused."""
    found: list[Block] = []
    opened: Block | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence := re.match(r" *(```+|~~~+) *(\S*)", line):
            if opened is None:
                opened = Block(page, number + 1, fence[2], "")
            else:
                found.append(opened)
                opened = None
        elif opened is not None:
            opened.text += line + "\n"
        else:
            assert not re.match(r" {4,}(midskip|python|pip|make) ", line), f"{page.name}, line {number}: fence it"
    assert opened is None, f"{opened}: the block does not end"
    return found


def module_of(page: Path, file: str) -> str:
    """The block of a page that is a file of that name."""
    (text,) = (block.text for block in blocks_of(page) if block.text.startswith(f"# {file}\n"))
    return text


@dataclass
class Reader:
    """Who runs a page's blocks, in the current folder.

    Attributes:
        names: of Python, over the whole page.
        printed: what each command of ours printed.
        ran: blocks and lines that were run here; elsewhere: those that another test runs.
    """

    capsys: Any
    names: dict[str, Any] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def read(self, page: Path) -> None:
        for block in blocks_of(page):
            run = getattr(self, f"_{block.language or 'nothing'}", None)
            assert run, f"{block}: nothing runs {block.language or 'a block without a language'}"
            run(block)
            self.ran.append(str(block))

    def _python(self, block: Block) -> None:
        if name := re.match(r"# (\w+\.py)\n", block.text):
            Path(name[1]).write_text(block.text, encoding="utf-8")
            importlib.invalidate_caches()
            importlib.import_module(name[1].removesuffix(".py"))
        elif stubs := stubs_in(block.text):
            for shown in stubs:
                check_signatures(shown, str(block))
        else:
            exec(compile("\n" * (block.line - 1) + block.text, block.page.name, "exec"), self.names)

    def _sh(self, block: Block) -> None:
        for line in filter(None, (line.partition("  #")[0].strip() for line in block.text.splitlines())):
            if known := next((start for start in ELSEWHERE if line.startswith(start)), None):
                self.elsewhere.append(known)
                continue
            program, *arguments = shlex.split(line)
            run = getattr(self, f"_sh_{program}", None)
            assert run, f"{block}: nothing runs {line!r}"
            run(arguments, f"{block}: {line}")

    def _sh_midskip(self, arguments: list[str], line: str) -> None:
        command, *rest = arguments
        kind = "bench --run" if command == "bench" and "--run" in rest else command
        self.capsys.readouterr()
        status = main([command, *rest, *TINY.get(kind, []), *(TIMED if command == "bench" else [])])
        captured = self.capsys.readouterr()
        assert status == 0, f"{line}: {captured.err}"
        self.printed.setdefault(command, captured.out)

    def _sh_make(self, arguments: list[str], line: str) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), line

    def _sh_pip(self, arguments: list[str], line: str) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        command, *packages = arguments
        found = [re.fullmatch(r"\.(?:\[([\w,]+)\])?", package) for package in packages[1:]]
        assert [command, packages[0]] == ["install", "-e"] and all(found), line
        extras = {extra for package in found if package and package[1] for extra in package[1].split(",")}
        assert extras <= project["optional-dependencies"].keys(), line

    def _yaml(self, block: Block) -> None:
        values = yaml.safe_load(block.text)
        if "arms" in values:
            Path("SWEEP.yaml").write_text(block.text, encoding="utf-8")
            self.names["sweep"] = read_sweep("SWEEP.yaml")
            return
        for name, tiny in (("model", SMALL), ("training", SHORT)):  # else a part of a recipe
            values[name] = tiny | values.get(name, {})
        output = values.setdefault("output", f"runs/line-{block.line}")
        Path("recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        assert main(["train", "recipe.yaml"]) == 0, f"{block}: {self.capsys.readouterr().err}"
        self.names["report"] = json.loads(Path(output, "report.json").read_text())

    def _toml(self, block: Block) -> None:
        for group, entries in tomllib.loads(block.text)["project"]["entry-points"].items():
            assert group in GROUPS.values(), f"{block}: {group}"
            for path in entries.values():
                module, _, name = path.partition(":")
                assert hasattr(importlib.import_module(module), name), f"{block}: {path}"

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    def _text(self, block: Block) -> None:
        """What is printed: not run."""


def stubs_in(text: str) -> list[ast.ClassDef]:
    """The classes of a block that shows nothing but signatures."""
    tree = ast.parse(text)
    nodes, bodies = tree.body, [node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    empty = all(ast.unparse(body) == "..." for body in bodies)
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    return classes if bodies and empty and len(classes) == len(nodes) else []


def check_signatures(shown: ast.ClassDef, where: str) -> None:
    """They are those of the class of that name in the package."""
    (real,) = (node for node in package_nodes() if isinstance(node, ast.ClassDef) and node.name == shown.name)
    methods = {node.name: node for node in real.body if isinstance(node, ast.FunctionDef)}
    fields = [ast.unparse(node) for node in real.body if isinstance(node, ast.AnnAssign)]
    for node in shown.body:
        if isinstance(node, ast.AnnAssign):
            assert ast.unparse(node) in fields, where
        else:
            assert isinstance(node, ast.FunctionDef) and node.name in methods, where
            method = methods[node.name]
            assert ast.unparse(node.args) == ast.unparse(method.args), f"{where}: {shown.name}.{node.name}"
            assert node.returns is None or ast.unparse(node.returns) == ast.unparse(method.returns), where


def package_nodes() -> Iterator[ast.stmt]:
    for file in PACKAGE.rglob("*.py"):
        yield from ast.parse(file.read_text(encoding="utf-8")).body
