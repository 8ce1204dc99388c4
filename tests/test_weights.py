"""Weights in and out: Hugging Face folders on any mesh, read by parts; what is wrong with them."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

import nemo2
from nemo2 import CheckpointError, DataParallel, shard
from nemo2.checkpoint.folder import Folder
from nemo2.checkpoint.save import save_folder
from nemo2.checkpoint.target import target_of
from nemo2.options import Pipeline
from nemo2.plan import ParamPlan
from nemo2.sharding.fused import in_rank_order
from nemo2.sharding.slices import held_parts
from nemo2.sharding.storage import local_of
from tests.models import GPT2, LLAMA, VOCAB, Fused, gpt2, llama, token_ids

transformers = pytest.importorskip("transformers")

HEAD = LLAMA | {"lm_head.weight": ("tp", 0)}
LAYERS = 4


def qwen2(layers: int) -> nn.Module:
    config = llama(layers).config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = transformers.Qwen2Config(**{n: config[n] for n in names}, **heads)
    return transformers.Qwen2ForCausalLM(made)


def mixtral(layers: int) -> nn.Module:
    """Twelve experts: their numbers do not sort as text does."""
    own = {"num_local_experts": 12, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_hidden_layers": layers}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, **own))


BUILD = {
    "llama": (llama, HEAD),
    "llama tied": (lambda layers: llama(layers, tied=True), LLAMA),
    "gpt2": (gpt2, GPT2),
    "qwen2": (qwen2, HEAD),
    "mixtral": (mixtral, {"model.layers": "pp"}),
    "fused": (Fused, {}),
}


def build(kind: str, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    model = BUILD[kind][0](LAYERS).to(dtype).eval()
    for p in model.parameters():  # biases and norms are constants otherwise
        nn.init.normal_(p, std=0.3)
    return model


def parallel(kind: str, seed: int, mesh: dict[str, int], dtype=torch.float64, **options):
    model = nemo2.annotate(build(kind, seed, dtype), BUILD[kind][1])
    return nemo2.parallelize(model, nemo2.make_mesh(**mesh), **options)


def logits_of(module, ids):
    out = module(ids)
    return getattr(out, "logits", out)


def run(model, length=9):
    ids = token_ids(4, length).to(model.groups.device)
    outputs = model.run_forward(logits_of, ids, key=("logits",), microbatches=2)
    return model.from_last_stage(torch.cat(outputs).cpu() if outputs else None)


def reference(model, length=9) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, token_ids(4, length))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What transformers writes of each model: several files, an index, its own names."""
    root = tmp_path_factory.mktemp("folders")
    for kind in set(BUILD) - {"fused"}:
        build(kind, 1).save_pretrained(root / kind, max_shard_size="60KB")
    return root


# --- which part is whose


def param(shape, tp_dim, parts=None) -> ParamPlan:
    own = (shape, shape, torch.float64, True, tp_dim, 0, (0,), (0,), parts)
    return ParamPlan("p", (), *own)


@pytest.mark.parametrize(("tp", "dp"), [*itertools.product((1, 2, 4), (1, 2, 3, 5, 16))])
def test_parts_are_what_ranks_hold(tp, dp):
    """As tensors are cut: a slice of each part, then chunks as torch and FSDP2 make them."""
    cases = [((8, 5), None, None), ((8, 5), 0, None), ((3, 8), 1, None), ((7,), None, None)]
    cases += [((24, 3), 0, (8, 12, 4)), ((3, 16), 1, (8, 4, 4)), ((16,), 0, (8, 4, 4)), ((), None)]
    for shape, tp_dim, *parts in cases:
        p = param(shape, tp_dim if tp > 1 else None, *parts)
        full = torch.arange(torch.Size(shape).numel()).reshape(shape)
        held = in_rank_order(full, p, tp)
        for dp_dim, r, s in itertools.product((None, *range(len(shape))), range(tp), range(dp)):
            mine = held if p.tp_dim is None else held.chunk(tp, p.tp_dim)[r]
            if dp_dim is not None:
                chunks = mine.chunk(dp, dp_dim)
                mine = chunks[s] if s < len(chunks) else mine.narrow(dp_dim, 0, 0)
            made = torch.full_like(mine, -1)
            for part in held_parts(p, (tp, r), (dp, s), dp_dim):
                at = tuple(slice(a, a + n) for a, n in zip(part.at, part.box.shape, strict=True))
                made[at] = full[part.box.slices]
            assert torch.equal(made, mine), (shape, parts, dp_dim, r, s)


# --- equal to transformers, in and out


