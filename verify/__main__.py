"""`python -m verify audit DIR_OR_REPO`: what headers alone tell of a release."""

from __future__ import annotations

import argparse
import os
import sys

from glm_dsa.errors import GlmDsaError

from . import audit, release


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m verify", description="Beside the gate itself, which is pytest verify/."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    auditing = commands.add_parser("audit", help="config against tensors, precision, sizes: headers only, in seconds")
    auditing.add_argument(
        "release", metavar="DIR_OR_REPO", help="a checkpoint's folder, or a repository's name on the hub"
    )
    auditing.add_argument("--json", action="store_true", help="for machines")
    chosen = parser.parse_args(arguments)
    try:
        found = audit.audit(release.headers_of(chosen.release))
    except GlmDsaError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    try:
        print(audit.as_json(found) if chosen.json else audit.render(found), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if found.verdict.startswith(audit.FAULT) else 0


if __name__ == "__main__":
    sys.exit(main())
