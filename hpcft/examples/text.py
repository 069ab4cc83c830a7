"""Real text to train on, on any machine with Python: the language's own documentation, as JSON Lines shards.

    python -m hpcft.examples.text DIR

The text is `pydoc_data.topics`, half a million characters that come with CPython, cut into records {"text": ...} of
at most 256 characters. The directory appears complete or not at all, and one that exists is left as it is: any number
of processes may prepare the same directory at once.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from secrets import token_hex

import orjson

from hpcft import durable
from hpcft.errors import UnusableError

CHARACTERS = 256
SHARDS = 4


def prepare(directory: Path) -> Path:
    """Makes `directory`, unless it is there. UnusableError: it cannot be made, or has something else in it."""
    aside = directory.with_name(f".{directory.name}.{token_hex(6)}.aside")
    try:
        if _is_prepared(directory):
            return directory
        aside.mkdir(parents=True)
        records = [orjson.dumps({"text": piece}) + b"\n" for piece in pieces()]
        for shard in range(SHARDS):
            durable.write_file(aside / f"topics-{shard}-of-{SHARDS}.jsonl", records[shard::SHARDS])
        durable.sync_directory(aside)
        try:
            aside.rename(directory)
        except OSError:
            if not _is_prepared(directory):  # it is, if another process was faster
                raise
        durable.sync_directory(directory.parent)
    except OSError as error:
        raise UnusableError(
            f"text cannot be put into {directory}: {error.strerror or error}", "name a new directory"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def _is_prepared(directory: Path) -> bool:
    return any(directory.glob("*.jsonl"))


def pieces() -> Iterator[str]:
    for name in sorted(topics):
        text = topics[name].strip() + "\n"
        length = -(-len(text) // -(-len(text) // CHARACTERS))  # equal pieces rather than a short last one
        for start in range(0, len(text), length):
            yield text[start : start + length]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hpcft.examples.text DIR")
    print(f"the text to train on is in {prepare(Path(sys.argv[1]).resolve())}")
