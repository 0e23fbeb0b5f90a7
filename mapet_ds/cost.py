"""What a recipe costs, by arithmetic: parameters, FLOPs and bytes of student and target.

Per image unless said otherwise. A FLOP is half a multiply-add; element-wise work is not counted. Imports neither torch nor
open_clip. tests/test_cost.py holds every count against the real modules.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from mapet_ds.config.sections import LOGITS, Config, ModelConfig, TeacherConfig
from mapet_ds.config.towers import teacher_layers, teacher_model_config
from mapet_ds.errors import ConfigError

SIZES = {
    # timm's vit_NAME: width, depth, heads, hidden width of the MLP over the width
    "tiny": (192, 12, 3, 4.0), "small": (384, 12, 6, 4.0), "base": (768, 12, 12, 4.0), "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0), "giant": (1408, 40, 16, 48 / 11), "gigantic": (1664, 48, 16, 64 / 13),
}  # fmt: skip
FP32 = 4


class Vit(NamedTuple):
    """Sizes of a plain ViT."""

    width: int
    depth: int
    heads: int
    mlp: int
    prefix: int
    """Class and register tokens."""


class Block(NamedTuple):
    """Rows of one transformer block."""

    vit: Vit
    inputs: int
    """Rows that come in."""
    rows: int
    """Rows that are updated, each with a query."""
    keys: int
    """Rows that serve as keys and values."""
    pairs: int
    """Row and key pairs that attention computes."""
    attended: int
    """Those that the mask allows: what cannot be left out."""
    banded: bool = True
    """Attention by vit.Band, whose outputs are joined by a copy."""

    def parts(self, pairs: int) -> dict[str, int]:
        width, mlp = self.vit.width, self.vit.mlp
        return {
            "qkv": 2 * width**2 * (self.rows + 2 * self.keys), "attention": 4 * width * pairs,
            "proj": 2 * width**2 * self.rows, "mlp": 4 * self.rows * width * mlp,
        }  # fmt: skip

    def flops(self, pairs: int) -> int:
        return sum(self.parts(pairs).values())

    def saved(self, size: int, layer_scale: bool) -> int:
        """Bytes that eager mode keeps for the backward pass, which makes the MLP's activation anew; size: bytes of a number."""
        width, mlp, copied = self.vit.width, self.vit.mlp, self.keys if self.keys < self.inputs else 0
        per_row = (
            5 + self.banded + 2 * layer_scale
        )  # norm1, q, output (joined), residual, norm2; inputs of both LayerScales
        numbers = (self.inputs + copied + 2 * self.keys + per_row * self.rows) * width + self.rows * mlp
        return size * numbers + FP32 * self.rows * self.vit.heads


class Linear(NamedTuple):
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


class Student(NamedTuple):
    """What is trained, per image where it depends on images."""

    parameters: int
    """Trainable ones."""
    constants: int
    """Parameters without gradient."""
    embedding: int
    """FLOPs of the patch projection."""
    blocks: list[Block]
    head: list[Linear]
    matching: int
    """FLOPs of products with a target that takes no gradient."""
    head_saved: int
    """Bytes that final norm, head and loss keep for the backward pass."""
    head_peak: int
    """Bytes that the loss's backward pass needs on top."""
    embedding_saved: int
    size: int
    """Bytes of a number in the forward pass."""

    @property
    def forward(self) -> int:
        return (
            self.embedding
            + sum(block.flops(block.pairs) for block in self.blocks)
            + self._heads
            + self.matching
        )

    @property
    def parts(self) -> dict[str, int]:
        """FLOPs of a forward and a backward pass; the images and the target take no gradient."""
        found = {"embedding": 2 * self.embedding, "head": 3 * self._heads + 2 * self.matching}
        for block in self.blocks:
            for name, count in block.parts(block.pairs).items():
                found[name] = found.get(name, 0) + 3 * count
        return found

    @property
    def flops(self) -> int:
        return sum(self.parts.values())

    @property
    def minimum(self) -> int:
        """The same with attended pairs alone. No last block updates a row that the loss does not read."""
        blocks = sum(block.flops(block.attended) for block in self.blocks)
        return 3 * (blocks + self._heads) + 2 * (self.embedding + self.matching)

    @property
    def recomputed(self) -> int:
        """FLOPs that train.grad_checkpointing adds."""
        return sum(block.flops(block.pairs) for block in self.blocks)

    @property
    def _heads(self) -> int:
        return sum(linear.flops for linear in self.head)

    def activations(self, config: Config) -> int:
        """Bytes at the peak of forward and backward, in eager mode; torch.compile keeps up to an eighth less.

        The peak is where the loss's gradient is made, or where a block's is, recomputed or not.
        """
        recompute, scale, size = (
            config.train.grad_checkpointing,
            config.model.layer_scale is not None,
            self.size,
        )
        whole = [block.saved(size, scale) for block in self.blocks]
        kept = [size * block.inputs * block.vit.width for block in self.blocks] if recompute else whole
        held = self.embedding_saved + sum(kept) + self.head_saved + self.head_peak
        gradients = [size * block.rows * 2 * (block.vit.width + block.vit.mlp) for block in self.blocks]
        before = [self.embedding_saved + sum(kept[:i]) for i in range(len(kept))]
        return max(held, *(sum(parts) for parts in zip(before, whole, gradients)))


