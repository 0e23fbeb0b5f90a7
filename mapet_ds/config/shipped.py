"""What comes with the package, by name from any folder: recipes, DeepSpeed JSONs, programs."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE.parent if (PACKAGE.parent / "ds_configs").is_dir() else PACKAGE / "shipped"
"""The folder of ds_configs, slurm and tools: the repository, or within an installed package."""
RECIPES = PACKAGE / "recipes"
STUDIES = PACKAGE / "studies"
SUITES = PACKAGE / "suites"
ENGINES = SHIPPED / "ds_configs"


def shipped_file(path: str | Path, folder: Path) -> Path:
    """The file at `path`, or where none is there the shipped one of that name.

    So mapet_vitb16 and mapet_ds/recipes/mapet_vitb16.yaml are found from any folder, as is zero2.
    """
    path, suffix = Path(path), ".json" if folder == ENGINES else ".yaml"
    there = (folder / path.name).with_suffix(suffix)
    folders = ("", "mapet_ds/recipes", "mapet_ds/studies", "mapet_ds/suites", "ds_configs")
    shipped = path.parent in map(Path, folders)
    return there if shipped and not path.exists() and there.is_file() else path


def shipped_names(folder: Path) -> list[str]:
    """The names by which shipped_file knows the files of a folder."""
    return sorted(path.stem for path in folder.iterdir() if path.suffix in (".json", ".yaml"))
