"""What a survey of a data set says, as lines for the terminal and as one HTML page with examples."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from mapet_ds.data.formats import BadImage
from mapet_ds.data.kinds import EXAMPLES, json_name, summary
from mapet_ds.data.survey import SMALL, Survey

SIDE = 112
"""Of the page's pictures, pixels."""
SHOWN = 12
"""Examples, and classes at each end, that the page shows."""


def _name(survey: Survey, place: int) -> str:
    return json_name(os.path.relpath(survey.index.path(place), survey.index.root))


def _sizes(survey: Survey) -> str:
    looks = survey.looks[survey.readable()]
    spans = []
    for side in ("width", "height"):
        low, middle, high = (int(np.quantile(looks[side], q)) for q in (0, 0.5, 1))
        spans.append(f"{side} {low} to {high} px, median {middle}")
    small = np.count_nonzero(np.minimum(looks["width"], looks["height"]) < SMALL)
    return "; ".join(spans) + (f"; {small:,} with a side below {SMALL} px" if small else "")


def _classes(survey: Survey) -> str:
    counts, names = survey.by_class(), survey.index.classes
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] == counts[most]:
        return f"{len(names):,} of {counts[least]:,} images each"
    text = f"{len(names):,}, from {counts[least]:,} images ({json_name(names[least])}) "
    return f"{text}to {counts[most]:,} ({json_name(names[most])})"


def _facts(survey: Survey) -> Iterator[tuple[str, str]]:
    """Yields what a survey says of one data set, each with its title."""
    index, formats = survey.index, survey.formats()
    yield "Images", f"{len(index):,}"
    if index.passed_over:
        yield "Passed over", summary(index.passed_over)
    if index.noted:
        yield "To note", summary(index.noted, EXAMPLES)
    if formats:
        yield "Formats", ", ".join(f"{len(places):,} {name}" for name, places in formats.items())
        yield "Sizes", _sizes(survey)
    if index.classes:
        yield "Classes", _classes(survey)
    if repeated := survey.duplicates():
        (place, first), number = repeated[0], f"{len(repeated):,} images have the bytes of another one"
        yield "Duplicates", f"{number}, e.g. {_name(survey, place)} those of {_name(survey, first)}"
    yield "Unreadable", f"{len(survey.bad)} of {len(index)}"


def _between(train: Survey, val: Survey) -> Iterator[tuple[str, str]]:
    """Yields what two data sets have to do with each other."""
    shared = val.shared(train)
    text = f"{len(shared):,} of {len(val.index):,}"
    if shared:
        text += f", e.g. {_name(val, shared[0][0])} as {_name(train, shared[0][1])}"
    yield "Images of --val whose bytes are in the first, too", text
    if differing := sorted({*train.index.classes} ^ {*val.index.classes}):
        yield "Classes in only one", ", ".join(map(json_name, differing[:SHOWN]))


def sentences(train: Survey, val: Survey | None) -> Iterator[str]:
    """Yields the lines about a data set, and one beside it."""
    for survey in filter(None, (train, val)):
        yield f"{survey.index.root}"
        yield from (f"  {title}: {text}." for title, text in _facts(survey))
    if val:
        yield from (f"{title}: {text}." for title, text in _between(train, val))


def _picture(read: Any, caption: str) -> dict[str, str]:
    """A small picture as a data URI; without one, where the bytes are none that Pillow knows."""
    try:
        with Image.open(io.BytesIO(read())) as image:
            image = image.convert("RGB")
            image.thumbnail((SIDE, SIDE))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=80)
            source = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    except (OSError, SyntaxError, ValueError, BadImage, Image.DecompressionBombError):
        source = ""
    return {"source": source, "caption": caption}


def _pictures(survey: Survey, places: Iterable[int], captions: Iterable[str] = ()) -> list[dict[str, str]]:
    shown = [int(place) for place in places][:SHOWN]
    texts = [*captions][:SHOWN] or [_name(survey, place) for place in shown]
    return [_picture(lambda place=place: survey.index.read(place), text) for place, text in zip(shown, texts)]


def _examples(survey: Survey) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yields rows of pictures of one data set, each with its title."""
    for name, places in survey.formats().items():
        evenly = places[np.linspace(0, len(places) - 1, min(SHOWN, len(places))).astype(int)]
        yield name, _pictures(survey, evenly)
    readable = survey.readable()
    pixels = survey.looks["width"][readable].astype(np.int64) * survey.looks["height"][readable]
    order = readable[np.argsort(pixels, kind="stable")]
    both = [*order[: SHOWN // 2], *order[SHOWN // 2 :][-SHOWN // 2 :]]
    sizes = [f"{survey.looks['width'][i]} x {survey.looks['height'][i]}" for i in both]
    yield "The smallest and the largest", _pictures(survey, both, sizes)
    if classes := survey.index.classes:
        counts, labels = survey.by_class(), survey.index.labels()
        order = np.argsort(counts, kind="stable")
        ends = [*order[: SHOWN // 2], *order[SHOWN // 2 :][-SHOWN // 2 :]]
        ends = [i for i in ends if counts[i]]
        firsts = [int(np.argmax(labels == i)) for i in ends]
        yield (
            "Classes with the fewest and the most",
            _pictures(survey, firsts, [f"{json_name(classes[i])}: {counts[i]:,}" for i in ends]),
        )
    if repeated := survey.duplicates():
        texts = [f"{_name(survey, i)} = {_name(survey, j)}" for i, j in repeated]
        yield "The same bytes as another image", _pictures(survey, [i for i, _ in repeated], texts)
    if survey.bad:
        texts = [f"{_name(survey, i)}: {reason}" for i, reason in survey.bad.items()]
        yield "Unreadable", _pictures(survey, survey.bad, texts)
    passed = survey.index.passed_over
    if passed:
        root = Path(survey.index.root)
        yield (
            "Passed over",
            [
                _picture((root / example).read_bytes, f"{count:,} {kind}: {json_name(example)}")
                for kind, (count, example, *_) in passed.items()
            ],
        )


def render(train: Survey, val: Survey | None) -> str:
    """The page about a data set, and one beside it. It needs no other file."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    sets = [(str(each.index.root), [*_facts(each)], [*_examples(each)]) for each in (train, val) if each]
    between = [*_between(train, val)] if val else []
    return environment.get_template("dataset.html").render(sets=sets, between=between, side=SIDE)
