"""Trains the small checkpoint that the gate runs on every day, with HF's own modules: torch, CPU, one core, float32.

    python -m reference.train --out DIR        about two hours; interrupted, the same command goes on where it was

Three modes, as DeepSeek-V3.2 (section 2.1) trains its sparse attention, but from nothing: `dense`, without an indexer;
`warm-up`, still dense, where each indexer learns to follow the attention of the layers that it serves (IndexCache, arXiv
2603.12201); `sparse`, where it chooses. The MTP layer is trained along, three steps sharing its parameters. Batches are
drawn from (seed, step): a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import copy
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
from torch.nn import functional as F
from tqdm import tqdm
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import apply_rotary_pos_emb_interleave

from . import checkpoints, corpus, hf
from .card import TRAINING
from .mtp import FirstOutput, Placeholder

CONFIG = checkpoints.glm_5_2(
    hidden_size=128, intermediate_size=256, moe_intermediate_size=32, kv_lora_rank=64, q_lora_rank=64,
    qk_rope_head_dim=32, qk_nope_head_dim=32, qk_head_dim=64, v_head_dim=32, index_head_dim=48, index_topk=64,
    initializer_range=0.05, max_position_embeddings=8192,
    eos_token_id=[corpus.END, corpus.SEPARATOR], rope_parameters={"rope_theta": 10000, "rope_type": "default"},
    vocab_size=262,
)  # fmt: skip
STATE, LOG = "state.safetensors", "log.jsonl"
THREADS = 1  # two at these widths gain a third only: both layouts are trained side by side instead
DRAFTS = 3  # MTP steps trained
MTP_WEIGHT = 0.2
BIAS_STEP = 2e-3  # of the correction bias, after each step, towards even load (noaux_tc, DeepSeek-V3 section 2.1.2)


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

ROTATIONS = {
    hf.INDEXERS["half-split"]: apply_rotary_pos_emb,
    hf.INDEXERS["interleaved"]: apply_rotary_pos_emb_interleave,
}

# -- what HF's modules need, to be taught


class EveryKey(torch.nn.Module):
    """In the indexer's place while attention is dense: selects all."""

    def forward(self, x: torch.Tensor, q_latent: Any, rotation: Any, mask: torch.Tensor, *_: Any, **__: Any) -> Any:
        return every_key(mask)


def every_key(mask: torch.Tensor) -> torch.Tensor:
    """[B, S, T] -> the selection of all T keys, int [B, S, T]."""
    return torch.arange(mask.shape[-1], dtype=torch.int32).expand(mask.shape)


class Teachable(torch.nn.Module):
    """In the place of an indexer of HF's, with its weights: `scores` [B, S, T] carry gradients, and it selects by them.

    HF's own forward stands under no_grad, returns integers, and copies the keys for each query. x and q_latent are
    detached: an indexer learns, but nothing learns for its sake (DeepSeek-V3.2). `dense`: it scores, and selects all.
    """

    def __init__(self, indexer: Any, dense: bool = False) -> None:
        super().__init__()
        self.indexer, self.dense = indexer, dense
        self.scores = torch.empty(0)

    def forward(
        self, x: torch.Tensor, q_latent: torch.Tensor, rotation: Any, mask: torch.Tensor, *_: Any, **__: Any
    ) -> Any:
        self.scores = index_scores(self.indexer, x.detach(), q_latent.detach(), rotation, mask)
        if self.dense:
            return every_key(mask)
        topk = min(self.indexer.index_topk, mask.shape[-1])
        return self.scores.detach().topk(topk, dim=-1).indices.int()


def index_scores(
    indexer: Any, x: torch.Tensor, q_latent: torch.Tensor, rotation: Any, mask: torch.Tensor
) -> torch.Tensor:
    """I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s]) / sqrt(D) from the weights of HF's indexer, in its layout. [B, S, T]"""
    (batch, length, _), heads, rotary = x.shape, indexer.n_heads, indexer.qk_rope_head_dim
    q = indexer.wq_b(q_latent).view(batch, length, heads, -1)
    k = indexer.k_norm(indexer.wk(x))[:, :, None]
    rotate = ROTATIONS[type(indexer)]
    q_rope, k_rope = rotate(q[..., :rotary], k[..., :rotary], *rotation, unsqueeze_dim=2)
    q = torch.cat([q_rope, q[..., rotary:]], -1) * indexer.softmax_scale
    k = torch.cat([k_rope, k[..., rotary:]], -1)[:, :, 0]
    per_head = F.relu(q.flatten(1, 2) @ k.mT).view(batch * length, heads, -1)
    w = indexer.weights_proj(x).view(batch * length, 1, heads) * heads**-0.5
    return torch.bmm(w, per_head).view(batch, length, -1) + mask


