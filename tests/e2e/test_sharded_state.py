"""Worlds of real ranks, plain and sharded (FSDP2): each goes on from what one of another size has saved."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hpcft.checkpoint.commit import Facts, commit
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.checkpoint.manifest import ShardReport
from hpcft.checkpoint.read import entries, read_manifest, verify
from hpcft.ids import Generation, Rank, Step, Term
from hpcft.rundir import RunDirectory
from hpcft.worker.link import Link
from hpcft.worker.restoring import put_back
from hpcft.worker.saving import Saving, named
from hpcft.worker.spec import WorkerSpec
from tests.e2e.worlds import SECONDS, forks

pytestmark = pytest.mark.local

CHAIN = (1, 4, 3, 5, 8, 2)
"""Ranks of one world after another."""
BEGIN = (1, 8)
"""These start anew; the others go on from the one before."""
KINDS = ("plain", "sharded")


class Odd(nn.Module):
    """Shapes that no number of ranks divides, of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 7)
        self.bias = nn.Parameter(torch.randn(5))
        self.one = nn.Parameter(torch.randn(1, 2))
        self.columns = nn.Parameter(torch.randn(3, 120))
        self.low = nn.Linear(5, 6, dtype=torch.bfloat16)
        self.parallel = nn.Linear(4, 8, bias=False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("seen", torch.arange(3))


def build(kind: str, size: int, seed: int) -> tuple[Odd, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Odd()
    if kind == "sharded":
        how: dict[str, Any] = {}
        if size == 8:  # replicas of a sharded model
            how["mesh"] = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replica", "shard"))
        if size == 4:  # one layer is cut by tensor parallelism, and sharded beyond that
            both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            parallelize_module(model, both["tp"], {"parallel": ColwiseParallel()})
            how["mesh"] = both["dp"]
        fully_shard(model.low, **how)
        fully_shard(model, shard_placement_fn=lambda each: Shard(1) if each is model.columns else None, **how)
    groups = [{"params": [model.bias, model.columns], "weight_decay": 0.0}]
    first = {id(model.bias), id(model.columns)}
    groups.insert(0, {"params": [each for each in model.parameters() if id(each) not in first], "weight_decay": 0.1})
    return model, torch.optim.AdamW(groups, lr=0.01, foreach=True)


def train(model: Odd, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step with gradients that are the same however the model lies."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            whole = DTensor.from_local(
                gradient, parameter.device_mesh, run_check=False
            )  # on all ranks: no communication
            parameter.grad = whole.redistribute(placements=parameter.placements)
        else:
            parameter.grad = gradient
    optimizer.step()
    model.seen += 1


def gathered(model: Odd, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    def whole(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    found = {f"model.{name}": whole(tensor) for name, tensor in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.state.{number}.{key}": whole(value) for key, value in values.items()}
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(bits(one[name]), bits(other[name]))
        for name in one
    )


class _Listening(Link):
    __slots__ = ("failure", "report")

    def say_shard(self, step: Step, report: ShardReport, **timing: float) -> None:
        self.report = report

    def say_save_failed(self, step: Step, reason: str) -> None:
        raise AssertionError(reason)


def save(
    directory: RunDirectory, rank: int, size: int, life: int, model: Odd, optimizer: torch.optim.Optimizer
) -> Path:
    """As a worker and the leader save it; returns once it is committed."""
    spec = WorkerSpec(
        Rank(rank), size, generation=Generation(life), nonce=f"{life:08x}", run_directory=directory.path
    )  # fmt: skip
    link = _Listening(spec)
    saving = Saving(spec, link, torch.device("cpu"))
    saving.remember(named({"model": model, "optimizer": optimizer}), None, None)
    saving.save(Step(life))
    reports: list[Any] = [None] * size
    dist.all_gather_object(reports, link.report.to_json())
    if rank == 0:
        facts = Facts(directory.run_id(), Term(1), None, 0.0)
        commit(directory.checkpoints, [ShardReport.parse(each) for each in reports], facts)
    dist.barrier()
    return directory.checkpoints / checkpoint_name(Step(life), Generation(life))


def go_on_from(root: Path, source: str, life: int, model: Odd, optimizer: torch.optim.Optimizer) -> None:
    directory = RunDirectory(root / source)
    path = directory.checkpoints / checkpoint_name(Step(life), Generation(life))
    step = put_back(path, named({"model": model, "optimizer": optimizer}), directory.run_id())
    assert step == life
    assert same(gathered(model, optimizer), load_file(root / f"{source}-{life}.safetensors"))


def live(rank: int, port: int, root: Path) -> None:
    """One rank in all worlds that are large enough to have it."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    for life, size in enumerate(CHAIN, 1):
        if rank >= size:
            continue
        dist.init_process_group("gloo", store=PrefixStore(f"{life}", store), rank=rank, world_size=size)
        for kind in KINDS:
            model, optimizer = build(kind, size, seed=life)
            if size not in BEGIN:
                for source in KINDS:
                    model, optimizer = build(kind, size, seed=life)
                    go_on_from(root, source, life - 1, model, optimizer)
            train(model, optimizer, seed=life)
            assert type(optimizer.state[model.bias]["step"]) is Tensor
            assert isinstance(optimizer.state[model.bias]["exp_avg"], DTensor) == (kind == "sharded")
            whole = gathered(model, optimizer)
            if rank == 0:
                save_file(whole, root / f"{kind}-{life}.safetensors")
            path = save(RunDirectory(root / kind), rank, size, life, model, optimizer)
            if size == 3:
                read_as_stock_torch_does(path, whole)
        dist.destroy_process_group()


def read_as_stock_torch_does(path: Path, whole: Mapping[str, Tensor]) -> None:
    mesh = init_device_mesh("cpu", (3,))
    plain = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    cut: dict[str, Tensor] = {
        name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(tensor.dim() - 1)])
        for name, tensor in whole.items()
        if tensor.dim()
    }
    for target in (plain, cut):
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(path)))
        for name, tensor in target.items():
            found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert same({name: found}, {name: whole[name]}), name


def _work(rank: int, port: int, root: str, log: str) -> None:
    with Path(log).open("w", buffering=1) as out:
        sys.stdout = sys.stderr = out
        try:
            live(rank, port, Path(root))
        except BaseException:
            traceback.print_exc(file=out)
            raise SystemExit(1) from None


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What all those worlds have left."""
    root = tmp_path_factory.mktemp("chain")
    for kind in KINDS:
        RunDirectory(root / kind).prepare()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [root / f"rank{rank}.log" for rank in range(max(CHAIN))]
    ranks = [forks.Process(target=_work, args=(n, store.port, str(root), str(log))) for n, log in enumerate(logs)]
    for each in ranks:
        each.start()
    try:
        waiting = list(ranks)
        while waiting and all(each.exitcode in (None, 0) for each in ranks):
            ended = connection.wait([each.sentinel for each in waiting], SECONDS)
            assert ended, "nobody has come to an end"
            waiting = [each for each in waiting if each.sentinel not in ended]
            for each in ranks:
                each.join(0)
    finally:
        for each in ranks:
            each.kill()
            each.join()
    story = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs if log.exists())
    assert [each.exitcode for each in ranks] == [0] * len(ranks), story
    yield root


def test_any_world_goes_on_from_any_other_plain_or_sharded(chain: Path) -> None:
    for kind in KINDS:
        found = entries(RunDirectory(chain / kind).checkpoints)
        assert [each.step for each in found] == list(range(1, len(CHAIN) + 1))
        for entry, size in zip(found, CHAIN, strict=True):
            assert verify(entry.directory) == []
            manifest, _ = read_manifest(entry.directory)
            assert manifest.world_size == size
