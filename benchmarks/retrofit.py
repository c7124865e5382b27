"""What retrofits cost, side by side, and beside them random skipping with the same maps.

    python benchmarks/retrofit.py benchmarks/results/retrofit.json NAME=FOLDER ... --random NAME

Each folder is one that `midskip retrofit` wrote. The text is read again from where the first of them names it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.bench.results import machine
from midskip.evaluate import evaluate, everything_run
from midskip.retrofit import RetrofitSettings
from midskip.retrofit.run import REPORT, Texts
from midskip.runs import to_json

NOT_KEPT = ("model", "data", "validation", "output")  # names of files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--random", metavar="NAME", help="of which to measure random skipping with its maps")
    options = parser.parse_args()
    folders = dict(folder.split("=", 1) for folder in options.folders)
    found: dict[str, Any] = {"machine": machine(), "retrofits": {}}
    for name, folder in folders.items():
        report = json.loads(Path(folder, REPORT).read_text(encoding="utf-8"))
        kept = {key: value for key, value in report["settings"].items() if key not in NOT_KEPT}
        found["retrofits"][name] = {"settings": kept, "stages": report["stages"]}
    if options.random:
        found["random"] = {"maps of": options.random, "rows": random_rows(Path(folders[options.random]))}
    options.output.write_text(to_json(found) + "\n", encoding="utf-8")


def random_rows(folder: Path) -> list[dict[str, Any]]:
    """Loss above that of budget 1.0 when as many block-tokens are skipped at random, first and last layers run."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    settings = RetrofitSettings(**report["settings"])
    config = MidskipConfig.from_pretrained(folder)
    texts = Texts(settings, AutoTokenizer.from_pretrained(folder), config.max_position_embeddings, Console(stderr=True))
    whole = MidskipForCausalLM.from_pretrained(folder).eval()
    rows = []
    with everything_run(whole):
        losses = {name: evaluate(whole, windows)["loss"] for name, windows in texts.held_out.items()}
    for share in settings.shares:
        random = {"policy": "random", "policy_settings": {"share": share, "outer": settings.outer}}
        values = {name: x for name, x in config.to_dict().items() if name not in ("architectures", "dtype", "auto_map")}
        values.pop("transformers_version", None)
        model = MidskipForCausalLM(MidskipConfig(**values | random | {"calibration": None})).eval()
        ours, theirs = model.state_dict(), whole.state_dict()
        model.load_state_dict({name: theirs.get(name, ours[name]) for name in ours}, strict=True)
        found = {}
        for name, windows in texts.held_out.items():
            result = evaluate(model, windows)
            found[name] = {"price": result["loss"] - losses[name], "executed_share": result["executed_share"]}
        rows.append({"share": share, "texts": found})
    return rows


if __name__ == "__main__":
    main()
