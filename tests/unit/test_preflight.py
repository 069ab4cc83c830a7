from __future__ import annotations

import importlib.util
import os
import sys
import zipfile
from pathlib import Path

import pytest

from hpcft.config import Config, check_program, check_torch
from hpcft.errors import UnusableError, UsageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(**job: object) -> None:
    check_program(Config.model_validate({"run": {"name": "r"}, "job": job}))


def complaint(**job: object) -> tuple[str, str]:
    with pytest.raises(UsageError) as raised:
        check(**job)
    return raised.value.message, raised.value.hint


def package(*names: str) -> None:
    """Modules of a package that must not be imported by looking for them."""
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('imported')\n")


def test_a_python_without_torch_is_refused_unless_a_command_brings_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    script, command = (
        Config.model_validate({"run": {"name": "r"}, "job": job}) for job in ({"script": "x.py"}, {"command": ["x"]})
    )
    check_torch(script)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_torch(command)
    with pytest.raises(UnusableError, match="this Python has no torch"):
        check_torch(script)


# --- scripts ---------------------------------------------------------------------------------------------------


def test_a_script_that_compiles_is_not_run(here: Path) -> None:
    package("train.py")
    check(script="train.py")


def test_a_script_that_does_not_exist(here: Path) -> None:
    package("train.py")
    assert complaint(script=str(here / "trian.py")) == (
        f"job.script: there is no file {here}/trian.py",
        f"did you mean {here}/train.py?",
    )
    assert complaint(script="zzz.py")[0] == "job.script: there is no file zzz.py"


def test_a_script_that_is_a_directory(here: Path) -> None:
    assert complaint(script=str(here))[0] == f"job.script: {here} is a directory"


def test_a_script_that_cannot_be_read() -> None:
    package("train.py")
    assert complaint(script="train.py/x.py")[0] == "job.script: train.py/x.py cannot be read: Not a directory"
    os.mkfifo("pipe.py")
    assert complaint(script="pipe.py")[0] == "job.script: pipe.py is not a regular file"


def test_a_syntax_error_is_shown_with_its_line() -> None:
    Path("train.py").write_text("import os\n\ndef f(:\n    pass\n")
    assert complaint(script="train.py") == (
        "job.script does not compile: train.py:3: invalid syntax: def f(:",
        "nothing was started: correct it and try again",
    )


@pytest.mark.parametrize("source", [b"x = '\xff'\n", b"x = 1\0\n", b"# coding: nonsense\n"])
def test_a_script_that_is_not_text(source: bytes) -> None:
    Path("train.py").write_bytes(source)
    assert complaint(script="train.py")[0].startswith("job.script does not compile: train.py")


def test_a_warning_is_not_an_error() -> None:
    Path("train.py").write_text("if 1 is 1: pass\n")
    check(script="train.py")


# --- modules ---------------------------------------------------------------------------------------------------


def test_a_module_is_found_without_importing_its_parents() -> None:
    package("outer_p/__init__.py", "outer_p/inner/__init__.py", "outer_p/inner/train.py")
    check(module="outer_p.inner.train")
    assert "outer_p" not in sys.modules


def test_a_module_in_directories_without_init() -> None:
    package("spaces_p/deeper/train.py")
    check(module="spaces_p.deeper.train")
    message, hint = complaint(module="spaces_p.deeper.trian")
    assert message == "job.module: there is no module spaces_p.deeper.trian"
    assert hint == "did you mean spaces_p.deeper.train?"


def test_a_module_that_is_installed() -> None:
    check(module="json.tool")
    check(module="hpcft.config")


def test_the_current_directory_comes_first(here: Path) -> None:
    Path("json").mkdir()
    Path("json/__init__.py").touch()
    Path("json/tool.py").write_text("(")
    assert (
        complaint(module="json.tool")[0]
        == f"job.module does not compile: {here}/json/tool.py:1: '(' was never closed: ("
    )


def test_a_module_that_is_not_text() -> None:
    Path("latin_p.py").write_bytes(b"x = '\xff'\n")
    assert complaint(module="latin_p")[0].startswith("job.module does not compile: ")


def test_a_module_that_does_not_exist() -> None:
    package("outer_q/__init__.py", "outer_q/train.py")
    assert complaint(module="outer_q.trian") == (
        "job.module: there is no module outer_q.trian",
        "did you mean outer_q.train?",
    )
    assert complaint(module="outer_r.train") == (
        "job.module: there is no module outer_r",
        "did you mean outer_q.train?",
    )
    assert complaint(module="qqqqqqqq") == (
        "job.module: there is no module qqqqqqqq",
        "is the environment active in which it is installed?",
    )
    assert complaint(module="outer_q.train.more")[0] == (
        "job.module: outer_q.train is not a package, so outer_q.train.more cannot be in it"
    )


def test_a_package_needs_a_main() -> None:
    package("outer_s/__init__.py", "outer_s/train.py")
    message, hint = complaint(module="outer_s")
    assert message == "job.module: outer_s is a package without __main__"
    assert hint == "it contains: train"
    package("outer_s/__main__.py")
    check(module="outer_s")


def test_a_module_that_is_not_python() -> None:
    assert complaint(module="_ctypes")[0] == "job.module: _ctypes is not written in Python"
    assert complaint(module="sys")[0] == "job.module: sys is not written in Python"


def test_a_module_in_a_zip_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile("archive.zip", "w") as archive:
        archive.writestr("zipped_p/__init__.py", "")
        archive.writestr("zipped_p/train.py", "x = 1\n")
        archive.writestr("zipped_p/broken.py", "x = \n")
    monkeypatch.syspath_prepend(here / "archive.zip")
    check(module="zipped_p.train")
    assert complaint(module="zipped_p.broken")[0].endswith("broken.py:1: invalid syntax: x =")


def test_looking_writes_nothing(here: Path) -> None:
    package("outer_t/__init__.py", "outer_t/train.py")
    check(module="outer_t.train")
    assert sorted(path.name for path in here.rglob("*")) == ["__init__.py", "outer_t", "train.py"]


# --- commands --------------------------------------------------------------------------------------------------


def test_a_command_on_path() -> None:
    package("train.py")
    check(command=["python3", "train.py"])
    check(command=["python3", "-m", "train"])
    check(command=[sys.executable, "-c", "pass"])


def test_a_command_that_cannot_be_run(here: Path) -> None:
    assert complaint(command=["pyhton3", "train.py"])[0] == "job.command: 'pyhton3' is not on PATH"
    assert complaint(command=["./run.sh"])[0] == "job.command: ./run.sh does not exist"
    Path("run.sh").write_text("#!/bin/sh\n")
    assert complaint(command=["./run.sh"])[0] == "job.command: ./run.sh is not an executable file"
    Path("run.sh").chmod(0o755)
    check(command=["./run.sh"])
    assert complaint(command=["python3", "train.py"]) == (
        "job.command: there is no file train.py",
        f"the current directory is {here}",
    )
