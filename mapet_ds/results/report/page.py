"""The page about one run, or several compared: one HTML file that needs nothing else.

Curves, token maps with accuracies, the codebook's use and nearest patches, attention maps, unreadable images, settings and
environment. What needs a checkpoint is computed from the newest one, in this process.
"""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mapet_ds.errors import UserError
from mapet_ds.results.report.history import Record, curves, differing
from mapet_ds.results.report.sample import (
    Sample,
    Trained,
    attention,
    code_counts,
    codes_to_show,
    mean_by_image,
    mean_by_rank,
    open_trained,
    patches_of,
    relative_name,
    surroundings,
    take_sample,
)
from mapet_ds.training.metrics import token_colours

TITLES = {
    "loss": "Loss", "loss_rank_quarter": "Loss by quarter of the ranks (1: least context)", "token_accuracy": "Token accuracy",
    "match_accuracy": "Patches that find their place", "cosine": "Cosine of prediction and target",
    "knn_accuracy_percent": "k-NN accuracy, %", "linear_accuracy_percent": "Linear accuracy, %",
    "val_top": "Validation accuracy, top 1 and top 5, %", "val_loss": "Validation loss",
    "lr": "Learning rate", "grad_norm": "Gradient norm", "images_per_second": "Images per second",
    "data_wait_percent": "Waiting for data, % of the time", "gpu_memory_gib": "GPU memory, GiB",
    "codebook_perplexity": "Perplexity of the ids", "codebook_used": "Share of codes in use", "quarantined": "Unreadable images",
}  # fmt: skip
"""Charts in their order; those of other names follow."""
WIDE = (10.5, 2.4)
COLOURS = 8
INK, RULE, SERIES = "#0a0b0c", "#0a0b0d", [f"#0a0c{i:02d}" for i in range(COLOURS)]
"""Stand for the page's colours until the SVG is written, so that a chart is readable on light and on dark."""
STYLE = {
    "svg.fonttype": "none", "font.size": 8, "axes.edgecolor": RULE, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "xtick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": RULE, "grid.linewidth": 0.5, "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0,
    "lines.linewidth": 1.3, "legend.frameon": False, "legend.fontsize": 7, "axes.formatter.limits": (-3, 5), "path.simplify": True,
}  # fmt: skip
DASHES = ["-", (0, (4, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5))]
RIGHT, IN_TOP5, WRONG, NOT_PREDICTED = (0, 114, 178), (126, 190, 236), (230, 150, 30), (150, 150, 150)
CODES_SHOWN = 12
matplotlib.rcParams.update(STYLE)


class Sizes(NamedTuple):
    """How much of each run a page shows."""

    images: int
    """Images shown with their maps."""
    sample: int
    """Images that figures are of."""
    patches: int
    """Nearest patches shown of a code."""


class Chart:
    """An SVG without a fixed colour; `add` draws, `svg` gives it."""

    def __init__(self, name: str, size: tuple[float, float] = WIDE) -> None:
        self.name, self.figure = name, Figure(figsize=size, layout="constrained")
        self.axes = self.figure.add_subplot()

    def svg(self, label: str) -> Markup:
        """For the page, under this description for those who can't see it."""
        written = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(written, format="svg", transparent=True, metadata=nothing)
        text = written.getvalue()
        text = re.sub(r' id="[a-zA-Z.]+\d?[a-z]?_\d+"', "", text[text.index("<svg") :])
        for colour, name in [(INK, "ink"), (RULE, "rule"), *((c, f"run{i}") for i, c in enumerate(SERIES))]:
            text = text.replace(colour, f"var(--{name})")
        return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def number(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.4g}"


def curve_charts(records: list[Record]) -> list[dict[str, Any]]:
    """A chart of each group of scalars, runs overlaid: colours tell runs apart, or the lines of a single one."""
    found = [curves(record.lines) for record in records]
    names = {name for groups in found for name in groups}
    order = [name for name in TITLES if name in names] + sorted(names - TITLES.keys())
    charts = []
    for place, name in enumerate(order):
        chart = Chart(f"curve {place}", (10.5, 3) if name == "loss" else (3.2, 1.9))
        lines = [(i, k, key) for i, groups in enumerate(found) for k, key in enumerate(groups.get(name, {}))]
        says = []
        for i, k, key in lines:
            steps, values = found[i][name][key]
            colour = SERIES[(i if len(records) > 1 else k) % COLOURS]
            marker = "o" if len(steps) <= 12 else None
            chart.axes.plot(
                steps, values, color=colour, linestyle=DASHES[k % 4], marker=marker, markersize=2.5
            )
            ends = f"{number(values[0])} at step {steps[0]}, {number(values[-1])} at step {steps[-1]}"
            says.append(f"run {i + 1}, {key.replace('_', ' ')}: {ends}")
        keys = dict.fromkeys(key[len(name) :].strip("_") for _, _, key in lines)
        if len(keys) > 1:
            chart.axes.legend(chart.axes.get_lines()[: len(keys)], list(keys), ncols=len(keys))
        title = TITLES.get(name, name.replace("_", " ").capitalize())
        charts.append({"name": name, "title": title, "svg": chart.svg(f"{title}. " + "; ".join(says) + ".")})
    return charts


