"""The planner's search: every mesh once, the promising first, and the compiler's word for the best few."""

import itertools
import json
import math

import pytest

from experiments import plan as script
from experiments import plan_search, recipes
from glm_jax import mesh, plan
from glm_jax.config import ConfigError, replace
from glm_jax.plan.search import meshes, search, seconds, told
from pallas_kernels import analysis

GLM45 = recipes.get("glm45")


def test_every_mesh_that_divides_the_devices_once():
    found = [tuple(mesh.sizes_of(sizes).values()) for sizes in meshes(8)]
    assert len(found) == len(set(found)) == 20  # three factors of 2 in four places
    assert all(math.prod(sizes) == 8 for sizes in found)
    assert len(list(meshes(24))) == 20 * 4
    assert {sizes.data for sizes in meshes(16, slices=4)} == {4, 8, 16}


def test_the_best_mesh_by_arithmetic_is_one_that_nothing_beats():
    pod = plan.target("v5p:8x8x8")
    found = search(GLM45, pod, 512, 4096, "train")
    assert told(found.candidates[0].work.axes) == "fsdp=32,expert=16"
    gathered = replace(GLM45, **{"model.dispatch": "gather"})
    assert told(search(gathered, pod, 512, 4096, "train").candidates[0].work.axes) == "fsdp=64,expert=8"
    assert len(found.candidates) + len(found.refused) + len(found.too_large) == 220  # nine factors of 2 in four places
    assert "E=160 cannot be split over expert axis of 64" in found.refused["fsdp=8,expert=64"]
    assert all(gib > 95 for gib in found.too_large.values())
    assert all(one.gib <= 95 and one.seconds == seconds(one.work, pod) for one in found.candidates)
    times = [one.total for one in found.candidates]
    assert all(a < b * 1.03 for a, b in itertools.pairwise(times))
    best = found.candidates[0]
    assert not [one for one in found.candidates if one.total < 0.98 * best.total]


def test_sampling_is_ranked_by_what_every_token_reads():
    found = search(GLM45, plan.target("v5p:8x8x8"), 512, 8192, "sample")
    assert told(found.candidates[0].work.axes) == "fsdp=16,expert=32"
    assert found.candidates[0].seconds["memory"] > 10 * found.candidates[0].seconds["compute"]
    assert all(one.work.axes["data"] == 1 for one in found.candidates)


def test_where_nothing_fits_the_smallest_need_is_told():
    with pytest.raises(ConfigError, match=r"none of the 35 meshes of v6e:4x4 can be: the smallest, .* needs .* GiB"):
        search(GLM45, plan.target("v6e:4x4"), 512, 4096, "train")
    with pytest.raises(ConfigError, match=r"none of the 35 meshes of v6e:4x4 can be: .*B=3 rows cannot be split"):
        search(GLM45, plan.target("v6e:4x4"), 3, 4097, "train")


def write_plan(name: str, out) -> None:
    """What a plan of this mesh would write: the first one's compiler dies, and the next one does not fit."""
    if name == "fsdp=32,expert=16":
        raise SystemExit(3)
    plan = {"roofline_s": {"compute": 2.0, "memory": 1.0, "network": 1.0, "dcn": 0.0}, "mfu_bound": 0.5}
    fits = name != "fsdp=16,context=2,expert=16"
    out.write_text(json.dumps(plan | {"held_gib": 15.0, "fits": fits}))


@pytest.mark.slow  # three processes
def test_the_compiler_has_the_last_word(capsys):
    found = plan_search.search(GLM45, plan.target("v5p:8x8x8"), (512, 4096), "train", 1, write_plan)
    ranked = found["ranked"]
    assert [one.get("fits") for one in ranked] == [True, False, None]
    assert ranked[1]["mesh_told"] == "fsdp=16,context=2,expert=16"
    assert ranked[2]["error"].startswith("not compiled: its process ended with 3")
    text = capsys.readouterr().out
    assert "144 meshes of 512 devices fit by arithmetic, 56 do not, 20 cannot be laid out" in text
    assert "DOES NOT FIT" in text and "not compiled, by arithmetic:" in text
    assert json.loads(json.dumps(found))["devices"] == 512


def test_without_a_compiler_a_search_ranks_by_arithmetic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analysis, "can_compile", lambda platform: False)
    asked = script.Args("v5p:8x8x8", batch=512, seq=4096, search=True, out=tmp_path / "search.json")
    script.main(asked, GLM45)
    found = json.loads((tmp_path / "search.json").read_text())
    assert len(found["by_arithmetic"]) == 144 and not found["ranked"]
    assert "by arithmetic alone: the compiler of v5p:8x8x8 is not installed: pip install" in capsys.readouterr().out


def test_a_search_takes_no_mesh():
    with pytest.raises(ConfigError, match="--search chooses the mesh; leave --mesh expert=8 out"):
        script.main(script.Args(search=True, mesh="expert=8"), GLM45)
