"""mlx-lm's caches while it generates: prompt caches kept and read again, and the switch to a quantized one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx_lm.models.cache

from ..cache import LayerCache, cache_bytes
from ..errors import CacheError, GlmDsaError
from ..store import KvQuantization

log = logging.getLogger("glm_dsa")
waiting_for: dict[str, int] = {}  # the start that --kv-bits has not reached yet, and the tokens so far


def load_prompt_cache(original: Callable[..., Any], file_name: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(file_name, *args, **kwargs)
    except GlmDsaError as error:
        raise CacheError(f"{file_name}: {error}") from None
    except Exception as error:  # whatever it stumbles over: missing, truncated, no metadata, other classes
        raise CacheError(
            f"{file_name}: no prompt cache that can be read ({type(error).__name__}: {error}); make it with cache_prompt"
        ) from None


def insert_cache(
    original: Callable[..., None], store: Any, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
) -> None:
    """Keeps for reuse only what every cache holds. After speculative decoding mlx-lm's key can be longer than its caches:
    text from them would silently lack a token, and rewinding them would fail. A draft model may be of another kind."""
    known = (LayerCache, mlx_lm.models.cache.KVCache, mlx_lm.models.cache.QuantizedKVCache)
    is_ours = any(isinstance(cache, LayerCache) for cache in prompt_cache)
    if is_ours and all(isinstance(cache, known) for cache in prompt_cache):
        held = min(len(tokens), *(cache.offset for cache in prompt_cache))
        for cache in prompt_cache:
            cache.trim(cache.offset - held)
        tokens = tokens[:held]
    if tokens:
        original(store, model, tokens, prompt_cache, **kwargs)


def quantize_kv(
    original: Callable[..., None],
    prompt_cache: list[Any],
    quantized_kv_start: int,
    kv_group_size: int,
    kv_bits: int | None,
) -> None:
    """mlx-lm's switch, after each chunk and step, once `quantized_kv_start` tokens are there. Made visible, and what
    cannot work is refused at the first chunk, not when that many tokens have been computed."""
    first = prompt_cache[0] if prompt_cache else None
    if kv_bits is None or not isinstance(first, LayerCache):
        return original(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)
    if first.quantization is None:
        KvQuantization(kv_bits, kv_group_size).check(first.widths.latent, first.widths.rope)
    else:
        first.to_quantized(kv_group_size, kv_bits)  # raises where it is packed otherwise
    was = first.quantization
    original(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)
    now = prompt_cache[0].quantization
    waiting_for.clear()
    if now is None:
        waiting_for.update(start=quantized_kv_start, tokens=first.length)
    elif was is None:
        size = first.dtype.size if first.dtype else 0
        log.info(
            "KV cache: %s from here on, the %d tokens so far included: %d bytes a token and layer instead of %d",
            now, first.length, cache_bytes(first.widths, size, now)[0], cache_bytes(first.widths, size)[0],
        )  # fmt: skip
