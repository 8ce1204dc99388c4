"""Models built on meta: drawn module by module, the same on every mesh, cut to shards at once."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import nemo2
from nemo2 import shard
from nemo2.sharding.initial import Initial
from tests import zoo
from tests.models import VOCAB, WIDTH, next_token, token_ids

MODELS = {
    "llama": functools.partial(zoo.causal, "Llama"),
    "tied llama": functools.partial(zoo.causal, "Llama", tie_word_embeddings=True),
    "gemma2": functools.partial(zoo.causal, "Gemma2", head_dim=8),
    "gpt2": zoo.gpt2,
    "bert": zoo.bert,
    "t5": zoo.t5,
    "mixtral": functools.partial(zoo.causal, "Mixtral", num_local_experts=4),
}
OTHERS = {
    **{
        kind: functools.partial(zoo.causal, kind)
        for kind in ("Qwen2", "Mistral", "Phi3", "GPTNeoX", "OPT", "Bloom", "Mamba")
    },
    "Qwen3": functools.partial(zoo.causal, "Qwen3", head_dim=8),
    "vit": zoo.vit,
}


def on_meta(build):
    with torch.device("meta"):
        return build()


def values(model, seed=1):
    """Return what would be drawn of a model on meta, by name."""
    initial = Initial(model, seed)
    return {name: initial.value(name).clone() for name in initial.names}


# --- transformers' models draw what their constructors would


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_transformers_models_draw_what_their_constructors_would(name):
    build = {**MODELS, **OTHERS}[name]
    made = build()
    drawn = values(on_meta(build))
    params, buffers = dict(made.named_parameters()), dict(made.named_buffers())
    assert drawn.keys() == params.keys() | buffers.keys()
    for key, x in buffers.items():  # rotary tables, positions, scales: values without chance
        assert torch.equal(x, drawn[key]), key
    for key, x in params.items():
        y = drawn[key]
        constant = x.std(correction=0) == 0
        if constant:
            assert torch.equal(x, y), key
            continue
        assert torch.equal((x == 0).all(-1), (y == 0).all(-1)), key  # padding rows
        # The standard deviation of n normal numbers has a relative error of 1 / sqrt(2 n).
        assert abs(y.std() / x.std() - 1) < 6 / math.sqrt(x.numel()), key


def test_residual_projections_of_gpt2_are_scaled_by_their_parents():
    drawn = values(on_meta(zoo.gpt2))
    scaled, plain = (drawn[f"transformer.h.0.attn.{n}.weight"].std() for n in ("c_proj", "c_attn"))
    assert abs(plain / scaled - math.sqrt(2 * 2)) < 0.2


def test_seeds_and_modules_draw_different_numbers():
    model = on_meta(MODELS["llama"])
    one, two = values(model, seed=1), values(model, seed=2)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert not torch.equal(one[name.format(0)], two[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert torch.equal(one[name.format(0)], values(model, seed=1)[name.format(0)])


# --- equal on every mesh


def drawn(name, mesh, device, **options):
    """Return weights, buffers and the loss of a model that was built on meta."""
    torch.manual_seed(torch.distributed.get_rank())  # the first rank's seed counts
    model = nemo2.annotate(on_meta(MODELS[name]))
    parallel = nemo2.parallelize(model, nemo2.make_mesh(**mesh, device=device), **options)
    buffers = {n: b.cpu() for n, b in parallel.named_buffers()}
    state = {n: w.cpu() for n, w in parallel.full_state_dict().items()}
    if name == "mixtral" and mesh:  # torch 2.13: grouped_mm on meta takes bfloat16 alone
        return state, buffers, None
    batch = zoo.lm(4)
    dp, rank = parallel.plan.sizes.dp, parallel.groups.dp_rank
    own = {k: v.chunk(dp)[rank] for k, v in batch.items()}
    return state, buffers, float(parallel.backward(zoo.own_loss, own))


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", list(MODELS))
def test_transformers_models_are_equal_on_every_mesh(pool, name):
    ((state, buffers, loss),) = pool.run(1, drawn, name, {}, pool.device)
    made = MODELS[name]()
    made.load_state_dict(state, strict=False, assign=True)
    made.tie_weights()
    assert {n for n, _ in made.named_parameters()} <= state.keys()
    same(dict(made.named_buffers()), buffers)
    expected = zoo.own_loss(made, zoo.lm(4)).item()
    assert loss == pytest.approx(expected, rel=1e-5)  # float32
    meshes = [(2, {"tp": 2}), (2, {"dp": 2})]
    if name in ("llama", "tied llama", "gemma2", "gpt2"):
        meshes += [(2, {"pp": 2}), (4, {"tp": 2, "pp": 2})]
    for world, mesh in meshes:
        # FSDP2 warns of blocks that return views, as T5's do.
        options = {"data_parallel": "ddp"} if name == "t5" else {}
        for theirs, their_buffers, their_loss in pool.run(
            world, drawn, name, mesh, pool.device, **options
        ):
            same(state, theirs)
            same(buffers, their_buffers)
            assert their_loss is None or their_loss == pytest.approx(expected, rel=1e-5)


# --- models that use self.apply(self._init_weights)


class Applied(nn.Module):
    """As nanoGPT: tied before ``apply``; ``more`` says what the constructor does beside it."""

    def __init__(self, more="", nested=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.inner = Applied() if nested else nn.LayerNorm(WIDTH)
        self.embed.weight = self.head.weight
        shard(self.layers, "pp")
        if more != "never":
            self.apply(self._init_weights)
        if more == "scaled":
            for layer in self.layers:
                nn.init.normal_(layer.weight, std=0.002)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.03)


def test_what_is_applied_is_drawn_so():
    drawn = values(on_meta(Applied))
    assert drawn["layers.0.bias"].eq(0.5).all()
    assert drawn["inner.weight"].abs().max() < 0.2
    assert drawn["inner.bias"].eq(0).all()  # what _init_weights leaves
    assert abs(drawn["layers.1.weight"].std() - 0.02) < 0.003
    assert abs(drawn["embed.weight"].std() - 0.02) < 0.003  # the head is visited after it
    nested = values(on_meta(functools.partial(Applied, nested=True)))
    assert nested["inner.layers.0.bias"].eq(0.5).all()
    plain = values(on_meta(functools.partial(Applied, "never")))
    assert plain["inner.weight"].eq(1).all()
    assert plain["layers.0.bias"].abs().max() <= 1 / math.sqrt(WIDTH)
    assert abs(plain["embed.weight"].std() - 1 / math.sqrt(3 * WIDTH)) < 0.01  # made for the head


class Wrapper(nn.Module):
    """A model of transformers in another module, as tasks have them."""

    def __init__(self):
        super().__init__()
        self.model, self.head = zoo.causal("Llama"), nn.Linear(WIDTH, 2)


def test_a_model_of_transformers_in_another_module():
    drawn = values(on_meta(Wrapper))
    assert abs(drawn["model.lm_head.weight"].std() - 0.02) < 0.003
    assert drawn["head.weight"].abs().max() <= 1 / math.sqrt(WIDTH)


# --- what cannot be known is refused


class Direct(nn.Module):
    """Its constructor initialises a part by itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        nn.init.normal_(self.inner.weight, std=0.1)


