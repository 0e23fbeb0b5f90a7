"""The suite of tools/evaluate.py: all that a document names is measured of one model, and goes on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluations.accuracy import Judging, accuracy_of, judging, words_of
from evaluations.attentive import attend
from evaluations.images import Extracted, Sets, labelled_sets, opened, vectors_of
from evaluations.judges import ACCURACIES, evaluate_few, evaluate_knn, evaluate_linear, level
from evaluations.models import asked_of, build_model

from mapet_ds.errors import ConfigError
from mapet_ds.files import checksum, write_whole

if TYPE_CHECKING:
    from mapet_ds.config.suite import SuiteConfig
    from mapet_ds.data.few_labels import Few
    from mapet_ds.data.index import Index
    from mapet_ds.launch import Ranks

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.


class Row(NamedTuple):
    """A row of the table."""

    settings: dict[str, Any]
    """What its figure depends on, beside weights and images."""
    measure: Callable[[], dict[str, Any]]
    """Gives its figures on every rank. Every rank must call it."""


class Suite:
    """The rows that a document names, of one model. Every rank must build it.

    Raises:
        ConfigError: the model lacks a feature that is named.
    """

    def __init__(
        self, arguments: argparse.Namespace, model: Any, sets: Sets, judged: dict[str, Judging], ranks: Ranks
    ) -> None:  # fmt: skip
        self.arguments, self.model, self.sets, self.judged = arguments, model, sets, judged
        self.ranks = ranks
        self.suite: SuiteConfig = arguments.suite
        self.asked = asked_of(arguments, model)
        self._accuracies: dict[str, dict[str, Any]] = {}

    @functools.cached_property
    def features(self) -> Extracted:
        """The features of all images. Every rank must ask for them."""
        what = self.asked.layers, self.asked.kinds
        return vectors_of(self.arguments, self.sets, self.model, what, self.ranks)

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yields the rows by their names, in the table's order."""
        suite = self.suite
        for feature in self.asked.features:
            yield from self._probes(feature, suite, None)
            for few in self.sets.few:
                yield from self._probes(feature, suite.few, few)
        if suite.attentive:
            own = dataclasses.asdict(suite.attentive)
            settings = own | {"seed": suite.seed, "batch_size": self.arguments.batch_size}
            settings.pop("memory_gb")  # it changes no figure
            yield "attentive probe", Row(settings, lambda: self._attentive(own))
        for name, judged in self.judged.items():
            settings = self._judging(judged)
            if name != "val" or (suite.accuracy and suite.accuracy.val):
                yield f"fine-tuned, {name}", Row(settings, functools.partial(self._accuracy, name, ""))
            if judged.right:
                settings = settings | {"real": content(repr([sorted(each) for each in judged.right]))}
                yield (
                    f"fine-tuned, {name}, ReaL",
                    Row(settings, functools.partial(self._accuracy, name, "real_")),
                )

    def check_numbers(self) -> None:
        """Refuses probes that need more labels than there are, by a ConfigError naming them all."""
        from mapet_ds.results.probe import LEAST

        lines, suite = [], self.suite
        wholes = [("", suite, len(self.sets.train), "data.train")]
        few = [("few.", suite.few, min(map(len, few.draws)), few.words) for few in self.sets.few]
        for prefix, section, number, words in wholes + few:
            for k in section.knn.k if section.knn else []:
                if k > number:
                    lines.append(f"{prefix}knn.k = {k} neighbours can't be found: {words}: {number} images.")
            if section.linear and section.linear.solver == "sgd" and number < LEAST:
                lines.append(
                    f"{prefix}linear.solver = sgd holds out a tenth of {LEAST} images or more for its rate: "
                    f"{words}: {number} images. lbfgs needs none."
                )
        if lines:
            raise ConfigError("\n".join(lines))

    def _probes(self, feature: str, section: Any, few: Few | None) -> Iterator[tuple[str, Row]]:
        """Yields k-NN and linear of one feature, by all labels or by few."""
        from mapet_ds.results.features import WORDS

        ending = f", {WORDS[feature]}" + (f", {few.words}" if few else "")
        fixed = {"feature": feature, **(self._chosen(few) if few else {})}
        for k in section.knn.k if section.knn else []:
            own = {"k": k, "temperature": section.knn.temperature}
            measure = functools.partial(self._probe, evaluate_knn, own, feature, few)
            yield f"k-NN, k = {k}{ending}", Row(own | fixed, measure)
        if section.linear:
            own = dataclasses.asdict(section.linear)
            settings = own | fixed | ({"seed": self.suite.seed} if own["solver"] == "sgd" else {})
            measure = functools.partial(self._probe, evaluate_linear, own, feature, few)
            yield f"linear{ending}", Row(settings, measure)

    def _chosen(self, few: Few) -> dict[str, Any]:
        """What a choice of labels depends on."""
        if "labels" not in few.figures:
            return few.figures | {"draws": self.suite.few.draws}
        (file,) = [path for path in self.suite.few.lists if Path(path).name == few.figures["labels"]]
        return {"labels": few.figures["labels"], "sha256": checksum(Path(file))}

    def _probe(self, evaluate: Any, own: dict[str, Any], feature: str, few: Few | None) -> dict[str, Any]:
        from mapet_ds.results.features import chosen

        judged, counts, _ = self.features
        arguments = argparse.Namespace(**vars(self.arguments) | own, evaluate=evaluate)

        def judge() -> dict[str, Any]:
            assert judged
            places = list(range(len(self.asked.layers or [0])))
            train, val = (chosen(vectors, feature, places) for vectors in (judged.train, judged.val))
            arrays = [train, judged.train_labels, val, judged.val_labels]
            if few:
                _, figures = evaluate_few(arguments, arrays, judged.places, few)
            else:
                _, figures = evaluate(arguments, arrays)
            (top1,) = [value for name, value in figures.items() if name in ACCURACIES]
            return {"top1": top1, "note": note_of(figures)} | figures | counts

        return self.ranks.from_first(judge)

    def _attentive(self, own: dict[str, Any]) -> dict[str, Any]:
        arguments = argparse.Namespace(**vars(self.arguments) | own)
        _, figures = attend(arguments, self.model, self.sets, None, self.ranks)
        return {"top1": figures["attentive_accuracy_percent"], "note": note_of(figures)} | figures

    def _judging(self, judged: Judging) -> dict[str, Any]:
        """What the accuracy on a set depends on."""
        from mapet_ds.weights import fingerprint

        index = judged.index
        own = {"classifier": fingerprint(self.arguments.classifier.state_dict()), "images": index.fingerprint}
        read = repr((judged.reading.outputs.tolist(), judged.allowed.tolist()))
        return own | {"labels": content(index.labels().tobytes()), "classes": content(read)}

    def _accuracy(self, name: str, kind: str) -> dict[str, Any]:
        """The figures of a set, of its own labels or, of kind real_, of ReaL's, from one pass."""
        if name not in self._accuracies:
            arguments, judged = self.arguments, self.judged[name]
            self._accuracies[name] = accuracy_of(arguments, arguments.classifier, name, judged, self.ranks)
        if self.ranks.rank != 0:
            return {}
        figures = self._accuracies[name]
        note = f"{figures['real_images']:,} images that have a label there" if kind else words_of(figures)
        return figures | {"top1": figures[f"{kind}top1"], "top5": figures[f"{kind}top5"], "note": note}


