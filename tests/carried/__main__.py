"""python -m tests.carried: every carried fault, where it shows, and how near it comes to the catalogue's own.

With --drift: how many of them `python -m verify drift` names; --keep makes that the kept record, of which make docs writes a table.
"""

import argparse
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from verify.faults import CATALOGUE

from . import IN_HF, IN_STOCK, NOT_CARRIED, diagnosing
from .compared import TOLERANCE, Trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.carried")
    parser.add_argument("--drift", action="store_true", help="diagnose each, as python -m verify drift does")
    parser.add_argument("--keep", action="store_true", help="with --drift: make it the record that is kept (run make docs then)")
    parser.add_argument(
        "--all-folds", action="store_true", help="with --drift: withhold each fifth of the catalogue in turn"
    )
    parser.add_argument("--dtypes", default="float32", help="with --drift: what HF runs in, separated by commas")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--changed", action="store_true", help="with --drift: what a change may have made untrue of the record")
    parser.add_argument("--release", action="store_true", help="run nothing: refuse a record whose full run was of other code")
    asked = parser.parse_args()
    if asked.release:
        return diagnosing.release()
    if asked.drift and asked.changed:
        return diagnosing.changed(asked.processes, asked.keep)
    if asked.drift:
        folds = range(diagnosing.FOLDS) if asked.all_folds else (0,)
        return diagnosing.main(asked.processes, folds, asked.dtypes.split(","), asked.keep)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    width, wrong = max(map(len, CATALOGUE)), []
    with TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch))
        print(f"{'in HF'.ljust(width)}  {'case'.ljust(20)}  {'first stage'.ljust(36)}  ours-HF  effect  streamed-HF")
        for name, fault in IN_HF.items():
            found, streamed = trial.compared(name), trial.streamed(name)
            wrong += [] if found.is_the_same and streamed <= TOLERANCE else [name]
            numbers = f"{found.error:7.1e}  {found.effect:6.0e}  {streamed:.1e}{'  WRONG' if name in wrong else ''}"
            print(f"{name.ljust(width)}  {fault.case.ljust(20)}  {found.stage.ljust(36)}  {numbers}", flush=True)
        print(f"\n{'in mlx-lm'.ljust(width)}  {'case'.ljust(26)}  right-HF  effect  stock-HF, both with the fault")
        for name, in_stock in IN_STOCK.items():
            seen = trial.stock_compared(name)
            wrong += [] if seen.is_the_same else [f"{name} (mlx-lm)"]
            note = ", of equal scores each takes its own" if seen.is_tied else ""
            print(
                f"{name.ljust(width)}  {in_stock.case.ljust(26)}  {seen.right:8.1e}  {seen.effect:6.0e}  {seen.error:.1e}{note}"
            )
    print("\nnot carried to HF")
    for name, why in NOT_CARRIED.items():
        print(f"{name.ljust(width)}  {why}")
    print(
        f"\n{len(IN_HF)} in HF, {len(IN_STOCK)} in mlx-lm, {len(NOT_CARRIED)} not carried; wrong: {', '.join(wrong) or 'none'}"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
