"""``generate`` gives on every mesh the tokens of one device, on the live weights."""

from __future__ import annotations

import functools
import gc
import itertools
import re
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import nemo2
from nemo2 import Nemo2Error, generate, step_plans
from nemo2.inference import KVCache
from nemo2.inference.request import Request
from nemo2.inference.sampling import Sampling, uniform
from tests.generation import MODELS, PROMPTS, build, continued, lists
from tests.pool import Pool
from tests.test_communication import Watch
from tests.zoo import causal

transformers = pytest.importorskip("transformers")

SAMPLED = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 4}
LONG, SHORT = 64, 8
SHOWN = ("gpt", "Llama", "Qwen2", "GPT-2")  # the others with fewer tokens


@functools.cache
def alone(name: str) -> tuple[list[list[int]], list[list[int]]]:
    """Return the greedy and the sampled continuations on one device."""
    model, new = build(name), LONG if name in SHOWN else SHORT
    greedy = [continued(model, prompt, new) for prompt in PROMPTS]
    return greedy, lists(generate(model, PROMPTS, max_new_tokens=SHORT, **SAMPLED))


# --- one device


@pytest.mark.parametrize("name", MODELS)
def test_one_device(name: str) -> None:
    model, (greedy, sampled) = build(name).train(), alone(name)
    new = len(greedy[0]) - len(PROMPTS[0])
    assert lists(generate(model, PROMPTS, max_new_tokens=new)) == greedy
    uncached = generate(model, PROMPTS, max_new_tokens=new, use_cache=False)
    assert lists(uncached) == greedy
    again = generate(model, PROMPTS, max_new_tokens=SHORT, use_cache=False, **SAMPLED)
    assert lists(again) == sampled
    assert all(m.training for m in model.modules())


def test_prompts_of_all_kinds() -> None:
    model = build("gpt")
    want = [continued(model, [1, 2, 3], 3), continued(model, [4, 5, 6], 3)]
    for prompts in ([[1, 2, 3], (4, 5, 6)], torch.tensor([[1, 2, 3], [4, 5, 6]])):
        assert lists(generate(model, prompts, max_new_tokens=3)) == want
    ragged = [torch.tensor([1, 2, 3], dtype=torch.int32), [4, 5, 6]]
    assert lists(generate(model, ragged, max_new_tokens=3)) == want


