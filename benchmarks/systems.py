"""The ways to save and to load that are compared: hpcft's and its peers', each as its documents say it is used.

A system saves and loads what `model.state_dict()` holds. Peers that cannot be had, or fail, say why (`Unavailable`).
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

import hpcft
from hpcft import durable
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.checkpoint.load import load
from hpcft.ids import Generation, Step
from hpcft.worker.restoring import put_back
from hpcft.worker.saving import named


class Unavailable(Exception):
    """The system cannot be had here; the reason is for people."""


class Pending(Protocol):
    """A save that goes on in the background."""

    def done(self) -> bool: ...
    def wait(self) -> None:
        """Until it is durable. Raises what it has failed with."""


class System(Protocol):
    def idle(self) -> None:
        """What a step does without a save; its time is not the save's."""

    def save(self) -> Pending:
        """To be called on all ranks. Returns when training may go on, and change parameters."""

    def load(self) -> None:
        """Put what was saved last into the model."""

    def saved(self) -> Path:
        """The file or directory that was saved last."""

    def clear(self) -> None:
        """Delete all that was saved but the last."""

    def close(self) -> None: ...


class Done:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Hpcft:
    """`run.update`, with a cadence of two steps: every other one saves."""

    def __init__(self, run: hpcft.Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._run, self._model, self._optimizer = run, model, optimizer
        self._root = Path(run.config["report"]) / "run" / "checkpoints"

    def idle(self) -> None:
        self._run.update(self._optimizer)

    def save(self) -> Pending:
        self._run.update(self._optimizer)
        if self._run.device.type == "cuda":
            torch.cuda.synchronize()  # parameters may not change before
        return _Appears(self.saved())

    def saved(self) -> Path:
        return self._root / checkpoint_name(Step(self._run.step), Generation(self._run.generation))

    def load(self) -> None:
        put_back(self.saved(), named({"model": self._model, "optimizer": self._optimizer}), None)

    def clear(self) -> None:
        _clear(self._root, self.saved())

    def close(self) -> None:
        pass


class HpcftTensors(Hpcft):
    """`hpcft.checkpoint.load.load`: verified tensors, not put into the model."""

    def load(self) -> None:
        load(self.saved())


class _Appears:
    def __init__(self, path: Path) -> None:
        self._path = path

    def done(self) -> bool:
        return self._path.exists()

    def wait(self) -> None:
        while not self.done():
            time.sleep(0.001)


class _Peer:
    """What all peers share: they have a directory of their own, and number what they save."""

    def __init__(self, place: Path, model: nn.Module) -> None:
        self._place = place / "peer"
        self._place.mkdir(exist_ok=True)
        self._model = model
        found = sorted(self._place.iterdir())
        self._number = int(found[-1].name) if found else 0

    def idle(self) -> None:
        pass

    def saved(self) -> Path:
        return self._place / f"{self._number:04}"

    def clear(self) -> None:
        if dist.get_rank() == 0:
            _clear(self._place, self.saved())

    def close(self) -> None:
        pass

    def _state(self) -> dict[str, Any]:
        return {"model": self._model.state_dict()}

    def _next(self) -> Path:
        self._number += 1
        return self.saved()


class TorchSave(_Peer):
    """Rank 0 saves, fsyncs and renames; the others wait for it."""

    def save(self) -> Pending:
        path = self._next()
        if dist.get_rank() == 0:
            aside = path.with_suffix(".aside")
            with aside.open("wb") as file:
                torch.save(self._state(), file)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
            durable.sync_directory(path.parent)
        dist.barrier()
        return Done()

    def load(self) -> None:
        self._model.load_state_dict(torch.load(self.saved(), weights_only=True)["model"])


class TorchMmap(TorchSave):
    def load(self) -> None:
        self._model.load_state_dict(torch.load(self.saved(), weights_only=True, mmap=True)["model"])


class Safetensors(TorchSave):
    def save(self) -> Pending:
        from safetensors.torch import save_file

        path = self._next()
        if dist.get_rank() == 0:
            save_file(self._model.state_dict(), path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        dist.barrier()
        return Done()

    def load(self) -> None:
        from safetensors.torch import load_file

        self._model.load_state_dict(load_file(self.saved()))


class Dcp(_Peer):
    def save(self) -> Pending:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state(), checkpoint_id=self._next())
        return Done()

    def load(self) -> None:
        import torch.distributed.checkpoint as dcp

        state = self._state()
        dcp.load(state, checkpoint_id=self.saved())
        self._model.load_state_dict(state["model"])


class DcpAsync(Dcp):
    """With a stager of its own, which keeps its buffers from one save to the next."""

    _kind = "THREAD"

    def __init__(self, place: Path, model: nn.Module) -> None:
        super().__init__(place, model)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        on_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(on_gpu, True, False, on_gpu))

    def save(self) -> Pending:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        kind = AsyncCheckpointerType[self._kind]
        saving = dcp.async_save(
            self._state(), checkpoint_id=self._next(), async_checkpointer_type=kind, async_stager=self._stager
        )
        return _Future(getattr(saving, "upload_completion", saving))

    def close(self) -> None:
        self._stager.close()


