"""The loader of pre-training, the only import of DALI: two normalised views of one crop of each image.

The views of student and teacher show the same crop, flipped alike. Colours are jittered in the student's view
only, and changed in the teacher's where it asks for a strong one.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from nvidia import dali
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch, Draw, DrawsAhead, View, to_device
from mapet_ds.data.formats import BadImage, inspect
from mapet_ds.data.index import Index
from mapet_ds.data.orientation import orientation_alone
from mapet_ds.data.samples import JITTER_NUMBERS, STRONG_VALUES, SampleSource, Unreadable
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.launch import use_gpu

fn: Any = dali.fn  # DALI makes operators and constants when it is imported; its stubs know few of them
types: Any = dali.types
logger = logging.getLogger(__name__)
ALONE_LIMIT = 10
"""Number of micro-batches in a row that may fail in the pipeline and succeed alone on the CPU."""


def _jitter(image: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any = 0.0) -> Any:
    """Changes colours by factors of brightness, contrast and saturation, and by a turn of the hue in degrees.

    Deviations from torchvision's ColorJitter: the order is fixed (hue and saturation, contrast, brightness),
    contrast turns about middle grey instead of the image's own mean, hue is turned in YIQ instead of HSV, and
    there is one rounding, at the end.
    """
    return fn.color_twist(image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


def _strengthen(
    image: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any, sigma: Any, solarize: Any
) -> Any:
    """Changes colours for a strong view, by six values: jitter or grey, then blur, then solarisation.

    Deviations from torchvision and Pillow, beside those of `_jitter`: grey is a saturation of 0, so it comes
    before contrast and brightness instead of after; the blur is a Gaussian cut at three sigmas instead of
    three boxes.
    """
    image = _jitter(image, brightness, contrast, saturation, hue)
    image = fn.gaussian_blur(image, sigma=sigma)
    solarized = fn.cast(image >= (solarize.gpu() if image.device == "gpu" else solarize), dtype=types.UINT8)
    return image ^ solarized * types.Constant(255, types.UINT8)  # pixel ^ 255 is 255 - pixel


def _define(
    source: SampleSource, device: str, student: View | None, teacher: View | None, parallel: bool
) -> list[Any]:
    """DALI's graph: decodes the crop once, resizes it to each view, changes its colours, normalises."""
    jitter, strong = JITTER_NUMBERS * source.jitter, STRONG_VALUES * source.strong
    data, anchor, shape, mirror, index, *colours = fn.external_source(
        source=source, num_outputs=5 + jitter + strong, batch=False, parallel=parallel
    )
    crop = fn.decoders.image_slice(
        data, anchor, shape, axes=[0, 1], normalized_anchor=False, normalized_shape=False,
        device="mixed" if device == "gpu" else "cpu", output_type=types.RGB,
        adjust_orientation=source.config.data.exif_orientation,
        jpeg_fancy_upsampling=True,  # on a GPU, chroma as the CPU upsamples it
    )  # fmt: skip

    def render(view: View, recolour: Callable[..., Any], values: list[Any]) -> Any:
        image = fn.resize(crop, size=[view.size, view.size], interp_type=types.INTERP_CUBIC, antialias=True)
        if values:
            image = recolour(image, *values)
        mean, std = [255 * m for m in view.mean], [255 * s for s in view.std]
        return fn.crop_mirror_normalize(
            image, mirror=mirror, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW"
        )

    views = [render(student, _jitter, colours[:jitter])] if student else []
    views += [render(teacher, _strengthen, colours[jitter:])] if teacher else []
    return [*views, index]


@functools.lru_cache(maxsize=2)
def _judge(upright: bool) -> dali.Pipeline:
    """The pipeline that decodes one image with DALI's CPU decoder."""
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        data = fn.external_source(name="data", batch=True)
        pipeline.set_outputs(fn.decoders.image(data, output_type=types.RGB, adjust_orientation=upright))
    return pipeline


