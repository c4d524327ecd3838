"""The bench protocol: every operation's folder follows it, and what it says of shapes is so."""

import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels import bench


def every(tag: str) -> list[bench.Bench]:
    return [one for folder in bench.folders() for one in bench.benches(folder, tag)]


def test_every_folder_has_cases_for_a_cpu_and_for_a_chip():
    operations = {path.parent.name for path in Path(bench.__file__).parent.glob("*/reference.py")}
    assert operations == set(bench.folders())
    for tag in bench.TAGS:
        assert all(list(bench.benches(folder, tag)) for folder in bench.folders())
    with pytest.raises(ValueError, match="known: attention"):
        list(bench.benches("atention", "chip"))


def smallest() -> list[bench.Bench]:
    """Of each operation."""
    return list({one.operation: one for one in sorted(every("bench"), key=lambda one: -one.bytes_moved)}.values())


@pytest.mark.parametrize("one", smallest(), ids=lambda one: f"{one.operation}-{one.case}")
def test_inputs_are_what_the_arguments_say_and_the_door_takes_them(one):
    like = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in jax.eval_shape(one.inputs)]
    assert like == list(one.arguments)
    assert jax.eval_shape(one.run, *one.arguments) is not None


@pytest.mark.parametrize("one", every("chip"), ids=lambda one: f"{one.operation}-{one.case}")
def test_a_chips_bench_travels_to_another_process(one):
    travelled = pickle.loads(pickle.dumps((one.run, one.arguments, dict(one.peers))))
    assert travelled[1] == one.arguments
    assert one.operations > 0 and one.bytes_moved >= sum(np.dtype("int8").itemsize * z.size for z in one.arguments)


def test_sides_take_turns():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = bench.seconds_in_turns(sides, 2, between=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" * 3
    assert set(seconds) == {"a", "b"}
