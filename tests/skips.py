"""A skipped test is a failure where REGISTERLENS_SKIPS=refused, as in .ci/run: everything it needs should be there."""

import os

import pytest

ALLOWED = ("needs a GPU",)
"""Reasons that hold on a machine that has everything which can be installed."""


def pytest_configure(config):
    if os.environ.get("REGISTERLENS_SKIPS") == "refused":
        config.pluginmanager.register(_Refusal())


class _Refusal:
    # The outermost wrappers, so that they see what pytest itself makes of a skip.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        return _failed_if_skipped((yield))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self, collector):
        return _failed_if_skipped((yield))


def _failed_if_skipped(report):
    if not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"skipped, where no test may be (REGISTERLENS_SKIPS=refused): {reason}"
    return report
