"""Sweeps: what they run, and how results become a table."""

import re

import pytest

from experiments import sweep, sweeps
from glm_jax.config import ConfigError, fingerprint


@pytest.mark.parametrize("name", sweeps.known())
def test_every_sweep_names_runs_that_differ(name):
    runs = list(sweeps.get(name).runs())
    assert len({fingerprint(run) for _, run in runs}) == len(runs) > 1


def test_every_result_that_is_kept_is_one_of_a_sweep_as_it_stands():
    """A changed recipe would orphan results: a sweep names what it needs of it."""
    runs = {fingerprint(run) for name in sweeps.known() for _, run in sweeps.get(name).runs()}
    kept = {path.stem for path in sweep.Args("muon").results.glob("*.json") if re.fullmatch("[0-9a-f]{12}", path.stem)}
    assert kept == runs


def test_a_grid_of_another_form_is_refused():
    for grids in (({"optim.momentum": 0.9},), {"optim.momentum": (0.9,)}):
        with pytest.raises(ConfigError, match="must be a tuple of dictionaries of tuples"):
            sweeps.Sweep("tiny", grids)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"seeds": 0}, "seeds=0 must be a tuple of integers"),
        ({"stages": ("stage9",)}, "must be the first of tiny's, in order"),
        ({"stages": ("stage2",)}, "must be the first of tiny's, in order"),
    ],
)
def test_seeds_and_stages_are_checked_before_anything_runs(wrong, told):
    with pytest.raises(ConfigError, match=told):
        sweeps.Sweep("tiny", ({"optim.momentum": (0.9, 0.95)},), **wrong)


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
