"""The backbone and the head, with the interface that mlx-lm expects of a model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import layouts, weights
from .block import DecoderLayer
from .cache import LayerCache, Widths
from .cache_checks import check_caches, check_in_step
from .config import ModelArgs
from .inputs import check_embeddings, check_tokens
from .mask import CausalMask
from .mtp import Draft, MtpLayer, last_selection
from .rope import RotaryEmbedding
from .sharding import shard
from .store import KvQuantization
from .trace import tap

log = logging.getLogger("glm_dsa")


class Backbone(nn.Module):
    """Embedding, decoder layers, final norm. `layers` ends with the MTP layer, as in the checkpoints' numbering."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.depth = args.num_hidden_layers
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers: list[DecoderLayer] = [DecoderLayer(args, i) for i in range(self.depth)]
        if args.num_nextn_predict_layers:
            self.layers.append(MtpLayer(args, self.depth))
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self._rotary = RotaryEmbedding(args)

    def __call__(
        self, tokens: mx.array, cache: list[LayerCache] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """int [B, S] -> hidden after the final norm, [B, S, hidden]."""
        x = tap(self, "embed", self.embed_tokens(tokens) if input_embeddings is None else input_embeddings)
        caches: Sequence[LayerCache | None] = [None] * self.depth if cache is None else cache
        rotation, mask = self.rotation_and_mask(x.shape[1], caches[0])
        selection = None
        for layer, layer_cache in zip(self.layers[: self.depth], caches, strict=True):
            x, selection = layer(x, rotation, mask, layer_cache, selection)
        return tap(self, "norm", self.norm(x))

    def rotation_and_mask(self, length: int, cache: LayerCache | None):
        """For the next `length` tokens after what the cache holds."""
        if cache is None:
            return self._rotary(mx.arange(length)), CausalMask(0, length)
        return self._rotary(positions(length, cache)), cache.mask(length)


class Model(nn.Module):
    """GLM-5.x (`glm_moe_dsa`) or GLM-4.7-Flash (`glm4_moe_lite`)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        self._fingerprint_of: _Fingerprint | None = None
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: list[LayerCache] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """tokens int [B, S] -> logits [B, S, V]. With `input_embeddings` [B, S, hidden] the tokens are not looked up.

        Raises `InputError` for other shapes and dtypes, and for tokens beyond the vocabulary where several come at once, or the
        first one (`inputs.py` says why no decode step is looked at); `CacheError` where `cache` is not this model's. Either
        before the cache is changed.
        """
        if input_embeddings is None:
            check_tokens(inputs, self.args.vocab_size, not cache or _is_empty(cache[0]))
        else:
            check_embeddings(input_embeddings, inputs, self.args.hidden_size)
        if cache is not None:
            check_caches(cache, [self._widths(layer) for layer in self.layers], self.fingerprint, inputs.shape[0])
        return self.logits(self.model(inputs, cache, input_embeddings))

    def logits(self, hidden: mx.array) -> mx.array:
        """The head, on hidden after the final norm."""
        head = self.model.embed_tokens.as_linear if self.args.tie_word_embeddings else self.lm_head
        return tap(self, "logits", head(hidden))

    # -- multi-token prediction

    @property
    def mtp(self) -> MtpLayer | None:
        layers = self.model.layers[self.args.num_hidden_layers :]
        return layers[0] if layers else None  # type: ignore[return-value]

    def draft(
        self,
        hidden: mx.array,
        next_tokens: mx.array,
        cache: LayerCache,
        steps: int,
        choose: Callable[[int, mx.array], mx.array] | None = None,
        main: Sequence[LayerCache] | None = None,
    ) -> list[Draft]:
        """Runs `steps` chained draft steps of the MTP layer.

        hidden [B, S, hidden]: `self.model`'s, of S tokens that the MTP cache has not seen yet.
        next_tokens int [B, S]: the token after each of them. The first step runs over all S, each later one over the
        single token that `choose(step, logits [B, V])` picks from the step before (greedy by default).
        cache: `make_mtp_cache()`. It ends `S + steps - 1` tokens longer. Before the next draft, `trim(steps - 1)`: what
        the chain wrote came from the draft's own hiddens. Then hand the accepted tokens in with the main model's.

        main: the main model's caches, that hold these S tokens by now. Only by them can a drafter know that its own cache
        has seen all the others: one that is empty behind a restored prompt drafts too, but otherwise.

        With `mtp_reuses_selection`, later steps use the first step's selection for the last token as it stands: they
        see neither their own key nor those of earlier drafts. Otherwise each step selects for itself.

        Raises ValueError where the model has no MTP layer; `InputError` as a call of the model does; `CacheError` where the
        cache is not the MTP layer's, or not `main`'s length less S.
        """
        mtp = self._mtp_layer()
        if steps < 1:
            raise ValueError(f"steps = {steps}: at least 1 draft step")
        check_embeddings(hidden, next_tokens, self.args.hidden_size, "hidden")
        check_tokens(next_tokens, self.args.vocab_size, _is_empty(cache))
        check_caches([cache], [self._widths(mtp)], self.fingerprint, hidden.shape[0])
        if main is not None:
            check_in_step(cache, main[0], hidden.shape[1], hidden.shape[0])
        choose = choose or (lambda _, logits: mx.argmax(logits, axis=-1))
        drafts: list[Draft] = []
        tokens, reuse = next_tokens, None
        for step in range(steps):
            rotation, mask = self.model.rotation_and_mask(tokens.shape[1], cache)
            embeddings = self._draft_embeddings(tokens, cache)
            out, selection = mtp.step(hidden, embeddings, rotation, mask, cache, reuse)
            logits = mtp.shared_head.head(out) if self.args.mtp_owns_embeddings else self.logits(out)
            drafts.append(Draft(logits, out, tokens))
            if reuse is None and self.args.mtp_reuses_selection:
                reuse = last_selection(selection, cache)
            hidden = out[:, -1:]
            tokens = choose(step, logits[:, -1])[:, None]
        return drafts

    def _mtp_layer(self) -> MtpLayer:
        if self.mtp is None:
            raise ValueError(
                "this model has no MTP layer (num_nextn_predict_layers = 0, or its checkpoint has no tensors)"
            )
        return self.mtp

    def _draft_embeddings(self, tokens: mx.array, cache: LayerCache) -> mx.array:
        embed = self._mtp_layer().embed_tokens if self.args.mtp_owns_embeddings else self.model.embed_tokens
        if not self.args.mtp_zero_first_embedding:
            return embed(tokens)
        return mx.where((positions(tokens.shape[1], cache) == 0)[..., None], 0, embed(tokens))

    def make_mtp_cache(
        self,
        left_padding: list[int] | None = None,
        start: int = 0,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
    ) -> LayerCache:
        """The MTP layer's cache. Kept apart from `make_cache`, whose length mlx-lm holds to that of `layers`."""
        quantization = None if kv_bits is None else KvQuantization(kv_bits, kv_group_size, quantized_kv_start)
        return LayerCache(self._widths(self._mtp_layer()), quantization, left_padding, start, self.fingerprint)

    # -- what mlx-lm asks for

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers[: self.args.num_hidden_layers]

    def make_cache(
        self,
        left_padding: list[int] | None = None,
        start: int = 0,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
    ) -> list[LayerCache]:
        """One empty cache for each layer of `layers`. Indexer keys are kept on full layers only.

        With `kv_bits`, latents and rotary keys are packed from token `quantized_kv_start` on, and attended so from then
        on however the tokens are cut into calls. Raises `CacheError` where bits or group size do not fit the model.
        """
        quantization = None if kv_bits is None else KvQuantization(kv_bits, kv_group_size, quantized_kv_start)
        return [
            LayerCache(self._widths(layer), quantization, left_padding, start, self.fingerprint)
            for layer in self.layers
        ]

    def _widths(self, layer: DecoderLayer) -> Widths:
        a = self.args
        return Widths(a.kv_lora_rank, a.qk_rope_head_dim, a.index_head_dim if layer.runs_indexer else 0)

    @property
    def fingerprint(self) -> str:
        """Tells this model's caches from those of another, in a few letters: what shapes and turns the cached values,
        and two small norms for the weights. Builds of one model in different bits share it."""
        norms = [self.model.norm.weight, self.layers[0].self_attn.kv_a_layernorm.weight]
        known = self._fingerprint_of
        if known is None or any(a is not b for a, b in zip(norms, known.norms, strict=True)):
            a, digest = self.args, hashlib.sha256()
            shape = [self._widths(layer) for layer in self.layers]
            conventions = [(c.name, str(c.value)) for c in a.conventions]
            digest.update(repr((a.model_type, shape, conventions, a.rope_theta, a.index_topk)).encode())
            for norm in norms:
                digest.update(bytes(memoryview(norm.astype(mx.float32))))  # type: ignore[arg-type]
            known = self._fingerprint_of = _Fingerprint(norms, digest.hexdigest()[:12])
        return known.text

    def sanitize(self, tensors: dict[str, mx.array], dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
        """Checkpoint names and formats -> this model's; drops the MTP layer where the checkpoint has none of it. `dtype`: as
        `weights.to_modules` takes it."""
        tensors, notes = layouts.of_arrays(self.args, tensors)
        for note in notes:
            log.info("%s", note)
        if not weights.has_mtp(self.args, tensors):
            self.drop_mtp()
        return weights.to_modules(self.args, tensors, dtype)

    def drop_mtp(self) -> None:
        """Removes the MTP layer: most MLX builds were converted without it, and strict loading would miss it."""
        self.model.layers = self.layers

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Tensor parallelism, in place: see `sharding.shard`."""
        shard(self.model.layers, group)

    @property
    def cast_predicate(self):
        return lambda name: "e_score_correction_bias" not in name

    @property
    def quant_predicate(self):
        """What a conversion to few bits packs by default: not the indexer, whose near ties decide what is attended to.
        (The router and its correction bias cannot be packed at all.)"""
        return lambda path, _: ".indexer." not in path

    def __repr__(self) -> str:
        return f"Model({self.model_type}, {len(self.layers)} layers, {'with' if self.mtp else 'no'} MTP)"


class _Fingerprint:
    """What `Model.fingerprint` was made of. No list or array of the module's own: those would be parameters."""

    def __init__(self, norms: list[mx.array], text: str) -> None:
        self.norms, self.text = norms, text


def _is_empty(cache: Any) -> bool:
    return isinstance(cache, LayerCache) and cache.empty()


def positions(length: int, cache: LayerCache) -> mx.array:
    """Positions of the next `length` tokens: [S], or [B, S] for a left-padded batch."""
    offset: Any = cache.offset
    return mx.arange(offset, offset + length) if isinstance(offset, int) else offset[:, None] + mx.arange(length)


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """{name: array} of all parameters, under the names of mlx-lm's checkpoints."""
    return dict(tree_flatten(model.parameters()))
