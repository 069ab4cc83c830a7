"""Builds dist/hpcft: one executable file with hpcft and all it needs but torch. `python tools/binary.py dist/hpcft`

The files are those of the environment that runs this (made from constraints.txt), so nothing is fetched, and the
binary has what was tested. Torch, and what only torch needs, stay out: they come from the environment of the `python3`
that starts the binary. numpy lies aside (see binary_preamble.py).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
LEFT_OUT = {"torch"}
ASIDE = {"numpy": "_without_numpy"}
_UNUSED = ("tests", "test", "__pycache__", "_core/include", "_core/lib", "f2py", "typing/tests")


def needed() -> set[str]:
    """Names of the distributions that hpcft needs, and what those need."""
    found: set[str] = set()
    todo = ["hpcft"]
    while todo:
        for line in metadata.requires(todo.pop()) or ():
            requirement = Requirement(line)
            name = requirement.name.lower()
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and name not in found | LEFT_OUT:
                found.add(name)
                todo.append(name)
    return found


def files_of(distribution: str) -> Iterator[tuple[Path, Path]]:
    """Where a file of the distribution lies, and where it belongs below site-packages."""
    for file in metadata.files(distribution) or ():
        relative = Path(str(file))
        inner = relative.as_posix()
        if ".." in relative.parts or relative.suffix == ".pyc":  # console scripts, caches
            continue
        if distribution == "numpy" and any(f"/{part}/" in f"/{inner}/" for part in _UNUSED):
            continue
        yield Path(str(file.locate())), relative


def fill(site: Path) -> None:
    for distribution in sorted(needed()):
        top = site / ASIDE.get(distribution, "")
        for source, relative in files_of(distribution):
            target = top / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)
    shutil.copytree(ROOT / "hpcft", site / "hpcft", ignore=shutil.ignore_patterns("__pycache__"))
    own = metadata.distribution("hpcft").read_text("METADATA") or ""
    information = site / f"hpcft-{metadata.version('hpcft')}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(own)


def replace_main(archive: Path, target: Path) -> None:
    """The same archive with our `__main__`, whose directory of unpacking is safe and local."""
    text = (TOOLS / "binary_main.py").read_text()
    text = text.replace("{python}", sysconfig.get_python_version()).replace("{machine}", platform.machine())
    with zipfile.ZipFile(archive) as old, target.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for item in old.infolist():
                new.writestr(item, text if item.filename == "__main__.py" else old.read(item))
    target.chmod(0o755)


def build(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hpcft-binary-") as name:
        site, archive, aside = Path(name, "site"), Path(name, "archive"), target.with_name(f".{target.name}.new")
        fill(site)
        command = [sys.executable, "-m", "shiv", "--site-packages", str(site), "--output-file", str(archive)]
        command += ["--entry-point", "hpcft.cli:main", "--preamble", str(TOOLS / "binary_preamble.py")]
        command += ["--compile-pyc", "--reproducible"]
        subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "315532800"})
        replace_main(archive, aside)
        aside.replace(target)
    print(f"{target}: {target.stat().st_size / 1024**2:.1f} MiB, for Python {sysconfig.get_python_version()}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
