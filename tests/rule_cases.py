"""The cases of ``test_rules.py``: small functions of annotated parameters and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import torch
import torch.nn.functional as F
from torch import nn

from nemo2.sharding.annotate import shard

B, T, D, H = 2, 3, 8, 12  # batch, sequence, features, hidden features


@dataclass(frozen=True)
class P:
    """A parameter of a case: its shape and the dim that is split, if one is."""

    shape: tuple[int, ...]
    dim: int | None = None
    trainable: bool = True


def col(n: int = H, m: int = D) -> P:
    """A matrix for ``x @ w`` whose result is split along its last dim."""
    return P((m, n), 1)


def row(n: int = D, m: int = H) -> P:
    return P((m, n), 0)


@dataclass(frozen=True)
class Case:
    fn: Callable[..., Any]
    params: dict[str, P]
    inputs: tuple[Any, ...]
    degrees: tuple[int, ...]


class Function(nn.Module):
    """A module that holds the parameters of a case and calls its function."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.fn = case.fn
        for name, p in case.params.items():
            self.register_parameter(name, nn.Parameter(torch.randn(p.shape), p.trainable))
            if p.dim is not None:
                shard(getattr(self, name), "tp", dim=p.dim)

    def forward(self, *inputs: Any) -> Any:
        return self.fn(self, *inputs)


CASES: dict[str, Case] = {}


