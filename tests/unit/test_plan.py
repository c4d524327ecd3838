"""The planner: names and sizes refused in a second, arithmetic from declarations, and programs read from their text."""

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from experiments import plan as script
from experiments import recipes
from glm_jax import mesh, model, plan
from glm_jax.config import ConfigError, Mesh, replace
from glm_jax.plan import analytic
from glm_jax.plan.hlo import Program
from glm_jax.plan.kernels import operations
from glm_jax.plan.target import GIB, names
from glm_jax.spec import count
from pallas_kernels import analysis
from pallas_kernels.grouped_matmul import expert_mlp

POD = plan.target("v5p:8x8x8")
GLM45 = recipes.get("glm45")

PROGRAM = """HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (stack: bf16[5,8,16], n: s32[]) -> bf16[8,16] {
  %stack = bf16[5,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,8,16]{2,1,0} dynamic-slice(%stack, %n, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = bf16[8,16]{1,0} bitcast(%one)
}, execution_thread="sparsecore"

%body (state: (s32[], f32[4,16], bf16[5,8,16])) -> (s32[], f32[4,16], bf16[5,8,16]) {
  %state = (s32[], f32[4,16]{1,0}, bf16[5,8,16]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = f32[4,16]{1,0} get-tuple-element(%state), index=1
  %stack = bf16[5,8,16]{2,1,0} get-tuple-element(%state), index=2
  %w = bf16[8,16]{1,0} fusion(%stack, %n), kind=kLoop, calls=%sliced
  %whole = bf16[16,16]{1,0} all-gather(%w), channel_id=1, replica_groups=[4,2]<=[4,2], dimensions={0}, metadata={op_name="jit(step)/gather"}
  %y = f32[4,16]{1,0} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[4,16]{1,0}, bf16[5,8,16]{2,1,0}) tuple(%n, %y, %stack)
}

%test (state: (s32[], f32[4,16], bf16[5,8,16])) -> pred[] {
  %state = (s32[], f32[4,16]{1,0}, bf16[5,8,16]{2,1,0}) parameter(0)
  ROOT %again = pred[] constant(true)
}

ENTRY %main (x: f32[4,16], stack: bf16[5,8,16]) -> f32[4,16] {
  %x = f32[4,16]{1,0} parameter(0)
  %stack = bf16[5,8,16]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,16]{1,0}, bf16[5,8,16]{2,1,0}) tuple(%zero, %x, %stack)
  %loop = (s32[], f32[4,16], bf16[5,8,16]) while(%start), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %y = f32[4,16]{1,0} get-tuple-element(%loop), index=1
  %product = f32[4,4]{1,0} convolution(%y, %x), dim_labels=bf_oi->bf
  ROOT %all = f32[4,16]{1,0} all-reduce(%y), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}
"""


def test_loops_count_by_their_trips():
    program = Program(PROGRAM)
    assert program.flops == {"xla": 5 * 2 * 4 * 16 * 16 + 2 * 4 * 16 * 4}
    gather, total = program.collectives
    assert (gather.kind, gather.devices, gather.times) == ("all-gather", (0, 1), 5)
    assert gather.bytes == 8 * 16 * 2  # the other device's half
    assert (total.kind, total.devices, total.times) == ("all-reduce", (0, 2, 4, 6), 1)
    assert total.bytes == 2 * 4 * 16 * 4 * 3 / 4


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", (0, 1, 4, 5)),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", (0, 4)),
        ("{{3,1},{2,0}}", (3, 1)),
    ],
)
def test_groups_of_devices_as_compilers_write_them(written, devices):
    text = PROGRAM.replace("replica_groups={{0,2,4,6},{1,3,5,7}}", f"replica_groups={written}")
    assert Program(text).collectives[1].devices == devices


def test_a_loop_without_a_count_ends_at_what_it_compares_with():
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert Program(text).collectives[0].times == 1  # known on the device alone
    end = (
        "  %n = s32[] get-tuple-element(%state), index=0\n  %end = s32[] constant(7)\n"
        "  ROOT %again = pred[] compare(%n, %end), direction=LT"
    )
    text = text.replace("  ROOT %again = pred[] constant(true)", end)
    assert Program(text).collectives[0].times == 7
    text = text.replace("%zero = s32[] constant(0)", "%one = s32[] constant(1)\n  %zero = s32[] copy(%one)")
    assert Program(text).collectives[0].times == 6  # the first turn has been taken out