def content(text: str | bytes) -> str:
    """The sha256 of a text."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


@contextmanager
def judged_sets(arguments: argparse.Namespace, val: Index, ranks: Ranks) -> Iterator[dict[str, Judging]]:
    """The sets of the document's section accuracy by name, for as long as the block lasts. For every rank.

    Raises:
        DataError: images or classes that the model can't be judged by.
    """
    section, model = arguments.suite.accuracy, arguments.classifier
    with ExitStack() as stack:
        judged: dict[str, Judging] = {}
        if section and model and (section.val or section.real):
            named, real = f"data.val = {val.root}", section.real
            judged["val"] = ranks.first_then_all(lambda: judging(model, val, named, real=real))
        for name, each in (section.sets if section and model else {}).items():
            index, named = stack.enter_context(opened(each.images, ranks)), f"accuracy.sets.{name}"
            judged[name] = ranks.first_then_all(
                lambda index=index, named=named, each=each: judging(model, index, named, each.classes)
            )
        yield judged


def note_of(figures: dict[str, Any]) -> str:
    """What the table says behind a figure."""
    if "draws" in figures:
        (name,) = figures.keys() & ACCURACIES
        return "draws: " + ", ".join(f"{draw[name]:.2f}" for draw in figures["draws"])
    notes = []
    if "solver" in figures:
        norm = ", batch norm" if figures.get("batch_norm") else ""
        notes.append("logistic regression" if figures["solver"] == "lbfgs" else f"SGD{norm}")
    if "learning_rate" in figures:
        tried = len(figures["held_out_accuracy_percent"])
        best = "one" if level(figures) else "the best"
        notes.append(f"learning rate {figures['learning_rate']:g}, {best} of {tried}")
    return ", ".join(notes)


def basis_of(suite: Suite) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all figures depend on, and what the table says of it."""
    from timm.data import resolve_model_data_config

    from mapet_ds.results.stored_features import identity

    arguments, sets = suite.arguments, suite.sets
    settings = {"--exif_orientation": arguments.exif_orientation}
    settings["the evaluation transform"] = resolve_model_data_config(suite.model)
    names = {name: PurePath(getattr(sets, name).named.split("\n")[0]).name for name in ("train", "val")}
    counts = {f"{name}_images": len(getattr(sets, name)) for name in ("train", "val")}
    about = {"model": str(arguments.model), **names, **counts, "classes": len(sets.train.classes)}
    return identity(suite.model, sets.train, sets.val, settings), about


