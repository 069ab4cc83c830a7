"""The command line: it wires, and never computes.

Every command imports what it needs when it runs, so that `import hpcft.cli` stays cheap: no torch, no pydantic, no
rich, no asyncio. `hpcft status` has to answer at once, on login nodes and from slow file systems.

`main` is the one way in. It turns whatever ends a command into an exit code of docs/exit-codes.md: errors meant for
users, and what the operating system refuses, become a message and a hint on stderr (one JSON object there under
`--json`); everything else is a defect and keeps its traceback. The commands and options are frozen in docs/cli.md, and
a test compares the two.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click

from hpcft import __version__
from hpcft.cli_bench import bench_group
from hpcft.cli_ckpt import ckpt_group
from hpcft.errors import ExitCode, HpcftError
from hpcft.options import (
    Commands,
    ReaderGone,
    config_argument,
    find,
    from_option,
    json_lines_option,
    json_option,
    load_config,
    meter,
    print_json,
    root_option,
    run_argument,
    set_option,
    with_options,
)

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
BROKEN_PIPE = 141
"""128 + SIGPIPE: whoever read our output has gone."""

_UNLIMITED = 10_000
"""Columns where no terminal cuts a line."""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="hpcft %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Keeps training jobs alive on Slurm clusters.

    A run is described by a configuration file (CONFIG, see docs/configuration.md) and keeps everything in its run
    directory. RUN is the name of a run, its directory, or its configuration file; without it, the run that is live
    is meant, else the newest.

    Exit codes: docs/exit-codes.md.
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False


# --- starting --------------------------------------------------------------------------------------------------


@cli.command("run")
@with_options(config_argument, set_option, from_option, json_option)
@click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="Virtual nodes; default: local.nodes of CONFIG.")
@click.option("--workers", type=click.IntRange(min=1), metavar="K", help="Workers on each; default: local.workers.")
def run_command(
    config: Path,
    sets: tuple[str, ...],
    from_step: int | None,
    as_json: bool,
    nodes: int | None,
    workers: int | None,
) -> int:
    """Train on this machine.

    Starts a local cluster, virtual nodes on loopback, and goes through the same code as under Slurm. With --json the
    progress goes to stderr, and at the end the status of the run to stdout.
    """
    from hpcft import status
    from hpcft.config import check_mirror, check_program, check_torch
    from hpcft.local import run_local
    from hpcft.rundir import RunDirectory

    loaded = load_config(config, sets)
    check_program(loaded)
    check_torch(loaded)
    check_mirror(loaded, os.environ)
    code = run_local(
        loaded,
        config,
        sets=sets,
        nodes=nodes or loaded.local.nodes,
        workers=workers or loaded.local.workers,
        from_step=from_step,
        report=lambda line: click.echo(line, err=as_json),
    )
    if as_json:
        print_json(status.read(RunDirectory(loaded.run.root / loaded.run.name)))
    return code


@cli.command("submit")
@with_options(config_argument, set_option, from_option, json_option)
@click.option("--dry-run", is_flag=True, help="Check all, print the exact command and script, submit nothing.")
@click.argument("sbatch_args", nargs=-1, type=click.UNPROCESSED)
def submit_command(
    config: Path,
    sets: tuple[str, ...],
    from_step: int | None,
    as_json: bool,
    dry_run: bool,
    sbatch_args: tuple[str, ...],
) -> int:
    """Submit to Slurm.

    Checks CONFIG and the training program first. What follows `--` goes to sbatch:

    \b
        hpcft submit train.toml -- --nodes 8 --time 12:00:00
    """
    from hpcft import submit

    job = submit.prepare(config, load_config(config, sets), sets=sets, from_step=from_step, sbatch_args=sbatch_args)
    if dry_run:
        print_json(job.as_dict()) if as_json else click.echo(job.text(), nl=False)
        return ExitCode.OK
    job_id = submit.send(job)
    if as_json:
        print_json({"job_id": job_id, **job.as_dict()})
    else:
        click.echo(f"job {job_id} submitted; run directory {job.run_directory}")
        click.echo(f"what it does: hpcft status {job.run_directory}")
    return ExitCode.OK


@cli.command("agent")
@with_options(config_argument, set_option, from_option)
def agent_command(config: Path, sets: tuple[str, ...], from_step: int | None) -> NoReturn:
    """The daemon of one node.

    Not for people: srun starts it on every node of the job.
    """
    from hpcft import keeper

    keeper.hold_signals()
    from hpcft import node

    node.keep(load_config(config, sets), from_step=from_step)


@cli.command("wait")
@with_options(config_argument, set_option, from_option)
@click.option(
    "--srun", type=int, metavar="PID", help="The step's srun: if it ends and no verdict follows, so does this."
)
def wait_command(config: Path, sets: tuple[str, ...], from_step: int | None, srun: int | None) -> int:
    """Wait for the job's verdict.

    Used by the batch script instead of waiting for srun; exits with the run's code. Takes what `hpcft agent` takes,
    so that the script can hand its arguments to both.
    """
    del from_step
    from hpcft import verdicts
    from hpcft.rundir import RunDirectory
    from hpcft.slurm.environment import from_environment

    section = load_config(config, sets).run
    run = RunDirectory((section.root / section.name).resolve())
    verdict = verdicts.wait(run, from_environment(os.environ).start, srun)
    click.echo(f"{verdict.outcome.value}: {verdict.reason}", err=True)
    return verdict.exit_code


# --- watching --------------------------------------------------------------------------------------------------


@cli.command("status")
@with_options(run_argument, root_option, json_option)
@click.option("--watch", is_flag=True, help="Once a second, until the run has ended or you press Ctrl-C.")
def status_command(run: str | None, root: Path, as_json: bool, watch: bool) -> int:
    """What is going on, in one screen.

    State, step, nodes and workers, checkpoints, incidents with their reasons, goodput, budget, time to go. The
    JSON follows docs/status.schema.json.
    """
    from hpcft import status

    found = find(root, run)
    while True:
        width = _width()
        snapshot = status.read(found)
        if as_json:
            click.echo(json.dumps(snapshot, ensure_ascii=False)) if watch else print_json(snapshot)
        else:
            if watch and sys.stdout.isatty():
                click.echo("\x1b[H\x1b[2J", nl=False)
            click.echo(status.render(snapshot, width))
        if not watch or snapshot.get("verdict") is not None:
            return ExitCode.OK
        time.sleep(1)


@cli.command("explain")
@with_options(run_argument, root_option, json_option)
@click.option("--last", type=click.IntRange(min=0), metavar="N", help="Only the last so many matters; default: all.")
def explain_command(run: str | None, root: Path, as_json: bool, last: int | None) -> int:
    """Why the run did what it did.

    Each matter that something was decided about, the newest last: what was seen, what was decided and why, from which
    state the run went on, and what it cost; then how often is saved, and by which numbers. It is read from the run's
    journal, also when nothing of the run lives any more. The JSON follows docs/explain.schema.json.
    """
    from hpcft import explanation

    history = explanation.read(find(root, run))
    if last is not None:
        history = history.last(last)
    print_json(history.as_dict()) if as_json else click.echo(history.text(_width()))
    return ExitCode.OK


@cli.command("logs")
@with_options(run_argument, root_option, json_lines_option)
@click.option("--rank", type=click.IntRange(min=0), metavar="R", help="Only this worker.")
@click.option("--node", metavar="NODE", help="Only this node.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.option(
    "--lines", "-n", type=click.IntRange(min=0), metavar="N", default=20, show_default=True, help="The last so many."
)
def logs_command(
    run: str | None, root: Path, as_json: bool, rank: int | None, node: str | None, follow: bool, lines: int
) -> int:
    """What workers and agents have written.

    Without --rank: the agents, and the workers of the newest generation. With it: that rank over all generations.
    """
    from hpcft import logview

    written = False
    for line in logview.read(find(root, run), rank=rank, node=node, lines=lines, follow=follow):
        written = True
        click.echo(json.dumps(line.as_dict(), ensure_ascii=False) if as_json else line.text())
    if rank is not None and lines and not written:
        click.echo(f"rank {rank} has written nothing", err=True)
    return ExitCode.OK


@cli.command("ledger")
@with_options(run_argument, root_option, json_option)
def ledger_command(run: str | None, root: Path, as_json: bool) -> int:
    """Which samples were used, and how often.

    Per epoch: how many once, more than once, never. Needs `data.ledger = true`.
    Exit code 16: not every sample that was reached was used exactly once, or the record has a gap.
    """
    from hpcft import reports
    from hpcft.data import account

    report = account.report(find(root, run).path)
    print_json(reports.ledger_as_dict(report)) if as_json else click.echo(reports.ledger_text(report))
    return ExitCode.OK if report.exact else ExitCode.DAMAGED


cli.add_command(ckpt_group)


@cli.group("mirror", cls=Commands)
def mirror_group() -> None:
    """Copies of a run's checkpoints in an object store (mirror.url)."""


