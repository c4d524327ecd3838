"""experiments.kernels: rows as JSON, kept between runs of one file, and the table made of them."""

import json

import pytest

from experiments import kernels
from glm_jax.config import ConfigError


def test_figures_of_two_runs_share_a_file(tmp_path, capsys):
    out = tmp_path / "kernels_cpu.json"
    for case in ("small_decode", "tiny_model"):
        kernels.main(
            kernels.Args(
                op="newton_schulz" if case == "tiny_model" else "attention", case=(case,), repetitions=1, out=out
            )
        )
    record = json.loads(out.read_text())
    assert [row["case"] for row in record["rows"]] == ["small_decode", "tiny_model"]
    for row in record["rows"]:
        assert row["whose"] == "ours (xla)" and row["status"] == "measured" and row["figures"]["ms"] > 0
    assert "small_decode" in capsys.readouterr().out
    table = kernels.readme([out])
    assert "## cpu" in table and "| attention | small_decode | ours (xla) | measured | ms " in table


def test_a_refusal_is_a_row():
    assert kernels._told(NotImplementedError("\nfor TPU\nmore")) == "NotImplementedError: for TPU"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (kernels.Args(device="tpu:v5q"), "tpu:v5p"),
        (kernels.Args(device="gpu"), "jax runs on cpu here"),
        (kernels.Args(op="atention"), "attention"),
        (kernels.Args(case=("none",)), "no case of any operation is named none"),
    ],
)
def test_what_is_unknown_is_told(args, message):
    with pytest.raises(ConfigError, match=message):
        kernels.main(args)
