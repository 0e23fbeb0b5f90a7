"""The card of an exported model, and the upload of the export to Hugging Face's hub.

A card names data, teacher and weights by the last part of their paths, so that it tells nothing of the
machine.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from mapet_ds.config.running import total_steps
from mapet_ds.config.sections import TIMM, Config
from mapet_ds.errors import ConfigError
from mapet_ds.files import write_whole
from mapet_ds.results.features import WORDS

FILES = ("README.md", "config.json", "model.safetensors")
"""The files of an export."""
BEGIN = "<!-- tools/evaluate.py suite writes what follows, up to its end. -->"
END = "<!-- The evaluation ends here. -->"
CARD = """---
{metadata}
---
# {architecture}.{name}

A Vision Transformer, {architecture} at {size} px, pre-trained by the objective `{objective}` of mapet_ds.
{labels} It has no classifier: it gives features, or is fine-tuned.

```python
import timm
model = timm.create_model("hf-hub:{repository}", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

Its features come after the final norm:

```python
tokens = model.forward_features(images)  # [B, class token and patches, width]
token = tokens[:, 0]  # the class token, which model(images) gives, too
mean = tokens[:, model.num_prefix_tokens :].mean(1)  # of the patches
```

Figures of mapet_ds for this objective are of the {feature}, where they name no other.

A folder of these files loads as `local-dir:FOLDER`, and by transformers' `AutoModel.from_pretrained`.

| | |
|---|---|
{rows}

## Settings

```yaml
{settings}```

## License

{license}
"""


def _last(value: Any) -> Any:
    """The last part of a path; other values stay."""
    return PurePath(value).name if isinstance(value, str) and not value.startswith(TIMM) else value


def _provenance(run: dict[str, Any], config: Config) -> dict[str, Any]:
    """The origin of the weights, in words by name."""
    identity, model = run.get("identity", {}), config.model
    images, steps = run.get("images"), f"{run['step']}"
    if images:
        steps += f" of {total_steps(config, images)}"
    data = f"`{_last(config.data.train)}`"
    rows = {
        "steps": steps,
        "images per step": config.train.global_batch_size,
        "data": f"{images} images, {data}" if images else data,
        "EXIF orientation": "applied" if config.data.exif_orientation else "ignored: pixels as stored",
        "fingerprint of the data": identity.get("data.fingerprint"),
        "began from": _last(model.init_from) or "fresh weights",
        "sha256 of these": identity.get("init_from.sha256"),
    }
    if teacher := identity.get("target.teacher.sha256"):
        rows["teacher"] = _last(config.teacher.name)
        if not config.teacher.name.startswith("local-dir:"):
            rows["teacher"] += f", {_last(config.teacher.weights)}"
        rows["sha256 of the teacher"] = teacher
    if config.method.predicts_ids:
        rows["tokenizer"] = f"{config.tokenizer.name}, {config.tokenizer.vocab_size} ids"
        rows["sha256 of the codebook"] = identity.get("target.codebook") or identity.get("target.sha256")
    rows["sha256 of the checkpoint"] = run["files"]["model.safetensors"]
    rows["versions"] = ", ".join(
        f"{name} {version}" for name, version in sorted(run.get("versions", {}).items())
    )
    return {name: value for name, value in rows.items() if value not in (None, "")}


def _labels(rows: dict[str, Any], config: Config) -> str:
    """A sentence about labels, as far as the run knows."""
    sources = ["its teacher"] if "teacher" in rows else ["its tokenizer"] if "tokenizer" in rows else []
    sources += ["the weights that it began from"] if config.model.init_from else []
    if not sources:
        return "No labels took part."
    return (
        f"Its images' labels took no part; what {' and '.join(sources)} had seen, labels or captions, is not "
        "known here beyond the table below."
    )


def model_card(
    run: dict[str, Any], config: Config, which: str, difference: float, license: str | None = None,
    repository: str | None = None,
) -> str:  # fmt: skip
    """The README.md of an export, in the hub's format.

    run: run.json of the checkpoint. which: "student" or "momentum teacher", the ViT that was exported.
    difference: as the export measured it. license: as the hub names it. repository: USER/NAME.
    """
    rows = {"weights": which, **_provenance(run, config)}
    rows["largest difference of timm's features to the run's"] = f"{difference:.3g}"
    origins, identity = ("target.", "init_from."), run.get("identity", {})
    settings = {key: value for key, value in identity.items() if not key.startswith(origins)}
    settings["model.init_from"] = _last(config.model.init_from)
    began, task = config.model.init_from or "", "image-feature-extraction"
    metadata = ModelCardData(
        library_name="timm", license=license, pipeline_tag=task,
        tags=["timm", task, "self-supervised", config.objective_name],
        base_model=f"timm/{began.removeprefix(TIMM)}" if began.startswith(TIMM) else None,
    )  # fmt: skip
    return CARD.format(
        metadata=metadata.to_yaml(),
        architecture=config.model.name,
        name=config.objective_name,
        labels=_labels(rows, config),
        objective=config.objective,
        size=config.model.img_size,
        feature=WORDS[config.method.feature],
        repository=repository or "USER/NAME",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        settings=yaml.safe_dump(settings, sort_keys=False, default_flow_style=None),
        license=license or "Not stated. That of the data and of the teacher may matter.",
    )


def with_evaluation(card: str, table: str) -> str:
    """A card with this table, in the place of an earlier one, before the settings, or at the end."""
    section = f"{BEGIN}\n## Evaluation\n\n{table}{END}\n"
    before, there, rest = card.partition(BEGIN)
    if there:
        return before + section + rest.partition(f"{END}\n")[2]
    before, settings, rest = card.partition("## Settings\n")
    return f"{before.rstrip()}\n\n{section}" + (f"\n{settings}{rest}" if settings else "")


def write_evaluation(folder: Path, architecture: str, table: str) -> None:
    """Puts a table into the README.md of an exported model, which is begun where there is none.

    Raises:
        OSError: the storage fails.
    """
    file = folder / "README.md"
    card = file.read_text() if file.is_file() else f"---\nlibrary_name: timm\n---\n# {architecture}\n"
    write_whole(file, with_evaluation(card, table))


def check_hub(repository: str) -> None:
    """Refuses a name that the hub can't have, or a push without a token, by a ConfigError before any work."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {repository}: the hub names models USER/NAME: {error}") from error
    if "/" not in repository:
        raise ConfigError(f"--push_to_hub {repository}: the hub names models USER/NAME; the user is missing.")
    if get_token() is None:
        cure = "`hf auth login` asks for one, or set HF_TOKEN"
        raise ConfigError(f"--push_to_hub needs a token that may write: {cure}.")


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Uploads an export in place of the files that the repository has of these names; gives its address.

    Raises:
        ConfigError: the hub can't be reached, or refuses.
    """
    api = HfApi(library_name="mapet_ds")
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, allow_patterns=list(FILES),
            commit_message="Export of mapet_ds",
        )  # fmt: skip
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{folder} was exported, but not pushed to {repository}: {reason}. The same command tries again; "
            "`hf auth whoami` says who you are there."
        ) from error
    return str(url)
