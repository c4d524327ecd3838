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


@pytest.mark.parametrize(
    "change", [{"device": "tpu:v5p"}, {"machine": {"jax": "0.0.1", "device": "cpu"}}, {"machine": {"device": "mill"}}]
)
def test_a_file_of_another_device_machine_or_jax_is_left_as_it_is(tmp_path, change):
    out = tmp_path / "kernels.json"
    record = {"device": "cpu", "machine": kernels._machine(), "rows": []}
    record |= {name: record[name] | value if name == "machine" else value for name, value in change.items()}
    out.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"has rows of --device .* name another file, or remove this one"):
        kernels.main(kernels.Args(op="newton_schulz", case=("tiny_model",), repetitions=1, out=out))
    assert json.loads(out.read_text()) == record


def test_a_refusal_is_a_row():
    assert kernels._told(NotImplementedError("\nfor TPU\nmore")) == "NotImplementedError: for TPU"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (kernels.Args(device="tpu:v5q"), "tpu:v5p"),
        (kernels.Args(device="gpu"), "jax runs on cpu here"),
        (kernels.Args(op="atention"), "attention"),
        (kernels.Args(repetitions=0), "repetitions 0 must be at least 1"),
        (kernels.Args(case=("none",)), "no case of any operation is named none"),
    ],
)
def test_what_is_unknown_is_told(args, message):
    with pytest.raises(ConfigError, match=message):
        kernels.main(args)
