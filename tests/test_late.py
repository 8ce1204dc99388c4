"""``logits.float()`` that is put off: the same losses and gradients, and no wide copy."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nemo2
from nemo2.sharding import cross_entropy, late
from nemo2.sharding.late import LateWidening
from nemo2.sharding.widened import Widened
from tests.models import ZOO, token_ids

TOKENS, CLASSES = 24, 128


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(late, "SMALLEST", 1)


def logits(*shape):
    torch.manual_seed(0)
    return (3 * torch.randn(shape or (TOKENS, CLASSES))).bfloat16().requires_grad_()


def labels(*shape):
    torch.manual_seed(1)
    return torch.randint(CLASSES, shape or (TOKENS,))


class Wide(TorchDispatchMode):
    """Notes the largest float32 result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        kinds = [x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        wide = [n for n, dtype in zip(sizes, kinds, strict=True) if dtype == torch.float32]
        self.largest = max([self.largest, *wide])
        return out


def compare(loss, given, *, off=True, fused=False, exact=False):
    """Run ``loss(logits)`` as it is and with ``.float()`` put off; compare values and gradients."""
    results = []
    for mode in (nullcontext(), LateWidening(fused=fused)):
        x = given()
        with mode:
            out = loss(x)
            out = out.whole() if isinstance(out, Widened) else out
        out.sum().backward()
        results.append((out.detach(), x.grad))
    (want, wanted), (got, grad) = results
    assert got.dtype == want.dtype
    assert grad.dtype == wanted.dtype
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(got, want, **tolerance)
    if not exact:  # one rounding to bfloat16 apart
        tolerance = {"rtol": 2**-7, "atol": 1e-6 * float(wanted.abs().max())}
    torch.testing.assert_close(grad, wanted, **tolerance)
    if off:
        x = given()
        with mock.patch.object(cross_entropy, "PIECE", 4 * CLASSES), Wide() as seen:
            with LateWidening(fused=False):
                out = loss(x).sum()
            out.backward()
        assert seen.largest < x.numel() / 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 3, "label_smoothing": 0.1},
        {"weight": torch.linspace(0.1, 2, CLASSES)},
    ],
    ids=str,
)
def test_losses_of_all_kinds(options, fused):
    target = labels()
    target[::5] = options.get("ignore_index", -100)
    compare(lambda x: F.cross_entropy(x.float(), target, **options), logits, fused=fused)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: F.cross_entropy(x.flatten(0, 1).float(), labels(2, 12).flatten()),
        lambda x: F.cross_entropy(x.float().view(-1, CLASSES), labels(2, 12).view(-1)),
        lambda x: F.cross_entropy(
            x.to(torch.float32)[:, :-1].reshape(-1, CLASSES), labels(2, 12)[:, 1:].flatten()
        ),
        lambda x: F.cross_entropy(x[:, :-1].float().flatten(0, 1), labels(2, 11).flatten()),
        lambda x: torch.nn.CrossEntropyLoss()(x.float()[0].contiguous(), labels(12)),
        lambda x: sum(F.cross_entropy(row, labels(12)) for row in x.float()[:2].unsqueeze(0)[0]),
    ],
)
def test_views_stay_narrow(loss):
    narrow = loss.__code__.co_names[0] != "sum"  # iteration asks for values
    compare(loss, lambda: logits(2, 12, CLASSES), off=narrow)


def in_place(x):
    wide = x.float()
    view = wide.view(-1, CLASSES)
    wide.mul_(0.5)
    return F.cross_entropy(view, labels())


def source_in_place(x):
    y = x * 1
    wide = y.float()
    y.mul_(0.5)
    return F.cross_entropy(wide, labels())


def through_a_function(x):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    return Square.apply(x.float())


def used_twice(x):
    wide = x.float()
    return F.cross_entropy(wide, labels()) + 1e-4 * wide.logsumexp(-1).square().mean()


def compiled(x):
    loss = torch.compile(lambda x, y: F.cross_entropy(x.float(), y), backend="aot_eager")
    return loss(x, labels())


