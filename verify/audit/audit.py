"""`python -m verify audit DIR_OR_REPO`: what headers alone tell of a release. Seconds for 1.5 TB; no weight is read.

Tensors against config.json (`tensors`), precision (`policy`), mlx-lm's key (`quantization_key`), tokenizer and chat (`chat`),
code that comes with it (`foreign_code`), a recipe (`adherence`); what the model and its cache take, and where that fits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from glm_dsa import ModelArgs, weights
from glm_dsa.errors import CacheError, printable
from glm_dsa.planning.components import Component
from glm_dsa.planning.plan import MEMORIES, USABLE, Cache
from glm_dsa.planning.recipe import Recipe
from glm_dsa.text import in_gb, table

from ..core.findings import FAULT, NOTE, WARNING, Finding, Findings
from ..engines.headers import Release
from . import adherence, chat, foreign_code, policy, quantization_key
from .tensors import Tensors

__all__ = ["FAULT", "NOTE", "WARNING", "Audit", "Finding", "as_json", "audit", "render"]

CONTEXTS = {"32k": 32 << 10, "128k": 128 << 10, "1M": 1 << 20}
POLICIES = ("usual", "strict")
LINES = 60  # of what is printed, whatever was found


@dataclass
class Audit:
    release: str
    layout: str
    mtp: str
    files: int
    findings: list[Finding]
    conventions: list[str]
    components: dict[str, Component]
    cache: dict[str, dict[str, int]]  # {"fp16" or "int8": {context: bytes}}

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.components.values())

    @property
    def verdict(self) -> str:
        faults = sum(f.severity == FAULT for f in self.findings)
        if faults:
            return f"FAULT: {faults} of {len(self.findings)} findings"
        if warnings := sum(f.severity == WARNING for f in self.findings):
            but = f", but for {warnings} warning{'s' * (warnings > 1)} above"
        else:
            but = ""
        return f"headers are as they should be{but}; nothing is said here about the weights' values"

    def fits(self) -> dict[int, dict[str, list[str]]]:
        """{GB of memory: {cache: contexts that fit beside the weights}}."""
        return {
            memory: {
                kind: [c for c, size in sizes.items() if self.nbytes + size <= USABLE * (memory << 30)]
                for kind, sizes in self.cache.items()
            }
            for memory in MEMORIES
        }


def audit(release: Release, recipe: Recipe | None = None, strict: bool = False, with_chat: bool = True) -> Audit:
    """strict: what is against policy is a FAULT; with_chat: tokenizer and chat template too.

    Raises `ConfigError` where config.json is no model's at all, and `RecipeError` where the recipe is not for this model; all
    else is a finding."""
    args = release.args()
    findings = Findings()
    for note in release.notes:
        findings.say(NOTE, note)
    tensors = Tensors(args, release.tensors, findings)
    policy.judge(tensors, findings, strict)
    quantization_key.judge(tensors, release.config, findings)
    if recipe is not None:
        adherence.judge(tensors, recipe, findings)
    if with_chat:
        chat.judge(release, args.vocab_size, findings)
        foreign_code.judge(release, findings)
    mtp = "none" if not args.num_nextn_predict_layers else "present" if tensors.with_mtp else "absent"
    if mtp == "absent" and not any("MTP" in note for note in release.notes):
        findings.say(
            NOTE, "config.json names an MTP layer, and no tensor of it is there: nothing can be drafted with it"
        )
    return Audit(
        release=release.origin,
        layout="HF" if weights.is_hf_layout(release.tensors) else "MLX",
        mtp=mtp,
        files=len({t.file for t in release.tensors.values()}),
        findings=findings.merged(),
        conventions=[str(c) for c in args.conventions],
        components=dict(tensors.components),
        cache=cache_sizes(args),
    )


def cache_sizes(args: ModelArgs) -> dict[str, dict[str, int]]:
    """Bytes of the KV cache of one sequence, by context, where the model runs in 16 bit."""
    sizes = {}
    for kind, bits in (("fp16", 16), ("int8", 8)):
        try:
            sizes[kind] = {context: Cache.of(args, tokens, bits).main for context, tokens in CONTEXTS.items()}
        except CacheError:  # no group of values divides this model's widths
            continue
    return sizes


# -- what is printed


def render(found: Audit) -> str:
    """At most LINES lines: where findings need the room, they stand in the place of what fits."""
    size = found.nbytes
    heading = f"{found.release}: {found.layout} layout, {found.files} files, {size / 1e9:,.1f} GB, MTP {found.mtp}"
    head = [printable(heading), "", *_components(found)]
    conventions = ["", "conventions in force", *(f"  {c}" for c in found.conventions)]
    tail = ["", f"verdict: {found.verdict}"]
    memory = _memory(found)
    room = LINES - len(head) - len(conventions) - len(tail) - 2
    if len(found.findings) > room - len(memory):
        memory = []
    lines = [f"  {f.severity}: {f.what}" for f in found.findings[:room]]
    if len(lines) < len(found.findings):
        lines[-1] = f"  and {len(found.findings) - room + 1} more findings, which --json tells"
    findings = ["", "findings", *lines] if lines else ["", "findings: none"]
    return "\n".join([*head, *memory, *conventions, *findings, *tail])


def _components(found: Audit) -> list[str]:
    rows: list[tuple[str, ...]] = [("component", "tensors", "parameters", "GB", "bits a weight", "formats")]
    total = Component.sum(found.components.values())
    for name, c in [*found.components.items(), ("total", total)]:
        rows.append((name, f"{c.tensors:,}", f"{c.parameters:,}", in_gb(c.nbytes, 3), f"{c.bits:.2f}", c.told()))
    return table(rows, right=(1, 2, 3, 4))


def _memory(found: Audit) -> list[str]:
    rows: list[tuple[str, ...]] = [("KV cache, GB", *CONTEXTS)]
    rows += [(kind, *map(in_gb, sizes.values())) for kind, sizes in found.cache.items()]
    out = ["", *table(rows, right=(1, 2, 3))]
    rows = [("memory", *(f"{kind} cache" for kind in found.cache))]
    for memory, kinds in found.fits().items():
        rows.append((f"{memory} GB", *(f"up to {c[-1]}" if c else "no" for c in kinds.values())))
    return [*out, "", f"what fits, weights and cache within {USABLE:.0%} of memory, one sequence", *table(rows)]


def as_json(found: Audit) -> str:
    plain = asdict(found) | {"bytes": found.nbytes, "fits": found.fits(), "verdict": found.verdict}
    for name, component in found.components.items():
        plain["components"][name]["bits"] = round(component.bits, 4)
    return json.dumps(plain, indent=2)
