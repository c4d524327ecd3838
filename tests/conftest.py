"""Tests run on the CPU, and keep compiled programs between runs as the scripts do."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from experiments import cli

cli.configure_jax()
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:  # =0: compiled as users compile it
    jax.config.update("jax_disable_most_optimizations", True)  # the suite compiles for longer than it computes
