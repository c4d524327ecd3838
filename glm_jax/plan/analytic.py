"""What a training step needs at the least, by arithmetic from the declarations: memory, operations, traffic between devices.

A second of it, where the compiler takes minutes; and what the compiler's figures are held against. Sizes are of one device.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from glm_jax import mesh, model
from glm_jax.config import Mesh as Sizes
from glm_jax.config import Optim, Run
from glm_jax.model import counts
from glm_jax.optim import owner
from glm_jax.parallel import ragged
from glm_jax.parallel.expert import strategy
from glm_jax.parallel.homes import Kind, share
from glm_jax.plan.hlo import RAGGED
from glm_jax.spec import Spec, leaves
from pallas_kernels import newton_schulz

BF16, FLOAT32 = 2, 4
SAMPLING = ("prefill", "decode")  # programs of a step "sample"


@dataclass(frozen=True)
class Work:
    """A step over a mesh of these sizes: "train" and "grpo" learn from `rows` of `length` tokens; "prefill" reads their first
    `prompt` tokens, "decode" draws one more of each (`plan.sampling` counts these two). `gpu`: with a GPU's kernels."""

    run: Run
    axes: dict[str, int]
    rows: int
    length: int
    step: str = "train"
    prompt: int = 0
    gpu: bool = False

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    @property
    def parts(self) -> int:
        """Of all tokens: devices along the tensor axis have the same."""
        return self.devices // self.axes[mesh.TENSOR]

    @property
    def tokens(self) -> float:
        """Of one device, each time the step's program runs."""
        of_row = {"prefill": self.prompt, "decode": 1}.get(self.step, self.length)
        return self.rows * of_row / self.parts

    @property
    def mtp_layers(self) -> int:
        """That are run: RL has no MTP loss."""
        return self.run.model.mtp_layers if self.step == "train" else 0

    @property
    def layers(self) -> int:
        """Whose input is kept for the backward pass, the MTP layer's among them."""
        return self.run.model.L + self.mtp_layers

    def shards(self, layout: Any) -> int:
        """Parts that a layout makes of an array."""
        return math.prod(self.axes[axis] for axis in mesh.axes_of(layout))


def work(run: Run, sizes: Sizes, rows: int, length: int) -> Work:
    return Work(run, mesh.sizes_of(sizes), rows, length)


def memory(now: Work) -> dict[str, float]:
    """Bytes of what must be there at the end of the forward pass and after, by term. What a layer needs while it
    computes is left out: only the compiler knows."""
    state = gradients = 0.0
    optim = now.run.optim
    for _, spec in leaves(model.specs(now.run.model)):
        shard = spec.count / now.shards(mesh.at_rest(spec))
        moments = _bytes(optim.momentum_dtype) if owner(optim, spec) == "muon" else 2 * FLOAT32
        state += shard * (FLOAT32 + moments)
        gradients += shard * _width(now, spec)
    residual = now.tokens * now.run.model.D * itemsize(now)
    # without rematerialisation, what each product keeps: its input, and of attention and experts what they make
    kept = {"none": 4 + 2 * _widths(now) / now.run.model.D, "layer": 1, "offload": 0}[now.run.model.remat]
    return {
        "state (parameters, momentum)": state,
        "gradients": gradients,
        "residuals": residual * now.layers * kept,
    }


def operations(now: Work) -> dict[str, float]:
    """Matrix products and attention: forward and backward (6ND + attention), what is computed again, the optimizer.

    No attention kernel keeps scores: the backward pass makes them again, and on a GPU twice, with their gradients, for those of
    queries come from a kernel of their own.
    """
    cfg, tokens = (
        now.run.model,
        now.tokens / now.axes[mesh.TENSOR],
    )  # router and MTP's projection, which are not split, are small
    mtp = now.mtp_layers > 0
    useful = tokens * counts.flops_per_token(cfg, now.length, training=True, mtp=mtp)
    again = 0.0
    if cfg.remat != "none":
        head = 2 * cfg.D * cfg.V * (1 + mtp)
        last = 2 * cfg.D * (cfg.dense_layers * cfg.F + (cfg.moe_layers + mtp) * cfg.M * (cfg.A + cfg.shared_experts))
        forward = counts.flops_per_token(cfg, now.length, mtp=mtp)
        again = tokens * (forward - head - last)  # nothing needs a layer's last products twice
    scores = tokens * now.layers * 2 * cfg.N * cfg.H * (now.length + 1) / 2
    return {"model": useful, "recomputed": again + scores * (3 if now.gpu else 1), "optimizer": _newton_schulz(now)}


