"""Batches: from (seed, step, slot) over the index and DALI to two normalised views of one crop. The only import of DALI.

Student and teacher view show the same crop, flipped alike; colours are jittered in the student's view only,
and changed in the teacher's where it asks for a strong one.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch, Draw, DrawsAhead, View
from mapet_ds.data.formats import BadImage, inspect
from mapet_ds.data.index import Index
from mapet_ds.data.samples import JITTER_NUMBERS, STRONG_VALUES, SampleSource, allowed_bad, too_many_bad
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.launch import use_gpu

logger = logging.getLogger(__name__)
ALONE_LIMIT = 10
"""Micro-batches in a row that may fail in the pipeline and succeed alone on the CPU."""


def _jitter(image: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any = 0.0) -> Any:
    """Factors and, in degrees, a turn of the hue.

    Deviations from torchvision's ColorJitter: one fixed order (hue and saturation, contrast, brightness), contrast turns
    about middle grey instead of the image's own mean, hue is turned in YIQ instead of HSV, and there is one rounding, at
    the end.
    """
    return fn.color_twist(image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


def _strengthen(
    image: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any, sigma: Any, solarize: Any
) -> Any:
    """The colours of a strong view: jitter or grey, then blur, then solarisation, from the six values of a sample.

    Deviations from torchvision's and Pillow's, beside those of `_jitter`: grey is a saturation of 0, so it comes before
    contrast and brightness instead of after; the blur is a Gaussian cut at three sigmas instead of three boxes.
    """
    image = _jitter(image, brightness, contrast, saturation, hue)
    image = fn.gaussian_blur(image, sigma=sigma)
    solarized = fn.cast(image >= (solarize.gpu() if image.device == "gpu" else solarize), dtype=types.UINT8)
    return image ^ solarized * types.Constant(255, types.UINT8)  # pixel ^ 255 is 255 - pixel


def _define(
    source: SampleSource, device: str, student: View | None, teacher: View | None, parallel: bool
) -> list[Any]:
    """DALI's graph: decode the crop once, resize it to each view, change its colours, normalise."""
    jitter, strong = JITTER_NUMBERS * source.jitter, STRONG_VALUES * source.strong
    data, anchor, shape, mirror, index, *colours = fn.external_source(
        source=source, num_outputs=5 + jitter + strong, batch=False, parallel=parallel
    )
    crop = fn.decoders.image_slice(
        data, anchor, shape, axes=[0, 1], normalized_anchor=False, normalized_shape=False,
        device="mixed" if device == "gpu" else "cpu", output_type=types.RGB, adjust_orientation=False,
    )  # fmt: skip

    def view(asked: View, recolour: Callable[..., Any], values: list[Any]) -> Any:
        image = fn.resize(crop, size=[asked.size, asked.size], interp_type=types.INTERP_CUBIC, antialias=True)
        if values:
            image = recolour(image, *values)
        return fn.crop_mirror_normalize(
            image, mirror=mirror, mean=[255 * m for m in asked.mean], std=[255 * s for s in asked.std], dtype=types.FLOAT,
            output_layout="CHW",
        )  # fmt: skip

    views = [view(student, _jitter, colours[:jitter])] if student else []
    views += [view(teacher, _strengthen, colours[jitter:])] if teacher else []
    return [*views, index]


@functools.lru_cache(maxsize=1)
def _judge() -> Pipeline:
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        data = fn.external_source(name="data", batch=True)
        pipeline.set_outputs(fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False))
    return pipeline


def check_decodes(data: bytes) -> None:
    """Decode a whole image alone with DALI's CPU decoder, the last word on whether it is readable.

    Raises:
        BadImage: it is refused here or by `inspect`.
    """
    width, height = inspect(data)
    try:
        decoded = _judge().run(data=[np.frombuffer(data, np.uint8)])[0].at(0).shape
    except RuntimeError as error:
        _judge.cache_clear()
        raise BadImage("its structure is whole, but it can't be decoded") from error
    if tuple(decoded[:2]) != (height, width):
        raise BadImage(f"announces {width} x {height} pixels, decodes to {decoded[1]} x {decoded[0]}")


def _refuse_placeholders(outputs: Sequence[Any]) -> None:
    if (np.array(outputs[-1].as_tensor())[:, 0] < 0).any():
        raise RuntimeError("The source could not give a sample.")


