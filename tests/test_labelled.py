"""Training on data that is no text: a class that a recipe names, from its items to the run folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import stop_at_step
from tiny_runs import QUIET, Stop, assert_same_weights, differences, history, tiny_recipe, weights
from torch import Tensor
from torch.utils.data import TensorDataset

from midskip import MidskipForCausalLM
from midskip.cli import main
from midskip.data import LabelledData, WindowOrder
from midskip.data.labelled import is_labelled
from midskip.data.pointers import Pointers
from midskip.evaluate import evaluate
from midskip.regularizers.target_share import TargetShare
from midskip.runs import load_run
from midskip.train import Recipe, train
from midskip.train.recipe import DataSettings
from midskip.train.trainer import MidskipTrainer

SETTINGS = {"length": 17, "num_training": 20, "num_validation": 6}
pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")


def recipe_of(tmp_path: Path, output: str = "run", source: str = "pointers", **more: Any) -> Recipe:
    data = {"length": 20, "settings": SETTINGS} | more.pop("data", {})
    model = {"policy_settings": {"start": "spread"}, "norms": "pre", "skipped_kv": "keep"} | more.pop("model", {})
    return tiny_recipe(
        source, tmp_path / output, "target_share", {"target_share": 0.5, "ramp_steps": 8}, model=model, data=data,
        **({"max_steps": 6, "save_steps": 2, "eval_steps": 2} | more),
    )  # fmt: skip


@pytest.mark.integration
def test_a_run_on_pointers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, dense_layers=[1])
    folder = Path(recipe.output)
    report = train(recipe, console=QUIET)
    found = report["validation"]
    assert report["labelled"] and report["text"] == "pointers" and "bits_per_byte" not in found
    assert found["num_targets"] == 6 * 16 == sum(found["num_targets_by_group"])
    assert [row["num_hidden_layers"] for row in report["dense"]] == [1]
    model = MidskipForCausalLM.from_pretrained(folder)
    assert found == evaluate(model, [Pointers(**SETTINGS).validation[i] for i in range(6)], batch_size=2)
    assert len(found["blocks_by_group"]) == len(found["accuracy_by_group"]) >= 4
    for place in (folder, folder / "best"):
        assert (place / "model.safetensors").is_file() and not list(place.glob("tokenizer*"))
    assert "held-out item 1" in (folder / "page.html").read_text(encoding="utf-8")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "held-out items of pointers: 96 predictions" in card and "okenizer(" not in card
    assert train(recipe, resume=True, console=QUIET) == report, "it is finished"

    assert main(["evaluate", str(folder), "--batch_size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "held-out items of the run", **found}
    for command in (["calibrate", str(folder)], ["generate", str(folder), "--prompt", "a"]):
        assert main(command) == 2
        assert "is on labelled data and has no tokenizer, which text needs" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--data", "text.txt"]) == 2
    assert "--data names text: leave it out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"on labelled data .* load the model alone with MidskipForCausalLM"):
        load_run(folder)


@pytest.mark.integration
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, whole = recipe_of(tmp_path, "broken/run"), recipe_of(tmp_path, "whole/run")
    with monkeypatch.context() as patch:
        stop_at_step(patch, TargetShare, 4)
        with pytest.raises(Stop):
            train(broken, console=QUIET)
    train(broken, resume=True, console=QUIET)
    train(whole, console=QUIET)
    assert differences(Path(broken.output), Path(whole.output)) == []


def test_the_model_is_given_the_items_in_the_order_of_windows_without_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    compute_loss = MidskipTrainer.compute_loss

    def noted(self: MidskipTrainer, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs)
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MidskipTrainer, "compute_loss", noted)
    recipe = recipe_of(tmp_path, save_steps=0, eval_steps=0)
    train(recipe, console=QUIET)
    items = Pointers(**SETTINGS).training
    expected = [items[number] for number in WindowOrder(20, 12, recipe.training.seed)]
    assert [set(batch) for batch in seen] == [{"input_ids", "labels"}] * 6
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([batch[name] for batch in seen]), torch.stack([item[name] for item in expected]))

    first = seen.copy()
    for seed, data_seed in ((1, 0), (0, 1)):
        seen.clear()
        other = recipe_of(tmp_path, f"{seed}-{data_seed}", seed=seed, data_seed=data_seed, save_steps=0, eval_steps=0)
        train(other, console=QUIET)
        same_order = all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, seen, strict=True))
        assert same_order == (data_seed == 0)
        assert history(other)[0] != history(recipe)[0]
    with pytest.raises(AssertionError):
        assert_same_weights(weights(recipe), weights(other))


class Uneven(LabelledData):
    """Items with as many pads on the left as their number says, and labels for all else."""

    def __init__(self) -> None:
        self.vocab_size, self.length = 5, 8
        column_T = torch.arange(8)
        valid_NT = [column_T >= number for number in range(8)]
        items = [
            {"input_ids": column_T % 5, "labels": torch.where(valid_T, 3, -100), "attention_mask": valid_T.long()}
            for valid_T in valid_NT
        ]
        self.training, self.validation = items, items


@pytest.mark.parametrize("policy", ["middle_out", "early_exit"])
def test_a_label_counts_the_same_however_a_batch_is_cut(tmp_path: Path, policy: str) -> None:
    rows, model = [], {"policy": policy, "policy_settings": {}}
    for size, passes in ((8, 1), (4, 2), (1, 8)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes, "max_steps": 1}
        recipe = recipe_of(
            tmp_path, f"{passes}", f"{__name__}:Uneven", data={"settings": {}}, eval_steps=0, model=model, **more
        )
        train(recipe, console=QUIET)
        rows += history(recipe)
    for row in rows[1:]:
        for name in ("cross_entropy", "auxiliary", "gradient_norm"):
            assert row[name] == pytest.approx(rows[0][name], rel=1e-5)
    assert (rows[0]["auxiliary"] > 0) == (policy == "early_exit")


# ---- what is refused


class OddItems:
    """Items that are whole, until a test changes them."""

    change: Callable[[dict[str, Tensor]], Any] = staticmethod(lambda item: None)

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"input_ids": torch.arange(8) % 5, "labels": torch.full((8,), index % 5)}
        self.change(item)
        return item


class Odd(LabelledData):
    def __init__(self, num_items: int = 20, num_ids: int = 5):
        self.vocab_size, self.length = num_ids, 8
        self.training, self.validation = OddItems(num_items), OddItems(num_items)


class Endless(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.training = (item for item in ())  # pyright: ignore[reportAttributeAccessIssue]


class Pairs(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.training = TensorDataset(torch.zeros(9, 8).long(), torch.zeros(9, 8).long())  # pyright: ignore[reportAttributeAccessIssue]


ODD = {"data": {"length": 8, "settings": {}}}


def refused(recipe: Recipe, message: str, trainers: list[MidskipTrainer], **more: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train(recipe, console=QUIET, **more)
    assert "\n" not in str(error.value) and trainers == []


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        (
            "pointers",
            {"settings": {"num_chain": 4}},
            r"got \{'num_chain': 4\}: .*; its settings are: num_chains, num_hops",
        ),
        ("pointers", {"settings": {"num_chains": 0}}, "num_chains of pointers is 0"),
        ("pointers", {"length": 16}, "has 17 columns, and data.length is 16. Expected 17 or more"),
        ("pointers", {"vocab_size": 300}, "there is data.vocab_size, a setting of text"),
        ("pointers", {"settings": SETTINGS | {"num_training": 1}}, "There are 1 items to train on. Expected 2 or more"),
        ("no_such_module:Data", {}, "labelled data 'no_such_module:Data' cannot be loaded"),
        ("collections:Counter", {}, "expected a subclass of midskip.data.labelled.LabelledData"),
        (
            "test_labelled:Odd",
            {"settings": {"num_items": 0}},
            "has training 0. Expected 1 or more items",
        ),
        (
            "test_labelled:Odd",
            {"settings": {"num_ids": "5"}},
            r"has vocab_size '5'. Expected a whole number \(int\), 1",
        ),
        (
            "test_labelled:Endless",
            {"settings": {}},
            "has as training a generator, which has no length. Expected a map-style Dataset",
        ),
        (
            "test_labelled:Pairs",
            ODD["data"],
            "training item 0 of Pairs is a tuple. Expected a dict with input_ids and labels",
        ),
        (
            "test_labelled:Odd",
            {"settings": {"num_ids": 4}},
            "training item 0 of Odd has 4 among its input_ids. Expected 0",
        ),
        (
            "some.txt",
            {"settings": {"num_items": 0}},
            "'some.txt', text, and data.settings are {'num_items': 0}. Expected",
        ),
    ],
)
def test_settings_that_do_not_fit(
    tmp_path: Path, trainers: list[MidskipTrainer], source: str, data: dict[str, Any], message: str
) -> None:
    refused(recipe_of(tmp_path, source=source, data=data), message, trainers)
    assert not Path(tmp_path, "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.pop("labels"), r"item 0 of Odd has as labels NoneType. Expected a tensor, int64 \[8\]"),
        (lambda item: item.update(group=torch.zeros(8)), r"has as group torch.float32 \[8\]. Expected a tensor, int64"),
        (lambda item: item.update(labels=torch.zeros(7).long()), r"has as labels torch.int64 \[7\]"),
        (lambda item: item["labels"].fill_(-1), "has -1 among its labels. Expected 0 to 4, or -100"),
        (lambda item: item.update(group=torch.full((8,), 1024)), "1024 among its group. Expected -1 to 1023"),
        (lambda item: item.update(hop=torch.zeros(8)), "has hop. Expected input_ids, labels, group"),
        (lambda item: item["labels"].copy_(torch.randint(5, (8,))), "item 0 of Odd is another each time"),
        (lambda item: item["labels"][1:].fill_(-100), "The training items of Odd have no labels but -100"),
        (
            lambda item: item["labels"][0] % 2 and item.update(group=torch.zeros(8).long()),
            "validation item 1 of Odd has group, input_ids, labels, and one before it input_ids, labels. Expected",
        ),
    ],
)
def test_items_that_are_not_whole(
    tmp_path: Path, trainers: list[MidskipTrainer], monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.setattr(OddItems, "change", staticmethod(change))
    refused(recipe_of(tmp_path, source="test_labelled:Odd", **ODD), message, trainers)


def test_other_items_are_noticed_when_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, source="test_labelled:Odd", **ODD)
    with monkeypatch.context() as patch:
        stop_at_step(patch, TargetShare, 4)
        with pytest.raises(Stop):
            train(recipe, console=QUIET)
    monkeypatch.setattr(OddItems, "change", staticmethod(lambda item: item["labels"][3:].fill_(-100)))
    with pytest.raises(
        ValueError, match=r"did not begin like that \(other training data: item 0, item 1, item 2, \.\.\.;"
    ):
        train(recipe, resume=True, console=QUIET)
    train(recipe, resume=True, accept_changes=True, console=QUIET)


def test_which_sources_are_labelled() -> None:
    assert all(map(is_labelled, ("pointers", "my_data:Recall", "package.module:Class")))
    text = (
        "pydocs",
        "hub:squad",
        "hub:a/b:c",
        "./pointers",
        "folder/my:file",
        "shards_*.bin",
        "a,b",
        DataSettings().source,
    )
    assert not any(map(is_labelled, text))
