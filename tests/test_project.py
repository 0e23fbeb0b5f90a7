"""What others read of the project by machine: its citation and the forms of its issues."""

import re
import tomllib

import pytest
import yaml

from mapet_ds import __version__
from mapet_ds.config.sections import REPOSITORY

CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
FORMS = sorted((REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_is_of_this_version_and_licence():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert CITATION["version"] == __version__, "a release changes both: CONTRIBUTING.md"
    assert (CITATION["title"], CITATION["license"]) == (project["name"], project["license"])


def test_the_citation_has_the_papers_of_the_readme():
    sources = (REPOSITORY / "README.md").read_text().partition("## Sources")[2]
    papers = [CITATION["preferred-citation"], *CITATION["references"]]
    cited = [paper["url"].removeprefix("https://arxiv.org/abs/") for paper in papers]
    assert sorted(cited) == sorted(re.findall(r"\b\d{4}\.\d{5}\b", sources))
    assert cited[0] == "2306.07346"


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_the_forms_lead_to_documents_that_exist(form):
    links = re.findall(r"\]\(\.\./blob/main/([^)#]+)(?:#([^)]+))?\)", form.read_text())
    assert links or form.stem == "config"
    for name, anchor in links:
        text = (REPOSITORY / name).read_text()
        headings = [line.lower().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.M)]
        assert not anchor or anchor in headings


def test_a_report_of_a_fault_brings_what_is_needed_to_see_it():
    form = yaml.safe_load((REPOSITORY / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    required = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert {"command", "lines", "environment"} <= required
    labels = [part["attributes"]["label"] for part in form["body"] if "id" in part]
    assert any("environment.json" in label for label in labels)
    assert any("run.json" in label for label in labels)