def case(
    *inputs: Any, degrees: tuple[int, ...] = (2,), **params: P
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the cases; inputs are tensors or the shapes of float tensors."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        assert fn.__name__ not in CASES, fn.__name__
        CASES[fn.__name__] = Case(fn, params, inputs or ((B, T, D),), degrees)
        return fn

    return add


def make_input(x: Any) -> Any:
    if isinstance(x, tuple):
        return torch.randn(x, dtype=torch.float64, requires_grad=True)
    return x


# --- pointwise ---


@case(a=col())
def gelu(p, x):
    return F.gelu(x @ p.a)


@case(a=col(), b=P((H,), 0), c=P((H,)), d=P(()), e=P((1,)), f=P((T, 1)), g=P((B, T, H)))
def broadcast_parameters(p, x):
    y = x @ p.a
    return (y + p.b) * p.c + p.d * y - p.e / (1 + p.f**2) + p.g * y


@case(a=col())
def broadcast_left(p, x):
    y = x[0, 0] @ p.a  # (H,) split meets (B, T, H) replicated
    return y * x.sum(-1, keepdim=True) + x.new_ones(B, T, H)


@case((B, T, D), (H,), (B, T, 1), a=col())
def broadcast_inputs(p, x, v, w):
    y = x @ p.a
    return torch.where(v > 0, y, w) + torch.lerp(y, v, 0.3) + torch.addcmul(y, w, v)


@case(a=col(), b=col(), c=P((H,)))
def in_place(p, x):
    y = x @ p.a
    y += x @ p.b
    y *= 2
    y.add_(p.c).mul_(0.5)
    return F.relu_(y - 0.1)


@case(a=P((D, H), 1, False), c=P((H,)))
def in_place_makes_gradient(p, x):
    y = x.detach() @ p.a  # no gradient flows here
    y += p.c[:1]  # from here on one does
    return (y * x.sum(-1, keepdim=True).detach()) ** 2


@case(a=col(), c=P((T, 1)))
def in_place_through_view(p, x):
    y = x.detach() @ p.a.detach()
    y.unsqueeze(0).add_(p.c)
    return y * y


@case(a=col())
def clamp_and_masks(p, x):
    y = x @ p.a
    y = y.clamp(-0.5, 0.5).masked_fill(y < -0.4, 0.25)
    return y.masked_fill(x.sum(-1, keepdim=True) > 0, 0.1), (y > 0), y.isfinite().logical_not()


@case(a=col(), c=P((1, H)))
def min_and_max_of_two(p, x):
    y = x @ p.a
    return torch.maximum(y, p.c) + torch.max(y, -y) + torch.minimum(y, x.mean(-1, keepdim=True))


@case(a=col(), c=P((3,)), d=P((H,)))
def conversions(p, x):
    y = x @ p.a
    z = p.c.type_as(y) * p.c.to(y)
    w = p.d.to(y.dtype) + y.float().double() + y.to(torch.float32).to(x.dtype)
    return z, w, y.to("cpu") + y.type(torch.float64), y.int(), y.detach() * y, y.clone()


@case(a=col(), c=P((B, T, H)))
def shapes_of_others(p, x):
    y = x @ p.a
    one = torch.ones_like(y) + torch.zeros_like(y[..., :2]).sum() + x.new_zeros(y.shape)
    return y * one, y + torch.full_like(y, 2.0) * p.c, torch.zeros_like(y), torch.zeros_like(x) + x


@case(a=P((D, 2), 1))
def like_of_a_small_dim(p, x):
    y = x @ p.a  # one column on each rank, which would broadcast
    return y * torch.ones_like(y)


@case(a=col())
def dropout_off(p, x):
    return F.dropout(x @ p.a, 0.0) + F.dropout(x @ p.a, 0.5, training=False)


@case(a=col())
def chosen_by_value_of_an_argument(p, x):
    y = x @ p.a
    return (
        F.pad(y, (0, 0)),
        F.pad(y, (1, 1)),
        y.repeat(1, 1, 1),
        y.repeat(1, 1, 2),
        y.roll(0, -1),
        y.roll(1, -1),
    )


@case(a=col(H, H))
def square_shapes(p, x):
    y = torch.randn(H, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ p.a
    return (
        y + y.T,
        y.tril(),
        y.diagonal(),
        y @ y,
        (y * y.transpose(0, 1)).view(H, H),
        torch.atleast_2d(y[0]),
        torch.atleast_2d(y),
    )


# --- views ---


@case(a=col())
def split_heads(p, x):
    y = x @ p.a
    return (
        y.view(B, T, 4, 3),
        y.view(B, T, -1, 3),
        y.view(*y.shape[:-1], 4, -1),
        y.unflatten(-1, (4, 3)),
    )


@case(a=col(), degrees=(2, 4))
def heads_of_one(p, x):
    y = (x @ p.a).reshape(B, T, 4, 3)
    return (
        y.transpose(1, 2).squeeze(1),
        y.squeeze(),
        y.squeeze(2),
        y.permute(0, 2, 1, 3).reshape(B, 4, -1),
    )


@case(a=col())
def merge_heads(p, x):
    y = (x @ p.a).view(B, T, 4, 3).transpose(1, 2)
    y = y.transpose(1, 2).contiguous()
    return (
        y.view(B, T, H),
        y.view(B, T, -1),
        y.flatten(2),
        y.reshape(B * T, -1),
        y.flatten(2, 3),
        y.view(-1, H),
    )


@case(a=col())
def odd_heads(p, x):
    return (x @ p.a).view(B, T, 3, 4), (x @ p.a).view(B, T, -1, 4).mean(2), (x @ p.a).flatten()


@case(a=col())
def permuted(p, x):
    y = x @ p.a
    y = y.permute(2, 0, 1).movedim(0, 1).swapaxes(0, 2).unsqueeze(1).squeeze(1)
    return y, y.mT, y.unsqueeze(-1), (x[0] @ p.a).t(), (x[0] @ p.a).T


@case(a=col())
def expanded(p, x):
    y = (x @ p.a).unsqueeze(2)
    z = y.expand(B, T, 5, H) + y.expand(-1, -1, 2, -1).sum(2, keepdim=True)
    return (
        z.reshape(B, T, 5 * H),
        y.expand(B, T, 2, y.size(-1)),
        y.broadcast_to((2, B, T, 1, H)),
        y.expand_as(z),
    )


@case(a=col(), c=P((1, 1, 1)))
def expand_as_split(p, x):
    return p.c.expand_as(x @ p.a) * (x @ p.a), x.reshape(-1)[:1].expand_as((x @ p.a)[0, 0])


@case(a=col())
def indexed(p, x):
    y = x @ p.a
    a = y[:, 0], y[..., None], y[:, :, 1:4], y[:, :, :H], y[..., -H:], y[0], y[:, -1:, :], y[None]
    return (
        *a,
        y.select(1, 0),
        y.select(2, 3),
        y.narrow(1, 0, 2),
        y.narrow(2, 0, H),
        y.narrow(2, 2, 4),
    )


@case(a=col())
def strided(p, x):
    y = x @ p.a
    return (
        y[..., ::2],
        y[..., 1::2],
        y[..., -9::4],
        y[:, ::2],
        y[..., -11::3],
        y[..., 1::3],
        y[..., 5:8],
    )


@case(torch.tensor([2, 0]), torch.tensor([1, 7]), (B, T, D), a=col())
def indexed_by_tensors(p, i, j, x):
    y = x @ p.a
    return y[:, i], y[..., j], y.index_select(2, j), y.gather(2, j.expand(B, T, 2)), y[i % 2, i]


@case(a=col())
def pieces(p, x):
    y = x @ p.a
    a, b = y.chunk(2, dim=-1)
    c, d, e = y.unbind(1)
    f, g = y.split([1, 2], dim=1)
    return (
        a * b,
        c + d * e,
        f,
        g,
        y.split(4, -1)[1],
        y.unbind(2)[3],
        y.split(H, -1)[0],
        list(y)[1],
        y.tensor_split(2, 1)[0],
    )


@case(a=col())
def einops_patterns(p, x):
    y = x @ p.a
    q = einops.rearrange(y, "b t (h d) -> b h t d", d=3)
    r = einops.rearrange(y, "b t (h d) -> b h t d", h=4)
    s = einops.repeat(q, "b h t d -> b (h n) t d", n=2)
    u = einops.reduce(r, "b h t d -> b t d", "mean")
    return (
        einops.rearrange(q * r, "b h t d -> b t (h d)"),
        s,
        u,
        einops.reduce(y, "b t (h d) -> b h", "sum", h=4),
    )


@case(a=col())
def no_elements(p, x):
    y = x[:, :0] @ p.a
    return y, y.transpose(1, 2), y.reshape(0, H), y.sum(1), y.flatten(), y.transpose(1, 2)[:, :2]


@case(a=col())
def complex_rotary(p, x):
    y = (x @ p.a).view(B, T, 2, 6)
    angles = torch.arange(T * 3, dtype=torch.float64).view(T, 1, 3)
    z = torch.view_as_complex(y.reshape(B, T, 2, 3, 2)) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(z).flatten(3)


@case(a=col(4 * 4))
def real_rotary(p, x):
    q = (x @ p.a).view(B, T, -1, 4).transpose(1, 2)
    angles = torch.outer(torch.arange(T).double(), torch.tensor([1.0, 0.1]).double())
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    half = q.shape[-1] // 2
    rotated = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
    return q * cos + rotated * sin, q * cos[None, None].to(q.dtype)


# --- joins and repeats ---


@case(a=col(), b=col(), c=P((T, H)), e=P((H, D), 0))
def joined(p, x):
    y, z = x @ p.a, x @ p.b
    w = p.c.expand(B, T, H)
    return (
        torch.cat([y, z], 1),
        torch.cat([y, z], -1),
        torch.cat([y, w], 1),
        torch.cat([y, y], 0),
        torch.cat([y @ p.e, x]),
    )


@case(a=col(), b=col())
def stacked(p, x):
    y, z = x @ p.a, x @ p.b
    return (
        torch.stack([y, z]),
        torch.stack([y, z], -1),
        torch.stack([y, x.sum(-1, keepdim=True).expand(B, T, H)], 2),
    )


@case(a=col())
def repeated(p, x):
    y = (x @ p.a).view(B, T, -1, 3)
    z = y.transpose(1, 2)[:, :, None].expand(B, 4, 2, T, 3).reshape(B, 8, T, 3)
    w = y.repeat_interleave(2), y.repeat_interleave(2, 2, output_size=8)
    return (
        y.repeat_interleave(2, dim=2),
        y.repeat_interleave(3, 1),
        torch.repeat_interleave(y, repeats=2, dim=0),
        z,
        *w,
    )


# --- along a dim ---


@case(a=col())
def along(p, x):
    y = x @ p.a
    z = (
        y.softmax(-1),
        F.softmax(y, dim=1),
        F.log_softmax(y, -1),
        y.log_softmax(0),
        torch.softmax(y, 2, torch.float64),
    )
    return (
        *z,
        y.cumsum(-1),
        torch.cumsum(y, dim=1),
        F.glu(y),
        F.glu(y.transpose(1, 2), dim=1),
        y.sort(-1)[0],
        y.argsort(1),
        F.normalize(y),
    )


@case(a=col())
def picked(p, x):
    y = x @ p.a
    return (
        *y.topk(2),
        *y.topk(2, dim=1),
        torch.topk(y, 3, -1)[0] * y.sum(),
        y.flip(-1),
        y.tril(),
        y.kthvalue(2)[0],
    )


@case(a=col(), w=P((H,), 0), b=P((H,)), v=P((T,)), c=P((T, H)), r=P((H,), 0))
def norms(p, x):
    y = x @ p.a
    z = F.layer_norm(y, (H,), p.w, p.b), F.layer_norm(y, (T, H), p.c), F.rms_norm(y, (H,), p.r)
    return (
        *z,
        F.layer_norm(y.mT, [T], p.v, p.v),
        F.layer_norm(x.sum(-1, keepdim=True).expand(B, T, H), (H,), p.w),
        F.rms_norm(y.mT, (T,), p.v),
    )


@case(a=col(), w=P((H,), 0), v=P((H,)))
def custom_rms_norm(p, x):
    y = x @ p.a
    norm = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    return y * norm * p.w, y * torch.rsqrt((y * y).sum(-1, True) / y.shape[-1]) * p.v


@case(a=col(), n=P((3,)))
def norm_of_each_head(p, x):
    q = (x @ p.a).view(B, T, -1, 3)
    return F.rms_norm(q, (3,), p.n), p.n * q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True))


