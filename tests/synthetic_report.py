"""Reports of comparisons that never were, for the tests of their page: any size, with and without what is optional."""

from __future__ import annotations

from typing import Any

import numpy as np

from verify.core import stages

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "'\"><svg onload=alert(1)>",
    "javascript:alert(1)",
    "\u202egnirts desrever\u202c",
    "\u05e9\u05dc\u05d5\u05dd \u0639\u0644\u064a\u0643\u0645",
    "\N{WOMAN}\u200d\N{ROCKET}\N{VARIATION SELECTOR-16} \N{GRINNING FACE}",
    "\x00\x07\x1b[31mred\x7f\ud800",
    "url(https://example.invalid/x.png)",
    "a.very.long.name." * 40,
    "W" * 400,
)
TEXT = "def route ( self , x ) : \n return the scores of every key , and keep those that matter most . \n"
WORDS = TEXT.split(" ")


def report(
    layers: int = 8, tokens: int = 256, *, seed: int = 0, diverges: bool = True, full: bool = True
) -> dict[str, Any]:
    """A report on a model of so many layers. With `diverges`, indexers lack their ReLU from layer 6 on; else all agrees.
    Without `full`, what is optional is missing, and the reasons are given."""
    random = np.random.default_rng(seed)
    kinds = [kind(i, layers) for i in range(layers)]
    fault = (6 if layers > 6 else 2) if diverges else None
    compared = comparisons(random, kinds, fault)
    at = f"layers.{fault}.self_attn.indexer.scores"
    made = {
        "format": 1,
        "command": "python -m verify drift ./release --reference ./original --prompt prompt.txt --html drift.html",
        "seconds": 41.2,
        "date": "2026-11-22",
        "versions": {
            "glm_dsa": "1.4.0",
            "mlx": "0.32.4",
            "mlx-lm": "0.32.2",
            "torch": "2.9.1",
            "transformers": "5.18.0",
        },
        "candidate": side("mlx_lm.models.glm_moe_dsa@./release", "somebody's code, float32 on cpu"),
        "reference": side("transformers@./original", "HF's modules, float32 on cpu"),
        "prompt": {"source": "prompt.txt", "length": tokens, "index_topk": 64},
        "layers": kinds,
        "stages": ["embed", *stages.IN_LAYER, "norm", "logits"],
        "findings": findings(at) if diverges else AGREES,
        "divergence": divergence(at) if diverges else None,
        "causes": CAUSES if diverges else [],
        "comparisons": compared,
        "growth": growth(random, kinds, fault),
        "choices": choices(random, kinds, fault),
        "tokens": prompt(random, tokens, diverges),
        "distributions": None,
        "sensitivity": sensitivity(random) if full else None,
        "mass": mass(random, kinds) if full else None,
        "reasons": {},
        "how": HOW,
    }
    kl = np.array([t["kl"] for t in made["tokens"]] or [0.0])
    made["distributions"] = {
        "kl_mean": float(kl.mean()), "kl_p95": float(np.quantile(kl, 0.95)), "kl_max": float(kl.max()),
        "top1": float(np.mean([t["same_top1"] for t in made["tokens"]] or [1.0])),
        "reference_perplexity": 8.41, "candidate_perplexity": 9.02 if diverges else 8.41,
    }  # fmt: skip
    if not full:
        made |= {"choices": [], "tokens": [], "distributions": None}
        made["reasons"] = {
            "divergence": "every stage agrees",
            "causes": "nothing is to be explained",
            "choices": "the prompt is not longer than index_topk, and no layer is sparse",
            "tokens": "no tokenizer was found",
            "sensitivity": "neither side is packed",
            "mass": "both sides name their layout",
        }
    return made


