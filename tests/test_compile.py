"""``parallelize(..., compile=True)``: parity, what is compiled and how often, and what is not."""

from __future__ import annotations

import shutil
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import nemo2
from nemo2 import DataParallel, Nemo2Error, Pipeline, shard
from nemo2.compile import block as blocks
from tests.models import GPT, WIDTH, ZOO, Dropout, next_token, token_ids
from tests.test_remat import verified

INTERLEAVED = Pipeline(4, "interleaved", 2)

# On workers a warning is an error: a block that runs eagerly fails these.
CELLS = [
    ("gpt", {"tp": 2, "pp": 2}, {"pipeline": Pipeline(2)}),
    ("gpt", {"pp": 2, "tp": 2}, {"pipeline": INTERLEAVED}),
    ("gpt tied", {"dp": 2, "tp": 2}, {}),
    ("gpt grouped", {"cp": 2, "tp": 2}, {}),
    ("gpt", {"cp": 4}, {"context_parallel": "ulysses"}),
    ("gpt", {"cp": 2, "dp": 2}, {"context_parallel": "all_gather", "data_parallel": "ddp"}),
    ("gpt no bias, einops", {"tp": 4}, {"sequence_parallel": False}),
    ("dropout", {"dp": 2, "tp": 2}, {"pipeline": Pipeline(2)}),
    ("fused", {"tp": 4}, {}),
    ("encoder", {"tp": 2, "dp": 2}, {}),
    ("skip glue", {"pp": 2, "tp": 2}, {}),
    ("llama", {"tp": 2, "dp": 2}, {}),
    ("gpt2", {"pp": 2, "tp": 2}, {}),
    ("example gpt", {"dp": 4}, {"data_parallel": DataParallel(reshard=True)}),
]


def compiled_cells(cells, backend, device, remat=None):
    with_backend = [(model, mesh, {**own, "compile": backend}) for model, mesh, own in cells]
    return verified(with_backend, remat, device)


@pytest.mark.parametrize("part", [0, 1])
def test_the_graph_of_a_block_computes_what_the_block_does(pool, part):
    bad = pool.run(4, compiled_cells, CELLS[part::2], "aot_eager", pool.device, timeout=200)
    assert not any(bad), bad[0]


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation(pool, kind):
    cells = [("gpt", {"tp": 2, "dp": 2}, {}), ("dropout", {"tp": 2, "pp": 2}, {})]
    bad = pool.run(4, compiled_cells, cells, "aot_eager", pool.device, remat=kind)
    assert not any(bad), bad[0]


class Converting(nn.Module):
    """Attention whose code converts tensors by each of torch's names for it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        for name in ("float", "double", "half", "bfloat16", "int", "long", "bool", "byte", "char"):
            q = q + 0.1 * getattr(q > 0, name)().to(q.dtype)
        q = q.double().cpu().to(x.device) if x.layout == torch.strided else q
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


class ManyConversions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Converting() for _ in range(2))
        shard(self.layers, "pp")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def converted(device):
    torch.manual_seed(0)
    model = ManyConversions().double().to(device)
    batch = torch.randn(4, 8, WIDTH, dtype=torch.float64, device=device)
    want = model(batch).square().mean()
    want.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    mesh = nemo2.make_mesh(cp=2, device=device)
    parallel = nemo2.parallelize(model, mesh, compile="aot_eager")
    got = parallel.backward(lambda m, x: m(x).square().mean(), batch)
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-12, atol=0)
    for name, p in parallel.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), grads[name], rtol=1e-12, atol=1e-15)
    return nemo2.explain(parallel)


def test_code_that_converts_tensors(pool):
    """Torch compiles with tensors that turn ``float`` into ``to``, and answer ``device``."""
    for text in pool.run(2, converted, pool.device):
        assert "layers.*  2      compiled" in text


def first_steps(remat, device):
    """Return the losses of two steps, and how blocks run."""
    torch.manual_seed(0)
    mesh = nemo2.make_mesh(dp=2, device=device)
    model = nemo2.parallelize(GPT(layers=2), mesh, compile="aot_eager", remat=remat)
    losses = [float(model.backward(next_token, token_ids(4)).detach()) for _ in range(2)]
    return losses, nemo2.explain(model)


def test_a_block_is_traced_outside_of_its_checkpoint(pool):
    for (losses, text), (want, _) in zip(
        pool.run(2, first_steps, "full", pool.device),
        pool.run(2, first_steps, None, pool.device),
        strict=True,
    ):
        assert losses == pytest.approx(want, rel=1e-6)
        assert "layers.*  2      compiled" in text


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(pool):
    """The compiled block equals one device to 1e-12 in float64."""
    exact = {"rtol": 1e-12}
    if torch.__version__ < "2.12":  # there inductor takes attention's log-sum-exp for float32
        exact = {"dtype": torch.float32, "rtol": 1e-4}
    cells = [("dropout", {"tp": 2}, {**exact, "pipeline": Pipeline(2)})]
    bad = pool.run(2, compiled_cells, cells, True, pool.device, timeout=280)
    assert not any(bad), bad[0]


def graphs_found(mesh, device):
    from torch._dynamo.utils import counters

    model = nemo2.parallelize(GPT(layers=4), nemo2.make_mesh(**mesh, device=device), compile=True)
    counters.clear()
    model.run_backward(next_token, token_ids(8), key="train")
    return {name: n for name, n in counters["inductor"].items() if "fxgraph_cache" in name}


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_blocks_that_are_alike_are_compiled_once(pool):
    for found in pool.run(2, graphs_found, {"tp": 2}, pool.device, timeout=280):
        assert found["fxgraph_cache_hit"] >= 2 * 3  # forward and backward of all but the first
        assert not found.get("fxgraph_cache_bypass")


# --- how often, and what runs -------------------------------------------------------------------


class NoDTensor(TorchDispatchMode):
    """Counts operations that go through DTensor."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += any(issubclass(t, DTensor) for t in types)
        return func(*args, **(kwargs or {}))