@case(a=col())
def reduced(p, x):
    y = x @ p.a
    a = (
        y.sum(),
        y.sum(-1),
        y.sum((0, 2)),
        y.sum(1, keepdim=True),
        y.mean(),
        y.mean(dim=(-1,), keepdim=True),
        y.mean(1),
    )
    b = (
        y.amax(-1),
        y.max(),
        y.max(1)[0],
        y.max(-1)[1],
        y.argmax(-1),
        y.argmax(),
        y.min(0, True)[0],
        y.logsumexp(-1),
    )
    c = (
        y.var(-1),
        y.var(1),
        y.var(),
        y.std(False),
        y.var(unbiased=False),
        y.var(False),
        torch.var(y, 2, correction=0),
        y.std(0),
    )
    d = (
        (y > 0).any(-1),
        (y > 0).all(),
        y.prod(1),
        y.prod(-1),
        y.norm(),
        y.norm(dim=-1),
        y.norm(dim=1),
        (y > 0).sum(-1),
    )
    return (
        *a,
        *b,
        *c,
        *d,
        torch.var_mean(y, -1)[1],
        y.sum(axis=1),
        y.mean(axis=-1),
        (y > 0).sum(1),
        y.sum(dtype=torch.float64),
    )


@case(a=col())
def vectors_and_losses_of_elements(p, x):
    y = x @ p.a
    z = y.tanh()
    norms = (
        y.norm(p=3, dim=0, keepdim=True),
        torch.norm(y, dim=(0, 2)),
        torch.linalg.vector_norm(y, dim=1),
        torch.linalg.norm(y, dim=-1, keepdim=True),
        torch.linalg.norm(y, dim=(1, 2)),
        torch.linalg.vector_norm(y),
    )
    units = (
        F.normalize(y),
        F.normalize(y, dim=-1),
        F.normalize(y, 1.0, 0),
        F.cosine_similarity(y, z),
        F.cosine_similarity(y, z, dim=-1),
        F.cosine_similarity(y, z[:1], dim=0),
        F.cosine_similarity(y, x[..., :1], 1),
    )
    losses = (
        F.mse_loss(y, z, reduction="none"),
        F.mse_loss(y, z),
        F.smooth_l1_loss(y, z, reduction="none"),
        F.huber_loss(y, z, reduction="sum"),
        F.huber_loss(y, z, reduction="none"),
        F.binary_cross_entropy_with_logits(y, z.sigmoid(), reduction="none"),
        F.binary_cross_entropy(y.sigmoid(), z.sigmoid(), reduction="none"),
        F.binary_cross_entropy(y.sigmoid(), z.sigmoid()),
    )
    return *norms, *units, *losses, F.logsigmoid(y), F.hardswish(y)