def picture(pixels: np.ndarray) -> str:
    """[H, W, 3] uint8 as a data: URL."""
    written = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def map_of_ids(ids: Tensor) -> np.ndarray:
    """[L] as colours of the square grid."""
    return (token_colours(ids.view(math.isqrt(len(ids)), -1)) * 255).byte().numpy()


def heat(values: Tensor, low: float, high: float) -> np.ndarray:
    """[L] as colours of the square grid: dark at `low`, bright at `high`, grey where there is none."""
    grid = values.reshape(-1, math.isqrt(len(values))).double().numpy()
    colours = matplotlib.colormaps["viridis"](
        np.clip((grid - low) / max(high - low, 1e-12), 0, 1), bytes=True
    )[..., :3]
    return np.where(np.isnan(grid)[..., None], np.uint8(NOT_PREDICTED), colours)


def verdicts(sample: Sample, i: int) -> np.ndarray:
    """Colours of the grid: right, in the top five, wrong, not predicted."""
    top5 = sample.hit[i] if sample.top5 is None else sample.top5[i]
    kind = np.where(sample.hit[i], 0, np.where(top5, 1, np.where(sample.mask[i], 2, 3)))
    return np.array([RIGHT, IN_TOP5, WRONG, NOT_PREDICTED], np.uint8)[kind.reshape(-1, math.isqrt(len(kind)))]


