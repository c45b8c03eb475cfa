"""What the mutation test changes: each operator, constant and comparison of the definition, each condition turned round, each
call that stands alone and each assignment to a part left out; and each parameter from some size on (size_mutants.py).

A mutant is one node of one function's syntax tree, one of its parameters, or one constant of a module.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from ..faults import edits
from ..faults.coverage import functions, modules
from . import size_mutants

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
LEFT_OUT = ("errors", "text", "version", "sharding")  # words; and what takes several processes, tried in tests/test_mlx_lm.py
READERS = ("checkpoint", "config", "keys", "trace", "weights")


@dataclass(frozen=True)
class Mutant:
    """`where` is "module.Class.method", or "module.CONSTANT"; number: the how manieth change of it, or of its sizes."""

    where: str
    number: int
    line: int
    change: str
    of_size: bool = False

    @property
    def name(self) -> str:
        return f"{self.where}{'@' if self.of_size else '#'}{self.number}"


def mutants() -> Iterator[Mutant]:
    """The model's own files first; what reads and checks checkpoints after them."""
    every = {where: f for where, f in functions().items() if where.split(".")[0] not in LEFT_OUT}
    for is_reader in (False, True):
        for where, function in every.items():
            if (where.split(".")[0] in READERS) != is_reader:
                continue
            first = function.__code__.co_firstlineno
            for number, (line, change) in enumerate(changes(edits.source_of(function))):
                yield Mutant(where, number, first + line - 1, change)
    for where, function in every.items():
        if where.split(".")[0] in size_mutants.FILES:
            first = function.__code__.co_firstlineno
            for number, (line, kind) in enumerate(size_mutants.kinds(edits.source_of(function))):
                yield Mutant(where, number, first + line - 1, str(kind), of_size=True)
    for name, module in modules().items():
        for constant, value in vars(module).items():
            if constant.isupper() and isinstance(value, int) and f"\n{constant} = " in edits.text_of(module):
                yield Mutant(f"{name}.{constant}", 0, 0, f"{value} -> {value + 1}")


def changes(source: str) -> Iterator[tuple[int, str]]:
    """(line, change in words), one for each node of a function that can be changed."""
    for *_, node in _nodes(ast.parse(source)):
        new = ast.unparse(ast.fix_missing_locations(_changed(node)))
        yield node.lineno, f"{ast.unparse(node)} -> {new or 'nothing'}"


def changed(source: str, number: int) -> ast.Module:
    """A function's tree with its `number`th change."""
    tree = ast.parse(source)
    holder, field, index, node = list(_nodes(tree))[number]
    if index is None:
        setattr(holder, field, _changed(node))
    else:
        getattr(holder, field)[index] = _changed(node)
    return tree


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None, Any]]:
    """(holder, field, index, node) of what can be changed, outside decorators, annotations, defaults and docstrings."""
    function: Any = tree.body[0]
    yield from (
        item for item in _inside(ast.Module(body=function.body, type_ignores=[])) if _changed(item[-1]) is not None
    )


def _inside(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, Any]]:
    """Not in annotations, words, and `strict=`, which holds lengths to be what they are."""
    if isinstance(node, (ast.JoinedStr, ast.Raise)) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield node, field, index, child
                yield from _inside(child)