class Plain(nn.Module):
    """A causal model that takes no cache and returns a dict; its step is another signature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, ids: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        seen = self.embed(ids).cumsum(1)
        return {"logits": self.head(seen * scale)}


def test_a_model_without_a_cache() -> None:
    found = generate(Plain(), [[1, 2], [3]], max_new_tokens=4)
    assert [len(x) for x in found] == [6, 5]

    def step(model: nn.Module, ids: Tensor, cache: KVCache | None) -> Tensor:
        assert cache is None
        return model(ids, scale=2.0)["logits"]

    scaled = generate(Plain(), [[1, 2], [3]], max_new_tokens=4, step=step, use_cache=False)
    assert [len(x) for x in scaled] == [6, 5]
    with pytest.raises(Nemo2Error, match=r"use_cache=True\): Plain.forward takes no cache"):
        generate(Plain(), [[1]], max_new_tokens=1, use_cache=True)


# --- sampling


def test_what_is_left_to_draw_among_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    scores = torch.randn(64, 50) * 3
    for k, p in itertools.product((None, 1, 7, 100), (None, 0.01, 0.5, 0.95, 1.0)):
        want = scores
        if k is not None:
            want = transformers.TopKLogitsWarper(k)(None, want)
        if p is not None and p < 1.0:
            want = transformers.TopPLogitsWarper(p)(None, want)
        assert torch.equal(Sampling(1.0, k, p)._among(scores), want), (k, p)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.0, 0.2, 0.3])).expand(20000, 4)
    tokens = Sampling(1.0).choose(logits, range(20000), 0)
    shares = tokens.bincount(minlength=4) / 20000
    assert shares[1] == 0
    assert (shares - torch.tensor([0.5, 0.0, 0.2, 0.3])).abs().max() < 0.015
    cooler = Sampling(0.5).choose(logits, range(20000), 0).bincount(minlength=4) / 20000
    assert abs(float(cooler[0]) - 0.25 / 0.38) < 0.015
    drawn = {uniform(s, p, n) for s, p, n in itertools.product(range(8), range(8), range(8))}
    assert len(drawn) == 512
    assert 0.45 < sum(drawn) / 512 < 0.55


# --- meshes


def tokens_on(mesh: dict[str, int], options: Any, names: tuple[str, ...], new: int) -> Any:
    """Return what each model generates on the mesh, greedily and sampled."""
    found = {}
    for name in names:
        model = nemo2.parallelize(build(name), nemo2.make_mesh(**mesh), **options)
        greedy = lists(generate(model, PROMPTS, max_new_tokens=new))
        sampled = lists(generate(model, PROMPTS, max_new_tokens=SHORT, **SAMPLED))
        found[name] = greedy, sampled
    return found


INTERLEAVED = {"pipeline": nemo2.Pipeline(4, "interleaved", 2)}
MESHES = [
    ({"dp": 2, "tp": 2}, {}, tuple(MODELS)),
    ({"pp": 2, "dp": 2}, {"data_parallel": "zero1"}, ("gpt", "Llama")),
    ({"pp": 2, "cp": 2}, INTERLEAVED, ("gpt",)),
    ({"cp": 2, "tp": 2}, {"sequence_parallel": True}, ("gpt", "Qwen2")),
    ({"dp": 4}, {"data_parallel": nemo2.DataParallel(reshard=True)}, ("gpt",)),
    ({"tp": 4}, {}, ("Qwen2",)),  # more ranks than key heads
    ({"pp": 4}, {"data_parallel": "ddp"}, ("gpt",)),
]


def check_tokens(pool: Pool, mesh: Any, options: Any, names: tuple[str, ...], new: int) -> None:
    got = pool.run(4, tokens_on, mesh, options, names, new)
    for rank, name in itertools.product(range(4), names):
        greedy, sampled = alone(name)
        wanted = [row[: len(p) + new] for row, p in zip(greedy, PROMPTS, strict=True)]
        assert got[rank][name][0] == wanted, (rank, name)
        assert got[rank][name][1] == sampled, (rank, name)


def test_long_continuations_on_stages_of_split_layers(pool: Pool) -> None:
    check_tokens(pool, {"pp": 2, "tp": 2}, {}, SHOWN, LONG)


@pytest.mark.parametrize(("mesh", "options", "names"), MESHES, ids=str)
def test_equals_one_device(pool: Pool, mesh: Any, options: Any, names: tuple[str, ...]) -> None:
    check_tokens(pool, mesh, options, names, SHORT)


class Seen:
    """The caches that a step was given."""

    def __init__(self) -> None:
        self.caches: list[KVCache] = []


def parts_and_costs() -> dict[str, Any]:
    """On pp=2 x tp=2: what each rank keeps, plans, sends and frees; and the other arguments."""
    model = nemo2.parallelize(
        build("gpt"), nemo2.make_mesh(pp=2, tp=2), pipeline=nemo2.Pipeline(microbatches=4)
    )
    seen = Seen()

    def step(module: nn.Module, ids: Tensor, cache: KVCache | None) -> Tensor:
        if cache is not None and cache not in seen.caches:
            seen.caches.append(cache)
        return module(ids, cache=cache)

    said: dict[str, Any] = {}
    with mock.patch.object(step_plans, "plan_step", wraps=step_plans.plan_step) as planned:
        said["tokens"] = lists(generate(model, PROMPTS, max_new_tokens=12, step=step))
        said["plans"] = planned.call_count
        generate(model, [[1, 2, 3, 4, 5, 6]] * 5, max_new_tokens=16, step=step)
        said["plans of the next"] = planned.call_count - said["plans"]
    memory = [
        {
            layer.size: slots.memory.shape
            for (layer, _), slots in c._slots.items()
            if slots.memory is not None
        }
        for c in seen.caches[:3]
    ]
    said["shapes"] = [set(m.values()) for m in memory]
    said["layers"] = [sum(s.memory is not None for s in c._slots.values()) for c in seen.caches[:3]]
    alive = [weakref.ref(c) for c in seen.caches]
    seen.caches.clear()
    del memory, planned  # a mock keeps the arguments of its calls
    gc.collect()
    said["alive"] = sum(ref() is not None for ref in alive)
    with Watch() as few:
        generate(model, PROMPTS, max_new_tokens=3)
    with Watch() as more:
        generate(model, PROMPTS, max_new_tokens=4)
    said["collectives of a token"] = more - few
    said["first, last"] = nemo2.is_first_stage(model), nemo2.is_last_stage(model.module.layers)
    return said


def test_what_a_rank_keeps_and_does(pool: Pool) -> None:
    got = pool.run(4, parts_and_costs)
    want = [row[: len(p) + 12] for row, p in zip(alone("gpt")[0], PROMPTS, strict=True)]
    for rank, said in enumerate(got):
        assert said["tokens"] == want
        # 3 microbatches of 2 sequences (one is a copy), 2 local layers, 2 of 4 heads, 64 columns.
        assert said["shapes"] == [{torch.Size([2, 2, 64, 8])}] * 3
        assert said["layers"] == [4] * 3
        assert said["plans"] == 2  # the prompts, and all later tokens
        assert said["plans of the next"] == 0
        assert said["alive"] == 0
        # Of 2 x 1 x 32 elements: the embedding's, and two of each layer; and the new tokens.
        sums = 3 * (5 if rank < 2 else 4)
        counts = said["collectives of a token"]
        assert (counts["all_reduce", 64], counts["all_reduce", 6 + 1]) == (sums, 1)
        assert said["first, last"] == (rank < 2, rank >= 2)


def in_bf16() -> list[list[int]]:
    model = nemo2.parallelize(
        build("Qwen2").float(), nemo2.make_mesh(pp=2, dp=2), precision="bf16", data_parallel="ddp"
    )
    found = lists(generate(model, PROMPTS, max_new_tokens=3))
    assert all(e.leaf.numel() == 0 for e in model.storage if e.leaf is not e.compute)
    return found


def test_bf16(pool: Pool) -> None:
    got = pool.run(4, in_bf16)
    assert [len(row) for row in got[0]] == [len(p) + 3 for p in PROMPTS]
    assert got == [got[0]] * 4


def gathers_of_fsdp() -> list[int]:
    """Return how many gathers requests of 2 and of 6 tokens take."""
    model = nemo2.parallelize(build("gpt"), nemo2.make_mesh(dp=2))
    counts = []
    for new in (2, 6):
        with Watch() as seen:
            generate(model, PROMPTS, max_new_tokens=new)
        counts.append(sum(n for (name, _), n in seen.items() if "gather" in name))
    return counts


def test_fsdp_gathers_once_a_request(pool: Pool) -> None:
    few, more = pool.run(2, gathers_of_fsdp)[0]
    assert few == more > 0


def streams(mesh: dict[str, int]) -> tuple[Any, ...]:
    """Return what a stream is told, and what ends sequences."""
    model = nemo2.parallelize(build("gpt"), nemo2.make_mesh(**mesh))
    told: list[tuple[int, int]] = []
    rank = torch.distributed.get_rank()
    stream = (lambda prompt, token: told.append((prompt, token))) if rank == 1 else None
    plain = generate(model, PROMPTS, max_new_tokens=6, stream=stream)
    stop = int(plain[2][len(PROMPTS[2]) + 1])
    stopped = generate(model, PROMPTS, max_new_tokens=6, stop=stop)

    def fails(prompt: int, token: int) -> None:
        raise RuntimeError("a stream that fails")

    message = ""
    try:
        generate(model, PROMPTS, max_new_tokens=6, stream=fails if rank == 1 else None)
    except (RuntimeError, Nemo2Error) as error:
        message = str(error)
    last = ""
    try:
        generate(model, [[1]], max_new_tokens=1, stream=fails if rank == 1 else None)
    except (RuntimeError, Nemo2Error) as error:
        last = str(error)
    again = generate(model, PROMPTS, max_new_tokens=6)
    assert lists(again) == lists(plain)
    return lists(plain), told, stop, lists(stopped), message, last


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"dp": 2}], ids=str)
def test_stream_and_stop(pool: Pool, mesh: dict[str, int]) -> None:
    got = pool.run(2, streams, mesh)
    for rank, (plain, told, stop, stopped, message, last) in enumerate(got):
        assert plain == [row[: len(p) + 6] for row, p in zip(alone("gpt")[0], PROMPTS, strict=True)]
        rounds = [(p, plain[p][len(PROMPTS[p]) + n]) for n in range(6) for p in range(5)]
        assert told == (rounds if rank == 1 else [])
        for prompt, row, short in zip(PROMPTS, plain, stopped, strict=True):
            new = row[len(prompt) :]
            end = new.index(stop) + 1 if stop in new else 6
            assert short == row[: len(prompt) + end]
        assert len(stopped[2]) <= len(PROMPTS[2]) + 2
        assert ("a stream that fails" if rank == 1 else "on 1 other rank(s), after 1 t") in message
        assert ("a stream that fails" if rank == 1 else "on 1 other rank(s), after 1 t") in last


# --- errors

BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([[1], []], {}, "prompt 1 is empty: there is nothing to continue"),
    ([], {}, "there are no prompts"),
    ([1, 2], {}, "prompt 0 is no list of ids: int; prompts is a list of prompts"),
    ("text", {}, "prompts is a str, not a list of lists of ids"),
    (torch.ones(2), {}, r"prompts is a tensor of shape \(2,\)"),
    ([torch.ones(2)], {}, r"prompt 0 is no list of ids: \(2,\)"),
    ([[1, -2]], {}, "prompt 0 has the id -2, which is negative"),
    ([[1], [96]], {}, "prompt 1 has the id 96, and 'embed' has 96 rows: ids from 0 to 95"),
    (
        [[1] * 50],
        {"max_new_tokens": 32},
        "the longest prompt has 50 tokens and max_new_tokens is 32, but 'place' has 80 positions\n"
        "  options: max_new_tokens=31",
    ),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 is not a positive integer"),
    ([[1]], {"temperature": -1.0}, "temperature=-1.0 is not a number from 0"),
    ([[1]], {"top_k": 3}, "top_k and top_p need a temperature"),
    ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k=0 is neither None nor a positive integer"),
    ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 is neither None nor a number above 0"),
    ([[1]], {"stop": 0.5}, "stop=0.5 is not a token or a list of tokens"),
    ([[1]], {"stop": ["x"]}, r"stop=\['x'\] is not a token or a list of tokens"),
    ([[1]], {"microbatches": 0}, "microbatches=0 is neither None nor a positive integer"),
    ([[1]], {"seed": 0.5}, "seed=0.5 is not an integer"),
]


def refused(model: nn.Module) -> list[str]:
    messages = []
    for prompts, options, _ in BAD:
        with pytest.raises(Nemo2Error) as caught:
            generate(model, prompts, **({"max_new_tokens": 4} | options))
        messages.append(str(caught.value))
    return messages


def refused_on_a_mesh(mesh: dict[str, int]) -> list[str]:
    model = nemo2.parallelize(build("gpt"), nemo2.make_mesh(**mesh))
    messages = refused(model)
    after = lists(generate(model, PROMPTS, max_new_tokens=2))
    assert after == [row[: len(p) + 2] for row, p in zip(alone("gpt")[0], PROMPTS, strict=True)]
    rank = torch.distributed.get_rank()
    calls: list[dict[str, Any]] = [
        {"prompts": [[1 + rank]], "max_new_tokens": 2},
        {"prompts": [[1]], "max_new_tokens": 2 if rank else 0},
    ]
    for arguments in calls:
        with pytest.raises(Nemo2Error) as caught:
            generate(model, **arguments)
        messages.append(str(caught.value))
    with torch.no_grad():  # on the last stage alone
        broken = dict(model.module.named_parameters()).get("head.weight")
        if broken is not None:
            broken.fill_(float("nan"))
    with pytest.raises(Nemo2Error) as caught:
        generate(model, PROMPTS, max_new_tokens=2)
    return [*messages, str(caught.value)]


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"dp": 2}], ids=str)
def test_errors(pool: Pool, mesh: dict[str, int]) -> None:
    plain = refused(build("gpt"))
    for message, (_, _, match) in zip(plain, BAD, strict=True):
        assert re.search(match, message), message
    got = pool.run(2, refused_on_a_mesh, mesh)
    assert got[0] == got[1]
    assert got[0][: len(BAD)] == plain
    assert "with other arguments on ranks [1] than on rank 0" in got[0][-3]
    assert "max_new_tokens=0 is not a positive integer" in got[0][-2]
    assert "the logits of token 0 of prompt 0 are not numbers: nan" in got[0][-1]


def test_models_that_do_not_fit() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(Nemo2Error, match="is an encoder and a decoder"):
        generate(t5, [[1]], max_new_tokens=1)
    llama = build("Llama")
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(Nemo2Error, match="'flash_attention_2' takes no mask of a cache of fixed"):
        generate(llama, [[1]], max_new_tokens=1)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(Nemo2Error, match=r"MambaForCausalLM\.forward takes no cache"):
        generate(mamba, [[1]], max_new_tokens=1, use_cache=True)
    hybrid = causal("Lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(Nemo2Error, match="other states than keys and values"):
        generate(hybrid, [[1]], max_new_tokens=1)
    assert len(generate(hybrid, [[1]], max_new_tokens=1, use_cache=False)[0]) == 2
    with pytest.raises(Nemo2Error, match="the model is on meta"):
        generate(nn.Linear(2, 2, device="meta"), [[1]], max_new_tokens=1)
    with pytest.raises(Nemo2Error, match="the model returned str, not logits"):
        generate(nn.Embedding(4, 8), [[1, 2]], max_new_tokens=1, step=lambda *_: "x")


class Several(nn.Module):
    """Takes more than ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)

    def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
        return self.embed(ids) + segments