def in_and_out(kind, folder, mesh, options, out, length):
    """Run with other weights, load, run, and save; a second model on ``dp`` alone reads that."""
    model = parallel(kind, 2, mesh, **options)
    run(model, length)  # whatever is kept of the old weights would show
    report = nemo2.load(folder, model)
    assert (report.missing, report.unexpected) == ((), ())
    nemo2.save(out, model, format="safetensors")
    other = parallel(kind, 3, {"dp": torch.distributed.get_world_size()})
    nemo2.load(out, other)
    mine, theirs = model.full_state_dict(), other.full_state_dict()
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    return run(model, length), {n: t.cpu() for n, t in mine.items()}


INTERLEAVED = {"pipeline": Pipeline(microbatches=2, schedule="interleaved", virtual_stages=2)}
HYBRID = {"data_parallel": DataParallel("fsdp", replicate=2)}
ON_MESHES = [
    ("qwen2", {"tp": 2}, {}),
    ("llama tied", {"pp": 2}, {}),
    ("llama", {"pp": 2}, INTERLEAVED),
    ("llama", {"dp": 3}, {}),
    ("llama", {"cp": 2}, {"data_parallel": "zero1"}),
    ("llama tied", {"dp": 2}, {"data_parallel": "ddp"}),
    ("llama tied", {"tp": 2, "pp": 2}, {}),
    ("gpt2", {"dp": 2, "tp": 2}, {}),
    ("gpt2", {"dp": 4}, HYBRID),
]


@pytest.mark.parametrize(("kind", "mesh", "options"), ON_MESHES, ids=lambda x: str(x)[:24])
def test_equal_to_transformers(pool, folders, tmp_path, kind, mesh, options):
    out = tmp_path / "out"
    world = torch.Size(mesh.values()).numel()
    length = 8 if "cp" in mesh else 9  # which cp has to divide
    results = pool.run(world, in_and_out, kind, folders / kind, mesh, options, out, length)
    plain = build(kind, 1)
    wanted = plain.state_dict()
    for logits, state in results:
        assert set(state) == set(wanted)
        assert all(torch.equal(state[n], wanted[n]) for n in wanted)
        # Other meshes add in another order; the weights are equal to the last bit.
        torch.testing.assert_close(logits, reference(plain, length), rtol=1e-10, atol=1e-10)
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert opened.dtype == torch.float64
    assert torch.equal(reference(opened), reference(plain))
    saved = {k for file in out.glob("*.safetensors") for k in load_file(file)}
    assert ("lm_head.weight" in saved) == (kind in ("llama", "qwen2"))


def computed_in_bf16(folder):
    model = parallel("llama", 2, {"tp": 2}, torch.float32, precision="bf16")
    run(model)
    nemo2.load(folder, model)
    right = parallel("llama", 1, {"tp": 2}, torch.float32, precision="bf16")
    return torch.equal(run(model), run(right))


def test_the_next_run_computes_with_what_was_loaded(pool, tmp_path):
    """Copies in another precision follow."""
    build("llama", 1, torch.float32).save_pretrained(tmp_path)
    assert pool.run(2, computed_in_bf16, tmp_path) == [True, True]


def between_meshes(folder):
    first = parallel("fused", 1, {"tp": 2, "pp": 2})
    nemo2.save(folder, first, format="safetensors")
    same = []
    for mesh in ({"dp": 2, "tp": 2}, {"pp": 4}, {"dp": 4}):
        other = parallel("fused", 2, mesh)
        nemo2.load(folder, other)
        mine, theirs = first.full_state_dict(), other.full_state_dict()
        same.append(all(torch.equal(mine[n], theirs[n]) for n in mine))
    return same


def test_fused_projections_between_meshes(pool, tmp_path):
    """Unequal parts; the file has the order of the unsplit model."""
    assert pool.run(4, between_meshes, tmp_path) == [[True] * 3] * 4
    read = {k: t for file in tmp_path.glob("*.safetensors") for k, t in load_file(file).items()}
    wanted = build("fused", 1).state_dict()
    assert set(read) == set(wanted)
    assert all(torch.equal(read[n], wanted[n]) for n in wanted)


def experts(folder, out):
    model = parallel("mixtral", 2, {"dp": 2, "pp": 2})
    nemo2.load(folder, model)
    nemo2.save(out, model, format="safetensors")
    return {n: t.cpu() for n, t in model.full_state_dict().items()}


