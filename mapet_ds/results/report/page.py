"""The page about one run, or about several compared: one HTML file that needs nothing else.

It shows curves, token maps with accuracies, the codebook's use and nearest patches, attention maps,
unreadable images, settings and environment. What needs a checkpoint is computed from the newest one, in this
process. Of segmentation it shows the run's own pictures, and the figures of each class.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import torch
import yaml
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mapet_ds.errors import DataError, UserError
from mapet_ds.results.report import sample as samples
from mapet_ds.results.report.history import Record, curves, differing, kind
from mapet_ds.results.report.sample import Sample, Trained
from mapet_ds.results.suite import results_below
from mapet_ds.training.metrics import newest_pictures, token_colours

TITLES = {
    "loss": "Loss", "loss_rank_quarter": "Loss by quarter of the ranks (1: least context)",
    "token_accuracy": "Token accuracy", "match_accuracy": "Patches that find their place",
    "cosine": "Cosine of prediction and target", "knn_accuracy_percent": "k-NN accuracy, %",
    "linear_accuracy_percent": "Linear accuracy, %", "effective_rank": "Effective rank of features",
    "feature_cosine": "Mean cosine of two images' features",
    "val_top": "Validation accuracy, top 1 and top 5, %",
    "val_miou": "Validation mIoU, %", "val_class_accuracy": "Validation class accuracy, %",
    "val_pixel_accuracy": "Validation pixel accuracy, %", "val_loss": "Validation loss",
    "lr": "Learning rate", "grad_norm": "Gradient norm",
    "images_per_second": "Images per second", "data_wait_percent": "Waiting for data, % of the time",
    "gpu_memory_gib": "GPU memory, GiB", "codebook_perplexity": "Perplexity of the ids",
    "codebook_used": "Share of codes in use", "quarantined": "Unreadable images",
}  # fmt: skip
"""Titles of the charts, in the charts' order. Charts of other names follow."""
COLOURS = 8
INK, RULE, SERIES = "#0a0b0c", "#0a0b0d", [f"#0a0c{i:02d}" for i in range(COLOURS)]
"""They stand for the page's colours until the SVG is written: a chart is readable on light and on dark."""
DASHES = ["-", (0, (4, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5))]
RIGHT, IN_TOP5, WRONG, NOT_PREDICTED = (0, 114, 178), (126, 190, 236), (230, 150, 30), (150, 150, 150)
CODES_SHOWN = 12
PICTURES = {
    "image_classes_predicted": "Images of data.val",
    "crop_classes_predicted": "Crops that it learns from",
}
"""Titles of the pictures that a run of segmentation draws, by their names in TensorBoard."""
matplotlib.rcParams.update({
    "svg.fonttype": "none", "font.size": 8, "axes.edgecolor": RULE, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "xtick.labelcolor": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.5,
    "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.3,
    "legend.frameon": False, "legend.fontsize": 7, "axes.formatter.limits": (-3, 5), "path.simplify": True,
})  # fmt: skip


class Sizes(NamedTuple):
    """How much of each run a page shows."""

    images: int
    """Images shown with their maps."""
    sample: int
    """Images that figures are computed from."""
    patches: int
    """Nearest patches shown of a code."""


class Chart:
    """An SVG without fixed colours. Draw on `axes`, then take it with `svg`."""

    def __init__(self, name: str, size: tuple[float, float] = (10.5, 2.4)) -> None:
        self.name, self.figure = name, Figure(figsize=size, layout="constrained")
        self.axes = self.figure.add_subplot()

    def svg(self, label: str) -> Markup:
        """The chart for the page; `label` describes it to those who can't see it."""
        stream = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
        text = stream.getvalue()
        text = re.sub(r' id="[a-zA-Z.]+\d?[a-z]?_\d+"', "", text[text.index("<svg") :])
        for colour, name in [(INK, "ink"), (RULE, "rule"), *((c, f"run{i}") for i, c in enumerate(SERIES))]:
            text = text.replace(colour, f"var(--{name})")
        return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def number(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.4g}"


