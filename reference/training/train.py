"""Trains the small checkpoint that the gate runs on every day, with HF's own modules: torch, CPU, one core, float32.

    python -m reference.train --out DIR        about two hours; interrupted, the same command goes on where it was

Three modes, as DeepSeek-V3.2 (section 2.1) trains its sparse attention, but from nothing: `dense`, without an indexer;
`warm-up`, still dense, where each indexer learns to follow the attention of the layers that it serves (IndexCache, arXiv
2603.12201); `sparse`, where it chooses. The MTP layer is trained along, three steps sharing its parameters. Batches are
drawn from (seed, step): a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .. import checkpoints, corpus, hf
from .card import TRAINING
from .muon import Muon
from .trainee import Trainee, export

CONFIG = checkpoints.glm_5_2(
    hidden_size=128, intermediate_size=256, moe_intermediate_size=32, kv_lora_rank=64, q_lora_rank=64,
    qk_rope_head_dim=32, qk_nope_head_dim=32, qk_head_dim=64, v_head_dim=32, index_head_dim=48, index_topk=64,
    initializer_range=0.05, max_position_embeddings=8192,
    eos_token_id=[corpus.END, corpus.SEPARATOR], rope_parameters={"rope_theta": 10000, "rope_type": "default"},
    vocab_size=262,
)  # fmt: skip
STATE, LOG = "state.safetensors", "log.jsonl"
THREADS = 1  # two at these widths gain a third only: both layouts are trained side by side instead
MTP_WEIGHT = 0.2


@dataclass(frozen=True)
class Phase:
    """`mode`: dense, warm-up or sparse. `text`: the share of sequences that are library text, the others being recall, of
    at most `distinct` pairs. `rate`: the learning rate, from, to. `drafts`: MTP too, in every second step.
    """

    name: str
    mode: str
    steps: int
    batch: int
    length: int
    text: float
    distinct: int
    rate: tuple[float, float]
    filler: bool = False
    drafts: bool = False


# Short recall first: keys are matched after 300 steps, and longer contexts build on it.
PHASES = (
    Phase("recall", "dense", 600, 16, 128, 0.25, 8, (7e-3, 6e-3)),
    Phase("text", "dense", 1600, 8, 256, 0.5, 20, (6e-3, 4e-3), filler=True, drafts=True),
    Phase("warm-up", "warm-up", 350, 4, 512, 0.5, 32, (4e-3, 3e-3), filler=True, drafts=True),
    Phase("sparse", "sparse", 750, 4, 640, 0.5, 40, (3e-3, 1e-4), filler=True, drafts=True),
)


# -- data


def batch_of(phase: Phase, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int [B, S], learn bool [B, S]) of a step, from (seed, step) alone."""
    random, text = np.random.default_rng([seed, step]), corpus.standard_library(held_out=False)
    rows = []
    texts = round(phase.text * phase.batch)
    for row in range(phase.batch):
        if row < texts:
            tokens = corpus.window(random, text, phase.length)
            rows.append((tokens, np.ones(phase.length, bool)))
        else:
            filler = text if phase.filler and random.random() < 0.5 else None
            rows.append(corpus.recall(random, phase.length, filler, int(random.integers(2, phase.distinct + 1))))
    drawn, learn = zip(*rows, strict=True)
    return torch.as_tensor(np.stack(drawn)), torch.as_tensor(np.stack(learn))


# -- the run


def at(phases: Sequence[Phase], step: int) -> tuple[Phase, float]:
    """The phase of a step, and its learning rate."""
    for phase in phases:
        if step < phase.steps:
            start, end = phase.rate
            return phase, start + (end - start) * step / phase.steps
        step -= phase.steps
    raise IndexError("past the last step")


def recipe_of(config: Mapping[str, Any], phases: Sequence[Phase], indexer_rope: str, seed: int) -> dict[str, Any]:
    """All that the weights follow from, but for this code."""
    return {
        "config": dict(config), "phases": [asdict(p) for p in phases], "indexer_rope": indexer_rope, "seed": seed,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "numpy": np.__version__,
        "library_sha256": corpus.digest(corpus.standard_library(held_out=False)),
    }  # fmt: skip


def train(
    out: Path,
    config: Mapping[str, Any] = CONFIG,
    phases: Sequence[Phase] = PHASES,
    indexer_rope: str = "interleaved",
    seed: int = 0,
    save_every: int = 250,
    stop_after: int | None = None,
) -> Trainee:
    """Trains, from the state in `out` if one is there. Writes state.safetensors and log.jsonl, one line every 50 steps.

    Raises ValueError where the state is of another recipe (or another Python's library).
    """
    out.mkdir(parents=True, exist_ok=True)
    with repeatable(), alone_in(out):
        return _train(out, config, phases, indexer_rope, seed, save_every, stop_after)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two runs in one folder would overwrite each other's state. Raises ValueError; a killed run leaves no lock behind."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError("another run is training in this folder; name another, or wait") from None
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """The same weights, to the bit, on the same kind of machine: sums are cut by threads, and scattered in order."""
    fills: Any = torch.utils.deterministic
    threads, was = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = fills.fill_uninitialized_memory
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # it would cost time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was)
        fills.fill_uninitialized_memory = filled


