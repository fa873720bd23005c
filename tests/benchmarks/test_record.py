"""A record tells the commit of what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.record import PACKAGE, ROOT, hardware, require_same_checkout


def test_the_package_of_another_checkout_is_not_measured_under_this_one_s_commit(tmp_path: Path):
    require_same_checkout(PACKAGE, ROOT)
    with pytest.raises(SystemExit, match=f"would measure the package in {PACKAGE}"):
        require_same_checkout(PACKAGE, tmp_path)


def test_no_record_is_made_of_another_checkout(monkeypatch, tmp_path: Path):
    assert hardware()["commit"] != ""
    monkeypatch.setattr(require_same_checkout, "__defaults__", (PACKAGE, tmp_path))
    with pytest.raises(SystemExit, match="make setup"):
        hardware()
