"""The model against Hugging Face's Glm4MoeForCausalLM with the same weights, float32 on CPU: logits, gradients, text."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import model
from glm_jax.config import Model
from glm_jax.model import attention
from glm_jax.sample import engine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.23")

SMALL = {"mtp_layers": 0, "dtype": "float32", "rope_theta": 1e4, "max_positions": 128}
GLM45 = {"L": 3, "dense_layers": 1, "N": 6, "K": 2, "H": 12, "E": 6, "A": 2, "routed_scale": 2.5}
AIR = {"L": 3, "dense_layers": 1, "N": 4, "K": 4, "H": 8, "E": 5, "A": 4, "routed_scale": 1.0, "qk_norm": False}
ODD = {"L": 4, "dense_layers": 3, "N": 3, "K": 1, "H": 4, "E": 7, "A": 1, "shared_experts": 2, "qkv_bias": False}
BARE = {"L": 3, "dense_layers": 2, "N": 9, "K": 3, "H": 16, "E": 12, "A": 3, "qkv_bias": False, "qk_norm": False}
CASES = {
    "glm45": Model(V=61, D=40, F=36, M=20, **GLM45, **SMALL),
    "air": Model(V=50, D=24, F=20, M=12, **AIR, **SMALL),
    "odd": Model(V=33, D=37, F=51, M=9, **ODD, **SMALL),
    "bare": Model(V=40, D=20, F=28, M=7, rope_fraction=0.25, **BARE, **SMALL),
}


def random_model(cfg: Model, seed: int = 0):
    """Random norms, biases and selection biases too, so that none of them is where it could be forgotten."""
    noise = np.random.default_rng(seed)

    def make(spec):
        return jnp.asarray(0.15 * noise.normal(size=spec.shape) + (spec.kind == "norm"), jnp.float32)

    return jax.tree.map(make, model.specs(cfg)), jnp.asarray(
        0.2 * noise.normal(size=(cfg.router_rows, cfg.E)), "float32"
    )


@partial(jax.jit, static_argnames="cfg")
def logits(cfg: Model, params: model.GLM, router_bias_LE, ids_BT):
    return model.forward(cfg, params, router_bias_LE, ids_BT)[0]


def hf_tensors(cfg: Model, params: model.GLM) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under Hugging Face's names: [out, in] matrices, gate and up of an expert joined."""

    def linear(w, ins: int = 1):
        w = np.asarray(w)
        return w.reshape(np.prod(w.shape[:ins]), -1).T

    tensors = {
        "model.embed_tokens.weight": params.embed_VD,
        "model.norm.weight": params.norm_D,
        "lm_head.weight": linear(params.head_DV),
    }
    split = model.unstack(params)
    for i, layer in enumerate((*(split.dense or ()), *(split.moe or ()))):
        p, ffn = layer.attention, layer.ffn
        tensors |= {
            f"model.layers.{i}.{name}": value
            for name, value in {
                "input_layernorm.weight": layer.attention_norm_D,
                "post_attention_layernorm.weight": layer.ffn_norm_D,
                "self_attn.q_proj.weight": linear(p.q_DNH),
                "self_attn.k_proj.weight": linear(p.k_DKH),
                "self_attn.v_proj.weight": linear(p.v_DKH),
                "self_attn.o_proj.weight": linear(p.o_NHD, ins=2),
                **({f"self_attn.{n}_norm.weight": getattr(p.qk_norm, f"{n}_H") for n in "qk"} if p.qk_norm else {}),
                **(_biases(p.qkv_bias) if p.qkv_bias else {}),
                **(_experts(ffn, linear) if i >= cfg.dense_layers else _swiglu("mlp", ffn, "DF", linear)),
            }.items()
        }
    return {name: np.array(value) for name, value in tensors.items()}


def _biases(p):
    return {
        "self_attn.q_proj.bias": p.q_NH.reshape(-1),
        "self_attn.k_proj.bias": p.k_KH.reshape(-1),
        "self_attn.v_proj.bias": p.v_KH.reshape(-1),
    }


def _swiglu(name, p, dims, linear):
    return {
        f"{name}.gate_proj.weight": linear(getattr(p, f"gate_{dims}")),
        f"{name}.up_proj.weight": linear(getattr(p, f"up_{dims}")),
        f"{name}.down_proj.weight": linear(getattr(p, f"down_{dims[::-1]}")),
    }


def _experts(p, linear):
    return {
        "mlp.gate.weight": linear(p.router_DE),
        "mlp.experts.gate_up_proj": np.concatenate([p.gate_EDM, p.up_EDM], axis=2).swapaxes(1, 2),
        "mlp.experts.down_proj": np.swapaxes(p.down_EMD, 1, 2),
        **_swiglu("mlp.shared_experts", p.shared, "DM", linear),
    }