# --- contractions ---


@case(a=col(), b=row(), c=col(D, D), v=P((H,), 0), m=P((H, 6), 1))
def products(p, x):
    y = x @ p.a
    a = (
        y @ p.b,
        torch.matmul(y, p.b),
        y @ p.v,
        y[0] @ p.b,
        torch.mm(y[0], p.b),
        y @ y.mT,
        y.mT @ y,
        y[0, 0] @ p.b,
    )
    return (
        *a,
        y[0, 0] @ y[0, 1],
        torch.mv(y[0], p.v),
        (x @ p.c) @ p.a,
        y @ p.m,
        p.v @ p.b,
        torch.dot(p.v, p.v),
        x @ p.c.T,
    )


@case(a=col(), b=P((D, H)), w=P((B, H, T), 1), u=P((B, T, H), 0), s=P((B, D, H)), degrees=(2,))
def batched(p, x):
    y = x @ p.a
    a = torch.bmm(y, p.w), torch.bmm(p.u, p.w), p.u @ p.w, (p.u * x.sum()) @ p.b.T, x @ p.s + y
    q = y.view(B, T, -1, 3).transpose(1, 2)
    return *a, q @ q.mT, (q @ q.mT).softmax(-1) @ q, q @ q[:, :1].mT, torch.bmm(input=y, mat2=p.w)


