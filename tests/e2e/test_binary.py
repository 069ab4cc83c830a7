"""dist/hpcft as a user meets it: in an environment that has torch, and nothing of hpcft."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.local

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def binary() -> Path:
    """As `make binary` left it, if nothing has changed since; else built now."""
    built = ROOT / "dist" / "hpcft"
    sources = [*(ROOT / "hpcft").rglob("*.py"), *(ROOT / "tools").glob("binary*.py"), ROOT / "constraints.txt"]
    if not built.exists() or built.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        subprocess.run([sys.executable, ROOT / "tools" / "binary.py", built], check=True, timeout=120)
    return built


def _closure(distribution: str) -> set[str]:
    found, todo = {distribution}, [distribution]
    while todo:
        for line in metadata.requires(todo.pop()) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                name = requirement.name.lower()
                if name not in found:
                    found.add(name)
                    todo.append(name)
    return found


def _environment(directory: Path, distributions: set[str]) -> Path:
    """A virtual environment with these distributions, by links to the ones that the tests run with."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True, timeout=60)
    site = next((directory / "lib").glob("python3*")) / "site-packages"
    for name in distributions:
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return directory / "bin"


@pytest.fixture(scope="session")
def with_numpy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _environment(tmp_path_factory.mktemp("cluster") / "venv", _closure("torch") | {"numpy"})


@pytest.fixture(scope="session")
def without_numpy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _environment(tmp_path_factory.mktemp("cluster") / "venv", _closure("torch"))


def _run(
    binary: Path, bin_directory: Path, cwd: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    variables = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    variables |= {"PATH": f"{bin_directory}:/usr/bin:/bin", "TMPDIR": str(cwd)} | more
    return subprocess.run(
        [binary, *arguments], env=variables, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def _origins(done: subprocess.CompletedProcess[str]) -> Mapping[str, str]:
    assert done.returncode == 0, done.stderr
    origins: Mapping[str, str] = json.loads(done.stdout)
    return origins


def _where(*modules: str) -> str:
    named = ", ".join(f"{module!r}: {module}.__file__" for module in modules)
    return f"import json, {', '.join(modules)}; print(json.dumps({{{named}}}))"


def test_unpacks_into_a_directory_of_its_user_and_answers(binary: Path, with_numpy: Path, tmp_path: Path) -> None:
    done = _run(binary, with_numpy, tmp_path, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hpcft {metadata.version('hpcft')}\n", "")
    unpacked = tmp_path / f"hpcft-{os.getuid()}"
    assert stat.S_IMODE(unpacked.stat().st_mode) == 0o700


def test_torch_and_numpy_come_from_the_environment_and_the_rest_from_the_binary(
    binary: Path, with_numpy: Path, tmp_path: Path
) -> None:
    done = _run(
        binary, with_numpy, tmp_path, "-c", _where("torch", "numpy", "click", "hpcft", "xxhash"), SHIV_INTERPRETER="1"
    )
    origins = _origins(done)
    environment, unpacked = str(with_numpy.parent), str(tmp_path)
    assert origins["torch"].startswith(environment)
    assert origins["numpy"].startswith(environment)
    assert origins["hpcft"].startswith(unpacked)
    assert origins["click"].startswith(unpacked)
    assert origins["xxhash"].startswith(unpacked)


def test_brings_numpy_where_the_environment_has_none(binary: Path, without_numpy: Path, tmp_path: Path) -> None:
    program = "import numpy, torch; print(numpy.__file__); assert torch.ones(2).numpy().sum() == 2"
    done = _run(binary, without_numpy, tmp_path, "-c", program, SHIV_INTERPRETER="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_children_find_what_was_unpacked(binary: Path, with_numpy: Path, tmp_path: Path) -> None:
    done = _run(binary, with_numpy, tmp_path, "doctor", "--json")
    findings = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
    assert findings["torch"]["grade"] == "ok", findings["torch"]
    assert findings["run root"]["grade"] == "ok", findings["run root"]
    assert findings["packages"]["grade"] == "ok", findings["packages"]


def test_a_run_from_one_file(binary: Path, with_numpy: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[run]\nname = "c"\n[job]\ncommand = ["python3", "-c", "print(6 * 7)"]\n')
    done = _run(binary, with_numpy, tmp_path, "run", "c.toml", "--nodes", "1", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "42" in (tmp_path / "runs" / "c" / "logs" / "node1" / "g0001-rank0000.log").read_text()


def test_what_was_unpacked_is_locked_also_when_the_process_becomes_another(
    binary: Path, with_numpy: Path, tmp_path: Path
) -> None:
    unpacked = tmp_path / f"hpcft-{os.getuid()}"
    try_it = f"import fcntl, os; fcntl.flock(os.open({str(unpacked)!r}, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    program = f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', {try_it!r}])"
    done = _run(binary, with_numpy, tmp_path, "-c", program, SHIV_INTERPRETER="1")
    assert "BlockingIOError" in done.stderr


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_refuses_a_directory_that_others_can_write(binary: Path, with_numpy: Path, tmp_path: Path, mode: int) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    planted.chmod(mode)
    done = _run(binary, with_numpy, tmp_path, "--version", SHIV_ROOT=str(planted))
    assert done.returncode == 14
    assert "others can write it" in done.stderr
    assert "hint: set SHIV_ROOT" in done.stderr
    assert not list(planted.iterdir())


def test_says_so_when_it_is_started_by_another_python(binary: Path, tmp_path: Path) -> None:
    """The check comes before anything that another version could choke on: here another machine's name."""
    fake = tmp_path / "platform.py"
    fake.write_text("def machine(): return 'riscv64'\n")
    done = subprocess.run(
        [sys.executable, binary, "--version"],
        env={"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 14
    assert "is Python" in done.stderr
    assert "riscv64" in done.stderr
