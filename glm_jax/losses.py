"""Losses as pure functions of arrays. A training loss is a sum of components, each over its own global token count."""

from jax import Array

from glm_jax import mesh
from pallas_kernels.cross_entropy import linear_cross_entropy


def next_token(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, implementation: str | None = None
) -> tuple[Array, Array]:
    """(sum over all devices of weight * negative log-likelihood, log-probability of each target), float32, nats.

    The sum is differentiable; a target of weight 0 adds nothing. Divide by the weights' global sum for a mean.
    """

    def local(hidden_BTD, head_DV, targets_BT, weights_BT):
        x_XD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        loss, log_prob_X = linear_cross_entropy(
            x_XD, mesh.vary(head_DV), targets_BT.reshape(-1), weights_BT.reshape(-1), implementation=implementation
        )
        return mesh.total(loss), log_prob_X.reshape(targets_BT.shape)

    targets_BT, weights_BT = (mesh.constrain(z, "BT") for z in (targets_BT, weights_BT))
    run = mesh.per_shard(local, ("BTD", "DV", "BT", "BT"), ("", "BT"))
    return run(hidden_BTD, head_DV, targets_BT, weights_BT)