def test_experts_one_by_one(pool, folders, tmp_path):
    keys = json.loads((folders / "mixtral/model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.block_sparse_moe.experts.11.w1.weight" in keys
    wanted = build("mixtral", 1).state_dict()
    for state in pool.run(4, experts, folders / "mixtral", tmp_path):
        assert all(torch.equal(state[n], wanted[n]) for n in wanted)
    # Its kernel on cpu takes no float64.
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(reference(opened), reference(build("mixtral", 1).float()))


# --- each rank reads its own bytes


class Counting:
    """A safetensors file that counts the bytes that are asked of it."""

    bytes = 0

    def __init__(self, file, **how):
        self.handle = REAL_OPEN(file, **how)

    def __enter__(self):
        self.handle.__enter__()
        return self

    def __exit__(self, *details):
        return self.handle.__exit__(*details)

    def keys(self):
        return self.handle.keys()

    def get_slice(self, name):
        return CountingSlice(self.handle.get_slice(name))


class CountingSlice:
    def __init__(self, view):
        self.view, self.get_shape = view, view.get_shape

    def __getitem__(self, index):
        read = self.view[index]
        Counting.bytes += read.nbytes
        return read


REAL_OPEN = safetensors.safe_open


def bytes_read(kind, folder, mesh, options):
    model = parallel(kind, 2, mesh, **options)
    Counting.bytes = 0
    with mock.patch.object(safetensors, "safe_open", Counting):
        nemo2.load(folder, model)
    held = sum(local_of(p).nbytes for p in model.params.values())
    assert all(isinstance(p, DTensor) for p in model.params.values())
    return Counting.bytes, held


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("gpt2", {"dp": 2, "tp": 2}), ("llama", {"tp": 2, "pp": 2}), ("mixtral", {"dp": 4})],
    ids=str,
)
def test_reads_the_bytes_of_its_parts(pool, folders, kind, mesh):
    total = sum(t.nbytes for t in build(kind, 1).state_dict().values())
    for read, held in pool.run(4, bytes_read, kind, folders / kind, mesh, {}):
        assert read == held
        assert read < 0.5 * total


# --- files


def saved_in_files(kind, mesh, out):
    model = parallel(kind, 1, mesh)
    save_folder(out, target_of(model), file_bytes=30_000)


