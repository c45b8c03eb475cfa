"""Which RoPE layout the indexers were trained under, as the first layers' weights tell, beside what config.json says."""

import hashlib
from pathlib import Path

import pytest

from glm_dsa import ModelArgs
from verify.core.report import MEASURED, Comparison
from verify.engines import layout_evidence
from verify.gate.options import LAYOUT
from verify.release.run import Trial

CLAIM = "the indexer's layout, by its weights"
STAGE = "indexer_rope"


def test_layout(trial: Trial, judge, gate, request):
    """Attention mass under both layouts; the layers themselves are judged under config.json's."""
    gate.not_verified.pop(LAYOUT, None)
    gate.told.add(CLAIM)
    release = trial.release
    args = ModelArgs.from_dict(release.headers.config)  # its own index_topk, whatever --index-topk says
    if not args.has_indexer:
        pytest.skip("no indexer: there is no layout to tell")
    if not set(range(layout_evidence.layers_of(args))) <= set(release.layers):
        pytest.skip(f"--layers leaves out some of layers 0-{layout_evidence.layers_of(args) - 1}, by which it is told")
    file = request.config.getoption("--prompt-file")
    trial.tell("attention under both RoPE layouts")
    try:
        texts = layout_evidence.texts_of(release.folder, args, None if file is None else Path(file))
    except ValueError as error:
        pytest.skip(str(error))

    def check() -> None:
        try:
            evidence = layout_evidence.measure(release.folder, release.headers.config, args, texts)
        except (ValueError, MemoryError) as error:
            pytest.skip(str(error) or "out of memory")
        if evidence.doubt:
            seen = layout_evidence.figures(evidence, texts)
            gate.add(Comparison(CLAIM, trial.name, STAGE, MEASURED, note=seen))
            pytest.skip(f"{evidence.doubt}; config.json says {args.indexer_rope}")
        agrees, line = layout_evidence.judgement(evidence, args, texts)
        if agrees:
            gate.add(Comparison(CLAIM, trial.name, STAGE, MEASURED, note=line))
        judge.holds(trial.name, STAGE, agrees, line)

    trial.once(judge, f"{STAGE} {hashlib.sha256(texts.tobytes()).hexdigest()}", check)