def measure(suite: Suite, folder: Path, results: Any) -> None:
    """Measures what is missing, a row at a time, and writes results and table. Every rank must call it.

    results: the Results of rank 0.

    Raises:
        ConfigError: some rows are there by other settings, or there are too few labels for one.
    """
    suite.check_numbers()
    rows = dict(suite.rows())
    wanted = {name: row.settings for name, row in rows.items()}
    first = suite.ranks.rank == 0
    missing = suite.ranks.from_first(lambda: results.missing(wanted))
    if first and len(missing) < len(rows):
        print(f"{results.file} has {len(rows) - len(missing)} of {len(rows)} rows already.", flush=True)
    for number, name in enumerate(missing, 1):
        figures = rows[name].measure()
        if first:
            results.add(name, wanted[name], figures, [*rows])
            write_tables(suite, folder, results.content)
            print(f"{number} of {len(missing)}: {name}: {figures['top1']:.2f} %", flush=True)
    if first:
        print(f"\n{write_tables(suite, folder, results.content)}", end="", flush=True)


def write_tables(suite: Suite, folder: Path, content: dict[str, Any]) -> str:
    """Writes table.md and, for a folder of tools/export_timm.py or finetune.py, its card; gives the table."""
    from mapet_ds.results.card import write_evaluation
    from mapet_ds.results.suite import table

    text, model = table(content), suite.arguments.model
    write_whole(folder / "table.md", text)
    if (model / "config.json").is_file():
        write_evaluation(model, suite.model.pretrained_cfg.get("architecture", model.name), text)
    return text


def evaluate_suite(arguments: argparse.Namespace) -> None:
    """Measures what the suite names of --model; what --out has already is not done again.

    Raises:
        ConfigError: it holds results of other things; or what is asked for can't be had.
        DataError: images or lists that can't be judged by.
    """
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.probe import device_of, load_timm
    from mapet_ds.results.suite import FILE, Results

    arguments.device = device_of(arguments.device)
    model, folder = build_model(arguments), arguments.out
    arguments.classifier = None
    if arguments.suite.accuracy:
        with contextlib.suppress(ConfigError):  # build_model has read the weights: only a head can be missing
            with_head = load_timm(arguments.model, arguments.arch, classify=True)
            arguments.classifier = with_head if with_head.num_classes else None
    arguments.features = arguments.features or folder / "features.safetensors"
    ranks = init_distributed()._replace(device=arguments.device)
    try:
        if arguments.suite.accuracy and not arguments.classifier and ranks.rank == 0:
            sentence = f"{arguments.model} has no classifier: the suite's `accuracy` is left out."
            print(sentence, file=sys.stderr, flush=True)
        if ranks.world_size > 1 and arguments.suite.attentive:
            raise ConfigError(
                f"The suite's attentive probe runs in one process, not in {ranks.world_size}: leave torchrun "
                "out, or measure it later, attentive=null now."
            )
        with labelled_sets(arguments, ranks) as sets, judged_sets(arguments, sets.val, ranks) as judged:
            suite = Suite(arguments, model, sets, judged, ranks)
            basis, about = basis_of(suite)
            folder.mkdir(parents=True, exist_ok=True)
            results = ranks.from_first(lambda: Results(folder / FILE, basis, about))
            measure(suite, folder, results)
    finally:
        dist.destroy_process_group()