def vit_of(model: ModelConfig) -> Vit:
    """Sizes of the student by its timm name and model.args.

    Raises:
        ConfigError: a name or an argument whose sizes are not known here.
    """
    known = {"depth", "embed_dim", "num_heads", "mlp_ratio", "reg_tokens"}
    match = re.fullmatch(r"vit_([a-z]+)_patch\d+_\d+", model.name)
    if not match or match[1] not in SIZES or not model.args.keys() <= known:
        raise ConfigError(
            f"The costs of model.name = {model.name} with model.args = {model.args} can't be counted: names are "
            f"vit_SIZE_patch16_224 with SIZE of {', '.join(SIZES)}; arguments {', '.join(sorted(known))}."
        )
    width, depth, heads, ratio = SIZES[match[1]]
    width = model.args.get("embed_dim", width)
    mlp = int(width * model.args.get("mlp_ratio", ratio))
    return Vit(
        width,
        model.args.get("depth", depth),
        model.args.get("num_heads", heads),
        mlp,
        1 + model.args.get("reg_tokens", 0),
    )


def _block_parameters(vit: Vit, layer_scale: bool) -> int:
    width, mlp = vit.width, vit.mlp
    return 4 * width**2 + 2 * width * mlp + 9 * width + mlp + 2 * layer_scale * width


def _plain(vit: Vit, rows: int) -> list[Block]:
    return [Block(vit, rows, rows, rows, rows**2, rows**2, banded=False)] * vit.depth


def _mapet_blocks(vit: Vit, patches: int, hidden: int) -> list[Block]:
    """Bands of objectives/mapet.py: [positions, prefix and visible | hidden patches, queries]; the last block's queries alone."""
    seen = (
        vit.prefix + patches - hidden
    )  # and every hidden patch or its position: each row attends to as many
    keys, each = seen + 2 * hidden, seen + hidden
    rows = seen + 3 * hidden
    block = Block(vit, rows, rows, keys, each**2 + 2 * hidden * keys, each**2 + 2 * hidden * each)
    return [block] * (vit.depth - 1) + [Block(vit, rows, hidden, keys, hidden * keys, hidden * each)]