@case(a=col(), b=row(), c=P((D,), 0), e=P((D,)), f=P((H,), 0), g=P((H,)), h=P((D, D)))
def conv1d_of_gpt2(p, x):
    y = torch.addmm(p.f, x.view(-1, D), p.a).view(B, T, H)
    z = torch.addmm(p.e, y.view(-1, H), p.b, beta=0.5, alpha=2.0) + torch.addmm(
        p.c, y.view(-1, H), p.b
    )
    w = (
        torch.addmm(p.g, x.view(-1, D), p.a),
        torch.addmm(p.c, x[0], p.h),
        torch.addmm(input=p.e, mat1=y[0], mat2=p.b),
    )
    return y, z, *w, torch.baddbmm(y, x, p.a.expand(B, D, H)), torch.addmv(p.e, p.b.T, y[0, 0])


@case(
    a=P((H, D), 0),
    ab=P((H,), 0),
    b=P((D, H), 1),
    bb=P((D,)),
    c=P((H, D)),
    cb=P((H,), 0),
    rb=P((H,)),
)
def linears(p, x):
    y = F.linear(x, p.a, p.ab)
    a = (
        F.linear(y, p.b, p.bb),
        F.linear(y, p.b),
        F.linear(x, p.c, p.cb),
        F.linear(x, p.c),
        F.linear(x, p.a, p.rb),
    )
    return (
        *a,
        F.linear(y.mT, p.c[:, :T], p.cb),
        F.linear(y[0, 0], p.b, p.bb),
        F.linear(F.linear(x, p.a), p.c[:D].T @ p.c.T),
        F.linear(input=y, weight=p.b, bias=p.bb),
    )


