"""Multi-token prediction (DeepSeek-V3, section 2.2): one more decoder layer that drafts the token after the next.

    h'_t = layer(W_eh [norm(embed(token_{t+1})) | norm(h_t)]),   draft logits_t = head(norm(h'_t)) predict token_{t+2}

h is the main model's hidden after its final norm. Later draft steps feed the layer its own output after the
shared-head norm; token t+1 is fed at the position of token t.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .block import DecoderLayer
from .cache import LayerCache
from .config import ModelArgs
from .mask import CausalMask
from .rope import Rotation
from .trace import tap


class SharedHead(nn.Module):
    """The norm before the head; GLM-4.7-Flash keeps a head of its own here too."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        if args.mtp_owns_embeddings:
            self.head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)


class MtpLayer(DecoderLayer):
    """The checkpoint's layer `num_hidden_layers`: a full decoder layer, and what joins token and hidden before it."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__(args, layer)
        self.enorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.hnorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * args.hidden_size, args.hidden_size, bias=False)
        self.shared_head = SharedHead(args)
        if args.mtp_owns_embeddings:
            self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)

    def step(
        self,
        hidden: mx.array,
        embeddings: mx.array,
        rotation: Rotation,
        mask: CausalMask,
        cache: LayerCache | None,
        reuse: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """hidden, embeddings [B, S, hidden] -> (hidden after the shared-head norm, the selection used).

        With `reuse`, the selection is not made anew, but the indexer's key is still written: a later first step
        will look for it.
        """
        joined = mx.concatenate([self.enorm(embeddings), self.hnorm(hidden)], axis=-1)
        x = tap(self, "eh_proj", self.eh_proj(joined))
        x, selection = self(x, rotation, mask, cache, reuse, reuse=reuse is not None)
        return tap(self, "shared_head", self.shared_head.norm(x)), selection


class Draft(NamedTuple):
    """One draft step: logits [B, S, V], hidden after the shared-head norm [B, S, hidden], the tokens fed [B, S]."""

    logits: mx.array
    hidden: mx.array
    tokens: mx.array


def last_selection(selection: mx.array | None, cache: LayerCache) -> mx.array:
    """The last query's selection, [B, 1, K]; where every key was selected, their indices written out."""
    if selection is not None:
        return selection[:, -1:]
    return mx.broadcast_to(mx.arange(cache.length), (cache.batch or 1, 1, cache.length))
