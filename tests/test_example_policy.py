"""An outside author's policy: by import path or installed, with its recipe, its share held and its contract kept."""

import tomllib
from pathlib import Path

import pytest
import torch
from tiny_runs import QUIET, history, write_documents

from midskip.policies import build_policy
from midskip.runs import load_run
from midskip.testing import check_policy
from midskip.train import read_recipe, train

EXAMPLE = Path(__file__).parent.parent / "examples" / "rare_words"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))


@pytest.mark.integration
def test_it_keeps_the_contract() -> None:
    check_policy("rare_words:RareWords", num_layers=4, skipped_kv="drop")


@pytest.mark.usefixtures("no_pictures", "on_the_cpu")
@pytest.mark.integration
def test_its_recipe_trains_and_frequent_tokens_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [
        f"--output={tmp_path / 'run'}", f"--data.source={write_documents(tmp_path / 'text', 200)}",
        "--data.vocab_size=300", "--data.length=64", "--model.hidden_size=16", "--model.intermediate_size=24",
        "--model.num_hidden_layers=4", "--model.num_attention_heads=2", "--training.max_steps=80",
        "--training.per_device_train_batch_size=2", "--training.report_to=[]", "--training.peak_flops=1e12",
        "--training.save_steps=0", "--dense_layers=[]",
    ]  # fmt: skip
    recipe = read_recipe(EXAMPLE / "recipe.yaml", small)
    report = train(recipe, console=QUIET)
    assert sum(row["executed_share"] for row in history(recipe)[-20:]) / 20 == pytest.approx(0.5, abs=0.05)
    assert report["validation"]["executed_share"] == pytest.approx(0.5, abs=0.08)
    with pytest.raises(ValueError, match="--trust rare_words"):
        load_run(tmp_path / "run")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    installed = tmp_path / "site" / f"{project['name']}-{project['version']}.dist-info"
    installed.mkdir(parents=True)
    (group, offers), *_ = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {path}" for name, path in offers.items())]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    (installed / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert type(build_policy("rare_words", 4, 8, 0.02, {})).__name__ == "RareWords"
    model, _ = load_run(tmp_path / "run")
    policy = model.model.policy
    ids_1T = policy.seen[:300].argsort(descending=True)[None, ::5]  # the most frequent first
    with torch.no_grad():
        ran_T = model(ids_1T).executed[1, 0]
    assert not ran_T[:2].any() and ran_T[-2:].all()