@case(a=col(), b=row(), w=P((4, 3, D), 0))
def einsums(p, x):
    y = x @ p.a
    q = y.view(B, T, 4, 3)
    a = torch.einsum("bth,hd->btd", y, p.b), torch.einsum("bth->bt", y), torch.einsum("bth->hbt", y)
    b = (
        torch.einsum("bihd,bjhd->bhij", q, q),
        torch.einsum("bth,bsh->bts", y, y),
        torch.einsum("bi,bj->bij", y[:, 0], y[:, 0]),
    )
    c = (
        torch.einsum("bthd,hde->bte", q, p.w),
        torch.einsum("...h,hd->...d", y, p.b),
        torch.einsum("btd,hkd->bthk", x, p.w),
    )
    return (
        *a,
        *b,
        *c,
        torch.einsum("bth,bth->", y, y),
        torch.einsum("b t h , h d -> b t d", [y, p.b]),
        einops.einsum(y, p.b, "b t h, h d -> b t d"),
    )


@case(a=P((H, 1)), w=P((D, H), 1), u=P((1, H)))
def einsum_of_size_one(p, x):
    y = x @ p.w
    return (
        torch.einsum("bth,ht->bth", y, p.a),
        torch.einsum("bth,ih->bt", y, p.u),
        torch.einsum("bth,hi->bti", y, p.a),
    )


@case(a=col(H, H))
def product_with_itself(p, x):
    y = p.a * x.sum()
    return (
        y @ y,
        torch.einsum("ij,jk->ik", y, y),
        y.unsqueeze(0) @ y,
        torch.einsum("ij,ij->i", y, y),
        F.linear(y, y),
    )


@case(a=P((D, H), 0), b=P((D, H), 1), c=P((H, D), 0), e=P((H, D), 1))
def all_layouts_of_two(p, x):
    y, z = x @ p.b, x @ p.a
    return (
        y @ p.c,
        y @ p.e,
        z @ p.c,
        z @ p.e,
        p.a @ p.c,
        p.a @ p.e,
        p.b @ p.c,
        p.b @ p.e,
        p.b + p.a,
        p.c.T * p.a,
    )


# --- lookups ---


IDS = torch.tensor([[0, 5, 7], [11, 3, 5]])


@case(IDS, rows=P((H, D), 0), cols=P((H, D), 1), whole=P((H, D)))
def embeddings(p, ids):
    a = (
        F.embedding(ids, p.rows),
        F.embedding(ids, p.cols),
        F.embedding(ids, p.rows, padding_idx=5),
        F.embedding(ids, p.rows, -1),
    )
    b = (
        F.embedding(ids, p.cols, padding_idx=5),
        F.embedding(ids, p.whole),
        F.embedding(input=ids, weight=p.rows, padding_idx=7),
    )
    return (
        *a,
        *b,
        F.embedding(ids, p.cols) * F.embedding(ids, p.whole),
        F.embedding(ids, p.rows) @ p.whole.T,
    )


@case(IDS, wte=P((H, D), 0), h=P((D, H), 1), back=P((H, D), 0))
def tied_head(p, ids):
    x = F.embedding(ids, p.wte)
    logits = F.linear((x @ p.h).relu() @ p.back, p.wte)
    return logits, F.cross_entropy(logits.view(-1, H), ids.view(-1))


# --- attention ---


def attend(p, x, heads: int, kv: int, **options):
    q = (x @ p.q).view(B, T, -1, 4).transpose(1, 2)
    k = (x @ p.k).view(B, T, kv, 4).transpose(1, 2)
    v = (x @ p.v).view(B, T, kv, 4).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.transpose(1, 2).reshape(B, T, -1) @ p.o


def attention(heads: int, kv: int, split_kv: bool = True) -> dict[str, P]:
    side = P((D, kv * 4), 1 if split_kv and kv * 4 % 4 == 0 else None)
    return {"q": col(heads * 4), "k": side, "v": side, "o": row(D, heads * 4)}