def curve_charts(records: list[Record]) -> list[dict[str, Any]]:
    """A chart of each group of scalars, runs overlaid. Colours tell runs apart, or a single run's lines."""
    groups = [curves(record.lines) for record in records]
    names = {name for run in groups for name in run}
    charts = []
    for name in [name for name in TITLES if name in names] + sorted(names - TITLES.keys()):
        chart = Chart(f"curve {len(charts)}", (10.5, 3) if name == "loss" else (3.2, 1.9))
        labels, descriptions = {}, []
        for i, run in enumerate(groups):
            for k, (key, (steps, values)) in enumerate(run.get(name, {}).items()):
                colour = SERIES[(i if len(records) > 1 else k) % COLOURS]
                style = {"linestyle": DASHES[k % 4], "marker": "o" if len(steps) <= 12 else None}
                (line,) = chart.axes.plot(steps, values, color=colour, markersize=2.5, **style)
                labels.setdefault(key[len(name) :].strip("_") or "as judged", line)
                ends = f"{number(values[0])} at step {steps[0]}, {number(values[-1])} at step {steps[-1]}"
                descriptions.append(f"run {i + 1}, {key.replace('_', ' ')}: {ends}")
        if len(labels) > 1:
            chart.axes.legend(labels.values(), labels.keys(), ncols=len(labels))
        title = TITLES.get(name, name.replace("_", " ").capitalize())
        svg = chart.svg(f"{title}. {'; '.join(descriptions)}.")
        charts.append({"name": name, "title": title, "svg": svg})
    return charts


def picture(pixels: NDArray[np.uint8]) -> str:
    """The data: URL of an image, uint8 [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", optimize=True)
    return url(stream.getvalue())


def url(png: bytes) -> str:
    """The data: URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def map_of_ids(ids: Tensor) -> NDArray[np.uint8]:
    """Token ids [L] as colours of the square grid."""
    return (token_colours(ids.view(math.isqrt(len(ids)), -1)) * 255).byte().numpy()


def heat(values: Tensor, low: float, high: float) -> NDArray[np.uint8]:
    """Values [L] as colours of the square grid: dark at `low`, bright at `high`, grey where it is NaN."""
    grid = values.reshape(-1, math.isqrt(len(values))).double().numpy()
    share = np.clip((grid - low) / max(high - low, 1e-12), 0, 1)
    colours = matplotlib.colormaps["viridis"](share, bytes=True)[..., :3]
    return np.where(np.isnan(grid)[..., None], np.array(NOT_PREDICTED, np.uint8), colours)


def verdicts(hit: Tensor, top5: Tensor, mask: Tensor) -> NDArray[np.uint8]:
    """Colours of the square grid, from bool [L]: right, in the top five, wrong, not predicted."""
    kind = np.where(hit, 0, np.where(top5, 1, np.where(mask, 2, 3)))
    colours = np.array([RIGHT, IN_TOP5, WRONG, NOT_PREDICTED], np.uint8)
    return colours[kind.reshape(-1, math.isqrt(len(kind)))]