class Loader:
    """An endless iterator of micro-batches, in the order of the run from `first_step` on.

    The same batches come whatever the number of ranks, workers and threads. An unreadable image is replaced, remembered
    and reported by `new_bad`; those in `bad` are replaced without being read.
    """

    def __init__(
        self, config: Config, index: Index, *, student: bool, teacher: View | None, rank: int, world_size: int,
        local_rank: int, first_step: int = 0, bad: Collection[int] = (), in_order: bool = False,
        draw: Callable[[int, int, int], Draw] | None = None,
    ) -> None:  # fmt: skip
        """Every rank builds its own.

        teacher: the second view; None for none.
        in_order: the index's order instead of the run's.
        draw: makes the draw of each micro-batch, ahead of it, in a thread.

        Raises:
            ConfigError: data.device = gpu on a host without one.
        """
        gpu = use_gpu()
        if config.data.device == "gpu" and not gpu:
            raise ConfigError(
                "data.device = gpu, but torch sees no GPU on this host; set data.device=cpu or auto."
            )
        self.device = (
            torch.device("cuda", local_rank) if gpu and config.data.device != "cpu" else torch.device("cpu")
        )
        self._config, self._index, self._ranks, self._in_order = config, index, (rank, world_size), in_order
        self._student = View(config.model.img_size, config.data.mean, config.data.std) if student else None
        self._teacher = teacher
        self._bad, self._new_bad = dict.fromkeys(bad, ""), []
        self._micro_step = first_step * config.grad_accum_steps(world_size)
        self._alone = 0
        self._draws = None
        if draw:
            places = (
                config.place(micro_step, rank, world_size) for micro_step in itertools.count(self._micro_step)
            )
            self._draws = DrawsAhead(draw, places, config.train.micro_batch_size, config.data.prefetch)
        self._build(self._micro_step)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch. On a GPU ordered with torch's current stream, without making the host wait for it.

        Raises:
            DataError: the storage fails, or more than data.max_bad_share of the data set is unreadable.
        """
        *views, index = self._run()
        served, passed_over = np.array(index.as_tensor()).T.tolist()
        self._note_replaced(passed_over)
        place = self._config.place(self._micro_step, *self._ranks)
        self._micro_step += 1
        images = [self._to_torch(view) for view in views]
        return Batch(
            images=images[0] if self._student else None,
            teacher_images=images[-1] if self._teacher else None,
            index=torch.tensor(served),
            place=place,
            draw=next(self._draws) if self._draws else None,
        )

    def new_bad(self) -> list[tuple[int, str]]:
        """(index, reason) of the images this rank found unreadable since it was last asked."""
        found, self._new_bad = self._new_bad, []
        return found

    def close(self) -> None:
        """End the workers and give the pipeline's memory back."""
        self._pipeline = self._source = None
        if self._draws:
            self._draws.close()
        self._index.close()

    def _pipeline_of(self, device: str, workers: int, prefetch: int) -> Pipeline:
        data = self._config.data
        pipeline = Pipeline(
            batch_size=self._config.train.micro_batch_size, num_threads=data.threads,
            device_id=self.device.index if device == "gpu" else None, prefetch_queue_depth=prefetch,
            py_num_workers=max(workers, 1), py_start_method="spawn",
        )  # fmt: skip
        with pipeline:
            pipeline.set_outputs(*_define(self._source, device, self._student, self._teacher, workers > 0))
        pipeline.build()
        return pipeline

    def _build(self, micro_step: int) -> None:
        """Start the pipeline, anew after a micro-batch failed."""
        self._pipeline = None
        jitter = self._student is not None and self._config.data.color_jitter > 0
        strong = self._teacher is not None and self._teacher.strong
        self._source = SampleSource(
            self._config, self._index, *self._ranks, micro_step, self._bad, jitter, strong, self._in_order
        )  # fmt: skip
        data, device = self._config.data, "gpu" if self.device.type == "cuda" else "cpu"
        self._pipeline = self._pipeline_of(device, data.workers, data.prefetch)

    def _run(self) -> tuple[Any, ...]:
        while True:
            try:
                outputs = self._pipeline.run(
                    *([torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else [])
                )
                _refuse_placeholders(outputs)
                self._alone = 0
                return outputs
            except RuntimeError as error:
                found = self._undecodable()
                if not found:
                    return self._run_alone(error)
                self._add_bad(found)
                self._build(self._micro_step)

    def _run_alone(self, error: RuntimeError) -> tuple[Any, ...]:
        """The micro-batch that is due, read here and decoded on the CPU: of its images the CPU's decoder refuses none, so
        the GPU's did, or the storage failed for a moment.

        Raises:
            DataError: that was so too often in a row: something else is broken, and going on would only be slow.
        """
        self._alone += 1
        if self._alone > ALONE_LIMIT:
            raise DataError(
                f"DALI failed on {self._alone} micro-batches in a row in whose images the CPU's decoder finds nothing wrong: "
                f"{str(error).splitlines()[0]} If it is the GPU's decoder, data.device=cpu goes on without it."
            ) from error
        logger.warning(
            "Micro-batch %d is done again on the CPU: %s", self._micro_step, str(error).splitlines()[0]
        )
        self._pipeline = None  # ends its workers; the source is used anew from here
        self._source.first_micro_step = self._micro_step
        outputs = self._pipeline_of("cpu", workers=0, prefetch=1).run()
        _refuse_placeholders(outputs)
        self._build(self._micro_step + 1)
        return outputs

    def _undecodable(self) -> dict[int, str]:
        """Index and reason of each sample of the micro-batch that is due which the CPU decoder refuses.

        Raises:
            DataError: the one that the source met and could not raise through DALI.
        """
        found = {}
        for place in range(self._config.train.micro_batch_size):
            sample = self._source.sample(self._micro_step, place)
            try:
                check_decodes(sample.data)
            except BadImage as reason:
                found[sample.index] = str(reason)
        return found

    def _note_replaced(self, passed_over: list[int]) -> None:
        """Remember what the source passed over, and why: workers hand over samples only, so it is read once more."""
        found = {}
        for place in np.flatnonzero(passed_over).tolist():
            for passed in self._source.passed_over(self._micro_step, place, passed_over[place]):
                if passed not in self._bad:
                    try:
                        inspect(self._index.read(passed))
                        found[passed] = "was unreadable when its turn came"
                    except BadImage as reason:
                        found[passed] = str(reason)
        self._add_bad(found)

    def _add_bad(self, found: dict[int, str]) -> None:
        new = {index: reason for index, reason in found.items() if index not in self._bad}
        self._bad |= new
        self._new_bad += new.items()
        if new and len(self._bad) > allowed_bad(self._config, self._index):
            raise too_many_bad(self._config, self._index, [*new, *self._bad])

    def _to_torch(self, view: Any) -> Tensor:
        images = torch.from_dlpack(view.as_tensor())
        if images.device == self.device:
            return (
                images.clone() if images.is_cuda else images
            )  # on a GPU, memory that torch's streams know of
        return images.to(self.device)
