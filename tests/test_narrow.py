"""Losses of ``logits.float()``: the same numbers from 16-bit logits, and nothing wide is kept."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import nemo2
from nemo2.sharding import cross_entropy, narrow
from nemo2.sharding.modes import suspended
from nemo2.sharding.narrow import NarrowLosses
from tests.models import ZOO, token_ids

TOKENS, CLASSES = 24, 128


def as_it_is(function):
    """Stand in for ``_compiled``: most tests ask when a loss is taken, and not inductor."""

    def run(*args):
        with suspended():
            return function(*args)

    return run


@pytest.fixture
def kernels():
    """Let inductor compile the losses of a test."""


@pytest.fixture(autouse=True)
def small(monkeypatch, request):
    monkeypatch.setattr(narrow, "SMALLEST", 1)
    if "kernels" not in request.fixturenames:
        monkeypatch.setattr(cross_entropy, "_compiled", as_it_is)


@pytest.fixture
def losses(monkeypatch):
    """Return the dtypes of the logits of which nemo2 computes losses."""
    seen = []

    def spy(logits, *args, **kwargs):
        seen.append(logits.dtype)
        return cross_entropy.cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(narrow, "cross_entropy", spy)
    return seen


def logits(*shape):
    torch.manual_seed(0)
    return (3 * torch.randn(shape or (TOKENS, CLASSES))).bfloat16().requires_grad_()


def labels(*shape):
    torch.manual_seed(1)
    return torch.randint(CLASSES, shape or (TOKENS,))


def run(loss, mode, given=logits):
    """Return ``loss(x)``, the gradient of x, and the dtypes of what is kept for backward."""
    x = given()
    with mode:
        out = loss(x)
    seen = kept(out.grad_fn)
    out.sum().backward()
    return out.detach(), x.grad, seen


def kept(node):
    """Return the dtypes of large tensors that a graph has saved."""
    found, todo = set(), [node]
    while todo:
        node = todo.pop()
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += list(getattr(node, "saved_tensors", ()))
        found |= {x.dtype for x in saved if isinstance(x, torch.Tensor) and x.numel() > CLASSES}
        todo += [n for n, _ in node.next_functions if n is not None]
    return found


def compare(loss, given=logits, *, exact=False, atol=1e-6):
    """Run a loss as it is and from narrow logits; return what the latter keeps."""
    want, wanted, _ = run(loss, nullcontext(), given)
    got, grad, seen = run(loss, NarrowLosses(fused=True), given)
    assert got.dtype == want.dtype
    assert grad.dtype == wanted.dtype
    if exact:
        assert torch.equal(got, want)
        assert torch.equal(grad, wanted)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    # One rounding to bfloat16 apart.
    torch.testing.assert_close(grad, wanted, rtol=2**-7, atol=atol * float(wanted.abs().max()))
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 3},
        {"weight": torch.linspace(0.1, 2, CLASSES)},
    ],
    ids=str,
)
def test_losses_of_all_kinds(options, losses, kernels):
    target = labels()
    target[::5] = options.get("ignore_index", -100)
    seen = compare(lambda x: F.cross_entropy(x.float(), target, **options))
    assert losses == [torch.bfloat16]
    assert torch.float32 not in seen


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: F.cross_entropy(x.flatten(0, 1).float(), labels(2, 12).flatten()),
        lambda x: F.cross_entropy(x.float().view(-1, CLASSES), labels(2, 12).view(-1)),
        lambda x: F.cross_entropy(
            x.to(torch.float32)[:, :-1].reshape(-1, CLASSES), labels(2, 12)[:, 1:].flatten()
        ),
        lambda x: F.cross_entropy(x[:, :-1].float().flatten(0, 1), labels(2, 11).flatten()),
        lambda x: F.cross_entropy(x[:, :-1].float().view(-1, CLASSES), labels(2, 11).flatten()),
        lambda x: F.cross_entropy(x.float().transpose(1, 2), labels(2, 12)),
        lambda x: torch.nn.CrossEntropyLoss()(x.float()[0].contiguous(), labels(12)),
    ],
)
def test_views_and_parts(loss, losses):
    seen = compare(loss, lambda: logits(2, 12, CLASSES))
    assert losses == [torch.bfloat16]
    assert torch.float32 not in seen


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


def data_in_place(x):
    y = x * 1
    wide = y.float()
    y.data.mul_(0.5)
    return F.cross_entropy(wide, labels())


def copy_data_in_place(x):
    wide = x.float()
    wide.view(-1).data.mul_(0.5)
    return F.cross_entropy(wide, labels())


def numpy_in_place(x):
    wide = x.float()
    wide.detach().numpy()[:] *= 0.5
    return F.cross_entropy(wide, labels())


def without_gradient(x):
    with torch.no_grad():
        wide = x.float()
    return F.cross_entropy(wide, labels()) + x.sum()


def detached(x):
    return F.cross_entropy(x.float().detach(), labels()) + x.sum()


def hooked(x):
    wide = x.float()
    wide.register_hook(lambda grad: 2 * grad)
    return F.cross_entropy(wide.view(-1, CLASSES), labels())


def checkpointed(x):
    return checkpoint(lambda x: F.cross_entropy(x.float(), labels()), x, use_reentrant=False)


def reentrant(x):
    return checkpoint(lambda x: F.cross_entropy(x.float(), labels()), x, use_reentrant=True)


def of_a_transform(x):
    grads = torch.func.grad(lambda x: F.cross_entropy(x.float(), labels()))(x.detach())
    return (grads * x).sum()


def compiled(x):
    loss = torch.compile(lambda x, y: F.cross_entropy(x.float(), y), backend="aot_eager")
    return loss(x, labels())


def of_probabilities(x):
    return F.cross_entropy(x.float(), x.detach().float().softmax(-1))


def smoothed(x):
    return F.cross_entropy(x.float(), labels(), label_smoothing=0.1)


def narrow_already(x):
    return F.cross_entropy(x, labels())


def data_replaced(x):
    y = x * 1
    wide = y.float()
    y.data = torch.zeros_like(y)
    return F.cross_entropy(wide, labels())


def copy_data_replaced(x):
    wide = x.float()
    wide.data = 0.5 * wide.detach()
    return F.cross_entropy(wide, labels())


def storage_written(x):
    wide = x.float()
    wide.untyped_storage().fill_(0)
    return F.cross_entropy(wide, labels())


def source_detached(x):
    y = x * 1
    wide = y.float()
    y.detach_().requires_grad_()
    return F.cross_entropy(wide, labels())


def node_hooked(x):
    wide = x.float()
    wide.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
    return F.cross_entropy(wide, labels())


def module_hooked(x):
    class Widen(torch.nn.Module):
        def forward(self, x):
            return x.float()

    module = Widen()
    warnings.filterwarnings("ignore", "Using a non-full backward hook")
    module.register_backward_hook(lambda module, given, grads: (2 * given[0],))
    x.module = module  # alive until backward
    return F.cross_entropy(module(x), labels())


def index_changes(x):
    wide, index = x.float(), list(range(TOKENS))
    part = wide[index]
    index.reverse()
    return F.cross_entropy(part, labels())


def tensor_slices(x):
    wide, start = x.float(), torch.tensor(0)
    part = wide[start : start + TOKENS - 4]
    start += 4
    return F.cross_entropy(part, labels()[:-4])


def small_part(x):
    return F.cross_entropy(x.float()[-2:], labels()[-2:])


def of_a_vmap(x):
    wide = x.float()
    targets = torch.stack([labels(), labels().flip(0)])
    return torch.vmap(lambda target: F.cross_entropy(wide, target))(targets).sum()


def inside_a_function(x):
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.cross_entropy(x.float(), labels())

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return x * grad

    return Loss.apply(x)


@pytest.mark.parametrize(
    "loss",
    [
        in_place,
        source_in_place,
        data_in_place,
        copy_data_in_place,
        numpy_in_place,
        without_gradient,
        detached,
        hooked,
        checkpointed,
        reentrant,
        of_a_transform,
        compiled,
        of_probabilities,
        smoothed,
        narrow_already,
        inside_a_function,
        data_replaced,
        copy_data_replaced,
        storage_written,
        source_detached,
        node_hooked,
        module_hooked,
        index_changes,
        tensor_slices,
        small_part,
        of_a_vmap,
    ],
)
def test_what_is_more_than_a_copy_stays_as_it_is(loss, losses):
    compare(loss, exact=True)
    assert losses == []


def test_other_uses_of_the_copy_add_their_gradients(losses):
    def loss(x):
        wide = x.float()
        z = wide.logsumexp(-1).square().mean()
        return F.cross_entropy(wide, labels()) + 1e-4 * z + F.cross_entropy(2 * wide, labels())

    compare(loss)
    assert losses == [torch.bfloat16]


def test_an_inner_gradient_is_that_of_the_logits():
    def loss(x):
        return torch.autograd.grad(F.cross_entropy(x.float(), labels()), x)[0].float().sum() * x

    compare(lambda x: loss(x).sum())


def test_a_gradient_penalty():
    def loss(x):
        value = F.cross_entropy(x.float(), labels())
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        return value + 100 * grad.float().square().sum()

    compare(loss, atol=2**-8)  # two gradients of the logits are added in 16 bits


def test_a_loss_that_is_weighted_by_a_parameter(losses):
    weight = torch.tensor(2.0, requires_grad=True)

    def loss(x):
        value = F.cross_entropy(x.float(), labels()) * weight
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        return value + grad.float().square().sum()

    compare(loss, atol=2**-8)
    assert losses == [torch.bfloat16]


def test_several_losses_of_one_copy(losses):
    def loss(x):
        wide = x.float()
        return sum(F.cross_entropy(wide, labels().roll(i)) for i in range(40)) / 40

    compare(loss)
    assert losses == [torch.bfloat16]


def test_rows_of_one_large_value(losses):
    """A row that is masked as a whole: its classes are alike, however large its logits."""

    def given():
        x = logits().detach()
        x[3] = -1e9
        return x.requires_grad_()

    compare(lambda x: F.cross_entropy(x.float(), labels()), given)
    assert losses == [torch.bfloat16]


def test_targets_of_bytes(losses):
    def given():
        torch.manual_seed(0)
        return torch.randn(4, 200).bfloat16().requires_grad_()

    target = torch.tensor([1, 156, 199, 3], dtype=torch.uint8)  # 156 is -100 in 8 bits
    compare(lambda x: F.cross_entropy(x.float(), target), given)
    assert losses == [torch.bfloat16]


def test_reading_after_the_loss():
    x = logits() * 1
    with NarrowLosses(fused=True):
        wide = x.float()
        F.cross_entropy(wide, labels()).backward()
        assert torch.equal(x.data.argmax(-1), wide.data.argmax(-1))
        assert wide.detach().numpy().shape == (TOKENS, CLASSES)
        assert torch.eye(2).to_sparse().data.is_sparse
        with torch.no_grad():
            F.cross_entropy(x.float(), labels())


def test_a_write_by_data_after_the_loss_is_an_error():
    x = logits() * 1
    with NarrowLosses(fused=True):
        loss = F.cross_entropy(x.float(), labels())
        x.data.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "late",
    [
        lambda x, wide, loss: wide.register_hook(lambda grad: grad),
        lambda x, wide, loss: wide.retain_grad(),
        lambda x, wide, loss: torch.autograd.grad(loss, wide),
        lambda x, wide, loss: loss.backward(inputs=[wide]),
        lambda x, wide, loss: x.untyped_storage(),
    ],
)
def test_too_late_is_an_error(late):
    x = logits() * 1
    with NarrowLosses(fused=True):
        wide = x.float()
        loss = F.cross_entropy(wide.view(-1, CLASSES), labels())
        with pytest.raises(nemo2.Nemo2Error, match="of a float32 copy of logits"):
            late(x, wide, loss)


def test_a_write_after_the_loss_is_an_error():
    x = logits() * 1
    with NarrowLosses(fused=True):
        loss = F.cross_entropy(x.float(), labels())
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_are_freed():
    mode = NarrowLosses(fused=True)
    x = logits()
    with mode:
        for _ in range(3):
            F.cross_entropy(x.float(), labels()).backward()
    assert len(mode._copies) == 0


def test_classes_of_no_chance():
    """Masked vocabularies have whole rows of -inf on some ranks."""
    x = logits().detach()
    x[:, CLASSES // 2 :] = -torch.inf
    target = labels() % (CLASSES // 2)
    classes = cross_entropy._Classes(None, 1, 2, CLASSES, 1)
    with mock.patch.object(cross_entropy._Classes, "all_reduce", _as_if_two(x)):
        top, sums = cross_entropy._fused_sums(x[:, CLASSES // 2 :], target, classes)
    assert torch.equal(top, x.amax(1, keepdim=True).float())
    assert torch.equal(sums, torch.zeros_like(sums))


def _as_if_two(x):
    return lambda self, value, op: value.copy_(x.amax(1, keepdim=True))


def _fused(*, fused):
    return NarrowLosses(fused=True)


def on_a_mesh(name, mesh, smallest, options):
    patched = "compile" not in options  # compiling blocks takes its time, too
    torch.manual_seed(0)
    case = ZOO[name]
    model = case()
    if case.rules is not None:
        nemo2.annotate(model, case.rules)
    batch, seen = token_ids(4), []

    def spy(logits, *args, **kwargs):
        seen.append(logits.dtype)
        return cross_entropy.cross_entropy(logits, *args, **kwargs)

    def own(model, ids):
        out = model(ids[:, :-1])
        return F.cross_entropy(out.float().flatten(0, 1), ids[:, 1:].flatten())

    def theirs(model, ids):
        return model(ids[:, 1:], labels=ids[:, 1:], use_cache=False).loss

    with (
        mock.patch.object(narrow, "SMALLEST", smallest),
        mock.patch("nemo2.sharding.narrow.cross_entropy", spy),
        mock.patch("nemo2.sharding.actions.cross_entropy", spy),
        mock.patch("nemo2.pipeline.runner.NarrowLosses", _fused if patched else NarrowLosses),
        mock.patch.object(cross_entropy, "_compiled", as_it_is) if patched else nullcontext(),
    ):
        parallel = nemo2.parallelize(
            model,
            nemo2.make_mesh(**mesh),
            precision="bf16",
            data_parallel="ddp",
            **options,
        )
        loss = parallel.backward(own if name == "gpt" else theirs, batch)
        norm = parallel.clip_grad_norm_(1e9)
    return float(loss), float(norm), seen


@pytest.mark.parametrize(
    ("name", "mesh", "options"),
    [
        ("gpt", {"cp": 2}, {}),
        ("llama", {"pp": 2, "tp": 2}, {"pipeline": nemo2.Pipeline(microbatches=2)}),
        ("llama", {"dp": 1}, {"compile": "inductor"}),
    ],
    ids=str,
)
def test_on_a_mesh(pool, name, mesh, options):
    world = math.prod(mesh.values())
    plain = pool.run(world, on_a_mesh, name, mesh, 1 << 40, options)
    got = pool.run(world, on_a_mesh, name, mesh, 1, options)
    for (loss, norm, _), (want, wanted, _) in zip(got, plain, strict=True):
        assert loss == pytest.approx(want, rel=1e-5)
        assert norm == pytest.approx(wanted, rel=1e-2)
    assert set(got[-1][2]) == {torch.bfloat16}
    assert torch.bfloat16 not in plain[-1][2]