def follow(scores: torch.Tensor, attention: torch.Tensor, selected: torch.Tensor | None) -> torch.Tensor:
    """KL(attention || softmax(scores)), mean over queries; over the selected keys only where a selection is given.

    scores [B, S, T] with the mask's lowest numbers on keys that may not be seen; attention [B, S, T], rows that sum to 1.
    """
    if selected is not None:
        scores, attention = (z.gather(-1, selected.long()) for z in (scores, attention))
    predicted = F.log_softmax(scores, -1)
    return (torch.special.xlogy(attention, attention) - attention * predicted).sum(-1).mean()


class Trainee:
    """The model, its MTP layer, and one forward pass with everything that is learned from it."""

    def __init__(self, config: Mapping[str, Any], indexer_rope: str, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = hf.build(config, with_mtp=True).train()
            count = config["num_hidden_layers"]
            self.mtp = MtpLayer(self.model.config, Placeholder, type(self.model.model.norm), count)
            torch.nn.init.normal_(self.mtp.eh_proj.weight, std=config["initializer_range"])
        self._quieten()
        self.layers = self.model.model.layers[:count]
        for layer in self.model.model.layers:
            if layer.self_attn.indexer is not None:
                layer.self_attn.indexer.__class__ = hf.INDEXERS[indexer_rope]
        self.indexers = {
            i: layer.self_attn.indexer
            for i, layer in enumerate(self.model.model.layers)
            if layer.self_attn.indexer is not None
        }
        self.block = FirstOutput(self.model.model.layers[count])
        self.mtp.mtp_block = self.block
        self.model.config._experts_implementation = "grouped_mm"
        self.config, self.serves = config, served(list(self.indexers), count + 1)
        self.indexer_rope = indexer_rope
        self.loads: dict[Any, torch.Tensor] = {}  # of this step's, by router
        self.last_loads: dict[Any, torch.Tensor] = {}
        for layer in self.model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._count)

    @torch.no_grad()
    def _quieten(self) -> None:
        """Tokens loud, layers quiet: as HF draws them, the first layer's noise drowns the tokens, and to match one key with
        another takes three times as many steps.
        """
        self.model.model.embed_tokens.weight.div_(self.model.config.initializer_range)
        for name, parameter in self.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter.mul_(0.25)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """By name: HF's own names, and `mtp.` for what joins the MTP layer to the model."""
        return dict(self.model.named_parameters()) | self.joining()

    def joining(self) -> dict[str, torch.nn.Parameter]:
        return {f"mtp.{n}": p for n, p in self.mtp.named_parameters() if not n.startswith("mtp_block")}

    @contextmanager
    def mode(self, mode: str) -> Iterator[None]:
        """Puts what the phase needs in the indexers' places."""
        for i, indexer in self.indexers.items():
            taught = EveryKey() if mode == "dense" else Teachable(indexer, dense=mode == "warm-up")
            self.model.model.layers[i].self_attn.indexer = taught
        try:
            yield
        finally:
            for i, indexer in self.indexers.items():
                self.model.model.layers[i].self_attn.indexer = indexer

    def losses(self, tokens: torch.Tensor, learn: torch.Tensor, mode: str, drafts: bool) -> dict[str, torch.Tensor]:
        """tokens int [B, S], learn bool [B, S]: which of them are to be foretold."""
        model, (batch, length) = self.model.model, tokens.shape
        with self.mode(mode), watched(() if mode == "dense" else model.layers) as attention:
            x = model.embed_tokens(tokens)
            positions = torch.arange(length)[None]
            shared = {
                "attention_mask": hf.additive_causal_mask(batch, length, length, x.dtype),
                "position_ids": positions,
                "position_embeddings": model.rotary_emb(x, position_ids=positions),
            }
            selections: dict[int, torch.Tensor | None] = {-1: None}
            for i, layer in enumerate(self.layers):
                x, selections[i] = layer(x, prev_topk_indices=selections[i - 1], **shared)
            hidden = model.norm(x)
            out = {"text": self._foretell(hidden, tokens, learn, 1)}
            if drafts:
                out["mtp"], selections[len(self.layers)] = self._drafts(hidden, tokens, learn, shared)
            if mode != "dense":
                followed = []
                for i in (i for i in self.indexers if i in selections):
                    target = torch.stack([attention[j] for j in self.serves[i]]).mean(0)
                    scores = model.layers[i].self_attn.indexer.scores
                    followed.append(follow(scores, target, selections[i] if mode == "sparse" else None))
                out["indexer"] = torch.stack(followed).mean()
        return out

    def _foretell(self, hidden: torch.Tensor, tokens: torch.Tensor, learn: torch.Tensor, ahead: int) -> torch.Tensor:
        """Mean cross entropy of the tokens `ahead` of each hidden, where they are to be learned."""
        wanted = learn[:, ahead:]
        return F.cross_entropy(
            self.model.lm_head(hidden[:, : hidden.shape[1] - ahead][wanted]), tokens[:, ahead:][wanted]
        )

    def _drafts(
        self, hidden: torch.Tensor, tokens: torch.Tensor, learn: torch.Tensor, shared: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(mean loss of all draft steps, the first one's selection, which the later ones reuse).

        Step k is fed the token k ahead and the hidden of the step before, over all positions at once, as such models are
        trained. Drafting differs: there later steps attend to the keys that the first one wrote.
        """
        attention: Any = self.block.layer.self_attn
        taught, losses = attention.indexer, []
        try:
            for step in range(1, DRAFTS + 1):
                fed = torch.cat([tokens[:, step:], tokens.new_full((len(tokens), step), corpus.PAD)], 1)
                hidden = self.mtp(self.model.model.embed_tokens(fed), hidden, past_key_values=None, **shared)
                losses.append(self._foretell(hidden, tokens, learn, step + 1))
                assert self.block.selection is not None
                attention.indexer = Given(self.block.selection)
        finally:
            attention.indexer = taught
        return torch.stack(losses).sum() / DRAFTS, self.block.selection

    def _count(self, router: Any, args: Any, out: Any) -> None:
        if router.training:
            load = torch.bincount(out[2].flatten(), minlength=router.num_experts)
            self.loads[router] = self.loads.get(router, torch.zeros_like(load)) + load

    @torch.no_grad()
    def balance(self) -> None:
        """Moves each router's correction bias: experts with less than their share up, with more down."""
        self.last_loads, self.loads = self.loads, {}
        for router, load in self.last_loads.items():
            router.e_score_correction_bias += BIAS_STEP * torch.sign(load.float().mean() - load)

    def imbalance(self) -> float:
        """The busiest expert's load over its fair share, of the worst layer in the last step."""
        return max(float(load.max() / load.float().mean()) for load in self.last_loads.values())


class Given(torch.nn.Module):
    """In an indexer's place: answers with a selection made before."""

    def __init__(self, selection: torch.Tensor) -> None:
        super().__init__()
        self.selection = selection

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.selection


@contextmanager
def watched(layers: Any) -> Iterator[dict[int, torch.Tensor]]:
    """{layer: its attention, mean over heads, [B, S, T]} of what runs inside; of a layer's first run."""
    seen: dict[int, torch.Tensor] = {}

    def note(i: int) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            if i not in seen:
                seen[i] = out[1].detach().mean(1)

        return hook

    hooks = [layer.self_attn.register_forward_hook(note(i)) for i, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def served(full: list[int], layers: int) -> dict[int, list[int]]:
    """Which layers attend by each full layer's selection: itself, and the shared ones behind it."""
    return {i: list(range(i, following)) for i, following in zip(full, [*full[1:], layers], strict=True)}


# -- optimizer


class Muon:
    """Muon (with AdamW's RMS) for matrices and stacks of them, Adam for the rest.

    torch.optim.Muon orthogonalizes in bfloat16, which this CPU emulates (15 times slower), and refuses experts' stacks.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        rest = ("embed_tokens", "lm_head", "mlp.gate.")
        self.matrices: dict[str, Any] = {
            n: p for n, p in parameters.items() if p.dim() >= 2 and not any(r in n for r in rest)
        }
        self.others = {n: p for n, p in parameters.items() if n not in self.matrices}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.first = {n: torch.zeros_like(p) for n, p in self.others.items()}
        self.second = {n: torch.zeros_like(p) for n, p in self.others.items()}
        self.steps = {n: torch.zeros((), dtype=torch.int64) for n in self.others}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"momentum": self.momentum, "first": self.first, "second": self.second, "steps": self.steps}

    @torch.no_grad()
    def step(self, lr: float, decay: float = 0.05) -> None:
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, p in self.matrices.items():
            if p.grad is not None:
                shapes.setdefault(tuple(p.shape), []).append(name)
        for names in shapes.values():
            for n in names:
                self.momentum[n].lerp_(self.matrices[n].grad, 0.05)
            step = orthogonal(torch.stack([torch.lerp(self.matrices[n].grad, self.momentum[n], 0.95) for n in names]))
            for n, update in zip(names, step, strict=True):
                p = self.matrices[n]
                p.mul_(1 - lr * decay).sub_(update, alpha=0.2 * lr * max(p.shape[-2:]) ** 0.5)
        for name, p in self.others.items():
            if p.grad is None:
                continue
            self.steps[name] += 1
            first, second, t = self.first[name], self.second[name], int(self.steps[name])
            first.lerp_(p.grad, 0.1)
            second.lerp_(p.grad.square(), 0.05)
            p.sub_(first / (1 - 0.9**t) / ((second / (1 - 0.95**t)).sqrt() + 1e-8), alpha=lr)


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices, by five quintic Newton-Schulz steps (Jordan 2024). [..., m, n]"""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


# -- data


def batch_of(phase: Phase, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int [B, S], learn bool [B, S]) of a step, from (seed, step) alone."""
    random, text = np.random.default_rng([seed, step]), corpus.library(held_out=False)
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
        "library_sha256": corpus.digest(corpus.library(held_out=False)),
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
    with repeatable():
        return _train(out, config, phases, indexer_rope, seed, save_every, stop_after)


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
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(config, phases, indexer_rope, seed)
    trainee = Trainee(config, indexer_rope, seed)
    parameters = trainee.parameters()
    optimizer = Muon(parameters)
    step, seconds = _restore(out / STATE, recipe, trainee, optimizer)
    if (out / LOG).exists():  # what was logged after the state was saved comes again
        kept = [line for line in _lines(out / LOG) if line["step"] <= step]
        (out / LOG).write_text("".join(f"{json.dumps(line)}\n" for line in kept))
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
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _tensors(trainee: Trainee, optimizer: Muon) -> dict[str, torch.Tensor]:
    """All that a step changes, by name; the tensors themselves."""
    buffers = {n: b for n, b in trainee.model.named_buffers() if n.endswith("e_score_correction_bias")}
    parts = {"parameter": {n: p.data for n, p in trainee.parameters().items()}, "buffer": buffers} | optimizer.state()
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _save(file: Path, recipe: Any, trainee: Trainee, optimizer: Muon, step: int, seconds: float) -> None:
    metadata = {"recipe": json.dumps(recipe), "step": str(step), "seconds": str(seconds)}
    beside = file.with_suffix(".part")
    save_file({n: t.contiguous() for n, t in _tensors(trainee, optimizer).items()}, beside, metadata)
    os.replace(beside, file)  # an interrupted save leaves the state before it


def _restore(file: Path, recipe: Any, trainee: Trainee, optimizer: Muon) -> tuple[int, float]:
    if not file.exists():
        return 0, 0.0
    with safe_open(file, "pt") as state:
        metadata = state.metadata()
        if json.loads(metadata["recipe"]) != json.loads(json.dumps(recipe)):
            raise ValueError(
                f"{file}: the state of another recipe, seed, Python or torch; name another folder, or remove it"
            )
        for name, tensor in _tensors(trainee, optimizer).items():
            tensor.copy_(state.get_tensor(name))
    return int(metadata["step"]), float(metadata["seconds"])


# -- the checkpoint


def export(trainee: Trainee, folder: Path) -> Path:
    """Writes the checkpoint in HF layout, as published ones are: bf16, float32 correction biases, several shards."""
    model = trainee.model
    stored = copy.deepcopy(model).to(torch.bfloat16)
    for (_, kept), (name, buffer) in zip(model.named_buffers(), stored.named_buffers(), strict=True):
        if name.endswith("e_score_correction_bias"):
            buffer.data = kept.data.clone()
    with hf.quiet():
        stored.save_pretrained(folder, max_shard_size="2MB")
    prefix = f"model.layers.{len(trainee.layers)}."
    names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
    own = {f"{prefix}{names[n.split('.')[1]]}.weight": p.data.to(torch.bfloat16) for n, p in trainee.joining().items()}
    checkpoints.add_shard(folder, "model-mtp.safetensors", own)
    (folder / "config.json").write_text(json.dumps(published(trainee), indent=2) + "\n")
    checkpoints.write_tokenizer(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone
    return folder


def published(trainee: Trainee) -> dict[str, Any]:
    """The config with every key that zai-org's has, those too that follow from others."""
    config, count = trainee.config, len(trainee.layers)
    dense = config["first_k_dense_replace"]
    return {
        **config,
        "dtype": "bfloat16",
        "head_dim": config["qk_nope_head_dim"],
        "index_topk_pattern": None,
        "indexer_rope_interleave": trainee.indexer_rope == "interleaved",
        "indexer_types": ["full" if i in trainee.indexers else "shared" for i in range(count)],
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (count - dense),
        "transformers_version": transformers.__version__,
    }


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
        parser.exit(130, f"{chosen.out}: interrupted; the same command goes on from the last state saved\n")
    print(folder)


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: a whole number, not negative, is due")
    return int(text)


if __name__ == "__main__":
    main()
