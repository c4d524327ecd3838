"""Hints about when things happen, where a compiler's own order would cost memory. They leave every number alone."""

from typing import Any

import jax

from pallas_kernels.choose import platform


def together(tree: Any) -> Any:
    """The same arrays, none of which is used before all are there; nor are their gradients, in the backward pass.

    Around hidden states and the weights that work on them last: else the gradients of those, whole on every device, wait for the
    end of the backward pass to be scattered. A CPU computes in the order that is written, and needs no hint.
    """
    return tree if platform() == "cpu" else jax.lax.optimization_barrier(tree)
