"""The training step against a slow literal reading of spec 1.3, 1.5, 2 and 3: float64, document by document, token ranks
by counting, weights under their published names. Packed rows, document ends, padding, MTP and balance loss, bias update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models as make

from glm_jax.hf import names
from glm_jax.model.moe import balance_loss, choose
from glm_jax.optim.balance import balance
from glm_jax.train.step import loss_fn


class Literal:
    """GLM-4.5 as the spec writes it, over one document at a time."""

    def __init__(self, cfg, params, router_bias_LE):
        arrays = dict(zip((path for path, _ in names.spec.leaves(params)), jax.tree.leaves(params), strict=True))
        arrays[names.ROUTER_BIAS] = jnp.asarray(router_bias_LE, jnp.float64)
        self.cfg, self.w = cfg, {}
        for path, declared in names.weights(cfg).items():
            for tensor in names.tensors(declared):
                w = jnp.asarray(arrays[path], jnp.float64)[tensor.index].reshape(names.matrix(declared))
                w = w.T if names.transposed(declared) else w
                self.w[tensor.name] = w if declared.ins else w[0]

    def norm(self, x, name):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + self.cfg.norm_eps) * self.w[f"{name}.weight"]

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def rope(self, z, position):
        pairs = self.cfg.rotary // 2
        angle = position * self.cfg.rope_theta ** (-jnp.arange(pairs) / pairs)
        first, second = z[:pairs], z[pairs : 2 * pairs]
        turned = [first * jnp.cos(angle) - second * jnp.sin(angle), first * jnp.sin(angle) + second * jnp.cos(angle)]
        return jnp.concatenate([*turned, z[2 * pairs :]])

    def heads(self, x, name, count, norm):
        z = self.linear(x, f"{name}_proj").reshape(len(x), count, self.cfg.H)
        return self.norm(z, norm) if norm and self.cfg.qk_norm else z

    def attention(self, x, name):
        cfg, name = self.cfg, f"{name}.self_attn"
        q = self.heads(x, f"{name}.q", cfg.N, f"{name}.q_norm")
        k = self.heads(x, f"{name}.k", cfg.K, f"{name}.k_norm")
        v = self.heads(x, f"{name}.v", cfg.K, None)
        turn = jax.vmap(jax.vmap(self.rope, (0, None)), (0, 0))
        q, k = (turn(z, jnp.arange(len(x), dtype=jnp.float64)) for z in (q, k))
        out = []
        for head in range(cfg.N):
            group = head // (cfg.N // cfg.K)
            scores = q[:, head] @ k[:, group].T / np.sqrt(cfg.H)
            scores = jnp.where(np.tri(len(x), dtype=bool), scores, -jnp.inf)
            out.append(jax.nn.softmax(scores) @ v[:, group])
        return self.linear(jnp.stack(out, 1).reshape(len(x), -1), f"{name}.o_proj")

    def swiglu(self, x, name):
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(gate / (1 + jnp.exp(-gate)) * up, f"{name}.down_proj")

    def experts(self, x, name):
        """(output, scores, choices): weights are the chosen scores, without the bias, normalised and scaled."""
        scores = 1 / (1 + jnp.exp(-self.linear(x, f"{name}.gate")))
        chosen = top(scores + self.w[f"{name}.gate.e_score_correction_bias"], self.cfg.A)
        weights = chosen * scores / jnp.sum(chosen * scores, -1, keepdims=True) * self.cfg.routed_scale
        routed = sum(weights[:, e, None] * self.swiglu(x, f"{name}.experts.{e}") for e in range(self.cfg.E))
        return routed + self.swiglu(x, f"{name}.shared_experts"), scores, chosen

    def layer(self, x, number, seen):
        name = f"model.layers.{number}"
        x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), name)
        h = self.norm(x, f"{name}.post_attention_layernorm")
        if number < self.cfg.dense_layers:
            return x + self.swiglu(h, f"{name}.mlp")
        y, *routing = self.experts(h, f"{name}.mlp")
        seen.append(routing)
        return x + y

    def document(self, ids):
        """Of every token that has a next one: log-probabilities of t_{i+1} and, by the MTP layer, of t_{i+2}. And
        (scores, choices) of each MoE layer before the MTP layer, of every token."""
        seen = []
        table = self.w["model.embed_tokens.weight"]
        x = table[ids]
        for number in range(self.cfg.L):
            x = self.layer(x, number, seen)
        hidden = self.norm(x, "model.norm")
        name = f"model.layers.{self.cfg.L}"
        known = [self.norm(table[ids[1:]], f"{name}.enorm"), self.norm(hidden[:-1], f"{name}.hnorm")]
        g = self.layer(self.linear(jnp.concatenate(known, -1), f"{name}.eh_proj"), self.cfg.L, [])
        ahead = self.norm(g, f"{name}.shared_head.norm")
        return *(jax.nn.log_softmax(self.linear(z, "lm_head")) for z in (hidden[:-1], ahead)), seen


def top(scores, k):
    """1 for the k largest of each token: those that fewer than k others exceed."""
    return (jnp.sum(scores[:, None, :] > scores[:, :, None], -1) < k).astype(scores.dtype)


def documents(rows):
    """Tokens of every document, row by row."""
    return [
        [rows["ids"][row][rows["segments"][row] == number] for number in np.unique(rows["segments"][row]) if number]
        for row in range(make.ROWS)
    ]


def picked(log_probs, ids):
    return jnp.sum(log_probs[np.arange(len(ids)), ids])


def sequence_balance(cfg, scores, chosen):
    """sum_i f_i P_i of one row (DeepSeek-V3, equations 17-20): f from the top-k of unbiased scores, no gradient in it."""
    share = scores / jnp.sum(scores, -1, keepdims=True)
    f = jax.lax.stop_gradient(jnp.sum(top(scores, cfg.A), 0)) * cfg.E / (cfg.A * len(scores))
    return jnp.sum(f * jnp.mean(share, 0))


def literal_losses(cfg, params, router_bias_LE, rows):
    """(mean next-token loss, mean MTP loss, sum of the MoE layers' balance losses), and their expert counts [L, E]."""
    model, main, mtp, counts = Literal(cfg, params, router_bias_LE), 0.0, 0.0, np.zeros(2)
    balanced, load_LE = 0.0, 0
    for texts in documents(rows):
        routing = []
        for ids in texts:
            one, two, seen = model.document(ids)
            main, mtp = main - picked(one, ids[1:]), mtp - picked(two[:-1], ids[2:])
            counts += len(ids) - 1, max(len(ids) - 2, 0)
            routing.append(seen)
        of_row = [[jnp.concatenate(z) for z in zip(*layer, strict=True)] for layer in zip(*routing, strict=True)]
        balanced += sum(sequence_balance(cfg, *layer) for layer in of_row) / make.ROWS
        load_LE += jnp.stack([jnp.sum(chosen, 0) for _, chosen in of_row])
    return (main / counts[0], mtp / counts[1], balanced), load_LE


def ours(cfg, params, router_bias_LE, rows, which):
    """One of our three losses with its gradient, and the step's metrics."""
    batch = make.training_batch(rows, main=which == "main", mtp=which == "mtp")
    if which == "balance":
        del batch[
            "mtp_targets"
        ]  # the MTP layer does not run: what it sees behind a document's end is a row's own matter
    totals = {name: jnp.maximum(batch[name].sum(), 1.0) for name in ("weights", "mtp_weights")}
    totals |= {"microbatches": 1.0, "sequence_balance": float(which == "balance")}
    run = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, cfg, router_bias_LE, batch, 1.0, totals), has_aux=True))
    (loss, metrics), gradient = run(params)
    return loss, gradient, metrics


