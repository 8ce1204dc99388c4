"""Random numbers that do not depend on the mesh: dropout, and weights of models on meta."""

from __future__ import annotations

import functools
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import nemo2
from nemo2 import Pipeline, shard
from nemo2.sharding.counter import keep_mask, key_of
from nemo2.sharding.dropout import Draw, Site, begin, drawing, run_dropout
from nemo2.sharding.layout import WHOLE
from tests.models import VOCAB, WIDTH, next_token, token_ids


class Attend(nn.Module):
    """Causal attention by hand, with dropout of its weights, or torch's without."""

    def __init__(self, by_hand):
        super().__init__()
        self.by_hand = by_hand
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)
        shard(self.qkv.weight, "tp", dim=0, parts=(WIDTH,) * 3)
        shard(self.qkv.bias, "tp", dim=0, parts=(WIDTH,) * 3)
        shard(self.out.weight, "tp", dim=1)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (
            y.view(b, t, 4, c // 4).transpose(1, 2) for y in self.qkv(x).split(WIDTH, dim=-1)
        )
        if not self.by_hand:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
            scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, -math.inf).softmax(-1)
            y = F.dropout2d(self.drop(scores), 0.1, self.training) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    """Dropout as a module called twice, in place, and as functions."""

    def __init__(self, by_hand):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = Attend(by_hand)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.drop, self.inner = nn.Dropout(0.1), nn.Dropout(0.3, inplace=True)
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x):
        x = x + self.drop(self.attend(self.norm1(x)))
        y = self.inner(F.gelu(self.up(self.norm2(x))))
        y = F.dropout(self.down(y), 0.1, self.training)
        x = x + self.drop(y)
        return F.dropout(x * 1.0, 0.05, self.training, inplace=True)


class GPT(nn.Module):
    """``how`` checkpoints the blocks, reentrantly or not; ``common`` is called in each block."""

    def __init__(self, layers=4, *, by_hand=True, how=None, common=False):
        super().__init__()
        self.how = how
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(16, WIDTH)
        self.drop, self.glue = nn.Dropout(0.1), nn.Dropout(0.1)
        self.layers = nn.ModuleList([Block(by_hand) for _ in range(layers)])
        if common:
            for layer in self.layers:
                layer.drop = self.drop
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        shard(self.embed.weight, "tp", dim=0)
        shard(self.head.weight, "tp", dim=0)
        shard(self.layers, "pp")

    def forward(self, ids):
        places = self.place(torch.arange(ids.shape[1], device=ids.device))
        x = self.drop(self.embed(ids)) + F.dropout(places[None], 0.2, self.training)
        for layer in self.layers:
            if self.how is None:
                x = layer(self.glue(x))
            else:
                x = checkpoint(layer, self.glue(x), use_reentrant=self.how == "reentrant")
        return F.alpha_dropout(self.head(self.norm(x)), 0.1, self.training)


def train(build, mesh, device, *, steps=3, loss_fn=next_token, length=9, **options):
    """Train by AdamW; return the losses and the whole weights."""
    torch.manual_seed(0)
    model = build().double()
    size = math.prod(mesh.values())
    if size < torch.distributed.get_world_size():  # each rank alone
        devices = torch.distributed.device_mesh.DeviceMesh(
            device, [torch.distributed.get_rank()], mesh_dim_names=("tp",)
        )
    else:
        devices = nemo2.make_mesh(**mesh, device=device)
    torch.manual_seed(5)
    parallel = nemo2.parallelize(model, devices, **options)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-6)
    losses = []
    for step in range(steps):
        ids = token_ids(8, length).roll(step, 1)
        own = ids.chunk(parallel.plan.sizes.dp)[parallel.groups.dp_rank]
        optimizer.zero_grad()
        losses.append(float(parallel.backward(loss_fn, own)))
        optimizer.step()
    weights = {n: w.cpu() for n, w in parallel.full_state_dict().items()}
    return losses, weights


def differences(build, cases, device, **how):
    """Return the largest difference of each case from the training on one device."""
    losses, weights = train(build, {}, device, **how)
    torch.manual_seed(0)
    plain = next_token(build().double().eval(), token_ids(8, how.get("length", 9)))
    assert abs(losses[0] - plain.item()) > 1e-3  # dropout is on
    found = []
    for mesh, options in cases:
        other, theirs = train(build, mesh, device, **how, **options)
        error = max(abs(a - b) for a, b in zip(losses, other, strict=True))
        found.append(max(error, *((weights[n] - theirs[n]).abs().max().item() for n in weights)))
    return found


