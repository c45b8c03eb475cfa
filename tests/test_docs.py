"""README.md and docs/ together: links, commands, options, paths and tables in them exist, and every option is in them."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import glm_dsa
import verify.__main__
from docs import blocks
from glm_dsa.__main__ import MLX_LM, main
from glm_dsa.config import OVERRIDES, ModelArgs
from glm_dsa.model import parameters_of
from glm_dsa.planning import recipe
from reference import checkpoints
from reference.kept import TRAINED
from reference.layout import LAYOUTS
from reference.training import card
from verify.bench import contenders
from verify.gate import plugin

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in blocks.pages()}
EVERY = "\n".join(PAGES.values())
MANY = 20  # lines and links that the pages have at least, or a pattern below finds nothing any more
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
ELSEWHERE = {"--trust-remote-code", "--dequantize", "--max-kv-size"}  # of mlx-lm's own, named and not used
# program -> the page that explains its options
PROGRAMS = {
    "verify audit": "release", "verify drift": "drift", "verify quality": "quality", "verify bench": "performance",
    "verify judge": "selftest", "verify.selftest.mutation": "selftest", "tests.carried": "selftest", "glm_dsa plan": "planning",
    "glm_dsa attach": "usage", "glm_dsa inventory": "usage",
    "reference.train": "trained", "reference.measure": "trained", "reference.shapes": "release",
}  # fmt: skip


# -- size and links


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short(page):
    assert PAGES[page].count("\n") <= (160 if page == "README.md" else 300)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """As GitHub makes them: lower case, signs dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.*)$", prose(PAGES[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> list[tuple[str, str]]:
    return [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", prose(text))]


def test_every_relative_link_and_its_anchor_exist():
    broken = []
    for page, link in links():
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        is_there = target.exists() and (
            not anchor or anchor in anchors(str(target.resolve().relative_to(ROOT.resolve())))
        )
        broken += [] if is_there else [f"{page}: {link}"]
    assert not broken
    assert len(links()) > MANY


def test_the_index_names_every_page():
    named = {link.partition("#")[0] for page, link in links() if page == "docs/index.md"}
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/") and "/upstream/" not in page}
    assert pages - {"index.md"} <= named


def test_paths_and_targets_that_pages_name_are_there():
    named = set(re.findall(r"`((?:glm_dsa|reference|verify|tests|docs|examples)/[\w/.*-]*)`", EVERY))
    assert len(named) > MANY
    assert not [path for path in named if not list(ROOT.glob(path.rstrip("/")))]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`| {2,}|; )make ([\w-]+)", EVERY, re.MULTILINE))
    assert {"verify", "test", "judge", "docs"} <= targets
    assert not [target for target in targets if f"\n{target}:" not in makefile]


def test_what_extending_names_in_a_file_is_in_it():
    rows = re.findall(r"^\| `([\w/.-]+)` \| (.*) \|$", PAGES["docs/extending.md"], re.MULTILINE)
    assert len(rows) > MANY
    for file, said in rows:
        text = (ROOT / file).read_text(encoding="utf-8")
        missing = [name for name in re.findall(r"`([\w.-]+)`", said) if name.rpartition(".")[2] not in text]
        assert not missing, f"{file}: {missing}"


# -- command lines and their options


class Parsed(BaseException):
    """A command line that its program takes; in the place of what it would do."""


def commands() -> list[tuple[str, str]]:
    """(program, arguments) of each `python -m PROGRAM ARGUMENTS` of a page: lines of code, and what stands in backticks."""
    lines = re.findall(r"^python -m ([\w.]+)(.*?)(?:\s+#.*)?$", EVERY, re.MULTILINE)
    inline = re.findall(r"`python -m ([\w.]+) ([^`]+ [^`]+)`", EVERY)  # of one word it is a command's name
    return list(dict.fromkeys((program, arguments.strip()) for program, arguments in (*lines, *inline)))


def lines_of(command: str) -> list[str]:
    """Arguments behind `python -m COMMAND` in the code of pages, once each."""
    found = re.findall(rf"^python -m {re.escape(command)}(?: (.*?))?(?:\s+#.*)?$", EVERY, re.MULTILINE)
    return list(dict.fromkeys(found))


def called(program: str, arguments: list[str]) -> None:
    name = f"{program}.__main__" if program in ("glm_dsa", "verify", "tests.carried") else program
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        importlib.import_module(name).main()


@pytest.mark.parametrize(("program", "arguments"), commands())
def test_a_command_line_parses(program, arguments, monkeypatch, registered):
    if program.startswith("examples."):
        assert (ROOT / f"{program.replace('.', '/')}.py").is_file()
        return
    parse = ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    if arguments == "--version":
        with pytest.raises(SystemExit, match=r"^0$"):
            called(program, [arguments])
    else:
        with pytest.raises(Parsed):
            called(program, shlex.split(arguments))


def test_there_are_command_lines_and_a_wrong_one_does_not_parse(capsys):
    assert len(commands()) > MANY
    with pytest.raises(SystemExit, match="2"):
        called("verify", ["drift", "DIR", "--agianst", "DIR"])


def options_of(program: str, capsys) -> set[str]:
    name, *command = program.split()
    with pytest.raises(SystemExit, match="0"):
        called(name, [*command, "--help"])
    return set(OPTION.findall(capsys.readouterr().out)) - {"--help"}


def options_of_the_gate() -> set[str]:
    class Recorder:
        """Takes what pytest_addoption registers."""

        names: list[str] = []  # noqa: RUF012

        def getgroup(self, _):
            return self

        def addoption(self, name, **_):
            self.names.append(name)

    plugin.pytest_addoption(Recorder())
    return set(Recorder.names)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_a_program_is_on_its_page(program, capsys):
    assert options_of(program, capsys) <= set(OPTION.findall(PAGES[f"docs/{PROGRAMS[program]}.md"]))


def test_every_option_of_the_gate_is_in_its_table():
    section = PAGES["docs/gate.md"].split("## Options of the gate")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE)) == options_of_the_gate()


def test_every_option_that_a_page_names_exists(capsys):
    known = options_of_the_gate() | ELSEWHERE
    for program in ("glm_dsa", *PROGRAMS):
        known |= options_of(program, capsys)
    for line in (*lines_of("glm_dsa"), "convert --recipe R --mtp drop"):
        if line.split()[0] in MLX_LM:  # that its options exist: test_a_command_line_parses
            known |= set(OPTION.findall(line))
    assert set(OPTION.findall(EVERY)) <= known


# -- those that run


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


def test_the_commands_of_quality_run(two_builds, capsys, monkeypatch):
    monkeypatch.chdir(two_builds)
    assert lines_of("verify quality")
    for line in lines_of("verify quality"):
        arguments = [a.replace("DIR", "original") for a in shlex.split(line)]
        small = [] if "--context" in line else ["--context", "32", "--tokens", "100"]
        assert verify.__main__.main(["quality", *arguments, *small]) == 0, line
        assert "KL(base || candidate)" in capsys.readouterr().out


@pytest.mark.slow("verify/drift", "verify/commands", "docs/drift")
def test_the_commands_of_drift_run(two_builds, capsys, monkeypatch):
    assert lines_of("verify drift")
    monkeypatch.chdir(two_builds)
    for line in lines_of("verify drift"):
        other = {"5": "9", "3,7-9": "1,2-3"}  # bits that its indexer leaves room for; layers that it has
        arguments = [other.get(a, a) for a in shlex.split(line)]
        code = verify.__main__.main(["drift", *arguments, *([] if "--tokens" in line else ["--tokens", "24"])])
        said = capsys.readouterr()
        assert (code in (0, 1), said.err) == (True, ""), line
        assert said.out.startswith("candidate  ")
    assert sorted(p.name for p in (two_builds / "OUT").iterdir()) == [
        "layers.0.self_attn.heads.npz", "recipe.toml", "report.html", "report.json", "report.jsonl"
    ]  # fmt: skip


def test_the_commands_of_bench_on_paper_run(capsys, tmp_path, monkeypatch):
    (tmp_path / "F").write_text(contenders.TRUE.read_text())
    monkeypatch.chdir(tmp_path)
    on_paper = [line for line in lines_of("verify bench") if "--paper" in line]
    assert on_paper
    for line in on_paper:
        assert verify.__main__.main(["bench", *line.split()]) == 0
        assert "together" in capsys.readouterr().out


def test_the_commands_of_the_definition_run(registered, tmp_path, capsys, monkeypatch):
    folder = checkpoints.write(tmp_path / "ck", checkpoints.packable(num_hidden_layers=4))
    checkpoints.write_tokenizer(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert {line.split()[0] for line in lines_of("glm_dsa")} >= {"inventory", "plan", "generate", "convert", "attach"}
    for line in lines_of("glm_dsa"):
        paths = {
            "DIR": folder,
            "config.json": folder / "config.json",
            "OUT": tmp_path / "out",
            "OUT/build": tmp_path / "build",
        }
        arguments = [str(paths.get(a, a)).replace("OUT", str(tmp_path / "cache")) for a in shlex.split(line)]
        if arguments[0] in ("server", "lora"):
            continue  # tried in test_mlx_lm.py, and that they parse above
        if arguments == ["--version"]:
            with pytest.raises(SystemExit, match="0"):
                main(arguments)
        else:
            assert main(arguments) == 0
        assert capsys.readouterr().out


# -- what else a page says


def test_python_in_a_page_is_generated():
    """From examples/, which are run, or from the code itself."""
    by_hand = [page for page, text in PAGES.items() if "```python" in blocks.BLOCK.sub("", text)]
    assert not by_hand
    assert "```python" in EVERY


def test_the_recipe_in_the_page_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGES["docs/recipes.md"], re.DOTALL)
    (tmp_path / "r.toml").write_text(text)
    formats = recipe.load(tmp_path / "r.toml").formats(
        ModelArgs.from_file(ROOT / "verify" / "configs" / "glm-5.2.json"), with_mtp=True
    )
    assert str(formats["model.layers.77.mlp.switch_mlp.down_proj.weight"]) == "4 bit mxfp4, groups of 32"
    assert str(formats["model.layers.76.mlp.switch_mlp.down_proj.weight"]) == "bf16"


