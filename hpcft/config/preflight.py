"""Whether the training program can start at all, asked before anything else is started.

A missing file or a syntax error would otherwise be found by every worker of every node, after the wait in the
queue. Nothing of the user's is executed for that: a module is looked up the way `import` would, but without
importing its parents, and source is compiled, not run.
"""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hpcft.errors import UnusableError, UsageError
from hpcft.places import ADDRESS_HINT, Place, endpoint_of

if TYPE_CHECKING:
    from hpcft.config.model import Config


def check_program(config: Config) -> None:
    """Raises UsageError if the configured program is not there or does not compile."""
    job = config.job
    if job.script is not None:
        _check_script(job.script, "job.script")
    elif job.module is not None:
        _check_module(job.module)
    elif job.command is not None:
        _check_command(job.command)


def check_torch(config: Config) -> None:
    """Raises UnusableError if this Python has no torch; a plain command may bring its own."""
    if config.job.command is None and importlib.util.find_spec("torch") is None:
        raise UnusableError(
            f"this Python has no torch: {sys.executable}",
            "install torch into the environment of this Python; it is not part of hpcft",
        )


def check_mirror(config: Config, environ: Mapping[str, str]) -> None:
    """Raises UsageError if there is to be a mirror, and obstore is not installed, or the store has no address."""
    mirror = config.mirror
    if not mirror.url:
        return
    if importlib.util.find_spec("obstore") is None:
        raise UsageError("mirror.url needs obstore, which is not installed", "pip install 'hpcft[s3]'")
    _, flaw = endpoint_of(Place(mirror.url, mirror.endpoint, mirror.region), environ)
    if flaw:
        raise UsageError(flaw, ADDRESS_HINT)


def _check_script(script: Path, key: str) -> None:
    if script.is_dir():
        raise UsageError(f"{key}: {script} is a directory", "name a Python file in it")
    if script.exists() and not script.is_file():  # reading a pipe might never end
        raise UsageError(f"{key}: {script} is not a regular file", "name a Python file")
    try:
        source = script.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(script.name, [each.name for each in script.parent.glob("*.py")], 1)
        hint = f"did you mean {script.parent / near[0]}?" if near else "docs/configuration.md says where it may be"
        raise UsageError(f"{key}: there is no file {script}", hint) from None
    except OSError as error:
        raise UsageError(f"{key}: {script} cannot be read: {error.strerror}") from error
    _check_source(source, str(script), key)


def _check_source(source: bytes | str, name: str, key: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes, in some versions of Python
        raise _does_not_compile(error, name, key) from None


def _does_not_compile(error: SyntaxError | ValueError, name: str, key: str) -> UsageError:
    said = f"{name}: {error}"
    if isinstance(error, SyntaxError):
        place = f"{error.filename or name}:{error.lineno}" if error.lineno else name
        said = f"{place}: {error.msg}" + (f": {error.text.strip()}" if error.text and error.text.strip() else "")
    return UsageError(f"{key} does not compile: {said}", "nothing was started: correct it and try again")


@runtime_checkable
class _ReadableLoader(Protocol):
    """What `runpy` needs of a loader. (Not every one of these is registered as an InspectLoader.)"""

    def get_source(self, fullname: str) -> str | None: ...
    def get_code(self, fullname: str) -> CodeType | None: ...


def _check_module(name: str) -> None:
    """As `python -m name` finds it: the current directory first; for a package, its `__main__`."""
    spec = _find(name)
    if spec.submodule_search_locations is not None:
        locations = list(spec.submodule_search_locations)
        inner = _find_in(f"{name}.__main__", locations)
        if inner is None:
            inside = ", ".join(_names_in(locations)) or "nothing"
            raise UsageError(f"job.module: {name} is a package without __main__", f"it contains: {inside}")
        spec = inner
    if spec.has_location and spec.origin and Path(spec.origin).suffix == ".py" and Path(spec.origin).is_file():
        _check_script(Path(spec.origin), "job.module")
        return
    loader = spec.loader
    source = loader.get_source(spec.name) if isinstance(loader, _ReadableLoader) else None
    if source is not None:
        _check_source(source, spec.origin or name, "job.module")
    elif not isinstance(loader, _ReadableLoader) or loader.get_code(spec.name) is None:
        raise UsageError(f"job.module: {name} is not written in Python", "name a module that is")


def _find(name: str) -> ModuleSpec:
    locations = [str(Path.cwd()), *sys.path]
    found: ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        partial = ".".join(parts[:depth])
        found = _find_in(partial, locations)
        if found is None:
            near = difflib.get_close_matches(parts[depth - 1], _names_in(locations), 1)
            meant = ".".join([*parts[: depth - 1], *near, *parts[depth:]])
            hint = f"did you mean {meant}?" if near else "is the environment active in which it is installed?"
            raise UsageError(f"job.module: there is no module {partial}", hint)
        if depth < len(parts):
            if found.submodule_search_locations is None:
                raise UsageError(f"job.module: {partial} is not a package, so {name} cannot be in it")
            locations = list(found.submodule_search_locations)
    assert found is not None
    return found


def _find_in(name: str, locations: list[str]) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, locations)
        except SyntaxError as error:  # the finder of zip files compiles what it finds
            raise _does_not_compile(error, name, "job.module") from None
        except KeyError:
            # A directory without __init__.py below a package that is not imported: its finder wants the parent.
            spec = ModuleSpec(name, None, is_package=True)
            directories = [Path(each, name.rpartition(".")[2]) for each in locations]
            spec.submodule_search_locations = [str(each) for each in directories if each.is_dir()]
        if spec is not None:
            return spec
    return None


def _names_in(locations: Iterable[str]) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(locations)]


def _check_command(command: tuple[str, ...]) -> None:
    program, *rest = command
    if shutil.which(program) is None:
        if "/" not in program:
            raise UsageError(f"job.command: {program!r} is not on PATH", "load its module, or give its full path")
        reason = "is not an executable file" if Path(program).exists() else "does not exist"
        raise UsageError(f"job.command: {program} {reason}", f"the current directory is {Path.cwd()}")
    # An interpreter is always there; what it is to run may not be.
    if rest and Path(program).name.startswith("python") and rest[0].endswith(".py") and not Path(rest[0]).is_file():
        raise UsageError(f"job.command: there is no file {rest[0]}", f"the current directory is {Path.cwd()}")