@contextmanager
def _requests() -> Iterator[None]:
    """Around requests to a store, which may be under way when the command is interrupted (see `bucket`)."""
    try:
        yield
    except KeyboardInterrupt:
        from hpcft.lanes import end_process

        click.echo("interrupted", err=True)
        end_process(INTERRUPTED)


@mirror_group.command("ls")
@with_options(run_argument, root_option, json_option)
def mirror_ls_command(run: str | None, root: Path, as_json: bool) -> int:
    """List the copies, the newest first."""
    from hpcft.mirror import operate

    with _requests():
        copies = operate.list_copies(find(root, run))
    print_json([copy.as_dict() for copy in copies]) if as_json else click.echo(operate.listing(copies))
    return ExitCode.OK


_copy_step_option = click.option(
    "--step", type=click.IntRange(min=0), metavar="STEP", help="The checkpoint of this step; default: the newest."
)


@mirror_group.command("push")
@with_options(run_argument, root_option, json_option, _copy_step_option)
def mirror_push_command(run: str | None, root: Path, as_json: bool, step: int | None) -> int:
    """Copy a checkpoint now, and wait for it.

    A run that ends does not wait for its mirror: this brings its last checkpoint there.
    """
    from hpcft.mirror import operate

    with _requests(), meter("sending") as progress:
        pushed = operate.push(find(root, run), step, progress)
    print_json(pushed.as_dict()) if as_json else click.echo(pushed.text())
    return ExitCode.OK