@case(**attention(4, 4), m=P((T, T)), n=P((4, T, T)), o2=P((1, 4, 1, T)), degrees=(2, 4))
def masks(p, x):
    keep = torch.ones(T, T, dtype=torch.bool).tril()
    a = [
        attend(p, x, 4, 4),
        attend(p, x, 4, 4, is_causal=True),
        attend(p, x, 4, 4, attn_mask=keep, scale=0.3),
    ]
    for mask in (
        p.m,
        p.n,
        p.o2,
        keep.expand(B, 1, T, T),
        keep.expand(B, 4, T, T),
        x[:, None, :, :T],
        p.m.expand(B, 1, T, T),
    ):
        a.append(attend(p, x, 4, 4, attn_mask=mask))
    return a


@case(**attention(12, 1), degrees=(2, 4))
def one_kv_head(p, x):
    return attend(p, x, 12, 1, enable_gqa=True), attend(
        p, x, 12, 1, enable_gqa=True, is_causal=True
    )


@case(**attention(12, 2), degrees=(2, 4))
def two_kv_heads(p, x):
    return attend(p, x, 12, 2, enable_gqa=True)


@case(**attention(12, 3), degrees=(2, 4))
def three_kv_heads(p, x):
    return attend(p, x, 12, 3, enable_gqa=True)


@case(**attention(12, 6), degrees=(4,))
def six_kv_heads(p, x):
    return attend(p, x, 12, 6, enable_gqa=True)


@case(**attention(6, 2, False), degrees=(2, 4))
def replicated_kv(p, x):
    return attend(p, x, 6, 2, enable_gqa=True)


@case(**attention(6, 3), degrees=(2, 4))
def six_query_heads(p, x):
    return attend(p, x, 6, 3, enable_gqa=True)


@case(**attention(8, 2), degrees=(4,))
def repeat_kv_by_hand(p, x):
    q = (x @ p.q).view(B, T, -1, 4).transpose(1, 2)
    k = (
        (x @ p.k)
        .view(B, T, 2, 4)
        .transpose(1, 2)[:, :, None]
        .expand(B, 2, 4, T, 4)
        .reshape(B, 8, T, 4)
    )
    v = (x @ p.v).view(B, T, 2, 4).transpose(1, 2).repeat_interleave(4, 1)
    scores = (q @ k.mT * k.shape[-1] ** -0.5).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(2) @ p.o, F.scaled_dot_product_attention(q, k, v)


