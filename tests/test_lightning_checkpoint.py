"""The Trainer goes on with the next sample, on the same mesh and on others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

import nemo2
from nemo2.checkpoint.index import Index
from tests.lightning_programs import Lit, RecordSamples, data, ignore_upstream_warnings, trainer

STEPS, HALF, GLOBAL = 10, 5, 8


class Trained(Lit):
    """With dropout, late construction, hyperparameters, and a state of its own."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2, late=True)
        self.save_hyperparameters({"width": 3, "sizes": (1, 2)})
        self.register_buffer("count", torch.zeros(()))
        self.told: dict[int, Any] = {}

    def on_train_batch_start(self, *rest: Any) -> None:
        self.count += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["told"] = {5: (torch.ones(2), float("inf")), "path": Path("a")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.told = checkpoint["told"]


def run(
    folder: str,
    strategy: dict[str, Any],
    devices: int,
    *,
    ckpt_path: str | None = None,
    samples: int = 64,
    workers: int = 0,
    total: int = GLOBAL,
    **options: Any,
) -> dict[str, Any]:
    """Train; the epoch has 8 steps. Saves at the end of each fifth step, and after each epoch."""
    ignore_upstream_warnings()
    torch.manual_seed(1)
    record = RecordSamples()
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF, save_top_k=-1)
    ends = ModelCheckpoint(
        folder, "{epoch}-end", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1
    )
    stop = EarlyStopping("val_loss", patience=9, strict=False)
    callbacks = [record, saves, ends, stop]
    options = {"max_steps": STEPS, "max_epochs": 3, "val_check_interval": 1.0} | options
    strategy = nemo2.MegatronStrategy(**strategy)
    made = trainer(
        folder,
        callbacks=callbacks,
        strategy=strategy,
        devices=devices,
        enable_checkpointing=True,
        **options,
    )
    module = Trained()
    loader = data(total // strategy.asked["dp"], samples, True, workers)
    made.fit(module, loader, data(4, 16), ckpt_path=ckpt_path)
    return {
        "losses": record.losses,
        "dp": made.strategy.mesh.get_local_rank("dp"),
        "samples": record.samples,
        "count": float(module.count),
        "rate": made.optimizers[0].param_groups[0]["lr"],
        "stop": stop.state_dict(),
        "told": module.told,
        "drawn": torch.rand(2).tolist(),
    }


def order_of(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """Return the samples of each step in global order: ranks of ``dp`` have them in turns."""
    readers = {rank["dp"]: rank["samples"] for rank in ranks}
    for rank in ranks:
        assert rank["samples"] == readers[rank["dp"]]
    steps = zip(*(readers[r] for r in sorted(readers)), strict=True)
    return [[x for same in zip(*own, strict=True) for x in same] for own in steps]


TWO = nemo2.Pipeline(microbatches=2)
SAVED: list[tuple[dict[str, Any], int]] = [
    ({"dp": 2, "tp": 2}, 4),
    ({"dp": 2, "pp": 2, "tp": 2, "pipeline": TWO}, 8),
]
ELSEWHERE = [
    {"dp": 4},
    {"dp": 1, "pp": 4, "pipeline": nemo2.Pipeline(4)},
    {"dp": 1, "tp": 4},
    {"dp": 2, "cp": 2, "context_parallel": nemo2.ContextParallel(balance=False)},
]


def several(folder: str, meshes: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    return [run(f"{folder}/{i}", mesh, 4, ckpt_path=path) for i, mesh in enumerate(meshes)]


@pytest.mark.parametrize("at", [0, 1])
def test_goes_on_with_the_next_sample_on_any_mesh(pool, tmp_path, at):
    mesh, world = SAVED[at]
    folder = str(tmp_path / "first")
    whole = pool.run(world, run, folder, mesh, world)
    path = f"{folder}/step=5.ckpt"
    order = order_of(whole)
    assert len(order) == STEPS
    assert len({x for step in order[:8] for x in step}) == 64  # each one once in an epoch
    again = pool.run(world, run, f"{folder}-again", mesh, world, ckpt_path=path)
    for rank, first in zip(again, whole, strict=True):
        for key in ("losses", "samples"):
            assert rank[key] == first[key][HALF:], key
        for key in ("count", "rate", "stop", "drawn"):
            assert str(rank[key]) == str(first[key]), key
        assert rank["told"]["path"] == Path("a")
        assert rank["told"][5][1] == float("inf")
        assert torch.equal(rank["told"][5][0], torch.ones(2))
    there = ELSEWHERE[2 * at : 2 * at + 2]
    found = list(zip(*pool.run(4, several, str(tmp_path / "there"), there, path), strict=True))
    if at:
        found.append(tuple(pool.run(1, run, str(tmp_path / "one"), {"dp": 1}, 1, ckpt_path=path)))
    for ranks in found:
        assert order_of(list(ranks)) == order[HALF:]
        for rank in ranks:
            assert rank["losses"] == pytest.approx(whole[0]["losses"][HALF:], rel=1e-9)
            assert rank["count"] == STEPS


def again(
    folder: str, cases: list[tuple[dict[str, Any], dict[str, Any]]], path: str
) -> list[dict[str, Any]]:
    """Resume two processes several times, each time in another way."""
    return [
        run(f"{folder}/{i}", mesh, 2, ckpt_path=path, **options)
        for i, (mesh, options) in enumerate(cases)
    ]


def test_other_batches_workers_and_places_in_the_epoch(pool, tmp_path):
    """Saved in the background; in the epoch, at its end and after it; read by worker processes."""
    mesh = {"dp": 2, "asynchronous_save": True}
    folder = str(tmp_path / "whole")
    whole = pool.run(2, run, folder, mesh, 2, max_steps=15, workers=1)
    order = order_of(whole)
    losses = whole[0]["losses"]
    at = {int(p.stem[5:]): str(p) for p in Path(folder).glob("step=*.ckpt")}
    assert sorted(at) == [5, 10, 15]
    assert not list(Path(folder).glob(".*"))
    end = f"{folder}/epoch=0-end.ckpt"
    assert Index.read(Path(end)).run["steps"] == 8
    cases = [
        (end, 8, {"max_steps": 15, "workers": 1}),
        (end, 8, {"max_steps": -1, "max_epochs": 1}),
        (at[10], 10, {"max_steps": 15, "workers": 1}),
        (at[5], 5, {"max_steps": 8}),
    ]
    for number, (path, done, options) in enumerate(cases):
        strategy = ({"dp": 2}, {"dp": 1, "tp": 2})[number % 2]
        where = str(tmp_path / str(number))
        ranks = pool.run(2, run, where, strategy, 2, ckpt_path=path, **options)
        stop = options["max_steps"] if options["max_steps"] > 0 else 8
        assert order_of(ranks) == order[done:stop], (number, strategy)
        assert ranks[0]["losses"] == pytest.approx(losses[done:stop], rel=1e-9)
    # A global batch of half the size: twice as many steps, in the same order.
    options = {"max_steps": -1, "max_epochs": 1, "total": GLOBAL // 2}
    ranks = pool.run(2, run, str(tmp_path / "half"), mesh, 2, ckpt_path=at[5], **options)
    halves = [x for step in order_of(ranks) for x in step]
    assert halves == [x for step in order[5:8] for x in step]


def refused_position(folder: str, path: str) -> list[str]:
    said = []
    for options in ({"total": 6, "samples": 64}, {"samples": 72}):
        with pytest.raises(nemo2.CheckpointError) as caught:
            run(folder, {"dp": 1, "tp": 2}, 2, ckpt_path=path, **options)
        said.append(str(caught.value))
    return said


class Odd(Lit):
    """Keeps what a checkpoint cannot hold, and takes names out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 3, "build": torch.nn.Linear})
        self.keeps: Any = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.keeps == "norm":
            for name in [n for n in checkpoint["state_dict"] if "norm" in n]:
                del checkpoint["state_dict"][name]
        elif self.keeps == "other":
            name = next(iter(checkpoint["state_dict"]), None)
            if name is not None:
                checkpoint["state_dict"][name] = torch.zeros(3)
        elif self.keeps is not None:
            checkpoint["kept"] = self.keeps


def odd(folder: str) -> dict[str, Any]:
    ignore_upstream_warnings()
    made = trainer(
        folder, strategy=nemo2.MegatronStrategy(pp=2), devices=2, max_steps=2, val_check_interval=2
    )
    torch.manual_seed(1)
    module = Odd()
    made.fit(module, data(8, 16), data(8, 16))
    said: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as told:  # on rank 0 alone
        warnings.simplefilter("always")
        made.save_checkpoint(f"{folder}/fine")
        for keeps in (nemo2.make_mesh, "other"):
            module.keeps = keeps
            with pytest.raises(nemo2.CheckpointError) as caught:
                made.save_checkpoint(f"{folder}/not")
            said[str(keeps)[:9]] = str(caught.value)
        module.keeps = "norm"
        made.save_checkpoint(f"{folder}/part")
        made.save_checkpoint(f"{folder}/weights", weights_only=True)
    if torch.distributed.get_rank() == 0:
        assert "'build' is a type, which a checkpoint does not hold" in str(told[0].message)
    with pytest.raises(nemo2.CheckpointError) as caught:
        made.fit(module, data(8, 16), data(8, 16), ckpt_path=f"{folder}/part")
    said["part"] = str(caught.value)
    said["tested"] = made.validate(module, data(8, 16), ckpt_path=f"{folder}/fine", verbose=False)
    nemo2.save(f"{folder}/bare", module)
    with pytest.raises(nemo2.CheckpointError) as caught:
        made.validate(module, data(8, 16), ckpt_path=f"{folder}/bare", verbose=False)
    said["bare"] = str(caught.value)
    return said


def test_what_hooks_do_to_a_checkpoint(pool, tmp_path):
    first, second = pool.run(2, odd, str(tmp_path))
    assert first == second
    assert "extra['lightning']['kept'] is a builtins.function" in first["<function"]
    assert "has other values for 'net." in first["other"]
    assert "missing in the checkpoint, 10 of" in first["part"]
    assert "it was saved by nemo2.save" in first["bare"]
    index = Index.read(tmp_path / "fine")
    assert index.extra["lightning"]["hyper_parameters"] == {"width": 3}
    assert not [n for n in Index.read(tmp_path / "weights").tensors if "optimizer" in n]
    # The same weights on one device, under their own names.
    module = Lit().double()
    assert nemo2.load(tmp_path / "fine", module).missing == ()
    made = trainer(str(tmp_path))
    (tested,) = made.validate(module, data(8, 16), verbose=False)
    assert tested["val_loss"] == pytest.approx(first["tested"][0]["val_loss"], rel=1e-9)


def test_a_position_that_means_nothing_is_refused(pool, tmp_path):
    pool.run(2, run, str(tmp_path), {"dp": 2}, 2, max_steps=5)
    path = str(tmp_path / "step=5.ckpt")
    first, second = pool.run(2, refused_position, str(tmp_path / "no"), path)
    assert first == second
    assert "40 samples are done, which global batches of 6 do not make" in first[0]
    assert "it has 72 samples an epoch, and had 64" in first[1]


class Average(L.Callback):
    """An average of the weights, kept in the checkpoint."""

    def __init__(self, local: bool = False, state: bool = False) -> None:
        self.local, self.state, self.kept, self.steps = local, state, {}, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
        self.steps += 1
        tensors = module.state_dict().items() if self.state else module.named_parameters()
        for name, p in tensors:
            now = p.detach().to_local() if self.local else p.detach()
            self.kept.setdefault(name, now.clone()).lerp_(now, 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self.kept), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.steps = dict(state["kept"]), state["steps"]


def averaged(folder: str, mesh: dict[str, Any], steps: int, path: str | None = None) -> Any:
    """Train with an average; save at the end; return the average's values."""
    torch.manual_seed(1)
    average = Average()
    world = torch.distributed.get_world_size()
    options = {"max_steps": steps, "max_epochs": 3, "val_check_interval": 1.0}
    strategy = nemo2.MegatronStrategy(**mesh)
    made = trainer(folder, strategy=strategy, devices=world, callbacks=[average], **options)
    made.fit(Lit(), data(8 // mesh["dp"], 64), data(4, 16), ckpt_path=path)
    made.save_checkpoint(f"{folder}/end.ckpt")
    assert average.steps == steps
    assert average.kept.keys() == {n for n, _ in made.lightning_module.named_parameters()}
    assert all(type(x) is DTensor for x in average.kept.values())
    return {n: x.full_tensor().tolist() for n, x in average.kept.items()}


def test_an_average_of_the_weights_goes_on_on_any_mesh(pool, tmp_path):
    pp, tp = {"dp": 1, "pp": 2, "tp": 2, "pipeline": TWO}, {"dp": 2, "tp": 2}
    whole = pool.run(4, averaged, str(tmp_path / "whole"), tp, 6)[0]
    pool.run(4, averaged, str(tmp_path / "first"), pp, 3)
    path = str(tmp_path / "first" / "end.ckpt")
    for mesh, world in ((tp, 4), (pp, 4), ({"dp": 1}, 1)):
        found: dict[str, Any] = {}
        for rank in pool.run(world, averaged, str(tmp_path / "then"), mesh, 6, path):
            found |= rank
        tied = {"net.head.weight": "net.embed.weight"}  # the name that it has on the last stage
        assert {tied.get(name, name) for name in found} == whole.keys()
        for name, values in found.items():
            want = torch.tensor(whole[tied.get(name, name)], dtype=torch.float64)
            torch.testing.assert_close(torch.tensor(values, dtype=want.dtype), want)


class WithBuffers(Lit):
    """With statistics that differ by rank, and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen += 1 + self.global_rank


def whole_state(folder: str, steps: int, path: str | None = None) -> Any:
    """Train with an average of all that is in the state_dict."""
    torch.manual_seed(1)
    average = Average(state=True)
    options = {"max_steps": steps, "max_epochs": 3, "val_check_interval": 1.0}
    strategy = nemo2.MegatronStrategy(dp=2)
    made = trainer(folder, strategy=strategy, devices=2, callbacks=[average], **options)
    made.fit(WithBuffers(), data(4, 64), data(4, 16), ckpt_path=path)
    made.save_checkpoint(f"{folder}/end.ckpt")
    full = {n: x.full_tensor() if type(x) is DTensor else x for n, x in average.kept.items()}
    return {n: x.tolist() for n, x in full.items()}


def test_an_average_of_tied_weights_and_buffers(pool, tmp_path):
    """Buffers are rank 0's, as in the checkpoint of the model."""
    pool.run(2, whole_state, str(tmp_path / "a"), 2)
    whole = pool.run(2, whole_state, str(tmp_path / "b"), 4)[0]
    again = pool.run(2, whole_state, str(tmp_path / "c"), 4, str(tmp_path / "a" / "end.ckpt"))[0]
    assert {"net.embed.weight", "net.head.weight", "seen"} <= again.keys()
    assert again == whole


def shards_only(folder: str) -> str:
    strategy = nemo2.MegatronStrategy(dp=2)
    options = {"max_steps": 1, "val_check_interval": 1.0}
    made = trainer(folder, strategy=strategy, devices=2, callbacks=[Average(local=True)], **options)
    made.fit(Lit(), data(4, 16), data(4, 16))
    with pytest.raises(nemo2.CheckpointError) as caught:
        made.save_checkpoint(f"{folder}/end.ckpt")
    return str(caught.value)


def test_tensors_of_callbacks_that_differ_by_rank_are_refused(pool, tmp_path):
    """The checkpoint would give rank 0's to all."""
    for said in pool.run(2, shards_only, str(tmp_path)):
        assert "the callback Average keeps a tensor that differs from rank to rank" in said
        assert "without to_local()" in said


class Stream(IterableDataset):
    """Numbered samples, read in turns by the dp coordinates."""

    def __init__(self, reader: int, readers: int, samples: int = 48) -> None:
        self.reader, self.readers, self.samples = reader, readers, samples

    def __iter__(self):
        for i in range(self.reader, self.samples, self.readers):
            ids = torch.tensor([i // 24, i % 24, *range(5)])
            yield ids[:-1], ids[1:]


class Numbers(L.Callback):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, at: int) -> None:
        self.seen.append((batch[0][:, 0] * 24 + batch[0][:, 1]).tolist())


def together(folder: str, path: str | None = None) -> list[tuple[int, int]]:
    """Read a long and a short stream; the short one begins again when it ends."""
    torch.manual_seed(1)
    seen: list[tuple[int, int]] = []

    class Two(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            both = [torch.cat(x) for x in zip(*batch.values(), strict=True)]
            return super().training_step(both, batch_idx)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            numbers = [x[0][:, 0] * 24 + x[0][:, 1] for x in batch.values()]
            seen.append(tuple(int(x[0]) for x in numbers))

    reader = torch.distributed.get_rank()
    loaders = {n: DataLoader(Stream(reader, 2, 2 * n), batch_size=1) for n in (8, 3)}
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=5)
    options = {"max_steps": 8 if path else 5, "val_check_interval": None, "callbacks": [saves]}
    options |= {"strategy": nemo2.MegatronStrategy(dp=2), "enable_checkpointing": True}
    made = trainer(folder, devices=2, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the training data cannot say")
        made.fit(Two(), loaders, data(4, 16), ckpt_path=path)
    return seen


def test_a_shorter_stream_goes_on_where_it_stood(pool, tmp_path):
    first = pool.run(2, together, str(tmp_path))[0]
    then = pool.run(2, together, str(tmp_path / "b"), str(tmp_path / "step=5.ckpt"))[0]
    assert first + then == [(2 * i, 2 * (i % 3)) for i in range(8)]


def streamed(folder: str, mesh: dict[str, Any], steps: int, path: str | None = None) -> Any:
    torch.manual_seed(1)
    numbers, world = Numbers(), torch.distributed.get_world_size()
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"max_steps": steps, "max_epochs": 3, "val_check_interval": None}
    strategy = nemo2.MegatronStrategy(**mesh)
    made = trainer(
        folder,
        strategy=strategy,
        devices=world,
        callbacks=[numbers, saves],
        enable_checkpointing=True,
        **options,
    )
    dp = mesh["dp"]
    reader = torch.distributed.get_rank() // (world // dp)
    loader = DataLoader(Stream(reader, dp), batch_size=8 // dp)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(Lit(), loader, ckpt_path=path)
    told = [str(w.message) for w in caught if "read and dropped" in str(w.message)]
    return numbers.seen, reader, told


def test_a_stream_goes_on_where_it_stood(pool, tmp_path):
    """Its first batches are read again, and dropped, where the epoch was not over."""

    def order(ranks):
        readers = {reader: seen for seen, reader, _ in ranks}
        steps = zip(*(readers[r] for r in sorted(readers)), strict=True)
        return [[x for same in zip(*own, strict=True) for x in same] for own in steps]

    two, four = {"dp": 2}, {"dp": 2, "tp": 2}
    whole = order(pool.run(2, streamed, str(tmp_path / "a"), two, 10))
    assert whole == [[*range(8 * i, 8 * i + 8)] for i in (*range(6), *range(4))]
    for mesh, world in ((two, 2), (four, 4), ({"dp": 1}, 1)):
        for at, dropped in ((4, True), (8, True), (6, False)):
            path = str(tmp_path / "a" / f"step={at}.ckpt")
            ranks = pool.run(world, streamed, str(tmp_path / "b"), mesh, 10, path)
            assert order(ranks) == whole[at:]
            assert bool(ranks[0][2]) == dropped
