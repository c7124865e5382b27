"""A tour of midskip: train, look, change the budget, have a dense model skip, save."""

# %% [markdown]
# # A tour of midskip
#
# Ten minutes on a CPU, nothing to download. Run it from top to bottom (`python examples/tour.py`), or cell by cell in
# an editor that knows `# %%`, as VS Code, or as a notebook with jupytext. Each cell says what to look at.

# %%
import os
from pathlib import Path

from rich import print as show  # colours

from midskip.budget.calibrate import calibrate, loss_by_budget, save_calibration
from midskip.cost import meter
from midskip.data import TokenWindows, encode_source, read_documents, split_documents
from midskip.evaluate import depth_of_tokens
from midskip.generate import generate
from midskip.report import depth_text, legend
from midskip.retrofit import RetrofitSettings, retrofit
from midskip.runs import load_run
from midskip.train import Recipe, train
from midskip.train.recipe import DataSettings, ModelSettings, RegularizerSettings, TrainingSettings

FOLDER = Path(os.environ.get("TOUR_FOLDER", "runs/tour"))  # all that this tour writes
STEPS = int(os.environ.get("TOUR_STEPS", 300))  # of training; more steps, better text
WIDTH = int(os.environ.get("TOUR_WIDTH", 128))

# %% [markdown]
# ## Text
#
# Python carries 2.4 MB of English: its language reference, and the docstrings of its library. One document in twenty is
# held out: what a model is worth is measured on text that it has not seen.

# %%
if FOLDER.exists():
    raise SystemExit(f"{FOLDER} is of an earlier tour: remove it, or name another as TOUR_FOLDER")
FOLDER.mkdir(parents=True)
for name, documents in zip(("train", "held_out"), split_documents(list(read_documents("pydocs"))), strict=True):
    (FOLDER / f"{name}.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    print(f"{name}: {len(documents)} documents; the first begins {documents[0][:60]!r}")
texts = {name: str(FOLDER / f"{name}.txt") for name in ("train", "held_out")}

# %% [markdown]
# ## Train a model whose tokens skip layers
#
# Eight layers. The gates are hard: a token runs a layer or does not. The regularizer `target_share` moves them until
# half of the block-tokens run (one token in one layer is a block-token). A dense model of eight layers, in which every
# token runs every layer, is trained before it, for the end of the tour.
#
# Look at the table at the end. The gated model has a higher loss than the dense one, for about half of the FLOPs.

# %%
recipe = Recipe(
    output=str(FOLDER / "gated"),
    data=DataSettings(texts["train"], validation=texts["held_out"], length=128),
    model=ModelSettings(hidden_size=WIDTH, intermediate_size=3 * WIDTH, policy_settings={"gates": "hard"}),
    regularizer=RegularizerSettings("target_share", {"target_share": 0.5, "outer": 1, "lowest_share": 0.3}),
    training=TrainingSettings(max_steps=STEPS, gate_learning_rate_scale=0.3, save_steps=0, report_to=[]),
    dense_layers=[8],
)
report = train(recipe)
(dense,) = report["dense"]
for name, found in (("gated", report["validation"]), ("dense", dense)):
    print(f"{name}: {found['loss']:.3f} nats a token, {found['flops_per_token']:,.0f} FLOPs a token")
print("share of tokens that ran each layer:", [round(share, 2) for share in report["validation"]["share_by_layer"]])

# %% [markdown]
# ## Look at its page
#
# Open `page.html` of the run in a browser: held-out text, each token coloured by how many layers it ran. Point at a
# token to see its gates and its loss. `picture.png` has the share of tokens by layer.
#
# Here the same in the terminal, of text that the model writes. Few layers are dark, many are bright. This model decides
# by a hash of a token and the one before it, so the same pair has the same depth wherever it stands.

# %%
print("open", (FOLDER / "gated" / "page.html").resolve())
model, tokenizer = load_run(FOLDER / "gated")
tokens = depth_of_tokens(model, tokenizer, generate(model, tokenizer, "The function returns", max_new_tokens=60))
show(depth_text(tokens, model.config.num_skip_units), legend(model.config.num_skip_units))

# %% [markdown]
# ## Change the budget
#
# A budget is the share of block-tokens that may run, on average over text. It is set at run time, without training.
# First `calibrate` measures, on held-out text, which share runs and which loss that gives. Then `set_budget` goes by
# this curve. (This model was trained for all shares from 0.3 on, by `lowest_share` above; one that was trained for a
# single share gets worse away from it.)
#
# Look at the loss as the budget falls, and at FLOPs: they were counted while the model ran.

# %%
ids = encode_source(tokenizer, texts["held_out"])
windows = TokenWindows(ids, 128)
some = [windows[number] for number in range(0, len(windows), max(1, len(windows) // 64))]
save_calibration(FOLDER / "gated", calibrate(model, some, "held-out text of the tour"))
for row in loss_by_budget(model, some, [1.0, 0.75, 0.5, 0.35]):
    model.set_budget(row["budget"])
    with meter(model) as work:
        model(some[0]["input_ids"][None].to(model.device))
    print(
        f"budget {row['budget']:.2f}: {row['executed_share']:.1%} ran, {row['loss']:.3f} nats a token, "
        f"{work.flops().total:,} FLOPs for one window"
    )

# %% [markdown]
# ## Have a dense model skip
#
# The other way round: a model that was trained without skipping. `retrofit` takes the dense model from above. (A
# pretrained Llama, SmolLM, Mistral or Qwen works too: give its folder or its name on the hub.) Each layer gets a small
# linear map that stands in for it, and a router that says for which tokens. Both are fitted, not trained. With
# `distil_steps` they would then be trained.
#
# Look at the price of each budget: the loss above that of the original. At a budget of 1 it is the original.

# %%
settings = RetrofitSettings(
    model=str(FOLDER / "gated" / "dense-8"), data=texts["train"], validation={"held out": texts["held_out"]},
    output=str(FOLDER / "retrofit"), length=128, fit_tokens=20_000, price_tokens=4_096,
)  # fmt: skip
prices = retrofit(settings)["stages"]["fit"]["prices"]
for row in prices:
    found = row["texts"]["held out"]
    print(f"budget {row['budget']:.2f}: {found['executed_share']:.1%} ran, {found['price']:+.3f} nats")

# %% [markdown]
# ## Save it, load it, serve it
#
# The folder of a retrofit, as that of a run, is a model for `from_pretrained`: weights in safetensors, tokenizer, and
# its model card, `README.md`, with the prices. `push_to_hub` uploads the same card.

# %%
model, tokenizer = load_run(FOLDER / "retrofit")
model.set_budget(0.75)
ids = model.generate(**tokenizer("The function returns", return_tensors="pt").to(model.device), max_new_tokens=30)
print(tokenizer.decode(ids[0]))
model.save_pretrained(FOLDER / "mine")
tokenizer.save_pretrained(FOLDER / "mine")
print("model card:", FOLDER / "retrofit" / "README.md")
# midskip serve runs/tour/retrofit
# midskip generate runs/tour/retrofit --prompt "The function returns" --budget 0.75
