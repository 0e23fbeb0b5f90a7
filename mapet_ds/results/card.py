"""The card of an exported model, and its way to Hugging Face's hub.

A card names data, teacher and weights by the last part of their paths: nothing of the machine's folders leaves it.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from mapet_ds.config.sections import TIMM, Config, total_steps
from mapet_ds.errors import ConfigError

FILES = ("README.md", "config.json", "model.safetensors")
"""What an export consists of."""
CARD = """---
{metadata}
---
# {architecture}.{objective}

A Vision Transformer, {architecture} at {size} px, pre-trained without labels by the objective `{objective}` of mapet_ds. It has no
classifier: it gives features, or is fine-tuned.

```python
import timm
model = timm.create_model("hf-hub:{repository}", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

A folder of these files loads as `local-dir:FOLDER`.

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
    """The last part of a path; what is none stays."""
    return PurePath(value).name if isinstance(value, str) and not value.startswith(TIMM) else value


def _provenance(run: dict[str, Any], config: Config) -> dict[str, Any]:
    """What the weights came from, in words by name."""
    identity, model = run.get("identity", {}), config.model
    images, steps = run.get("images"), f"{run['step']}"
    if images:
        steps += f" of {total_steps(config, images)}"
    rows = {
        "steps": steps,
        "images per step": config.train.global_batch_size,
        "data": f"{f'{images} images, ' if images else ''}`{_last(config.data.train)}`",
        "fingerprint of the data": identity.get("data.fingerprint"),
        "began from": _last(model.init_from) or "fresh weights",
        "sha256 of these": identity.get("init_from.sha256"),
    }
    if teacher := identity.get("target.teacher.sha256"):
        named = config.teacher.name.startswith("local-dir:")
        rows |= {
            "teacher": f"{_last(config.teacher.name)}{'' if named else f', {_last(config.teacher.weights)}'}",
            "sha256 of the teacher": teacher,
        }
    if config.method.predicts_ids:
        rows["tokenizer"] = f"{config.tokenizer.name}, {config.tokenizer.vocab_size} ids"
        rows["sha256 of the codebook"] = identity.get("target.codebook") or identity.get("target.sha256")
    rows["sha256 of the checkpoint"] = run["files"]["model.safetensors"]
    rows["versions"] = ", ".join(
        f"{name} {version}" for name, version in sorted(run.get("versions", {}).items())
    )
    return {name: value for name, value in rows.items() if value not in (None, "")}


def model_card(
    run: dict[str, Any],
    config: Config,
    which: str,
    difference: float,
    license: str | None = None,
    repository: str | None = None,
) -> str:
    """README.md of an export, in the hub's format.

    run: run.json of the checkpoint; which: of its ViTs, student or momentum teacher; difference: as measured by the export;
    license: as the hub names it; repository: USER/NAME.
    """
    rows = {
        "weights": which,
        **_provenance(run, config),
        "largest difference of timm's features to the run's": f"{difference:.3g}",
    }
    settings = {
        key: value
        for key, value in run.get("identity", {}).items()
        if not key.startswith(("target.", "init_from."))
    }
    settings |= {"model.init_from": _last(config.model.init_from)}
    began = config.model.init_from or ""
    metadata = ModelCardData(
        library_name="timm",
        license=license,
        pipeline_tag="image-feature-extraction",
        tags=["timm", "image-feature-extraction", "self-supervised", config.objective],
        base_model=f"timm/{began.removeprefix(TIMM)}" if began.startswith(TIMM) else None,
    )
    return CARD.format(
        metadata=metadata.to_yaml(),
        architecture=config.model.name,
        objective=config.objective,
        size=config.model.img_size,
        repository=repository or "USER/NAME",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        settings=yaml.safe_dump(settings, sort_keys=False, default_flow_style=None),
        license=license or "Not stated. That of the data and of the teacher may matter.",
    )


def check_hub(repository: str) -> None:
    """Refuse a name that the hub has not, and a push without a token, before any work.

    Raises:
        ConfigError: with what to do.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {repository}: the hub names models USER/NAME: {error}") from error
    if "/" not in repository:
        raise ConfigError(f"--push_to_hub {repository}: the hub names models USER/NAME; the user is missing.")
    if get_token() is None:
        raise ConfigError(
            "--push_to_hub needs a token that may write: `hf auth login` asks for one, or set HF_TOKEN."
        )


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Upload an export, replacing what the repository has of its files; gives its address.

    Raises:
        ConfigError: the hub can't be reached, or refuses.
    """
    api = HfApi(library_name="mapet_ds")
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Export of mapet_ds",
        )
    except (HTTPError, OSError) as error:
        says = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{folder} was exported, but not pushed to {repository}: {says}. The same command tries again; `hf auth whoami` says "
            "who you are there."
        ) from error
    return str(url)