def compilations(mesh, options, device):
    model = nemo2.parallelize(
        GPT(layers=4), nemo2.make_mesh(**mesh, device=device), compile="aot_eager", **options
    )
    made = []
    original = blocks.compiled_function

    def counting(*args, **kwargs):
        made.append(args)
        return original(*args, **kwargs)

    with mock.patch.object(blocks, "compiled_function", counting):
        counts = []
        for step in range(4):
            with NoDTensor() as watch:
                model.run_backward(next_token, token_ids(8).roll(step), key="train")
            counts.append(len(made))
    return counts, watch.seen, nemo2.explain(model)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"pp": 2, "tp": 2}, {"pipeline": INTERLEAVED}),
        ({"dp": 2, "tp": 2}, {"pipeline": Pipeline(2)}),
        ({"dp": 4}, {}),
    ],
)
def test_nothing_is_compiled_after_the_first_microbatch(pool, mesh, options):
    """Not for later microbatches, stages, virtual stages or steps; and DTensor runs nothing."""
    for counts, dtensors, text in pool.run(4, compilations, mesh, options, pool.device):
        local = 4 // mesh.get("pp", 1)
        assert counts == [local] * 4
        assert not dtensors
        assert "compile=aot_eager" in text
        assert f"layers.*  {local}      compiled" in text


