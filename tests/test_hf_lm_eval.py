"""`lm_eval` measures a saved folder where nobody imported midskip, to the numbers that the model itself gives."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import midskip
from midskip.budget.calibrate import calibrate
from midskip.data import encode_documents, token_bytes
from midskip.data.batches import TokenWindows
from midskip.evaluate import evaluate
from midskip.model.modeling import MidskipForCausalLM

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "bits_per_byte"}]},
    "generate": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "nothing",
                 "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
                 "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip
TEXTS = [f"Document {i} says that layer {i * 3 % 11} was left out.\n" * (1 + 2 * i) for i in range(5)]
DOCUMENTS = [
    {"question": f"Document {i} says" + " that layer 2" * (i % 3), "choices": ["was", "left", "out of all"],
     "answer": i % 3, "text": text} for i, text in enumerate(TEXTS)
]  # fmt: skip


@pytest.fixture(scope="module")
def samples(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the command wrote about every document, by task."""
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "documents.json").write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.json")}}}
    for name, task in TASKS.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | source | task))
    path = os.pathsep.join([str(Path(midskip.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    place = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PYTHONPATH": path}
    line = re.findall(r"^lm_eval .*$", PAGE, re.MULTILINE)[0].replace("runs/mine", str(saved_model))
    command = [sys.executable, "-m", *shlex.split(line)]
    command[-1] = ",".join(TASKS)
    command += ["--include_path", str(folder), "--batch_size", "3", "--device", "cpu"]
    command += ["--output_path", str(folder / "found"), "--log_samples"]
    done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for name in TASKS:
        (file,) = (folder / "found").rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(found[name]) == len(DOCUMENTS)
    return found


@pytest.fixture(scope="module")
def ours(saved_model: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(saved_model), AutoTokenizer.from_pretrained(saved_model)


def log_likelihood(model: Any, ids: list[int], num_given: int) -> float:
    """Of the ids after the first `num_given`."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids[:-1]])).logits[0]
    return -F.cross_entropy(logits_TV[num_given - 1 :], torch.tensor(ids[num_given:]), reduction="sum").item()


def test_log_likelihoods_are_ours(samples: dict[str, list[dict[str, Any]]], ours: tuple[Any, Any]) -> None:
    model, tokenizer = ours
    for sample in samples["choice"]:
        for number, [[found, _]] in enumerate(sample["resps"]):
            given, rest = (sample["arguments"][f"gen_args_{number}"][f"arg_{part}"] for part in (0, 1))
            expected = log_likelihood(model, tokenizer(given + rest)["input_ids"], len(tokenizer(given)["input_ids"]))
            assert float(found) == pytest.approx(expected, rel=1e-5)


def test_rolling_log_likelihoods_are_what_evaluate_measures(
    samples: dict[str, list[dict[str, Any]]], ours: tuple[Any, Any]
) -> None:
    model, tokenizer = ours
    limit = model.config.max_position_embeddings
    lengths = []
    for sample, text in zip(samples["rolling"], TEXTS, strict=True):
        ids = encode_documents(tokenizer, [text])
        windows = TokenWindows(ids, limit, drop_last=False, end_of_text=tokenizer.eos_token_id)
        lengths.append(len(ids))
        if len(ids) <= limit:
            measured = evaluate(model, windows, token_bytes(tokenizer), batch_size=2)
            nats = measured["loss"] * measured["num_targets"]
        else:  # the last window of lm_eval is as long as the others and overlaps with the one before
            nats = -log_likelihood(model, ids[: limit + 1].tolist(), 1)
            nats -= log_likelihood(model, ids[-limit - 1 :].tolist(), 2 * limit + 2 - len(ids))
        assert float(sample["resps"][0][0]) == pytest.approx(-nats, rel=1e-5)
    assert lengths[0] < limit < lengths[-1] <= 2 * limit


def test_texts_are_those_of_generate(samples: dict[str, list[dict[str, Any]]], ours: tuple[Any, Any]) -> None:
    model, tokenizer = ours
    for sample in samples["generate"]:
        ids_1T = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"], return_tensors="pt")["input_ids"]
        new_T = model.generate(ids_1T, max_new_tokens=8, do_sample=False)[0, ids_1T.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(new_T, skip_special_tokens=True).split("\n")[0]


def test_tasks_run_under_budgets(saved_model: Path, samples: object, tmp_path: Path) -> None:
    """By the command: each budget, with the share that ran."""
    from midskip.tasks import evaluate_tasks

    (tmp_path / "documents.json").write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.json")}}}
    (tmp_path / "choice.yaml").write_text(
        json.dumps({"task": "choice", "test_split": "test"} | source | TASKS["choice"])
    )
    model = MidskipForCausalLM.from_pretrained(saved_model)
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    calibrate(model, TokenWindows(encode_documents(tokenizer, TEXTS * 8), 32), rule="share")
    rows = evaluate_tasks(model, tokenizer, ["choice"], [None, 1.0], include_path=tmp_path)
    assert [row["budget"] for row in rows] == [None, 1.0] and rows[1]["executed_share"] == 1
    assert rows[0]["executed_share"] < 1 and 0 <= rows[0]["results"]["choice"]["acc,none"] <= 1
    assert model.model.policy.score_scale == 1