def test_a_slice_of_a_stack_moves_no_more_than_itself():
    w, whole, x = 8 * 16 * 2, 16 * 16 * 2, 4 * 16 * 4
    in_a_trip = (w + 4 + w) + (w + whole) + (x + whole + x)  # the fusion reads its slice and the counter
    assert Program(PROGRAM).bytes_moved == 5 * in_a_trip + (x + x + 4 * 4 * 4) + (x + x)


def test_nor_does_one_that_a_fusion_inside_another_takes():
    outer = """%outer (n: s32[], stack: bf16[5,8,16]) -> bf16[8,16] {
  %n = s32[] parameter(0)
  %stack = bf16[5,8,16]{2,1,0} parameter(1)
  %same = bf16[5,8,16]{2,1,0} bitcast(%stack)
  ROOT %w = bf16[8,16]{1,0} fusion(%same, %n), kind=kLoop, calls=%sliced
}

%body"""
    text = PROGRAM.replace(
        "fusion(%stack, %n), kind=kLoop, calls=%sliced", "fusion(%n, %stack), kind=kLoop, calls=%outer"
    )
    assert Program(text.replace("%body", outer, 1)).bytes_moved == Program(PROGRAM).bytes_moved

    tiled_anew = """%tiled (stack: bf16[5,8,16]) -> bf16[5,8,16] {
  %stack = bf16[5,8,16]{2,1,0} parameter(0)
  ROOT %again = bf16[5,8,16]{2,1,0:T(8,128)(2,1)} copy(%stack)
}

"""
    in_place = "fusion(%stack), output_to_operand_aliasing={{}: (0, {})}, kind=kLoop, calls=%tiled"
    outer = tiled_anew + outer.replace("bitcast(%stack)", in_place)
    assert Program(text.replace("%body", outer, 1)).bytes_moved == Program(PROGRAM).bytes_moved
    outer = outer.replace("output_to_operand_aliasing={{}: (0, {})}, ", "")  # in memory of its own
    assert Program(text.replace("%body", outer, 1)).bytes_moved > Program(PROGRAM).bytes_moved


def test_nor_one_that_is_read_and_written_in_place():
    updated = """
  %more = bf16[1,8,16]{2,1,0} negate(%one)
  ROOT %after = bf16[5,8,16]{2,1,0} dynamic-update-slice(%stack, %more, %n, %zero, %zero)"""
    text = PROGRAM.replace("\n  ROOT %flat = bf16[8,16]{1,0} bitcast(%one)", updated)
    assert text != PROGRAM
    assert Program(text).bytes_moved == Program(PROGRAM).bytes_moved


def test_what_lies_in_the_fast_memory_moves_once_to_get_there():
    w, whole, x = 8 * 16 * 2, 16 * 16 * 2, 4 * 16 * 4
    near = PROGRAM.replace(
        "  %y = f32[4,16]{1,0} dot(%x, ",
        "  %begun = (f32[4,16]{1,0:S(1)}, f32[4,16]{1,0}, u32[]{:S(2)}) copy-start(%x)\n"
        "  %near = f32[4,16]{1,0:S(1)} copy-done(%begun)\n"
        "  %y = f32[4,16]{1,0:T(4,128)S(1)} dot(%near, ",
    )
    in_a_trip = (w + 4 + w) + (w + whole) + x + whole
    assert Program(near).bytes_moved == 5 * in_a_trip + (x + x + 4 * 4 * 4) + (x + x)

    begun = "((f32[4,16]{1,0}), f32[4,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:16]}"
    piece = near.replace("(f32[4,16]{1,0:S(1)}, f32[4,16]{1,0}, u32[]{:S(2)}) copy-start(%x)", begun)
    assert piece != near
    assert Program(piece).bytes_moved == Program(near).bytes_moved


def test_batched_products_are_convolutions_with_holes():
    labels = "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf"
    batched = PROGRAM.replace(
        "f32[4,4]{1,0} convolution(%y, %x), dim_labels=bf_oi->bf", f"f32[3,4,4] convolution(%p, %q), {labels}"
    )
    batched = batched.replace(
        "  %zero = s32[] constant(0)\n  %start",
        "  %p = f32[3,4,16] parameter(2)\n  %q = f32[3,16,4] parameter(3)\n  %zero = s32[] constant(0)\n  %start",
    )
    # places o*2 + k for o, k in 0..2 that are multiples of 3 up to 6: (0,0) (1,1) (2,2)
    assert Program(batched).flops["xla"] == 5 * 2 * 4 * 16 * 16 + 2 * 4 * 4 * 16 * 3