def score(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "distance" else f"{100 * value:.1f} %"


def token_maps(sample: Sample, trained: Trained, shown: int, colour: str) -> dict[str, Any]:
    """The first images beside their maps; accuracy or distance of the sample, of each image and by rank."""
    scores = {"right": sample.hit, "in the top 5": sample.top5, "distance": sample.distance}
    scores = {name: values for name, values in scores.items() if values is not None}
    means = {name: values[sample.mask].double().mean().item() for name, values in scores.items()}
    means = {name: score(name, mean) for name, mean in means.items()}
    low, high = 0.0, 1.0
    if sample.distance is not None:
        low, high = np.quantile(sample.distance[sample.mask].numpy(), (0.02, 0.98)).tolist()

    by_image = {name: samples.mean_by_image(sample, values) for name, values in scores.items()}
    images = []
    for i in range(min(shown, len(sample.views))):
        maps = {"crop": sample.views[i].numpy()}
        if sample.ids is not None and sample.prediction is not None:
            maps |= {"true ids": map_of_ids(sample.ids[i]), "predicted": map_of_ids(sample.prediction[i])}
        if sample.hit is not None:
            top5 = sample.hit if sample.top5 is None else sample.top5
            maps["right or wrong"] = verdicts(sample.hit[i], top5[i], sample.mask[i])
        if sample.distance is not None:
            maps["distance"] = heat(sample.distance[i], low, high)
        tiles = [{"name": name, "source": picture(pixels)} for name, pixels in maps.items()]
        note = ", ".join(f"{name} {score(name, values[i])}" for name, values in by_image.items())
        name = samples.relative_name(trained.index, int(sample.index[i]))
        images.append({"name": name, "tiles": tiles, "note": note})

    by_rank = {"by_rank": None} if sample.order is None else rank_chart(sample, scores, colour)
    scale = {"low": low, "high": high, "partly": not sample.mask.all()}
    return {"images": images, "means": means, "size": len(sample.views)} | scale | by_rank


def rank_chart(sample: Sample, scores: dict[str, Tensor], colour: str) -> dict[str, Any]:
    """Mean scores of each predicted rank, as a chart and as the rows of a table."""
    chart, ranks, means = Chart(f"ranks {colour}"), [], {}
    for dashes, (name, values) in zip(DASHES, scores.items()):
        ranks, means[name] = samples.mean_by_rank(sample, values)
        chart.axes.plot(ranks, means[name], color=colour, label=name, linestyle=dashes)
    chart.axes.set_xlabel("rank in the permutation (later: more context)")
    chart.axes.set_ylim(bottom=0)
    chart.axes.legend(ncols=len(scores))
    ends = [f"{name} {line[0]:.3f} at the first, {line[-1]:.3f} at the last" for name, line in means.items()]
    svg = chart.svg(f"Mean by predicted rank: {', '.join(ends)}.")
    return {"by_rank": list(zip(ranks, *means.values())), "rank_chart": svg}


def codebook(sample: Sample, trained: Trained, patches: int, colour: str) -> dict[str, Any]:
    """How often each code is used, and the nearest patches of some codes."""
    counts = samples.code_counts(sample, trained.config.tokenizer.vocab_size)
    chart = Chart(f"codes {colour}")
    chart.axes.stairs(np.sort(counts)[::-1], np.arange(len(counts) + 1), fill=True, color=colour)
    chart.axes.set_xlabel("codes, the commonest first")
    chart.axes.set_ylabel("patches")
    size, total, dead = len(counts), int(counts.sum()), int((counts == 0).sum())
    svg = chart.svg(f"Use of {size} codes by {total} patches: {counts.max()} at most, {dead} codes by none.")
    codes, patch_size = [], trained.config.model.patch_size
    for code in samples.codes_to_show(counts, CODES_SHOWN):
        places = samples.patches_of(sample, code, patches)
        tiles = [picture(samples.surroundings(sample.views[i], patch, patch_size)) for i, patch in places]
        key = picture(map_of_ids(torch.tensor([code])))
        codes.append({"code": code, "count": int(counts[code]), "key": key, "tiles": tiles})
    nearest = sample.code_distance is not None
    use = {"svg": svg, "dead": dead, "vocab_size": size, "patches": total}
    return use | {"codes": codes, "nearest": nearest}


def attention_maps(trained: Trained, shown: int) -> list[dict[str, Any]]:
    """The first images, each with its patch features and the attention of the last block's heads."""
    rows = []
    views, attention, patches = samples.look(trained, shown)
    for view, heads, colours in zip(views, attention, samples.principal_colours(patches)):
        maps = [heads.mean(dim=0), *heads]
        mean, *each = [picture(heat(values, values.min().item(), values.max().item())) for values in maps]
        share = heads.mean(dim=0) / heads.mean()
        note = f"mean of heads: {share.min():.2f} to {share.max():.2f} times the average patch's"
        side = math.isqrt(len(colours))
        tiles = {"view": picture(view.numpy()), "features": picture(colours.numpy().reshape(side, side, 3))}
        rows.append(tiles | {"mean": mean, "heads": each, "note": note})
    return rows


def alike_images(trained: Trained, shown: int, among: int) -> dict[str, Any]:
    """The first images, each with those that trained and fresh weights find most similar."""
    alike = samples.look_alike(trained, shown, among)

    @functools.cache
    def tile(place: int) -> str:
        return picture(np.asarray(Image.fromarray(alike.views[place].numpy()).resize((96, 96))))

    rows: list[dict[str, Any]] = [{"view": tile(i)} for i in range(min(shown, len(alike.views)))]
    for name, nearest in alike.nearest.items():
        for row, places in zip(rows, nearest.tolist()):
            row[name] = [tile(place) for place in places]
    return {"rows": rows, "size": len(alike.views), "rank": alike.rank, "most": alike.most}


def look_inside(record: Record, sizes: Sizes, colour: str) -> dict[str, Any]:
    """The parts that are computed from the newest checkpoint; None for a part that can't be.

    `why` is then the sentence that gives the reason, or `why_target` for the parts that need the target.
    """
    names = ("step", "tokens", "codebook", "attention", "alike", "why", "why_target")
    parts: dict[str, Any] = dict.fromkeys(names)
    try:
        trained = samples.open_trained(record.folder)
        if trained is None:
            return parts | {"why": "The run has no checkpoint yet."}
        parts |= {"step": trained.checkpoint.run["step"], "attention": attention_maps(trained, sizes.images)}
        parts["alike"] = alike_images(trained, sizes.images, max(sizes.sample, sizes.images))
    except (UserError, OSError) as error:
        return parts | {"why": str(error)}
    try:
        sample = samples.take_sample(trained, max(sizes.sample, sizes.images))
    except (UserError, OSError) as error:
        return parts | {"why_target": f"{error} Relative paths start where this command is given."}
    parts["tokens"] = token_maps(sample, trained, sizes.images, colour)
    if sample.ids is not None:
        parts["codebook"] = codebook(sample, trained, sizes.patches, colour)
    return parts


def classes_and_pictures(record: Record) -> dict[str, Any]:
    """The newest pictures of a run of segmentation, and its figures of each class with their colours.

    Raises:
        DataError: classes.json can't be read.
    """
    drawn, path = newest_pictures(record.folder), record.folder / "classes.json"
    pictures = [
        {"title": title, "step": drawn[name][0], "source": url(drawn[name][1])}
        for name, title in PICTURES.items() if name in drawn
    ]  # fmt: skip
    try:
        figures = json.loads(path.read_text()) if path.is_file() else {}
        colours = (255 * token_colours(torch.arange(len(figures)))).byte().tolist()
        classes = [
            {"name": name, "colour": tuple(colour), "pixels": values["pixels"]}
            | {key: number(values[key]) for key in ("iou", "accuracy")}
            for colour, (name, values) in zip(colours, figures.items())
        ]
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise DataError(f"{path} can't be read: {' '.join(str(error).split())}.") from error
    return {"pictures": pictures, "classes": classes}


def facts(record: Record) -> list[tuple[str, str]]:
    """What a reader wants to know of a run first, as (name, value)."""
    config, lines = record.config, record.lines
    model = config.get("model", {})
    rows = [("objective", str(config.get("objective", kind(record))))]
    rows.append(("model", str(model.get("name") or model.get("path") or "unknown")))
    rows.append(("data", str(config.get("data", {}).get("train", "unknown"))))
    newest = {name: value for line in lines for name, value in line.items()}
    if lines:
        epochs = config.get("train", {}).get("epochs", "unknown")
        rows.append(("step", f"{newest['step']}, epoch {number(newest.get('epoch'))} of {epochs}"))
    names = [n for n in ("loss", "token_accuracy", "match_accuracy", "cosine", "val_top1") if n in newest]
    for name in names + sorted(n for n in newest if n.endswith("accuracy_percent")):
        unit = " %" if name.endswith("_percent") else ""
        rows.append((name.removesuffix("_percent").replace("_", " "), number(newest[name]) + unit))
    accuracies = ("val_miou", "val_class_accuracy", "val_pixel_accuracy")
    rows += [(name.replace("_", " "), f"{newest[name]:.2f} %") for name in accuracies if name in newest]
    names = [name for name in ("effective_rank", "feature_cosine") if name in newest]
    rows += [(name.replace("_", " "), number(newest[name])) for name in names]
    if speeds := [line["images_per_second"] for line in lines if "images_per_second" in line]:
        rows.append(("images per second", f"{number(statistics.median(speeds))} (median)"))
    return [*rows, ("unreadable images", str(len(record.quarantined)))]


def state(record: Record) -> str:
    if (record.folder / "DONE").exists():
        return "finished"
    return "not finished" if record.lines else "not a line of metrics yet"


def render(records: list[Record], sizes: Sizes) -> str:
    """The page's HTML."""
    runs = []
    for i, record in enumerate(records):
        run: dict[str, Any] = {"name": str(record.folder), "colour": i % COLOURS}
        run |= {"state": state(record), "facts": facts(record), "quarantined": record.quarantined}
        run |= {"kind": kind(record), "inside": None, "masks": None, "evaluations": [], "damaged": []}
        try:
            run["evaluations"] = results_below(record.folder)
            if run["kind"] == "segmentation":
                run["masks"] = classes_and_pictures(record)
        except UserError as error:
            run["damaged"].append(str(error))
        if run["kind"] not in ("segmentation", "fine-tuning"):
            run["inside"] = look_inside(record, sizes, SERIES[i % COLOURS])
        run["settings"] = record.config and yaml.safe_dump(record.config, sort_keys=False)
        runs.append(run | {"environment": record.environment})
    versions = [record.environment.get("versions", {}) for record in records]
    names = sorted({name for run in versions for name in run})
    packages = {name: [run.get(name, "") for run in versions] for name in names}
    figures = {"charts": curve_charts(records), "differing": differing(records), "packages": packages}
    colours = {"right": RIGHT, "in_top5": IN_TOP5, "wrong": WRONG, "not_predicted": NOT_PREDICTED}
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(runs=runs, colours=colours, **figures)
