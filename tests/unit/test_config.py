from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hpcft.config import Config, ConfigError, load
from hpcft.config.checking import sections_of
from hpcft.config.reference import markdown
from hpcft.errors import ExitCode, UsageError
from hpcft.units import Auto, EverySeconds, EverySteps, Never

REPOSITORY = Path(__file__).parents[2]
MINIMAL = '[run]\nname = "r"\n[job]\nmodule = "m"\n'


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to write a configuration into, in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("job.toml")
    path.write_text(MINIMAL)
    return path


def mistakes(path: Path | None, *sets: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(path, sets=sets, environ=environ)
    return [str(mistake) for mistake in raised.value.mistakes]


# --- values ----------------------------------------------------------------------------------------------------


def test_defaults(written: Path, tmp_path: Path) -> None:
    config = load(written)
    assert config.run.root == tmp_path / "runs"
    assert config.heartbeat.interval == 0.5
    assert config.checkpoint.every == EverySteps(200)
    assert config.logs.max_size == 16 * 2**20
    assert config.recovery.window == 3600
    assert config.job.args == config.job.preload == ()
    assert config.train == {}


def test_a_file_sets_values(written: Path) -> None:
    written.write_text(
        MINIMAL + 'args = ["--fast"]\npreload = ["torchvision", "a.b"]\n'
        '[heartbeat]\ninterval = "100ms"\n[checkpoint]\nevery = "60s"\n'
        '[logs]\nmax_size = "1MiB"\n[train]\nlr = 3e-3\nsteps = 5\nbetas = [0.9, 0.95]\nname = "x"\nflag = true\n'
    )
    config = load(written)
    assert config.job.args == ("--fast",)
    assert config.job.preload == ("torchvision", "a.b")
    assert config.heartbeat.interval == 0.1
    assert config.checkpoint.every == EverySeconds(60)
    assert config.logs.max_size == 2**20
    assert config.train == {"lr": 3e-3, "steps": 5, "betas": [0.9, 0.95], "name": "x", "flag": True}
    assert type(config.train["steps"]) is int


def test_the_model_is_frozen(written: Path) -> None:
    config = load(written)
    with pytest.raises(ValidationError, match="frozen"):
        config.nodes.min = 5  # type: ignore[misc]


def test_without_a_file() -> None:
    config = load(None, sets=["run.name=r", "job.module=m"])
    assert (config.run.name, config.job.module) == ("r", "m")
    assert mistakes(None) == [
        "configuration: run.name: is required",
        "configuration: job: needs exactly one of module, script, command; it has none",
    ]


# --- overrides -------------------------------------------------------------------------------------------------


def test_precedence_is_file_then_variable_then_set(written: Path) -> None:
    written.write_text(MINIMAL + "[nodes]\nmin = 2\nmultiple_of = 2\nworkers_per_node = 2\n")
    environ = {"HPCFT_NODES__MIN": "3", "HPCFT_NODES__MULTIPLE_OF": "3"}
    nodes = load(written, sets=["nodes.min=4"], environ=environ).nodes
    assert (nodes.workers_per_node, nodes.multiple_of, nodes.min) == (2, 3, 4)


def test_the_last_set_wins(written: Path) -> None:
    assert load(written, sets=["nodes.min=4", "nodes.min=5"]).nodes.min == 5


@pytest.mark.parametrize(
    ("item", "section", "key", "value"),
    [
        ("run.name=2024", "run", "name", "2024"),
        ("run.name=2024-01-01", "run", "name", "2024-01-01"),
        ("run.name=true", "run", "name", "true"),
        ('run.name="quoted"', "run", "name", "quoted"),
        ("run.seed = 7", "run", "seed", 7),
        ("checkpoint.every=auto", "checkpoint", "every", Auto()),
        ("checkpoint.every=60s", "checkpoint", "every", EverySeconds(60)),
        ("checkpoint.every=50 steps", "checkpoint", "every", EverySteps(50)),
        ("checkpoint.every=off", "checkpoint", "every", Never()),
        ('job.args=["a", "b=c"]', "job", "args", ("a", "b=c")),
        ("data.ledger=true", "data", "ledger", True),
    ],
)
def test_override_values_are_read_as_their_key_wants_them(
    written: Path, item: str, section: str, key: str, value: object
) -> None:
    assert getattr(getattr(load(written, sets=[item]), section), key) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("1e-3", 1e-3), ("true", True), ("adam", "adam"), ('"7"', "7"), ("[1, 2]", [1, 2]), ("", ""),
        ("a = b", "a = b"), ("1\nb = 2", "1\nb = 2"),
    ],
)  # fmt: skip
def test_train_overrides_are_toml_or_text(written: Path, text: str, value: object) -> None:
    assert load(written, sets=[f"train.key={text}"]).train["key"] == value
    assert load(written, environ={"HPCFT_TRAIN__KEY": text}).train["key"] == value


