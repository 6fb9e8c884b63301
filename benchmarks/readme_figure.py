"""The picture at the top of the README, drawn from `results/headline.json`.

    python benchmarks/readme_figure.py

Bars are the sizes of whole weight files; accuracy and speed stand beside them. The background is transparent and the
grey of the text readable on white and on black, so that one file serves light and dark pages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TEXT, PLAIN, OURS = "#808890", "#9aa4ae", "#2f81f7"


def middle(found: dict[str, Any]) -> dict[str, Any]:
    """Times of the middle one of the input shapes."""
    return found["shapes"][len(found["shapes"]) // 2]


def bars(found: dict[str, Any]) -> list[tuple[str, float, float, float, str]]:
    """Label, MB, accuracy, speed-up and colour of each bar."""
    models = {model["name"]: model for model in found["models"]}
    speeds = {result["name"]: result["speedup"]["median"] for result in middle(found)["results"]}
    original = models.pop("original")
    export = original["export"]
    lines = [
        ("original, float32", original["bytes"], original["accuracy"], speeds["original, torch"], PLAIN),
        ("original, int8", export["bytes"], export["accuracy"], speeds["original, int8 export"], PLAIN),
    ]
    for name, model in models.items():
        method, _, scope = name.partition(":")
        label = f"{method}, int8, {model['setup']['ratio']:g}x in " + ("all" if scope else "blocks")
        speed = speeds[f"{name}, int8 export"]
        lines.append((label, model["export"]["bytes"], model["export"]["accuracy"], speed, OURS))
    return [(label, size / 1e6, 100 * accuracy, speed, colour) for label, size, accuracy, speed, colour in lines]


def draw(found: dict[str, Any], path: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "headline"  # the same file from the same figures
    plt.rcParams["svg.fonttype"] = "none"
    lines = bars(found)
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(lines) + 0.7))
    axis.barh(range(len(lines)), [line[1] for line in lines], color=[line[4] for line in lines], height=0.62)
    axis.set_yticks(range(len(lines)), [line[0] for line in lines])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.42 * lines[0][1])
    for place, (_, size, accuracy, speed, _) in enumerate(lines):
        text = (
            f"{size:.0f} MB   {accuracy:.1f} %   {speed:.1f}x as fast" if place else f"{size:.0f} MB   {accuracy:.1f} %"
        )
        axis.text(size + 1.5, place, text, va="center", color=TEXT, fontsize=10)
    axis.tick_params(colors=TEXT, length=0, labelsize=10)
    axis.set_xticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    setup = found["models"][0]["setup"]
    shape = middle(found)["shape"].replace("x", " texts of ") + " tokens"
    title = f"MiniLM on {setup['task']}: whole file, test {found['metric']}, speed with {shape}"
    axis.set_title(title, color=TEXT, fontsize=10, loc="left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "headline.json")
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs" / "images" / "headline.svg")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.image)


if __name__ == "__main__":
    main()
