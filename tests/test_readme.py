"""The README is tested: every command, option and table in it exists, and every option is in it."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

import glm_dsa
import verify.__main__
from glm_dsa import KvQuantization, LayerCache, Model, Widths
from glm_dsa.__main__ import main
from glm_dsa.cache import cache_bytes
from glm_dsa.config import OVERRIDES, ModelArgs
from glm_dsa.mlx_lm import COMMANDS
from glm_dsa.model import parameters_of
from glm_dsa.planning import plan, recipe
from reference import card, checkpoints, measure, shapes, train
from reference.kept import TRAINED
from reference.layout import LAYOUTS
from tests.carried import diagnosing, kept
from verify.gate import plugin as gate
from verify.selftest import scorecard

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def claims_table() -> str:
    places = {f"test_{part}": place for place, part in enumerate(gate.ORDER)}
    files = sorted(
        (file.stem for file in (ROOT / "verify" / "claims").glob("test_*.py")), key=lambda f: (places.get(f, len(places)), f)
    )
    modules = [importlib.import_module(f"verify.claims.{file}") for file in files]
    rows = [f"| {module.CLAIM} | {module.__doc__.splitlines()[0]} |" for module in modules]
    return "\n".join(["| claim | what is held against what |", "|---|---|", *rows])


def test_the_table_of_claims_is_generated():
    written = README.split("<!-- claims -->\n")[1].split("\n<!-- end of claims -->")[0]
    assert written == claims_table(), f"the table should read:\n{claims_table()}"


def test_the_table_of_what_was_judged_is_generated():
    written = README.split("<!-- judged -->\n")[1].split("\n<!-- end of judged -->")[0]
    assert written == scorecard.Judged.read().markdown(), "make judge ARGS='--keep' writes it"


class Recorder:
    """Takes what pytest_addoption registers."""

    def __init__(self):
        self.names = []

    def getgroup(self, _):
        return self

    def addoption(self, name, **_):
        self.names.append(name)


def test_every_option_is_in_the_readme_and_every_option_in_it_exists(capsys):
    recorder = Recorder()
    gate.pytest_addoption(recorder)
    section = README.split("## Options of the gate")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE)) == set(recorder.names)
    known = {
        *recorder.names,
        *options_of_the_trainer(capsys),
        "--values",
        *options_of("judge", capsys),
        *options_of("drift", capsys),
        *options_of("bench", capsys),
        *options_of("audit", capsys),
        *options_of("quality", capsys),
        *options_of_plan(capsys),
        "--drift",  # of python -m tests.carried
        "--json",
        "--version",
        "--max-kv-size",
        "--mtp",  # of convert
        *options_of_mlx_lm("generate", capsys),
    }
    planned: set[str] = set()
    for line in commands():
        named = set(re.findall(r"--[a-z][a-z-]+", line))
        if line.split()[0] in COMMANDS:
            own = {"--recipe", "--mtp"} if line.startswith("convert ") else set()
            assert named <= options_of_mlx_lm(line.split()[0], capsys) | own, line
        if line.startswith("plan "):
            planned |= named
        known |= named
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known
    assert planned == options_of_plan(capsys) - {"--help"}


def options_of_plan(capsys) -> set[str]:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


def test_what_plan_says_of_glm_5_2_is_what_it_says(capsys):
    written = README.split("<!-- plan -->\n")[1].split("\n<!-- end of plan -->")[0]
    config = ROOT / "verify" / "configs" / "glm-5.2.json"
    found = plan.plan(config, recipe.load("glm-5.2-3.5bit"), kv_bits=8)
    found.source = "glm-5.2.json"
    text = plan.render(found).split("\n\nconventions")[0]
    assert written == f"```\n{text}\n```", f"it should read:\n{text}"


def test_the_table_of_recipes_is_generated():
    configs = {"glm-5.2-3.5bit": "glm-5.2", "glm-5.1-4.5bit": "glm-5.1", "glm-4.7-flash-8-5bit": "glm-4.7-flash"}
    rows = ["| recipe | for | bits a weight | GiB, without MTP |", "|---|---|---|---|"]
    for name in recipe.kept():
        rules = recipe.load(name)
        total = plan.plan(ROOT / "verify" / "configs" / f"{configs[name]}.json", rules).main
        rows.append(f"| `{name}` | {rules.purpose} | {total.bits:.3f} | {total.nbytes / 2**30:.2f} |")
    written = README.split("<!-- recipes -->\n")[1].split("\n<!-- end of recipes -->")[0]
    due = "\n".join(rows)
    assert written == due, f"the table should read:\n{due}"


def test_the_recipe_in_the_readme_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "r.toml").write_text(text)
    formats = recipe.load(tmp_path / "r.toml").formats(
        ModelArgs.from_file(ROOT / "verify" / "configs" / "glm-5.2.json"), with_mtp=True
    )
    assert str(formats["model.layers.77.mlp.switch_mlp.down_proj.weight"]) == "4 bit mxfp4, groups of 32"
    assert str(formats["model.layers.76.mlp.switch_mlp.down_proj.weight"]) == "bf16"


def test_the_commands_of_quality_and_audit_run(two_builds, capsys, monkeypatch):
    monkeypatch.chdir(two_builds)
    lines = re.findall(r"^python -m verify quality (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(lines) == 3
    named = set()
    for line in lines:
        arguments = [a.replace("DIR", "original") for a in shlex.split(line)]
        small = [] if "--context" in line else ["--context", "32", "--tokens", "100"]
        assert verify.__main__.main(["quality", *arguments, *small]) == 0, line
        assert "KL(base || candidate)" in capsys.readouterr().out
        named |= set(re.findall(r"--[a-z][a-z-]+", line))
    assert named == options_of("quality", capsys) - {"--help"}
    lines = re.findall(r"^python -m verify audit (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert set(re.findall(r"--[a-z][a-z-]+", " ".join(lines))) | {"--json", "--help"} == options_of("audit", capsys)


def options_of_the_trainer(capsys) -> set[str]:
    """Of all programs, each held to the README's own lines."""
    every = set()
    for program in (train, measure, shapes):
        with pytest.raises(SystemExit, match="0"):
            program.main(["--help"])
        options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
        lines = re.findall(rf"^python -m {program.__name__} (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
        assert options == set(re.findall(r"--[a-z][a-z-]+", " ".join(lines)))
        every |= options
    return every


def options_of(command: str, capsys) -> set[str]:
    """Of a command of `python -m verify`."""
    with pytest.raises(SystemExit, match="0"):
        verify.__main__.main([command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


def commands() -> list[str]:
    """What follows `python -m glm_dsa` in the README."""
    return re.findall(r"^python -m glm_dsa (.*?)(?:\s+#.*)?$", README, re.MULTILINE)


def options_of_mlx_lm(command, capsys) -> set[str]:
    module = importlib.import_module(f"mlx_lm.{COMMANDS[command]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, "--help"])
        with pytest.raises(SystemExit, match="0"):
            module.main()
    return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


def test_every_command_of_the_command_line_runs(registered, tmp_path, capsys, monkeypatch):
    folder = checkpoints.write(tmp_path / "ck", checkpoints.packable(num_hidden_layers=4))
    checkpoints.write_tokenizer(folder)
    assert len(commands()) >= 10
    monkeypatch.setattr(sys, "argv", sys.argv)
    for line in commands():
        paths = {
            "DIR": folder,
            "config.json": folder / "config.json",
            "OUT": tmp_path / "out",
            "OUT/build": tmp_path / "build",
        }
        arguments = [str(paths.get(a, a)).replace("OUT", str(tmp_path / "cache")) for a in shlex.split(line)]
        if arguments[0] in ("server", "lora"):
            continue  # tried in test_mlx_lm.py, and their options above
        if arguments == ["--version"]:
            with pytest.raises(SystemExit, match="0"):
                main(arguments)
        else:
            assert main(arguments) == 0
        assert capsys.readouterr().out


def test_the_python_examples_run(registered, tmp_path):
    folder = checkpoints.write(tmp_path / "ck", checkpoints.glm_5_2(num_hidden_layers=4))
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    example, blocks = blocks[0], blocks[1:]
    names: dict = {}
    exec(blocks[0].replace("path/to/checkpoint", str(folder)), names)  # noqa: S102
    assert [d.logits.shape for d in names["drafts"]] == [(1, 4, 160), (1, 1, 160), (1, 1, 160)]
    assert {layer.length for layer in names["cache"]} == {4}
    exec(blocks[1], {})  # noqa: S102
    assert mlx_lm.utils._get_classes({"model_type": "glm_moe_dsa"})[0] is Model
    np.save(tmp_path / "texts.npy", np.random.default_rng(0).integers(3, 160, (4, 40)))
    exec(blocks[2].replace("path/to/checkpoint", str(folder)).replace("path/to", str(tmp_path)), names)  # noqa: S102
    assert set(names["found"].mass) == {"interleaved", "half-split"}
    assert "drift.compare" in example  # tried below


@pytest.fixture(scope="module")
def two_builds(tmp_path_factory):
    """./original, a GLM-5.1 that groups of 64 divide, and ./release, the same in 4 bit; a prompt."""
    folder = tmp_path_factory.mktemp("builds")
    unshared = dict.fromkeys(("index_topk_freq", "index_skip_topk_offset", "index_share_for_mtp_iteration"))
    original = checkpoints.write(folder / "original", checkpoints.packable(num_hidden_layers=4, **unshared))
    checkpoints.write_tokenizer(original)
    model, release = glm_dsa.load(original), folder / "release"
    release.mkdir()
    nn.quantize(model, 64, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized") and "indexer" not in path)
    mx.save_safetensors(str(release / "model.safetensors"), parameters_of(model))
    config = json.loads((original / "config.json").read_text())
    packing = {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}
    (release / "config.json").write_text(json.dumps(config | packing))
    (folder / "F").write_text("Where do the logits drift, and why? One prompt, stage by stage, will tell. " * 2)
    return folder


def test_the_commands_of_drift_run(two_builds, capsys, monkeypatch):
    lines = re.findall(r"^python -m verify drift (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 6
    monkeypatch.chdir(two_builds)
    for line in lines:
        other = {"5": "9", "3,7-9": "1,2-3"}  # bits that its indexer leaves room for; layers that it has
        arguments = [other.get(a, a) for a in shlex.split(line)]
        code = verify.__main__.main(["drift", *arguments, *([] if "--tokens" in line else ["--tokens", "24"])])
        said = capsys.readouterr()
        assert (code in (0, 1), said.err) == (True, ""), line
        assert said.out.startswith("candidate  ")
    assert sorted(p.name for p in (two_builds / "OUT").iterdir()) == [
        "layers.0.self_attn.heads.npz", "recipe.toml", "report.html", "report.json", "report.jsonl"
    ]  # fmt: skip


def test_the_python_example_of_drift_runs(two_builds, registered):
    example = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "drift.compare" in b)
    names: dict = {}
    exec(example.replace("path/to", str(two_builds)), names)  # noqa: S102
    assert names["found"].sensitivity.recipe.bits <= 9
    assert (two_builds / "better" / "config.json").is_file()


def test_what_drift_says_of_stock_mlx_lm_is_what_it_says(tmp_path):
    """In a process of its own: other tests put this definition in mlx-lm's place."""
    written = README.split("<!-- drift: ")[1].split("\n<!-- end of drift -->")[0]
    command, _, said = written.partition(" -->\n```\n")
    checkpoints.write(tmp_path / "small-keys", checkpoints.tiny(num_hidden_layers=4), seed=9)
    arguments = [sys.executable, *shlex.split(command)[1:]]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(arguments, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert found.returncode == 1
    assert without_figures(said.removesuffix("\n```")) == without_figures(found.stdout.strip()), found.stdout


def without_figures(text):
    """What another machine's rounding cannot change: errors and bounds are figures of this one."""
    return re.sub(r"\d+\.?\d*(e[+-]?\d+)?%?", "#", " ".join(text.split()))


def test_the_table_of_what_was_diagnosed_is_the_kept_one():
    written = README.split("<!-- diagnosed -->\n")[1].split("\n<!-- end of diagnosed -->")[0]
    _, records = kept.read()
    assert written == diagnosing.table(records), "python -m tests.carried --drift --keep writes it"
    assert all(diagnosing.enough(records, kind) for kind in diagnosing.kinds(records))


def cache_table() -> str:
    """Measured: one layer with an indexer and one without, filled by mlx-lm's chunks; 21 and 57 of them."""
    rows = ["| tokens | 16 bit | int8, groups of 64 | int4, groups of 64 |", "|---|---|---|---|"]
    for tokens in (1024, 8192, 32768):
        cells = []
        for quantization in (None, KvQuantization(8), KvQuantization(4)):
            sizes = []
            for index in (128, 0):
                cache = LayerCache(Widths(512, 64, index), quantization)
                for _ in range(tokens // 1024):
                    if index:
                        cache.append_index_keys(mx.zeros((1, 1024, 128), mx.bfloat16))
                    cache.append(mx.zeros((1, 1024, 576), mx.bfloat16))
                sizes.append(cache.nbytes)
                assert cache.nbytes == tokens * sum(cache_bytes(cache.widths, 2, quantization))
            cells.append(f"{(21 * sizes[0] + 57 * sizes[1]) / 1e6:,.1f} MB")
        rows.append(f"| {tokens:,} | {' | '.join(cells)} |")
    million = [
        sum(n * sum(cache_bytes(Widths(512, 64, index), 2, q)) for n, index in ((21, 128), (57, 0)))
        for q in (None, KvQuantization(8), KvQuantization(4))
    ]
    return "\n".join([*rows, f"| 1,000,000 (predicted) | {' | '.join(f'{m / 1e3:,.1f} GB' for m in million)} |"])


def test_the_table_of_cache_sizes_is_measured():
    written = README.split("<!-- cache -->\n")[1].split("<!-- end of cache -->")[0].strip()
    assert written == cache_table(), f"the table should read:\n{cache_table()}"


def test_the_table_of_conventions_is_complete():
    section = README.split("## Conventions")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE))
    assert listed == {c.name for c in ModelArgs.from_dict(checkpoints.tiny()).conventions}
    assert set(OVERRIDES) - listed == {"index_topk", "indexer_types"}  # no convention, and the schedule


def test_the_makefile_has_what_the_readme_names():
    listed = subprocess.run(
        ["make", "-n", "verify", "test", "train", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pytest verify/" in listed.stdout
    assert "pytest tests/" in listed.stdout
    assert "reference.train --indexer-rope interleaved" in listed.stdout
    assert sys.version_info >= (3, 11)


def test_the_figures_of_the_captured_mass_are_the_cards():
    """Right layout, wrong layout, chance, each from .. to: as rounded from what was measured."""
    figures: dict = {"right": set(), "wrong": set(), "chance": set()}
    for name in LAYOUTS:
        measured = json.loads((TRAINED / name / card.MEASURED).read_text())["captured_mass"]
        for rope, mass in measured["by_layout"].items():
            figures["right" if rope == name else "wrong"].add(f"{mass['mean']:.2f}")
        figures["chance"].add(f"{measured['chance']:.2f}")
    right, wrong, chance = (" to ".join(sorted(found)) for found in figures.values())
    text = " ".join(README.split())
    assert f"it catches {right} of the attention under the right layout and {wrong} under the other" in text
    assert f"random keys would catch {chance}." in text
