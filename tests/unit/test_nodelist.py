"""The node list parser: Slurm's grammar, its order, its limits, and agreement with the real `scontrol`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.errors import UsageError
from hpcft.slurm.nodelist import expand
from tests.search import sampled


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1 node2 node3"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[8-011]", "n8 n9 n10 n11"),
        ("n[01-2,007]", "n01 n02 n007"),
        ("a,b[2,4-5],c", "a b2 b4 b5 c"),
        ("n[1-2]-ib", "n1-ib n2-ib"),
        ("n[1,3]b.cluster,login", "n1b.cluster n3b.cluster login"),
        ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
        ("a[1-2]b[3-4]c[5-6]", "a1b3c5 a1b3c6 a2b3c5 a2b3c6 a1b4c5 a1b4c6 a2b4c5 a2b4c6"),
        ("a[1-2]b[3-4]c[5]", "a1b3c5 a2b3c5 a1b4c5 a2b4c5"),
        ("n1,n1", "n1 n1"),
        ("[1-3]", "1 2 3"),
    ],
)
def test_names_come_in_slurms_order(nodelist: str, names: str) -> None:
    assert expand(nodelist) == tuple(names.split())


@pytest.mark.parametrize(
    ("nodelist", "why"),
    [
        ("", "it is empty"),
        ("n[1", "unbalanced '[' at character 2"),
        ("n1]", "']'"),
        ("n[[1]]", "unbalanced '['"),
        ("a,,b", "nothing before the comma at character 3"),
        (",a", "nothing before the comma at character 1"),
        ("a,", "it ends with a comma"),
        ("n[]", "'' is not a number or a range"),
        ("n[1-]", "'1-' is not a number"),
        ("n[-1]", "'-1' is not a number"),
        ("n[a]", "'a' is not a number"),
        ("n[1, 2]", "' 2' is not a number"),
        ("n[3-1]", "the range 3-1 runs backwards"),
        ("n[1-70000]", "more than 65536 names"),
        ("n[1-60000],m[1-60000]", "more than 65536 names"),
        ("n[1-60000]m[1-60000]", "more than 65536 names"),
        ("n 1", "a character that no node name has"),
        ("n[²]", "'²' is not a number"),
    ],
)
def test_bad_lists_say_what_is_wrong_and_where(nodelist: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(nodelist)
    assert why in caught.value.message
    assert "scontrol show hostnames" in caught.value.hint


names = st.from_regex(r"[a-z][a-z-]{0,3}[0-9]{0,4}([a-z.][0-9]{0,2})?", fullmatch=True)


@given(st.text(alphabet="n1[]-,0 x", max_size=14))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        names = expand(text)
    except UsageError:
        return
    assert expand(",".join(names)) == names


numbers = st.builds(lambda value, width: str(value).zfill(width), st.integers(0, 1200), st.integers(1, 4))


@st.composite
def ranges(draw: st.DrawFn) -> str:
    low = draw(numbers)
    if draw(st.booleans()):
        return low
    high = int(low) + draw(st.integers(0, 12))
    return f"{low}-{str(high).zfill(draw(st.integers(1, 4)))}"


groups = st.lists(ranges(), min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
words = st.from_regex(r"[a-z]{1,3}", fullmatch=True)
items = st.one_of(
    names,
    # Slurm rejects text behind the last bracket; that the own parser takes it is tested above.
    st.lists(st.tuples(words, groups).map("".join), min_size=1, max_size=3).map("".join),
)
nodelists = st.lists(items, min_size=1, max_size=4).map(",".join)


@pytest.fixture(scope="module")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scontrol show hostnames` asks no daemon, yet wants a configuration."""
    path = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    path.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    return path


@pytest.mark.slurm
@sampled(150)
@given(nodelist=nodelists)
def test_expands_as_the_real_scontrol_does(slurm_conf: Path, nodelist: str) -> None:
    shown = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist],
        env={"PATH": os.environ["PATH"], "SLURM_CONF": str(slurm_conf)},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert expand(nodelist) == tuple(shown.stdout.split())
