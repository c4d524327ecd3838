"""The validation loss of SFT: nats per trained token of held-out dialogues."""

from collections.abc import Sequence

import numpy as np
from jax import Array

from glm_jax import mesh, model
from glm_jax.config import Model, Run, Stage
from glm_jax.data.dialogues import Dialogue, batches
from glm_jax.evals.bits_per_byte import batch_rows, negative_log_likelihood
from glm_jax.text.tokenizer import Tokenizer
from glm_jax.train.loop import Evaluate


def evaluator(dialogues: Sequence[Dialogue], tokenizer: Tokenizer, run: Run, stage: Stage) -> Evaluate:
    """What `train_stage` calls: {"dialogues": nats per trained token}, over all that fit a row of the stage."""
    rendered = [item for item in (d.tokens(tokenizer) for d in dialogues) if len(item.ids) <= stage.seq_len]
    prepared = batches(rendered, stage.seq_len, batch_rows(run, stage), tokenizer)

    def evaluate(cfg: Model, params: model.GLM, router_bias_LE: Array) -> dict[str, float]:
        paid, trained = 0.0, 0.0
        for batch in prepared:
            nll_BT = negative_log_likelihood(cfg, params, router_bias_LE, mesh.placed(batch))
            paid += float(np.sum(np.asarray(nll_BT, np.float64) * batch["weights"]))
            trained += float(np.sum(batch["weights"]))
        return {"dialogues": round(paid / trained, 6)}

    return evaluate