def _changed(node: Any) -> Any:
    """Another node for it, or None where there is nothing to change."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return ast.copy_location(ast.BinOp(left, OPERATORS[type(op)](), right), node)
        case ast.BoolOp(op, values):
            return ast.copy_location(ast.BoolOp(OPERATORS[type(op)](), values), node)
        case ast.Compare(left, [op], comparators):
            return ast.copy_location(ast.Compare(left, [OPERATORS[type(op)]()], comparators), node)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            return operand
        case ast.Constant(bool() as value):
            return ast.copy_location(ast.Constant(not value), node)
        case ast.Constant(int() | float() as value):
            return ast.copy_location(ast.Constant(value + 1 if isinstance(value, int) else 2 * value or 1.0), node)
        case ast.If(test, body, orelse):
            return ast.copy_location(ast.If(ast.UnaryOp(ast.Not(), test), body, orelse), node)
        case ast.IfExp(test, body, orelse):
            return ast.copy_location(ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse), node)
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            return ast.copy_location(ast.Pass(), node)
    return None


# Changes that no output of one process can show, by what they are a change of: {(function, change): why}; judged by hand.
TWO = "only processes that share the work notice: tests/test_mlx_lm.py"
BLOCK, AXIS, EMPTY = (
    "how many queries a block holds",
    "the same axis, counted from the other end",
    "nothing is appended",
)
COST, TILE = "a form's cost, or a tile's size: results do not depend on it", "no tile, and no block, is so large"
HEADS, FORM = "the heads' axis, or one entry for all of them", "at so many queries, or keys, another form is cheaper"
REFUSED = "what is refused, not what is computed"
LONG = "no call has so many tokens"
ROWS_9, CALL, CONTEXT, ID = (
    f"wrong from {what} on" for what in ("rows of 9", "tokens of 1,500", "tokens of 150,000", "a value of 100,000")
)
_MLA = "attention.MultiHeadLatentAttention"
OF_SIZES = {
    **{(f"{_MLA}.cheapest_form", f"{name}: wrong from a value of {size} on"): COST
       for name, size in (("queries", "1,500"), ("keys", "150,000"), ("selected", "1,500"))},
    (f"{_MLA}.block", "batch: wrong from a value of 9 on"): COST,
    (f"{_MLA}.block", "chosen: wrong from a value of 1,500 on"): COST,
    ("indexer.Indexer.tile", "batch: wrong from a value of 9 on"): COST,
    ("indexer.Indexer.tile", "length: wrong from a value of 1,500 on"): COST,
    ("indexer.Indexer.tile", "length: wrong from a value of 150,000 on"): COST,
    **{("indexer.Indexer.score", f"{name}: {CALL}"): TILE for name in ("q", "w", "mask")},
    ("indexer.Indexer.score", f"k: {CONTEXT}"): TILE,
    ("indexer.ranks", f"scores: {CALL}"): TILE, ("indexer.ranks", f"scores: {CONTEXT}"): TILE,
    (f"{_MLA}.attend_expanded", f"mask: {CALL}"): HEADS,
    (f"{_MLA}.attend_absorbed", f"mask: {CALL}"): HEADS, ("attention.selection_mask", f"mask: {CALL}"): HEADS,
    **{(f"{_MLA}.attend_absorbed", f"{name}: {CALL}"): FORM for name in ("q_nope", "q_rope")},
    ("attention.selection_mask", "keys: wrong from a value of 150,000 on"): FORM,
    ("attention.selection_mask", f"selection: {ID}"): FORM,
    **{(f"linear.{name}.__call__", f"x: {CALL}"): HEADS
       for name in ("QuantizedMultiLinear", "MultiLinear", "QuantizedSwitchLinear", "SwitchLinear")},
    ("mask.CausalMask.picked", f"columns: {CONTEXT}"): LONG,
    **{(where, f"{name}: wrong from a value of 150,000 on"): LONG
       for where, name in (("model.Backbone.rotation_and_mask", "length"), ("model.positions", "length"))},
    ("moe.Router.choose", f"scores: {CONTEXT}"): LONG, ("store.Columns.take", f"columns: {CONTEXT}"): LONG,
    ("store.Columns.rows", f"indices: {CALL}"): "no batch has so many rows",
    ("store.Columns.rows", f"indices: {ID}"): "no batch has so many rows",
    ("mtp.MtpLayer.step", f"reuse: {CALL}"): "one query's, of each row",
    ("cache.LayerCache._check_fits", f"new: {ROWS_9}"): REFUSED, ("cache.LayerCache._check_fits", f"new: {CALL}"): REFUSED,
    ("cache_checks.check_in_step", "rows: wrong from a value of 9 on"): REFUSED,
    ("cache_checks.check_in_step", "tokens: wrong from a value of 1,500 on"): REFUSED,
    ("cache_checks.check_in_step", f"tokens: {ID}"): REFUSED,
}  # fmt: skip
EQUIVALENT = OF_SIZES | {
    **{(f"{_MLA}.{form}", "True -> False"): "in float32 a softmax is precise without"
       for form in ("attend_absorbed", "attend_gathered")},
    ("cache.LayerCache.dtype", "1 -> 2"): "scales and biases are of one dtype",
    ("cache.LayerCache._first", "0 -> 1"): "a start counts only where something is packed",
    ("indexer.Indexer.select_tiled", "1 -> 2"): "waits for the last two blocks, not for the last",
    ("indexer.Indexer.select_tiled", "best or selections[-1:] -> best and selections[-1:]"): "only what waits for what",
    ("indexer.Indexer.select_tiled",
     "if (before := (best or selections[-1:])):\n    queries, keys = mx.depends([queries, keys], before) -> "
     "if not (before := (best or selections[-1:])):\n    queries, keys = mx.depends([queries, keys], before)"):
        "only what waits for what",
    ("indexer.Indexer.select_tiled", "-1 -> 1"): "selections[1:]: waits for all before but the first, not for the last",
    ("indexer.Indexer.score", "scores >= LOWEST -> scores > LOWEST"): "LOWEST in the place of LOWEST",
    ("mask.CausalMask.tile", "self.first + rows.start -> self.first - rows.start"): "a mask that hides nothing is made",
    ("indexer.Indexer.best", "rest <= 0 -> rest < 0"): "all of them, in another order",
    ("model.Backbone.__call__", "0 -> 1"): "positions and pads are those of every layer's cache: check_caches holds them to it",
    ("model.Model.draft", "-1 -> 1"): AXIS,
    ("model.Model.draft", "0 -> 1"): "main[1]: the main model's caches are of one length, each call holds them to it",
    ("moe.Router.__call__", "1e-20 -> 2e-20"): "sigmoids sum to far more",
    ("moe.Router.__call__", "weights.sum(axis=-1, keepdims=True) + 1e-20 -> weights.sum(axis=-1, keepdims=True) - 1e-20"):
        "sigmoids sum to far more",
    ("moe.Router.choose", "self.groups > 1 -> self.groups >= 1"): "of one group none loses",
    ("moe.Router.choose", "-2 -> 2"): AXIS,
    ("moe.MixtureOfExperts.__call__", "-2 -> 2"): AXIS,
    ("moe.MixtureOfExperts.__call__", "self.group is None -> self.group is not None"): TWO,
    ("moe.MixtureOfExperts.__call__",
     "out if self.group is None else mx.distributed.all_sum(out, group=self.group) -> "
     "out if not self.group is None else mx.distributed.all_sum(out, group=self.group)"): TWO,
    ("model.Model.shard", "shard(self.model.layers, group) -> pass"): TWO,
    ("moe.Experts.__call__", "flat.size >= SORT_FROM -> flat.size > SORT_FROM"): "sorted or not, the same",
    ("attention.EXPONENTIAL", "16 -> 17"): COST,
    ("moe.SORT_FROM", "64 -> 65"): "sorted or not, the same",
    ("mtp.last_selection", "cache.batch or 1 -> cache.batch and 1"): "one row is broadcast to all",
    ("mtp.last_selection", "1 -> 2"): "the cache holds tokens by then, and knows its rows",
    ("linear.SwitchLinear.__call__",
     "weight.dtype != mx.float32 and mx.default_device() == mx.Device(mx.cpu) -> "
     "weight.dtype != mx.float32 or mx.default_device() == mx.Device(mx.cpu)"): "float32 to float32",
    ("rope.yarn_mscale", "factor <= 1 -> factor < 1"): "log 1 = 0",
    ("store.Columns.append", "self.buffers[0].shape[1] < end -> self.buffers[0].shape[1] <= end"): "grows a token early",
    ("store.LatentStore.append", "before < end -> before <= end"): EMPTY,
    ("store.LatentStore.append", "before + values.shape[1] > begin -> before + values.shape[1] >= begin"): EMPTY,
    ("store.Columns.between", "end > begin -> end >= begin"): EMPTY,
    ("store.Columns.placed", "length <= 0 -> length < 0"): EMPTY,
    ("store.Columns.placed", "not self.length or length <= 0 -> not self.length and length <= 0"): EMPTY,
    ("store.LatentStore.take", "self.plain.length - 1 -> self.plain.length + 1"): "what lies behind is packed, and taken there",
    ("store.LatentStore.rows", "1 -> 2"): "the same column for every row, written out once more or less",
    ("store.LatentStore.rows", "0 -> 1"): "a row that is not packed yet has no packed columns to place",
    ("store.LatentStore.stacked", "0 -> 1"): "where no row is packed yet there is nothing to place",
    ("rope.rope_frequencies", "0.001 -> 0.002"): "no pair lies between",
    ("checkpoint.load", "mx.eval(parameter) -> pass"): "evaluated when it is first used",
    ("checkpoint.assemble", "model.eval() -> pass"): "nothing here is random",
    ("storage.safetensors.read_header", "0 -> 1"): "too short either way",
    ("trace.capture", "v is not None -> v is None"): "evaluated when it is first read",
    **{("tiles.transposed", change): "a view in the place of a copy: the same values, later"
       for change in ("mx.default_device().type == mx.DeviceType.cpu -> mx.default_device().type != mx.DeviceType.cpu",
                      "mx.contiguous(turned) if mx.default_device().type == mx.DeviceType.cpu else turned -> "
                      "mx.contiguous(turned) if not mx.default_device().type == mx.DeviceType.cpu else turned")},
    ("trace.capture", "mx.eval([v for v in stages.values() if v is not None]) -> pass"): "evaluated when it is first read",
    ("weights.is_ignorable", "layer < args.num_hidden_layers -> layer <= args.num_hidden_layers"): "the MTP layer runs its own",
    ("cache.LayerCache._check_whole", "0 -> 1"): "columns of no arrays have no length",
    ("weights._split_kv_b", "0 -> 1"): "whichever part the others are held to",
    ("weights._stack_experts", "0 -> 1"): "whichever expert the others are held to",
    ("weights.packing_of", "32 -> 33"): "rounded down, the same bits; whether they fit is asked afterwards",
}  # fmt: skip


def reason(record: Mapping[str, Any]) -> str:
    """Why nobody can notice a mutant; empty where somebody should."""
    return EQUIVALENT.get((re.split("[#@]", record["mutant"])[0], record["change"]), "")


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    function = functions().get(mutant.where)
    with _constant(mutant) if function is None else _code(mutant, function):
        yield


def _code(mutant: Mutant, function: FunctionType) -> AbstractContextManager[None]:
    change = size_mutants.changed if mutant.of_size else changed
    size_mutants.prepare(function)
    tree = change(edits.source_of(function), mutant.number)
    return edits.swapped({function: edits.compiled(tree, function)})


@contextmanager
def _constant(mutant: Mutant) -> Iterator[None]:
    home, name = mutant.where.split(".")
    own = getattr(modules()[home], name)
    holders = [module for module in modules().values() if getattr(module, name, None) is own]
    for module in holders:
        setattr(module, name, own + 1)
    try:
        yield
    finally:
        for module in holders:
            setattr(module, name, own)
