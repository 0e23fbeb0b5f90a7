"""Slow twins: one row at a time, in raster order, straight from the papers' tables.

They share only weights with the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn


def mapet_visible_keys(
    order: Tensor, num_visible: int, position_tokens: bool = True
) -> dict[tuple[str, int], list[tuple[str, int]]]:
    """For each row of one image, the keys it may attend to, named (kind, patch); patch -1 = class token.

    Kinds: x content, m position token, g query. Source: arXiv 2306.07346, the table of attention masks,
    ranks counted with the class token at rank 0. Without position tokens, nothing is a key but content.
    """
    num_patches = len(order)
    rank = {-1: 0} | {p: int(order[p]) + 1 for p in range(num_patches)}
    border = num_visible + 1
    hidden = [p for p in range(num_patches) if rank[p] >= border]
    visible: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for p in [-1, *range(num_patches)]:
        bound = max(rank[p], border - 1)
        visible["x", p] = [("x", q) for q in rank if rank[q] <= bound] + [
            ("m", q) for q in hidden if rank[q] > bound
        ]
    for p in hidden:
        visible["m", p] = [("x", q) for q in rank if rank[q] < border] + [("m", q) for q in hidden]
        visible["g", p] = [("x", q) for q in rank if rank[q] < rank[p]] + [
            ("m", q) for q in hidden if rank[q] >= rank[p]
        ]
    if not position_tokens:
        visible = {row: [key for key in keys if key[0] == "x"] for row, keys in visible.items()}
    return visible


def _attend(block: nn.Module, query: Tensor, keys: Tensor) -> Tensor:
    """One row [D] over normalised keys [N, D], head by head."""
    attention = block.attn
    width, heads = attention.attn_dim, attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q = F.linear(query, weight[:width], bias[:width]).view(heads, -1)
    k = F.linear(keys, weight[width : 2 * width], bias[width : 2 * width]).view(len(keys), heads, -1)
    v = F.linear(keys, weight[2 * width :], bias[2 * width :]).view(len(keys), heads, -1)
    rows = []
    for h in range(heads):
        share = torch.softmax(k[:, h] @ q[h] * attention.scale, dim=0)
        rows.append(share @ v[:, h])
    return F.linear(torch.cat(rows), attention.proj.weight, attention.proj.bias)


def _kept(drop_path: nn.Module, uniform: Tensor | None) -> Tensor | float:
    if uniform is None:
        return 1.0
    probability = getattr(drop_path, "drop_prob", 0.0)
    return (uniform >= probability).to(uniform.dtype) / (1 - probability)


def mapet_loss(
    model: nn.Module, images: Tensor, ids: Tensor, draw: tuple[Tensor, ...], num_visible: int,
    num_predicted: int, position_tokens: bool = True,
) -> Tensor:  # fmt: skip
    """The MaPeT loss, image by image, row by row."""
    losses = []
    for image, image_ids, order, keep in zip(images, ids, draw.order, draw.keep.double()):
        visible = mapet_visible_keys(order, num_visible, position_tokens)
        asked = [p for p, rank in enumerate(order) if rank >= len(order) - num_predicted]
        losses.append(_mapet_image_loss(model, image, image_ids, visible, asked, keep))
    return torch.stack(losses).mean()


def _mapet_image_loss(
    model: nn.Module, image: Tensor, ids: Tensor, visible: dict, asked: list[int], keep: Tensor
) -> Tensor:
    vit = model.vit
    patches = vit.patch_embed(image[None])[0]
    position = vit.pos_embed[0]
    rows = {("x", -1): vit.cls_token[0, 0] + position[0]}
    for p in range(len(patches)):
        rows["x", p] = patches[p] + position[1 + p]
    for kind, p in visible:
        if kind in "mg":
            rows[kind, p] = model.mask_token[0, 0] + position[1 + p]
    for i, block in enumerate(vit.blocks):
        normed = {name: block.norm1(row) for name, row in rows.items()}
        kept1, kept2 = _kept(block.drop_path1, keep[2 * i]), _kept(block.drop_path2, keep[2 * i + 1])
        after = {}
        for name, row in rows.items():
            keys = torch.stack([normed[key] for key in visible[name]])
            row = row + kept1 * block.ls1(_attend(block, normed[name], keys))
            after[name] = row + kept2 * block.ls2(Mlp.forward(block.mlp, block.norm2(row)))
        rows = after
    losses = []
    for p in asked:
        logits = F.linear(vit.norm(rows["g", p]), model.head.weight, model.head.bias)
        losses.append(torch.logsumexp(logits, 0) - logits[ids[p]])
    return torch.stack(losses).mean()


def _through(block: nn.Module, rows: Tensor, context: list[Tensor], keep: Sequence[Tensor | None]) -> Tensor:
    """Rows [N, D] through a block, the i-th attending to rows context[i] [any, D]; keep: its two uniforms."""
    kept1, kept2 = _kept(block.drop_path1, keep[0]), _kept(block.drop_path2, keep[1])
    after = []
    for row, keys in zip(rows, context):
        row = row + kept1 * block.ls1(_attend(block, block.norm1(row), block.norm1(keys)))
        after.append(row + kept2 * block.ls2(Mlp.forward(block.mlp, block.norm2(row))))
    return torch.stack(after)


def masked_rows(model: nn.Module, image: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
    """[1 + L, D] of one image: mask tokens for hidden patches, all rows attending to all, final norm."""
    vit = model.vit
    if vit.pos_embed is None:
        return relative_rows(model, image, mask, torch.ones(2 * len(vit.blocks)) if keep is None else keep)
    patches, position = vit.patch_embed(image[None])[0], vit.pos_embed[0]
    shown = [model.mask_token[0, 0] if hidden else patch for patch, hidden in zip(patches, mask)]
    rows = torch.stack(
        [vit.cls_token[0, 0] + position[0]] + [row + position[1 + p] for p, row in enumerate(shown)]
    )
    for i, block in enumerate(vit.blocks):
        uniforms = torch.ones(2, dtype=rows.dtype) if keep is None else keep[2 * i : 2 * i + 2]
        if keep is None:
            assert not block.training or isinstance(block.drop_path1, nn.Identity)
        rows = _through(block, rows, [rows] * len(rows), uniforms)
    return vit.norm(rows)


def _bias_by_hand(vit: nn.Module, block: nn.Module, query: int, key: int) -> Tensor:
    """The bias of each head for two patches, -1 being the class token. Source: BEiT, arXiv 2106.08254."""
    grid = vit.patch_embed.grid_size[0]
    where = (2 * grid - 1) ** 2 + {(True, False): 0, (False, True): 1, (True, True): 2}.get(
        (query < 0, key < 0), 0
    )
    if query >= 0 and key >= 0:
        down, right = query // grid - key // grid, query % grid - key % grid
        where = (down + grid - 1) * (2 * grid - 1) + right + grid - 1
    tables = [
        part.relative_position_bias_table for part in (vit.rel_pos_bias, block.attn) if part is not None
    ]
    return sum(table[where] for table in tables if table is not None)


def relative_rows(model: nn.Module, image: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
    """masked_rows of a timm BEiT: pair by pair of rows, head by head."""
    vit, heads = model.vit, model.vit.blocks[0].attn.num_heads
    patches = vit.patch_embed(image[None])[0]
    shown = [model.mask_token[0, 0] if hidden else patch for patch, hidden in zip(patches, mask)]
    rows = [vit.cls_token[0, 0], *shown]
    for i, block in enumerate(vit.blocks):
        attn, kept = (
            block.attn,
            [_kept(block.drop_path1, keep[2 * i]), _kept(block.drop_path2, keep[2 * i + 1])],
        )
        normed, after = torch.stack([block.norm1(row) for row in rows]), []
        q, k, v = (normed @ part.T for part in attn.qkv.weight.chunk(3))
        q, v = q + attn.q_bias, v + attn.v_bias
        q, k, v = (part.unflatten(1, (heads, -1)) for part in (q, k, v))
        for p, row in enumerate(rows):
            bias = torch.stack([_bias_by_hand(vit, block, p - 1, other - 1) for other in range(len(rows))])
            shares = [torch.softmax(k[:, h] @ q[p, h] * attn.scale + bias[:, h], dim=0) for h in range(heads)]
            read = attn.proj(torch.cat([share @ v[:, h] for h, share in enumerate(shares)]))
            row = row + kept[0] * block.gamma_1 * read
            after.append(row + kept[1] * block.gamma_2 * Mlp.forward(block.mlp, block.norm2(row)))
        rows = after
    return vit.norm(torch.stack(rows))


def beit_loss(model: nn.Module, images: Tensor, ids: Tensor, draw: tuple[Tensor, ...]) -> Tensor:
    losses = []
    for image, image_ids, mask, keep in zip(images, ids, draw.mask, draw.keep.double()):
        logits = model.head(masked_rows(model, image, mask, keep)[1:])
        losses.append(
            torch.stack([-torch.log_softmax(logits[p], 0)[image_ids[p]] for p in mask.nonzero()[:, 0]]).mean()
        )
    return torch.stack(losses).mean()


def mvp_loss(model: nn.Module, images: Tensor, features: Tensor, draw: tuple[Tensor, ...]) -> Tensor:
    losses = []
    for image, wanted, mask, keep in zip(images, features, draw.mask, draw.keep.double()):
        found = model.head(masked_rows(model, image, mask, keep)[1:])
        cosines = [found[p] @ wanted[p] / (found[p].norm() * wanted[p].norm()) for p in mask.nonzero()[:, 0]]
        losses.append((1 - torch.stack(cosines)).mean())
    return torch.stack(losses).mean()


def projected(model: nn.Module, rows: list[Tensor], group: int) -> list[Tensor]:
    """ConMIM's projector on rows [N, D] of each image, statistics over each group; vectors of length 1."""
    for layer in model.projector:
        if isinstance(layer, nn.Linear):
            rows = [row @ layer.weight.T for row in rows]
        elif isinstance(layer, nn.ReLU):
            rows = [row.clamp(min=0) for row in rows]
        else:
            if layer.centre:  # what a group has in common at a position
                for first in range(0, len(rows), group):
                    common = sum(rows[first : first + group]) / group
                    rows[first : first + group] = [row - common for row in rows[first : first + group]]
            for first in range(0, len(rows), group):
                together = torch.cat(rows[first : first + group])
                mean = together.sum(0) / len(together)
                deviation = (((together - mean) ** 2).sum(0) / len(together) + 1e-5).sqrt()
                for i in range(first, first + group):
                    rows[i] = (rows[i] - mean) / deviation
                    if layer.weight is not None:
                        rows[i] = rows[i] * layer.weight + layer.bias
    return [row / row.norm(dim=1, keepdim=True) for row in rows]


