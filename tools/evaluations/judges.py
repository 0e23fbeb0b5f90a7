"""The figures of tools/evaluate.py: each judges four arrays, features and labels of --train and of --val."""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING, Any

from mapet_ds.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mapet_ds.data.few_labels import Few
    from mapet_ds.results.probe import Fitted

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.

NEIGHBOURS = (10, 20, 100)
"""What `all` takes for k, where there are as many training images."""
SMALL = 10**9
"""Training images x width x classes up to which `all` solves the logistic regression: minutes on a CPU."""
ACCURACIES = ("knn_accuracy_percent", "linear_accuracy_percent")
SETTINGS = ("k", "temperature", "solver", "penalty", "batch_norm", "epochs", "seed")
"""What an accuracy depends on, beside the images."""
Result = tuple[list[str], dict[str, Any]]
"""A sentence for each figure, and the figures."""


def unit(arrays: list[Any]) -> list[Any]:
    """The four arrays with features of length 1."""
    from mapet_ds.results.features import unit_length

    train, train_labels, val, val_labels = arrays
    return [unit_length(train), train_labels, unit_length(val), val_labels]


def evaluate_knn(arguments: argparse.Namespace, arrays: list[Any]) -> Result:
    """The k-NN vote."""
    from mapet_ds.results.probe import K, knn

    k, temperature = arguments.k or K, arguments.temperature
    accuracy = knn(*unit(arrays), k=k, temperature=temperature)
    figures = {"knn_accuracy_percent": accuracy, "k": k, "temperature": temperature}
    return [f"k-NN (k = {k}) accuracy {accuracy:.2f} %"], figures


def tried(name: str, probe: Fitted) -> tuple[str, dict[str, Any]]:
    """A sentence with a probe's accuracy, its rate and where a better one may lie; the rates as figures."""
    held_out, rate = probe.held_out, probe.learning_rate
    rates = ", ".join(f"{lr:g}: {accuracy:.2f} %" for lr, accuracy in held_out.items())
    sentence = (
        f"{name} accuracy {probe.accuracy:.2f} % with learning rate {rate:g}, chosen on a tenth of the "
        f"training images ({rates})"
    )
    best = [lr for lr, accuracy in sorted(held_out.items()) if accuracy == max(held_out.values())]
    for end, place in ((min(held_out), "lowest"), (max(held_out), "highest")):
        if len(held_out) > 1 and best == [end]:
            sentence += f"; a better one may lie beyond the {place} of them: --learning_rates takes others"
    figures = {"learning_rate": rate, "held_out_accuracy_percent": held_out}
    if level(figures):
        sentence += "; all are level, so that tenth is too small to choose by: name one by --learning_rates"
    return sentence, figures


def level(figures: dict[str, Any]) -> bool:
    """Whether all learning rates are level on the tenth that chooses one, so that none is the best."""
    held_out = figures.get("held_out_accuracy_percent", {})
    return len(held_out) > 1 and len({*held_out.values()}) == 1


def evaluate_linear(arguments: argparse.Namespace, arrays: list[Any]) -> Result:
    """A linear classifier, by --solver."""
    from mapet_ds.results.probe import EPOCHS, LEARNING_RATES, linear, linear_sgd

    if arguments.solver == "lbfgs":
        accuracy = linear(*unit(arrays), penalty=arguments.penalty)
        figures = {"linear_accuracy_percent": accuracy, "solver": "lbfgs", "penalty": arguments.penalty}
        return [f"Linear accuracy {accuracy:.2f} %"], figures
    rates, norm = arguments.learning_rates or LEARNING_RATES, arguments.batch_norm
    settings = {"epochs": arguments.epochs or EPOCHS, "batch_norm": norm, "seed": arguments.seed}
    probe = linear_sgd(*arrays, learning_rates=rates, **settings, device=arguments.device)

    sentence, chosen = tried(f"Linear (SGD{', batch norm' if norm else ''})", probe)
    figures = {"linear_accuracy_percent": probe.accuracy, "solver": "sgd"} | chosen | settings
    return [sentence], figures


def evaluate_few(
    arguments: argparse.Namespace, arrays: list[Any], places: NDArray[Any] | None, few: Few
) -> Result:
    """The probe of `arguments` on few labels: of one list, or the mean and the spread of several draws.

    places: those of the training images in their index.

    Raises:
        ConfigError: features from a file that doesn't tell places.
    """
    import numpy as np

    if places is None:
        raise ConfigError(
            f"{arguments.features} is older than the choice of few labels: it doesn't tell which image "
            "a row is of. Delete it, or name another file."
        )
    train, labels, *val = arrays
    results = []
    for draw in few.draws:
        rows = np.flatnonzero(np.isin(places, draw))
        lines, figures = arguments.evaluate(arguments, [train[rows], labels[rows], *val])
        results.append((lines, figures | {"labelled_images": len(rows)}))
    lines, figures = results[0]
    if len(results) == 1:
        return [f"{line}; {few.words}" for line in lines], figures | few.figures
    (name,) = figures.keys() & ACCURACIES
    title, _, _ = lines[0].partition(" accuracy ")
    settings = {key: figures[key] for key in SETTINGS if key in figures}
    accuracies = [figures[name] for _, figures in results]
    mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
    each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    sentence = f"{title} accuracy {mean:.2f} %, mean of {len(results)} draws, standard deviation "
    sentence += f"{spread:.2f} ({each}); {few.words}"
    if number := sum(level(figures) for _, figures in results):
        sentence += f"; no rate was better than another in {number} of them"
    draws = {"standard_deviation": spread, "draws": [figures for _, figures in results]}
    return [sentence], {name: mean} | settings | draws | few.figures


def evaluate_all(arguments: argparse.Namespace, arrays: list[Any]) -> Result:
    """k-NN for several k; linear by SGD without and with BatchNorm, by lbfgs for small sets; collapse."""
    from mapet_ds.results.collapse import collapse_figures

    train, train_labels, val, _ = arrays
    ks = [k for k in NEIGHBOURS if k <= len(train)] or [len(train)]
    runs: list[tuple[Any, dict[str, Any]]] = [(evaluate_knn, {"k": k}) for k in ks]
    runs += [(evaluate_linear, {"solver": "sgd", "batch_norm": norm}) for norm in (False, True)]
    if train.size * (train_labels.max() + 1) <= SMALL:
        runs.append((evaluate_linear, {"solver": "lbfgs"}))
    results = [run(argparse.Namespace(**vars(arguments) | own), arrays) for run, own in runs]
    sentences = [sentence for lines, _ in results for sentence in lines]
    figures = [each for _, each in results]
    collapse = collapse_figures(val)
    rank, cosine = collapse.values()
    sentences.append(f"Effective rank {rank:.1f} of {min(val.shape)}, mean cosine {cosine:.3f} of --val")
    return sentences, {"knn": figures[: len(ks)], "linear": figures[len(ks) :], **collapse}
