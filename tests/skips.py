"""A pytest plugin: skips what wants a GPU where there is none; where CI=true, another skip turns a run red.

A test may only be skipped for want of a GPU or a Docker engine, and says so with the marker `gpu` or
`docker`. Anything else that is missing is a broken set-up, which a green run would hide.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Final

import pytest

ALLOWED: Final = frozenset({"gpu", "docker"})


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") == "true":
        config.pluginmanager.register(SkipsAreFailures(), "skips-are-failures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


class SkipsAreFailures:
    """Collects skips without a marker in ALLOWED, names them, and fails the run."""

    def __init__(self) -> None:
        self.unexcused: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        # an expected failure is reported as skipped too
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note(item, report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        if report.skipped:  # a whole file: importorskip, or pytest.skip at its top
            self._note(collector, report)
        return report

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.unexcused and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.unexcused:
            return
        terminalreporter.section(
            "skipped, and CI allows no skip but for a GPU or Docker", red=True, bold=True
        )
        for line in self.unexcused:
            terminalreporter.line(line)

    def _note(
        self, node: pytest.Item | pytest.Collector, report: pytest.TestReport | pytest.CollectReport
    ) -> None:
        if not ALLOWED.intersection(marker.name for marker in node.iter_markers()):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.unexcused.append(f"{node.nodeid}: {reason}")
