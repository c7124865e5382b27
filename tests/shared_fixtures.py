"""What the tests share: seeds, tiny models, gates set to what a test needs, and tiny runs."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from killing import Program
from sample_text import DOCUMENTS, sample_documents
from tiny_curve import CURVE
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.policies.middle_out import MiddleOut

if TYPE_CHECKING:
    from midskip.train import Recipe
    from midskip.train.trainer import MidskipTrainer

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and so do those that tests start

TINY: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> None:
    gc.freeze()  # the Trainer collects garbage as it starts, and need not look through all that is imported


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> Iterator[None]:
    torch.manual_seed(0)
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)  # which commands change


@pytest.fixture(scope="session")
def killer() -> Iterator[Program]:
    """The program whose processes are killed."""
    program = Program()
    yield program
    program.end()


@pytest.fixture
def tiny() -> Callable[..., MidskipConfig]:
    """tiny(**changes): the configuration of a model small enough to test with."""
    return lambda **changes: MidskipConfig(**(TINY | changes))


@pytest.fixture
def make_model() -> Callable[..., MidskipForCausalLM]:
    """make_model(gates="mixed", dtype=float64, **changes): a tiny model in training mode; see `set_gates`."""

    def make(gates: str | None = "mixed", dtype: torch.dtype = torch.float64, **changes: Any) -> MidskipForCausalLM:
        torch.manual_seed(changes.pop("seed", 0))
        model = MidskipForCausalLM(MidskipConfig(**(TINY | changes))).to(dtype)
        if gates is not None and isinstance(model.model.policy, MiddleOut):
            set_gates(model.model.policy, gates, scale=1.5 if model.config.norms == "sandwich" else 5.0)
        return model.train()

    return make


@torch.no_grad()
def set_gates(policy: MiddleOut, gates: str, scale: float) -> None:
    """Give `middle_out` weights, of scores as large as `scale` times the hidden states, with which the gates are

    - "kept": all exactly 1;
    - "open": all between 0 and 1;
    - "mixed": some exactly 1, some exactly 0, some between;
    - "one": depth scores of exactly 1 at the last gate, the sum of equal parts (of powers of 2);
    - "late": mixed in layer 0 and 0 in all others;
    - "gone": all exactly 0.

    Hard gates know "kept", "mixed", "late" and "gone".
    """
    count, width = policy.num_gates, policy.width
    if policy.is_hard:
        if policy.weight is not None:
            policy.weight.normal_()
        elif policy.difficulty is not None:
            policy.difficulty.seen[:, 0].normal_(std=60)
            policy.difficulty.seen[:, 1].fill_(20)
        policy.bias.fill_({"kept": -30.0, "mixed": -1.0 - math.log(count), "late": 30.0, "gone": 30.0}[gates])
        if gates == "late":
            policy.bias[0] = 0
        return
    policy.weight.zero_()
    if gates == "kept":
        policy.bias.fill_(-1)
    elif gates == "open":
        policy.weight.normal_(std=0.01)
        policy.bias.fill_(0.5 / count)
    elif gates == "mixed":
        policy.weight.normal_(std=scale * width**-0.5)
        policy.bias.zero_()
    elif gates == "one":
        parts = [0.5**gate for gate in range(1, count)]
        policy.bias.copy_(torch.tensor([*parts, 1 - sum(parts)]))
    elif gates == "late":
        policy.weight[0].normal_(std=scale * width**-0.5)
        policy.bias.fill_(2)
        policy.bias[0] = 0
    elif gates == "gone":
        policy.bias.fill_(2)
    else:
        raise ValueError(gates)


@pytest.fixture
def ragged() -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [7, 9]: all, pads left, right, on both sides, one token, none, a hole."""
    mask_BT = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 1, 1, 1, 1],
        ]
    )
    return torch.randint(TINY["vocab_size"], mask_BT.shape), mask_BT


@pytest.fixture
def windows() -> list[dict[str, Tensor]]:
    """48 windows of 48 tokens that are easy to predict in part: 9 blocks of 256."""
    ids_BT = torch.randint(31, (48, 48), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids_T, "labels": ids_T.clone()} for ids_T in ids_BT]


