"""The gate's options, and what the command line puts on trial by them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from glm_dsa.text import parse_ranges

from .. import cases, faults
from ..audit import audit, foreign_code
from ..cases.random_specs import random_specs
from ..engines.headers import headers_of
from ..engines.third_party import Implementation
from ..implementation import subject
from ..release import cost
from ..release.request import OnTrial

REAL_SHAPE = "one layer at GLM-5.2's true widths"
UNASKED: tuple[Any, ...] = (None, False, [], "float32", "cpu", "usual")  # the options below, where nobody asks for more
LAYOUT = "that the indexers were trained under this RoPE layout"
OF_RELEASE = (
    "--tokens", "--original", "--limit", "--prompt-file", "--policy", "--resume", "--timings", "--dtype", "--device",
)  # fmt: skip
OF_DEFINITION = ("--real-shape", "--long")
OF_CHECKPOINT = ("--index-topk", *OF_RELEASE)
# to see a fault again
REPEATED = ("--implementation", "--checkpoint", *(o for o in OF_CHECKPOINT if o not in ("--resume", "--timings")),
            *OF_DEFINITION, "--fault", "--random")  # fmt: skip


def add(parser: pytest.Parser) -> None:
    group = parser.getgroup("glm-dsa gate")
    group.addoption(
        "--checkpoint",
        metavar="DIR_OR_REPO",
        help="judge this release, of any size: HF's layout or mlx-lm's, packed or not",
    )
    group.addoption(
        "--implementation",
        metavar="MODULE[:CLASS]",
        help="judge this MLX code in the place of glm_dsa: a module, or a .py file, that exports ModelArgs and Model "
        "(or CLASS) as mlx-lm's do; on the gate's own checkpoints, or on --checkpoint",
    )
    group.addoption(
        "--index-topk", metavar="K", type=int, help="with --checkpoint: lower index_topk, so that short prompts pass it"
    )
    group.addoption(
        "--tokens", metavar="N", type=int, help="with --checkpoint: the prompt's length (default: 4 index_topk)"
    )
    group.addoption(
        "--original",
        metavar="DIR_OR_REPO",
        help="with --checkpoint: what it was made from; tells damage from rounding, and what quantization cost",
    )
    group.addoption(
        "--limit",
        metavar="NAME=NUMBER",
        action="append",
        default=[],
        help=f"with --original: fail beyond this cost; {', '.join(cost.LIMITS)}; may be repeated",
    )
    group.addoption(
        "--prompt-file",
        metavar="FILE",
        help="with --checkpoint: text to run on, not random tokens; needs tokenizer.json",
    )
    group.addoption(
        "--policy",
        choices=audit.POLICIES,
        default=audit.POLICIES[0],
        help="with --checkpoint: strict makes few bits in an indexer, router or embedding a FAULT, not a warning",
    )
    group.addoption(
        "--resume",
        action="store_true",
        help="with --checkpoint: go on after the last layer that an interrupted run finished",
    )
    group.addoption(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="with --checkpoint: what the release runs in; in 16 bit the bounds are HF's own errors in bfloat16",
    )
    group.addoption(
        "--device", choices=("cpu", "gpu"), default="cpu", help="with --checkpoint: what the release runs on"
    )
    group.addoption(
        "--timings",
        action="store_true",
        help="with --checkpoint: also time each layer's reading and passes as bare loops",
    )
    group.addoption(
        "--fault",
        metavar="NAME",
        action="append",
        default=[],
        help="seed this fault in our definition first, to see how it is caught; may be repeated "
        "(`python -m verify faults` lists them)",
    )
    group.addoption(
        "--random",
        metavar="N",
        type=int,
        default=0,
        help="judge N small checkpoints of random shape in the place of the gate's own",
    )
    group.addoption("--seed", type=int, default=0, help="of weights and prompts (default 0)")
    group.addoption("--layers", metavar="LIST", help="judge only these layers' stages, e.g. 0-3,6")
    group.addoption("--report", metavar="DIR", help="write report.jsonl there: header, one record a comparison, footer")
    group.addoption("--real-shape", action="store_true", help=f"also judge {REAL_SHAPE} (minutes, 9 GiB)")
    group.addoption(
        "--long", action="store_true", help="also judge selections behind 32k tokens of context (3 minutes)"
    )


@dataclass(frozen=True)
class Asked:
    """specs: checkpoints that all claims are held to; release: what is judged layer by layer, `only` says why only so;
    implementation: somebody's code, judged on `specs`; layers: those whose stages count; is_of_definition: the definition alone is
    judged, on the gate's own checkpoints."""

    specs: list[cases.Spec]
    release: OnTrial | None = None
    only: str = ""
    implementation: Implementation | None = None
    layers: set[int] | None = None
    is_of_definition: bool = False

    @classmethod
    def of(cls, config: Any) -> Asked:
        """Raises ValueError, LookupError or OSError, in one line, for what cannot be judged."""
        if config.getoption("--seed") < 0:
            raise ValueError(f"--seed {config.getoption('--seed')}: expected 0 or more")
        with faults.seeded(*config.getoption("--fault")):
            pass  # names that nobody knows, or two changes of the same words
        _set_device(config.getoption("--device"))
        layers = parse_layers(config.getoption("--layers"))
        text, checkpoint = config.getoption("--implementation"), config.getoption("--checkpoint")
        if checkpoint is None:
            _belongs(config, OF_CHECKPOINT, "--checkpoint")
        elif text is not None:
            _belongs(config, OF_RELEASE, "--checkpoint without --implementation")
        random = config.getoption("--random")
        if random < 0 or (random and (checkpoint is not None or text is not None)):
            raise ValueError(
                f"--random {random}: how many checkpoints, 1 or more, and no --checkpoint or --implementation"
            )
        if text is not None and config.getoption("--fault"):
            raise ValueError("--fault seeds our definition: it does not go with --implementation")
        if text is not None:
            _belongs(config, OF_DEFINITION, "our definition: it does not go with --implementation")
            implementation = Implementation.of(text)
            own = subject.specs() if checkpoint is None else [_their_spec(Path(checkpoint), config)]
            return cls(own, implementation=implementation, layers=layers)
        if checkpoint is None:
            specs = random_specs(random) if random else cases.default_specs()
            return cls(specs, layers=layers, is_of_definition=not random)
        release = _release(config, layers)
        specs, only = _all_claims(config, release)
        return cls(specs, release, only, layers=layers)

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.specs] or ([self.release.name] if self.release else [])

    def conventions(self) -> dict[str, list[str]]:
        """{what is in force: the cases that it holds for}."""
        lines: dict[str, list[str]] = {}
        on_trial: list[Any] = self.specs or ([self.release] if self.release else [])
        for case in on_trial:
            for convention in case.args.conventions:
                if self.implementation is None or not convention.name.startswith("mtp"):  # nobody's draft is judged
                    lines.setdefault(str(convention), []).append(case.name)
        return lines

    def not_verified(self, config: Any) -> dict[str, str]:
        """What this command leaves out, by what it asks for: {what: why}."""
        seeded = {
            f"the definition as it is: seeded with {name}": faults.named(name).what
            for name in config.getoption("--fault")
        }
        lines = dict(seeded)
        if config.getoption("--device") == "cpu":
            lines["Metal or CUDA"] = "the verdict is given on the CPU"
        if config.getoption("--dtype") == "float32":
            lines["16 bit"] = "the verdict is given in float32"
        else:
            lines["float32"] = "the verdict is given in bfloat16, within HF's own errors in it"
        if self.implementation is not None:
            return lines | subject.NOT_VERIFIED
        for spec in self.specs:
            if spec.claims:
                lines[f"{spec.name}, other claims"] = f"left out for time; judged in: {', '.join(spec.claims)}"
            if spec.args.num_nextn_predict_layers and not spec.has_mtp:
                lines[f"MTP of {spec.name}"] = (
                    "config.json names an MTP layer, but the checkpoint has no tensors for it"
                )
        return lines | (self._of_release() if self.release is not None else {})

    def _of_release(self) -> dict[str, str]:
        release, lines = self.release, {}
        assert release is not None
        args = release.args
        if self.only:
            lines["the gate's other claims"] = f"not of this release: {self.only}"
        if release.original is None:
            lines["that these are the model's own weights and config values"] = (
                "without --original nobody can tell swapped layers or experts, values changed within the usual range, another "
                "rope_theta, index_topk, num_experts_per_tok, or the tokenizer; the perplexity of a text, where one is measured, "
                "may show them"
            )
        if not release.prompt.is_text:
            lines["perplexity of a text"] = f"{release.prompt}: {release.prompt.why_random}"
        if code := foreign_code.not_verified(release.headers):
            lines[foreign_code.WHAT] = code
        if args.has_indexer and not release.is_sparse:
            length = release.tokens.shape[1]
            lines["selections"] = f"the prompt's {length} tokens are within index_topk = {args.index_topk}"
        if args.num_nextn_predict_layers and not self.specs:
            is_there = args.num_hidden_layers in release.layers
            lines["MTP"] = "of drafts, only the first step is judged" if is_there else "no tensors of it, or left out"
        had = release.original is not None and release.original.config.get("num_nextn_predict_layers", 0)
        if had and args.num_hidden_layers not in release.layers:
            lines["MTP"] = "the original has such a layer; the release has none of it, or it is left out"
        if args.has_indexer:
            lines[LAYOUT] = (
                "HF runs them under the same one; verify/claims/test_release_layout.py asks the weights, and was not run"
            )
        return lines


