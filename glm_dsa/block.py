"""The decoder layer. It carries the selection from full layers to shared ones (IndexShare, arXiv 2603.12201)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .attention import MultiHeadLatentAttention
from .cache import LayerCache
from .config import ModelArgs
from .mask import CausalMask
from .moe import MLP, MixtureOfExperts
from .rope import Rotation
from .trace import tap


class DecoderLayer(nn.Module):
    """x + attention(norm x), then + feed-forward(norm x)."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(args, with_indexer=args.runs_indexer(layer))
        self.mlp: nn.Module = (
            MixtureOfExperts(args) if args.is_sparse(layer) else MLP(args.hidden_size, args.intermediate_size)
        )
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    @property
    def runs_indexer(self) -> bool:
        return "indexer" in self.self_attn

    def __call__(
        self,
        x: mx.array,
        rotation: Rotation,
        mask: CausalMask,
        cache: LayerCache | None = None,
        selection: mx.array | None = None,
        reuse: bool = False,
    ) -> tuple[mx.array, mx.array | None]:
        """x [B, S, hidden], and the selection of the layer below -> (x, the selection used here).

        A full layer makes its own selection; a shared layer uses the one that it is handed. With `reuse` a full layer
        too uses what it is handed, and only writes its indexer's keys (later draft steps of MTP).
        """
        if selection is not None:  # mx.checkpoint would differentiate indices that are handed in
            selection = mx.stop_gradient(selection)
        normed = tap(self, "input_layernorm", self.input_layernorm(x))
        q_latent = self.self_attn.query_latent(normed)
        if self.runs_indexer:
            keys = self.self_attn.indexer.keys_so_far(normed, rotation, cache)
            if not reuse:
                selection = self.self_attn.indexer(normed, q_latent, keys, rotation, mask)
        x = x + self.self_attn(normed, q_latent, rotation, mask, cache, selection)
        normed = tap(self, "post_attention_layernorm", self.post_attention_layernorm(x))
        return tap(self, "output", x + tap(self, "mlp_output", self.mlp(normed))), selection
