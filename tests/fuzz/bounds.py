"""What must hold, whatever is read: one line, bounds of time and memory, nothing written, no other model's meaning."""

import contextlib
import io
import os
import resource
import signal
import time
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
from hypothesis import given as drawn
from hypothesis import settings

import glm_dsa
import glm_dsa.__main__
import verify.__main__
from glm_dsa import ModelArgs
from glm_dsa.errors import LONGEST, GlmDsaError
from glm_dsa.model import parameters_of
from reference import checkpoints
from reference.stored import read_tensors
from verify.audit import audit
from verify.core.exits import NotJudged
from verify.gate.options import Asked

CONFIG, INDEX = "config.json", checkpoints.INDEX
SECONDS, BYTES = 10, 1 << 30
TINY = checkpoints.glm_5_2(
    num_hidden_layers=3, first_k_dense_replace=1, index_skip_topk_offset=2, n_routed_experts=4, num_experts_per_tok=2,
    vocab_size=300, index_n_heads=4,
)  # fmt: skip
STRUCTURED = {"config": 50, "index": 30, "header": 85, "folder": 25, "state": 80, "prompt cache": 45, "saved": 40}
RAW = {"folder": 50, "prompt cache": 15, "saved": 20, "kept": 15, "tokenizer": 25}


def each(strategy, count, check):
    """`check` on so many draws, and no fewer."""
    seen = 0

    @settings(max_examples=count)
    @drawn(strategy)
    def run(corruption):
        nonlocal seen
        seen += 1
        check(corruption)

    run()
    assert seen >= count


class Hang(BaseException):
    """Caught by nobody on the way."""


@contextlib.contextmanager
def bounded(sandbox):
    """Fails where it takes too long, holds too much memory at once, or changes anything in `sandbox`."""

    def ring(*_):
        raise Hang(f"over {SECONDS} s")

    before, held, begun, earlier = (
        listing(sandbox),
        forget_peak(),
        time.monotonic(),
        signal.signal(signal.SIGALRM, ring),
    )
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert time.monotonic() - begun < SECONDS
    assert peak() - held < BYTES
    assert listing(sandbox) == before


def listing(folder):
    """{path: what a write would change}."""
    there = (Path(at) / name for at, folders, files in os.walk(folder) for name in (*folders, *files))
    return {path: (s.st_mode, s.st_size, s.st_mtime_ns, s.st_ino) for path in there for s in (path.lstat(),)}


def peak():
    """The most memory that this process has held, since `forget_peak` where the system can forget."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def one_line(text):
    assert text.strip()
    assert text.isprintable(), text
    assert len(text) < LONGEST + 200
    assert "Traceback" not in text


def outcome(read, errors=(GlmDsaError,)):
    """(what was read, None), or (None, the line that refuses it)."""
    try:
        return read(), None
    except errors as error:
        one_line(str(error))
        return None, str(error)


def said(main, *arguments):
    """(exit status, what was printed, the line on the error stream) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, arguments)])
    if err.getvalue():
        one_line(err.getvalue().removesuffix("\n"))
        assert (status, out.getvalue()) == (10, "")
    return status, out.getvalue(), err.getvalue()


def meaning(model):
    """{what a model computes by: value}: everything of its config, and the bits of its parameters."""
    found = {f.name: getattr(model.args, f.name) for f in fields(ModelArgs) if f.name != "conventions"}
    found |= {c.name: c.value for c in model.args.conventions}
    for name, value in parameters_of(model).items():
        found[name] = value.dtype, value.shape, sha256(bytes(memoryview(value.view(mx.uint8)))).hexdigest()
    return found


def check_folder(folder, sound, given, another=()):
    """No reader of checkpoints fails in any other way than by a line, and none lets pass what does not mean `sound`.

    another: what the folder's config.json says otherwise, in so many words."""
    with bounded(folder.parent):
        model, refusal = outcome(lambda: glm_dsa.load(folder))
    with bounded(folder.parent):
        statuses = [said(glm_dsa.__main__.main, "inventory", folder, "--values", "--json")[0]]
    with bounded(folder.parent):
        statuses.append(said(verify.__main__.main, "audit", folder)[0])
    with bounded(folder.parent):
        passes = gate_passes(folder, given)
    if refusal is not None:
        assert str(folder) in refusal
        assert statuses[0] == 10
        assert statuses[1] in (1, 10), "the audit: a FAULT, or what cannot be read"
        assert not passes
    else:
        assert statuses[0] == 0
        found = meaning(model)
        told = {c.name for c in model.args.conventions if c.source == "default"}
        assert {k for k in found | sound if found.get(k) != sound.get(k)} <= told | set(another)
    return refusal


def gate_passes(folder, given):
    """Whether `pytest verify/ --checkpoint` would come to judge weights; if so, its oracles read what is there."""
    asked, refusal = outcome(lambda: Asked.of(given({"--checkpoint": str(folder)})), (ValueError, OSError, NotJudged))
    if refusal is not None or asked.release.refused:
        return False
    if any(f.severity == audit.FAULT for f in audit.audit(asked.release.headers).findings):
        return False
    asked.conventions(), asked.not_verified(given({}))
    read = read_tensors(folder)
    assert {name: file.name for name, file in read.names.items()} == {
        name: tensor.file.name for name, tensor in asked.release.headers.tensors.items()
    }
    return True
