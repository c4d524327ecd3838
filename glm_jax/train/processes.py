"""Several processes of one run: the first writes what all would write, and what it decides by its files all do."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")


def writer() -> bool:
    """Whether this process is the one that writes logs, settings and results."""
    return jax.process_index() == 0


def agreed(answer: bool) -> bool:
    """The writer's answer, in every process: a collective that one of them leaves out would stop all others."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def in_turn(do: Callable[[], Result]) -> Result:
    """Call `do` in the writer, then in the others, which find made what it made."""
    if not writer():
        multihost_utils.sync_global_devices("the writer has done it")
    result = do()
    if jax.process_count() > 1 and writer():
        multihost_utils.sync_global_devices("the writer has done it")
    return result