def counted_ops(remat, compile, device):
    """Return how often products and attention run in a step."""
    names = {"mm": 0, "addmm": 0, "attention": 0}

    class Counting(TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # Where random state is kept for a second run, the operation is an argument.
            called = [func, *(a for a in args if isinstance(a, torch._ops.OpOverload))]
            for name in (f.__name__.split(".")[0] for f in called):
                names["attention"] += "attention" in name and "backward" not in name
                if name in ("mm", "addmm"):
                    names[name] += 1
            return func(*args, **(kwargs or {}))

    mesh = nemo2.make_mesh(tp=2, device=device)
    model = nemo2.parallelize(GPT(layers=2), mesh, remat=remat, compile=compile)
    model.run_backward(next_token, token_ids(4), key="train")
    with Counting():
        model.run_backward(next_token, token_ids(4), key="train")
    return names["mm"] + names["addmm"], names["attention"]


def test_selective_recomputation_repeats_attention_and_no_product(pool):
    plain, _ = pool.run(2, counted_ops, None, "aot_eager", pool.device)
    kept, _ = pool.run(2, counted_ops, "selective", "aot_eager", pool.device)
    assert kept[0] == plain[0]
    assert plain[1] == 2
    assert kept[1] == 4


# --- what cannot be compiled --------------------------------------------------------------------


class Odd(nn.Module):
    """A block that does something that a graph cannot."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.scale, self.kept = kind, 0, 1.0, None
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        if kind == "hooks":
            self.linear.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.kind == "keeps":
            self.kept = y
        elif self.kind == "draws":
            y = y + torch.rand_like(y)
        elif self.kind == "reads":
            y = y * (2.0 if bool((y > -1e9).all()) else 1.0)
        elif self.kind == "counts":
            self.calls += 1
        elif self.kind == "outside":
            y = y + OUTSIDE
        elif self.kind == "scale":
            y = y * self.scale
        return y.relu()


OUTSIDE = torch.ones(())


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Odd(kind), Odd(kind)])
        shard(self.layers, "pp")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def eager_reasons(kinds):
    """Return for each kind the warnings of two steps, the loss, and that of an eager model."""
    told = {}
    mesh = nemo2.make_mesh(device="cpu")
    x = torch.randn(4, WIDTH)
    for kind in kinds:
        torch.manual_seed(0)
        net = Net(kind)
        eager = nemo2.parallelize(net, mesh)
        model = nemo2.parallelize(net, mesh, compile="aot_eager")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = [float(model.backward(square, x)) for _ in range(2)]
        expected = [float(eager.backward(square, x)) for _ in range(2)]
        calls = [[layer.calls for layer in m.module.layers] for m in (model, eager)]
        text = nemo2.explain(model)
        told[kind] = [str(w.message) for w in caught], losses, expected, calls, text
    return told


def test_what_cannot_be_compiled_runs_eagerly_and_says_why(pool):
    why = {
        "hooks": "its 'linear' has hooks",
        "keeps": "it keeps tensors that it does not return",
        "draws": "it draws random numbers (rand_like)",
        "reads": "it reads values",
        "counts": "it changes numbers that its modules hold",
        "outside": "it uses a tensor that is neither given to it nor held by its modules",
    }
    (told,) = pool.run(1, eager_reasons, tuple(why))
    for kind, reason in why.items():
        warned, losses, expected, calls, text = told[kind]
        assert len(warned) == 1, (kind, warned)  # once, not for each block, call and step
        assert reason in warned[0]
        assert "layers.0" in warned[0]
        assert losses == expected
        assert f"eager, as {reason}" in text
        assert calls[0] == calls[1]


def changed_scale():
    """Return losses of a compiled and of an eager model, whose number changes between steps."""
    mesh = nemo2.make_mesh(device="cpu")
    x = torch.randn(4, WIDTH)
    nets = [nemo2.parallelize(Net("scale"), mesh, compile=c) for c in ("aot_eager", False)]
    nets[1].load_full_state_dict(nets[0].full_state_dict())
    losses = []
    for scale in (1.0, 2.0, 1.0):
        for net in nets:
            for layer in net.module.layers:
                layer.scale = scale
        losses.append([float(net.backward(square, x)) for net in nets])
    return losses


def test_a_number_that_changes_between_steps_is_not_frozen(pool):
    (losses,) = pool.run(1, changed_scale)
    assert all(compiled == eager for compiled, eager in losses)
    assert losses[0] == losses[2] != losses[1]


class Settings:
    def __init__(self):
        self.gain, self.table = 1.0, {"a": [1.0, 2.0]}


class Steered(nn.Module):
    """Reads a configuration object, a list, and a tensor that is None at first."""

    def __init__(self, settings):
        super().__init__()
        self.settings, self.steps, self.add = settings, [1.0], None
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        settings = self.settings
        x = torch.tanh(self.lin(x)) * settings.gain + y.flip(0) * settings.table["a"][1]
        return x * self.steps[0] if self.add is None else x + self.add


class SteeredNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.settings = Settings()
        self.layers = nn.ModuleList([Steered(self.settings)])
        nemo2.shard(self.layers, "pp")

    def forward(self, x, y):
        for layer in self.layers:
            x = layer(x, y)
        return x


def steered():
    """Return losses, compiled and eager, before and after each change between steps."""
    mesh = nemo2.make_mesh(device="cpu")
    x, y = torch.randn(2, 4, WIDTH)
    nets = [
        nemo2.parallelize(SteeredNet(), mesh, compile=c, data_parallel="ddp")
        for c in ("aot_eager", False)
    ]
    nets[1].load_full_state_dict(nets[0].full_state_dict())

    def twice(model, batch):
        return model(*batch).square().mean()

    changes = [
        lambda net: None,
        lambda net: setattr(net.settings, "gain", 4.0),
        lambda net: net.settings.table["a"].__setitem__(1, 0.5),
        lambda net: net.layers[0].steps.__setitem__(0, 3.0),
        lambda net: setattr(net.layers[0], "add", torch.ones(WIDTH)),
        lambda net: setattr(net.layers[0], "add", None),
    ]
    losses = []
    for change in changes:
        for net in nets:
            change(net.module)
        losses.append([float(net.backward(twice, (x, y))) for net in nets])
    losses.append([float(net.backward(twice, (x, x))) for net in nets])
    losses.append([float(net.backward(twice, (x, y))) for net in nets])
    return losses, nets[0].module.layers[0].forward.state


def test_nothing_that_a_block_holds_is_frozen(pool):
    ((losses, state),) = pool.run(1, steered)
    assert all(compiled == eager for compiled, eager in losses), losses
    assert len({eager for _, eager in losses}) == len(losses) - 2  # two of them come again
    assert state == "compiled"


def restless(steps):
    """Return whether losses equal an eager model's while a number never stays, and warnings."""
    mesh = nemo2.make_mesh(device="cpu")
    x = torch.randn(4, WIDTH)
    nets = [nemo2.parallelize(Net("scale"), mesh, compile=c) for c in ("aot_eager", False)]
    nets[1].load_full_state_dict(nets[0].full_state_dict())
    same = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            for net in nets:
                net.module.layers[0].scale = 1.0 + step
            one, two = (float(net.backward(square, x)) for net in nets)
            same = same and one == two
    return same, [str(w.message) for w in caught]


def test_a_number_that_never_stays_is_not_compiled_for_ever(pool):
    ((same, warned),) = pool.run(1, restless, blocks.VARIANTS + 2)
    assert same
    assert len(warned) == 1
    assert "change from step to step" in warned[0]


def with_a_cache(device):
    case = ZOO["llama"].with_layers(2)
    mesh = nemo2.make_mesh(device=device)
    net = case()
    nemo2.annotate(net, case.rules)
    model = nemo2.parallelize(net, mesh, compile="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.backward(next_token, token_ids(2))
    return [str(w.message) for w in caught]


def test_a_cache_as_an_argument_is_named(pool):
    (warned,) = pool.run(1, with_a_cache, pool.device)
    assert any("DynamicCache" in w and "use_cache=False" in w for w in warned)


def in_evaluation(device):
    """Train, evaluate, train: the loss of each, compiled and eager."""
    mesh = nemo2.make_mesh(device=device)
    made = []
    for compile in ("aot_eager", False):
        torch.manual_seed(0)
        model = nemo2.parallelize(Dropout(), mesh, compile=compile)
        losses = []
        for train in (True, False, True, False):
            model.train(train)
            losses.append(float(model.backward(next_token, token_ids(4))))
        model.eval()
        made.append((losses, model(token_ids(4))))
    return made


def test_training_and_evaluation_take_turns(pool):
    ((compiled, eager),) = pool.run(1, in_evaluation, pool.device)
    torch.testing.assert_close(compiled[0], eager[0])
    torch.testing.assert_close(compiled[1], eager[1])


def test_it_needs_blocks():
    with pytest.raises(Nemo2Error, match="none are annotated"):
        nemo2.plan(nn.Linear(4, 4), "tp=1", compile=True)


# --- beside other options ------------------------------------------------------------------------


def beside_precision_and_inference(mesh, device):
    """Losses and an evaluation's output, compiled and eager, in bf16 with float32 masters."""
    made = []
    for compile in ("aot_eager", False):
        torch.manual_seed(0)
        model = nemo2.parallelize(
            GPT(layers=2),
            nemo2.make_mesh(**mesh, device=device),
            precision="bf16",
            pipeline=Pipeline(2),
            compile=compile,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for step in range(3):
            losses.append(float(model.backward(next_token, token_ids(4).roll(step))))
            model.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.inference_mode():  # as Lightning evaluates
                output = model(token_ids(4), broadcast_output=True)
        made.append((losses, output.float()))
    return made


@pytest.mark.parametrize("mesh", [{"tp": 2, "dp": 2}, {"pp": 2, "tp": 2}])
def test_mixed_precision_and_inference_mode(pool, mesh):
    for compiled, eager in pool.run(4, beside_precision_and_inference, mesh, pool.device):
        assert compiled[0] == pytest.approx(eager[0], rel=2e-3)
        torch.testing.assert_close(compiled[1], eager[1], rtol=0.05, atol=0.05)
