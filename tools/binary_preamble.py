"""Runs in dist/hpcft after unpacking, before hpcft: children find what was unpacked, and numpy is the right one.

Arrays and tensors share memory, and a user's extensions are compiled against the environment's numpy, so a second copy
must not shadow that one: numpy comes from the environment, as torch does. Only where that has none (torch's CPU builds
do not ask for it) the binary's own is used.
"""

import os
import sys
from importlib.machinery import PathFinder

unpacked = str(site_packages)  # type: ignore[name-defined]  # noqa: F821
own = [unpacked]
if PathFinder.find_spec("numpy") is None:
    own.append(f"{unpacked}/_without_numpy")
    sys.path.append(own[-1])
known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in own]
os.environ["PYTHONPATH"] = os.pathsep.join(own + known)