@pytest.mark.slow
def test_losses_gradients_and_counts():
    seed = 3  # QK-norm and biases
    cfg = make.configuration(seed, L=2, dense_layers=1, N=4, K=2, E=5, A=2)
    params, router_bias_LE = make.weights(cfg, seed)
    rows = make.batch(cfg, seed)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda z: jnp.asarray(z, jnp.float64), params)

        def reading(p):
            losses, load_LE = literal_losses(cfg, p, router_bias_LE, rows)
            return losses, (losses, load_LE)

        gradients, (losses, load_LE) = jax.device_get(jax.jit(jax.jacrev(reading, has_aux=True))(wide))
    for which, loss, gradient in zip(("main", "mtp", "balance"), losses, gradients, strict=True):
        found, of_ours, metrics = ours(cfg, params, router_bias_LE, rows, which)
        np.testing.assert_allclose(found, loss, rtol=1e-5)
        far, worst = distance(of_ours, gradient)
        print(f"{which}: largest relative error of a gradient {far:.1e}, of {worst}")
        assert far < 1e-5, (which, worst, far)
        np.testing.assert_array_equal(metrics["load_LE"][: cfg.moe_layers], load_LE)


def distance(gradient, literal):
    """The largest relative error of an array, and whose; arrays with hardly any gradient against 1e-4 of the largest."""
    names_of = [path for path, _ in names.spec.leaves(gradient)]
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(literal), strict=True))
    smallest = 1e-4 * max(np.linalg.norm(z) for _, z in pairs)
    far = [np.linalg.norm(np.asarray(z, np.float64) - w) / max(np.linalg.norm(w), smallest) for z, w in pairs]
    return max(zip(far, names_of, strict=True))