def _train(
    out: Path,
    config: Mapping[str, Any],
    phases: Sequence[Phase],
    indexer_rope: str,
    seed: int,
    save_every: int,
    stop_after: int | None,
) -> Trainee:
    recipe = recipe_of(config, phases, indexer_rope, seed)
    trainee = Trainee(config, indexer_rope, seed)
    parameters = trainee.parameters()
    optimizer = Muon(parameters)
    step, seconds = _restore(out / STATE, recipe, trainee, optimizer)
    if (out / LOG).exists():  # what was logged after the state was saved comes again
        kept = "".join(f"{json.dumps(line)}\n" for line in _lines(out / LOG) if line["step"] <= step)
        (out / LOG).with_suffix(".part").write_text(kept)
        os.replace((out / LOG).with_suffix(".part"), out / LOG)
    total = sum(p.steps for p in phases)
    last = total if stop_after is None else min(total, step + stop_after)
    started = time.monotonic() - seconds
    seen: dict[str, list[float]] = {}
    progress = tqdm(total=total, initial=step, desc="training", unit="step", disable=None, mininterval=5)
    while step < last:
        phase, rate = at(phases, step)
        losses = trainee.losses(*batch_of(phase, seed, step), phase.mode, phase.drafts and step % 2 == 0)
        loss = losses["text"] + MTP_WEIGHT * losses.get("mtp", 0.0) + losses.get("indexer", 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step(rate * min(1.0, (step + 1) / 50))
        for parameter in parameters.values():
            parameter.grad = None
        trainee.balance()
        step += 1
        for name, value in losses.items():
            seen.setdefault(name, []).append(value.item())
        progress.update()
        if step % 50 == 0 or step == last:
            line = {"step": step, "phase": phase.name, "seconds": round(time.monotonic() - started)}
            line |= {name: round(sum(values) / len(values), 4) for name, values in seen.items()}
            line["load"] = round(trainee.imbalance(), 3)
            with (out / LOG).open("a") as log:
                log.write(json.dumps(line) + "\n")
            seen = {}
        if step % save_every == 0 or step == last:
            _save(out / STATE, recipe, trainee, optimizer, step, time.monotonic() - started)
    progress.close()
    return trainee


def _lines(file: Path) -> list[dict[str, Any]]:
    """The log, but for a last line that was torn by an interruption."""
    lines = []
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(
                f"{file.name}: {line[:80]!r} is no line of this trainer's; remove the file, or name another folder"
            )
        lines.append(entry)
    return lines


def _tensors(trainee: Trainee, optimizer: Muon) -> dict[str, torch.Tensor]:
    """All that a step changes, by name; the tensors themselves."""
    buffers = {n: b for n, b in trainee.model.named_buffers() if n.endswith("e_score_correction_bias")}
    parts = {"parameter": {n: p.data for n, p in trainee.parameters().items()}, "buffer": buffers} | optimizer.state()
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _save(file: Path, recipe: Any, trainee: Trainee, optimizer: Muon, step: int, seconds: float) -> None:
    for name, tensor in _tensors(trainee, optimizer).items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"step {step}: {name} is not finite: the training has diverged; {file.name} is left as it was"
            )
    metadata = {"recipe": json.dumps(recipe), "step": str(step), "seconds": str(seconds)}
    beside = file.with_suffix(".part")
    save_file({n: t.contiguous() for n, t in _tensors(trainee, optimizer).items()}, beside, metadata)
    os.replace(beside, file)  # an interrupted save leaves the state before it


def _restore(file: Path, recipe: Any, trainee: Trainee, optimizer: Muon) -> tuple[int, float]:
    if not file.exists():
        return 0, 0.0
    damaged = f"{file.name}: damaged, or not this trainer's; remove it, or name another folder"
    try:
        with safe_open(file, "pt") as state:
            metadata = state.metadata() or {}
            own, step, seconds = json.loads(metadata["recipe"]), int(metadata["step"]), float(metadata["seconds"])
            kept = {name: state.get_tensor(name) for name in _tensors(trainee, optimizer)}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{damaged} ({error})") from None
    if own != json.loads(json.dumps(recipe)):
        raise ValueError(
            f"{file.name}: the state of another recipe, seed, Python or torch; name another folder, or remove it"
        )
    for name, tensor in _tensors(trainee, optimizer).items():
        if kept[name].shape != tensor.shape or kept[name].dtype != tensor.dtype or not kept[name].isfinite().all():
            raise ValueError(f"{damaged} ({name})")
        tensor.copy_(kept[name])
    if not 0 <= step <= sum(phase["steps"] for phase in own["phases"]):
        raise ValueError(f"{damaged} (step {step})")
    return step, seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", metavar="DIR", required=True, type=Path, help="state, log, and DIR/checkpoint at the end"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "--indexer-rope", choices=sorted(hf.INDEXERS), default="interleaved", help="default: interleaved"
    )
    chosen = parser.parse_args(argv)
    try:
        trainee = train(chosen.out, indexer_rope=chosen.indexer_rope, seed=chosen.seed)
        folder = export(trainee, chosen.out / "checkpoint")
        recipe = recipe_of(CONFIG, PHASES, chosen.indexer_rope, chosen.seed)
        training = json.dumps({"recipe": recipe, "log": _lines(chosen.out / LOG)}, indent=1)
        (folder / TRAINING).write_text(training + "\n")
    except (ValueError, OSError, SafetensorError) as error:
        parser.exit(1, f"{chosen.out}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(
            130, f"{chosen.out}: interrupted; the same command goes on from the last state saved, if there is one\n"
        )
    print(folder)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, not negative, below 2^63")
    return int(text)


if __name__ == "__main__":
    main()