def _newton_schulz(now: Work) -> float:
    optim, total = now.run.optim, 0.0
    for _, spec in leaves(model.specs(now.run.model)):
        if owner(optim, spec) == "muon":
            number, short, long = matrices(spec)
            steps = optim.ns_steps + optim.ns_polish
            total += number * newton_schulz.operations(short, long, steps, optim.ns_gram)
    return total / now.devices


def matrices(spec: Spec) -> tuple[int, int, int]:
    """(how many, short side, long side) of a weight's matrices."""
    sizes = dict(zip(spec.dims, spec.shape, strict=True))
    number, rows, columns = (math.prod(sizes[z] for z in part) for part in (spec.batch, spec.ins, spec.outs))
    return number, min(rows, columns), max(rows, columns)


def traffic(now: Work) -> dict[str, float]:
    """Bytes that each device must receive in a step, by "axis kind", if nothing travels that need not."""
    return received(now, _transfers(now))


Transfer = tuple[tuple[str, ...], str, float]  # axes, kind, bytes of the whole array that is gathered or summed


def received(now: Work, transfers: Iterable[Transfer]) -> dict[str, float]:
    """Their bytes but for what each device has already, by "axis kind"."""
    found: dict[str, float] = defaultdict(float)
    for axes, kind, whole in transfers:
        size = math.prod(now.axes[axis] for axis in axes)
        if size > 1:
            over = "+".join(axis for axis in mesh.AXES if axis in axes and now.axes[axis] > 1)
            found[f"{over} {kind}"] += whole * (1 - 1 / size)
    return dict(found)


def _transfers(now: Work) -> Iterator[Transfer]:
    cfg = now.run.model
    specs: Any = model.specs(cfg)
    for name, spec in leaves(specs):
        if name.startswith("mtp") and not now.mtp_layers:
            continue
        at_rest, in_use = (mesh.axes_of(layout(spec)) for layout in (mesh.at_rest, mesh.in_use))
        gathered = tuple(axis for axis in at_rest if axis not in in_use)
        in_a_layer = name.split(".")[0] in ("dense", "moe", "mtp")
        passes = 1 if not in_a_layer or cfg.remat == "none" else 3 if name.endswith("o_NHD") else 2
        width = _width(now, spec)
        size = width * spec.count / now.shards(in_use)
        for i, axis in enumerate(gathered):  # one at a time, the last one first
            part = size / now.shards((gathered[:i],))
            yield (axis,), "all-gather", passes * part
            if axis != mesh.TENSOR:  # along which a gradient is the same
                yield (axis,), "reduce-scatter", part
        # turned from a part of D to one of heads or of a hidden width, and back
        if mesh.TENSOR in in_use and "V" not in spec.dims:
            yield (mesh.TENSOR,), "all-to-all", (passes + 1) * width * spec.count / now.shards(at_rest)
        # axes on which it is held more than once, and its gradient is not the same
        left = tuple(axis for axis in mesh.AXES if axis not in (*at_rest, mesh.TENSOR))
        yield left, "all-reduce", 2 * width * spec.count / now.shards(at_rest)
    yield from _keys_to_queries(now)
    yield from _tokens_to_experts(now)
    yield from _tokens_to_vocabulary(now)
    yield from _sums_of_parts(now)
    yield from _matrices_to_homes(now.run.optim, specs, now)


def _keys_to_queries(now: Work) -> Iterator[Transfer]:
    """Of every layer: keys and values of a whole row gathered along context with their positions and segments (and once
    more for the backward pass), their gradients scattered."""
    cfg = now.run.model
    tokens = now.tokens * now.axes[mesh.CONTEXT] * now.layers
    keys, where = tokens * 2 * cfg.K / now.axes[mesh.TENSOR] * cfg.H * itemsize(now), tokens * 2 * FLOAT32
    yield (mesh.CONTEXT,), "all-gather", (2 if cfg.remat != "none" else 1) * (keys + where)
    yield (mesh.CONTEXT,), "reduce-scatter", keys