def test_products_of_a_library_are_counted():
    dot = "%y = f32[4,16]{1,0} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert dot in PROGRAM
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    library = (
        '%both = (f32[4,16]{1,0}, s8[64]{0}) custom-call(%x, %whole), custom_call_target="__cublas$gemm", '
        f"backend_config={config}\n  %y = f32[4,16]{{1,0}} get-tuple-element(%both), index=0"
    )
    assert Program(PROGRAM.replace(dot, library)).flops == Program(PROGRAM).flops


def test_the_largest_arrays_are_named_by_their_source():
    told = [(opcode, str(shape), source) for opcode, shape, source in Program(PROGRAM).largest(20)]
    assert told[0] == ("while", "bf16[5,8,16]", "")
    assert ("all-gather", "bf16[16,16]", "jit(step)/gather") in told


def test_a_call_of_a_kernel_does_what_its_estimate_says():
    def copied(x, flops=100):
        def body(x_ref, y_ref):
            y_ref[...] = x_ref[...]

        cost = pl.CostEstimate(flops=flops, bytes_accessed=1, transcendentals=0)
        return pl.pallas_call(body, out_shape=x, cost_estimate=cost, name="copied")(x)

    def step(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(copied)(x), None), x, length=5)
        return copied(x, 200)

    assert operations(jax.make_jaxpr(step)(jnp.zeros(8)).jaxpr) == {"copied": 150}


def test_kernels_of_a_gpu_are_counted_as_often_as_their_loop_runs():
    dot = next(line for line in PROGRAM.splitlines() if " dot(" in line)
    name = 'metadata={op_name="jit(step)/while/body/attention_dq/mpmd_map"}'
    call = f'{dot.split(" dot(")[0]} custom-call(), custom_call_target="mosaic_gpu_v2", {name}'
    found = Program(PROGRAM.replace(dot, call))
    assert found.kernels == {"attention_dq": 5}


def test_the_state_of_glm45_on_512_devices():
    work = plan.check(GLM45, POD, Mesh(fsdp=64, expert=8), 512, 4096)
    state = analytic.memory(work)["state (parameters, momentum)"] / GIB
    assert 5.19 < state < 5.4  # 356.8 B x 8 bytes / 512, and the second moments of the embedding
    assert analytic.memory(work)["residuals"] / GIB == pytest.approx(93 * 4096 * 5120 * 2 / GIB)


def test_what_a_step_needs_at_the_least():
    work = plan.check(GLM45, POD, Mesh(fsdp=64, expert=8), 512, 4096)
    needed = analytic.memory(work)
    assert needed["gradients"] / GIB == pytest.approx(356.8e9 * 2 / 512 / GIB, rel=0.01)  # in the type of the layers
    frugal = replace(GLM45, **{"model.remat": "offload", "optim.momentum_dtype": "bfloat16"})
    less = analytic.memory(plan.check(frugal, POD, Mesh(fsdp=64, expert=8), 512, 4096))
    assert less["residuals"] == 0
    assert less["state (parameters, momentum)"] / needed["state (parameters, momentum)"] == pytest.approx(
        0.75, rel=0.01
    )


def test_operations_are_six_a_parameter_and_attention():
    work = plan.check(GLM45, POD, Mesh(fsdp=64, expert=8), 512, 4096)
    active = 33e9 + 2 * 151_552 * 5120  # with the MTP layer, the head used twice
    assert analytic.operations(work)["model"] == pytest.approx(6 * active * 4096, rel=0.15)
    none = plan.check(replace(GLM45, **{"model.remat": "none"}), plan.target("v5p:8x8x16"), Mesh(expert=8), 1024, 512)
    assert analytic.operations(none)["recomputed"] < 0.02 * analytic.operations(none)["model"]  # scores alone


