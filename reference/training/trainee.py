"""HF's modules as a pupil: the model with its MTP layer, what is learned from one forward pass, and the checkpoint it becomes.

Indexers learn by themselves: each follows the attention of the layers that it serves, on detached inputs (DeepSeek-V3.2
section 2.1; several layers, as in IndexCache, arXiv 2603.12201). Three modes: `dense`, without an indexer; `warm-up`, still
dense, the indexers following; `sparse`, the indexers choosing.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import apply_rotary_pos_emb_interleave

from .. import checkpoints, corpus, hf
from ..mtp import FirstOutput, Placeholder

DRAFTS = 3  # MTP steps trained
BIAS_STEP = 2e-3  # of the correction bias, after each step, towards even load (noaux_tc, DeepSeek-V3 section 2.1.2)

ROTATIONS = {
    hf.INDEXERS["half-split"]: apply_rotary_pos_emb,
    hf.INDEXERS["interleaved"]: apply_rotary_pos_emb_interleave,
}


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
    detached: an indexer learns, but nothing else has a gradient from it (DeepSeek-V3.2). `dense`: it scores, and selects all.
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

    def mode(self, mode: str) -> AbstractContextManager[None]:
        """What the phase needs, in the indexers' places."""
        return hf.standing_in({
            self.model.model.layers[i].self_attn: (
                EveryKey() if mode == "dense" else Teachable(indexer, dense=mode == "warm-up")
            )
            for i, indexer in self.indexers.items()
        })  # fmt: skip

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
        losses: list[torch.Tensor] = []
        stand_ins: dict[Any, torch.nn.Module] = {}
        for step in range(1, DRAFTS + 1):
            fed = torch.cat([tokens[:, step:], tokens.new_full((len(tokens), step), corpus.PAD)], 1)
            with hf.standing_in(stand_ins):
                hidden = self.mtp(
                    self.model.model.embed_tokens(fed), hidden, **{hf.cache_keyword(self.mtp): None}, **shared
                )
            losses.append(self._foretell(hidden, tokens, learn, step + 1))
            assert self.block.selection is not None
            stand_ins = {self.block.layer.self_attn: hf.Given(self.block.selection)}
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


# -- the checkpoint


def export(trainee: Trainee, folder: Path) -> Path:
    """Writes the checkpoint in HF layout, as published ones are: bf16, float32 correction biases, several shards. What was in
    `folder` before is replaced as a whole, at the end.
    """
    target, folder = folder, folder.with_name(f"{folder.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
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
    if target.exists():
        shutil.rmtree(target)
    return folder.rename(target)


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