def equal(pool, world, build, cases, **how):
    for found in pool.run(world, differences, build, cases, pool.device, **how):
        assert max(found) < 1e-9, dict(zip(map(str, cases), found, strict=True))


def pipeline(microbatches, **how):
    return {"pipeline": Pipeline(microbatches=microbatches, **how)}


TWO = [
    ({"dp": 2}, {"data_parallel": "ddp"}),
    ({"dp": 2}, {"data_parallel": "fsdp", **pipeline(2)}),
    ({"dp": 2}, {"data_parallel": "zero1"}),
    ({"tp": 2}, {"sequence_parallel": False}),
    ({"tp": 2}, {"sequence_parallel": True, **pipeline(2)}),
    ({"pp": 2}, pipeline(1)),
    ({"pp": 2}, pipeline(4)),
    ({"pp": 2}, pipeline(2, schedule="interleaved", virtual_stages=2)),
]


@pytest.mark.parametrize("common", [False, True])
def test_training_with_dropout_is_the_same_on_any_mesh(pool, common):
    equal(pool, 2, functools.partial(GPT, common=common), TWO)


# --- the masks themselves


def kept(step=1, first=0, stride=1, module="drop", p=0.5, shape=(4, 64, 32)):
    """Return where dropout keeps its operand, by the way a run takes."""
    draw = Draw(WHOLE, shape, ((0, 1),))
    args = (torch.ones(shape), p, True)
    with torch.random.fork_rng(devices=[]), drawing():
        begin(3, step, (0,), first, stride)
        return run_dropout(Site((module, 0), (draw,)), {}, "dropout", F.dropout, args, {})


def test_masks_have_the_right_share_and_scale():
    for p in (0.05, 0.5, 0.9):
        x = kept(p=p, shape=(64, 64, 64))
        values = x.unique()
        assert torch.allclose(values, torch.tensor([0.0, 1 / (1 - p)]))
        assert abs((x == 0).double().mean() - p) < 4 * math.sqrt(p * (1 - p) / x.numel())
    assert kept(p=1.0).eq(0).all()
    assert kept(p=0.0).eq(1).all()


def test_masks_of_steps_samples_modules_and_neighbours_are_unrelated():
    whole = kept(shape=(64, 64, 32)) - 1
    others = [kept(step=2, shape=(64, 64, 32)) - 1, kept(module="other", shape=(64, 64, 32)) - 1]
    others += [whole.roll(n, d) for d in range(3) for n in (1, 2, 7, 16)]
    bound = 5 / math.sqrt(whole.numel())
    for other in others:
        assert abs((whole * other).mean()) < bound


def test_rows_are_independent_of_each_other():
    """All pairs of rows: the spread of their agreement is that of coins."""
    positions = [torch.arange(512), torch.arange(2048)]
    coins = keep_mask(key_of("pairs"), positions, 0.5).double() * 2 - 1
    pairs = (coins @ coins.T / math.sqrt(2048)).triu(1)
    spread = pairs[pairs != 0].std()
    assert abs(spread - 1) < 0.02
    assert pairs.abs().max() < 6


def test_a_sample_has_its_mask_wherever_it_is():
    assert torch.equal(kept()[2:], kept(first=2, shape=(2, 64, 32)))
    assert torch.equal(kept()[1::2], kept(first=1, stride=2, shape=(2, 64, 32)))
    assert not torch.equal(kept()[:2], kept()[2:])


def test_bits_are_these_on_every_device_and_build():
    positions = [torch.arange(3), torch.arange(1000)]
    text = keep_mask(key_of(1, "layers.0"), positions, 0.7).to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(text).hexdigest()[:12] == "05bf8c161f18"


# --- what runs where


