"""The commands `hpcft ckpt …`: they wire, and never compute. As cheap to import as `cli`, which see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcft.errors import ExitCode, NotFoundError, UsageError
from hpcft.options import (
    Commands,
    complete_run,
    find,
    json_option,
    meter,
    print_json,
    root_option,
    run_argument,
    with_options,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from hpcft.checkpoint.layout import CheckpointEntry
    from hpcft.ids import RunId


@click.group("ckpt", cls=Commands)
def ckpt_group() -> None:
    """Checkpoints of a run.

    CHECKPOINT is a step, the name of a checkpoint (step-00001200-g0007), the directory of one, or `latest`, the one
    committed last. Of a step that two branches have passed, the newer one's is meant.
    """


# --- which checkpoint ------------------------------------------------------------------------------------------

_LATEST = "latest"


def _complete_checkpoint(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from hpcft.checkpoint.read import entries
    from hpcft.errors import HpcftError

    try:
        found = entries(find(ctx.params.get("root") or Path("runs"), ctx.params.get("run")).checkpoints)
    except (HpcftError, OSError):
        return []
    words = {_LATEST: None} if found else {}
    words |= {str(each.step): None for each in reversed(found)} | {each.name: None for each in reversed(found)}
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


_checkpoint_argument = click.argument("checkpoint", shell_complete=_complete_checkpoint)
_run_option = click.option(
    "--run",
    metavar="RUN",
    shell_complete=complete_run,
    help="The run that is meant; default: the one that is live, else the newest.",
)
_only_option = click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Only this part of the state, by its name in run.restore; may be repeated.",
)


def _chosen(word: str, root: Path, run: str | None) -> tuple[CheckpointEntry, RunId | None]:
    """The checkpoint, and of which run it has to be."""
    from hpcft.checkpoint.layout import CheckpointEntry, parse_name
    from hpcft.checkpoint.read import entries, of_step
    from hpcft.ids import Step

    if word != _LATEST and not word.isdecimal() and parse_name(word) is None:
        path = Path(word)
        parsed = parse_name(path.resolve().name)
        if parsed is None or not path.is_dir():
            raise NotFoundError(
                f"{word!r} is no checkpoint",
                "name a step, a checkpoint (step-00001200-g0007), its directory, or `latest`; a run is named by --run",
            )
        return CheckpointEntry(*parsed, path.resolve()), None
    found = find(root, run)
    if word.isdecimal():
        try:
            step = Step(int(word))
        except ValueError as error:  # thousands of digits: Python refuses to convert them
            raise NotFoundError(f"no step has a number of {len(word)} digits", "`hpcft ckpt ls` lists them") from error
        return of_step(found.checkpoints, step), found.run_id()
    named = [each for each in entries(found.checkpoints) if word in (each.name, _LATEST)]
    if not named:
        which = "yet" if word == _LATEST else word
        raise NotFoundError(f"{found.name} has no checkpoint {which}", "`hpcft ckpt ls` lists them")
    return named[-1], found.run_id()


# --- looking ---------------------------------------------------------------------------------------------------


@ckpt_group.command("ls")
@with_options(run_argument, root_option, json_option)
def ls_command(run: str | None, root: Path, as_json: bool) -> int:
    """List them, the newest first."""
    from hpcft import reports

    listing = reports.list_checkpoints(find(root, run))
    print_json(listing.as_dict()) if as_json else click.echo(listing.text())
    return ExitCode.OK


@ckpt_group.command("show")
@with_options(_checkpoint_argument, _run_option, root_option, json_option)
@click.option("--tensors", is_flag=True, help="List every tensor.")
def show_command(checkpoint: str, run: str | None, root: Path, as_json: bool, tensors: bool) -> int:
    """Say what is in one.

    When and by whom it was written, its parts with their sizes, versions, data position. Nothing but the index is read.
    """
    from hpcft import reports

    entry, identity = _chosen(checkpoint, root, run)
    details = reports.describe(entry.directory, identity)
    print_json(details.as_dict()) if as_json else click.echo(details.text(tensors))
    return ExitCode.OK


@ckpt_group.command("verify")
@click.argument("checkpoint", required=False, shell_complete=_complete_checkpoint)
@with_options(_run_option, root_option, json_option)
def verify_command(checkpoint: str | None, run: str | None, root: Path, as_json: bool) -> int:
    """Read every byte and compare digests, of one checkpoint or of all that the run has.

    Exit code 16: something is damaged; the file, the place and the tensors are named. Exit code 14: something could
    not be read, and nothing else is damaged.
    """
    from hpcft import reports

    with meter("verifying") as progress:
        if checkpoint is None:
            verification = reports.verify_run(find(root, run), progress)
        else:
            entry, identity = _chosen(checkpoint, root, run)
            verification = reports.verify_checkpoints((entry,), identity, progress)
    print_json(verification.as_dict()) if as_json else click.echo(verification.text())
    return verification.exit_code


@ckpt_group.command("diff")
@click.argument("a", shell_complete=_complete_checkpoint)
@click.argument("b", shell_complete=_complete_checkpoint)
@with_options(_only_option, _run_option, root_option, json_option)
def diff_command(a: str, b: str, only: tuple[str, ...], run: str | None, root: Path, as_json: bool) -> int:
    """Compare two checkpoints, also of two runs.

    Each tensor that differs, with the largest absolute difference, a changed shape or type, and what only one of the
    two has; then the values that are no tensors. NaN equals NaN; on how many ranks the state lay makes no difference.
    Exit code 17: they differ.
    """
    from hpcft.checkpoint.diff import compare

    (one, its_run), (other, others_run) = (_chosen(each, root, run) for each in (a, b))
    with meter("comparing") as progress:
        found = compare(one.directory, other.directory, only=only, runs=(its_run, others_run), progress=progress)
    print_json(found.as_dict()) if as_json else click.echo(found.text())
    return ExitCode.OK if found.equal else ExitCode.DIFFERENT


# --- keeping and deleting --------------------------------------------------------------------------------------


@ckpt_group.command("pin")
@with_options(_checkpoint_argument, _run_option, root_option, json_option)
def pin_command(checkpoint: str, run: str | None, root: Path, as_json: bool) -> int:
    """Never retire it.

    Neither the run itself nor `hpcft ckpt prune` deletes a checkpoint that is pinned.
    """
    from hpcft.checkpoint import marks

    entry, _ = _chosen(checkpoint, root, run)
    changed = marks.pin(entry)
    _say_pinned(entry, True, changed, as_json)
    return ExitCode.OK


@ckpt_group.command("unpin")
@with_options(_checkpoint_argument, _run_option, root_option, json_option)
def unpin_command(checkpoint: str, run: str | None, root: Path, as_json: bool) -> int:
    """Let it be retired again, when its turn comes."""
    from hpcft.checkpoint import marks

    entry, _ = _chosen(checkpoint, root, run)
    changed = marks.unpin(entry)
    _say_pinned(entry, False, changed, as_json)
    return ExitCode.OK


def _say_pinned(entry: CheckpointEntry, pinned: bool, changed: bool, as_json: bool) -> None:
    if as_json:
        print_json({"checkpoint": entry.name, "pinned": pinned, "changed": changed})
    else:
        state = "pinned" if pinned else "not pinned"
        click.echo(f"{entry.name} is {state}" if changed else f"{entry.name} is {state}, and was before")


@ckpt_group.command("prune")
@with_options(run_argument, root_option, json_option)
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Keep the newest N of the run's branch.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="And those of every N steps.")
@click.option("--trash", is_flag=True, help="Also what failed saves have left.")
@click.option("--quarantined", is_flag=True, help="Also what was set aside because it was damaged.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune_command(
    run: str | None,
    root: Path,
    as_json: bool,
    keep: int | None,
    keep_every: int | None,
    trash: bool,
    quarantined: bool,
    dry_run: bool,
    yes: bool,
) -> int:
    """Delete checkpoints that are no longer needed.

    May be used while the run trains. What is pinned, what the run would go on from, and what another command reads
    stays; so do branches that the run has left, until the one that took their place has N checkpoints.
    """
    from hpcft import prune

    if keep is None and not (trash or quarantined):
        raise UsageError(
            "it is not said what to delete",
            "--keep N deletes all but the newest N, --trash leftovers, --quarantined damaged ones that were set aside",
        )
    if keep is None and keep_every is not None:
        raise UsageError("--keep-every needs --keep", "--keep 1 --keep-every N keeps the newest and those of every N")
    found, rules = find(root, run), prune.Rules(keep, keep_every, trash, quarantined)
    plan = prune.plan(found, rules)
    if dry_run or plan.empty:
        print_json({"dry_run": dry_run, **plan.as_dict()}) if as_json else click.echo(plan.text())
        return ExitCode.OK
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nothing is deleted without being asked about", "--yes agrees, --dry-run only looks")
        click.echo(plan.text(), err=True)
        if not click.confirm("delete them?", err=True):
            print_json({"dry_run": True, **plan.as_dict()}) if as_json else click.echo("nothing was deleted")
            return ExitCode.OK
    with meter("deleting") as progress:
        done = prune.carry_out(found, plan, rules, progress)
    if as_json:
        print_json({"dry_run": False, **done.as_dict()})
    else:
        click.echo(done.text_of_done())
    return ExitCode.OK


# --- getting something out -------------------------------------------------------------------------------------


def _size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    from hpcft.units import parse_size

    if text is None:
        return None
    try:
        size = parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if size == 0:
        raise click.BadParameter("nothing fits into 0 bytes")
    return size


@ckpt_group.command("export")
@with_options(_checkpoint_argument)
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["torch", "dcp", "safetensors"]),
    required=True,
    help="torch: a file for torch.load; dcp: a directory for torch.distributed.checkpoint.load; "
    "safetensors: a file of tensors, or with --max-shard-size a directory.",
)
@with_options(_only_option)
@click.option(
    "--max-shard-size",
    "max_shard_bytes",
    metavar="SIZE",
    callback=_size,
    help="Several files of at most this size (5GiB), with an index; for safetensors.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export at TARGET.")
@with_options(_run_option, root_option, json_option)
def export_command(
    checkpoint: str,
    target: Path,
    to: str,
    only: tuple[str, ...],
    max_shard_bytes: int | None,
    force: bool,
    run: str | None,
    root: Path,
    as_json: bool,
) -> int:
    """Write one for other programs.

    With one --only, what is written is that part itself, as in its own state dict; else parts keep their names. Every
    byte is verified on the way: exit code 16 if one is damaged. TARGET is there complete or not at all.

    \b
        hpcft ckpt export 1200 model.safetensors --to safetensors --only model
    """
    from hpcft.checkpoint.export import Format, export

    entry, identity = _chosen(checkpoint, root, run)
    with meter("exporting") as progress:
        done = export(
            entry.directory,
            target.expanduser(),
            Format(to),
            only=only,
            max_shard_bytes=max_shard_bytes,
            force=force,
            run=identity,
            progress=progress,
        )
    print_json(done.as_dict()) if as_json else click.echo(done.text())
    return ExitCode.OK