def _saim_blocks(vit: Vit, patches: int, decoder: int) -> list[Block]:
    rows = 1 + patches
    content = Block(vit, rows, rows, rows, rows**2, rows * (rows + 1) // 2)
    query = Block(vit, 2 * patches, patches, patches, patches**2, patches * (patches + 1) // 2)
    return [content] * vit.depth + [query] * decoder


def student(config: Config, size: int = 2) -> Student:
    """The configured objective's student. size: bytes of a number in its forward pass, 2 for bf16.

    Raises:
        ConfigError: a model or teacher whose sizes are not known here.
    """
    vit, patches, hidden = vit_of(config.model), config.num_patches, config.method.num_hidden(config)
    width, rows, pixels = vit.width, vit.prefix + patches, 3 * config.model.patch_size**2
    scale = config.model.layer_scale is not None
    own = (
        (pixels + 1) * width
        + vit.prefix * width
        + rows * width
        + vit.depth * _block_parameters(vit, scale)
        + 2 * width
    )
    constants, matching, dim = 0, 0, target_dim(config)
    blocks = _plain(vit, rows)[1:] + [Block(vit, rows, hidden, rows, hidden * rows, hidden * rows)]
    head = [Linear(hidden, width, dim)]
    extra = width + (width + 1) * dim  # mask token and head
    head_saved = 2 * size * hidden * width
    if config.objective == "mapet":
        blocks = _mapet_blocks(vit, patches, hidden)
    if config.objective in ("mapet", "beit"):
        held = (
            max(1, LOGITS // (hidden * dim)) / config.train.micro_batch_size
        )  # share whose logits are there at once
        head_peak = round(3 * FP32 * hidden * dim * min(1, held))  # log-softmax; two gradients
    elif config.objective == "mvp":
        head_saved, head_peak = head_saved + 2 * FP32 * hidden * dim, 2 * FP32 * hidden * dim
    elif config.objective == "saim":
        decoder = config.saim.query_depth or vit.depth
        blocks = _saim_blocks(vit, patches, decoder)
        constants = rows * width
        own += decoder * _block_parameters(vit, scale) - constants
        head = [Linear(patches, width, 4 * width), Linear(patches, 4 * width, dim)]
        extra = sum((linear.inputs + 1) * linear.outputs for linear in head)
        head_saved = patches * (10 * size * width + 2 * FP32 * dim)
        head_peak = 2 * FP32 * patches * dim
    elif config.objective == "conmim":
        inner = config.conmim.projector_dim
        blocks, matching = _plain(vit, rows), 2 * hidden * patches * dim  # BatchNorm sees all rows
        head = [Linear(rows, width, inner), Linear(rows, inner, inner), Linear(rows, inner, dim)]
        extra = width + 4 * inner + sum(linear.inputs * linear.outputs for linear in head)
        head_saved = rows * (2 * size * width + inner * 2 * (3 * FP32 + size) + 5 * FP32 * dim)
        head_peak = 2 * FP32 * rows * inner
    else:
        raise ConfigError(
            f"The costs of objective = {config.objective} can't be counted: its terms are not in mapet_ds/cost.py."
        )
    embedding_saved = size * (pixels + width) * patches
    own += extra
    embedding = 2 * patches * pixels * width
    return Student(
        own, constants, embedding, blocks, head, matching, head_saved, head_peak, embedding_saved, size
    )


class Tower(NamedTuple):
    """A frozen open_clip image tower, or VQ-KD's encoder."""

    parameters: int
    """Without attention pooling, which is never run."""
    weights: int
    """Bytes, norms and their statistics in fp32."""
    flops: int
    """Of a forward pass to the layer in use."""
    working: int
    """Bytes at the peak of that forward pass."""
    dim: int
    """Width of its features."""


def tower(teacher: TeacherConfig, size: int = 2) -> Tower:
    """The teacher at its image size. size: bytes of a number.

    Raises:
        ConfigError: no such model, or one that is neither open_clip's ResNet nor its plain ViT.
    """
    model = teacher_model_config(teacher.name)
    vision = {key: value for key, value in model["vision_cfg"].items() if value is not None}
    if isinstance(vision.get("layers"), list):
        return _resnet(vision, teacher, size)
    known = {
        "image_size",
        "layers",
        "width",
        "patch_size",
        "head_width",
        "mlp_ratio",
        "timm_model_pretrained",
    }
    if unknown := sorted(vision.keys() - known):
        raise ConfigError(
            f"The costs of teacher.name = {teacher.name} can't be counted, only those of open_clip's ResNets and plain ViTs: "
            f"it has {', '.join(unknown)}."
        )
    return _clip_vit(vision, teacher, model["embed_dim"], size)


def _resnet(vision: dict[str, Any], teacher: TeacherConfig, size: int) -> Tower:
    """open_clip's ModifiedResNet: three convolutions and a pooling, then bottlenecks that pool before they stride."""
    width, side, last = (
        vision.get("width", 64),
        teacher.img_size // 2,
        teacher.layer % teacher_layers(teacher),
    )
    convolutions = [(3, width // 2, 3, side), (width // 2, width // 2, 3, side), (width // 2, width, 3, side)]
    stages, inputs, side = [convolutions], width, side // 2
    for number, depth in enumerate(vision["layers"]):
        planes, convolutions = width * 2**number, []
        for turn in range(depth):
            inner = side  # the pooling comes after the 3 x 3 convolution
            if turn == 0 and number:
                side //= 2
            convolutions += [
                (inputs, planes, 1, inner),
                (planes, planes, 3, inner),
                (planes, 4 * planes, 1, side),
            ]
            if turn == 0:
                convolutions.append((inputs, 4 * planes, 1, side))
            inputs = 4 * planes
        stages.append(convolutions)
    every = [layer for stage in stages for layer in stage]
    weights = sum(i * o * kernel**2 for i, o, kernel, _ in every)
    channels = sum(o for _, o, _, _ in every)
    run = [layer for stage in stages[: last + 1] for layer in stage]
    flops = sum(2 * i * o * kernel**2 * at**2 for i, o, kernel, at in run)
    largest = max(o * at**2 for _, o, _, at in run)
    working = size * (3 * teacher.img_size**2 + 7 * largest // 2)
    return Tower(
        weights + 2 * channels, size * weights + 4 * FP32 * channels, flops, working, stages[last][-1][1]
    )


def _clip_vit(vision: dict[str, Any], teacher: TeacherConfig, embed_dim: int, size: int) -> Tower:
    width, depth, patch = vision["width"], vision["layers"], vision["patch_size"]
    vit = Vit(
        width, depth, width // vision.get("head_width", 64), int(width * vision.get("mlp_ratio", 4.0)), 1
    )
    patches = (teacher.img_size // patch) ** 2
    rows, projected = 1 + patches, teacher.features == "projected"
    matrices = 3 * patch**2 * width + width * (1 + rows) + width * embed_dim
    matrices += depth * (_block_parameters(vit, False) - 4 * width)
    norms = (4 + 4 * depth) * width
    blocks = _plain(vit, rows)[: teacher.layer % depth + 1]
    flops = 6 * patches * patch**2 * width + sum(block.flops(block.pairs) for block in blocks)
    flops += 2 * patches * width * embed_dim * projected
    working = size * (3 * teacher.img_size**2 + rows * (4 * width + 3 * vit.mlp))
    dim = embed_dim if projected else width
    return Tower(matrices + norms, size * matrices + FP32 * norms, flops, working, dim)


def target_dim(config: Config) -> int:
    """What the target has for each patch: number of ids, or width of a vector."""
    if config.method.predicts_ids:
        return config.tokenizer.vocab_size
    if config.method.uses_teacher(config):
        return tower(config.teacher).dim
    return 256 if config.objective == "conmim" else 3 * config.model.patch_size**2


class Target(NamedTuple):
    """What computing the target costs."""

    flops: int
    """In the teacher's precision."""
    fp32_flops: int
    """In full fp32."""
    sharded: int
    """Bytes of weights that teacher.shard spreads over ranks."""
    whole: int
    """Bytes that every rank holds."""
    working: int
    """Bytes per image at the peak, while the student's activations do not exist yet."""
    output: int
    """Bytes per image that the student's pass keeps."""
    tf32_flops: int = 0
    """In TF32: of an assignment to centroids in two parts."""
    counted: bool = True
    """False: a tokenizer of the user's own, whose costs are not known and taken as nothing."""


def target(config: Config, size: int = 2) -> Target:
    """The configured objective's target. size: bytes of a number in its forward pass.

    Raises:
        ConfigError: a teacher whose sizes are not known here.
    """
    patches, codes = config.num_patches, config.tokenizer.vocab_size
    if config.method.predicts_ids and config.tokenizer.ids:
        return Target(0, 0, 0, 0, 0, 8 * patches)
    if config.method.predicts_ids and config.tokenizer.name == "vqkd":
        vit = Vit(768, 12, 12, 3072, 1)  # the published encoder, in fp32, to 32 numbers a patch
        encoder = sum(block.flops(block.pairs) for block in _plain(vit, 1 + patches))
        encoder += 2 * patches * (768 * 768 + 768 * 32 + 768 * 768)
        weights = FP32 * (12 * _block_parameters(vit, False) + 3 * 16**2 * 768 + 2 * (1 + patches) * 768)
        working = FP32 * (1 + patches) * (4 * vit.width + 3 * vit.mlp)
        return Target(
            0, encoder + 2 * patches * codes * 32, 0, weights + FP32 * codes * 32, working, 8 * patches
        )
    if config.method.uses_teacher(config):
        clip = tower(config.teacher, size)
        features = size * patches * clip.dim
        if not config.method.predicts_ids:
            return Target(clip.flops, 0, clip.weights, 0, clip.working + features, features)
        assign = 2 * patches * codes * clip.dim
        split = size == 2  # Codebook.assign
        book = (
            FP32 * codes * clip.dim * (1 + 2 * split) + 2**28 + FP32 * 2**26 // codes * clip.dim
        )  # and a chunk's scores and rows
        costs = clip.flops, 0 if split else assign, clip.weights, book, clip.working + features, 8 * patches
        return Target(*costs, tf32_flops=2 * assign * split)
    if config.objective == "conmim":
        model = student(config)
        rows, inner = model.blocks[0].rows, config.conmim.projector_dim
        working = rows * (size * 10 * model.blocks[0].vit.width + 3 * FP32 * inner)
        whole = FP32 * model.parameters + size * model.parameters  # and autocast's copies
        return Target(model.forward - model.matching, 0, 0, whole, working, FP32 * patches * 256)
    pixels = FP32 * patches * target_dim(config)
    return Target(
        0,
        0,
        0,
        0,
        3 * pixels if config.objective == "saim" else 0,
        pixels,
        counted=config.objective == "saim",
    )
