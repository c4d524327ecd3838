"""Make the golden arrays beside this: what transformers computes, for machines that have no torch.

    pip install -e ".[oracle]" && python tests/parity/make_golden.py

A file per seed of `random_models`: logits of the real tokens, the mean next-token loss and its gradient, and the versions
that made them. Of the gradient of each of our arrays: its size, and its products with SKETCHES random arrays of signs,
which tell how far another gradient is from it. Weights are not kept: they follow from the seed.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import random_models as make

from glm_jax import hf, spec
from glm_jax.config import Model

FOLDER = Path(__file__).parent / "golden"
SEEDS = (1, 2, 4, 7)
SKETCHES = 16


def sketch(gradient: Any) -> dict[str, np.ndarray]:
    """Dotted path -> size of each array, and its products with arrays of signs divided by the root of their length."""
    sketches = {}
    for path, z in spec.leaves(gradient):
        flat = np.asarray(z, np.float64).ravel()
        signs = np.sign(make.Bits(len(flat), 4).uniform((SKETCHES, len(flat))).astype(np.float64) + 1e-9)
        sketches[path] = np.array([np.linalg.norm(flat), *(signs @ flat)])
    return sketches


def oracle(cfg: Model, seed: int, folder: Path) -> dict[str, Any]:
    """transformers' logits, loss and gradient."""
    import torch
    import transformers
    from safetensors.torch import save_file

    rows = make.batch(cfg, seed)
    hf.save(folder / "model", cfg, *make.weights(cfg, seed))
    peer = transformers.Glm4MoeForCausalLM.from_pretrained(folder / "model").eval()
    peer.set_experts_implementation("eager")
    ids, positions = (torch.from_numpy(rows[name].astype(np.int64)) for name in ("ids", "positions"))
    mask = torch.from_numpy(make.visible(rows["segments"]))
    out = peer(ids, attention_mask=mask, position_ids=positions).logits
    wanted, weight = (torch.from_numpy(z) for z in make.targets(rows, 1))
    loss = torch.nn.functional.cross_entropy(out[weight > 0], wanted.long()[weight > 0])
    loss.backward()

    (folder / "gradient").mkdir()
    (folder / "gradient" / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    gradient = {name: parameter.grad for name, parameter in peer.named_parameters()}
    biases = {name: z for name, z in peer.named_buffers() if name.endswith("e_score_correction_bias")}
    save_file(gradient | biases, folder / "gradient" / "model.safetensors")
    _, gradient, _ = hf.load(folder / "gradient", dtype="float32")
    return {
        "logits": out.detach().numpy()[rows["segments"] > 0],
        "loss": np.float32(loss.item()),
        "gradient": np.stack(list(sketch(gradient).values())).astype(np.float32),
        "versions": np.array([f"transformers {transformers.__version__}", f"torch {torch.__version__}", f"numpy {np.__version__}"]),
    }  # fmt: skip


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for seed in SEEDS:
        cfg = make.configuration(seed, mtp_layers=0)
        with tempfile.TemporaryDirectory() as folder:
            found = oracle(cfg, seed, Path(folder))
        np.savez_compressed(FOLDER / f"glm4_moe_{seed}.npz", **found)
        print(FOLDER / f"glm4_moe_{seed}.npz", *found["versions"], sep="  ")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