def test_choice_weights_and_balance_loss_of_given_scores():
    """Megatron's aux loss: scores normalised by their sum, the top-k of unbiased ones counted; weights without the bias."""
    cfg = make.configuration(1, E=7, A=3, routed_scale=2.5)
    bits = make.Bits(5)
    scores = 1 / (1 + np.exp(-bits.uniform((2, 9, cfg.E)).astype(np.float64)))
    bias = 0.3 * bits.uniform((cfg.E,))
    experts, _, weights = jax.tree.map(np.asarray, choose(cfg, jnp.asarray(scores, jnp.float32), jnp.asarray(bias)))
    for row, t in np.ndindex(2, 9):
        best = np.argsort(-(scores[row, t] + bias))[: cfg.A]
        assert set(experts[row, t]) == set(best)
        expected = 2.5 * scores[row, t, experts[row, t]] / scores[row, t, best].sum()
        np.testing.assert_allclose(weights[row, t], expected, rtol=1e-6)
    real = np.ones((2, 9), bool)
    real[0, 6:] = False
    unbiased = np.array([[np.isin(np.arange(cfg.E), np.argsort(-one)[: cfg.A]) for one in row] for row in scores])
    total = 0.0
    for row in range(2):
        s, n = scores[row][real[row]], real[row].sum()
        fraction = unbiased[row][real[row]].sum(0) / (n * cfg.A)
        total += cfg.E * np.sum(fraction * (s / s.sum(-1, keepdims=True)).mean(0)) / 2
    found = balance_loss(cfg, jnp.asarray(scores, jnp.float32), jnp.asarray(unbiased, jnp.float32), jnp.asarray(real))
    np.testing.assert_allclose(found, total, rtol=1e-6)


def test_bias_update_as_megatron_writes_it():
    """b_i += rate * sign(mean(c) - c_i), per layer, float32."""
    load_LE = np.array([[3, 0, 5, 4], [2, 2, 2, 2], [0, 0, 0, 8]], np.float32)
    bias_LE = np.array([[0.1, -0.2, 0.0, 0.3]] * 3, np.float32)
    expected = bias_LE.copy()
    for layer, expert in np.ndindex(load_LE.shape):
        error = load_LE[layer].sum() / load_LE.shape[1] - load_LE[layer, expert]
        expected[layer, expert] += np.float32(0.001) * (error > 0) - np.float32(0.001) * (error < 0)
    np.testing.assert_array_equal(balance(jnp.asarray(bias_LE), jnp.asarray(load_LE), 0.001), expected)
