"""`midskip frontier`: its table, its pictures, and arms with hostile names."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tiny_frontier import point, write_sweep

from midskip.cli import main

pytestmark = pytest.mark.integration

LOSSES, DENSE = (
    [2.7, 2.71, 2.72],
    {"dense": [point([3.0] * 3, 1e6, True, trials=1), point([2.6] * 3, 4e6, True, trials=1)]},
)
HOSTILE = [
    "[bold]x[/bold] [/]",
    "<script>alert(1)</script> ]]>--",
    "\x1b[2J\x1b]0;owned\x07 $\\frac{$",
    "_" * 5000,
    "深さ",
]


def size_of_png(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_it_writes_numbers_and_pictures_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = DENSE | {"gated": [point(LOSSES, 2e6, trials=3), point([2.6, None], 2e6), point(LOSSES, 9e6)]}
    folder = write_sweep(tmp_path / "sweep", arms)
    assert main(["frontier", str(folder), "--output", str(tmp_path / "out")]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("gated"))
    shown = [[cell for cell in line.split("  ") if cell] for line in lines[first : first + 6]]
    shown = [[cell.strip() for cell in cells] for cells in shown]
    assert shown == [
        ["gated", "2 M", "50%", "2.7100", "-0.0900", "-26.8 %", "better"],
        ["size=0", "2.7000 2.7100 2.7200", "-0.1069 to -0.0731", "tuned with 3 trials, dense with 1"],
        ["gated", "2 M", "50%", "2.6000", "-0.2000", "-50.0 %", "not enough seeds (1 of 3)"],
        ["size=1", "2.6000 - -", "tuned with an unknown number of trials, dense with 1"],
        ["gated", "9 M", "50%", "2.7100", "outside the dense range"],
        ["size=2", "2.7000 2.7100 2.7200", "tuned with an unknown number of trials, dense with 1"],
    ], "the verdict and what is unequal stand together"
    assert any(line.startswith("1 of 14 results are missing: gated (model.size=1), seed 1.") for line in lines)
    saved = json.loads((tmp_path / "out" / "frontier.json").read_text(encoding="utf-8"))
    assert saved["points"][2]["against_dense"]["flops"]["verdict"] == "better"
    assert size_of_png(tmp_path / "out" / "frontier.png")[0] >= 1200
    assert (tmp_path / "out" / "frontier.svg").is_file() and not (folder / "frontier.json").exists()


def test_it_holds_models_to_one_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path, DENSE | {"gated": [point(LOSSES, 2e6, trials=1)]})
    assert main(["frontier", str(folder), "--against", "gated"]) == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.split("\n")]
    assert ["arm", "loss, nats", "from gated, nats"] in lines
    first = lines.index(["dense", "1 M", "100%", "3.0000", "+0.2900", "-50.0 %", "higher loss"])
    assert lines[first + 1] == ["size=0", "3.0000 3.0000 3.0000", "+0.2731 to +0.3069"]
    written = (folder / "frontier.md").read_text(encoding="utf-8")
    assert "| from gated, nats, 90% interval | relative cost |" in written
    assert main(["frontier", str(folder), "--against", "other"]) != 0
    assert "expected one of 'dense', 'gated'" in capsys.readouterr().err
    file = folder / "sweep.json"
    assert main(["frontier", str(folder), "--output", str(file)]) == 2
    assert f"--output is {str(file)!r}, which is a file; expected a folder" in capsys.readouterr().err
    assert main(["frontier", str(folder), "--save", str(folder / "no" / "one.json")]) == 2
    assert "for --save: make it first" in capsys.readouterr().err


def test_one_file_stands_for_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "sweep", DENSE | {"a|b": [point(LOSSES, 2e6), point([2.6, None], 2e6)]})
    failed = folder / "failed" / "run-1-1-1.txt"
    failed.parent.mkdir()
    failed.write_text("no memory", encoding="utf-8")
    sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    sweep["arms"][0]["points"][0]["tuning"] = [{"learning_rate": 1.0, "seed": 0, "key": "a-trial"}]
    (folder / "sweep.json").write_text(json.dumps(sweep), encoding="utf-8")
    trial = (folder / "results" / "run-0-0-0.json").read_text(encoding="utf-8")
    (folder / "results" / "a-trial.json").write_text(trial, encoding="utf-8")
    file = tmp_path / "saved.json"
    assert main(["frontier", str(folder), "--save", str(file)]) == 0
    (tmp_path / "alone").mkdir()
    file = file.rename(tmp_path / "alone" / "saved.json")
    assert main(["frontier", str(file)]) == 0, "pictures and numbers lie beside it"
    told = capsys.readouterr().out
    for name in ("frontier.json", "frontier.md"):
        assert (file.parent / name).read_bytes() == (folder / name).read_bytes()
    assert told[: len(told) // 2] == told[len(told) // 2 :]
    lines = (folder / "frontier.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("| a\\|b<br>size=0 | 2 M |") and "| better<br>" in line for line in lines)
    assert json.loads(file.read_text(encoding="utf-8"))["failed"] == {"run-1-1-1": "no memory"}
    assert "a-trial" in json.loads(file.read_text(encoding="utf-8"))["results"]
    file.write_text('{"sweep": {}}', encoding="utf-8")
    assert main(["frontier", str(file)]) == 2
    assert "is no file that `midskip frontier --save` writes" in capsys.readouterr().err


def test_no_name_of_an_arm_becomes_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "sweep", DENSE | {name: [point(LOSSES, 2e6)] for name in HOSTILE})
    assert main(["frontier", str(folder), "--cost", "training_flops"]) == 0
    printed = capsys.readouterr().out
    assert "[bold]x[/bold] [/]" in printed and "深さ" in printed
    assert "\x1b" not in printed and "\x07" not in printed and len(printed) < 10_000
    source = (folder / "frontier.svg").read_text(encoding="utf-8")
    tags = {element.tag.rsplit("}")[-1] for element in ElementTree.fromstring(source).iter()}
    assert "script" not in tags and "<script" not in source and "\x1b" not in source and "_" * 100 not in source
    assert json.loads((folder / "frontier.json").read_text(encoding="utf-8"))["points"][5]["arm"] == HOSTILE[3]


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_sweep(tmp_path / "sweep", DENSE))
    for arguments, words in (
        (
            [folder, "--cost", "kv_bytes"],
            "the dense models have no 'kv_bytes' that can be compared; expected one of: flops",
        ),
        ([folder, "--cost", "joules"], "invalid choice: 'joules'"),
        ([str(tmp_path / "none")], "there is nothing at"),
    ):
        assert main(["frontier", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not Path(folder, "frontier.json").exists()
