"""Tests run on the CPU, and keep compiled programs between runs as the scripts do."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments import cli

cli.configure_jax()
