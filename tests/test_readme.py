"""The documents name programs, options, recipes, settings and places that exist."""

import re
import shlex
import subprocess
import sys

import pytest

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.knobs import known_keys
from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY, Config
from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.config.study import StudyConfig
from mapet_ds.config.suite import SuiteConfig

DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
SHOWN = (
    "README.md",
    "docs/results.md",
    "docs/segmentation.md",
    "docs/data.md",
    "docs/cluster.md",
    "docs/faq.md",
    "docs/tutorial.md",
)
"""Documents whose commands are tried."""


def commands(name):
    """Each command of the shell blocks of a document, as words; test_tutorial.py runs the tutorial's `sh`."""
    text = (REPOSITORY / name).read_text()
    blocks = [
        code
        for language, code in re.findall(r"^```([\w ]*)\n(.*?)^```", text, re.M | re.S)
        if language in ("", "sh gpu")
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    program = re.compile(r"(\w+=\S+ )*(make|python|deepspeed|torchrun|sbatch) ")
    return [shlex.split(line, comments=True) for line in lines if program.match(line)]


COMMANDS = [words for name in SHOWN for words in commands(name)]


def test_there_are_commands():
    programs = {word for words in COMMANDS for word in words if word.endswith((".py", ".sh"))}
    assert {
        "mapet_ds/pretrain.py",
        "tools/fit_codebook.py",
        "tools/export_timm.py",
        "tools/evaluate.py",
    } <= programs
    assert "slurm/pretrain_vitl.sh" in programs


@pytest.mark.parametrize(
    "words", [w for w in COMMANDS if "--config" in w], ids=lambda words: " ".join(words)[:60]
)
def test_recipe_commands_load(words):
    settings = {"tools/finetune.py": FinetuneConfig, "tools/segment.py": SegmentationConfig}
    settings = next((settings[word] for word in words if word in settings), Config)
    overrides = [w for w in words if re.match(r"[a-z_.]+=", w)]
    config = load_config(words[words.index("--config") + 1], overrides, settings)
    assert config.data.train or "tools/plan.py" in words  # a plan reads no image
    if "--deepspeed_config" in words:
        load_deepspeed_config(words[words.index("--deepspeed_config") + 1])


PROGRAMS = sorted(
    {word for words in COMMANDS for word in words if word.startswith("tools/") and word.endswith(".py")}
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_know_the_options_that_the_documents_give_them(program):
    uses = [words[words.index(program) + 1 :] for words in COMMANDS if program in words]
    for probe in {words[0] for words in uses} if program == "tools/evaluate.py" else {""}:
        arguments = [program, probe, "--help"] if probe else [program, "--help"]
        done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        given = {word for words in uses if probe in ("", words[0]) for word in words if word.startswith("--")}
        assert {option for option in given if option not in done.stdout} == set()


@pytest.mark.parametrize("target", sorted({words[1] for words in COMMANDS if words[0] == "make"}))
def test_make_targets_exist(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert "://" in target or file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_settings_are_knobs(path):
    known = {
        key
        for document in (Config, FinetuneConfig, SegmentationConfig, StudyConfig, SuiteConfig)
        for key in known_keys(document)
    }
    groups = {key.rpartition(".")[0] for key in known} - {""}
    words = [word for span in re.findall(r"`([^`\n]+)`", path.read_text()) for word in span.split()]
    named = {found[1] for word in words if (found := re.fullmatch(r"([a-z_]+\.[a-z_.]+)(=.*)?", word))}
    named = {
        name
        for name in named
        if name.partition(".")[0] in groups and not name.endswith((".safetensors", ".py", ".pt"))
    }
    assert named <= known | groups, named - known


def test_the_makefile_knows_every_objective():
    (words,) = re.findall(r"^OBJECTIVES = (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert sorted(words.split()) == sorted(Config().objectives)