class DcpAsyncProcess(DcpAsync):
    _kind = "PROCESS"


class _Future:
    def __init__(self, future: Any) -> None:
        self._future = future

    def done(self) -> bool:
        return bool(self._future.done())

    def wait(self) -> None:
        self._future.result()


class TorchSnapshot(_Peer):
    """`async_take`, parameters declared replicated."""

    def __init__(self, place: Path, model: nn.Module) -> None:
        super().__init__(place, model)
        self._library = _imported("torchsnapshot")

    def save(self) -> Pending:
        state = self._library.StateDict(**self._state())
        return _Taken(self._library.Snapshot.async_take(str(self._next()), {"state": state}, replicated=["**"]))

    def load(self) -> None:
        state = self._library.StateDict(**self._state())
        self._library.Snapshot(str(self.saved())).restore({"state": state})
        self._model.load_state_dict(state["model"])


class _Taken:
    def __init__(self, pending: Any) -> None:
        self._pending = pending

    def done(self) -> bool:
        return bool(self._pending.done())

    def wait(self) -> None:
        self._pending.wait()


class TorchCheckpointing(_Peer):
    """Its manager, through the page cache: as it comes, it fails on ext4. Training waits for the copy that it makes in
    the background, for parameters must not change before."""

    def __init__(self, place: Path, model: nn.Module) -> None:
        super().__init__(place, model)
        library = _imported("torch_checkpointing")
        storage = importlib.import_module("torch_checkpointing.storage.filesystem")
        config = library.CheckpointManager.Config(storage_config=storage.LocalFileSystemStorageConfig(False))
        self._manager = library.CheckpointManager(config)

    def save(self) -> Pending:
        path = self._next()
        path.mkdir(exist_ok=True)
        future = self._manager.save(str(path), self._state())
        with self._manager.lock():
            pass
        return _Future(future)

    def load(self) -> None:
        found = self._manager.load(str(self.saved()), into=self._state())
        self._model.load_state_dict(found["model"])

    def close(self) -> None:
        self._manager.close()


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed ({error.name}): see benchmarks/requirements.txt") from error
    except Exception as error:  # whatever it raises, its row says so
        raise Unavailable(f"cannot be imported: {type(error).__name__}: {error}") from error


def _clear(root: Path, but: Path) -> None:
    for path in root.iterdir():
        if path != but and path.name[0] not in ".L":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


HPCFT: Mapping[str, type[Hpcft]] = {"hpcft": Hpcft, "hpcft, tensors": HpcftTensors}

PEERS: Mapping[str, Callable[[Path, nn.Module], System]] = {
    "torch.save": TorchSave,
    "torch.load mmap": TorchMmap,
    "safetensors": Safetensors,
    "DCP": Dcp,
    "DCP async": DcpAsync,
    "DCP async, process": DcpAsyncProcess,
    "torchsnapshot async": TorchSnapshot,
    "torch_checkpointing": TorchCheckpointing,
}
