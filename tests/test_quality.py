"""`python -m verify quality`: figures held to a direct computation, to mlx-lm's, and to what they must be where it is known."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from mlx_lm.perplexity import eval_ppl

import glm_dsa
from glm_dsa.__main__ import main as converting
from reference import checkpoints
from reference.kept import TRAINED, probes
from verify import faults
from verify.__main__ import main
from verify.engines import spec
from verify.quality import measure
from verify.quality.metrics import Gathered, Quality
from verify.quality.windows import Text, is_plain

pytestmark = pytest.mark.usefixtures("unregistered")

BASE = TRAINED / "interleaved"
LENGTH, CONTEXT, STRIDE = 400, 128, 64


@pytest.fixture(scope="module")
def build(tmp_path_factory, unregistered):
    """The trained checkpoint in 4 bit, groups of 32."""
    out = tmp_path_factory.mktemp("quality") / "4bit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [])
        arguments = ["convert", "--hf-path", BASE, "--mlx-path", out, "-q", "--q-bits", "4", "--q-group-size", "32"]
        assert converting(list(map(str, arguments))) == 0
    return out


@pytest.fixture(scope="module")
def found(build):
    return measure(str(build), str(BASE), length=LENGTH, context=CONTEXT, stride=STRIDE)


@pytest.fixture(scope="module")
def ids():
    from tokenizers import Tokenizer

    text = "\n".join(probes()["texts"])
    return np.array(Tokenizer.from_file(str(BASE / "tokenizer.json")).encode(text).ids)[:LENGTH]


def logits_of(folder, windows):
    """Of the whole model at once, float32 [n, S, V]."""
    model = glm_dsa.load(folder, dtype=mx.float32)
    model.set_dtype(mx.float32)
    return [torch.from_numpy(np.array(model(mx.array(w[None]))[0])).double() for w in windows]


@pytest.fixture(scope="module")
def whole(build, ids):
    """(begin, ids, logits) of each window, of the whole base and of the whole build; every other window is a plain one."""
    begins = range(0, LENGTH - CONTEXT + STRIDE, STRIDE)
    windows = [ids[b : b + CONTEXT] for b in begins]
    return [list(zip(begins, windows, logits_of(folder, windows), strict=True)) for folder in (BASE, build)]


def close(found, due, share=1e-6):
    assert found == pytest.approx(due, rel=share)


# -- against a direct computation


def test_kl_and_agreement_are_those_of_the_whole_models(found, whole):
    """torch, in float64, on one run of each whole model per window; each token once, in its last window."""
    kl, top1, top5, done = [], [], [], 1
    for (begin, _, p), (_, _, q) in zip(*whole, strict=True):
        rows = slice(done - begin - 1, len(p) - 1)
        logp, logq = (torch.log_softmax(x[rows], -1) for x in (p, q))
        kl.append(torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1))
        top1.append((logp.argmax(-1) == logq.argmax(-1)).double())
        best = [set(map(int, r)) for r in logp.topk(5).indices], [set(map(int, r)) for r in logq.topk(5).indices]
        top5 += [len(a & b) / 5 for a, b in zip(*best, strict=True)]
        done = begin + len(p)
    kl, top1 = torch.cat(kl).numpy(), torch.cat(top1).numpy()
    assert len(kl) == LENGTH - 1
    close(found.kl.value, kl.mean())
    close(found.kl.error, kl.std(ddof=1) / math.sqrt(len(kl)))
    for name, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0)):
        close(found.percentiles[name], np.quantile(kl, share))
    close(found.top1.value, top1.mean())
    close(found.top5.value, np.mean(top5))
    assert found.worst[0] == int(kl.argmax()) + 1
    assert 1e-4 < found.kl.value < 1  # 4 bit costs something
    assert found.top1.value < 1


def test_perplexities_are_those_of_the_whole_models(found, whole, ids):
    for side, windows in enumerate(whole):
        nll = [nll_of(x, w) for begin, w, x in windows if begin % CONTEXT == 0 and len(w) == CONTEXT]
        close(found.plain[side].value, math.exp(np.concatenate(nll).mean()))
        assert found.plain[side].tokens == len(nll) * (CONTEXT - 1) == LENGTH // CONTEXT * (CONTEXT - 1)
        strided, done = [], 1
        for begin, w, x in windows:
            strided.append(nll_of(x, w)[done - begin - 1 :])
            done = begin + len(w)
        strided = np.concatenate(strided)
        assert found.strided[side].tokens == strided.size == LENGTH - 1
        close(found.strided[side].value, math.exp(strided.mean()))
        # this tokenizer's tokens are bytes, but for the special ones
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
        scored = len("\n".join(probes()["texts"]).encode()[: len(tokenizer.decode(ids.tolist()).encode())])
        first = len(tokenizer.decode(ids[:1].tolist()).encode())
        close(found.bits_per_byte[side], strided.sum() / math.log(2) / (scored - first))


def nll_of(logits, window):
    logp = torch.log_softmax(logits[:-1], -1)
    return -logp[torch.arange(len(window) - 1), torch.from_numpy(window[1:])].numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mlx_lms_perplexity_is_the_same(dtype, build, ids, registered, capsys):
    """To its printed digits, on the same tokens; a window at a time, as here."""
    model, _ = mlx_lm.load(str(build))
    model.set_dtype(getattr(mx, dtype))
    width = 32  # bfloat16 is slow on CPUs
    ids = ids[: 2 * width]
    data = mx.array(ids.reshape(-1, width))
    value, error = eval_ppl(model, data, batch_size=1)
    found = measure(f"{build},dtype={dtype}", str(BASE), token_ids=ids.tolist(), context=width, stride=width).plain[1]
    # mlx-lm's model ends one token earlier in each window: it does not run what nothing follows
    assert f"{found.value:.3f} ± {found.error:.3f}" == f"{value:.3f} ± {error:.3f}"


def test_streaming_gives_the_same(found, build, monkeypatch):
    """A layer at a time, embedding and head in rows, as for what does not fit."""
    monkeypatch.setattr(spec, "SMALL", 0)
    streamed = measure(str(build), str(BASE), length=LENGTH, context=CONTEXT, stride=STRIDE)
    close(streamed.kl.value, found.kl.value, 1e-4)
    close(streamed.strided[1].value, found.strided[1].value)
    close(streamed.plain[0].value, found.plain[0].value)


def test_hf_on_the_same_weights_is_as_near_as_float32(found):
    with_hf = measure(str(BASE), f"hf@{BASE}", length=200, context=100, stride=100)
    assert with_hf.kl.value < 1e-7
    assert with_hf.top1.value == 1
    assert found.kl.value > 1e4 * with_hf.kl.value


def test_a_packed_cache_costs_something():
    found = measure(f"{BASE},kv_bits=4,kv_group_size=32", str(BASE), length=200, context=100, stride=50)
    assert 1e-7 < found.kl.value < 1
    model = glm_dsa.load(BASE, dtype=mx.float32)
    model.set_dtype(mx.float32)
    tokens = mx.array(np.array([[5, 9, 31, 7, 8, 20, 41, 9]]))
    packed = model(tokens, model.make_cache(kv_bits=4, kv_group_size=32))
    again = measure(
        f"{BASE},kv_bits=4,kv_group_size=32", str(BASE), token_ids=tokens[0].tolist(), context=8, stride=8
    )  # fmt: skip
    p, q = (torch.log_softmax(torch.from_numpy(np.array(x[0, :-1])).double(), -1) for x in (model(tokens), packed))
    close(again.kl.value, (p.exp() * (p - q)).sum(-1).mean().item(), 1e-5)


def test_the_same_model_twice_is_exactly_itself():
    found = measure(str(BASE), str(BASE), length=100, context=64, stride=32)
    assert found.kl.value == found.percentiles["max"] == 0
    assert found.top1.value == found.top5.value == 1
    assert found.strided[0] == found.strided[1]


def test_a_wrong_model_is_told():
    """An indexer run under the other layout, on windows beyond index_topk."""
    found = measure(f"{BASE},indexer_rope=half-split", str(BASE), length=300, context=300, stride=300)
    with faults.seeded("router-no-scale"):
        other = measure(str(BASE), f"hf@{BASE}", length=100, context=100, stride=100)
    assert found.kl.value > 1e-3
    assert other.kl.value > 1e-2


# -- windows


@settings(max_examples=200, deadline=None)
@for_all(st.integers(2, 300), st.integers(1, 40), st.integers(1, 10))
def test_every_token_is_scored_once_with_as_much_context_as_there_is(count, stride, times):
    context = max(2, stride * times)
    if context % stride:
        stride = 1
    windows = Text(np.zeros(count, np.int64), "").windows(context, stride)
    scored = [t for w in windows for t in range(w.scored, w.end)]
    # side by side, nothing comes before a window's first token
    assert scored == [t for t in range(1, count) if stride < context or t % context]
    for w in windows:
        assert w.length <= context
        assert list(range(w.scored - 1 - w.begin, w.length - 1)) == list(range(w.fresh.start, w.fresh.stop))
        assert w.begin == 0 or w.scored - w.begin >= context - stride
    plain = [w for w in windows if is_plain(w, context, count)]
    assert [w.begin for w in plain] == (list(range(0, count - context + 1, context)) if count >= context else [0])


# -- figures


def test_figures_where_they_are_known():
    """Uniform predictions: perplexity V; the same in all but one place: a KL by hand."""
    found, width = Gathered(), 7
    base, mine = np.zeros((3, width), np.float32), np.zeros((3, width), np.float32)
    mine[1, 2] = math.log(8)  # 8 of 14 there, 1 of 14 elsewhere
    found.add(base, mine, np.array([0, 2, 3]), np.array([1, 2, 3]), np.ones(3, bool), True)
    quality = Quality.of(
        found, nbytes=6, candidate="", base="", source="", tokens=4, context=4, stride=4, windows=1
    )  # fmt: skip
    close(quality.strided[0].value, 7)
    close(quality.strided[1].value, (7 * 14 / 8 * 7) ** (1 / 3))
    kl = sum(math.log((1 / 7) / q) / 7 for q in [8 / 14, *[1 / 14] * 6])
    close(quality.kl.value, kl / 3)
    close(quality.percentiles["max"], kl)
    assert quality.percentiles["median"] == 0
    close(quality.bits_per_byte[0], 3 * math.log2(7) / 6)
    assert quality.worst[0] == 2


def test_kl_is_summed_over_the_whole_vocabulary_in_float64():
    """Half of the mass in 100,000 tokens of 5e-6 each, on which both differ by a tenth: float32 would lose digits."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, (2, 100_000)).astype(np.float32)
    mine = base + rng.normal(0, 0.1, base.shape).astype(np.float32)
    found = Gathered()
    found.add(base, mine, np.array([1, 2]), np.array([1, 2]), np.ones(2, bool), False)
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (base, mine))
    np.testing.assert_allclose(found.kl[0], (p.exp() * (p - q)).sum(-1).numpy(), rtol=1e-10)