ASKED = pytest.StashKey[Asked]()


def again(config: Any) -> list[str]:
    """The options that a fault is seen again with."""
    words: list[str] = []
    for option in REPEATED:
        value = config.getoption(option)
        if value in UNASKED:
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [option] if each is True else [option, str(each)]
    return words


def _belongs(config: Any, options: tuple[str, ...], to: str) -> None:
    for option in options:
        value = config.getoption(option)
        if value not in UNASKED or type(value) is int:  # 0 too, which equals False: none of these has it as its default
            raise ValueError(f"{option} belongs to {to}")


def _release(config: Any, layers: set[int] | None) -> OnTrial:
    original, prompt = config.getoption("--original"), config.getoption("--prompt-file")
    return OnTrial.of(
        headers_of(config.getoption("--checkpoint")), config.getoption("--index-topk"), config.getoption("--tokens"), layers,
        None if original is None else headers_of(original), cost.parse_limits(config.getoption("--limit")),
        None if prompt is None else Path(prompt), config.getoption("--seed"), config.getoption("--dtype") == "bfloat16",
    )  # fmt: skip


def _all_claims(config: Any, release: OnTrial) -> tuple[list[cases.Spec], str]:
    """The release for all claims, if it can be held to them; or why not."""
    if release.refused:
        return [], "it does not load"
    if release.original is not None:
        return [], "judged beside its original"
    if (config.getoption("--dtype"), config.getoption("--device")) != ("float32", "cpu"):
        return [], "they are judged in float32 on the CPU"
    try:
        return [cases.spec_of(release.folder, config.getoption("--index-topk"))], ""
    except ValueError as error:  # GlmDsaError too
        return [], str(error).removeprefix(f"--checkpoint {release.folder}: ")


def _their_spec(folder: Path, config: Any) -> cases.Spec:
    return subject.check(cases.spec_of(folder, config.getoption("--index-topk")))


def _set_device(name: str) -> None:
    """On a Mac the default would be Metal."""
    mx.set_default_device(mx.cpu)
    if name == "gpu":
        if not mx.is_available(mx.gpu):
            raise ValueError("--device gpu: this build of mlx sees none")
        mx.set_default_device(mx.gpu)


def parse_layers(text: str | None) -> set[int] | None:
    if text is None:
        return None
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise ValueError(f"--layers {text}: {error}") from None