def test_the_table_of_conventions_is_complete():
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", PAGES["docs/conventions.md"], re.MULTILINE))
    assert listed == {c.name for c in ModelArgs.from_dict(checkpoints.tiny()).conventions}
    assert set(OVERRIDES) - listed == {"index_topk", "indexer_types"}  # no convention, and the schedule


def test_the_makefile_does_what_the_pages_say_of_it():
    listed = subprocess.run(
        ["make", "-n", "verify", "test", "train", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pytest verify/" in listed.stdout
    assert "pytest tests/" in listed.stdout
    assert "reference.train --indexer-rope interleaved" in listed.stdout


def test_the_figures_of_the_captured_mass_are_the_cards():
    """Right layout, wrong layout, chance, each from .. to: as rounded from what was measured."""
    figures: dict = {"right": set(), "wrong": set(), "chance": set()}
    for name in LAYOUTS:
        measured = json.loads((TRAINED / name / card.MEASURED).read_text())["captured_mass"]
        for rope, mass in measured["by_layout"].items():
            figures["right" if rope == name else "wrong"].add(f"{mass['mean']:.2f}")
        figures["chance"].add(f"{measured['chance']:.2f}")
    right, wrong, chance = (" to ".join(sorted(found)) for found in figures.values())
    text = " ".join(PAGES["docs/layout.md"].split())
    assert f"it catches {right} of the attention under the right layout and {wrong} under the other" in text
    assert f"random keys would catch {chance}." in text