def conmim_loss(
    model: nn.Module, images: Tensor, keys: Tensor, draw: tuple[Tensor, ...], group: int, tau: float
) -> Tensor:
    rows = [masked_rows(model, *image) for image in zip(images, draw.mask, draw.keep.double())]
    losses = []
    for queries, image_keys, mask in zip(projected(model, rows, group), keys, draw.mask):
        own = []
        for p in mask.nonzero()[:, 0]:
            scores = torch.stack([queries[1 + p] @ key for key in image_keys]) / tau
            own.append(torch.logsumexp(scores, 0) - scores[p])
        losses.append(torch.stack(own).mean())
    return torch.stack(losses).mean()


def saim_loss(model: nn.Module, images: Tensor, pixels: Tensor, draw: tuple[Tensor, ...]) -> Tensor:
    """Both streams in raster order, each row with the keys that the paper's table gives it."""
    vit, losses = model.vit, []
    for image, wanted, order, keep in zip(
        images, pixels, draw.order, draw.keep.double().unflatten(1, (-1, 2))
    ):
        position, rank = vit.pos_embed[0], order.tolist()
        h = torch.cat([vit.cls_token[0] + position[:1], vit.patch_embed(image[None])[0] + position[1:]])
        g = position[1:]
        until = [[0]] + [[0] + [1 + q for q, other in enumerate(rank) if other <= mine] for mine in rank]
        before = [[0] + [1 + q for q, other in enumerate(rank) if other < mine] for mine in rank]
        for i, block in enumerate(vit.blocks):
            h = _through(block, h, [h[keys] for keys in until], keep[i])
            every = len(vit.blocks) // len(model.decoder)
            if (i + 1) % every == 0:
                j = i // every
                g = _through(model.decoder[j], g, [h[keys] for keys in before], keep[len(vit.blocks) + j])
        losses.append((model.head(vit.norm(g)) - wanted).square().mean())
    return torch.stack(losses).mean()