def test_files_with_an_index(pool, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier save")
    (tmp_path / "model-00001-of-00099.safetensors").write_bytes(b"of an earlier save")
    pool.run(4, saved_in_files, "llama tied", {"dp": 2, "pp": 2}, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == sorted(set(index["weight_map"].values()))
    assert [f.name for f in files][-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert len(files) > 4
    size = 0
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 30_000
        assert all(index["weight_map"][k] == file.name for k in tensors)
        size += sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_size"] == size
    with REAL_OPEN(files[0], framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob(".*"))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reference(opened), reference(build("llama tied", 1)))
    # A later save of one file leaves nothing of these.
    nemo2.save(tmp_path, build("llama tied", 4), format="safetensors")
    assert sorted(f.name for f in tmp_path.glob("model*")) == ["model.safetensors"]
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reference(opened), reference(build("llama tied", 4)))


class Counted(nn.Module):
    """Persistent buffers of all kinds, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2))
        self.register_buffer("scale", torch.rand(()))
        self.register_buffer("table", torch.rand(3), persistent=False)
        for layer in self.layers:
            nn.init.normal_(layer.running_mean)
            layer.num_batches_tracked.fill_(int(torch.randint(100, ())))
        shard(self.layers, "pp")


def buffers(folder):
    torch.manual_seed(1)
    first = nemo2.parallelize(Counted(), nemo2.make_mesh(pp=2))
    if first.groups.pp_rank == 1:  # as batch norm does: each stage counts for its blocks
        first.module.get_buffer("layers.1.running_mean").fill_(7.0)
    nemo2.save(folder, first, format="safetensors")
    torch.manual_seed(2)
    other = nemo2.parallelize(Counted(), nemo2.make_mesh(pp=2))
    table = other.module.table.clone()
    nemo2.load(folder, other)
    assert torch.equal(other.module.table, table)
    return {n: b.cpu() for n, b in other.named_buffers()}, first.module.get_buffer("scale").cpu()


def test_buffers(pool, tmp_path):
    for found, scale in pool.run(2, buffers, tmp_path):
        assert torch.equal(found["layers.1.running_mean"], torch.full((4,), 7.0))
        assert torch.equal(found["scale"], scale)
    read = {k: t for file in tmp_path.glob("*.safetensors") for k, t in load_file(file).items()}
    assert "scale" in read
    assert "table" not in read
    assert read["layers.0.num_batches_tracked"].dtype == torch.int64


# --- names and dtypes, on one device


def test_converts_to_the_dtype_of_the_parameter(tmp_path):
    low = build("llama", 1, torch.bfloat16)
    low.save_pretrained(tmp_path)
    model = build("llama", 2, torch.float32)
    kept = [p.data_ptr() for p in model.parameters()]
    nemo2.load(tmp_path, model)
    assert [p.data_ptr() for p in model.parameters()] == kept
    for mine, other in zip(model.parameters(), low.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other.float())


def test_names_of_the_base_model_and_of_earlier_versions(tmp_path):
    """The files of GPT-2 on the hub: no prefix, and masks that are buffers no more."""
    plain = build("gpt2", 1)
    state = {n: t.clone() for n, t in plain.transformer.state_dict().items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(LAYERS)}
    save_file(state, tmp_path / "model.safetensors")
    model = build("gpt2", 2)
    assert nemo2.load(tmp_path / "model.safetensors", model).unexpected == ()
    assert torch.equal(reference(model), reference(plain))


def test_what_is_missing_and_unexpected_is_left_out_when_asked(tmp_path):
    plain, model = build("llama", 1), build("llama", 2)
    plain.model.save_pretrained(tmp_path)
    head = model.lm_head.weight.clone()
    report = nemo2.load(tmp_path, model, strict=False)
    assert (report.missing, report.unexpected) == (("lm_head.weight",), ())
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.norm.weight, plain.model.norm.weight)
    plain.save_pretrained(tmp_path)
    assert nemo2.load(tmp_path, build("llama", 3).model, strict=False).unexpected == (
        "lm_head.weight",
    )


def test_tied_weights_under_any_of_their_names(tmp_path):
    plain, file = build("llama tied", 1), tmp_path / "model.safetensors"
    state = {n: t.clone() for n, t in plain.state_dict().items()}
    save_file(state, file)  # under both
    model = build("llama tied", 2)
    nemo2.load(tmp_path, model)
    assert torch.equal(reference(model), reference(plain))
    del state["model.embed_tokens.weight"]
    save_file(state, file)
    model = build("llama tied", 2)
    nemo2.load(tmp_path, model)
    assert torch.equal(reference(model), reference(plain))
    save_file(state | {"model.embed_tokens.weight": state["lm_head.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' is tied to 'lm_head"):
        nemo2.load(tmp_path, model)


def test_refuses_integers_for_floats(tmp_path):
    state = {n: t.clone() for n, t in build("llama", 1).state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"float64; 'lm_head.weight' in the file torch.int8"):
        nemo2.load(tmp_path, build("llama", 2))


def test_a_model_of_ones_own(tmp_path):
    plain, model = build("fused", 1), build("fused", 2)
    nemo2.save(tmp_path, plain, format="safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    nemo2.load(tmp_path, model)
    assert torch.equal(reference(model), reference(plain))


# --- what is wrong, on all ranks alike


def refused(kind, folder, mesh, damage=None):
    """Return the error of this rank, after checking that nothing has changed."""
    model = parallel(kind, 2, mesh)
    before = {n: local_of(p).clone() for n, p in model.params.items()}
    with pytest.raises(CheckpointError) as caught:
        nemo2.load(folder, model)
    assert all(torch.equal(local_of(p), before[n]) for n, p in model.params.items())
    return str(caught.value)


def altered(source: Path, folder: Path, **tensors):
    """Write one file with some tensors replaced, or removed where they are None."""
    state = {k: t for file in source.glob("*.safetensors") for k, t in load_file(file).items()}
    state |= {k.replace("__", "."): t for k, t in tensors.items()}
    folder.mkdir(exist_ok=True)
    kept = {k: t for k, t in state.items() if t is not None}
    save_file(kept, folder / "model.safetensors")


def test_lists_all_problems_on_all_ranks(pool, folders, tmp_path):
    norm = "model__norm__weight"
    gate = "model__layers__0__mlp__gate_proj__weight"
    changes = {norm: None, "lora_a": torch.ones(2), gate: torch.ones(64, 31)}
    many = {f"model__layers__{i}__input_layernorm__weight": None for i in range(LAYERS)}
    more = {f"model__layers__{i}__post_attention_layernorm__weight": None for i in range(LAYERS)}
    altered(folders / "llama", tmp_path, **changes, **many, **more)
    errors = pool.run(4, refused, "llama", tmp_path, {"tp": 2, "pp": 2})
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"cannot load '{tmp_path}' into LlamaForCausalLM\n")
    assert "missing in the file, 9 of 39: 'model.layers.0.input_layernorm.weight'" in errors[0]
    assert "and 1 more" in errors[0]
    assert "unexpected in the file, 1: 'lora_a'" in errors[0]
    # Only the first stage holds this one.
    assert "gate_proj.weight' has shape (64, 32); 'model.layers.0.mlp" in errors[0]
    assert "in the file: shape (64, 31)" in errors[0]
    assert "strict=False" in errors[0]


def test_an_expert_that_is_missing(folders, tmp_path):
    gone = {"model__layers__1__block_sparse_moe__experts__3__w1__weight": None}
    altered(folders / "mixtral", tmp_path, **gone)
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj' has shape \(12, 32, 32\); 23 tensors"
    ):
        nemo2.load(tmp_path, build("mixtral", 2))


def copy_of(source: Path, folder: Path) -> dict[str, str]:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_damaged_files_are_named(pool, folders, tmp_path):
    kind, mesh = "llama", {"pp": 2}
    where = copy_of(folders / kind, tmp_path / "gone")
    last = where["model.norm.weight"]  # that of the second stage
    (tmp_path / "gone" / last).unlink()
    copy_of(folders / kind, tmp_path / "short")
    whole = (tmp_path / "short" / last).read_bytes()
    (tmp_path / "short" / last).write_bytes(whole[:-8])
    copy_of(folders / kind, tmp_path / "swapped")
    (tmp_path / "swapped" / last).write_bytes(
        (tmp_path / "swapped" / where["model.embed_tokens.weight"]).read_bytes()
    )
    copy_of(folders / kind, tmp_path / "index")
    (tmp_path / "index/model.safetensors.index.json").write_text('{"weight_map": {"a": ')
    expected = {
        "gone": f"rank 1: {last} is missing, which the index names",
        "short": f"rank 1: {last} cannot be read: Error while deserializing header",
        "swapped": f"rank 1: {last} has no tensor",
        "index": "\n  model.safetensors.index.json is not an index of safetensors files: JSON",
        "none": "\n  there is no such folder or file",
    }
    for name, text in expected.items():
        errors = pool.run(2, refused, kind, tmp_path / name, mesh)
        assert len(set(errors)) == 1
        assert text in errors[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"expected a folder with .* found pytorch_model.bin"):
        nemo2.load(tmp_path / "empty", build("llama", 2))


def fails_alone(folder):
    """The disk fails on one rank while it is read, then while it is written."""
    model = parallel("llama", 2, {"pp": 2})
    broken = mock.Mock(side_effect=OSError("the disk is on fire"))
    rank = torch.distributed.get_rank()
    errors = []
    with (
        pytest.raises(CheckpointError) as caught,
        mock.patch.object(Folder, "read", broken if rank == 1 else Folder.read),
    ):
        nemo2.load(folder, model)
    errors.append(str(caught.value))
    written = mock.patch("safetensors.torch.save_file", broken if rank == 1 else save_file)
    with pytest.raises(CheckpointError) as caught, written:
        nemo2.save(folder, model, format="safetensors")
    errors.append(str(caught.value))
    nemo2.load(folder, model)  # what was there still is
    return errors


def test_a_rank_that_fails_alone_is_named_by_all(pool, folders, tmp_path):
    copy_of(folders / "llama", tmp_path / "there")
    before = {f.name for f in (tmp_path / "there").iterdir()}
    reading, writing = zip(*pool.run(2, fails_alone, tmp_path / "there"), strict=True)
    assert len(set(reading)) == len(set(writing)) == 1
    assert "cannot load" in reading[0]
    assert "rank 1: OSError: the disk is on fire\n  some parameters hold" in reading[0]
    assert "cannot save LlamaForCausalLM to" in writing[0]
    assert "rank 1: OSError: the disk is on fire" in writing[0]
    assert {f.name for f in (tmp_path / "there").iterdir()} == before


def test_what_cannot_be_says_what_works(tmp_path):
    model = build("fused", 1)
    with pytest.raises(
        CheckpointError, match=r"cannot have optimizer= and extra=\n  options: format='dcp'"
    ):
        nemo2.save(tmp_path, model, optimizer=1, extra={}, format="safetensors")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: expected checkpoint.json"):
        nemo2.load(tmp_path, model, optimizer=1)
    with pytest.raises(CheckpointError, match=r"format='pickle' is unknown"):
        nemo2.save(tmp_path, model, format="pickle")
    with pytest.raises(CheckpointError, match=r"'embed.weight' is on meta"):
        nemo2.load(tmp_path, copy.deepcopy(model).to("meta"))
    with (
        mock.patch.dict(sys.modules, safetensors=None),
        pytest.raises(CheckpointError, match=r'pip install "nemo2\[hf\]"'),
    ):
        nemo2.load(tmp_path, model)
    assert not list(tmp_path.iterdir())