class Small(nn.Module):
    """Dropout of the batch itself, of weights, and of one module on operands of two shapes."""

    def __init__(self, odd=""):
        super().__init__()
        self.odd, self.drop, self.out = odd, nn.Dropout(0.3), nn.Linear(4, 4)

    def forward(self, x):
        y = F.dropout(x, 0.2, self.training) @ F.dropout(self.out.weight, 0.2, self.training)
        if self.odd == "reads" and len(y.detach().nonzero()) > 1e9:
            y = y * 2
        if self.odd == "size":
            y = y + x.new_zeros(2, 1, 4).expand(2, len(x) // 2, 4).flatten(0, 1)
        if self.odd == "noise" and self.training:
            y = y + torch.rand(4, device=y.device)
        if self.odd == "path" and torch.rand(()) < 0.5:
            y = F.dropout(F.dropout(y * 2, 0.1, self.training), 0.1, self.training)
        if self.odd == "part":
            y = checkpoint(
                lambda z: F.dropout(z, 0.5, self.training).tanh(), y, use_reentrant=False
            )
        y = self.drop(self.drop(y)[:, None, :].expand(-1, 3, -1) * 1.0)
        return self.out(y).square().sum((1, 2)).mean()


def call(model, x):
    return model(x)


def small(odd, mesh, device, **options):
    torch.manual_seed(0)
    model = Small(odd).double()
    x = torch.rand(8, 4, dtype=torch.float64)
    parallel = nemo2.parallelize(model, nemo2.make_mesh(**mesh, device=device), **options)
    own = x.chunk(parallel.plan.sizes.dp)[parallel.groups.dp_rank]
    losses = [float(parallel.backward(call, own)) for _ in range(3)]
    parallel.eval()
    model.eval()
    with torch.no_grad():
        out = parallel(own)
    assert abs(float(out) - model(own.to("cpu")).item()) < 1e-12  # eval draws nothing
    return losses


def test_dropout_of_inputs_weights_and_many_shapes(pool):
    (one,) = pool.run(1, small, "", {}, pool.device)
    assert len(set(one)) == 3
    for other in pool.run(2, small, "", {"dp": 2}, pool.device, **pipeline(2)):
        assert other == pytest.approx(one, abs=1e-12)


@pytest.mark.parametrize("odd", ["reads", "size", "noise", "path", "part"])
def test_steps_that_cannot_be_keyed_run_on_one_device(pool, odd):
    (losses,) = pool.run(1, small, odd, {}, pool.device)
    assert len(set(losses)) == 3


def seeded_inside(model, x):
    torch.manual_seed(1)
    return model(x)


def seeds_inside(device):
    parallel = nemo2.parallelize(Small(), nemo2.make_mesh(device=device))
    try:
        parallel.backward(seeded_inside, torch.rand(2, 4))
    except nemo2.Nemo2Error as error:
        return str(error)
    return ""


def test_a_step_that_seeds_torch_is_refused(pool):
    assert "torch's generator was seeded inside of a step" in pool.run(1, seeds_inside, "cpu")[0]


def lines(model, step, batch, mesh="tp=2"):
    text = str(nemo2.plan(model, mesh, step=step, batch=batch))
    return [" ".join(line.split()) for line in text.partition("random numbers")[2].splitlines()]


def test_the_plan_says_what_draws():
    keyed = "keyed, independent of the mesh"
    text = lines(GPT(2), next_token, token_ids(2))
    assert f"layers.*.attend x2 dropout {keyed}" in text
    assert f"layers.*.drop x2 dropout {keyed}" in text
    assert lines(GPT(2).eval(), next_token, token_ids(2)) == []
    x = torch.ones(4, 4)
    own = "draws its own numbers:"
    assert f"(step) rand {own} a generator without positions" in lines(Small("noise"), call, x)
    again = "in a part of a forward that is checkpointed by itself"
    assert f"(step) dropout {own} {again}" in lines(Small("part"), call, x)
    fixed = lines(Small("size"), lambda m, b: m(b) + b.new_zeros(4)[len(b) - 1], x)
    assert f"drop dropout {own} the step cannot be planned with another batch size" in fixed
    inside = lines(nn.TransformerEncoderLayer(8, 2, 8, 0.1), call_sum, torch.ones(4, 2, 8))
    kernel = "dropout_p=0.1 inside its kernel"
    assert f"self_attn scaled_dot_product_attention {own} {kernel}" in inside


def call_sum(model, x):
    return model(x).sum()


def verified(mesh, **options):
    report = nemo2.verify(functools.partial(GPT, 2), token_ids(4), next_token, mesh, **options)
    return report.ok, str(report)


def test_verify_compares_with_a_mesh_of_one(pool):
    for mesh, options in (({"tp": 2}, {}), ({"dp": 2}, pipeline(2))):
        for ok, text in pool.run(2, verified, mesh, **options):
            assert ok, text
            assert "note: dropout is on: one device is nemo2 on a mesh of one" in text


def test_context_parallel(pool):
    cases = [({"cp": 2}, {}), ({"cp": 2}, {"context_parallel": "ulysses", **pipeline(2)})]
    equal(pool, 2, functools.partial(GPT, by_hand=False), cases)


def test_four_and_eight_ranks(pool):
    build = functools.partial(GPT, by_hand=False, common=True)
    cases = [
        ({"cp": 2, "tp": 2}, {}),
        ({"pp": 2, "cp": 2}, pipeline(2)),
        ({"pp": 2, "tp": 2}, pipeline(4, schedule="interleaved", virtual_stages=2)),
    ]
    equal(pool, 4, build, cases)
    equal(pool, 8, build, [({"dp": 2, "pp": 2, "tp": 2}, pipeline(2))])


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_checkpointed_blocks_draw_the_same_again(pool, how):
    """Blocks call one module twice; stages of other microbatches run before the recomputation."""
    build = functools.partial(GPT, how=how, common=True)
    cases = [
        ({"tp": 2}, pipeline(2)),
        ({"dp": 2}, {"data_parallel": "fsdp", **pipeline(2)}),
    ]
    if how != "reentrant":  # it is refused around the first block of a stage
        cases += [
            ({"pp": 2}, pipeline(4)),
            ({"pp": 2}, pipeline(4, schedule="interleaved", virtual_stages=2)),
        ]
    equal(pool, 2, build, cases)
    for plain, checkpointed in pool.run(1, with_and_without, how, pool.device):
        assert abs(plain - checkpointed) < 1e-9


def with_and_without(how, device):
    """Return the norm of the weights after training with checkpoints and without."""
    found = []
    for chosen in (None, how):
        build = functools.partial(GPT, how=chosen, common=True)
        _, weights = train(build, {}, device, **pipeline(2))
        found.append(sum(float(w.norm()) for w in weights.values()))
    return found


# --- weights of models on meta


class Normed(nn.Module):
    """Torch's layers alone, with buffers that their reset_parameters fills, and a tie."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList([Block(False) for _ in range(4)])
        self.stats, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, VOCAB)
        self.head.weight = self.embed.weight
        shard(self.head.bias, "tp", dim=0)
        shard(self.embed.weight, "tp", dim=0)
        shard(self.layers, "pp")

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def drawn(mesh, device, **options):
    """Return the weights and buffers of a model that was built on meta."""
    torch.manual_seed(torch.distributed.get_rank())  # the first rank's seed counts
    with torch.device("meta"):
        model = Normed()
    parallel = nemo2.parallelize(model, nemo2.make_mesh(**mesh, device=device), **options)
    assert not any(t.is_meta for t in (*parallel.module.parameters(), *parallel.module.buffers()))
    return {n: w.cpu() for n, w in parallel.full_state_dict().items()}


def test_weights_of_a_model_on_meta_do_not_depend_on_the_mesh(pool):
    (one,) = pool.run(1, drawn, {}, pool.device)
    assert torch.equal(one["head.weight"], one["embed.weight"])
    assert one["embed.weight"][0].eq(0).all()
    assert one["embed.weight"][1:].std() > 0.9
    assert one["stats.running_var"].eq(1).all()
    assert not torch.equal(one["layers.0.up.weight"], one["layers.1.up.weight"])
    bound = 1 / math.sqrt(WIDTH)
    assert one["layers.0.up.weight"].abs().max() <= bound
    for mesh in ({"tp": 2}, {"pp": 2}, {"dp": 2}):
        for inplace in (False, True):
            for other in pool.run(2, drawn, mesh, pool.device, inplace=inplace):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[n], other[n]) for n in one)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.arange(4.0), persistent=False)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def init_weights(self):
        self.inner.weight.fill_(1)


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


class Forgets(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Filling()


class Filling(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.ones(2, dtype=torch.int64))

    def reset_parameters(self):
        nn.init.ones_(self.weight)


def refused(kind, device):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), kind())
    try:
        nemo2.parallelize(model, nemo2.make_mesh(device=device))
    except nemo2.Nemo2Error as error:
        return str(error)
    return "accepted"


def test_rotary_buffers_uninitialised_after_meta_are_refused(pool):
    (text,) = pool.run(1, refused, Rotary, pool.device)
    assert "'1' (Rotary) has no reset_parameters for buffer 'angles'" in text


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Custom, "'1' (Custom) has init_weights, which may set its submodules"),
        (Owner, "'1' (Owner) has no reset_parameters for parameter 'scale'"),
        (Forgets, "reset_parameters of '1.inner' (Filling) does not fill buffer 'table'"),
        (functools.partial(nn.MultiheadAttention, 4, 1), "has _reset_parameters, which may"),
    ],
    ids=["custom", "owner", "forgets", "transformer"],
)
def test_what_meta_cannot_draw_again_is_refused(pool, kind, message):
    (text,) = pool.run(1, refused, kind, pool.device)
    assert message in text
