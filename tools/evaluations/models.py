"""The model that tools/evaluate.py judges, and the features that are asked of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from mapet_ds.errors import ConfigError

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.


class Asked(NamedTuple):
    """The features that are asked for, of one forward."""

    features: list[str]
    """Each is judged: mean, token, both."""
    layers: list[int] | None
    """Ascending numbers of the blocks; None: the last, where a model is none of blocks."""
    joined: bool
    """The blocks are one feature; otherwise each is judged."""
    kinds: tuple[str, ...]
    """The vectors that are computed of each block."""

    def one_by_one(self) -> Iterator[tuple[str, list[int], str, dict[str, Any]]]:
        """Yields feature and places of its blocks, and both in words and as figures."""
        from mapet_ds.results.features import WORDS

        places = list(range(len(self.layers or [0])))
        for feature in self.features:
            for each in [places] if self.joined else [[place] for place in places]:
                layers = [self.layers[place] for place in each] if self.layers else [None]
                layer = layers if self.joined else layers[0]
                words = WORDS[feature]
                if self.joined or len(places) > 1:
                    words += f" of block {', '.join(map(str, layers))}"
                yield feature, each, words, {"feature": feature, "layer": layer}


def build_model(arguments: argparse.Namespace) -> Any:
    """The model that is judged, on the CPU.

    Raises:
        ConfigError: there is nothing to load.
    """
    from mapet_ds.results.probe import load_timm

    if arguments.teacher:
        from mapet_ds.config.recipe import load_config
        from mapet_ds.results.tokens import teacher_as_vit

        return teacher_as_vit(load_config(arguments.teacher, arguments.overrides).teacher)
    return load_timm(arguments.model, arguments.arch, arguments.untrained, arguments.seed)


def asked_of(arguments: argparse.Namespace, model: Any) -> Asked:
    """The features that the words ask of a model. A file of features gets every kind.

    Raises:
        ConfigError: the model lacks what --feature, --layer or --last asks for.
    """
    from mapet_ds.results.features import FEATURES, judged_feature, kinds_of

    there = kinds_of(model)
    features = list(dict.fromkeys(arguments.feature or [judged_feature(model)]))
    needed = {kind for feature in features for kind in FEATURES[feature]}
    if needed - {*there}:
        raise ConfigError(
            f"--feature {' '.join(features)}: this model has no class token; leave it out, for the mean of "
            "the patch tokens."
        )
    kinds = there if arguments.features else tuple(kind for kind in there if kind in needed)
    if arguments.teacher:
        if arguments.layer or arguments.last:
            raise ConfigError(
                "--layer and --last are for --model; a teacher's is teacher.layer=, as in training."
            )
        return Asked(features, None, False, kinds)

    blocks, layers = len(model.blocks), arguments.layer or [-1]
    if arguments.last:
        layers = range(-arguments.last, 0)
    elif "all" in layers:
        layers = range(blocks)
    for layer in layers:
        if layer not in range(-blocks, blocks):
            option = f"--last {arguments.last}" if arguments.last else f"--layer {layer}"
            raise ConfigError(f"{option}: this model has layers 0 to {blocks - 1}, or -1, ...")
    return Asked(features, sorted({layer % blocks for layer in layers}), bool(arguments.last), kinds)
