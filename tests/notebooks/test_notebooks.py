"""Notebooks run from the first cell to the last on a tiny override, and each is the twin of its .py."""

from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="in the [dev] extra")
nbclient = pytest.importorskip("nbclient", reason="in the [dev] extra")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_pair_is_in_step(path):
    """`jupytext --sync notebooks/*.py` mends it."""
    twin = jupytext.read(path.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in twin.cells] == [(c.cell_type, c.source) for c in jupytext.read(path).cells]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_cell_runs(path, monkeypatch):
    monkeypatch.setenv("TOUR_STEPS", "4")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    nbclient.NotebookClient(jupytext.read(path), timeout=1500, resources={"metadata": {"path": ROOT}}).execute()
