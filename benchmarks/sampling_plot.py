"""The picture of `sampling.py`: how many times faster ECAR is in each case, and what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#33658a", "#a23b52", *plt.get_cmap("Set2").colors)
SPACE = 0.72  # width of the bars of a case
PREDICTIONS: dict[str, Literal["-", ":"]] = {"macs_predict": "-", "calls_predict": ":"}
LABELS = {"macs_predict": "ratio of MACs", "calls_predict": "ratio of calls"}


def plot(result: dict[str, Any], path: Path) -> None:
    """One group of bars per case, one bar per baseline; a line for the ratio of MACs, a dotted one for calls."""
    cases = result["cases"]
    names = list(cases[0]["faster"])
    width = SPACE / len(names)
    figure, axes = plt.subplots(figsize=(2.5 + 0.85 * max(2, len(names)) * len(cases), 4.2), layout="constrained")
    for index, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        places = [number + (index - (len(names) - 1) / 2) * width for number in range(len(cases))]
        ratios = [case["faster"][name] for case in cases]
        bars = axes.bar(places, [ratio["measured"] for ratio in ratios], width, color=colour, label=f"over {name}")
        axes.bar_label(bars, fmt="%.1f", label_type="center", color="white", weight="bold", fontsize=9)
        for what, line in PREDICTIONS.items():
            found, half = [ratio[what] for ratio in ratios], width / 2
            starts, ends = ([place + side for place in places] for side in (-half, half))
            axes.hlines(found, starts, ends, colors="black", linestyles=line, label="" if index else LABELS[what])
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [_label(case) for case in cases], fontsize=8)
    axes.set_ylabel("times faster, ECAR with 48 calls")
    axes.set_title(f"{result['hardware']}, {result['dtype']}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(case: dict[str, Any]) -> str:
    batch = "/".join(map(str, sorted(set(case["batches"].values()))))
    guidance = "no guidance" if case["guidance"] == 1.0 else f"guidance {case['guidance']:g}"
    return f"{case['preset']}, {case['mode']}\nbatch {batch}\n{guidance}"