class Replaced(nn.Module):
    """Its constructor takes another parameter for one that was filled."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)
        self.inner.weight = nn.Parameter(torch.zeros(2, 2))


class Truncated(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        nn.init.trunc_normal_(self.inner.weight, std=0.1)


class Lost(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.scale = torch.ones(2)


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))
        nn.init.ones_(self.weight)

    def reset_parameters(self):
        nn.init.constant_(self.weight, self.weight.sum().item())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("mask", torch.ones(2, 2).tril(), persistent=False)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self._init_weights()

    def _init_weights(self):
        self.inner.weight.data.fill_(1)


def clip():
    import transformers

    image = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    image |= {"num_attention_heads": 4}
    text = image | {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    image |= {"image_size": 16, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Direct, r"'inner.weight' has been written 2 times .* reset_parameters of its modules"),
        (Replaced, r"'inner.weight' has been written 0 times"),
        (functools.partial(Applied, "scaled"), r"'layers.0.weight' has been written 3 times"),
        (Truncated, r"calls trunc_normal_, which leaves no trace"),
        (Lost, r"attribute 'scale' of Lost is a tensor on meta, and no buffer"),
        (Reads, r"reset_parameters of Reads cannot be run on meta"),
        (Masked, r"Masked has no reset_parameters for buffer 'mask'"),
        (Unknown, r"Unknown has _init_weights, which may set its submodules"),
        (clip, r"_init_weights of its model does not fill parameter 'logit_scale' of CLIPModel"),
    ],
)
def test_what_cannot_be_drawn_again_is_refused(build, message):
    with pytest.raises(nemo2.Nemo2Error, match=message):
        Initial(on_meta(build), 1)


def test_counts_that_a_copy_has_lost():
    plain = copy.deepcopy(on_meta(functools.partial(Applied, "never")).layers)
    assert values(plain)["0.bias"].abs().max() <= 1 / math.sqrt(WIDTH)
    with pytest.raises(nemo2.Nemo2Error, match="written 0 times"):
        Initial(copy.deepcopy(on_meta(Applied)), 1)


def failing(device):
    """One rank's stage has a module whose initialiser fails when it has values to fill."""
    model = on_meta(lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), Half()])}))
    shard(model["layers"], "pp")
    try:
        nemo2.parallelize(model, nemo2.make_mesh(pp=2, device=device))
    except nemo2.Nemo2Error as error:
        return str(error)
    return "accepted"


def half_on_meta(device):
    mesh = nemo2.make_mesh(dp=2, device=device)
    rank = torch.distributed.get_rank()
    model = nn.Linear(2, 2, device="meta" if rank else "cpu")
    try:
        nemo2.parallelize(model, mesh)
    except nemo2.Nemo2Error as error:
        return str(error)
    return "accepted"