def mae_encoded(model: nn.Module, image: Tensor, mask: Tensor, keep: Tensor | None) -> Tensor:
    """[1 + v, D] of one image: the class token and the visible patches, which alone are there; final norm."""
    vit, position = model.vit, model.vit.pos_embed[0]
    patches = vit.patch_embed(image[None])[0] + position[1:]
    rows = torch.stack([vit.cls_token[0, 0] + position[0]] + [patches[p] for p in (~mask).nonzero()[:, 0]])
    for i, block in enumerate(vit.blocks):
        uniforms = (None, None) if keep is None else keep[2 * i : 2 * i + 2]
        rows = _through(block, rows, [rows] * len(rows), uniforms)
    return vit.norm(rows)


def mae_loss(model: nn.Module, images: Tensor, pixels: Tensor, draw: tuple[Tensor, ...]) -> Tensor:
    losses = []
    for image, wanted, mask, keep in zip(images, pixels, draw.mask, draw.keep.double()):
        first, *encoded = model.decoder_embed(mae_encoded(model, image, mask, keep))
        seen = iter(encoded)
        rows = [model.mask_token[0, 0] if hidden else next(seen) for hidden in mask]
        rows = torch.stack([first] + [row + model.positions[0, p] for p, row in enumerate(rows)])
        for block in model.decoder:
            rows = _through(block, rows, [rows] * len(rows), (None, None))
        found = model.head(model.norm(rows))[1:]
        losses.append(
            torch.stack([(found[p] - wanted[p]).square().mean() for p in mask.nonzero()[:, 0]]).mean()
        )
    return torch.stack(losses).mean()


