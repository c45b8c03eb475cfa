"""Each decoder layer, fed with the reference's input (and, on shared layers, its selection)."""

import pytest

from verify.cases import Case
from verify.core import stages
from verify.engines.definition import Stages

CLAIM = "each layer on the reference's input"


@pytest.mark.parametrize("regime", ["short", "long"])
def test_each_layer_agrees_stage_by_stage(case: Case, judge, regime):
    reference = case.reference(case.lengths[0 if regime == "short" else -1])
    seen: Stages = {}
    for layer in range(case.args.num_hidden_layers):
        injected = {s: v for s, v in reference.injections.items() if stages.layer_of(s) == layer}
        seen |= case.ours.layer(layer, reference.layer_input(layer), reference.layer_selection(layer), injected)
    judge.stages(seen, reference, local=True, replaced=reference.injections)
