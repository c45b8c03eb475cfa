"""Somebody's MLX code, unmodified: it loads, and each module that HF has too gives what HF's gives, on HF's layer inputs."""

import pytest

from verify import causes, compare
from verify.findings import Collector
from verify.implementation import Failed
from verify.theirs import Theirs
from verify.watch import judge_modules

CLAIM = "implementation: modules, on the reference's input"


def test_modules(theirs: Theirs, judge, gate):
    collector = Collector.of(judge)
    judge_case(theirs, collector)
    collector.finish()


def judge_case(theirs, collector):
    try:
        theirs.model
    except Failed as error:
        collector.at_fault(theirs.name, "load", str(error))
        return
    for path, fault in causes.eps_faults(theirs):
        collector.record(fault)
        theirs.mended.add(path)
    for length in theirs.case.lengths:
        judge_modules(theirs, collector, length)
