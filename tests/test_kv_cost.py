"""What packing the cache saves, and what it costs: at 16k tokens, with GLM-5.2's latent, rotary and indexer widths."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

import glm_dsa
from reference import checkpoints

ROOT = Path(__file__).parent.parent
TOKENS = 16384
CONFIG = checkpoints.tiny(
    num_hidden_layers=2,
    indexer_types=["full", "shared"],
    first_k_dense_replace=1, hidden_size=256, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=256,
    kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=192, qk_head_dim=256, v_head_dim=256,
    index_head_dim=128, index_n_heads=32, index_topk=2048, num_nextn_predict_layers=0,
)  # fmt: skip
SCRIPT = """
import json, re, sys
import mlx.core as mx
import glm_dsa
model = glm_dsa.Model(glm_dsa.ModelArgs.from_dict(json.loads(sys.argv[1])))
mx.eval(model.parameters())
cache = model.make_cache(**json.loads(sys.argv[2]))
for layer in cache:
    for _ in range(16):
        if layer.has_indexer:
            layer.append_index_keys(mx.random.normal((1, 1024, 128)))
        layer.append(mx.random.normal((1, 1024, 576)))
        mx.eval(layer.latents.plain.buffers, layer.latents.packed.buffers, layer.index_keys.buffers)
for token in range(3):
    mx.eval(model(mx.array([[token]]), cache))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps([peak, sum(c.nbytes for c in cache)]))
"""


def filled(options):
    """A model of random weights, and a cache of 16k random tokens."""
    mx.random.seed(0)
    model = glm_dsa.Model(glm_dsa.ModelArgs.from_dict(CONFIG))
    mx.eval(model.parameters())
    return model, fill(model.make_cache(**options))


def fill(cache):
    for layer in cache:
        for _ in range(TOKENS // 1024):
            if layer.has_indexer:
                layer.append_index_keys(mx.random.normal((1, 1024, 128)))
            layer.append(mx.random.normal((1, 1024, 576)))
            mx.eval(layer.latents.plain.buffers, layer.latents.packed.buffers, layer.index_keys.buffers)
    return cache


def step(model, cache, token) -> float:
    begun = time.perf_counter()
    mx.eval(model(mx.array([[token]]), cache))
    return time.perf_counter() - begun


def test_decode_beyond_index_topk_is_as_fast_packed():
    """At most 1.15 times; in turns, in one run, since machines are noisy."""
    model, plain = filled({})
    packed = fill(model.make_cache(kv_bits=8))
    ratios = []
    for token in range(12):
        float_time = step(model, plain, token)
        ratios.append(step(model, packed, token) / float_time)
    assert statistics.median(ratios[2:]) <= 1.15


def test_one_step_unpacks_what_was_selected_only():
    """Peak memory of a step: 2048 of 16k tokens, not all of them."""
    model, cache = filled({"kv_bits": 8})
    step(model, cache, 3)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step(model, cache, 4)
    everything = TOKENS * 576 * 4
    scores = TOKENS * 32 * 4  # of the indexer's heads
    selected = 2048 * 576 * 4
    assert mx.get_peak_memory() - before < 2 * (scores + 2 * selected)
    assert 2 * (scores + 2 * selected) < everything


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_the_processs_peak_falls_by_what_the_cache_saves():
    def measured(options):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(CONFIG), json.dumps(options)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    (float_peak, float_bytes), (packed_peak, packed_bytes) = measured({}), measured({"kv_bits": 8})
    grown = TOKENS + 256  # a step of growth
    assert float_bytes == grown * (2 * 2304 + 512)
    assert packed_bytes == grown * (2 * 648 + 512)
    assert float_peak - packed_peak > 0.8 * (float_bytes - packed_bytes)
