"""The recipes that come with midskip: each is valid and runs, here in small; the paper's have the paper's numbers."""

import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import QUIET, history

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.data import ShardWriter, bytes_tokenizer, encode_documents
from midskip.demo import demo_recipe
from midskip.policies import build_policy
from midskip.runs import load_any_run
from midskip.train import Recipe, read_recipe, train
from midskip.train.optimizer import build_optimizer, build_scheduler

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PAPERS = [path for path in RECIPES if path.stem.startswith("paper-")]
GPT2_TOKENS = 50257
SMALL = [
    "--data.length=32", "--model.hidden_size=16", "--model.intermediate_size=24", "--model.num_attention_heads=2",
    "--training.max_steps=2", "--training.per_device_train_batch_size=2",
]  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the recipes name: corpus/, fineweb/ and, as a tokenizer, gpt2/; all of it small."""
    monkeypatch.chdir(tmp_path)
    documents = [f"Article {i}: the cat sat on mat {i % 7}, and the dog saw it {i} times.\n" for i in range(60)]
    Path("corpus").mkdir()
    for name, count in (("wiki-train-0", 60), ("wiki-train-1", 60), ("wiki-valid", 4)):
        text = "<|endoftext|>\n".join(f"In {name}. {document}" for document in documents[:count])
        Path("corpus", f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
    tokenizer = bytes_tokenizer()
    tokenizer.save_pretrained("gpt2")
    Path("fineweb").mkdir()
    for name, count in (("fineweb_train", 60), ("fineweb_val", 4)):
        with ShardWriter(Path("fineweb"), name, GPT2_TOKENS) as writer:
            writer.write(encode_documents(tokenizer, documents[:count]).astype(np.uint16))
    return tmp_path


@pytest.mark.usefixtures("workplace", "no_pictures", "on_the_cpu")
@pytest.mark.parametrize("path", [path for path in RECIPES if not path.stem.endswith("-dense")], ids=lambda p: p.stem)
@pytest.mark.integration
def test_a_recipe_runs_as_it_is_but_for_its_size(path: Path) -> None:
    overrides = [*SMALL, "--training.peak_flops=1e12", "--training.report_to=[]"]
    overrides.append("--training.torch_compile=false")
    given = read_recipe(path)
    if given.data.source == "pydocs":
        overrides.append("--data.source=corpus/wiki-train-0.txt.xz")
    if given.data.source == "pointers":
        overrides.append("--data.settings={length: 32, num_training: 8, num_validation: 4}")
    if given.data.vocab_size is not None:
        overrides.append("--data.vocab_size=300")
    if given.training.gradient_accumulation_steps > 2:
        overrides.append("--training.gradient_accumulation_steps=2")
    recipe = read_recipe(path, overrides)
    report = train(recipe, console=QUIET)
    assert report["training"]["steps"] == 2
    for row in history(recipe):
        assert (
            row["num_tokens"] == 32 * 2 * recipe.training.gradient_accumulation_steps and 3 < row["cross_entropy"] < 8
        )
    model, _ = load_any_run(recipe.output)
    assert model.config.num_hidden_layers == given.model.num_hidden_layers
    assert model.config.policy == given.model.policy
    assert (report["validation"]["executed_share"] == 1) or given.model.policy != "dense"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_how_it_is_run(path: Path) -> None:
    comment = path.read_text(encoding="utf-8").split("output:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"#     midskip train recipes/{path.name}" in comment
    recipe = read_recipe(path)
    assert recipe.output == f"runs/{path.stem}"
    config = recipe.build_config(vocab_size=recipe.data.vocab_size or GPT2_TOKENS)
    policy = build_policy(
        config.policy, config.num_hidden_layers, config.hidden_size, config.initializer_range, config.policy_settings
    )
    recipe.build_regularizer().steer(policy)


@pytest.mark.parametrize("kind", ["pydocs-small", "wiki-tiny", "wiki-small", "pointers"])
def test_twins_differ_in_nothing_but_the_gates(kind: str) -> None:
    gated, dense = (read_recipe(FOLDER / f"{kind}-{which}.yaml") for which in ("gated", "dense"))
    assert gated.data == dense.data and gated.training == dense.training
    skips = {"policy": gated.model.policy, "policy_settings": gated.model.policy_settings}
    assert replace(dense.model, **skips) == gated.model and dense.model.policy == "dense"


def test_the_small_recipe_is_the_demos() -> None:
    recipe = read_recipe(FOLDER / "pydocs-small-gated.yaml")
    demos = demo_recipe(recipe.output)
    training = replace(recipe.training, save_steps=demos.training.save_steps, report_to=demos.training.report_to)
    data = replace(recipe.data, vocab_size=demos.data.vocab_size)  # 2048 is the default
    assert recipe.data.vocab_size == 2048 and replace(recipe, data=data, training=training) == demos


def test_gated_recipes_of_ours_have_hard_gates_and_a_dense_model_beside_them() -> None:
    recipes = [read_recipe(path) for path in RECIPES if path not in PAPERS]
    gated = [recipe for recipe in recipes if recipe.model.policy == "middle_out"]
    assert len(gated) == 5
    for recipe in gated:
        assert recipe.model.policy_settings == {"gates": "hard"} and recipe.regularizer.name == "target_share"
        assert recipe.dense_layers == [recipe.model.num_hidden_layers // 2], "of about as many FLOPs"


# ---- the paper's


def num_parameters(recipe: Recipe) -> int:
    with torch.device("meta"):
        return MidskipForCausalLM(recipe.build_config(GPT2_TOKENS)).num_parameters()


@pytest.mark.parametrize(
    ("num_layers", "millions"), [(2, 96.1), (4, 115.0), (6, 133.8), (8, 152.7), (10, 171.6), (12, 190.5)]
)
def test_the_papers_baselines_have_its_sizes(num_layers: int, millions: float) -> None:
    recipe = read_recipe(FOLDER / "paper-dense.yaml", [f"--model.num_hidden_layers={num_layers}"])
    assert num_parameters(recipe) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.usefixtures("workplace", "no_pictures", "on_the_cpu")
def test_a_paper_baseline_of_two_layers_runs_by_one_setting() -> None:
    overrides = [
        *SMALL,
        "--training.gradient_accumulation_steps=2",
        "--training.report_to=[]",
        "--training.peak_flops=1e12",
    ]
    report = train(read_recipe(FOLDER / "paper-dense.yaml", [*overrides, "--model.num_hidden_layers=2"]), console=QUIET)
    assert report["validation"]["share_by_layer"] == [1, 1] and report["training"]["steps"] == 2


def test_the_papers_gated_model_has_its_shape() -> None:
    path = FOLDER / "paper-12l-gated.yaml"
    recipe = read_recipe(path)
    papers = MidskipConfig(policy_settings={"start": "released"})
    config = recipe.build_config(GPT2_TOKENS)
    assert {**config.to_dict(), **{name: papers.to_dict()[name] for name in ("eos_token_id", "pad_token_id")}} == (
        papers.to_dict()
    )
    for override in ("--regularizer.settings.mean_target_end=0.1", "--model.skipped_kv=keep"):
        assert override in path.read_text(encoding="utf-8")
        changed = read_recipe(path, [override])
        assert changed != recipe
        changed.build_regularizer()


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_papers_optimisation(path: Path) -> None:
    recipe = read_recipe(path)
    training = recipe.training
    tokens_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * recipe.data.length
    assert tokens_per_step == 512 * 1024 and 9.9e9 < tokens_per_step * training.max_steps < 10.5e9
    assert not recipe.data.separate_documents and training.bf16
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.8, 0.95, 1e-10)
    assert training.weight_decay == training.max_grad_norm == 0

    with torch.device("meta"):
        model = MidskipForCausalLM(read_recipe(path, SMALL[:4]).build_config(300))
    rates = rates_of(recipe, model)
    assert [rates(0), rates(1956), rates(19560)] == pytest.approx([1e-4, 1e-3, 0], abs=1e-12)
    assert rates(978) == pytest.approx(5.5e-4, rel=1e-3) and rates(1956 + 8802) == pytest.approx(5e-4, rel=1e-3)


def rates_of(recipe: Recipe, model: MidskipForCausalLM) -> Callable[[int], float]:
    """The learning rate at a step, the same for all parameters."""
    scheduler = build_scheduler(build_optimizer(model, recipe.training), recipe.training)

    def at(step: int) -> float:
        (rate,) = {base * share(step) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)}
        return rate

    return at
