"""The gate's inputs of a sharper eye are what they are said to be: scores close to each other, norms near 0 and below."""

import pytest

from reference import checkpoints
from reference.stored import read_tensors, weights_of
from tests.test_sensitivity import caught, check_of, layers
from verify import cases, faults


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    spec = next(s for s in cases.default_specs() if s.name == "clustered")
    return cases.Case(spec, tmp_path_factory.mktemp("clustered"), seed=0)


def test_most_keys_score_within_a_quarter_of_the_best(case):
    """Upper bits are alike: sign, exponent, two of the fraction."""
    reference = case.reference(case.long)
    assert case.long == 32 * case.args.index_topk
    for stage in (s for s in reference.hf if s.endswith("indexer.scores")):
        late = reference.hf[stage][0, -8:, : case.long - 8]
        near = abs(late - late.max(-1, keepdims=True)) < 0.25 * abs(late.max(-1, keepdims=True))
        assert near.mean() > 0.8, stage
        assert reference.decision(stage.replace("scores", "topk"), local=False).torn.mean() < 0.1, "ties would excuse all"


@pytest.mark.parametrize("name", ["topk-bucket-overflow", "topk-bucket-overflow-at-8"])
@pytest.mark.parametrize("check", ["layers", "decode"])
def test_a_whole_model_shows_what_a_lossy_choice_loses(case, name, check, monkeypatch):
    """Uncached, and from a cache."""

    def run():
        if check == "layers":
            return layers(case)
        return caught("test_cache.test_cuts", case=case, name="decode")

    with faults.seeded(name):
        found = run()
    assert found is not None, "the gate did not notice"
    assert found.stage.endswith("indexer.topk") or check == "decode"
    assert run() is None


def test_every_norm_of_the_gates_cases_is_uneven(case):
    norms = [name for name in read_tensors(case.folder).names if "norm" in name and name.endswith("weight")]
    kinds = {name.rsplit(".", 2)[-2] for name in norms}
    assert kinds >= {"input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "k_norm", "norm",
                     "enorm", "hnorm"}  # fmt: skip
    for name in norms:
        weight = case.weights(name)
        assert weight.min() < -0.5, name
        assert (abs(weight) < 0.05).any(), name


def test_elsewhere_norms_are_as_before(tmp_path):
    folder = checkpoints.write(tmp_path, checkpoints.tiny(num_hidden_layers=1, first_k_dense_replace=0))
    assert weights_of(folder)("model.norm.weight").min() >= 0.6


def test_a_norms_magnitude_is_caught(case):
    with faults.seeded("norm-weight-magnitude"):
        found = layers(case)
    check_of(found, "layers.0.input_layernorm")
