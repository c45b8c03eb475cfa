"""`python -m glm_dsa inventory PATH`: what a config or a checkpoint folder holds, counted and checked.

Reads headers only, so that 1.5 TB take seconds; `--values` reads every tensor too, looking for NaN and infinity.
`plan` says what a model takes, before it is converted. `attach DIR` lets any mlx-lm load a checkpoint with this definition.
`generate`, `server`, `convert` and the others are mlx-lm's own commands, run on this definition (`mlx_lm/`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from . import __version__, foreign, weights
from .checkpoint import assemble, check_values
from .config import ModelArgs
from .console import MLX_LM, show
from .errors import CheckpointError, GlmDsaError, RecipeError, printable
from .planning import gguf, plan, recipe
from .text import in_gb, table

UNREADABLE = 10  # exit status for what cannot be read or done; no command here gives a verdict (verify/core/exits.py)
REFUSED = {
    "awq": "it does not know this architecture",
    "gptq": "it fails on modules that a short text does not reach, and would pack the indexer and skip the experts",
    "dynamic_quant": "it measures by gradients, which the indexer has none of, and would give it the fewest bits",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m glm_dsa",
        description="GLM-5.x in MLX.",
        epilog=f"mlx-lm's own commands, with their own options, on this definition: {', '.join(MLX_LM)}.",
    )
    parser.add_argument("--version", action="version", version=f"glm-dsa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    inventory = commands.add_parser(
        "inventory", help="count a config's tensors; check a checkpoint folder against them"
    )
    inventory.add_argument("path", type=Path, help="a config.json, or the folder of a checkpoint")
    inventory.add_argument(
        "--values", action="store_true", help="read every tensor: no NaN, no infinity (folders only)"
    )
    inventory.add_argument("--json", action="store_true", help="for machines")
    attach = commands.add_parser(
        "attach", help="let any mlx-lm load a checkpoint with this definition: writes a model_file into its folder"
    )
    attach.add_argument("path", type=Path, help="the folder of a checkpoint")
    attach.add_argument("--force", action="store_true", help="replace another model_file")
    planning = commands.add_parser(
        "plan", help="what a model takes by component, cache and machine: as stored, by a recipe, or as a GGUF"
    )
    planning.add_argument("path", type=Path, help="a config.json, or the folder of a build")
    planning.add_argument(
        "--recipe", metavar="R", help=f"a recipe's .toml, or one that is kept: {', '.join(recipe.kept())}"
    )
    planning.add_argument(
        "--custom-q", metavar="RULES", help="llama.cpp's and ik_llama.cpp's: a file, or PATTERN=TYPE,..."
    )
    planning.add_argument("--gguf", metavar="TYPE", help="as a GGUF: the type of what no rule names (default bf16)")
    planning.add_argument("--context", metavar="N", default="1M", help="tokens: 1000000, 128k, 1M (2^20, the default)")
    planning.add_argument(
        "--kv-bits", metavar="B", type=int, default=16, help="of the latents in the cache (default 16)"
    )
    planning.add_argument(
        "--chunk", metavar="N", type=int, default=plan.CHUNK, help="of a prompt at a time (default 2048)"
    )
    planning.add_argument("--size", metavar="BYTES", help="of a build without MTP, e.g. 392.992GiB: its bits a weight")
    planning.add_argument("--json", action="store_true", help="for machines")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in MLX_LM:  # whose options mlx-lm parses
            from . import mlx_lm

            return mlx_lm.run(arguments[0], arguments[1:])
        if arguments and arguments[0] in REFUSED:
            raise GlmDsaError(
                f"mlx-lm's {arguments[0]} cannot be used: {REFUSED[arguments[0]]}; convert takes predicates"
            )
        options = parser.parse_args(arguments)
        if options.command == "attach":
            from . import mlx_lm

            print(f"{mlx_lm.attach(options.path, options.force)}: written; config.json names it as model_file")
        elif options.command == "plan":
            show(plan.render(planned(options), options.json))
        else:
            show(render(count(options.path, options.values), options.json))
        return 0
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "mlx_lm":
            raise
        print(f"glm-dsa: {error}", file=sys.stderr)
        return UNREADABLE
    except KeyboardInterrupt:
        return 130
    except GlmDsaError as error:
        print(f"glm-dsa: {error}", file=sys.stderr)
        return UNREADABLE


def planned(options: argparse.Namespace) -> plan.Plan:
    """Raises `GlmDsaError`."""
    if options.recipe is not None and (options.custom_q is not None or options.gguf is not None):
        raise RecipeError("--recipe is an MLX build's, --custom-q and --gguf a GGUF's: expected one of both")
    if not 1 <= options.chunk <= 1 << 20:
        raise RecipeError(f"--chunk {options.chunk}: expected 1 to {1 << 20:,} tokens")
    rules = None
    if options.custom_q is not None or options.gguf is not None:
        rules = gguf.rules_of(options.custom_q, "bf16" if options.gguf is None else options.gguf)
    return plan.plan(
        options.path,
        None if options.recipe is None else recipe.load(options.recipe),
        rules,
        plan.tokens(options.context),
        options.kv_bits,
        options.chunk,
        None if options.size is None else plan.nbytes(options.size),
    )


@foreign.explained
def count(path: Path, values: bool = False) -> dict[str, Any]:
    """Tensors and parameters by component, conventions, and what a folder holds of them."""
    args = ModelArgs.from_file(path)
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for spec in weights.inventory(args):
        tensors[spec.component] += 1
        parameters[spec.component] += math.prod(spec.shape)
    out: dict[str, Any] = {
        "path": str(path),
        "model_type": args.model_type,
        "components": {c: {"tensors": tensors[c], "parameters": parameters[c]} for c in tensors},
        "tensors": tensors.total(),
        "parameters": parameters.total(),
        "conventions": [str(c) for c in args.conventions],
    }
    if path.is_dir():
        model, stored = assemble(path)
        bytes_of = Counter[str]()
        for tensor in stored.values():
            bytes_of[tensor.dtype] += tensor.nbytes
        out["stored"] = {
            "layout": "HF" if weights.is_hf_layout(stored) else "MLX",
            "files": len({s.file for s in stored.values()}),
            "tensors": len(stored),
            "names and shapes": "as they should be",
            "mtp": "present" if model.mtp else "absent",
            "values": "not read",
            "bytes": dict(bytes_of),
            "notes": list(stored.notes),
        }
        if values:
            check_values(stored)
            out["stored"]["values"] = "finite"
    elif values:
        raise CheckpointError(f"{path}: --values needs the folder of a checkpoint")
    return out


def render(found: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps(found, indent=2)
    rows = [("component", "tensors", "parameters")]
    rows += [(c, f"{n['tensors']:,}", f"{n['parameters']:,}") for c, n in found["components"].items()]
    rows.append(("total", f"{found['tensors']:,}", f"{found['parameters']:,}"))
    lines = [printable(f"{found['path']}: {found['model_type']}"), ""]
    lines += table(rows, right=(1, 2))
    if "stored" in found:
        held = dict(found["stored"])
        sizes = ", ".join(f"{dtype} {in_gb(size, 3)} GB" for dtype, size in held.pop("bytes").items())
        notes = [f"  note: {note}" for note in held.pop("notes")]
        lines += ["", "stored", *(f"  {key}: {value}" for key, value in held.items()), f"  bytes: {sizes}", *notes]
    return "\n".join([*lines, "", "conventions", *(f"  {c}" for c in found["conventions"])])


if __name__ == "__main__":
    sys.exit(main())