def test_all_ranks_are_on_meta_or_none(pool):
    assert all("on meta or not, on every rank" in x for x in pool.run(2, half_on_meta, pool.device))


class Half(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def reset_parameters(self):
        nn.init.ones_(self.weight[:1])
        nn.init.ones_(self.bias)


def test_all_ranks_raise_when_one_cannot_draw(pool):
    for text in pool.run(2, failing, pool.device):
        assert "initialisers of 'layers.1' (Half) do not fill 'weight'" in text


# --- shards of all kinds


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.factor, 1.5)

    def forward(self, x):
        return x * self.factor


class Uneven(nn.Module):
    """Sizes that dp does not divide, no dims at all, a tie, something frozen."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 7)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(7, 5), Scale(), nn.Linear(5, 7), nn.Tanh()) for _ in range(2)]
        )
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, VOCAB)
        self.head.weight = self.embed.weight
        self.layers[1][0].weight.requires_grad_(False)
        shard(self.layers, "pp")

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def trained(mesh, device, **options):
    """Return the weights before and after two steps of a model that was built on meta."""
    torch.manual_seed(3)
    parallel = nemo2.parallelize(on_meta(Uneven), nemo2.make_mesh(**mesh, device=device), **options)
    before = {n: w.cpu().clone() for n, w in parallel.full_state_dict().items()}
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    own = token_ids(8).chunk(parallel.plan.sizes.dp)[parallel.groups.dp_rank]
    for _ in range(2):
        optimizer.zero_grad()
        parallel.backward(next_token, own)
        optimizer.step()
    return before, {n: w.cpu() for n, w in parallel.full_state_dict().items()}


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_shards_of_all_kinds_train_from_the_same_values(pool, precision):
    ((first, expected),) = pool.run(1, trained, {}, pool.device, precision=precision)
    assert first["layers.0.1.factor"] == 1.5
    cases = [
        (2, {"dp": 2}, {"data_parallel": "fsdp"}),
        (2, {"dp": 2}, {"data_parallel": "zero1"}),
        (2, {"dp": 2}, {"data_parallel": "ddp"}),
        (4, {"dp": 4}, {"data_parallel": nemo2.DataParallel("fsdp", replicate=2)}),
        (4, {"dp": 2, "pp": 2}, {"pipeline": nemo2.Pipeline(microbatches=2)}),
    ]
    near = {"atol": 1e-5, "rtol": 1e-5} if precision is None else {"atol": 2e-2, "rtol": 2e-2}
    for world, mesh, options in cases:
        runs = pool.run(world, trained, mesh, pool.device, precision=precision, **options)
        for before, after in runs:
            same(first, before)
            torch.testing.assert_close(after, expected, **near)


# --- memory


class Alive(TorchDispatchMode):
    """Counts the bytes of storages on cpu that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and type(x) is Tensor and x.device.type == "cpu":
                self._note(x.untyped_storage())
        return out

    def _note(self, storage):
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen[storage] = Freed(self, size)
            self.now += size
            self.most = max(self.most, self.now)


class Freed:
    """Dies with the storage that it is kept for."""

    def __init__(self, alive, size):
        self.alive, self.size = alive, size

    def __del__(self):
        self.alive.now -= self.size


DEEP, WIDE = 8, 256


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WIDE, WIDE)
        self.layers = nn.ModuleList([nn.Linear(WIDE, WIDE) for _ in range(DEEP)])
        self.head = nn.Linear(WIDE, WIDE)
        for layer in self.layers:
            shard(layer.weight, "tp", dim=0)
        shard(self.layers, "pp")

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def most_alive(mesh, device, meta, **options):
    """Return the most bytes alive in parallelize and this rank's shards, in modules."""
    model = on_meta(Stack) if meta else Stack()
    with Alive() as alive:
        parallel = nemo2.parallelize(model, nemo2.make_mesh(**mesh, device=device), **options)
    shards = sum(e.local.nbytes for e in parallel.storage)
    module = WIDE * (WIDE + 1) * 4
    return alive.most / module, shards / module


@pytest.mark.parametrize("meta", [True, False])
def test_no_rank_holds_more_than_its_shards_and_one_module(pool, meta):
    if pool.device != "cpu":
        pytest.skip("counts bytes on the host")
    cases = [
        (2, {"dp": 2}, {}),
        (2, {"dp": 2}, {"data_parallel": "zero1"}),
        (2, {"dp": 2}, {"precision": "bf16"}),
        (2, {"tp": 2}, {}),
        (2, {"pp": 2}, {}),
        (4, {"dp": 2, "pp": 2}, {}),
        (4, {"dp": 4}, {"data_parallel": nemo2.DataParallel("fsdp", replicate=2)}),
    ]
    for world, mesh, options in cases:
        for most, shards in pool.run(world, most_alive, mesh, pool.device, meta, **options):
            assert shards < 0.6 * (DEEP + 2) + 1, (mesh, shards)
            # The model that was given, and the last value sent: gloo may hold it a little longer.
            own = 0 if meta else DEEP + 2 + 1
            assert most < own + shards + 1.2, (mesh, options, most, shards)
