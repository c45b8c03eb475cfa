"""`python -m verify audit | drift | quality | bench | judge | faults`: what stands beside the gate itself."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from glm_dsa.console import show
from glm_dsa.errors import printable
from glm_dsa.planning import recipe

from . import faults
from .audit import audit
from .commands import bench as bench_command
from .commands import drift as drift_command
from .commands import quality as quality_command
from .core import exits, interrupts
from .engines import headers, oracles

RANDOM = 10  # sound checkpoints beside the faults; the kept record has more
EPILOG = f"""\
exit status, of every command and of pytest verify/: {exits.AGREES} agrees (or done), {exits.FAULT} FAULT, \
{exits.UNREADABLE} an input that cannot be read, or a bad option,
{exits.NOT_JUDGED} not judged: an oracle failed, or the references disagree. Any other: no verdict."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m verify", description="Beside the gate itself, which is pytest verify/.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    auditing = commands.add_parser("audit", help="config against tensors, precision, sizes: headers only, in seconds")
    auditing.add_argument(
        "release", metavar="DIR_OR_REPO", help="a checkpoint's folder, or a repository's name on the hub"
    )
    auditing.add_argument("--recipe", metavar="R", help="a build is to follow it: a .toml, or the name of a kept one")
    auditing.add_argument(
        "--policy",
        choices=audit.POLICIES,
        default="usual",
        help="strict: few bits in an indexer, router or embedding are a FAULT, not a warning",
    )
    auditing.add_argument("--json", action="store_true", help="for machines")
    drift_command.add(commands)
    quality_command.add(commands)
    bench_command.add(commands)
    judging = commands.add_parser(
        "judge",
        help="every fault of the catalogue against the gate, and against the rules that others release by (12 minutes)",
    )
    judging.add_argument("--faults", metavar="NAMES", help="these only, separated by commas")
    judging.add_argument("--random", metavar="N", type=int, help=f"sound checkpoints besides (default {RANDOM})")
    judging.add_argument(
        "--in-order",
        action="store_true",
        help="all tests in the gate's order, not the claim that is to notice first (longer)",
    )
    judging.add_argument(
        "--kept", action="store_true", help="run nothing: the table of the run that this version was judged by"
    )
    judging.add_argument(
        "--changed",
        action="store_true",
        help="what a change may have made untrue of the kept record: rows whose edits, modules or claim are others; sentinels",
    )
    judging.add_argument(
        "--release", action="store_true", help="with --kept: refuse a record whose full run was of another core"
    )
    judging.add_argument("--json", metavar="FILE", help="write the whole record there")
    judging.add_argument(
        "--keep",
        action="store_true",
        help="make it the record that is kept, verify/records/judged.jsonl (run make docs then); with --changed, the rows "
        "that were judged",
    )
    judging.add_argument("--processes", type=int, default=2, help="with --changed: at once (default 2)")
    listing = commands.add_parser("faults", help="the catalogue: what pytest verify/ --fault NAME seeds")
    listing.add_argument("name", nargs="?", help="one of them, with the change that it makes")
    chosen = parser.parse_args(arguments)
    commands_by_name = {
        "audit": _audit, "drift": drift_command.run, "quality": quality_command.run, "bench": bench_command.run,
        "judge": _judge, "faults": _faults,
    }  # fmt: skip
    with interrupts.noted() as came:
        try:
            status: int = commands_by_name[chosen.command](chosen)
        except KeyboardInterrupt:
            return exits.INTERRUPTED
        except Exception as error:
            status = exits.INTERRUPTED if came else _ended(error)
    return exits.INTERRUPTED if came else status


def _ended(error: Exception) -> int:
    """One line on the error stream, and the status that it stands for. A traceback only where this code broke."""
    if isinstance(error, exits.NotJudged) or oracles.is_others(error):
        status, line = exits.NOT_JUDGED, f"not judged: {oracles.blame(error)}"
    elif isinstance(error, (ValueError, LookupError, OSError)):  # GlmDsaError too: raised for the user to read
        status, line = exits.UNREADABLE, " ".join(str(error).split())
    else:
        traceback.print_exception(error)
        status, line = exits.NOT_JUDGED, f"not judged: {oracles.blame(error)}"
    print(f"verify: {printable(line)}", file=sys.stderr)
    return status


def _faults(chosen: argparse.Namespace) -> int:
    print(faults.listed() if chosen.name is None else faults.described(chosen.name))
    return exits.AGREES


def _judge(chosen: argparse.Namespace) -> int:
    oracles.check()
    from .selftest import command as judge_command
    from .selftest import scorecard

    names = faults.chosen(chosen.faults)
    random = RANDOM if chosen.random is None else chosen.random
    if random < 1:
        raise ValueError(f"--random {random}: expected 1 or more")
    if chosen.changed and (chosen.kept or chosen.in_order or chosen.faults or chosen.random):
        raise ValueError("--changed chooses what it judges: nothing but --keep, --json and --processes goes with it")
    if chosen.release and not chosen.kept:
        raise ValueError("--release is asked of the kept record: add --kept")
    if chosen.kept and (chosen.keep or chosen.in_order or chosen.faults or chosen.random):
        raise ValueError("--kept runs nothing: nothing but --json and --release goes with it")
    if chosen.keep and len(names) < len(faults.CATALOGUE):
        raise ValueError("--keep keeps a record of all faults: no --faults beside it")
    if chosen.json and (Path(chosen.json).is_dir() or not Path(chosen.json).absolute().parent.is_dir()):
        raise ValueError(f"--json {chosen.json}: expected a file in a folder that is there")
    differs: list[str] = []
    if chosen.kept:
        judged = scorecard.Judged.read()
    elif chosen.changed:
        judged, differs = judge_command.judge_changed(chosen.keep, chosen.processes, _tell)
    else:
        judged = judge_command.judge(names, random, chosen.in_order, _tell)
    print(judged.text())
    problems = [*differs, *(judged.unfit() if chosen.release else judged.problems())]
    if chosen.release or chosen.changed:
        print("\n".join(["", *(problems or ["nothing differs from what was declared"])]))
    if chosen.json:
        Path(chosen.json).write_text(judged.json())
    if chosen.keep:
        judged.keep()
        _tell("kept; run make docs, which writes the tables that are made of it")
    return exits.FAULT if problems else exits.AGREES


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _audit(chosen: argparse.Namespace) -> int:
    wanted = None if chosen.recipe is None else recipe.load(chosen.recipe)
    found = audit.audit(headers.headers_of(chosen.release), wanted, chosen.policy == "strict")
    show(audit.as_json(found) if chosen.json else audit.render(found))
    return exits.FAULT if found.verdict.startswith(audit.FAULT) else exits.AGREES


if __name__ == "__main__":
    sys.exit(main())