def _tokens_to_experts(now: Work) -> Iterator[Transfer]:
    """Of every MoE layer: tokens, choices and weights to where the experts are (and once more for the backward pass), sums
    back; the gradients of the sums there, those of tokens and weights back."""
    cfg, layers = now.run.model, now.run.model.moe_layers + now.mtp_layers
    there, back, rows = dispatched(now)
    x, choices, weights = (layers * rows * size for size in (cfg.D * itemsize(now), cfg.A * FLOAT32, cfg.A * FLOAT32))
    passes = 2 if cfg.remat != "none" else 1
    yield (mesh.EXPERT,), there, passes * (x + choices + weights) + x
    yield (mesh.EXPERT,), back, 2 * x + weights


def dispatched(now: Work) -> tuple[str, str, float]:
    """How a device's tokens travel to experts and back, and the rows that a device has then, its own among them: if
    ragged, with choices that are all as likely. On a chip, whichever."""
    cfg, tokens, devices = now.run.model, now.tokens, now.axes[mesh.EXPERT]
    if strategy(cfg.dispatch, round(tokens), devices, "tpu") is ragged:
        return RAGGED, RAGGED, ragged.balanced(tokens, cfg.A, cfg.E, devices)
    return "all-gather", "reduce-scatter", tokens * devices


def _tokens_to_vocabulary(now: Work) -> Iterator[Transfer]:
    """Embedding and head stay split by vocabulary over the expert axis (and tensor, whose devices have the same tokens): ids and
    hidden states are gathered there, rows and gradients summed where their tokens are."""
    cfg = now.run.model
    everybodys = now.tokens * now.axes[mesh.EXPERT] * (1 + now.mtp_layers)
    x = everybodys * cfg.D * itemsize(now)
    yield (mesh.EXPERT,), "all-gather", 2 * x + everybodys * FLOAT32  # hidden states, the rows' gradients; ids
    yield (mesh.EXPERT,), "reduce-scatter", 2 * x


def _sums_of_parts(now: Work) -> Iterator[Transfer]:
    """Along tensor: of every layer attention's and the feed-forward part's sums, attention's once more for the backward pass, and the
    gradients of what enters the two; the embedding's rows, and the gradient of each loss."""
    cfg = now.run.model
    x = now.tokens * cfg.D * itemsize(now)
    of_layer = 4 if cfg.remat == "none" else 5
    yield (mesh.TENSOR,), "all-reduce", 2 * x * (of_layer * now.layers + 2 * (1 + now.mtp_layers))


def _matrices_to_homes(optim: Optim, specs: Any, now: Work) -> Iterator[Transfer]:
    """Muon: every matrix to its home and back, equally many of one size to each home; of the head, X X^T summed over the
    shards at every step."""
    itemsize = _bytes(optim.ns_dtype)
    kinds = []
    for _, spec in leaves(specs):
        if owner(optim, spec) != "muon":
            continue
        axes = tuple(axis for axis in mesh.axes_of(mesh.at_rest(spec)) if now.axes[axis] > 1)
        split = tuple(axis for axis in axes if not ("E" in spec.batch and axis == mesh.EXPERT))
        if spec.kind == "head":
            yield split, "all-reduce", 2 * (optim.ns_steps + optim.ns_polish) * FLOAT32 * spec.shape[0] ** 2
        else:
            number, short, long = matrices(spec)
            copies = now.shards(mesh.at_rest(spec)) // now.shards((split,))
            group = split, spec.shape[spec.dims.index("D")]
            kinds.append(Kind(group, now.shards((split,)), number // copies, short * long))
    for members in share(kinds):
        first, number = kinds[members[0]], sum(kinds[i].number for i in members)
        yield first.group[0], "all-to-all", 2 * itemsize * -(-number // first.homes) * first.entries


def itemsize(now: Work) -> int:
    """Bytes of an activation, and of a weight in use."""
    return _bytes(now.run.model.dtype)


def _bytes(dtype: str) -> int:
    return FLOAT32 if dtype == "float32" else BF16


def _width(now: Work, spec: Spec) -> int:
    """Bytes of an entry of a weight as its layer computes with it, and of its gradient."""
    return FLOAT32 if spec.kind in ("router", "norm") else itemsize(now)


def _widths(now: Work) -> int:
    """Activations of a layer beside the residual stream: heads, and the hidden layers of a token's experts."""
    cfg = now.run.model
    return ((cfg.N + 2 * cfg.K) * cfg.H + 3 * cfg.M * (cfg.A + cfg.shared_experts)) // now.axes[mesh.TENSOR]