def test_variables_without_two_underscores_are_for_other_purposes(written: Path) -> None:
    environ = {"HPCFT_WORKER_SPEC": "{}", "HPCFT_": "", "OTHER_NODES__MIN": "x", "hpcft_nodes__min": "x"}
    assert load(written, environ=environ) == load(written)


def test_a_variable_with_one_underscore_too_few_is_no_other_purpose(written: Path) -> None:
    assert load(written, environ={"HPCFT_LOCAL_NODES": "node1,node2"}) == load(written)
    with pytest.raises(ConfigError) as caught:
        load(written, environ={"HPCFT_NODES_MIN": "7"})
    assert "HPCFT_NODES_MIN: two underscores separate the section from the key" in str(caught.value)
    assert "did you mean HPCFT_NODES__MIN?" in str(caught.value)


def test_an_override_of_the_program_replaces_that_of_the_file(written: Path) -> None:
    job = load(written, sets=["job.script=train.py"]).job
    assert (job.module, job.script) == (None, Path.cwd() / "train.py")
    job = load(written, sets=["job.module=b"], environ={"HPCFT_JOB__COMMAND": '["true"]'}).job
    assert (job.module, job.command) == ("b", None)
    assert mistakes(written, "job.script=train.py", "job.module=b") == [
        "--set: job: needs exactly one of module, script, command; it has module and script"
    ]


# --- paths -----------------------------------------------------------------------------------------------------


