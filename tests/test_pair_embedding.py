"""`benchmarks/pair_embedding.py`: models that are told the pair, and its file."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny_frontier import point, write_sweep

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.frontier import frontier, save_results

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("pair_embedding")


def test_a_model_that_is_told_the_pair_sees_the_token_before_in_its_embedding_alone(script) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = MidskipConfig(vocab_size=16, policy="dense", **shape)
    with script.told_the_pair():
        told = MidskipForCausalLM(config)
    embed = told.model.embed_tokens
    assert type(MidskipForCausalLM(config).model.embed_tokens) is torch.nn.Embedding, "models outside are plain"
    assert embed.pairs.weight.std().item() == pytest.approx(0.02, rel=0.05), "initialized as the embedding of tokens"
    one, other = embed(torch.tensor([3, 5, 7, 5])), embed(torch.tensor([3, 5, 3, 5]))
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)
    torch.testing.assert_close(other[1], other[3], rtol=0, atol=0)
    assert not torch.equal(one[3], other[3]), "7, 5 is another pair than 3, 5"
    assert told(torch.tensor([[3, 5, 7]]), labels=torch.tensor([[3, 5, 7]])).loss.requires_grad


def test_arms_of_another_file_are_put_beside(script, tmp_path: Path) -> None:
    """Their runs may have the same keys, since the recipes are the same."""
    dense = [point([3.0] * 3, 1e6, True), point([2.6] * 3, 4e6, True)]
    saved = []
    for number, arms in enumerate(({"told": dense}, {"gated": [point([2.9, 2.8, None], 2e6)], "plain": dense})):
        save_results(write_sweep(tmp_path / str(number), arms), file := tmp_path / f"{number}.json")
        saved.append(json.loads(file.read_text(encoding="utf-8")))
    assert saved[0]["results"].keys() & saved[1]["results"].keys()
    together = script.beside(script.marked(saved[0]), saved[1], ["gated"])
    (file := tmp_path / "together.json").write_text(json.dumps(together), encoding="utf-8")
    found = frontier(file)
    assert [row["arm"] for row in found["points"]] == ["told", "told", "gated"]
    assert [row["losses"] for row in found["points"][::2]] == [dict.fromkeys("012", 3.0), {"0": 2.9, "1": 2.8}]
    assert [row["seed"] for row in found["missing"]] == ["2"]
    with pytest.raises(ValueError, match=r"no arms \['gaated'\]"):
        script.beside(saved[0], saved[1], ["gaated"])
