"""The house's rules that a machine can check, so that growth is a decision."""

import ast
import json
import re
import subprocess
import sys

import pytest

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.knobs import known_keys
from mapet_ds.config.sections import REPOSITORY, Config
from mapet_ds.config.segment import SegmentationConfig

PACKAGE = sorted((REPOSITORY / "mapet_ds").rglob("*.py"))
PROGRAMS = sorted((REPOSITORY / "tools").rglob("*.py"))
FLOORS = [
    {"errors", "draws", "launchers", "files", "terminal"},
    {"launch", "weights", "nearest", "blocks"},
    {"config"},
    {"data", "vit"},
    {"objectives"},
    {"targets"},
    {"methods"},
    {"training"},
    {"results", "planning"},
    {"task"},
    {"run", "finetuning", "segmentation", "detection"},
    {"pretrain", "__main__", "library"},
    {"__init__"},
]
"""Rooms from the ground up: one imports from its own floor and those below."""
LINES = {
    "config": 2450,  # every knob with its meaning, contradictions as sentences, DeepSpeed, documents, masks
    "data": 3710,  # six formats, one rule of pixels; folders, shards, Parquet, a cache; order, DALI, labels
    "objectives": 920,  # seven methods, and what they share
    "targets": 1600,  # a frozen tower spread over ranks, VQ-KD, DALL-E, the codebook, stored ids, momentum
    "training": 1780,  # DeepSpeed, its workarounds, what it gathers checked; checkpoints, metrics, jumps
    "finetuning": 630,
    "segmentation": 1450,  # masks read and refused, augmentation, heads, BatchNorm, windows, a program
    "detection": 130,  # a pyramid on an export, for torchvision's Mask R-CNN
    "results": 3255,  # export and its proof, cards, foreign weights, probes, features, accuracy, pages
    "planning": 1780,  # counts on real modules, a cluster's arithmetic, the bound by FLOPs, equal work
    "story": 2580,  # the files beside the rooms: pretrain, run, task, draws, vit, launch, weights, ...
    "tools": 6475,  # sixteen programs, the benchmarks, the trial of a new machine, a study's runs
}
"""Lines that each room may have, docstrings and all. More of them need a line in CHANGELOG."""
HOMES = {
    "deepspeed": {"training.engine"},
    "nvidia": {"data.loader"},
    "open_clip": {"targets.towers"},
    "faiss": {"nearest"},
    "tensorboard": {"training.metrics"},
    "pyarrow": {"data.parquet"},
    "torchmetrics": set(),  # of the tests alone
    "wandb": {"training.trackers"},
    "mlflow": {"training.trackers"},
    "trackio": {"training.trackers"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from whole if node.module == "mapet_ds" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def module(path):
    return ".".join(path.relative_to(REPOSITORY / "mapet_ds").with_suffix("").parts)


def room(path):
    return module(path).partition(".")[0]


def test_budgets():
    lines = dict.fromkeys(LINES, 0)
    for path in PACKAGE + PROGRAMS:
        count = len(path.read_text().splitlines())
        assert count <= 400, path
        place = "tools" if path in PROGRAMS else room(path)
        lines[place if place in LINES else "story"] += count
    assert {name: count for name, count in lines.items() if count > LINES[name]} == {}
    shared = [key for key in known_keys(Config) if key.partition(".")[0] not in Config().objectives]
    assert len(shared) <= 81, "an objective of one's own brings its knobs along"
    assert len(set(known_keys(FinetuneConfig)) - set(known_keys(Config))) <= 18
    assert len(set(known_keys(SegmentationConfig)) - {*known_keys(Config), *known_keys(FinetuneConfig)}) <= 20


@pytest.mark.parametrize("path", PACKAGE + PROGRAMS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_functions_are_short_and_nothing_catches_everything(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and getattr(node.type, "id", "") not in (
                "Exception",
                "BaseException",
            )


def test_imports_run_one_way():
    floor = {name: i for i, rooms in enumerate(FLOORS) for name in rooms}
    arrows = [
        (room(path), name.split(".")[1])
        for path in PACKAGE
        for name in imports(path)
        if name.startswith("mapet_ds.") and name != "mapet_ds.__version__"
    ]
    assert {(a, b) for a, b in arrows if floor[b] > floor[a]} == set()
    both = set(arrows) & {(b, a) for a, b in arrows if a != b}
    assert both == set(), "two rooms that import each other"


def test_what_loader_workers_import_knows_neither_torch_nor_dali():
    names = ["config.sections", "config.rules", "config.recipe", "draws"]
    names += [f"data.{name}" for name in ("formats", "index", "samples", "batch", "stored_ids")]
    script = f"import sys, json; [__import__(f'mapet_ds.{{name}}') for name in {names}]; "
    script += "print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert {"mapet_ds", "numpy"} <= loaded
    assert loaded & {"torch", "nvidia", "deepspeed", "open_clip", "timm", "faiss"} == set()


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library):
    users = {module(path) for path in PACKAGE if any(library in name.split(".") for name in imports(path))}
    assert users == HOMES[library]


def test_the_readme_is_short_and_prose_is_narrow():
    assert len((REPOSITORY / "README.md").read_text().split()) <= 1300
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        prose = [line for line in text.splitlines() if not line.startswith(("|", "    ", "![", "#"))]
        assert [line for line in prose if len(line) > 100] == [], path.name


def test_shipped_commands_name_files_that_exist():
    """Every path of the repository that a document or recipe names is there."""
    documents = [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").glob("*.md"),
        *(REPOSITORY / "mapet_ds/recipes").glob("*.yaml"),
        *(REPOSITORY / "mapet_ds/studies").glob("*.yaml"),
        *(REPOSITORY / "mapet_ds/suites").glob("*.yaml"),
    ]
    pattern = re.compile(
        r"(?<![\w/.])(?:mapet_ds|tools|ds_configs|slurm|tests|docs)/[\w./-]+\.(?:py|yaml|json|sh|md)\b"
    )
    named = {match for path in documents for match in pattern.findall(path.read_text())}
    assert len(named) > 20
    missing = [name for name in sorted(named) if not (REPOSITORY / name).exists()]
    assert missing == []