# -- the command


def test_the_command(build, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The lightning indexer scores every key. Ünïcode too. " * 6, encoding="utf-8")
    arguments = [str(build), "--against", str(BASE), "--text", str(text), "--context", "64"]
    assert main(["quality", *arguments, "--json", str(tmp_path / "q.json")]) == 0
    out = capsys.readouterr().out
    said = json.loads((tmp_path / "q.json").read_text())
    assert f"{said['kl']['mean']:.6g}" in out
    assert said["stride"] == 32
    assert said["versions"] in out
    assert "python -m verify" in said["command"]
    assert said["perplexity"]["plain"]["base"]["tokens"] % 63 == 0
    assert said["bits_per_byte"]["base"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--against", BASE], "no such folder"),
        ([BASE, "--against", BASE, "--stride", "100"], "--stride 100: expected a divisor of --context 2048"),
        ([BASE, "--against", BASE, "--context", "1"], "--context 1"),
        ([BASE, "--against", BASE, "--tokens", "1"], "--tokens 1"),
        ([BASE, "--against", BASE, "--text", "nowhere.txt"], "--text nowhere.txt: No such file"),
        ([BASE, "--against", BASE, "--text", TRAINED], "--text"),
        ([BASE, "--against", BASE, "--json", "nowhere/x.json"], "--json nowhere/x.json"),
        ([f"{BASE},device=gpu", "--against", BASE, "--tokens", "9"], "device=gpu"),
        ([f"{BASE},kv_bits=7", "--against", BASE, "--tokens", "9"], "bits 7"),
        ([f"{BASE},kv_bits=0", "--against", BASE, "--tokens", "9"], "bits 0"),
        ([BASE, "--against", BASE, "--text", "a\0b"], "--text a\\x00b"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, capsys):
    if "device=gpu" in str(arguments[0]) and mx.metal.is_available():
        pytest.skip("there is a GPU here")
    assert main(["quality", *map(str, arguments)]) == 10
    error = capsys.readouterr().err
    assert error.startswith("verify: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_text_is_due_where_none_is_kept(tmp_path, capsys):
    folder = checkpoints.write(tmp_path / "hf", checkpoints.tiny(num_hidden_layers=4))
    assert main(["quality", str(folder), "--against", str(folder)]) == 10
    assert "expected --text F" in capsys.readouterr().err
    text = tmp_path / "t.txt"
    text.write_text("some text")
    assert main(["quality", str(folder), "--against", str(folder), "--text", str(text)]) == 10
    assert "expected a tokenizer.json" in capsys.readouterr().err
    assert main(["quality", str(folder), "--against", str(BASE), "--text", str(text)]) == 10
    assert "vocabularies of" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_no_figures(tmp_path, capsys):
    folder = checkpoints.write(tmp_path / "hf", checkpoints.tiny(num_hidden_layers=4))
    import verify.quality.runs as runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.OurRun, "logits", lambda self, window, rows: np.full((3, 160), np.nan, np.float32))
        with pytest.raises(ValueError, match="NaN or infinite"):
            measure(str(folder), str(folder), token_ids=[5, 6, 7, 8])


def text_file(tmp_path, text):
    (tmp_path / "t.txt").write_bytes(text.encode())
    return tmp_path / "t.txt"


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("count", [2, 3, 5, 7, 26, None])
def test_bits_per_byte_where_tokens_divide_characters(count, stride, tmp_path):
    """Of this tokenizer a token is a byte: of whatever tokens are scored, bits a token."""
    file = text_file(tmp_path, "\ufeff😀😀 éé你好\r\n😀 ok")
    found = measure(str(BASE), str(BASE), text=file, length=count, context=8, stride=stride)
    assert found.tokens == (count or len(file.read_bytes()))
    close(found.bits_per_byte[0], found.strided[0].nll / math.log(2))
    begins = range(0, found.tokens, 8) if stride == 8 else [0]
    assert found.strided[0].tokens == found.tokens - len(begins)


def test_the_worst_token_is_named_by_its_place(build, tmp_path):
    """Side by side, the first token of each window is scored by none, and still counted."""
    file = text_file(tmp_path, "The lightning indexer scores every key for every query. " * 3)
    found = measure(str(build), str(BASE), text=file, context=16, stride=16)
    place, worst = found.worst
    begin = place // 16 * 16
    ids = np.array(list(file.read_bytes()))
    from tokenizers import Tokenizer

    ids = np.array(Tokenizer.from_file(str(BASE / "tokenizer.json")).encode(file.read_text()).ids)
    p, q = (torch.log_softmax(logits_of(f, [ids[begin : begin + 16]])[0], -1)[place - begin - 1] for f in (BASE, build))
    close(worst, (p.exp() * (p - q)).sum().item(), 1e-5)
    assert found.worst_token == repr(file.read_text()[place])


def test_a_tokenizer_that_truncates_or_pads_does_not_here(tmp_path):
    import shutil

    file = text_file(tmp_path, "the quick brown fox jumps over the lazy dog " * 4)
    due = measure(str(BASE), str(BASE), text=file, context=64, stride=32)
    for name, said in (
        ("truncation", {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}),
        ("padding", {"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "<|pad|>"}),
    ):  # fmt: skip
        other = Path(shutil.copytree(BASE, tmp_path / name))
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        (other / "tokenizer.json").write_text(json.dumps(tokenizer | {name: said}))
        found = measure(str(other), str(other), text=file, context=64, stride=32)
        assert (found.tokens, found.strided, found.bits_per_byte) == (due.tokens, due.strided, due.bits_per_byte)


def test_figures_beyond_all_numbers_are_null(tmp_path):
    found, logits = Gathered(), np.zeros((2, 5), np.float32)
    logits[:, 0] = 1e4
    found.add(logits, logits, np.array([1, 1]), np.array([1, 2]), np.ones(2, bool), True)
    about = {"candidate": "", "base": "", "source": "", "tokens": 3, "context": 3, "stride": 3, "windows": 1}
    quality = Quality.of(found, nbytes=0, **about)
    said = json.loads(json.dumps(quality.as_dict(), allow_nan=False))
    assert said["perplexity"]["strided"]["base"] == {"value": None, "error": None, "nll": 1e4, "tokens": 2}
    assert said["bits_per_byte"] is None
    assert any(line.endswith(" 1") for line in quality.lines() if "strided" in line)  # the ratio


def test_what_is_no_file_is_not_replaced(tmp_path, capsys):
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    target.write_text("before")
    link.symlink_to(target)
    arguments = ["quality", str(BASE), "--against", str(BASE), "--tokens", "20", "--json"]
    assert main([*arguments, str(link)]) == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["tokens"] == 20
    for other in ("/dev/null", str(tmp_path), "a\0b"):
        assert main([*arguments, other]) == 10
        assert "expected a file in a folder that is there" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()


def test_files_of_other_tokenizers_are_refused(build, tmp_path):
    import shutil

    other = Path(shutil.copytree(build, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tmp_path / "t.txt"
    text.write_text("".join(chr(c) for c in range(32, 127)))
    with pytest.raises(ValueError, match="cut it differently"):
        measure(str(other), str(BASE), text=text)
