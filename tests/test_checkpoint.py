"""Checkpoints of training: any mesh to any mesh, always a whole one, what is wrong with them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

import nemo2
from nemo2 import CheckpointError, DataParallel, Pipeline
from nemo2.__main__ import main
from nemo2.checkpoint import files
from nemo2.checkpoint.host import HOST, HostMemory
from nemo2.checkpoint.index import INDEX, Index
from nemo2.checkpoint.shards import Shard
from nemo2.checkpoint.storage import Reader, read_whole
from nemo2.sharding.slices import Box
from nemo2.sharding.storage import local_of
from tests.lightning_programs import Lit, data, trainer
from tests.models import Dropout, DropoutBlock, FusedBlock, next_token, token_ids

STEPS, HALF, BATCH = 10, 5, 8


class Trained(Dropout):
    """Tied, with dropout, fused projections, a parameter without dims and a buffer."""

    def __init__(self) -> None:
        super().__init__(layers=0)
        self.layers.extend([DropoutBlock(), FusedBlock(), DropoutBlock(), FusedBlock()])
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


def fresh(seed: int) -> Trained:
    torch.manual_seed(seed)
    return Trained().double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, one without weight decay."""
    params = dict(model.named_parameters())
    plain = [p for p in params.values() if p.ndim < 2]
    rest = [p for p in params.values() if p.ndim >= 2]
    groups = [{"params": rest}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-6)


class Run:
    """A training on some mesh, in the torch way."""

    def __init__(self, mesh: dict[str, int], seed: int, **options: Any) -> None:
        self.model = nemo2.parallelize(fresh(seed), nemo2.make_mesh(**mesh), **options)
        self.optimizer = optimizer_of(self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 / (1 + n))
        self.at = 0

    def train(self, until: int) -> list[float]:
        losses = []
        groups = self.model.groups
        for step in range(self.at, until):
            batch = token_ids(BATCH * STEPS)[step * BATCH : (step + 1) * BATCH]
            own = batch.chunk(groups.sizes.dp)[groups.dp_rank]
            losses.append(float(self.model.backward(next_token, own)))
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.model.module.seen += step
        self.at = until
        return losses

    def save(self, path: str, **options: Any) -> Any:
        extra = {"schedule": self.schedule.state_dict(), "step": self.at}
        return nemo2.save(path, self.model, optimizer=self.optimizer, extra=extra, **options)

    def load(self, path: str) -> None:
        extra = nemo2.load(path, self.model, optimizer=self.optimizer).extra
        self.schedule.load_state_dict(extra["schedule"])
        self.at = extra["step"]


CELLS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2 pp2 tp2": ({"dp": 2, "pp": 2, "tp": 2}, {"pipeline": Pipeline(2)}),
    "dp2 tp2": ({"dp": 2, "tp": 2}, {}),
    "dp2 pp2": ({"dp": 2, "pp": 2}, {"pipeline": Pipeline(2), "data_parallel": "ddp"}),
    "tp4": ({"tp": 4}, {}),
    "pp4": ({"pp": 4}, {"pipeline": Pipeline(4)}),
    "virtual": ({"pp": 2, "dp": 2}, {"pipeline": Pipeline(2, "interleaved", 2)}),
    "fsdp": ({"dp": 4}, {}),
    "hybrid": ({"dp": 4}, {"data_parallel": DataParallel("zero1", replicate=2)}),
    "ddp": ({"dp": 4}, {"data_parallel": "ddp"}),
    "dp2 cp2": ({"dp": 2, "cp": 2}, {}),
}


def begin(folder: str, cell: str) -> dict[str, Any]:
    """Train without interruption, saving at half time; then go on from there on the same mesh."""
    mesh, options = CELLS[cell]
    path = f"{folder}/{cell}"
    whole = Run(mesh, 1, **options)
    losses = whole.train(HALF)
    whole.save(path)
    after = torch.rand(3)
    losses += whole.train(STEPS)
    again = Run(mesh, 2, **options)
    again.load(path)
    same = torch.equal(after, torch.rand(3))
    resumed = again.train(STEPS)
    pairs = zip(whole.model.params.values(), again.model.params.values(), strict=True)
    equal = all(torch.equal(local_of(a), local_of(b)) for a, b in pairs)
    return {"losses": losses, "resumed": resumed, "same": same and equal}