def hostile(seed: int = 0) -> dict[str, Any]:
    """A report each of whose strings tries to be more than text, with numbers that are none."""
    made = report(6, 96, seed=seed)
    texts = iter(HOSTILE * 10000)

    def spoilt(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            names = (next(texts) if key == "versions" else name for name in value)
            return {name: spoilt(v, name) for name, v in zip(names, value.values(), strict=True)}
        if isinstance(value, list):
            return [spoilt(v, key) for v in value]
        return next(texts) if isinstance(value, str) and key not in ("verdict", "run", "stages", "stage") else value

    made = spoilt(made)
    made["stages"][4] = HOSTILE[0]
    for i, row in enumerate(made["comparisons"]):
        row["stage"] = HOSTILE[0] if row["stage"] == "self_attn.indexer.k" else row["stage"]
        row["error"] = ("inf", "nan", row["error"])[i % 3]
    for rows, keys in (
        ("growth", ("local", "own", "gain")),
        ("tokens", ("kl",)),
        ("choices", ("selection", "routing")),
    ):
        for i, row in enumerate(made[rows]):
            row |= {key: ("inf", "nan", None, row[key])[(i + k) % 4] for k, key in enumerate(keys)}
    made["divergence"] |= {"error": "inf", "bound": None}
    made["causes"][0] |= {"exact": "nan", "explains": "inf"}
    made["sensitivity"]["rows"][0] |= {"alone": "nan", "recovered": "nan", "per_mb": "inf"}
    made["distributions"] |= {"kl_mean": "nan", "kl_max": "inf", "candidate_perplexity": "inf"}
    return made


def kind(index: int, layers: int) -> dict[str, Any]:
    return {
        "layer": index,
        "indexer": "full" if index < 3 or index % 4 == 2 else "shared",
        "mlp": "dense" if index < min(3, layers // 2) else "sparse",
        "mtp": index == layers - 1,
    }


def side(text: str, runs: str) -> dict[str, Any]:
    rope = "indexer_rope = interleaved (key rope_interleave of config.json)"
    return {
        "text": text,
        "runs": runs,
        "conventions": [rope, "eps of the indexer's norm = 1e-6 (default)", "norm_topk_prob = true"],
    }


def is_made(stage: str, of: dict[str, Any]) -> bool:
    """Whether a layer of this kind has the stage."""
    if stage in ("eh_proj", "shared_head"):
        return of["mtp"]
    if ".indexer." in stage:
        return of["indexer"] == "full"
    return of["mlp"] == "sparse" or not stage.startswith("mlp.")


def comparisons(random: np.random.Generator, kinds: list[dict[str, Any]], fault: int | None) -> list[dict[str, Any]]:
    made = []

    def compare(layer: int | None, stage: str, run: str, over: float) -> None:
        bound = float(10 ** random.normal(-5.3, 0.3))
        is_choice = stage.endswith((".topk", ".selection"))
        ratio = float(10 ** (random.normal(-0.9, 0.35) + over))
        verdict = "measured" if is_choice else "FAULT" if ratio > 1 and over else "agrees"
        made.append({
            "layer": layer, "stage": stage, "run": run, "error": bound * (ratio if over else min(ratio, 0.97)),
            "bound": None if is_choice else bound, "verdict": verdict,
            "ties": int(random.integers(1, 9)) if is_choice else 0, "note": "",
        })  # fmt: skip

    for run in ("local", "own"):
        compare(None, "embed", run, 0.0)
        for of in kinds:
            i = of["layer"]
            for stage in (s for s in stages.IN_LAYER if is_made(s, of)):
                is_at = (
                    fault is not None and of["indexer"] == "full" and stage == "self_attn.indexer.scores" and i >= fault
                )
                later = (
                    fault is not None and run == "own" and (i > fault or (i == fault and stage > "self_attn.indexer.t"))
                )
                compare(i, stage, run, 4.2 if is_at else 1.2 + 2.4 * i / len(kinds) if later else 0.0)
        for stage in ("norm", "logits"):
            compare(None, stage, run, 3.1 if fault is not None and run == "own" else 0.0)
    return made


def growth(random: np.random.Generator, kinds: list[dict[str, Any]], fault: int | None) -> list[dict[str, Any]]:
    made, own = [], 1e-7
    for of in kinds:
        local = float(10 ** random.normal(-6.9, 0.12))
        before, own = own, float(np.hypot(own * random.uniform(0.95, 1.35), local))
        if fault is not None and of["layer"] >= fault and of["indexer"] == "full":
            local, own = local * 3e4, own + 2e-3
        made.append({"layer": of["layer"], "local": local, "own": own, "gain": own / before if of["layer"] else None})
    return made


def choices(random: np.random.Generator, kinds: list[dict[str, Any]], fault: int | None) -> list[dict[str, Any]]:
    made = []
    for of in kinds:
        is_after = fault is not None and of["layer"] >= fault
        has, routes = of["indexer"] == "full", of["mlp"] == "sparse"
        made.append({
            "layer": of["layer"],
            "selection": (float(random.uniform(0.78, 0.86)) if is_after else 1.0) if has else None,
            "selection_own": (float(random.uniform(0.66, 0.8)) if is_after else 1.0) if has else None,
            "routing": 1.0 if routes else None,
            "routing_own": (float(random.uniform(0.9, 0.97)) if is_after else 1.0) if routes else None,
        })  # fmt: skip
    return made


def prompt(random: np.random.Generator, tokens: int, diverges: bool) -> list[dict[str, Any]]:
    made = []
    for i in range(tokens):
        word, follows, other = (WORDS[j % len(WORDS)] for j in (i, i + 1, i + 5))
        kl = float(10 ** random.normal(-1.6 if diverges and i > 64 else -8, 0.6))
        same = kl < 0.1 or bool(random.random() < 0.5)
        text = "    " if i % 31 == 17 else word if "\n" in word else " " + word
        follows, other = " " + follows, " " + other
        made.append({
            "position": i, "token": int(random.integers(0, 150000)), "text": text, "kl": kl, "same_top1": same,
            "ref_next": follows, "own_next": follows if same else other,
        })  # fmt: skip
    return made


def sensitivity(random: np.random.Generator) -> dict[str, Any]:
    rows = []
    parts = ("routed experts", "shared experts", "o_proj", "kv_b_proj", "q_b_proj", "indexer", "embedding and head")
    for component, recovered in zip(parts, random.dirichlet(np.ones(len(parts))), strict=True):
        parameters = int(10 ** random.uniform(6, 10))
        rows.append({
            "component": component, "layers": "3-7", "parameters": parameters, "bits": 4.5, "bytes": parameters * 9 // 16,
            "kl": 0.02 * (1 - float(recovered)), "recovered": float(recovered), "alone": 0.018 * float(recovered),
            "added_bytes": parameters * 23 // 16,
            "per_mb": 0.02 * float(recovered) / (parameters * 23 / 16 / 1e6),
        })  # fmt: skip
    modules = [{"module": f"model.layers.{i}.self_attn.o_proj", "bits": 8 if i % 2 else 6} for i in range(24)]
    recipe = {
        "bits": 4.62,
        "file": "recipe.toml",
        "rows": modules,
        "text": "KL 0.0061 instead of 0.02, for 1.9 % more bytes.",
    }
    return {"kl": 0.02, "rows": rows, "next": "o_proj: 4 -> 8 bits", "recipe": recipe}


def mass(random: np.random.Generator, kinds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def row(layer: int) -> dict[str, Any]:
        right, wrong = random.uniform(0.86, 0.97), random.uniform(0.5, 0.7)
        return {"layer": layer, "interleaved": float(right), "half_split": float(wrong), "chance": 0.23}

    return [row(of["layer"]) for of in kinds if of["indexer"] == "full"]


def findings(at: str) -> list[dict[str, Any]]:
    return [
        finding(
            "divergence",
            f"{at}, 2.6e4 times the bound",
            "All 126 comparisons before it agree.",
            "Its inputs, indexer.k, indexer.q and indexer.weights, agree: the fault lies in how they are put together.",
        ),
        finding(
            "cause",
            "indexer-no-relu explains 99.9 % of the final KL",
            "The reference with this one change gives what the candidate gives, within 0.4 of the bound.",
        ),
        finding("growth", "The error grows over the layers that follow", "No layer multiplies it by more than 1.35."),
        finding("cost", "o_proj costs most for its size", "8 bits in place of 4 recover 31 % of the KL for 12 MB."),
        finding("note", "MTP is compared on its own input only"),
    ]


def finding(kind: str, title: str, *lines: str) -> dict[str, Any]:
    return {"kind": kind, "title": title, "lines": list(lines)}


def cause(*values: Any) -> dict[str, Any]:
    return dict(zip(("how", "name", "text", "exact", "explains", "stages", "layers"), values, strict=True))


def divergence(at: str) -> dict[str, Any]:
    before = at.removesuffix("scores")
    around = [
        {"stage": before + name, "error": 4.1e-7, "bound": 3.1e-6, "verdict": "agrees", "note": ""}
        for name in ("k", "q", "weights")
    ]
    return {
        "stage": at, "error": 0.081, "bound": 3.1e-6, "where": "at (0, 41, 7): -0.81, ref 0.0",
        "around": [
            *around,
            {"stage": at, "error": 0.081, "bound": 3.1e-6, "verdict": "FAULT", "note": "negative where the reference has 0"},
            {"stage": before + "topk", "error": 0.17, "bound": None, "verdict": "measured", "note": "17 % other keys"},
        ],
    }  # fmt: skip


SCORES = "self_attn.indexer.scores"
AGREES = [finding("note", "No divergence: all 280 comparisons agree", "The worst error is 0.97 of its bound.")]
CAUSES = [
    cause("catalogue", "indexer-no-relu", "score without the ReLU", 0.4, 0.999, [SCORES], "6-77"),
    cause("convention", "indexer_rope = half_split", "the indexer's rotary layout", 812.0, 0.31, ["q", "k"], "0-77"),
    cause("component", "indexer", "the whole indexer exchanged for the reference's", 0.9, None, [SCORES], "6-77"),
]
HOW = {
    "divergence": "Each stage is fed with the reference's input. The first whose error is above its bound stands here.",
    "heat map": "Error: the largest difference in units of the reference's rms. Bound: four times what float32 costs there.",
    "growth": "Of the layer's output, the largest difference in units of the reference's rms.",
    "choices": "Of the keys or experts that the reference chose at each position, the share that the candidate chose.",
    "tokens": "KL(reference || candidate) of the distributions of the next token, in float64.",
    "sensitivity": "One component at a time is put back to the original's precision, and the KL is measured again.",
    "causes": "The reference is run again with each change, and compared with the candidate.",
    "mass": "Of the reference's attention, the share on keys that the indexer selects under each layout.",
}


if __name__ == "__main__":  # writes the pages that the tests read, to be looked at
    import sys
    from pathlib import Path

    from verify.drift.html import render

    made = {"large": report(78, 512), "small": report(), "hostile": hostile()}
    made["agrees"] = report(8, 64, diverges=False, full=False)
    for name, one in made.items():
        Path(sys.argv[1], f"{name}.html").write_text(render(one), encoding="utf-8")