def hf_model(cfg: Model, params: model.GLM, router_bias_LE):
    config = transformers.Glm4MoeConfig(
        vocab_size=cfg.V, hidden_size=cfg.D, num_hidden_layers=cfg.L, first_k_dense_replace=cfg.dense_layers,
        num_attention_heads=cfg.N, num_key_value_heads=cfg.K, head_dim=cfg.H, intermediate_size=cfg.F,
        moe_intermediate_size=cfg.M, n_routed_experts=cfg.E, num_experts_per_tok=cfg.A,
        n_shared_experts=cfg.shared_experts, use_qk_norm=cfg.qk_norm, attention_bias=cfg.qkv_bias,
        routed_scaling_factor=cfg.routed_scale, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default", "rope_theta": cfg.rope_theta, "partial_rotary_factor": cfg.rope_fraction
        },
        max_position_embeddings=cfg.max_positions, num_nextn_predict_layers=0, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    peer = transformers.Glm4MoeForCausalLM(config).float().eval()
    peer.set_experts_implementation("eager")  # the others want widths that are multiples of four
    tensors = {name: torch.from_numpy(value) for name, value in hf_tensors(cfg, params).items()}
    for i, bias_E in enumerate(np.array(router_bias_LE)):
        layer = f"model.layers.{cfg.dense_layers + i}.mlp.gate.e_score_correction_bias"
        tensors[layer] = torch.from_numpy(bias_E)
    peer.load_state_dict(tensors, strict=True)
    return peer


@pytest.fixture(params=CASES, scope="module")
def pair(request):
    cfg = CASES[request.param]
    params, router_bias_LE = random_model(cfg)
    ids_BT = np.random.default_rng(1).integers(0, cfg.V, (3, 23))
    return cfg, params, router_bias_LE, hf_model(cfg, params, router_bias_LE), ids_BT


def test_logits(pair):
    cfg, params, router_bias_LE, peer, ids_BT = pair
    ours_BTV = logits(cfg, params, router_bias_LE, ids_BT)
    with torch.no_grad():
        theirs_BTV = peer(torch.from_numpy(ids_BT)).logits.numpy()
    # float32 sums in another order, through a few layers
    np.testing.assert_allclose(ours_BTV, theirs_BTV, rtol=0, atol=2e-5 * theirs_BTV.std())


def test_gradients(pair):
    cfg, params, router_bias_LE, peer, ids_BT = pair

    def loss_fn(params):
        logp_BTV = jax.nn.log_softmax(logits(cfg, params, router_bias_LE, ids_BT[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logp_BTV, ids_BT[:, 1:, None], axis=-1))

    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(params)
    peer.zero_grad()
    ids = torch.from_numpy(ids_BT)
    theirs = torch.nn.functional.cross_entropy(peer(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    ours = hf_tensors(cfg, gradient)
    assert ours.keys() == {name for name, _ in peer.named_parameters()}
    theirs = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
    smallest = 1e-4 * max(np.linalg.norm(z) for z in theirs.values())  # with A=1 the router's gradient is truly zero
    far = {name: np.linalg.norm(ours[name] - z) / max(np.linalg.norm(z), smallest) for name, z in theirs.items()}
    assert max(far.values()) < 1e-4, max(far.items(), key=lambda item: item[1])


def test_greedy_text():
    cfg = CASES["glm45"]
    params, router_bias_LE = random_model(cfg)
    peer = hf_model(cfg, params, router_bias_LE)
    prompts = np.random.default_rng(2).integers(0, cfg.V, (3, 9))
    theirs = peer.generate(torch.from_numpy(prompts), do_sample=False, max_new_tokens=20)[:, 9:].tolist()
    settings = engine.Sampling(temperature=0, max_new_tokens=20)
    ours = engine.generate(cfg, params, router_bias_LE, prompts.tolist(), settings=settings)
    assert [completion.ids for completion in ours] == theirs


def test_the_other_rotary_convention_is_told_apart(monkeypatch):
    """Pairs (2i, 2i+1), as the dense GLM-4 has it, must not pass for half-split (spec 1.3 and 16.3)."""

    def interleaved(z_BTNH, cos_BTH, sin_BTH):
        half = cos_BTH.shape[-1]
        cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
        even, odd, rest = z_BTNH[..., : 2 * half : 2], z_BTNH[..., 1 : 2 * half : 2], z_BTNH[..., 2 * half :]
        turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
        return jnp.concatenate([turned.reshape(*turned.shape[:-2], -1), rest], axis=-1)

    cfg = CASES["glm45"]
    params, router_bias_LE = random_model(cfg)
    ids_BT = np.random.default_rng(1).integers(0, cfg.V, (2, 16))
    with torch.no_grad():
        theirs_BTV = hf_model(cfg, params, router_bias_LE)(torch.from_numpy(ids_BT)).logits.numpy()
    monkeypatch.setattr(attention, "rope", interleaved)
    ours_BTV = jax.jit(lambda: model.forward(cfg, params, router_bias_LE, ids_BT)[0])()
    assert np.abs(ours_BTV - theirs_BTV).max() > 0.1 * theirs_BTV.std()