@case(**attention(8, 1), degrees=(2, 4))
def shared_key_and_value(p, x):
    q = (x @ p.q).view(B, T, -1, 4).transpose(1, 2)
    k = (x @ p.k).view(B, T, 1, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    return (
        y,
        F.scaled_dot_product_attention(q, q, q),
        F.scaled_dot_product_attention(q, k.expand(B, 8, T, 4), q),
    )


@case((4, T, D), q=col(4), k=col(4), v=col(4), b=P((4, T, D), 0))
def attention_of_three_dims(p, x):
    q, k, v = x @ p.q, x @ p.k, x @ p.v  # the dim of the head is split
    r = x * p.b  # the batch is split
    a = F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(r, r, r)
    m = torch.ones(4, T, T, dtype=torch.bool).tril()
    return (
        *a,
        F.scaled_dot_product_attention(r, x, x, m),
        F.scaled_dot_product_attention(r[:, None], r[:, None], r[:, None]),
    )


# --- losses ---


LABELS = torch.tensor([[1, -100, 0], [11, 5, 6]])


@case((B, T, D), LABELS, head=col(), w=P((H,), None, False))
def cross_entropies(p, x, labels):
    y = labels.relu()
    z = x @ p.head
    flat, t = z.view(-1, H), labels.view(-1)
    a = [
        F.cross_entropy(flat, t),
        F.cross_entropy(flat, t, p.w.abs(), label_smoothing=0.1),
        F.cross_entropy(flat, t, reduction="none"),
    ]
    a += [
        F.cross_entropy(z.mT, y, reduction=r, ignore_index=5, label_smoothing=0.2)
        for r in ("mean", "sum", "none")
    ]
    a += [
        F.cross_entropy(z[0, 0], t[0].abs()),
        F.cross_entropy(input=flat, target=t),
        F.cross_entropy(flat, flat.detach().softmax(-1)),
    ]
    a += [
        F.nll_loss(F.log_softmax(flat, -1), t),
        -flat.log_softmax(-1)[0, 1],
        F.cross_entropy(z, y[:, :1].clamp(max=2).expand(B, H)),
    ]
    return [
        *a,
        F.mse_loss(z, torch.zeros(B, T, H).double()),
        F.binary_cross_entropy_with_logits(z, z.detach().sigmoid()),
    ]


# --- sizes ---


@case(a=col(), b=row())
def sizes_as_numbers(p, x):
    y = x @ p.a
    n, m = y.size(-1), len(x[0] @ p.a)
    z = y * y.shape[-1] ** -0.5 + y / n**0.5 + y * m + y.numel() - y.nelement() + y.shape.numel()
    return z, z @ p.b / y.size()[2], z.sum() / z.numel(), y.size(dim=2) * x, len(p.a.T @ x[0].T) * x


@case(a=col(), b=row())
def sizes_as_tensors(p, x):
    y = x @ p.a
    scale = torch.tensor(float(y.shape[-1])).rsqrt()
    return (y * scale) @ p.b, y * torch.full((1,), y.size(-1)), torch.arange(y.shape[-1]).sum() * y


@case(a=col())
def positions_from_sizes(p, x):
    y = x @ p.a
    return (
        y + torch.arange(y.shape[-1], dtype=y.dtype),
        y.new_zeros(y.shape) + y,
        y * torch.linspace(0, 1, y.size(-1)).double(),
    )


# --- annotated activations ---


@case(a=col(), b=row(), c=P((D,)))
def constrained(p, x):
    y = shard(x @ p.a, None)
    z = shard(x, "tp", dim=-1) * p.c
    return y, z, shard(z @ shard(p.b[:D, :], "tp", dim=0), "tp", 2), shard(shard(x, "tp", 2), None)


@case((B, 4, D), a=col(), c=P((D,)), n=P((D,)))
def sequence_split(p, x):
    y = shard(x * p.c, "tp", dim=1)
    y = F.layer_norm(y, (D,), p.n, p.c)
    z = F.gelu(shard(y, None) @ p.a)
    return y, z, F.linear(y, p.c.diag(), p.n), F.linear(y, p.a.T) + z


# --- parameters with several uses ---


@case(a=col(), c=P((H,)), s=P(()))
def inside_and_outside(p, x):
    y = (x @ p.a) * p.s
    z = (x @ p.a).sum(-1, keepdim=True) * p.c
    return y * p.c[:1], y + p.s, z * p.s, x * p.s, p.s * p.c.sum()


@case(a=col(), c=P((4,)))
def split_and_broadcast(p, x):
    y = (x @ p.a)[..., None] * p.c  # c is used in part
    z = (x[..., :4] @ p.a[:4]).view(B, T, 4, 3).transpose(2, 3)  # its last dim is split
    return y, z * p.c


@case(a=P((D, H), 1, False), b=P((H,), None, False), c=P((H,)), d=row())
def frozen(p, x):
    y = x @ p.a + p.b
    return (y * p.c) @ p.d, (x.detach() @ p.a) @ p.d


@case(a=col(), c=P((H,)))
def without_gradient(p, x):
    with torch.no_grad():
        scale = (x @ p.a).abs().amax(-1, keepdim=True)
    return (x @ p.a) / scale, (x @ p.a).detach() * p.c


@case(a=col(), c=P((D, D, 3)))
def convolution(p, x):
    y = F.conv1d(x.mT, p.c, padding=1).mT @ p.a
    return (
        y,
        F.conv1d(y.mT, p.c.repeat(1, 2, 1)[:, :H], padding=1),
        F.avg_pool1d(y, 2),
        F.group_norm(y.mT, 3),
    )
