"""What retrofits cost, side by side at equal FLOPs, and beside them random skipping with the same maps.

    python benchmarks/retrofit.py OUTPUT.json NAME=FOLDER ... --random NAME --picture OUTPUT.png

Each folder is one that `midskip retrofit` wrote; a NAME that is given several times stands for several seeds. The text
is read again from where the first of the folders under the name of `--random` has it. Between the budgets that were
measured prices are read off straight lines.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from transformers import AutoTokenizer

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.bench.results import machine
from midskip.budget.monitor import temporary_limits
from midskip.card import RETROFIT_FILE
from midskip.evaluate import evaluate
from midskip.report import comparison_table
from midskip.retrofit import RetrofitSettings
from midskip.retrofit.run import Texts
from midskip.runs import to_json

NOT_KEPT = ("model", "data", "validation", "output")  # names of files
AT = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)  # shares of the original's FLOPs, head included

Points = list[tuple[float, float]]  # shares of the FLOPs of the original, and nats above it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--random", metavar="NAME", help="of which to measure random skipping with its maps")
    parser.add_argument("--picture", type=Path, help="PNG")
    options = parser.parse_args()
    folders: dict[str, list[str]] = defaultdict(list)
    for folder in options.folders:
        name, place = folder.split("=", 1)
        folders[name].append(place)
    found: dict[str, Any] = {"machine": machine(), "retrofits": defaultdict(list)}
    for name, places in folders.items():
        for place in places:
            report = json.loads(Path(place, RETROFIT_FILE).read_text(encoding="utf-8"))
            kept = {key: value for key, value in report["settings"].items() if key not in NOT_KEPT}
            found["retrofits"][name].append({"settings": kept, "stages": report["stages"]})
    if options.random:
        found["random"] = {"maps of": options.random, "rows": random_rows(Path(folders[options.random][0]))}
    lines = all_lines(found)
    found["nats_above_at_share_of_flops"] = {
        text: {name: [at(seeds, share) for share in AT] for name, seeds in lines[text].items()} for text in lines
    }
    options.output.write_text(to_json(found) + "\n", encoding="utf-8")
    for text in lines:
        rows = [[name, *map(shown, found["nats_above_at_share_of_flops"][text][name])] for name in lines[text]]
        columns = ["nats above the original, at", *(f"{share:.0%}" for share in AT)]
        Console().print(comparison_table(rows, columns, text))
    if options.picture:
        draw(lines, options.picture)


def all_lines(found: dict[str, Any]) -> dict[str, dict[str, list[Points]]]:
    """By text and name, that of each seed."""
    lines: dict[str, dict[str, list[Points]]] = defaultdict(lambda: defaultdict(list))
    for name, seeds in found["retrofits"].items():
        for seed in seeds:
            for stage, values in seed["stages"].items():
                whole = next(iter(seed["stages"].values()))["prices"][0]["texts"]
                for text in whole:
                    lines[text][f"{name}, {stage}"].append(line_of(values["prices"], text, whole[text]))
    for text in lines if "random" in found else ():
        whole = next(iter(found["retrofits"][found["random"]["maps of"]][0]["stages"].values()))["prices"][0]["texts"]
        lines[text]["random"].append(line_of(found["random"]["rows"], text, whole[text]))
    return lines


def line_of(rows: list[dict[str, Any]], text: str, whole: dict[str, float]) -> Points:
    found = [row["texts"][text] for row in rows]
    return sorted((one["flops_per_token"] / whole["flops_per_token"], one["price"]) for one in found)


def at(seeds: list[Points], share: float) -> list[float] | None:
    """The price of each seed at a share of the FLOPs; None where one did not go down so far."""
    if any(not points[0][0] <= share <= points[-1][0] for points in seeds):
        return None
    return [float(np.interp(share, *zip(*points, strict=True))) for points in seeds]


def shown(prices: list[float] | None) -> str:
    """Mean over seeds, and their range."""
    if prices is None:
        return "-"
    mean = f"{sum(prices) / len(prices):+.3f}"
    return mean if len(prices) == 1 else f"{mean} ({min(prices):.3f} to {max(prices):.3f})"


def draw(lines: dict[str, dict[str, list[Points]]], path: Path) -> None:
    """A panel a text: what each seed of each kind costs after its last stage."""
    figure = Figure(figsize=(5.5 * len(lines), 4.2), dpi=130, layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (text, by_name) in zip(panels, lines.items(), strict=True):
        last = {name.rpartition(", ")[0] or name: name for name in by_name}  # of the stages, the last
        for number, (kind, name) in enumerate(last.items()):
            for seed, points in enumerate(by_name[name]):
                label = f"{kind} ({name.rpartition(', ')[2]})" if kind != name else name
                shares, prices = zip(*points, strict=True)
                style = {"color": f"C{number}", "marker": "o", "markersize": 3, "linewidth": 1.5}
                axes.plot(shares, prices, label=None if seed else label, **style)
        axes.set(xlabel="share of the original's FLOPs, head included", ylabel="nats above the original", title=text)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    figure.savefig(path, format="png")


def random_rows(folder: Path) -> list[dict[str, Any]]:
    """Loss above that of budget 1.0 when as many block-tokens are skipped at random, first and last layers run."""
    report = json.loads((folder / RETROFIT_FILE).read_text(encoding="utf-8"))
    settings = RetrofitSettings(**report["settings"])
    config = MidskipConfig.from_pretrained(folder)
    texts = Texts(settings, AutoTokenizer.from_pretrained(folder), config.max_position_embeddings, Console(stderr=True))
    whole = MidskipForCausalLM.from_pretrained(folder).eval()
    rows = []
    with temporary_limits(whole, score_scale=0.0):
        losses = {name: evaluate(whole, windows)["loss"] for name, windows in texts.held_out.items()}
    for share in settings.trained_shares(config.num_skip_units):
        random = {"policy": "random", "policy_settings": {"share": share, "outer": settings.outer}}
        values = {name: x for name, x in config.to_dict().items() if name not in ("architectures", "dtype", "auto_map")}
        values.pop("transformers_version", None)
        model = MidskipForCausalLM(MidskipConfig(**values | random | {"calibration": None})).eval()
        ours, theirs = model.state_dict(), whole.state_dict()
        model.load_state_dict({name: theirs.get(name, ours[name]) for name in ours}, strict=True)
        found = {}
        for name, windows in texts.held_out.items():
            result = evaluate(model, windows)
            found[name] = {"price": result["loss"] - losses[name]}
            found[name] |= {key: result[key] for key in ("executed_share", "flops_per_token")}
        rows.append({"share": share, "texts": found})
    return rows


if __name__ == "__main__":
    main()