def test_experts_are_gathered_along_fsdp_alone():
    found = analytic.traffic(plan.check(GLM45, POD, Mesh(fsdp=64, expert=8), 512, 4096))
    experts, vocabulary = 90 * 160 * 3 * 5120 * 1536, 2 * 151_552 * 5120
    others = count(model.specs(GLM45.model)) - experts - vocabulary
    summed = 2 * ((experts + vocabulary) / 8 + others) * 63 / 64  # bfloat16
    assert found["fsdp reduce-scatter"] == pytest.approx(summed, rel=0.01)
    outputs = 2 * 93 * 96 * 128 * 5120 * 63 / 64  # of attention: once more in the backward pass
    assert found["fsdp all-gather"] == pytest.approx(2 * summed + outputs, rel=0.01)
    assert not [key for key in found if key.startswith("data")]


def test_over_a_wide_expert_axis_tokens_go_where_their_experts_are():
    sizes, tokens = Mesh(fsdp=32, expert=16), 90 * 4096
    by = {
        dispatch: analytic.traffic(plan.check(replace(GLM45, **{"model.dispatch": dispatch}), POD, sizes, 512, 4096))
        for dispatch in ("gather", "ragged", None)
    }
    assert by[None] == by["ragged"]
    assert "expert ragged-all-to-all" not in by["gather"]
    less = sum(by["gather"].values()) - sum(by["ragged"].values())
    assert less == pytest.approx(tokens * (15 - 6.1565) * (5 * 5120 * 2 + 5 * 8 * 4), rel=1e-3)


def test_a_row_of_a_ragged_exchange_crosses_several_links_of_a_torus():
    work = plan.check(GLM45, POD, Mesh(fsdp=32, expert=16), 512, 4096)
    assert [round(POD.crossed(n), 2) for n in (8, 16, 64)] == [1.5, 1.89, 3]  # a quarter of each side of a cube
    assert plan.target("v6e:16x16").crossed(16) == 2
    assert plan.target("h200:1x2x8").crossed(16) == 1  # switched
    ragged, gathered = (
        plan.network_seconds(work, POD, {f"expert {kind}": 600e9}) for kind in ("ragged-all-to-all", "all-gather")
    )
    assert (ragged["network"], gathered["network"]) == (POD.crossed(16), 1)


@pytest.mark.parametrize(
    ("machine", "sizes", "key", "far"),
    [
        (plan.target("v5p:4x4x8", 2), Mesh(data=2, fsdp=16, expert=8), "data all-reduce", 1),
        (plan.target("v5p:4x4x8", 2), Mesh(data=4, fsdp=8, expert=8), "data all-reduce", 1 / 3),
        (plan.target("v5p:4x4x8", 2), Mesh(data=2, fsdp=16, expert=8), "fsdp all-gather", 0),
        (plan.target("h200:1x8x8"), Mesh(fsdp=8, expert=8), "expert all-gather", 0),
        (plan.target("h200:1x8x8"), Mesh(fsdp=8, expert=8), "fsdp all-gather", 1),
        (plan.target("h200:1x8x8"), Mesh(fsdp=16, expert=4), "fsdp all-gather", 7 / 15),  # of 15 others' parts 7 each by two
        (plan.target("h200:1x8x8"), Mesh(fsdp=8, expert=8), "fsdp+expert all-to-all", 56 / 63),
        (plan.target("h200:1x4x8"), Mesh(fsdp=2, expert=16), "expert ragged-all-to-all", 8 / 15),
        (plan.target("h200:1x5x8"), Mesh(fsdp=8, expert=5), "expert all-gather", 1),  # devices 5 to 9: three and two
        (plan.target("h200:1x5x8"), Mesh(fsdp=4, expert=10), "expert all-gather", 4 / 9),  # 8 and 2, to which four parts each come
        (plan.target("h200:1x5x8"), Mesh(fsdp=4, expert=10), "expert all-to-all", 8 / 9),
        (plan.target("h200:1x1x1"), Mesh(), "all-gather", 0),
        (plan.target("h200:2x1x8"), Mesh(data=2, expert=8), "data all-reduce", 1),
    ],
)  # fmt: skip
def test_what_other_slices_or_hosts_have_comes_once_and_over_their_network(machine, sizes, key, far):
    work = analytic.work(GLM45, mesh.fill(sizes, machine.count), 512, 4096)
    seconds = plan.network_seconds(work, machine, {key: 1e9})
    assert seconds["dcn"] == pytest.approx(far * 1e9 / machine.dcn_bandwidth)
    assert seconds["network"] == pytest.approx((1 - far) * 1e9 / machine.link_bandwidth)