def check_decodes(data: bytes, upright: bool = False) -> None:
    """Decodes a whole image alone with DALI's CPU decoder, which decides whether it is readable.

    upright: as for `inspect`.

    Raises:
        BadImage: the decoder or `inspect` refuses it.
    """
    width, height = inspect(data, upright)
    data = orientation_alone(data) if upright else data
    try:
        outputs: Any = _judge(upright).run(data=[np.frombuffer(data, np.uint8)])
        decoded = outputs[0].at(0).shape
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

    Ranks, workers and threads change nothing in the batches. An unreadable image is replaced, remembered and
    reported by `new_bad`; those in `bad` are replaced without being read.
    """

    def __init__(
        self, config: Config, index: Index, *, student: bool, teacher: View | None, rank: int,
        world_size: int, local_rank: int, first_step: int = 0, bad: Collection[int] = (),
        in_order: bool = False, draw: Callable[[int, int, int], Draw] | None = None,
    ) -> None:  # fmt: skip
        """Starts the pipeline and its workers. Every rank builds its own loader.

        student: whether the batches have the student's view.
        teacher: the teacher's view; None for none.
        bad: places in the index of images known to be unreadable.
        in_order: the index's order instead of the run's.
        draw: makes the draw of each micro-batch, ahead of it, in a thread.

        Raises:
            ConfigError: data.device = gpu on a host without one.
        """
        gpu, data = use_gpu(), config.data
        if data.device == "gpu" and not gpu:
            raise ConfigError(
                "data.device = gpu, but torch sees no GPU on this host; set data.device=cpu or auto."
            )
        on_gpu = gpu and data.device != "cpu"
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        self._config, self._index, self._ranks, self._in_order = config, index, (rank, world_size), in_order
        self._student = View(config.model.img_size, data.mean, data.std) if student else None
        self._teacher = teacher
        self._bad = Unreadable(config, index, bad)
        self._micro_step = first_step * config.grad_accum_steps(world_size)
        self._alone = 0
        self._draws = None
        if draw:
            places = (config.place(n, rank, world_size) for n in itertools.count(self._micro_step))
            self._draws = DrawsAhead(draw, places, config.train.micro_batch_size, data.prefetch)
        self._build(self._micro_step)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """Gives the next micro-batch, on a GPU in the order of torch's stream. The host doesn't wait for it.

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
        """(place in the index, reason) of the images that this rank found unreadable since the last call."""
        return self._bad.take()

    def close(self) -> None:
        """Ends the workers and frees the pipeline's memory."""
        self._pipeline = None
        if self._draws:
            self._draws.close()
        self._index.close()

    def _pipeline_of(self, device: str, workers: int, prefetch: int) -> dali.Pipeline:
        data = self._config.data
        pipeline = dali.Pipeline(
            batch_size=self._config.train.micro_batch_size, num_threads=data.threads,
            device_id=self.device.index if device == "gpu" else None, prefetch_queue_depth=prefetch,
            py_num_workers=max(workers, 1), py_start_method="spawn",
        )  # fmt: skip
        with pipeline:
            pipeline.set_outputs(*_define(self._source, device, self._student, self._teacher, workers > 0))
        pipeline.build()
        return pipeline

    def _build(self, micro_step: int) -> None:
        """Starts the pipeline from a micro-batch on, also after one that failed."""
        self._pipeline: dali.Pipeline | None = None  # ends the workers of the one before
        jitter = self._student is not None and self._config.data.color_jitter > 0
        strong = self._teacher is not None and self._teacher.strong
        self._source = SampleSource(
            self._config, self._index, *self._ranks, micro_step, self._bad, jitter, strong, self._in_order
        )  # fmt: skip
        data, device = self._config.data, "gpu" if self.device.type == "cuda" else "cpu"
        self._pipeline = self._pipeline_of(device, data.workers, data.prefetch)

    def _run(self) -> tuple[Any, ...]:
        """Runs the pipeline for the micro-batch that is due, until it has no image that can't be decoded."""
        stream = [torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []
        while True:
            assert self._pipeline is not None, "closed"
            try:
                outputs = self._pipeline.run(*stream)
                _refuse_placeholders(outputs)
                self._alone = 0
                return outputs
            except RuntimeError as error:
                undecodable = self._undecodable()
                if not undecodable:
                    return self._run_alone(error)
                self._bad.add(undecodable.items())
                self._build(self._micro_step)

    def _run_alone(self, error: RuntimeError) -> tuple[Any, ...]:
        """Reads the micro-batch that is due here and decodes it on the CPU.

        The CPU's decoder refuses none of its images. So the GPU's did, or the storage failed for a moment.

        Raises:
            DataError: this happened too often in a row. Something else is broken, and going on would be slow.
        """
        self._alone += 1
        if self._alone > ALONE_LIMIT:
            raise DataError(
                f"DALI failed on {self._alone} micro-batches in a row in whose images the CPU's decoder "
                f"finds nothing wrong: {str(error).splitlines()[0]} If it is the GPU's decoder, "
                "data.device=cpu goes on without it."
            ) from error
        reason = str(error).splitlines()[0]
        logger.warning("Micro-batch %d is done again on the CPU: %s", self._micro_step, reason)
        self._pipeline = None  # ends its workers; the source is used anew from here
        self._source.first_micro_step = self._micro_step
        outputs = self._pipeline_of("cpu", workers=0, prefetch=1).run()
        _refuse_placeholders(outputs)
        self._build(self._micro_step + 1)
        return outputs

    def _undecodable(self) -> dict[int, str]:
        """Index and reason of the samples that the CPU's decoder refuses in the micro-batch that is due.

        Raises:
            DataError: the source met it and could not raise it through DALI.
        """
        refused = {}
        for place in range(self._config.train.micro_batch_size):
            sample = self._source.sample(self._micro_step, place)
            try:
                check_decodes(sample.data, self._config.data.exif_orientation)
            except BadImage as reason:
                refused[sample.index] = str(reason)
        return refused

    def _note_replaced(self, passed_over: list[int]) -> None:
        """Remembers the images that the source passed over, and why.

        Workers hand over samples only, so each of these images is read once more for its reason.
        """
        reasons = {}
        for place in np.flatnonzero(passed_over).tolist():
            for passed in self._source.passed_over(self._micro_step, place, passed_over[place]):
                if passed not in self._bad:
                    try:
                        inspect(self._index.read(passed), self._config.data.exif_orientation)
                        reasons[passed] = "was unreadable when its turn came"
                    except BadImage as reason:
                        reasons[passed] = str(reason)
        self._bad.add(reasons.items())

    def _to_torch(self, view: Any) -> Tensor:
        images = torch.from_dlpack(view.as_tensor())
        if images.device != self.device:
            return to_device(images, self.device)
        # On a GPU a copy is memory that torch's streams know.
        return images.clone() if images.is_cuda else images