def cae_loss(model: nn.Module, images: Tensor, ids: Tensor, draw: tuple[Tensor, ...]) -> Tensor:
    vit, losses = model.vit, []
    position, depth = vit.pos_embed[0, 1:], len(vit.blocks)
    for image, image_ids, mask, keep in zip(images, ids, draw.mask, draw.keep.double()):
        seen = mae_encoded(model, image, mask, keep)[1:]
        with torch.no_grad():
            wanted = mae_encoded(model, image, ~mask, None)[1:]
        hidden, visible = mask.nonzero()[:, 0].tolist(), (~mask).nonzero()[:, 0].tolist()
        rows, keep = [model.mask_token[0, 0]] * len(hidden), keep[2 * depth :].unflatten(0, (-1, 2))
        for block, uniforms in zip(model.regressor, keep):
            kept1, kept2 = _kept(block.drop_path1, uniforms[0]), _kept(block.drop_path2, uniforms[1])
            values = torch.stack([*seen, *rows])
            keys = block.k(block.norm_k(values + position[visible + hidden])).chunk(block.heads, dim=1)
            values, after = block.v(block.norm_v(values)).chunk(block.heads, dim=1), []
            for row, p in zip(rows, hidden):
                queries = block.q(block.norm_q(row + position[p])).chunk(block.heads)
                shares = [torch.softmax(k @ q / len(q) ** 0.5, dim=0) for k, q in zip(keys, queries)]
                read = torch.cat([share @ v for share, v in zip(shares, values)])
                row = block.norm2(row + kept1 * block.ls1(block.proj(read)))
                after.append(row + kept2 * block.ls2(Mlp.forward(block.mlp, row)))
            rows = after
        latent = model.regressor_norm(torch.stack(rows))
        x = latent + position[hidden]
        for block, uniforms in zip(model.decoder, keep[len(model.regressor) :]):
            x = _through(block, x, [x] * len(x), uniforms)
        shares = torch.log_softmax(model.head(model.decoder_norm(x)), dim=1)
        token_loss = -torch.stack([shares[i, image_ids[p]] for i, p in enumerate(hidden)]).mean()
        losses.append(token_loss + 2 * (latent - wanted).square().mean())
    return torch.stack(losses).mean()


