"""What the small checkpoint is trained on stays apart from what it is measured on."""

from __future__ import annotations

import sysconfig

import numpy as np
import pytest

from reference import corpus

LINE = len("key=VAL\n")


def test_the_split_is_for_good():
    """By name alone: these stay where they are, whatever else changes."""
    assert [name for name in ("inspect", "email", "typing", "json", "os") if corpus.is_held_out(name)] == [
        "inspect",
        "email",
    ]


def test_files_of_a_package_go_to_one_side():
    training, tests = corpus.files(False), corpus.files(True)
    assert not training.keys() & tests.keys()
    assert not {name.split("/")[0] for name in training} & {name.split("/")[0] for name in tests}
    assert "typing.py" in training
    assert "inspect.py" in tests
    assert len(corpus.standard_library(False)) > 4e6
    assert 3e5 < len(corpus.standard_library(True)) < 0.3 * len(corpus.standard_library(False))


def test_no_text_of_the_machine_and_no_copies():
    names = [*corpus.files(False), *corpus.files(True)]
    assert not [name for name in names if {"site-packages", "test"} & set(name.split("/")) or "sysconfigdata" in name]
    known = {line.strip() for text in corpus.files(False).values() for line in text.splitlines()}
    for name, text in corpus.files(True).items():
        long = {line.strip() for line in text.splitlines() if len(line.strip()) >= 24}
        assert len(long & known) <= 0.25 * max(len(long), 1), name


def test_a_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "test")})
    with pytest.raises(ValueError, match="no sources of the standard library"):
        corpus.files.__wrapped__(False)
    (tmp_path / "test").mkdir()  # a folder of that name above the library hides nothing of it
    (tmp_path / "test" / "os.py").write_text("import sys\n")
    assert corpus.files.__wrapped__(False) == {"os.py": b"import sys\n"}


def test_windows_are_of_different_files():
    drawn = corpus.windows(np.random.default_rng(0), 12, 300)
    texts = [corpus.encode(text).tobytes() for text in corpus.files(True).values()]
    assert drawn.shape == (12, 300)
    homes = [next(i for i, text in enumerate(texts) if row.tobytes() in text) for row in drawn]
    assert len(set(homes)) == 12


def test_keys_are_held_out_for_good():
    training, tests = set(corpus.keys(False)), set(corpus.keys(True))
    assert not training & tests
    assert len(training | tests) == 26**3
    assert 0.08 < len(tests) / 26**3 < 0.12
    said = corpus.decode(corpus.recall(np.random.default_rng(0), 2000, None, 16)[0])
    assert "=" in said
    assert not any(f"{key}=" in said for key in tests)


def test_what_nobody_can_know_is_not_learned():
    tokens, learn = corpus.recall(np.random.default_rng(2), 64, None, distinct=1)
    assert learn[:8].tolist() == [False] * 3 + [True] + [False] * 3 + [True]  # "abc=XYZ\n", said for the first time
    again = tokens[LINE : 2 * LINE]
    assert np.array_equal(again, tokens[:LINE]), "the first line after it repeats it"
    assert learn[LINE : 2 * LINE].tolist() == [False] * 3 + [True] * 5


def test_filler_is_learned_but_for_its_beginning():
    text = corpus.encode("x" * 500)
    tokens, learn = corpus.recall(np.random.default_rng(1), 400, text, distinct=4)
    is_filler = tokens == text[0]
    assert is_filler.sum() > 40
    assert 0.5 < learn[is_filler].mean() < 1
