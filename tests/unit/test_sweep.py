"""Sweeps: what they run, and how results become a table."""

import pytest

from experiments import sweep, sweeps
from glm_jax.config import ConfigError, fingerprint


@pytest.mark.parametrize("name", sweeps.known())
def test_every_sweep_names_runs_that_differ(name):
    runs = list(sweeps.get(name).runs())
    assert len({fingerprint(run) for _, run in runs}) == len(runs) > 1


def test_an_unknown_sweep_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'muon'"):
        sweeps.get("moun")


def test_a_row_of_the_table_is_a_point_over_its_seeds():
    records = [
        {"changes": {"model.E": experts, "loop.seed": seed}, "metrics": {"general": experts + seed}}
        for seed in (0, 2)
        for experts in (16, 8)
    ]
    rows = sweep.table(records, "general")
    assert [(row["changes"], row["mean"], row["stderr"]) for row in rows] == [
        ({"model.E": 8}, 9.0, 1.0),
        ({"model.E": 16}, 17.0, 1.0),
    ]
    assert "| model.E=8 | 9.0000 | 1.0000 | 2 |" in sweep.markdown(rows)
