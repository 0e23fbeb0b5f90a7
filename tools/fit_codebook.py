"""Fit the k-CLIP codebook of a recipe: its teacher's features of its crops of its images, clustered by FAISS.

    deepspeed tools/fit_codebook.py --config mapet_ds/recipes/mapet_vitb16.yaml
        data.train=/data/imagenet/train tokenizer.path=/runs/codebook.safetensors

torchrun and plain python start it too. All ranks compute features; the first one clusters them, on the GPUs of its node if
there are any. The index of the images is kept beside the codebook, in <tokenizer.path>.index/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_inputs
from mapet_ds.config.sections import Config
from mapet_ds.errors import ConfigError
from mapet_ds.launchers import ancestors, check_hostfile
from mapet_ds.training.command_line import refuse


def parse(argv: list[str]) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="a recipe, e.g. mapet_ds/recipes/mapet_vitb16.yaml"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the codebook at tokenizer.path")
    parser.add_argument(
        "--is_needed",
        action="store_true",
        help="fit nothing; exit with 0 if this recipe needs a codebook, else 1",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's"
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.is_needed:
            tokenizer = config.tokenizer
            parser.exit(not (config.method.predicts_ids and tokenizer.name == "kclip" and not tokenizer.ids))
        check_hostfile(ancestors())
        check_inputs(config)
        if config.tokenizer.name != "kclip":
            raise ConfigError(
                f"tokenizer.name = {config.tokenizer.name} has no codebook to fit; only kclip has."
            )
        if not config.tokenizer.path:
            raise ConfigError(
                "tokenizer.path is empty: name the file to write, tokenizer.path=/runs/codebook.safetensors."
            )
        if Path(config.tokenizer.path).is_dir():
            raise ConfigError(
                f"tokenizer.path = {config.tokenizer.path} is a folder; name a file in it, codebook.safetensors."
            )
        if Path(config.tokenizer.path).exists() and not arguments.overwrite:
            raise ConfigError(
                f"tokenizer.path = {config.tokenizer.path} exists, and runs may rest on it: name another file, or say "
                "--overwrite."
            )
        return config
    except ConfigError as error:
        refuse(parser, error)


def fit_codebook(config: Config) -> None:
    """Every rank calls it; rank 0 writes tokenizer.path and prints what became of it."""
    import torch.distributed as dist

    from mapet_ds.data.index import open_index
    from mapet_ds.launch import init_distributed
    from mapet_ds.targets.codebook import source_of
    from mapet_ds.targets.fitting import fit, num_points, sample_features
    from mapet_ds.targets.teacher import build_teacher

    ranks = init_distributed()
    index = ranks.first_then_all(
        lambda: open_index(config.data.train, Path(f"{config.tokenizer.path}.index"))
    )
    points = num_points(len(index), config)
    teacher = build_teacher(config.teacher, ranks.device, config.train.compile)
    teacher.check_grid(config.grid)
    if ranks.rank == 0:
        print(
            f"Teacher {config.teacher.name}: {teacher.local_bytes / 2**20:.1f} MiB of weights on each rank. {points} of "
            f"{len(index) * config.num_patches} patch features of {len(index)} images, {teacher.embed_dim} wide: "
            f"{points * teacher.embed_dim * 4 / 2**20:.1f} MiB on the first rank.",
            flush=True,
        )
    identity, start = teacher.identity, time.monotonic()
    features = sample_features(config, index, teacher, ranks)
    sampled = time.monotonic()
    dist.destroy_process_group()  # the others may leave: clustering can take longer than any timeout
    if features is None:
        return
    del teacher
    codebook = fit(features, config.tokenizer, config.seed, source_of(identity, config.data))
    codebook.save(config.tokenizer.path)
    report = codebook.provenance
    print(
        f"{config.tokenizer.path}: {config.tokenizer.vocab_size} codes, {report['dead_codes']} dead, perplexity "
        f"{float(report['perplexity']):.1f}, inertia {float(report['inertia']):.6g}\n"
        f"features {sampled - start:.1f} s, k-means {time.monotonic() - sampled:.1f} s (FAISS {report['faiss']})"
    )


def main() -> int:
    config = parse(sys.argv[1:])
    from mapet_ds.errors import DataError

    try:
        fit_codebook(config)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
