"""Evaluate a timm ViT, or tokenizers, on labelled images; or a ViT on images without labels.

python tools/evaluate.py knn|linear|attentive|all|features --model OUT --train DIR --val DIR
python tools/evaluate.py accuracy --model FINETUNED --images DIR
python tools/evaluate.py suite --suite NAME --model OUT data.train=DIR data.val=DIR
python tools/evaluate.py tokenizer --tokenizer RECIPE [a.b=value ...] [--tokenizer ...] --train DIR --val DIR
python tools/evaluate.py crops --model OUT --images DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from evaluations.accuracy import evaluate_accuracy
from evaluations.attentive import evaluate_attentive
from evaluations.crops import evaluate_crops
from evaluations.figures import described, whose, write_figures
from evaluations.images import Extracted, extract
from evaluations.judges import evaluate_few, evaluate_knn, evaluate_linear, unit
from evaluations.models import Asked, asked_of, build_model
from evaluations.options import parse
from evaluations.suite import evaluate_suite

from mapet_ds.terminal import answer

if TYPE_CHECKING:
    from mapet_ds.config.sections import Config
    from mapet_ds.launch import Ranks

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.


def evaluate_tokenizer(arguments: argparse.Namespace, config: Config, ranks: Ranks) -> dict[str, Any]:
    """A row of the table, on rank 0: a tokenizer's use of its ids, and how well these alone classify."""
    from mapet_ds.results.features import chosen
    from mapet_ds.results.tokens import described, tokenizer_as_vit, usage

    judged, counts, _ = extract(arguments, tokenizer_as_vit(config, ranks.device), None, ("mean",), ranks)
    if ranks.rank != 0:
        return {}
    assert judged
    train, val = (chosen(vectors, "mean", [0]) for vectors in (judged.train, judged.val))
    row = {"tokenizer": described(config), **usage(train, val)}
    for probe in (evaluate_knn, evaluate_linear):
        row |= probe(arguments, unit([train, judged.train_labels, val, judged.val_labels]))[1]
    return row | counts


def evaluate_tokenizers(arguments: argparse.Namespace) -> None:
    """Prints the table, and writes it to --out; on rank 0."""
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.probe import device_of
    from mapet_ds.results.tokens import table

    arguments.device = device_of(arguments.device)
    ranks = init_distributed()._replace(device=arguments.device)
    try:
        rows = [evaluate_tokenizer(arguments, config, ranks) for config in arguments.configs]
    finally:
        dist.destroy_process_group()
    if ranks.rank != 0:
        return
    rows = [row | {"settings": words} for row, words in zip(rows, arguments.tokenizer, strict=True)]
    print(json.dumps(rows) if arguments.json else table(rows))
    write_figures(arguments.out, rows)


def figures_of(
    arguments: argparse.Namespace, asked: Asked, found: Extracted
) -> tuple[list[str], dict[str, Any]]:
    """A sentence for each figure, and the figures: those of the first feature asked for, then of each."""
    from mapet_ds.results.features import chosen

    judged, basis = found.judged, found.counts
    assert judged
    about, basis = described(arguments, basis), basis | whose(arguments)
    if arguments.command == "features":
        kinds = " and ".join(asked.kinds)
        width = judged.train[asked.kinds[0]].shape[-1]
        rows = " and ".join(f"{len(each)}" for each in (judged.train_labels, judged.val_labels))
        sentence = f"{arguments.features}: {kinds}, {width} wide, of {rows} images of --train and --val"
        return [f"{sentence} ({about})"], basis | {
            "features": str(arguments.features),
            "layers": asked.layers,
        }

    sentences, results = [], []
    for feature, places, words, own in asked.one_by_one():
        train, val = (chosen(vectors, feature, places) for vectors in (judged.train, judged.val))
        arrays = [train, judged.train_labels, val, judged.val_labels]
        for few in found.few or [None]:
            if few:
                lines, figures = evaluate_few(arguments, arrays, judged.places, few)
            else:
                lines, figures = arguments.evaluate(arguments, arrays)
            sentences += [f"{line} ({words}; {about})" for line in lines]
            results.append(figures | own)
    several = {"judged": results} if len(results) > 1 else {}
    return sentences, results[0] | basis | several


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the figures that the command asks for, and writes them to --out; on rank 0."""
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.probe import device_of

    arguments.device = device_of(arguments.device)
    model = build_model(arguments)
    asked = asked_of(arguments, model)
    ranks = init_distributed()._replace(device=arguments.device)
    try:
        found = extract(arguments, model, asked.layers, asked.kinds, ranks)
    finally:
        dist.destroy_process_group()
    if ranks.rank != 0:
        return
    sentences, figures = figures_of(arguments, asked, found)
    print(json.dumps(figures) if arguments.json else "\n".join(sentences))
    write_figures(arguments.out, figures)


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    others = {"tokenizer": evaluate_tokenizers, "attentive": evaluate_attentive}
    others |= {"suite": evaluate_suite, "accuracy": evaluate_accuracy, "crops": evaluate_crops}
    writes = words.out if words.command == "suite" else None
    sys.exit(answer(lambda: others.get(words.command, evaluate)(words), writes))
