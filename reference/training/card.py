"""The model card of the small checkpoint, written from what was measured: no figure in it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MEASURED, TRAINING = "measured.json", "training.json"

HEAD = """---
license: mit
pipeline_tag: text-generation
tags: [glm_moe_dsa, test-model]
---
# {name}

A `glm_moe_dsa` model (GLM-5.x: MLA, lightning indexer, IndexShare, experts, MTP) of {millions:.1f} million parameters that has
really been trained: test data, for the gate of glm-dsa and for whoever wants the architecture at a size that a CPU runs.
It completes Python, recalls what stands far above in its context, and is good for nothing else.

Written by `python -m reference.measure`; `make train` repeats the training.

## Recipe

{layers} layers ({full} with an indexer: freq {freq}, offset {offset}), hidden {hidden}, {experts} experts (top {topk}, one
shared), {heads} index heads, `index_topk` {index_topk}, one MTP layer, {rope} indexer RoPE. Bytes are tokens; six special
ones. HF's own modules, float32, Muon and Adam, seed {seed}, {minutes:.0f} minutes on one core. The text is the standard
library of Python {python} (PSF licence), nine modules or packages of ten, by a hash of their names; the recall lines are
generated (`reference/corpus.py`).

"""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def percent(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.0%} [{interval['low']:.0%}, {interval['high']:.0%}]"


def number(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def card(folder: Path, measured: Mapping[str, Any]) -> str:
    """From config.json and training.json of the checkpoint's folder, and what was measured."""
    config, training = (json.loads((folder / file).read_text()) for file in ("config.json", TRAINING))
    recipe, log = training["recipe"], training["log"]
    layers, freq, offset = (config[k] for k in ("num_hidden_layers", "index_topk_freq", "index_skip_topk_offset"))
    out = HEAD.format(
        name=f"glm-dsa-small, {recipe['indexer_rope']}", millions=measured["parameters"] / 1e6, layers=layers, freq=freq,
        full=", ".join(str(i) for i in range(layers) if max(i - offset + 1, 0) % freq == 0), offset=offset,
        hidden=config["hidden_size"], experts=config["n_routed_experts"], topk=config["num_experts_per_tok"],
        heads=config["index_n_heads"], index_topk=config["index_topk"], rope=recipe["indexer_rope"], seed=recipe["seed"],
        minutes=log[-1]["seconds"] / 60, python=recipe["python"],
    )  # fmt: skip
    last = {line["phase"]: line for line in log}
    out += table(
        ["phase", "attention", "steps", "batch x tokens", "text", "loss", "MTP", "KL of the indexer", "busiest expert"],
        [
            [p["name"], p["mode"], p["steps"], f"{p['batch']} x {p['length']}", f"{p['text']:.0%}",
             *(last[p["name"]].get(k, "") for k in ("text", "mtp", "indexer")), f"{last[p['name']]['load']:.1f} x its share"]
            for p in recipe["phases"]
        ],
    )  # fmt: skip
    out += "\nLosses in nats, means over each phase's last 50 steps; `text` is the share of library text, the rest is recall.\n"
    bits, recall, mass = (measured[k] for k in ("bits_per_byte", "recall", "captured_mass"))
    captured = [*([rope, number(m)] for rope, m in mass["by_layout"].items()), ["random keys", f"{mass['chance']:.3f}"]]
    out += f"""
## Measured

On modules and keys that it was not trained on; means with 95 % intervals (of texts by bootstrap, of prompts Wilson's).

{table(["bits per byte", "held-out library text"], [[k, number(v)] for k, v in bits.items()])}
Recall of a three-letter value, `key=VALUE`, said 2, 4 and 8 times `index_topk` tokens before, greedily, with the keys that the
indexers choose, and with the same number of the most recent or of random ones in their place:

{table(["distance", *next(iter(recall.values()))], [[f"{d} x", *map(percent, by.values())] for d, by in recall.items()])}
Attention mass that falls on the indexers' choice, dense attention being asked, over all layers (`reference/layout.py`):

{table(["indexer RoPE", "mass captured"], captured)}
Ratio {mass["ratio"]:.2f}: the weights say {mass["layout"]}.

{table(["greedy draft steps", "all accepted"], [[step, percent(a)] for step, a in measured["accepted"].items()])}
A sample, at temperature 0.7; the first line is the prompt:

```
{measured["sample"].replace("```", "'''")}
```

## Files

{table(["file", "SHA-256"], [[f"`{file}`", f"`{digest}`"] for file, digest in measured["sha256"].items()])}"""
    return out
