"""Tests run on the CPU, and keep compiled programs between runs as the scripts do."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
AS_USERS_COMPILE = "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ  # =0
if not AS_USERS_COMPILE:  # programs that compile in half of the time and compute more slowly; set before jax starts
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

import jax

from experiments import cli

cli.configure_jax()
if not AS_USERS_COMPILE:
    jax.config.update("jax_disable_most_optimizations", True)  # the suite compiles for longer than it computes


def pytest_collection_modifyitems(items):
    """Files with slow tests first: of two workers neither is left with the longest file when the other has done the rest."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
