"""The house's rules that a machine can check, so that growth is a decision."""

import ast
import re

import pytest

from mapet_ds.config import REPOSITORY
from mapet_ds.finetune_config import FinetuneConfig
from mapet_ds.recipe import known_keys

PACKAGE = sorted((REPOSITORY / "mapet_ds").rglob("*.py"))
PROGRAMS = sorted((REPOSITORY / "tools").glob("*.py"))
LAYERS = [
    {"config", "finetune_config", "knobs", "objective_config", "ids", "recipe", "checks", "draws", "formats", "optim"},
    {"vit", "metrics", "index", "samples", "launch"}, {"data", "labelled", "engine"},
    {"teacher", "tokenizer", "vqkd", "objectives", "targets"}, {"checkpoint", "export", "published", "probe", "hub", "watchdog"},
    {"init_from", "spikes", "quarantine", "classifier", "online_probe", "report"}, {"run", "pretrain", "finetune", "planning"},
]  # fmt: skip
HOMES = {
    "deepspeed": {"engine"}, "nvidia": {"data"}, "open_clip": {"teacher"}, "faiss": {"tokenizer", "probe"},
    "tensorboard": {"metrics"},
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"mapet_ds.{a.name}" for a in node.names] if node.module == "mapet_ds" else [node.module])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(path):
    return path.relative_to(REPOSITORY / "mapet_ds").parts[0].removesuffix(".py")


def test_budgets():
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE}
    assert sum(lines.values()) <= 9120
    assert max(lines.values()) <= 400
    assert len(known_keys()) <= 91
    assert len(set(known_keys(FinetuneConfig)) - set(known_keys())) <= 15
    for path in PACKAGE + PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
            if isinstance(node, ast.ExceptHandler):
                assert getattr(node.type, "id", "") not in ("Exception", "BaseException"), path.name
                assert node.type is not None, path.name


def test_imports_run_one_way():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in PACKAGE:
        if room(path) == "__init__":
            continue
        for name in imports(path):
            if name.startswith("mapet_ds."):
                target = name.split(".")[1]
                assert level[target] <= level[room(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library):
    users = {room(path) for path in PACKAGE if any(library in name.split(".") for name in imports(path))}
    assert users <= HOMES[library]


def test_shipped_commands_name_files_that_exist():
    """Every path of the repository that a document or recipe names is there."""
    documents = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "mapet_ds/recipes").glob("*.yaml")]
    pattern = re.compile(r"(?<![\w/.])(?:mapet_ds|tools|ds_configs|slurm|tests|docs)/[\w./-]+\.(?:py|yaml|json|sh|md)\b")
    named = {match for path in documents for match in pattern.findall(path.read_text())}
    assert len(named) > 20
    missing = [name for name in sorted(named) if not (REPOSITORY / name).exists()]
    assert missing == []