@pytest.mark.parametrize(
    ("build_it", "says"),
    [
        (lambda: nn.Linear(4, 4), "Linear does not take ids"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "Sequential does not take ids"),
        (Several, r"Several\.forward cannot be called with ids alone: missing.*'segments'"),
        (lambda: bert("BertForMaskedLM"), "BertForMaskedLM sees the tokens on both sides"),
        (lambda: bert("BertModel"), "the model returned BaseModelOutput"),
    ],
)
def test_what_is_no_language_model(build_it: Any, says: str) -> None:
    with pytest.raises(Nemo2Error, match=says):
        generate(build_it(), [[1, 2, 3], [4]], max_new_tokens=2)


def bert(kind: str) -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=20, num_attention_heads=2, **sizes)
    return getattr(transformers, kind)(config)


class Segments(nn.Module):
    """Looks up a constant in a table of two rows, and positions in one of six."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.segment = nn.Embedding(16, 8), nn.Embedding(2, 8)
        self.positions, self.head = nn.Embedding(6, 8), nn.Linear(8, 16)

    def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
        x = self.embed(ids) + self.segment(torch.zeros_like(ids))
        at = torch.arange(ids.shape[1]) if cache is None else cache.positions
        return self.head(x + self.positions(at))


def test_a_constant_is_no_position() -> None:
    for prompts in ([[1]], [[1, 2]], [[1, 2, 3], [4]], [[4], [1, 2, 3]]):
        for use_cache in (True, False):
            model = Segments()
            made = generate(model, prompts, max_new_tokens=3, use_cache=use_cache)
            assert [len(x) for x in made] == [len(p) + 3 for p in prompts]
            for longer in ([[1]], [[1, 2, 3], [4]]):
                with pytest.raises(Nemo2Error, match="but 'positions' has 6 positions"):
                    generate(model, longer, max_new_tokens=7, use_cache=use_cache)


# --- where it may be called


class Inside(nn.Module):
    """Calls generate in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("gpt")

    def forward(self, ids: Tensor) -> Tensor:
        generate(self.model, [[1]], max_new_tokens=1)
        return self.model(ids)


def inside_of_a_step() -> None:
    model = nemo2.parallelize(Inside(), nemo2.make_mesh(dp=2))
    with pytest.raises(Nemo2Error, match="generate is called inside of a step that runs"):
        model(torch.tensor([[1, 2], [3, 4]]))


def test_not_inside_of_a_step(pool: Pool) -> None:
    pool.run(2, inside_of_a_step)


def test_requests_are_compared_by_what_they_ask() -> None:
    one = Request(((1,),), 2, frozenset((3, 4)), Sampling(), "")
    assert one.digest() == Request(((1,),), 2, frozenset((4, 3)), Sampling(), "").digest()
    assert one.digest() != Request(((1,),), 2, frozenset((3, 4)), Sampling(seed=1), "").digest()
