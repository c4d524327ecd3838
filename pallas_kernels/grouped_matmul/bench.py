"""Grouped matmul against XLA's dense product of the same operations, `lax.ragged_dot`, megablox and tokamax.

The dense side multiplies the same rows by one matrix: no grouped product does better.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from pallas_kernels import grouped_matmul
from pallas_kernels.bench import Bench, normal, only_on_tpu, only_where_it_runs, tagged
from pallas_kernels.choose import Later, platform
from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, routed
from pallas_kernels.grouped_matmul.cases import GMM, MLP, Gmm, Mlp


def dense_gmm(x_RD: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return x_RD @ w_EDM[0]


def dense_gmm_t(x_RM: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return x_RM @ w_EDM[0].T


def dense_tgmm(x_RD: Array, y_RM: Array, group_sizes_E: Array) -> Array:
    return jnp.einsum("rd,rm->dm", x_RD, y_RM, preferred_element_type=jnp.float32)


def ragged_dot(x_RD: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    """On each device, where there is a mesh: on arrays laid out over one, jax has no rule for it."""
    product = jax.lax.ragged_dot
    if not jax.sharding.get_abstract_mesh().empty:
        product = jax.shard_map(product, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    return product(x_RD, w_EDM, group_sizes_E)


def ragged_dot_t(x_RM: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    return ragged_dot(x_RM, w_EDM.swapaxes(1, 2), group_sizes_E)


THREE_PRODUCTS = Later("pallas_kernels.grouped_matmul.tpu")  # another name, for which `routed` knows no layer
TILES = (512, 1024, 1024)  # of megablox and tokamax: rows, contracted, columns


def _tiles(D: int, M: int) -> tuple[int, int, int]:
    rows, inner, columns = TILES
    return rows, inner if D % inner == 0 else D, columns if M % columns == 0 else (512 if M % 512 == 0 else M)


def _kernels(whose: str) -> tuple[Callable, Callable]:
    """(gmm, tgmm) for TPU: jax's megablox, or those that tokamax made of it."""
    only_on_tpu(whose)
    if whose == "megablox":
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

        return gmm, tgmm
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as theirs  # pyright: ignore[reportMissingImports]

    def same_words(kernel: Callable) -> Callable:
        return lambda x, w, sizes, preferred_element_type, **options: kernel(
            x, w, sizes, jax.lax.Precision.DEFAULT, preferred_element_type, **options
        )

    return same_words(theirs.gmm), same_words(theirs.tgmm)


def tpu_gmm(x_RD: Array, w_EDM: Array, group_sizes_E: Array, *, whose: str) -> Array:
    tiles = _tiles(w_EDM.shape[1], w_EDM.shape[2])
    return _kernels(whose)[0](x_RD, w_EDM, group_sizes_E, preferred_element_type=x_RD.dtype, tiling=tiles)


def tokamax_gmm(x_RD: Array, w_EDM: Array, group_sizes_E: Array) -> Array:
    """By its door, or compiled for a TPU the kernel itself: the door asks this machine's device which kernel to take."""
    if platform() == "tpu":
        return tpu_gmm(x_RD, w_EDM, group_sizes_E, whose="tokamax")
    import tokamax  # pyright: ignore[reportMissingImports]

    only_where_it_runs("tokamax")
    return tokamax.ragged_dot(x_RD, w_EDM, group_sizes_E)


def tpu_gmm_t(x_RM: Array, w_EDM: Array, group_sizes_E: Array, *, whose: str) -> Array:
    rows, columns, inner = _tiles(w_EDM.shape[1], w_EDM.shape[2])
    options = {"preferred_element_type": x_RM.dtype, "tiling": (rows, inner, columns), "transpose_rhs": True}
    return _kernels(whose)[0](x_RM, w_EDM, group_sizes_E, **options)


def tpu_tgmm(x_RD: Array, y_RM: Array, group_sizes_E: Array, *, whose: str) -> Array:
    tiles = _tiles(x_RD.shape[1], y_RM.shape[1])
    return _kernels(whose)[1](x_RD.T, y_RM, group_sizes_E, preferred_element_type=jnp.float32, tiling=tiles)


def _peers(dense: Callable, on_tpu: Callable, ragged_dot: Callable | None = None) -> dict[str, Callable]:
    theirs = {whose: partial(on_tpu, whose=whose) for whose in ("megablox", "tokamax")}
    return {"dense": dense} | ({"ragged_dot": ragged_dot} if ragged_dot else {}) | theirs


PEERS = {
    "gmm": _peers(dense_gmm, tpu_gmm, ragged_dot) | {"tokamax": tokamax_gmm},
    "gmm_t": _peers(dense_gmm_t, tpu_gmm_t, ragged_dot_t),
    "tgmm": _peers(dense_tgmm, tpu_tgmm),
}


def mlp_and_gradient(*inputs: Array, implementation: str | None = None) -> tuple[Array, ...]:
    """The routed layer's output and all its gradients, of the output itself as the cotangent."""
    *floats, experts_XA, weights_XA = inputs

    def layer(x_XD, gate_EDM, up_EDM, down_EMD, weights_XA):
        arrays = x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA
        return grouped_matmul.expert_mlp(*arrays, implementation=implementation)

    y_XD, vjp = jax.vjp(layer, *floats, weights_XA)
    return y_XD, *vjp(y_XD)


