"""From a fresh process to the user's program: what the pool's child does between fork and the first user line.

A worker comes to life in one of two ways. *Forked* from the warm pool, it has torch imported and starts within
milliseconds; *exec'd* (`python -m hpcft.program`, or the user's own command) it pays for its imports, which is the
way out when something that was preloaded does not survive a fork. Both see the same surroundings: own session, own
output, the environment that torchrun would set, and nothing of the pool's.

What a forked program must not notice: sockets of others (they would delay a FIN), signal dispositions, random
state shared with its siblings, the pool's thread settings. What it must keep: the shared page, the control channel,
and the lifeline, whose only purpose is to stay open until the last process that could train is gone.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import orjson

from hpcft.page import NodePage
from hpcft.process import die_with_parent
from hpcft.worker.report import report_exception
from hpcft.worker.spec import SPEC_VARIABLE, hold_spec

RESET_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ignored or handled by the pool; back to their defaults in a worker, but for those of `deaf_to`."""

_OOM_SCORE = "500"
"""When memory runs out, a worker goes before its pool, agent and keeper: those can replace it."""


def environment(inherited: Mapping[str, str], spec: Mapping[str, Any]) -> dict[str, str]:
    """The program's environment: what the pool was started with, and what torchrun sets."""
    variables = dict(inherited)
    local_world = int(spec["local_world_size"])
    if local_world > 1:
        variables.setdefault("OMP_NUM_THREADS", "1")
    variables.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    variables.setdefault("PYTHONUNBUFFERED", "1")  # logs are followed live, and a killed worker flushes nothing
    variables |= {
        "RANK": str(spec["rank"]),
        "LOCAL_RANK": str(spec["local_rank"]),
        "WORLD_SIZE": str(spec["world_size"]),
        "LOCAL_WORLD_SIZE": str(local_world),
        "GROUP_RANK": str(spec["node_rank"]),
        "GROUP_WORLD_SIZE": str(spec["node_count"]),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(spec["rank"]),
        "ROLE_WORLD_SIZE": str(spec["world_size"]),
        "MASTER_ADDR": str(spec["master_addr"]),
        "MASTER_PORT": str(spec["master_port"]),
        "TORCHELASTIC_RESTART_COUNT": str(spec["generation"]),
        # Budgets here are windows that progress refills: there is no lifetime limit to tell.
        "TORCHELASTIC_MAX_RESTARTS": str(2**31 - 1),
        "TORCHELASTIC_RUN_ID": str(spec["run_id"]),
        # Every rank is a client of the store at MASTER_ADDR:MASTER_PORT; rank 0 hosts none.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # All devices stay visible, and LOCAL_RANK chooses, as under torchrun: peers on the node need to see each
        # other's devices for peer-to-peer copies. NVML and Slurm count in PCI order, so CUDA has to.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    return variables


def settle(parent: int, stdout: int, stderr: int, keep: Collection[int], deaf: Collection[int] = ()) -> None:
    """Cut a forked child off from the pool: session, death signal, signals, output, descriptors.

    Call it first, on the main thread. `keep` are the descriptors that stay open besides 0, 1 and 2, `deaf` the
    signals that it ignores.
    """
    os.setsid()
    die_with_parent(parent)
    for number in RESET_SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in deaf else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN if signal.SIGINT in deaf else signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (a Path for each would cost more than the rest)
        number_open = int(name)
        if number_open > 2 and number_open not in keep:
            with suppress(OSError):  # the directory's own descriptor is gone by now
                os.close(number_open)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def become_fresh(variables: Mapping[str, str]) -> None:
    """Give a forked process what a new interpreter would have: its own environment, random state and threads."""
    os.environ.clear()
    os.environ.update(variables)
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()  # from the system, as at import; CUDA's generators do not exist yet
        torch.set_num_threads(int(variables.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    bind_children()


def bind_children() -> None:
    """From now on, a process forked by this one (a data loader, say) dies with it.

    Only those forked by the main thread: the death signal follows the forking *thread*, and a thread of the user's
    may end long before the loaders that it started. And not their children in turn: a program that makes itself a
    daemon forks twice, and its middle process ends. The pool's sweep covers those.
    """
    worker = os.getpid()
    bound = False

    def before() -> None:
        nonlocal bound
        bound = threading.get_native_id() == os.getpid() == worker

    def after_in_child() -> None:
        if bound:
            die_with_parent(worker)

    os.register_at_fork(before=before, after_in_child=after_in_child)


def deaf_to(spec: Mapping[str, Any]) -> frozenset[signal.Signals]:
    """Signals that a worker ignores, because they are not meant for it.

    Slurm (without cgroups) sends its warning, and the end of the time limit, to every process of the step. The agent
    makes of them an order that a program with `hpcft.main` obeys in its next step; the signal itself would end it
    before its checkpoint. A plain command knows no orders: it keeps SIGTERM, by which it is stopped, and SIGINT.
    """
    warnings = frozenset({signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP})
    if "command" in spec["program"]:
        return warnings
    return warnings | {signal.SIGTERM, signal.SIGINT}


def exec_program(spec: Mapping[str, Any], variables: Mapping[str, str]) -> NoReturn:
    """Replace this process by the user's command, or by an interpreter that imports everything anew."""
    _hand_on(spec, True)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would hand that on
        signal.signal(number, signal.SIG_DFL)
    told = {**variables, SPEC_VARIABLE: orjson.dumps(dict(spec)).decode()}
    command = spec["program"].get("command")
    if command is None:
        os.execve(sys.executable, [sys.executable, "-P", "-m", "hpcft.program"], told)
    os.execvpe(command[0], [*command, *spec.get("args", ())], told)


def _hand_on(spec: Mapping[str, Any], inheritable: bool) -> None:
    """Whether the worker's own descriptors pass through an exec."""
    for name in ("page_fd", "control_fd", "lifeline_fd"):
        if spec.get(name) is not None:
            os.set_inheritable(spec[name], inheritable)


def run_program(spec: Mapping[str, Any]) -> int:
    """Run the script or module of `spec` as `__main__`, to its end. Returns the exit status.

    An exception that leaves the program is printed by `sys.excepthook` and reported over the control channel.
    """
    hold_spec(spec)
    program = spec["program"]
    arguments = [str(argument) for argument in spec.get("args", ())]
    try:
        if "script" in program:
            script = str(program["script"])
            sys.argv = [script, *arguments]
            sys.path.insert(0, str(Path(script).resolve().parent))
            outcome = runpy.run_path(script, run_name="__main__")
        else:
            module = str(program["module"])
            sys.argv = [module, *arguments]
            sys.path.insert(0, str(Path.cwd()))
            outcome = runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return _status_of(ended)
    except BaseException as error:
        fail(spec, error)
        return 1
    _last_globals.append(outcome)
    return 0


def fail(spec: Mapping[str, Any], error: BaseException) -> None:
    """Print an exception as the interpreter would, without the frames of this module, and tell the agent."""
    error = error.with_traceback(_without_ours(error.__traceback__))
    sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()
    if spec.get("control_fd") is not None:
        step = NodePage.attach(os.dup(spec["page_fd"])).slot(spec["slot"]).step
        report_exception(spec["control_fd"], error, step)


def leave(status: int) -> NoReturn:
    """End a forked process like the end of a script: threads joined, exit functions run, files flushed.

    Not through the interpreter's own finalisation: taking down a process full of imported modules costs 0.2 s and
    more, page by page copied from the pool. What a program can notice of it is done here: its threads are waited
    for, `atexit` runs, its globals and garbage go (and with them unflushed files), and the streams are flushed.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        _flush_open_files()
        _last_globals.clear()
        gc.collect()  # cheap: what came from the pool was frozen before the fork
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(status)


def _flush_open_files() -> None:
    """Files that the program left open. Their own finalisers may come in the wrong order when they are in a cycle."""
    tracked = gc.get_objects()  # without what was frozen in the pool
    for kind in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
        for file in tracked:
            if type(file) is kind:
                with suppress(OSError, ValueError):
                    file.flush()


_last_globals: list[dict[str, Any]] = []
"""Holds the program's globals until its exit functions have run."""


def _status_of(ended: SystemExit) -> int:
    if ended.code is None:
        return 0
    if isinstance(ended.code, int):
        return ended.code & 0xFF
    print(ended.code, file=sys.stderr)
    return 1


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """Cut the frames of this module and of runpy off the beginning."""
    link = trace
    while link is not None and link.tb_frame.f_code.co_filename in _OURS:
        link = link.tb_next
    return link


_OURS = (__file__, "<frozen runpy>", runpy.__file__)


def main() -> int:
    """Entry of an exec'd worker (`python -P -m hpcft.program`): the specification comes by environment."""
    spec = orjson.loads(os.environ.pop(SPEC_VARIABLE))
    _hand_on(spec, False)
    bind_children()
    return run_program(spec)


if __name__ == "__main__":
    sys.exit(main())
