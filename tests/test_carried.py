"""The catalogue's faults in HF's modules and in mlx-lm's definition: that they are the same mistakes."""

import pytest

from tests.carried import IN_HF, IN_STOCK, NOT_CARRIED, write_stock
from tests.carried.compared import CLEAR, TOLERANCE, Trial
from tests.carried.in_hf import Edit, patched, places
from verify.faults import CATALOGUE
from verify.faults.edits import unwrapped

SAMPLE = list(IN_HF)[::9]  # `python -m tests.carried` tries all of them

STREAMED = [  # functions, attributes that copies keep, a class, the frequencies, a norm outside of the layers, experts in chunks
    "indexer-selects-recent",
    "kv-latent-unnormed",
    "shared-from-wrong-layer",
    "yarn-ramp-reversed",
    "final-norm-skipped",
    "experts-left-sorted",
]
STOCK = [
    "indexer-no-relu",
    "yarn-ramp-reversed",
    "mask-one-too-far",
    "experts-of-another-token",
    "router-groups-ignored",
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return Trial(tmp_path_factory.mktemp("carried"))


def test_every_fault_is_carried_or_a_reason_is_given():
    assert len(IN_HF) >= 75
    assert set(IN_HF) | set(NOT_CARRIED) == set(CATALOGUE)
    assert not set(IN_HF) & set(NOT_CARRIED)
    assert not any(CATALOGUE[name].equivalent for name in IN_HF)
    assert len(IN_STOCK) >= 25
    assert set(IN_STOCK) <= set(IN_HF)


@pytest.mark.parametrize("name", SAMPLE)
def test_in_hf_it_is_the_same_mistake(trial, name):
    found = trial.compared(name)
    assert found.stage == found.ours
    assert found.error <= TOLERANCE
    assert found.effect >= CLEAR


@pytest.mark.parametrize("name", IN_HF)
def test_nothing_stays_behind(trial, name):
    fault = IN_HF[name]
    model = trial.case_of(fault).hf

    def state():
        codes = [f.__code__ for edit in fault.changes if isinstance(edit, Edit) for f, *_ in places(edit)]
        return codes, [(type(module), {k: id(v) for k, v in vars(module).items()}) for module in model.modules()]

    def fails(before):
        assert state() != before
        raise RuntimeError("on purpose")

    before = state()
    with pytest.raises(RuntimeError, match="on purpose"), fault.patch(model):
        fails(before)
    assert state() == before


@pytest.mark.parametrize("name", STREAMED)
def test_in_layers_that_are_read_one_at_a_time(trial, name):
    assert trial.streamed(name) <= TOLERANCE


def test_words_that_do_not_stand_there_once_are_refused(trial):
    model = trial.case_of(IN_HF["indexer-no-relu"]).hf
    for due, wrong in (("no such text", ""), ("residual", ""), ("residual = hidden_states\n        h", "")):
        with (
            pytest.raises(LookupError, match="once is due"),
            patched(model, (Edit("DecoderLayer.forward", due, wrong),)),
        ):
            pass
    comment = Edit("Attention.forward", "# Kept for BC", "# kept")
    with pytest.raises(LookupError, match="nothing that runs"), patched(model, (comment,)):
        pass


def test_two_at_once(trial):
    model = trial.case_of(IN_HF["indexer-no-relu"]).hf
    forward = unwrapped(type(model.model.layers[0].self_attn.indexer).forward)
    with patched(model, (*IN_HF["indexer-no-relu"].changes, *IN_HF["indexer-selects-recent"].changes)):
        assert "relu" not in forward.__code__.co_names
        assert "as_subclass" in forward.__code__.co_names
    assert "relu" in forward.__code__.co_names


@pytest.mark.parametrize("name", STOCK)
def test_in_mlx_lm(trial, name):
    assert trial.stock_compared(name).is_the_same


@pytest.mark.parametrize("name", IN_STOCK)
def test_mlx_lm_can_be_written_with_it(tmp_path, name):
    right, wrong = write_stock(tmp_path / "right.py").read_text(), write_stock(tmp_path / "wrong.py", name).read_text()
    assert right != wrong
    compile(wrong, name, "exec")
