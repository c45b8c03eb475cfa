"""Of IndexShare."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import CONFIG, LAYERS, LOGITS, SPARSE, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    layer = "block.DecoderLayer.__call__"
    yield Fault("indexer-on-shared-layers", "IndexShare", "every layer builds and runs an indexer",
                (Edit("config.ModelArgs.runs_indexer", "self.indexer_types[layer] == FULL", "True"),), CONFIG, "indexer schedule",
                "load, or T > index_topk", "mlx-lm 1418, exo 2208, omlx 2020")
    yield Fault("shared-layer-goes-dense", "IndexShare", "a shared layer attends to everything",
                (Edit(layer, "mask, cache, selection)", "mask, cache, selection if self.runs_indexer else None)"),), LAYERS,
                "self_attn.selection", SPARSE, "ROCm/ATOM 1379")
    yield Fault("shared-from-wrong-layer", "IndexShare", "a full layer hands on what it was handed, not what it selected",
                (Edit("model.Backbone.__call__", "x, selection = layer(x, rotation, mask, layer_cache, selection)",
                     "x, own = layer(x, rotation, mask, layer_cache, selection); "
                     "selection = own if selection is None else selection"),), LOGITS, "self_attn.selection", SPARSE)
    yield Fault("schedule-offset-ignored", "IndexShare", "full layers are 0, freq, 2 freq, whatever the offset",
                (Edit("config._schedule", "max(i - offset + 1, 0) % frequency", "i % frequency"),), CONFIG, "indexer schedule",
                SPARSE, "transformers 5.6-5.10",
                corrected="a checkpoint that does not load came first, until schedules by rule alone were tried")
