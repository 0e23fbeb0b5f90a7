"""The site shows every page and name, and its links lead somewhere. A build of it: make site."""

import importlib.util
import posixpath
import re

import pytest
import yaml

import mapet_ds
from mapet_ds.config.sections import REPOSITORY


def load_hook():
    spec = importlib.util.spec_from_file_location("site_hook", REPOSITORY / "docs/site.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


HOOK = load_hook()
DOCUMENTS = sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("docs/*.md"))
OUTSIDE = {*HOOK.PAGES.values(), *HOOK.NOTEBOOKS, "names.md"}
SITE = {path.removeprefix("docs/") for path in DOCUMENTS} | OUTSIDE


def places(nav):
    """The pages of a navigation, in order."""
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else places(value)


def test_the_navigation_has_every_page_once():
    text = re.sub(r"!!python\S+", "", (REPOSITORY / "mkdocs.yml").read_text())
    named = list(places(yaml.safe_load(text)["nav"]))
    assert sorted(named) == sorted(SITE)
    assert len(named) > 20


@pytest.mark.parametrize("page", [*DOCUMENTS, *HOOK.PAGES])
def test_links_lead_to_pages_of_the_site(page):
    """Anchors are those of GitHub, which test_readme.py tries."""
    text = HOOK.site_links((REPOSITORY / page).read_text(), page)
    pictures = {path.name for path in REPOSITORY.glob("docs/*.png")}
    links = {target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target}
    assert {link for link in links if posixpath.normpath(link) not in SITE | pictures} == set()
    assert not re.search(r"^```\w+ ", text, re.M), "a fence that the site can't read"


def test_a_link_to_what_the_site_has_not_stays_for_the_strict_build_to_refuse():
    text = "[a](../tools/plan.py), [b](../README.md#map), [c](data.md#folders), [d](https://timm.fast.ai)"
    kept = "[a](../tools/plan.py), [b](index.md#map), [c](data.md#folders), [d](https://timm.fast.ai)"
    assert HOOK.site_links(text, "docs/faq.md") == kept


def test_the_page_of_names_has_all_of_them():
    names = re.findall(r"^::: mapet_ds\.(\w+)$", HOOK.names_page(), re.M)
    assert sorted([*names, "__version__"]) == sorted(mapet_ds.__all__)
