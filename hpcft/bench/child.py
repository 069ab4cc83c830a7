"""Becomes another program, which is told to end (SIGTERM) when the process that started it dies.

    python -m hpcft.bench.child PARENT PROGRAM [ARGUMENT]...

A trial trains until it is ended: without whoever would end it, it must not go on.
"""

from __future__ import annotations

import os
import signal
import sys

from hpcft.process import die_with_parent


def main() -> None:
    parent, *command = sys.argv[1:]
    die_with_parent(int(parent), signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