def compiled_of_wide(x):
    loss = torch.compile(F.cross_entropy, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo looks into the class, and says so
        return loss(x.float(), labels())


@pytest.mark.parametrize(
    "loss",
    [
        in_place,
        source_in_place,
        through_a_function,
        used_twice,
        compiled,
        compiled_of_wide,
        lambda x: 2 * x.float(),
        lambda x: x.float(),
        lambda x: F.cross_entropy(x.float(), x.detach().float().softmax(-1)),
        lambda x: torch.cat([x.float(), x.float()]),
        lambda x: F.cross_entropy(x.float() * torch.tensor(x.float().detach().numpy()), labels()),
        lambda x: x.float().unflatten(0, (2, -1)).amax(-1),
    ],
)
def test_other_uses_get_the_values(loss):
    compare(loss, logits, off=False)


def test_what_can_be_seen_is_that_of_a_wide_tensor():
    x = logits(2, 12, CLASSES)
    with LateWidening(fused=False):
        wide = x.float()
        view = wide.flatten(0, 1)
        assert type(wide) is type(view) is Widened
        for got, want in ((wide, x.float), (view, lambda: x.float().flatten(0, 1))):
            real = want().whole()
            assert (got.shape, got.dtype, got.device) == (real.shape, real.dtype, real.device)
            assert (got.dim(), got.numel(), len(got)) == (real.dim(), real.numel(), len(real))
            assert got.stride() == real.stride()
            assert got.requires_grad
            assert not got.is_leaf
        with torch.no_grad():
            assert not x.float().requires_grad
            assert not x.float().whole().requires_grad
        assert type(x.double()) is torch.Tensor
        assert type(x.detach().float()[0, 0].exp()) is torch.Tensor
        assert type(x.mT.float()) is torch.Tensor


def losses(name, mesh, smallest, options):
    torch.manual_seed(0)
    case = ZOO[name]
    model = case()
    if case.rules is not None:
        nemo2.annotate(model, case.rules)
    batch, seen = token_ids(4), []
    real = cross_entropy.cross_entropy

    def spy(logits, *args, **kwargs):
        seen.append(logits.dtype)
        return real(logits, *args, **kwargs)

    def own(model, ids):
        out = model(ids[:, :-1])
        return F.cross_entropy(out.float().flatten(0, 1), ids[:, 1:].flatten())

    def theirs(model, ids):
        return model(ids[:, 1:], labels=ids[:, 1:]).loss

    with (
        mock.patch.object(late, "SMALLEST", smallest),
        mock.patch("nemo2.sharding.widened.cross_entropy", spy),
        mock.patch("nemo2.sharding.actions.cross_entropy", spy),
    ):
        parallel = nemo2.parallelize(
            model, nemo2.make_mesh(**mesh), precision="bf16", data_parallel="ddp", **options
        )
        loss = parallel.backward(own if name == "gpt" else theirs, batch)
        norm = parallel.clip_grad_norm_(1e9)
    return float(loss), float(norm), seen


@pytest.mark.parametrize(
    ("name", "mesh", "options"),
    [
        ("gpt", {}, {}),
        ("gpt", {"tp": 2}, {}),
        ("gpt", {"tp": 2}, {"sequence_parallel": False}),
        ("gpt", {"pp": 2}, {"pipeline": nemo2.Pipeline(microbatches=2)}),
        ("gpt", {"cp": 2}, {}),
        ("llama", {"pp": 2, "tp": 2}, {}),
        ("llama", {"dp": 1}, {}),
    ],
    ids=str,
)
def test_on_a_mesh(pool, name, mesh, options):
    world = math.prod(mesh.values())
    off = pool.run(world, losses, name, mesh, 1 << 40, options)
    on = pool.run(world, losses, name, mesh, 1, options)
    for (loss, norm, _), (want, wanted, _) in zip(on, off, strict=True):
        assert loss == pytest.approx(want, rel=1e-5)
        assert norm == pytest.approx(wanted, rel=1e-2)
    assert set(on[-1][2]) == {torch.bfloat16}
    assert torch.bfloat16 not in off[-1][2]