def score(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "distance" else f"{100 * value:.1f} %"


def token_maps(sample: Sample, trained: Trained, shown: int, colour: str) -> dict[str, Any]:
    """The first images beside their maps, and accuracy or distance of the whole sample by rank, or of each image."""
    low, high = (0.0, 1.0)
    if sample.distance is not None:
        low, high = np.quantile(sample.distance[sample.mask].numpy(), (0.02, 0.98)).tolist()
    scores = {"right": sample.hit, "in the top 5": sample.top5, "distance": sample.distance}
    scores = {name: values for name, values in scores.items() if values is not None}
    by_image = {name: mean_by_image(sample, values) for name, values in scores.items()}
    images = []
    for i in range(min(shown, len(sample.views))):
        tiles = [("crop", sample.views[i].numpy())]
        if sample.prediction is not None:
            tiles += [
                ("true ids", map_of_ids(sample.ids[i])),
                ("predicted", map_of_ids(sample.prediction[i])),
            ]
        if sample.hit is not None:
            tiles.append(("right or wrong", verdicts(sample, i)))
        if sample.distance is not None:
            tiles.append(("distance", heat(sample.distance[i], low, high)))
        note = ", ".join(f"{name} {score(name, by_image[name][i])}" for name in scores)
        tiles = [{"name": name, "source": picture(pixels)} for name, pixels in tiles]
        images.append(
            {"name": relative_name(trained.index, int(sample.index[i])), "tiles": tiles, "note": note}
        )
    means = {name: score(name, float(values[sample.mask].double().mean())) for name, values in scores.items()}
    found = {
        "images": images, "means": means, "low": low, "high": high, "size": len(sample.views), "partly": not sample.mask.all(),
        "by_rank": None,
    }  # fmt: skip
    return found | (rank_chart(sample, scores, colour) if sample.order is not None else {})


def rank_chart(sample: Sample, scores: dict[str, Tensor], colour: str) -> dict[str, Any]:
    chart, columns = Chart(f"ranks {colour}"), {}
    for dashes, (name, values) in zip(DASHES, scores.items()):
        ranks, columns[name] = mean_by_rank(sample, values)
        chart.axes.plot(ranks, columns[name], color=colour, label=name, linestyle=dashes)
    chart.axes.set_xlabel("rank in the permutation (later: more context)")
    chart.axes.set_ylim(bottom=0)
    chart.axes.legend(ncols=len(scores))
    rows = [(rank, *(values[k] for values in columns.values())) for k, rank in enumerate(ranks)]
    says = ", ".join(
        f"{name} {values[0]:.3f} at the first, {values[-1]:.3f} at the last"
        for name, values in columns.items()
    )
    return {"by_rank": rows, "rank_chart": chart.svg(f"Mean by predicted rank: {says}.")}


def codebook(sample: Sample, trained: Trained, patches: int, colour: str) -> dict[str, Any]:
    """How often each code is used, and the nearest patches of some."""
    counts = code_counts(sample, trained.config.tokenizer.vocab_size)
    chart = Chart(f"codes {colour}")
    chart.axes.stairs(np.sort(counts)[::-1], np.arange(len(counts) + 1), fill=True, color=colour)
    chart.axes.set_xlabel("codes, the commonest first")
    chart.axes.set_ylabel("patches")
    dead = int((counts == 0).sum())
    codes = []
    for code in codes_to_show(counts, CODES_SHOWN):
        places = patches_of(sample, code, patches)
        tiles = [surroundings(sample.views[i], patch, trained.config.model.patch_size) for i, patch in places]
        key = picture(map_of_ids(sample.ids.new_tensor([code])))
        codes.append({"code": code, "count": int(counts[code]), "key": key, "tiles": map(picture, tiles)})
    says = (
        f"Use of {len(counts)} codes by {counts.sum()} patches: {counts.max()} at most, {dead} codes by none."
    )
    return {
        "svg": chart.svg(says), "dead": dead, "vocab_size": len(counts), "patches": int(counts.sum()), "codes": codes,
        "nearest": sample.code_distance is not None,
    }  # fmt: skip


def attention_maps(trained: Trained, shown: int) -> list[dict[str, Any]]:
    views, maps = attention(trained, shown)
    found = []
    for view, heads in zip(views, maps):
        mean, *each = [
            picture(heat(head, head.min().item(), head.max().item())) for head in (heads.mean(dim=0), *heads)
        ]
        share = heads.mean(dim=0) / heads.mean()
        note = f"mean of heads: {share.min():.2f} to {share.max():.2f} times the average patch's"
        found.append({"view": picture(view.numpy()), "mean": mean, "heads": each, "note": note})
    return found


def look_inside(record: Record, sizes: Sizes, colour: str) -> dict[str, Any]:
    """What is computed from the newest checkpoint; in the place of a part that can't be, the sentence that says why."""
    found: dict[str, Any] = {
        "step": None,
        "tokens": None,
        "codebook": None,
        "attention": None,
        "why": "",
        "why_target": "",
    }
    try:
        trained = open_trained(record.folder)
        if trained is None:
            return found | {"why": "The run has no checkpoint yet."}
        found |= {"step": trained.checkpoint.run["step"], "attention": attention_maps(trained, sizes.images)}
    except (UserError, OSError) as error:
        return found | {"why": str(error)}
    try:
        sample = take_sample(trained, max(sizes.sample, sizes.images))
    except (UserError, OSError) as error:
        return found | {"why_target": f"{error} Relative paths start where this command is given."}
    found["tokens"] = token_maps(sample, trained, sizes.images, colour)
    if sample.ids is not None:
        found["codebook"] = codebook(sample, trained, sizes.patches, colour)
    return found


def facts(record: Record) -> list[tuple[str, str]]:
    """What one wants to know of a run first."""
    config, lines = record.config, record.lines
    model = config.get("model", {})
    found = [("objective", str(config.get("objective", "fine-tuning" if config else "unknown")))]
    found.append(("model", str(model.get("name") or model.get("path") or "unknown")))
    found.append(("data", str(config.get("data", {}).get("train", "unknown"))))
    last = {name: value for line in lines for name, value in line.items()}  # of each name its newest value
    if lines:
        epochs = config.get("train", {}).get("epochs", "unknown")
        found.append(("step", f"{last['step']}, epoch {number(last.get('epoch'))} of {epochs}"))
    wanted = ("loss", "token_accuracy", "match_accuracy", "cosine", "val_top1")
    for name in [
        *(name for name in wanted if name in last),
        *sorted(name for name in last if name.endswith("accuracy_percent")),
    ]:
        found.append(
            (
                name.removesuffix("_percent").replace("_", " "),
                number(last[name]) + " %" * name.endswith("_percent"),
            )
        )
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    found += [("images per second", f"{number(statistics.median(speeds))} (median)")] if speeds else []
    found.append(("unreadable images", str(len(record.quarantined))))
    return found


def state(record: Record) -> str:
    if (record.folder / "DONE").exists():
        return "finished"
    return "not finished" if record.lines else "not a line of metrics yet"


def render(records: list[Record], sizes: Sizes) -> str:
    """The page."""
    runs = []
    for i, record in enumerate(records):
        runs.append(
            {
                "name": str(record.folder), "colour": i % COLOURS, "state": state(record), "facts": facts(record),
                "inside": look_inside(record, sizes, SERIES[i % COLOURS]), "quarantined": record.quarantined,
                "environment": record.environment, "settings": record.config and yaml.safe_dump(record.config, sort_keys=False),
            }
        )  # fmt: skip
    versions = [record.environment.get("versions", {}) for record in records]
    packages = {
        name: [found.get(name, "") for found in versions]
        for name in sorted({n for found in versions for n in found})
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        runs=runs, charts=curve_charts(records), differing=differing(records), packages=packages,
        colours={"right": RIGHT, "in_top5": IN_TOP5, "wrong": WRONG, "not_predicted": NOT_PREDICTED},
    )  # fmt: skip
