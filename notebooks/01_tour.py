# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of GLM-4.5 in JAX
#
# The model in shapes, a few training steps, expert load as a picture, and a sample. About three minutes on two CPU
# cores; the same cells run on a GPU or a TPU.
#
# On Colab, run this in a cell of its own first, with this repository's address: `!git clone ADDRESS glm && pip install -q ./glm`

# %%
import os

os.environ.setdefault("JAX_PLATFORMS", "")  # "cpu", "cuda" or "tpu"; empty: the best there is
STEPS = int(os.environ.get("TOUR_STEPS", 60))

import jax
import matplotlib.pyplot as plt
import numpy as np

from experiments import recipes
from glm_jax import model, spec
from glm_jax.config import replace

# %% [markdown]
# ## The model in shapes
#
# A weight is declared once, as a string such as `"E | D -> M"`: E independent matrices from D to M. The table below
# is read from those declarations; no array is made. `tiny` has every part of the 355B model.

# %%
run = recipes.get("tiny")
specs = model.specs(run.model)
for name, s in spec.leaves(specs)[:12]:
    print(f"{name:28} {s.dims:6} {s.shape}")
for name in recipes.RECIPES:
    print(f"{name:8} {spec.count(model.specs(recipes.get(name).model)):>17,} parameters")

# %% [markdown]
# ## A forward pass
#
# `forward` is a function of arrays: configuration, parameters, router bias, token ids.

# %%
params, router_bias_LE = model.init(run.model, jax.random.key(0))
ids_BT = jax.random.randint(jax.random.key(1), (2, 32), 0, run.model.V)
logits_BTV, aux = model.forward(run.model, params, router_bias_LE, ids_BT)
print("logits", logits_BTV.shape, "expert load", aux.load_LE.shape, "first layer:", aux.load_LE[0].astype(int))

# %% [markdown]
# ## A few training steps on real documents
#
# The documents come with Python itself: its library's packages as repositories, its manual, docstrings with LaTeX.

# %%
import tempfile
from pathlib import Path

from experiments import pretrain

out = Path(tempfile.mkdtemp()) / "tour"
short = replace(
    run, **{"pretrain.0.tokens": STEPS * 4096, "schedule.warmup_tokens": 4 * 4096, "loop.eval_bytes": 20_000}
)
result = pretrain.main(pretrain.Args(stage=1, out=out), short)
print("held-out bits per byte:", result["start"], "->", result["end"])

# %% [markdown]
# ## Loss, and who does the work
#
# Each MoE layer sends a token to 4 of 16 experts. The balance bias moves by the signs of the counts, never by a
# gradient; the picture shows the share of each expert in each layer as training goes on.

# %%
from glm_jax.train import metrics

records = metrics.read(out / "stage1" / "log.jsonl", "step")
load_TLE = np.array([r["load"] for r in records], float)
figure, axes = plt.subplots(1, 1 + load_TLE.shape[1], figsize=(15, 3), layout="constrained")
axes[0].plot([r["tokens_seen"] for r in records], [r["loss"] for r in records])
axes[0].set(xlabel="tokens", ylabel="loss (nats)")
for layer, ax in enumerate(axes[1:]):
    ax.imshow((load_TLE[:, layer] / load_TLE[:, layer].mean(axis=1, keepdims=True)).T, aspect="auto", vmin=0, vmax=2)
    ax.set(title=f"layer {layer}", xlabel="step", ylabel="expert")
plt.show()

# %% [markdown]
# ## A sample
#
# After so few steps it has learnt little more than which words are common. `make quickstart` trains it to the end.

# %%
from glm_jax.data.prepare import load_tokenizer
from glm_jax.sample.engine import Sampling, generate
from glm_jax.train.checkpoint import load_params

trained, params, router_bias_LE, data = load_params(out)
tokenizer = load_tokenizer(data)
prompt = [tokenizer.end, *tokenizer.encode("def read(self, ")]
completions = generate(
    trained.model, params, router_bias_LE, [prompt], settings=Sampling(temperature=0.8, max_new_tokens=40)
)
print(tokenizer.decode(prompt + list(completions[0].ids)))