def in_the_gathers_place(call):
    """The collective that PROGRAM has with `call` for its all-gather, beside its all-reduce."""
    line = next(line for line in PROGRAM.splitlines() if "all-gather(" in line)
    (one, _) = Program(PROGRAM.replace(line, "  " + call)).collectives
    return one


def test_a_ragged_exchange_carries_what_either_side_has_room_for():
    call = (
        "%whole = bf16[16,16]{1,0} ragged-all-to-all(%w, %x, %n, %n, %n, /*index=5*/%n), channel_id=1, "
        "replica_groups={{0,1,2,3}}"
    )
    one = in_the_gathers_place(call)
    assert (one.kind, one.devices, one.times) == ("ragged-all-to-all", (0, 1, 2, 3), 5)
    assert one.bytes == 3 / 4 * min(8 * 16 * 2, 4 * 16 * 4)


def test_what_a_host_sends_to_other_slices_is_a_collective_over_them():
    call = (
        "%sent = (f32[8,4,128]{2,1,0:T(4,128)}, u32[], token[]) send(%w, %token), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    one = in_the_gathers_place(call)
    assert (one.kind, one.devices, one.times) == ("all-reduce", (0, 8, 16), 5)
    assert one.bytes == pytest.approx(2 * 2 / 3 * 8 * 4 * 128 * 4)


def test_keys_of_long_rows_are_gathered_along_context():
    sizes = Mesh(fsdp=8, expert=8, context=8)
    whole, half = (plan.check(GLM45, POD, sizes, 64, length) for length in (131_072, 65_536))
    assert whole.tokens == 131_072 / 8
    found, of_half = analytic.traffic(whole), analytic.traffic(half)  # both with the same weights
    keys = 93 * 65_536 * 2 * 8 * 128 * 2 * 7 / 8  # of all layers: a row to each device, less what it has
    assert found["context reduce-scatter"] - of_half["context reduce-scatter"] == pytest.approx(keys)
    gathered = found["context all-gather"] - of_half["context all-gather"]
    assert gathered == pytest.approx(2 * keys, rel=0.01)  # and positions and segments


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5p:8x8x9", "did you mean 'v5p:8x8x8'"),
        ("v5:8x8x8", "unknown chip 'v5'; did you mean 'v5p'"),
        ("v6e:16x17", "did you mean 'v6e:16x1"),
        ("h200:1x1x7", "did you mean 'h200:1x1x8'"),
        ("h200:1x3x4", "did you mean 'h200:1x1x4'"),
        ("v5p", "does not exist"),
    ],
)
def test_a_topology_that_does_not_exist(name, told):
    with pytest.raises(ConfigError) as error:
        plan.target(name)
    assert name in str(error.value)
    assert told in str(error.value)


def test_devices_of_a_topology():
    counts = {
        "v5p:8x8x8": 512,
        "v6e:16x16": 256,
        "tpu7x:4x4x8": 256,
        "h200:1x1x8": 8,
        "h200:1x8x8": 64,
        "h200:1x3x8": 24,
    }
    assert {name: plan.target(name).count for name in counts} == counts
    assert plan.target("v5p:4x4x4", slices=2).count == 128
    assert all(
        plan.target(name).name == name for kind in ("v5e", "v5p", "v6e", "tpu7x", "h200") for name in names(kind)
    )


def test_without_its_compiler_a_plan_is_refused_or_says_what_arithmetic_knows(monkeypatch):
    monkeypatch.setattr(analysis, "can_compile", lambda platform: False)
    step = {"mesh": "expert=8", "batch": 64, "seq": 4096}
    with pytest.raises(ConfigError, match="plan cannot fit"):
        script.main(script.Args("h200:1x1x8", **step), recipes.get("air"))
    told = r"by arithmetic it fits, GiB a device: state .* of 131; but its compiler is not installed: pip install .*jax-cuda12"
    with pytest.raises(ConfigError, match=told):  # data=4 is understood
        script.main(script.Args("h200:4x1x8", **step), recipes.get("air"))