def resume(path: str, cells: list[str]) -> dict[str, Any]:
    """Go on from a checkpoint on other meshes."""
    found = {}
    for cell in cells:
        mesh, options = CELLS.get(cell, ({}, {}))
        run = Run(mesh, 3, **options)
        run.load(path)
        found[cell] = run.train(STEPS), run.model.module.seen.tolist()
    return found


@pytest.mark.parametrize(
    ("cell", "others"),
    [
        ("dp2 pp2 tp2", ["tp4", "pp4", "fsdp", "dp2 cp2"]),
        ("dp2 tp2", ["virtual"]),
        ("virtual", ["hybrid"]),
        ("dp2 pp2", ["ddp", "dp2 tp2"]),
    ],
)
def test_any_mesh_to_any_mesh(pool, tmp_path, cell, others):
    """Bit-exact on the same mesh; equal within rounding (of sums in another order) elsewhere."""
    mesh = CELLS[cell][0]
    for first in (results := pool.run(math.prod(mesh.values()), begin, str(tmp_path), cell)):
        assert first["resumed"] == first["losses"][HALF:]
        assert first["same"]
    want = pytest.approx(results[0]["losses"][HALF:], rel=1e-9)
    path = str(tmp_path / cell)
    for rank in (*pool.run(4, resume, path, others), *pool.run(1, resume, path, ["one device"])):
        for losses, seen in rank.values():
            assert losses == want
            assert seen == [sum(range(STEPS))] * 3


# --- one device