def test_a_script_counts_from_the_file_if_it_is_there_else_from_the_current_directory(
    written: Path, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    elsewhere = tmp_path / "sub" / "job.toml"
    elsewhere.write_text('[run]\nname = "r"\nroot = "here"\n[job]\nscript = "train.py"\n')
    assert load(elsewhere).job.script == tmp_path / "train.py"
    (tmp_path / "sub" / "train.py").touch()
    assert load(elsewhere).job.script == tmp_path / "sub" / "train.py"
    assert load(elsewhere, sets=["job.script=train.py"]).job.script == tmp_path / "train.py"
    assert load(elsewhere).run.root == tmp_path / "here"


def test_home_is_expanded(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(written, sets=["run.root=~/runs", "job.script=~/train.py"])
    assert config.run.root == Path("/home/someone/runs")
    assert config.job.script == Path("/home/someone/train.py")


# --- mistakes --------------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_together(written: Path) -> None:
    written.write_text(
        'name = "x"\n'
        '[run]\nnam = "a"\nseed = -1\n'
        '[job]\nmodul = "x"\nargs = ["a", 3]\n'
        "[node]\nmin = 2\n"
        '[nodes]\ninterval = "1s"\nmin = 0\nmultiple_of = "x"\n'
        "[heartbeat]\ntimeout = 5\n"
        '[checkpoint]\nevery = "sometimes"\nzzz = 1\n'
        '[recovery]\nbackoff = "5m"\n'
        "[train]\nnested = {b = 1}\nday = 2020-01-01\nlist = [1, nan]\nbig = 9223372036854775808\n"
    )
    with pytest.raises(ConfigError) as raised:
        load(
            written,
            sets=["nodes=2", "checkpoint.kep=2", "foo.bar=1"],
            environ={"HPCFT_DATA__WORKERS": "two", "HPCFT_NODES__MINN": "3"},
        )
    assert raised.value.exit_code is ExitCode.USAGE
    assert isinstance(raised.value, UsageError)
    assert str(raised.value).splitlines() == [
        "22 mistakes in the configuration:",
        "  --set: 'nodes=2' is not of the form section.key=value",
        "  job.toml: name: unknown key: every key stands in a section; did you mean run.name?",
        "  job.toml: run.nam: unknown key; did you mean run.name?",
        "  job.toml: job.modul: unknown key; did you mean job.module?",
        "  job.toml: node: unknown section; did you mean nodes?",
        "  job.toml: nodes.interval: unknown key; did you mean heartbeat.interval?",
        "  HPCFT_NODES__MINN: nodes.minn: unknown key; did you mean nodes.min?",
        "  job.toml: checkpoint.zzz: unknown key; [checkpoint] has every, every_min, every_max, mtbf, "
        "snapshot_every, compare_every, neighbour, mode, busy, slots, memory, low_memory, max_bandwidth, keep, "
        "keep_every, keep_best, best_metric, best_mode, verify",
        "  --set: checkpoint.kep: unknown key; did you mean checkpoint.keep?",
        "  --set: foo: unknown section; there are run, job, nodes, heartbeat, checkpoint, mirror, data, recovery,"
        " slurm, logs, local, drill, train",
        "  job.toml: run.seed: must be at least 0, not -1",
        "  job.toml: job.args[1]: must be text in quotes, not 3",
        "  job.toml: nodes.min: must be at least 1, not 0",
        "  job.toml: nodes.multiple_of: must be a whole number, not 'x'",
        "  job.toml: heartbeat.timeout: 5 has no unit; write '5s' or '5ms', say",
        "  job.toml: checkpoint.every: 'sometimes' does not say how often; write '200 steps', '60s', 'auto' or 'off'",
        "  HPCFT_DATA__WORKERS: data.workers: must be a whole number, not 'two'",
        "  job.toml: recovery.backoff_max: must not be below recovery.backoff (5m), the first pause; it is 1m",
        "  job.toml: train.nested: a table within [train] is not supported; use a key such as optimizer_lr",
        "  job.toml: train.day: 2020-01-01 is neither a number, text, true or false, nor a list of them",
        "  job.toml: train.list: nan cannot be stored as JSON; write it as text",
        "  job.toml: train.big: 9223372036854775808 does not fit into 64 bits; write it as text",
        "  hint: docs/configuration.md describes every key",
    ]


def test_a_single_mistake_is_one_line(written: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(written, sets=["nodes.min=0"])
    assert raised.value.message == "--set: nodes.min: must be at least 1, not 0"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("heartbeat.suspect=5 sekunden",
         "heartbeat.suspect: '5 sekunden' is not a duration; write a number and a unit, such as '30s'"),
        ("heartbeat.interval=0s", "heartbeat.interval: must be more than 0, not '0s'"),
        ("heartbeat.interval=1.5s", "heartbeat.suspect: must be at least twice heartbeat.interval (1.5s), or a "
         "single late heartbeat makes a node suspect; it is 2s"),
        ("heartbeat.suspect=5s", "heartbeat.timeout: must be longer than heartbeat.suspect (5s), or a node is "
         "evicted as soon as it is suspect; it is 5s"),
        ("checkpoint.every_max=20s",
         "checkpoint.every_max: must not be below checkpoint.every_min (30s); it is 20s"),
        ("checkpoint.keep_best=2", "checkpoint.best_metric: is needed by checkpoint.keep_best: the name under which "
         "the program reports the number"),
        ("checkpoint.best_metric=val-loss",
         "checkpoint.best_metric: 'val-loss' cannot be reported: `run.report` takes names such as val_loss"),
        ("checkpoint.best_mode=lowest", 'checkpoint.best_mode: Input should be \'min\' or \'max\'; it is \'lowest\''),
        ("slurm.end_lead=soon",
         "slurm.end_lead: 'soon' is not a duration; write a number and a unit, such as '30s', or 'auto'"),
        ("slurm.end_lead=0s", "slurm.end_lead: must be more than 0, or 'auto'"),
        ('job.preload=["a", "b/c.py"]',
         "job.preload[1]: 'b/c.py' is not the dotted name of a module, such as 'mypackage.train'"),
        ("logs.max_size=10B", "logs.max_size: must be at least 1024, not '10B'"),
        ("run.seed=4294967296", "run.seed: must be at most 4294967295, not 4294967296"),
        ("run.name=..", "run.name: '..' cannot name a directory of its own: use 1 to 64 of the characters "
         "A-Z a-z 0-9 . _ -, the first one a letter, a digit or _"),
        ("run.name=a/b", "run.name: 'a/b' cannot name a directory of its own: use 1 to 64 of the characters "
         "A-Z a-z 0-9 . _ -, the first one a letter, a digit or _"),
        ("job.module=train.py", "job.module: 'train.py' is a file; give it as job.script"),
        ("job.module=a..b", "job.module: 'a..b' is not the dotted name of a module, such as 'mypackage.train'"),
        ("job.command=[]", 'job.command: must name a program, such as ["python", "train.py"]'),
        ("job.command=python train.py", 'job.command: must be a list of text, such as ["a", "b"], not '
         "'python train.py'"),
        ("data.ledger=yes", "data.ledger: must be true or false, not 'yes'"),
        ("data.ledger=1", "data.ledger: must be true or false, not 1"),
        ("nodes.min=true", "nodes.min: must be a whole number, not true"),
        ("nodes.min=1.0", "nodes.min: must be a whole number, not 1.0"),
        ("nodes.min=[1]", "nodes.min: must be a whole number, not [1]"),
    ],
)  # fmt: skip
def test_each_mistake_says_why(written: Path, item: str, message: str) -> None:
    assert mistakes(written, item) == [f"--set: {message}"]


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a b", "ü", "a" * 65, "a\n"])
def test_names_that_are_refused(written: Path, name: str) -> None:
    written.write_text(MINIMAL.replace('"r"', json.dumps(name)))
    assert len(mistakes(written)) == 1


def test_contradictions_are_reported_together_and_blame_whoever_set_them(written: Path) -> None:
    written.write_text(MINIMAL + '[heartbeat]\ntimeout = "1s"\n')
    found = mistakes(written, "heartbeat.suspect=4s", HPCFT_HEARTBEAT__INTERVAL="3s")
    assert [line.partition(", or")[0] for line in found] == [
        "--set: heartbeat.suspect: must be at least twice heartbeat.interval (3s)",
        "job.toml: heartbeat.timeout: must be longer than heartbeat.suspect (4s)",
    ]


def test_a_section_that_is_not_one(written: Path) -> None:
    written.write_text('nodes = 4\n[[data]]\nworkers = 1\n[run]\nname = "r"\n[job]\nmodule = "m"\n')
    assert mistakes(written, "nodes.min=2") == [
        "job.toml: nodes: must be a section with its keys below it, not 4",
        "job.toml: data: must be a section with its keys below it, not [{'workers': 1}]",
    ]


def test_a_misspelled_section_is_not_also_missing(written: Path) -> None:
    written.write_text('[runs]\nname = "r"\n[jobs]\nmodule = "m"\n')
    assert mistakes(written) == [
        "job.toml: runs: unknown section; did you mean run?",
        "job.toml: jobs: unknown section; did you mean job?",
    ]


def test_a_syntax_error_names_file_and_line(written: Path) -> None:
    written.write_text("[run]\nname = unquoted\n")
    assert mistakes(written, "nodes.minn=1", "x") == [
        "job.toml:2: is not valid TOML: Invalid value (column 8)",
        "--set: 'x' is not of the form section.key=value",
        "--set: nodes.minn: unknown key; did you mean nodes.min?",
    ]
    written.write_bytes(b"[run]\nname = '\xff'\n")
    assert mistakes(written) == ["job.toml:2: is not UTF-8 text"]


def test_a_missing_file_is_said_to_be_missing(written: Path) -> None:
    assert mistakes(Path("jbo.toml")) == ["jbo.toml: there is no such file; did you mean job.toml?"]
    assert mistakes(Path("nowhere/at/all.toml")) == ["nowhere/at/all.toml: there is no such file"]
    Path("directory").mkdir()
    assert mistakes(Path("directory")) == ["directory: cannot be read: Is a directory"]


# --- the stored configuration ----------------------------------------------------------------------------------

SCALARS = (
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)


@given(
    train=st.dictionaries(st.text(min_size=1), SCALARS | st.lists(SCALARS, max_size=3), max_size=4),
    seconds=st.floats(min_value=1e-6, max_value=1e6),
    size=st.integers(1024, 2**50),
    every=st.sampled_from(["off", "7 steps", "1.5s"]),
)
def test_storing_loses_nothing(train: dict[str, object], seconds: float, size: int, every: str) -> None:
    config = Config.model_validate(
        {
            "run": {"name": "r", "root": "/runs"},
            "job": {"command": ["python", "x"], "args": ["ü"]},
            "recovery": {"grace": f"{seconds:.9f}s"},
            "logs": {"max_size": f"{size}B"},
            "checkpoint": {"every": every},
            "train": train,
        }
    )
    stored = config.to_json()
    assert Config.from_json(stored) == config
    assert Config.from_json(stored).to_json() == stored


def test_the_stored_configuration_is_for_people_too(written: Path) -> None:
    tree = json.loads(load(written, sets=["checkpoint.every=60s"]).to_json())
    assert tree["checkpoint"]["every"] == "60s" or tree["checkpoint"]["every"] == "1m"
    assert tree["heartbeat"]["interval"] == "500ms"
    assert tree["logs"]["max_size"] == "16MiB"
    assert tree["job"] == {"module": "m", "args": [], "preload": []}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"{", "config.json: is not JSON: Expecting property name"),
        (b"\xff", "config.json: is not JSON: 'utf-8' codec can't decode"),
        (b"[]", "config.json: is not a JSON object"),
        (b"{}", "2 mistakes in the configuration:\n  config.json: run.name: is required"),
    ],
)
def test_a_damaged_stored_configuration_is_named(stored: bytes, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_json(stored)
    assert raised.value.message.startswith(message)


# --- the files that come with it -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo.toml", "train.toml"])
def test_shipped_files_load_and_show_every_key_in_order_with_a_comment(name: str) -> None:
    path = REPOSITORY / "configs" / name
    config = load(path)
    assert config.train
    lines = path.read_text().splitlines()
    shown: list[tuple[str, str]] = []
    section = ""
    for before, line in zip(["", *lines], lines, strict=False):
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif key := re.match(r"(?:# )?([a-z_]+) = ", line):
            assert before.startswith("# ") and " = " not in before, f"{section}.{key[1]} has no comment"
            shown.append((section, key[1]))
    free = [(section, key) for section, key in shown if section == "train"]
    keys = [(section, key) for section, keys in sections_of(Config).items() for key in keys or ()]
    assert shown == keys + free
    assert set(tomllib.loads(path.read_text())["train"]) == {key for _, key in free}


@pytest.mark.parametrize("name", ["demo.toml", "train.toml"])
def test_the_defaults_in_the_comments_are_those_of_the_model(name: str) -> None:
    """`Default X.` above a key, read as the value of that key, changes nothing in a minimal configuration."""
    comment, section = "", ""
    plain = load(None, sets=["run.name=r", "job.module=m"])
    checked = 0
    for line in (REPOSITORY / "configs" / name).read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section, comment = header[1], ""
        elif (key := re.match(r"([a-z_]+) = ", line)) and section != "train":
            if default := re.search(r"Default (.*)\.$", comment):
                assert load(None, sets=["run.name=r", "job.module=m", f"{section}.{key[1]}={default[1]}"]) == plain
                checked += 1
            comment = ""
        else:
            comment = " ".join([comment, line.removeprefix("#").strip()])
    required = 2  # run.name and job.module
    commented_out = 5  # job.script, job.command, checkpoint.memory, .max_bandwidth and .best_metric
    assert checked == sum(len(keys or ()) for keys in sections_of(Config).values()) - required - commented_out


def test_the_committed_reference_is_the_printed_one() -> None:
    committed = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert committed == markdown(), "run: python -m hpcft.config > docs/configuration.md"
    done = subprocess.run(
        [sys.executable, "-m", "hpcft.config"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == committed


def test_every_key_is_described() -> None:
    for section, keys in sections_of(Config).items():
        for key, field in (keys or {}).items():
            assert field.description, f"{section}.{key}"
            assert field.description.endswith("."), f"{section}.{key}"


def test_import_is_light() -> None:
    code = "import sys, hpcft.config; print({'torch', 'numpy', 'asyncio', 'orjson'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