def test_the_way_out_of_a_machine_that_is_too_small():
    with pytest.raises(ConfigError) as error:
        plan.check(recipes.get("air"), plan.target("h200:1x1x8"), Mesh(expert=8), 64, 4096)
    assert "state (parameters, momentum) 102.0 GiB, gradients 25.4 GiB, residuals 11.8 GiB a device" in str(error.value)
    assert "The smallest that fits by arithmetic: h200:1x2x8 with data=1, fsdp=2" in str(error.value)
    assert "On h200:1x1x8 it fits by arithmetic with --optim.momentum_dtype bfloat16" in str(error.value)


@pytest.mark.parametrize(
    ("machine", "sizes", "rows", "length", "told"),
    [
        ("v5p:8x8x8", Mesh(fsdp=63, expert=8), 512, 4096, "fsdp=63, context=1, expert=8 does not fit 512 devices"),
        ("v5p:8x8x12", Mesh(fsdp=32, expert=24), 768, 4096, "E=160 cannot be split over expert axis of 24; use a divisor"),
        ("v5p:8x8x12", Mesh(fsdp=96, expert=8), 768, 4096, "D=5120 cannot be split over fsdp x expert axes of 768"),
        ("v5p:8x8x8", Mesh(fsdp=64, expert=8), 100, 4096, "B=100 rows cannot be split over 512 devices"),
        ("v5p:8x8x8", Mesh(fsdp=8, expert=8, context=8), 64, 4104, "T=4104 tokens cannot be split over a context axis of 8"),
        ("v5p:8x8x8", Mesh(fsdp=64, expert=8), 512, 262_144, "seq=262144 exceeds max_positions=131072"),
        ("v5p:4x4x8", Mesh(fsdp=16, expert=8), 128, 131_072, "On v5p:4x4x8 it fits by arithmetic with --model.remat offload"),
        ("v6e:4x4", Mesh(expert=8), 512, 4096, "what overflows is state (parameters, momentum). The smallest that fits"),
        ("v5p:8x8x8", Mesh(data=64, fsdp=1, expert=8), 512, 4096, "fits by arithmetic: v5p:8x8x8 with data=1, fsdp=64"),
        ("h200:2x1x8", Mesh(data=1, fsdp=2, expert=8), 64, 4096, "data=1 must be a multiple of slices=2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_compiled(machine, sizes, rows, length, told):
    with pytest.raises(ConfigError) as error:
        plan.check(GLM45, plan.target(machine), sizes, rows, length)
    assert told in str(error.value)


def test_what_a_plan_has(monkeypatch, tmp_path):
    from glm_jax.plan import program

    compiled = program.Compiled(int(5.25 * GIB), int(20 * GIB), int(12 * GIB), 200.0, PROGRAM, Counter())
    monkeypatch.setattr(program, "compile_step", lambda *_: compiled)
    found = plan.plan(plan.check(GLM45, POD, Mesh(fsdp=64, expert=8), 512, 4096), POD, lambda _: None)
    assert set(found) >= {
        "recipe", "topology", "devices", "mesh", "batch", "seq", "params", "args_gib", "temp_gib", "hbm_gib", "fits",
        "compile_s", "flops", "flops_analytic", "collectives", "roofline_s", "mfu_bound",
    }  # fmt: skip
    assert (found["args_gib"], found["temp_gib"], found["peak_temp_gib"], found["fits"]) == (5.25, 20, 12, True)
    assert found["params"] == pytest.approx(356.8e9, rel=1e-3)
    assert set(found["roofline_s"]) == {"compute", "memory", "network", "dcn"}
    gather = found["collectives"]["expert all-gather"]  # the program's groups of neighbours lie along the last axis
    assert gather["bytes"] == 5 * 8 * 16 * 2
    assert gather["minimum"] > 0
    assert sum(row["bytes"] for row in found["collectives"].values()) / 600e9 == found["roofline_s"]["network"]

    path = tmp_path / "plan_glm45.json"
    changed = script._changed(replace(GLM45, **{"optim.momentum_dtype": "bfloat16", "mesh.expert": 4}), "train")
    path.write_text(json.dumps(found | {"peak_rss_gb": 4.0, "changed": changed}))
    assert (
        "| glm45, momentum_dtype bfloat16 | 512: v5p:8x8x8 | fsdp 64, expert 8 | 512 x 4,096 | 5.25 + 20.00 (12.00) of 95 |"
        in script.table([path])
    )
    assert "arguments 5.25, temporaries 20.00; at the peak 17.25 GiB of 95.0: fits" in script.told(
        json.loads(path.read_text())
    )

    path.write_text(
        json.dumps(found | {"roofline_s": found["roofline_s"] | {"dcn": 9.0}, "changed": {}, "peak_rss_gb": 4.0})
    )
    assert script.table([path]).endswith(", dcn |")
    assert "with all overlapped, by dcn;" in script.told(json.loads(path.read_text()))


def test_the_table_of_all_plans_that_are_kept():
    paths = sorted(script.RESULTS.glob("plan_*.json"))
    assert len(script.table(paths).splitlines()) == 2 + len(paths) >= 8


def test_along_tensor_devices_have_the_same_tokens_and_parts_of_a_layer():
    one, two = (
        plan.check(GLM45, POD, Mesh(fsdp=fsdp, expert=8, context=4, tensor=tensor), rows=128, length=4096)
        for fsdp, tensor in ((16, 1), (8, 2))
    )
    assert two.tokens == 2 * one.tokens
    model_of_one, model_of_two = (analytic.operations(work)["model"] for work in (one, two))
    assert model_of_two == pytest.approx(model_of_one)
    traffic, before = analytic.traffic(two), analytic.traffic(one)
    # as many keys of half as many heads, weights in use half as large, and of x what fsdp never sends
    assert traffic["context reduce-scatter"] < 1.1 * before["context reduce-scatter"]
    assert traffic["fsdp all-gather"] < 0.51 * before["fsdp all-gather"]
    x = two.tokens * GLM45.model.D * 2
    assert traffic["tensor all-reduce"] == pytest.approx(x * (5 * (GLM45.model.L + 1) + 2 * 2))
    assert "tensor all-reduce" not in before
    memory = [
        analytic.memory(dataclasses.replace(work, run=replace(GLM45, **{"model.remat": "none"}))) for work in (one, two)
    ]
    assert memory[0]["residuals"] < memory[1]["residuals"] < 2 * memory[0]["residuals"]


def test_a_mesh_as_text():
    assert script.mesh_of(script.Args(mesh="fsdp=64,expert=8"), GLM45) == Mesh(data=1, fsdp=64, expert=8)
    assert script.mesh_of(script.Args(mesh="fsdp=8,expert=8,context=8"), GLM45) == Mesh(1, 8, 8, context=8)
    assert script.mesh_of(script.Args(mesh="expert=8"), GLM45, slices=2) == Mesh(data=2, fsdp=-1, expert=8)
    assert script.mesh_of(script.Args(), GLM45) == GLM45.mesh
    rest = replace(GLM45, **{"mesh.data": -1, "mesh.fsdp": 8})  # --mesh.data -1: what is left, slices among it
    assert script.mesh_of(script.Args(), rest, slices=2) == rest.mesh
    with pytest.raises(ConfigError, match=r"no axis 'exprt'; did you mean 'expert'"):
        script.mesh_of(script.Args(mesh="exprt=8"), GLM45)
    for wrong in ("fsdp=0", "fsdp=x", "fsdp=2,fsdp=4", "fsdp"):
        with pytest.raises(ConfigError, match="must be fsdp=N once"):
            script.mesh_of(script.Args(mesh=wrong), GLM45)


def test_every_kernel_of_the_expert_layer_is_known_to_count_rows_that_are_not_real():
    x_XD, w_EDM, w_EMD = jnp.zeros((64, 256)), jnp.zeros((4, 256, 128)), jnp.zeros((4, 128, 256))
    experts_XA, weights_XA = jnp.zeros((64, 2), jnp.int32), jnp.zeros((64, 2))

    def total(x_XD, gate_EDM, up_EDM, down_EMD):
        return expert_mlp(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA, implementation="tpu").sum()

    traced = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2, 3)))(x_XD, w_EDM, w_EDM, w_EMD)
    names = set(operations(traced.jaxpr))
    assert len(names) >= 4 and all(plan._grouped(name) for name in names)


def test_a_pipeline_is_not_planned():
    with pytest.raises(ConfigError, match=r"mesh pipeline=2: the planner counts neither .* plan with pipeline=1"):
        plan.check(GLM45, POD, Mesh(pipeline=2, fsdp=32, expert=8), rows=512, length=4096)