def unfused_mlp(*inputs: Array) -> tuple[Array, routed.Hidden | None]:
    """Of our own products for TPU, with gathers and SwiGLU between them left to XLA; with what is kept for the gradient."""
    only_on_tpu("the layer of three products")
    x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA = inputs
    return routed.expert_mlp(THREE_PRODUCTS, x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA)


def unfused_mlp_and_gradient(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA) -> tuple[Array, ...]:
    inputs = x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA
    y_XD, hidden = unfused_mlp(*inputs)
    dx_XD, dweights_XA, layer = routed.expert_mlp_grad(THREE_PRODUCTS, *inputs, hidden, y_XD)
    return y_XD, dx_XD, *layer, dweights_XA


def _dense_mlp(x_XD: Array, gate_DM: Array, up_DM: Array, down_MD: Array) -> Array:
    return (jax.nn.silu(x_XD @ gate_DM) * (x_XD @ up_DM)) @ down_MD


def dense_mlp(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA) -> Array:
    """One expert's network over all routed rows."""
    return _dense_mlp(jnp.repeat(x_XD, experts_XA.shape[1], 0), gate_EDM[0], up_EDM[0], down_EMD[0])


def dense_mlp_and_gradient(x_XD, gate_EDM, up_EDM, down_EMD, experts_XA, weights_XA) -> tuple[Array, ...]:
    rows_RD = jnp.repeat(x_XD, experts_XA.shape[1], 0)
    y_RD, vjp = jax.vjp(_dense_mlp, rows_RD, gate_EDM[0], up_EDM[0], down_EMD[0])
    return y_RD, *vjp(y_RD)


def benches(tag: str) -> Iterator[Bench]:
    for name, case, dtype in tagged(GMM, tag):
        yield from _gmm_benches(name, case, dtype)
    for name, case, dtype in tagged(MLP, tag):
        yield from _mlp_benches(name, case, dtype)


def _gmm_benches(name: str, case: Gmm, dtype) -> Iterator[Bench]:
    R, D, M, E = case.R, case.D, case.M, len(case.sizes)
    x, w, y, sizes = (
        jax.ShapeDtypeStruct((R, D), dtype),
        jax.ShapeDtypeStruct((E, D, M), dtype),
        jax.ShapeDtypeStruct((R, M), dtype),
        jax.ShapeDtypeStruct((E,), jnp.int32),
    )
    size = jnp.dtype(dtype).itemsize
    doors = {"gmm": grouped_matmul.gmm, "gmm_t": grouped_matmul.gmm_t, "tgmm": grouped_matmul.tgmm}
    for operation, arguments in (("gmm", (x, w, sizes)), ("gmm_t", (y, w, sizes)), ("tgmm", (x, y, sizes))):
        yield Bench(
            operation=operation,
            case=name,
            run=doors[operation],
            arguments=arguments,
            operations=2 * R * D * M,
            bytes_moved=size * (R * D + R * M) + (4 if operation == "tgmm" else size) * E * D * M,
            inputs=partial(_gmm_inputs, case, tuple(z.shape for z in arguments[:2]), dtype),
            implementations=tuple(IMPLEMENTATIONS),
            peers=PEERS[operation],
        )


def _gmm_inputs(case: Gmm, shapes: tuple[tuple[int, ...], ...], dtype) -> tuple[Array, ...]:
    return *normal(dtype, *shapes), jnp.asarray(case.sizes, jnp.int32)


def _mlp_benches(name: str, case: Mlp, dtype) -> Iterator[Bench]:
    shapes = (case.X, case.D), (case.E, case.D, case.M), (case.E, case.D, case.M), (case.E, case.M, case.D)
    size, rows = jnp.dtype(dtype).itemsize, case.X * case.A
    forward = 3 * 2 * rows * case.D * case.M
    least = size * (2 * case.X * case.D + 3 * case.E * case.D * case.M)
    for operation, run, peers, times in (
        ("expert_mlp", grouped_matmul.expert_mlp, (dense_mlp, unfused_mlp), 1),
        ("expert_mlp and gradient", mlp_and_gradient, (dense_mlp_and_gradient, unfused_mlp_and_gradient), 3),
    ):
        yield Bench(
            operation=operation,
            case=name,
            run=run,
            arguments=(
                *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes),
                jax.ShapeDtypeStruct((case.X, case.A), jnp.int32),
                jax.ShapeDtypeStruct((case.X, case.A), dtype),
            ),
            operations=times * forward,
            bytes_moved=(1 if times == 1 else 2) * least,
            inputs=partial(_mlp_inputs, case, shapes, dtype),
            implementations=tuple(IMPLEMENTATIONS),
            peers=dict(zip(("dense", "unfused"), peers, strict=True)),
        )


def _mlp_inputs(case: Mlp, shapes: tuple[tuple[int, ...], ...], dtype) -> tuple[Array, ...]:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((case.X, case.E)) ** case.skew, axis=1)[:, : case.A]
    weights = rng.random((case.X, case.A))
    return *normal(dtype, *shapes), jnp.asarray(experts, jnp.int32), jnp.asarray(weights, dtype)