class DenseMaPeT(nn.Module):
    """MaPeT as published: raster order, both streams through every block, one dense float mask per image.

    The yardstick of tools/benchmark.py and a second twin; it uses the weights of a mapet_ds model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def masks(order: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
        """Additive float masks: [B, 1 + L + t, 1 + L + t] of content rows, [B, t, 1 + L + t] of queries."""
        rank = F.pad(order + 1, (1, 0))
        border = num_visible + 1
        hidden = [(r >= border).nonzero()[:, 0] for r in rank]
        hidden_rank = torch.stack([r[h] for r, h in zip(rank, hidden)])
        bound = rank.clamp(min=border - 1)[:, :, None]
        content = torch.cat([rank[:, None, :] <= bound, hidden_rank[:, None, :] > bound], dim=2)
        bound = torch.full_like(hidden_rank, border - 1)[:, :, None]
        tokens = torch.cat([rank[:, None, :] <= bound, hidden_rank[:, None, :] > bound], dim=2)
        bound = hidden_rank[:, :, None]
        queries = torch.cat([rank[:, None, :] < bound, hidden_rank[:, None, :] >= bound], dim=2)
        content = torch.cat([content, tokens], dim=1)
        return tuple(torch.zeros(m.shape).masked_fill(~m, -1e30) for m in (content, queries))

    def forward(self, images: Tensor, ids: Tensor, order: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy, without stochastic depth."""
        vit = self.model.vit
        x = vit._pos_embed(vit.patch_embed(images))
        hidden = (order >= self.model.num_visible).nonzero()[:, 1].view(len(order), -1)
        positions = vit.pos_embed[:, 1:].expand(len(order), -1, -1)
        g = self.model.mask_token + positions.gather(1, hidden[:, :, None].expand(-1, -1, positions.shape[2]))
        h = torch.cat([x, g], dim=1)
        for block in vit.blocks:
            attention, width = block.attn, block.attn.attn_dim
            hn, gn = block.norm1(h), block.norm1(g)
            k, v = F.linear(hn, attention.qkv.weight[width:], attention.qkv.bias[width:]).chunk(2, dim=-1)
            streams = []
            for stream, normed, mask in ((h, hn, masks[0]), (g, gn, masks[1])):
                q = F.linear(normed, attention.qkv.weight[:width], attention.qkv.bias[:width])
                qh, kh, vh = (t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
                scores = qh @ kh.transpose(2, 3) * attention.scale + mask[:, None].to(q.dtype)
                out = (scores.softmax(dim=-1) @ vh).transpose(1, 2).flatten(2)
                stream = stream + block.ls1(attention.proj(out))
                streams.append(stream + block.ls2(Mlp.forward(block.mlp, block.norm2(stream))))
            h, g = streams
        logits = self.model.head(vit.norm(g))
        return F.cross_entropy(logits.flatten(0, 1), ids.gather(1, hidden).flatten())
