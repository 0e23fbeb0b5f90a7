"""Fit the k-CLIP codebook of a recipe: its teacher's features of its crops of its images, clustered by FAISS.

    deepspeed tools/fit_codebook.py --config mapet_ds/recipes/mapet_vitb16.yaml
        data.train=/data/imagenet/train tokenizer.path=/runs/codebook.safetensors

torchrun and plain python start it too. All ranks compute features; the first one clusters them, on the GPUs
of its node if there are any. The index of the images is kept beside the codebook, in <tokenizer.path>.index/;
features of more than 8 GiB lie there in a file that has no name and ends with the program.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_inputs
from mapet_ds.config.sections import Config, TokenizerConfig
from mapet_ds.errors import ConfigError
from mapet_ds.launchers import ancestors, check_hostfile
from mapet_ds.terminal import answer, recipe_parser, refuse


def check_output(tokenizer: TokenizerConfig, overwrite: bool) -> None:
    """Refuses a tokenizer without a codebook, and a tokenizer.path that can't become one.

    Raises:
        ConfigError: naming what to change.
    """
    if tokenizer.name != "kclip":
        raise ConfigError(f"tokenizer.name = {tokenizer.name} has no codebook to fit; only kclip has.")
    path = f"tokenizer.path = {tokenizer.path}"
    if not tokenizer.path:
        example = "tokenizer.path=/runs/codebook.safetensors"
        raise ConfigError(f"tokenizer.path is empty: name the file to write, {example}.")
    if Path(tokenizer.path).is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it, codebook.safetensors.")
    if Path(tokenizer.path).exists() and not overwrite:
        raise ConfigError(f"{path} exists, and runs may rest on it: name another file, or say --overwrite.")


def parse(argv: list[str]) -> Config:
    """The checked settings; a mistake ends the program before torch is imported."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--overwrite", action="store_true", help="replace the codebook at tokenizer.path")
    needed = "fit nothing; exit with 0 if this recipe needs a codebook, else 1"
    parser.add_argument("--is_needed", action="store_true", help=needed)
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        tokenizer = config.tokenizer
        if arguments.is_needed:
            parser.exit(not (config.method.predicts_ids and tokenizer.name == "kclip" and not tokenizer.ids))
        check_hostfile(ancestors())
        check_inputs(config)
        check_output(tokenizer, arguments.overwrite)
    except ConfigError as error:
        refuse(parser, error)
    return config


def fit_codebook(config: Config) -> None:
    """Fits the codebook. Every rank calls it; rank 0 writes tokenizer.path and prints what became of it."""
    import torch.distributed as dist

    from mapet_ds.data.index import open_index
    from mapet_ds.data.range_cache import RangeCache
    from mapet_ds.launch import init_distributed
    from mapet_ds.targets.codebook import source_of
    from mapet_ds.targets.fitting import IN_MEMORY, fit, num_points, sample_features
    from mapet_ds.targets.teacher import build_teacher

    ranks, tokenizer = init_distributed(), config.tokenizer
    cache = Path(f"{tokenizer.path}.index")
    ranges = RangeCache.of(config.data)
    index = ranks.first_then_all(lambda: open_index(config.data.train, cache, ranks.rank == 0, ranges))
    points = num_points(len(index), config)
    teacher = build_teacher(config.teacher, ranks.device, config.train.compile)
    teacher.check_grid(config.grid)
    if ranks.rank == 0:
        mib = points * teacher.embed_dim * 4 / 2**20
        where = "in memory" if mib * 2**20 <= IN_MEMORY else f"in a file beside {tokenizer.path}"
        print(
            f"Teacher {config.teacher.name}: {teacher.local_bytes / 2**20:.1f} MiB of weights on each rank. "
            f"{points} of {len(index) * config.num_patches} patch features of {len(index)} images, "
            f"{teacher.embed_dim} wide: {mib:.1f} MiB {where} on the first rank.",
            flush=True,
        )

    # Features, of all ranks. The others may leave then: clustering can take longer than any timeout.
    identity, start = teacher.identity, time.monotonic()
    features = sample_features(config, index, teacher, ranks)
    sampled = time.monotonic()
    dist.destroy_process_group()
    if features is None:
        return
    del teacher

    # The codebook.
    codebook = fit(features, tokenizer, config.seed, source_of(identity, config.data))
    codebook.save(tokenizer.path)
    report = codebook.provenance
    print(
        f"{tokenizer.path}: {tokenizer.vocab_size} codes, {report['dead_codes']} dead, perplexity "
        f"{float(report['perplexity']):.1f}, inertia {float(report['inertia']):.6g}\n"
        f"features {sampled - start:.1f} s, k-means {time.monotonic() - sampled:.1f} s "
        f"(FAISS {report['faiss']})"
    )


if __name__ == "__main__":
    settings = parse(sys.argv[1:])
    sys.exit(answer(lambda: fit_codebook(settings)))
