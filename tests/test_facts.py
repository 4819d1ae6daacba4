"""What the extension and Python both state: limits, the columns of a table, and the names of enumerations."""

import pytest

from ersde_fast import levels, noise_scaler, plan, table
from ersde_fast.backends import MAX_DIMS, extension

pytestmark = pytest.mark.skipif(extension._C is None, reason="the extension was not built")


@pytest.fixture
def facts():
    return extension._C.facts


def test_limits(facts):
    assert facts["max_dims"] == MAX_DIMS
    assert facts["max_order"] == max(plan.MAX_ORDER.values())


def test_columns(facts):
    assert facts["columns"] == {name: getattr(table, name) for name in facts["columns"]}
    assert sorted(facts["columns"].values()) == list(range(table.W_D + 1))


def test_names(facts):
    assert facts["processes"] == list(levels.PROCESSES)
    assert facts["methods"] == list(plan.MAX_ORDER)
    assert set(facts["forms"]) == {scaler.form for scaler in noise_scaler.NOISE_SCALERS.values()}