@mirror_group.command("pull")
@with_options(run_argument, root_option, json_option, _copy_step_option)
def mirror_pull_command(run: str | None, root: Path, as_json: bool, step: int | None) -> int:
    """Bring a checkpoint back into the run directory.

    What is there already and sound stays; what is damaged there is set aside (.quarantine) for the copy. A run whose
    checkpoints are all gone does that by itself when it starts. A checkpoint of another branch is gone on from by
    --from STEP.
    """
    from hpcft.mirror import operate

    with _requests(), meter("fetching") as progress:
        pulled = operate.pull(find(root, run), step, progress)
    if as_json:
        print_json({"restored": pulled.checkpoint, "fetched": pulled.fetched})
    else:
        click.echo(f"{pulled.checkpoint} is {'back' if pulled.fetched else 'there already, and sound'}")
    return ExitCode.OK


@cli.command("stop")
@with_options(run_argument, root_option, json_option)
def stop_command(run: str | None, root: Path, as_json: bool) -> int:
    """Ask a live run to save and end."""
    from hpcft import operators

    answer = operators.stop(find(root, run))
    print_json({"answer": answer}) if as_json else click.echo(answer)
    return ExitCode.OK


def _width() -> int:
    """Columns of the terminal, if it is one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED


# --- the surroundings ------------------------------------------------------------------------------------------


@cli.command("doctor")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@with_options(set_option, json_option)
def doctor_command(config: Path | None, sets: tuple[str, ...], as_json: bool) -> int:
    """Find now what would fail later.

    Versions, Slurm's settings, the file system of the run directory, memory, network, GPUs; each line says what to
    do. Exit code 14: something would fail.
    """
    from hpcft import doctor

    loaded = load_config(config, sets) if config is not None else None
    findings = []
    for finding in doctor.examine(loaded):
        findings.append(finding)
        if not as_json:
            colour = {"ok": "green", "warn": "yellow", "fail": "red"}[finding.grade]
            click.echo(f"{click.style(f'{finding.grade:4}', fg=colour)}  {finding.text()}")
    if as_json:
        print_json(doctor.as_dict(findings))
    return doctor.exit_code(findings)


cli.add_command(bench_group)


@cli.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> int:
    """Print a shell completion script.

    For bash: eval "$(hpcft completion bash)"
    """
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(cli, {}, "hpcft", "_HPCFT_COMPLETE").source())
    return ExitCode.OK


# --- the way in ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the console script exits with it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # `>&-`
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the end
    try:
        result = cli.main(given, prog_name="hpcft", standalone_mode=False)
        sys.stdout.flush()
    except (ReaderGone, BrokenPipeError):
        # The interpreter flushes stdout once more when it ends, and would complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except click.exceptions.NoArgsIsHelpError as asked:
        click.echo(asked.format_message(), err=True)
        return ExitCode.USAGE
    except click.ClickException as error:
        said = error.format_message()
        if isinstance(error, click.MissingParameter):
            said = " ".join(said.split())  # click lists the choices on lines of their own
        return _complain(said, _usage_hint(error), ExitCode.USAGE, given)
    except HpcftError as error:
        return _complain(error.message, error.hint, error.exit_code, given)
    except OSError as error:
        named = f"{os.fsdecode(error.filename)} cannot be used: " if isinstance(error.filename, str | bytes) else ""
        hint = "check its owner and permissions, and the file system it is on" if named else ""
        return _complain(f"{named}{error.strerror or error}", hint, ExitCode.UNUSABLE, given)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    return int(result or 0)


def _usage_hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None and context.command.name == "submit" and isinstance(error, click.NoSuchOption):
        return "sbatch's own options come after --, as in: hpcft submit train.toml -- --nodes 8"
    return f"{context.command_path} --help" if context is not None else "hpcft --help"


def _complain(message: str, hint: str, code: ExitCode, given: list[str]) -> int:
    own = given[: given.index("--")] if "--" in given else given
    if "--json" in own:
        error = {"error": {"message": message, "hint": hint, "code": int(code), "kind": code.name.lower()}}
        click.echo(json.dumps(error, ensure_ascii=False), err=True)
        return code
    plain = False if os.environ.get("NO_COLOR") else None
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True, color=plain)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {hint}", err=True, color=plain)
    return code


if __name__ == "__main__":
    sys.exit(main())