@pytest.fixture
def calibrated(make_model: Callable[..., MidskipForCausalLM]) -> MidskipForCausalLM:
    """In evaluation mode, with gates that are 0, 1 and between, and `CURVE`, with blocks too long to judge."""
    model = make_model("mixed").eval()
    model.config.calibration = CURVE | {"block_tokens": 10**6}
    return model


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory, learnt: PreTrainedTokenizerFast) -> Path:
    """A folder of a tiny model with hard gates, of which some are closed, and of the tokenizer of the sample text."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    ids = {"vocab_size": len(learnt), "eos_token_id": learnt.eos_token_id}
    model = MidskipForCausalLM(MidskipConfig(**(TINY | ids), policy_settings={"gates": "hard"}))
    set_gates(model.model.policy, "mixed", scale=1.0)
    model.save_pretrained(folder)
    learnt.save_pretrained(folder)
    return folder


# ---- runs; what they need is imported when they are asked for, since the Trainer takes seconds


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `midskip prepare` makes of 30 documents; in windows of 16 tokens, 43 to train on."""
    from tiny_runs import QUIET, write_documents

    from midskip.data import prepare

    folder = tmp_path_factory.mktemp("prepared")
    text = write_documents(folder / "text")
    prepare(str(text), folder / "shards", vocab_size=300, validation_share=0.2, console=QUIET)
    return folder / "shards"


@pytest.fixture(scope="session")
def pydocs_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the corpus `pydocs` is kept, which takes seconds to build, for as long as the tests run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_recipe(prepared: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """make_recipe("target_share", {"target_share": 0.5}, model={...}, **training): a run of a tiny model into "run"."""
    from tiny_runs import tiny_recipe

    def make(*args: Any, output: str = "run", source: Path = prepared, **more: Any) -> Recipe:
        return tiny_recipe(source, tmp_path / output, *args, **more)

    return make


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There bits are promised."""
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: False)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are slow to draw; for tests of something else."""
    monkeypatch.setattr("midskip.train.report.write_picture", lambda *args, **kwargs: None)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[MidskipTrainer]:
    """The trainers that `train` makes, in order."""
    from midskip.train.trainer import MidskipTrainer

    made: list[MidskipTrainer] = []

    class Seen(MidskipTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("midskip.train.run.MidskipTrainer", Seen)
    return made


@pytest.fixture(scope="session")
def learnt() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the sample text."""
    from midskip.data import train_tokenizer

    return train_tokenizer(sample_documents(), 320)


@pytest.fixture(params=["bpe", "bytes"])
def lossless(request: pytest.FixtureRequest, learnt: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that loses nothing of any text, of either kind."""
    from midskip.data import bytes_tokenizer

    return learnt if request.param == "bpe" else bytes_tokenizer()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `DOCUMENTS`; files that want another have their own."""
    from midskip.data import train_tokenizer

    return train_tokenizer(DOCUMENTS, 290)


@pytest.fixture
def model(make_model: Callable[..., MidskipForCausalLM], tokenizer: PreTrainedTokenizerFast) -> MidskipForCausalLM:
    """A tiny model for `tokenizer`, float32 and in evaluation mode, whose gates are 0, 1 and between."""
    return make_model("mixed", torch.float32, vocab_size=len(tokenizer)).eval()


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    """A folder of a tiny model of SmolLM2's kind, as transformers writes it."""
    from tiny_pretrained import CONFIGS, build

    build(CONFIGS["smollm2"]).save_pretrained(tmp_path / "smollm2")
    return tmp_path / "smollm2"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was uploaded, by file name, as text; `hub["card"]`, if set, is a card that the repository has already."""
    seen: dict[str, Any] = {"card": None, "files": {}}

    def create_commit(self: HfApi, repo_id: str, operations: list[CommitOperationAdd], **others: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                seen["files"][operation.path_in_repo] = file.read()
        return "the commit"

    def load(repo_id: str, **others: Any) -> ModelCard:
        if seen["card"] is None:
            raise EntryNotFoundError("no card")
        return ModelCard(seen["card"])

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **others: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", load)
    return seen
