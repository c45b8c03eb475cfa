"""Somebody's MLX code, unmodified: it loads, and each module that HF has too gives what HF's gives, on HF's layer inputs."""

from verify.core.collector import Collector
from verify.engines.third_party import Failed
from verify.implementation.judge import judge_case
from verify.implementation.subject import Theirs

CLAIM = "implementation: module by module"


def test_modules(theirs: Theirs, judge, gate):
    collector = Collector.of(judge)
    try:
        unseen = judge_case(theirs, collector)
    except Failed as error:
        collector.at_fault(theirs.name, "forward" if theirs.is_loaded else "load", str(error))
    else:
        gate.not_verified |= unseen
    collector.finish()