def small(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def pair(seed: int, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    model = small(seed)
    return model, kind(model.parameters(), lr=0.1, **options)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model, optimizer = pair(1)
    stepped(model, optimizer)
    nemo2.save(tmp_path / "c", model, optimizer=optimizer, extra={"step": 1})
    return tmp_path / "c", model, optimizer


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Adagrad, {}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_module_on_one_device(tmp_path, kind, options):
    model, optimizer = pair(1, kind, **options)
    stepped(model, optimizer, 2)
    nemo2.save(tmp_path / "c", model, optimizer=optimizer)
    stepped(model, optimizer, 2)
    other, its = pair(2, kind, **options)
    assert nemo2.load(tmp_path / "c", other, optimizer=its).extra is None
    stepped(other, its, 2)  # draws the same numbers, too
    assert equal(model, other)


def test_torch_itself_reads_it(saved):
    """Through torch.distributed.checkpoint, with its own planner; nothing of it is a pickle."""
    path, model, _ = saved
    state = {"model": {n: torch.zeros_like(t) for n, t in model.state_dict().items()}}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, storage_reader=Reader(path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(state["model"][name], tensor)
    for file in path.iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert b"\x80\x04" not in file.read_bytes()[:2]


PLAIN = {
    "a": [1, 2.5, None, True, "x"],
    "tuple": (1, (2,)),
    3: {"$set": {1, 2}},
    "nan": float("inf"),
    "path": Path("a/b"),
    "tensor": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "empty": torch.empty(0, 3),
    "bytes": b"\x00\xff",
    "dtype": torch.float16,
    "complex": 1j,
    "frozen": frozenset({"x"}),
}


def test_plain_data_comes_back_as_it_was(tmp_path):
    model = small(1)
    nemo2.save(tmp_path / "c", model, extra=PLAIN)
    found = nemo2.load(tmp_path / "c", model).extra
    for key in ("tensor", "empty"):
        assert torch.equal(found.pop(key), PLAIN[key])
        assert key in PLAIN
    assert found == {k: v for k, v in PLAIN.items() if k not in ("tensor", "empty")}
    assert isinstance(found["tuple"][1], tuple)


def test_other_data_is_refused_by_place(tmp_path):
    extra = {"fine": 1, "model": [small(1)], "large": torch.zeros(1 << 23)}
    with pytest.raises(CheckpointError) as caught:
        nemo2.save(tmp_path / "c", small(1), extra=extra)
    assert r"extra['model'][0] is a torch.nn.modules.container.Sequential" in str(caught.value)
    assert "extra['large'] is a tensor of 33554432 bytes" in str(caught.value)
    assert not any(tmp_path.iterdir())


# --- what is wrong with a checkpoint


def flip(path: Path) -> str:
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    return f"{file.name} was altered: its checksum"


def cut(path: Path) -> str:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    return f"{file.name} was truncated: it has"


def lose(path: Path) -> str:
    file = next(path.glob("*.safetensors"))
    file.unlink()
    return f"{file.name} is missing"


def rewrite(path: Path) -> str:
    text = (path / INDEX).read_text()
    (path / INDEX).write_text(text.replace('"step": 1', '"step": 2'))
    return "checkpoint.json was altered: its own checksum"


def cut_index(path: Path) -> str:
    text = (path / INDEX).read_text()
    (path / INDEX).write_text(text[: len(text) // 2])
    return "checkpoint.json was truncated or altered"


def lose_index(path: Path) -> str:
    (path / INDEX).unlink()
    return "is a save that did not finish"


DAMAGES = [flip, cut, lose, rewrite, cut_index, lose_index]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damage_is_named(saved, damage):
    path, model, optimizer = saved
    before = copy.deepcopy(model.state_dict())
    says = damage(path)
    for with_optimizer in (True, False):
        with pytest.raises(CheckpointError) as caught:
            nemo2.load(path, model, optimizer=optimizer if with_optimizer else None)
        assert says in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def other_kind() -> Any:
    return pair(2, torch.optim.SGD)


def other_groups() -> Any:
    model = small(2)
    first, *rest = model.parameters()
    return model, torch.optim.AdamW([{"params": [first]}, {"params": rest}])


def fewer() -> Any:
    model = small(2)
    return model, torch.optim.AdamW(list(model.parameters())[1:])


def strangers() -> Any:
    return small(2), torch.optim.AdamW(small(3).parameters())


def other_shape() -> Any:
    model = small(2, width=5)
    return model, torch.optim.AdamW(model.parameters())


def more() -> Any:
    model = small(2)
    model.more = nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters())


def two() -> Any:
    model, optimizer = pair(2)
    return model, [optimizer, torch.optim.AdamW(model.parameters())]


MISFITS = [
    (other_kind, "it is SGD, the checkpoint has the state of AdamW"),
    (other_groups, "it has 2 parameter groups, in the checkpoint 1"),
    (fewer, "'0.weight' is in none of its groups, in the checkpoint in group 0"),
    (strangers, "AdamW has 6 parameters that Sequential does not have"),
    (other_shape, "'0.weight' has shape (8, 5), in the checkpoint (8, 4)"),
    (more, "missing in the checkpoint, 2 of 11: 'more.weight', 'more.bias'"),
    (two, "2 optimizers are to be loaded; the checkpoint has 1"),
]


@pytest.mark.parametrize(("build", "says"), MISFITS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_does_not_fit_is_refused(saved, build, says):
    path, _, _ = saved
    model, optimizer = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        nemo2.load(path, model, optimizer=optimizer)
    assert says in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_part_is_enough_without_strict(saved):
    path, model, _ = saved
    larger, _ = more()
    loaded = nemo2.load(path, larger, strict=False)
    assert loaded.missing == ("more.weight", "more.bias")
    assert torch.equal(larger[0].weight, model[0].weight)


def broken_on_one_rank(path: str) -> list[str]:
    """Save on four ranks, let one of them fail, and damage what was there before."""
    run = Run({"dp": 2, "tp": 2}, 1)
    run.train(1)
    run.save(path)
    said = []
    rank = dist.get_rank()
    extra = {"mine": small(1)} if rank == 2 else {}
    with pytest.raises(CheckpointError) as caught:
        nemo2.save(path, run.model, extra=extra)
    said.append(str(caught.value))
    full = OSError(28, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("nemo2.checkpoint.files.bytes_of", mock.Mock(side_effect=full))
        with pytest.raises(CheckpointError) as caught:
            run.save(path)
        said.append(str(caught.value))
        run.save(path, asynchronous=True).join()
    with pytest.raises(CheckpointError) as caught:
        nemo2.load(path, run.model)  # tells what nobody has heard of
    said.append(str(caught.value))
    run.load(path)
    dist.barrier()
    if rank == 0:
        said.append(cut(Path(path)))
    dist.barrier()
    with pytest.raises(CheckpointError) as caught:
        run.load(path)
    said.append(str(caught.value))
    return said


def test_failures_are_those_of_all_ranks(pool, tmp_path):
    ranks = pool.run(4, broken_on_one_rank, str(tmp_path / "c"))
    damage = ranks[0].pop(-2)
    assert all(rank == ranks[0] for rank in ranks)
    plain, full, late, damaged = ranks[0]
    assert "rank 2: a checkpoint holds plain data" in plain
    assert "rank 1: OSError: [Errno 28] No space left on device" in full
    assert re.search(r"rank 1: the save to '.*' failed: OSError: .* No space left", late)
    assert damage in damaged
    assert not list(tmp_path.glob(".*"))


# --- a whole one at every moment


class Killed(BaseException):
    """Ends a save at once, as SIGKILL does: no handler for errors sees it."""


FILE_CALLS = ["os.replace", "os.rename", "os.fsync", "pathlib.Path.unlink", "shutil.rmtree"]


def dying(patch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Let the process do nothing to files any more after so many calls; returns a counter."""
    count = [0]

    def limited(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > after:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in FILE_CALLS:
        module, _, attribute = name.rpartition(".")
        owner = {"os": os, "shutil": shutil, "pathlib.Path": Path}[module]
        patch.setattr(owner, attribute, limited(getattr(owner, attribute)))
    return count


def test_a_kill_between_any_two_calls_leaves_a_whole_one(tmp_path):
    """Of saves to a new place, and in place of another checkpoint."""
    old, new, read = small(1), small(2), small(3)
    for replacing in (True, False):
        outcomes = []
        for after in itertools.count():
            path = tmp_path / f"{replacing}{after}" / "c"
            if replacing:
                nemo2.save(path, old)
            with pytest.MonkeyPatch.context() as patch:
                count = dying(patch, after)
                with contextlib.suppress(Killed):
                    nemo2.save(path, new)
            if not replacing and not path.exists():
                outcomes.append("nothing")
            else:
                nemo2.load(path, read)
                outcomes.append("old" if equal(read, old) else "new")
                assert equal(read, old if outcomes[-1] == "old" else new)
            nemo2.save(path, new)  # and the next one clears up
            nemo2.load(path, read)
            assert equal(read, new)
            assert [p.name for p in path.parent.iterdir()] == ["c"]
            assert len(list(path.glob("*.safetensors"))) == 1
            if count[0] <= after:
                break
        first = "old" if replacing else "nothing"
        assert outcomes == [first] * outcomes.count(first) + ["new"] * outcomes.count("new")
        assert outcomes.count(first) > 4
        assert outcomes[-1] == "new"


def test_a_save_that_lives_is_left_alone(tmp_path):
    """By another one to the same place; the last one that ends is the checkpoint."""
    path = tmp_path / "c"
    lock = files.begin(path, "0123456789ab")
    living = files.unfinished_folder(path, "0123456789ab")
    nemo2.save(path, small(1))
    nemo2.save(path, small(2))
    assert living.is_dir()
    lock.close()  # as the system does when its process is gone
    nemo2.save(path, small(3))
    assert not living.exists()


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(CheckpointError, match="'c' is a file, and a checkpoint is a folder"):
        nemo2.save(tmp_path / "c", small(1))
    assert (tmp_path / "c").read_text() == "mine"


def test_what_is_saved_in_the_background_is_of_its_moment(tmp_path):
    model, optimizer = pair(1)
    stepped(model, optimizer)
    then = copy.deepcopy(model)
    gate = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        real = files.bytes_of
        patch.setattr(files, "bytes_of", lambda x: gate.wait(20) and real(x))
        saving = nemo2.save(tmp_path / "a", model, optimizer=optimizer, asynchronous=True)
        stepped(model, optimizer, 3)
        assert not (tmp_path / "a").exists()
        assert not saving.done
        removed = []
        saving.then(lambda: removed.append(1))
        assert not removed
        gate.set()
        nemo2.save(tmp_path / "b", model)  # waits for it
    assert saving.done
    assert removed
    other = small(2)
    nemo2.load(tmp_path / "a", other)
    assert equal(other, then)


def test_background_saves_reuse_their_memory(tmp_path):
    HOST.release()
    model, optimizer = pair(1)
    model.register_buffer("none", torch.empty(0, 3))
    model.register_buffer("odd", torch.arange(7, dtype=torch.uint8))
    stepped(model, optimizer)
    first = nemo2.save(tmp_path / "a", model, optimizer=optimizer, asynchronous=True)
    region = HOST._region
    stepped(model, optimizer)
    second = nemo2.save(tmp_path / "b", model, optimizer=optimizer, asynchronous=True)
    assert HOST._region is region
    assert first.done
    second.wait()
    assert {*second.seconds} == {"waited", "copied", "written"}
    model.register_buffer("more", torch.randn(3, 1000))
    nemo2.save(tmp_path / "c", model, optimizer=optimizer, asynchronous=True).wait()
    assert HOST._region is not region
    for name in "bc":
        other, its = pair(2)
        other.register_buffer("none", torch.empty(0, 3))
        other.register_buffer("odd", torch.zeros(7, dtype=torch.uint8))
        if name == "c":
            other.register_buffer("more", torch.zeros(3, 1000))
        nemo2.load(tmp_path / name, other, optimizer=its)
        for key, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])
    HOST.release()
    assert HOST._region is None


def test_memory_for_a_save_is_made_ahead():
    memory = HostMemory()
    held = [
        torch.randn(5, 3, dtype=torch.float64),
        torch.randn(()),
        torch.ones(9, dtype=torch.bool),
    ]
    shards = [Shard(str(i), Box.whole(x.shape), x) for i, x in enumerate(held)]
    memory.prepare(shards)
    region = memory._region
    copies = memory.copies(shards)
    assert memory._region is region
    assert all(torch.equal(c.held, x) for c, x in zip(copies, held, strict=True))
    assert all(c.held.data_ptr() % 64 == 0 for c in copies)
    memory.prepare(shards)  # there already: what is in it may be being written
    memory.prepare([Shard("large", Box.whole((2**25,)), torch.empty(2**25))])
    memory.release()  # while its pages may be in the making
    assert all(torch.equal(c.held, x) for c, x in zip(copies, held, strict=True))


def test_a_background_failure_is_told_once(tmp_path):
    model = small(1)
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "bytes_of", full)
        nemo2.save(tmp_path / "a", model, asynchronous=True).join()
    with pytest.raises(CheckpointError, match=r"the save to '.*a' failed: .*No space left"):
        nemo2.save(tmp_path / "b", model)
    nemo2.save(tmp_path / "b", model)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


# --- looking into them


def command(*words: object) -> int:
    return main(["checkpoint", *map(str, words)])


def test_show_and_diff(saved, tmp_path, capsys):
    path, model, optimizer = saved
    assert command("show", path, "--check") == 0
    said = capsys.readouterr().out
    assert "saved on one device; 1 files" in said
    assert "checksums equal" in said
    assert re.search(r"  0.weight +float32  \(8, 4\)  128 B\n", said)
    assert "exp_avg: 6 tensors" in said
    assert "extra: {'step': 1}" in said
    assert command("diff", path, path) == 0
    stepped(model, optimizer)
    nemo2.save(tmp_path / "d", model, optimizer=optimizer, extra={"step": 2})
    assert command("diff", path, tmp_path / "d") == 1
    said = capsys.readouterr().out
    assert "model.1.num_batches_tracked: 1 of 1 values differ" in said
    assert "extra: {'step': 1}, {'step': 2}" in said
    flip(path)
    assert command("show", path) == 0
    assert command("show", path, "--check") == 2
    assert "was altered" in capsys.readouterr().err


def test_convert(saved, tmp_path, capsys):
    path, model, _ = saved
    assert command("convert", path, tmp_path / "one.safetensors", "--format", "file") == 0
    assert command("convert", path, tmp_path / "folder") == 0
    assert command("convert", path, tmp_path / "part.safetensors", "--format=file", "--part=0") == 0
    assert load_file(tmp_path / "part.safetensors").keys() == {"weight", "bias"}
    for made in ("one.safetensors", "folder"):
        other = small(2)
        nemo2.load(tmp_path / made, other)
        assert equal(other, model)
        assert command("convert", path, tmp_path / made) == 2
    assert command("diff", tmp_path / "one.safetensors", tmp_path / "folder") == 0
    assert command("convert", path, tmp_path / "x", "--part", "net") == 2
    assert "has no weights of 'net'\n  options: 0 | 1 | 2" in capsys.readouterr().err
    assert command("show", tmp_path / "folder") == 0
    for damage in (flip, cut, lose):  # it is not exported
        says = damage(path)
        assert command("convert", path, tmp_path / "damaged") == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "damaged").exists()
        assert command("diff", path, tmp_path / "folder") == 2
        assert says in capsys.readouterr().err


def test_convert_for_lightning_alone(pool, tmp_path, capsys):
    """What a mesh has trained is a .ckpt for Lightning's own Trainer."""
    (want,) = pool.run(2, trained_lit, str(tmp_path / "saved"))[:1]
    out = tmp_path / "out.ckpt"
    assert command("convert", tmp_path / "saved", out, "--format", "lightning") == 0
    assert "28 tensors" in capsys.readouterr().out
    module = Lit.load_from_checkpoint(out).double()
    assert module.net.head.weight is module.net.embed.weight
    (found,) = trainer(tmp_path).validate(module, data(8, 16), verbose=False)
    assert found == pytest.approx(want)
    (found,) = trainer(tmp_path).validate(Lit(), data(8, 16), str(out), verbose=False)
    assert found == pytest.approx(want)
    words = ("--format", "lightning", "--part", "net")
    assert command("convert", tmp_path / "saved", tmp_path / "net.ckpt", *words) == 0
    part = torch.load(tmp_path / "net.ckpt", weights_only=True)["state_dict"]
    assert part.keys() == Lit().net.state_dict().keys()


def trained_lit(path: str) -> dict[str, float]:
    strategy = nemo2.MegatronStrategy(pp=2)
    made = trainer(path, strategy=strategy, devices=2, max_steps=2, val_check_interval=1.0)
    made.fit(Lit(), data(8, 16), data(8, 16))
    made.save_checkpoint(path)
    return made.validate(made.lightning_module, data(8, 16), verbose=False)[0]


def test_commands_end_without_a_traceback(saved, tmp_path, capsys):
    path = saved[0]
    (tmp_path / "file").write_text("")
    assert command("convert", path, tmp_path / "file" / "out") == 2
    assert "NotADirectoryError" in capsys.readouterr().err
    words = [sys.executable, "-m", "nemo2", "checkpoint", "show", str(path)]
    shown = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown.stdout.close()  # as head does, once it has what it wants
    assert (shown.wait(), shown.stderr.read()) == (0, b"")
    shown.stderr.close()


def test_what_is_read_by_parts_is_whole(pool, tmp_path):
    """What a mesh has saved is what one device saves, tensor by tensor."""
    path = str(tmp_path / "mesh")
    pool.run(4, save_fresh, path)
    model = fresh(1)
    nemo2.save(tmp_path / "one", model)
    assert command("diff", path, tmp_path / "one") == 1  # dropout has a seed there
    with Reader(path) as reader:
        for name, tensor in dict(model.named_parameters()).items():
            assert torch.equal(read_whole(reader, f"model.{name}"), tensor)
    parts = Index.read(Path(path)).tensors["model.layers.1.gate_up.weight"].parts
    assert len(parts) == 4


def save_fresh(path: str) -> None:
    nemo2.save(path, Run({"dp": 2, "tp": 2}, 1).model)


# --- kills


def test_kills_leave_the_last_one_and_lose_no_sample():
    """A short form of what docs/reliability.md has the figures of."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.reliability", "--kills", "2", "--steps", "60"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "wrong: 0" in done.stdout
