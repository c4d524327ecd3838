"""The model against Hugging Face's Glm4MoeForCausalLM, torch on CPU, that has read what `glm_jax.hf.save` wrote."""

import dataclasses
import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models as make
from chat_material import TOKENIZER, TOOLS

from glm_jax import hf, model
from glm_jax.model import attention
from glm_jax.sample import engine
from glm_jax.text.chat import render, render_tokens
from glm_jax.train.step import loss_fn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.23")
st = pytest.importorskip("safetensors.numpy")
MtpModel = pytest.importorskip("transformers.modeling_layers").MtpModel


def seeds(*quick):
    """Twenty configurations, of which some are quick."""
    return [pytest.param(seed, marks=[] if seed in quick else pytest.mark.slow) for seed in range(20)]


MTP_LAYER = 46  # the number under which transformers looks for an MTP layer
TIE = 1e-6


@partial(jax.jit, static_argnames="cfg")
def logits(cfg, params, router_bias_LE, ids, positions, segments):
    return model.forward(cfg, params, router_bias_LE, ids, positions_BT=positions, segments_BT=segments)[0]


@partial(jax.jit, static_argnames="cfg")
def loss_and_gradient(cfg, params, router_bias_LE, batch):
    totals = {"weights": batch["weights"].sum(), "mtp_weights": batch["mtp_weights"].sum()}
    totals |= {"microbatches": 1.0, "sequence_balance": 0.0}
    (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, cfg, router_bias_LE, batch, 1.0, totals)
    return loss, gradient


def peer_of(folder, dtype=None):
    peer = transformers.Glm4MoeForCausalLM.from_pretrained(folder, **({"dtype": dtype} if dtype else {})).eval()
    peer.set_experts_implementation("eager")  # the others want widths that are multiples of four
    return peer


def where(rows):
    mask, positions = make.visible(rows["segments"]), rows["positions"].astype(np.int64)
    return {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions)}


def ids_of(rows):
    return torch.from_numpy(rows["ids"].astype(np.int64))


def settled(out, router_bias_LE, cfg, rows):
    """Real tokens, less those whose choice of experts hangs on a difference below TIE, and what follows them."""
    tied = np.zeros(rows["ids"].size, bool)
    for layer, logits_XE in enumerate(out.router_logits):
        scores_XE = np.sort(torch.sigmoid(logits_XE).numpy() + router_bias_LE[layer])[:, ::-1]
        tied |= scores_XE[:, cfg.A - 1] - scores_XE[:, cfg.A] < TIE
    if tied.any():
        print(f"{tied.sum()} tokens left out: two experts score the same")
    return (rows["segments"] > 0) & ~np.maximum.accumulate(tied.reshape(rows["ids"].shape), axis=1)


@pytest.mark.parametrize("seed", seeds(0, 3, 6))  # QK-norm and biases: neither, both, biases alone
def test_logits_of_padded_and_packed_rows(seed, tmp_path):
    cfg = make.configuration(seed, **({"H": 10} if seed == 6 else {}))  # half of its dims is an odd number
    params, router_bias_LE = make.weights(cfg, seed)
    rows = make.batch(cfg, seed)
    hf.save(tmp_path / "hf", cfg, params, router_bias_LE)
    with torch.no_grad():
        out = peer_of(tmp_path / "hf")(ids_of(rows), **where(rows), output_router_logits=True)
    counted = settled(out, router_bias_LE, cfg, rows)
    assert counted.sum() > 20
    theirs, ours = out.logits.numpy()[counted], np.asarray(logits(cfg, params, router_bias_LE, **rows))[counted]
    print(f"largest difference {np.abs(ours - theirs).max() / theirs.std():.1e} of the deviation")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * theirs.std())  # float32 sums in another order


@pytest.mark.parametrize("seed", seeds(3))
def test_gradients(seed, tmp_path):
    cfg = make.configuration(seed, mtp_layers=0)
    params, router_bias_LE = make.weights(cfg, seed)
    batch = make.training_batch(make.batch(cfg, seed), main=True, mtp=False)
    hf.save(tmp_path / "hf", cfg, params, router_bias_LE)
    peer = peer_of(tmp_path / "hf")
    out = peer(ids_of(batch), **where(batch)).logits
    theirs = mean_loss(out, batch["targets"], batch["weights"])
    theirs.backward()
    loss, gradient = loss_and_gradient(cfg, params, router_bias_LE, batch)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    compare(named(cfg, gradient, tmp_path / "g"), {n: p.grad.numpy() for n, p in peer.named_parameters()}, 1e-4)


@pytest.mark.parametrize("seed", seeds(3))
def test_mtp_loss_and_gradients(seed, tmp_path):
    """Against transformers' own MTP layer, which reads it from the folder; it knows no documents, so rows are whole."""
    cfg = make.configuration(seed)
    params, router_bias_LE = make.weights(cfg, seed)
    rows = make.batch(cfg, seed)
    rows |= {
        "segments": np.ones_like(rows["segments"]),
        "positions": np.tile(np.arange(make.LENGTH, dtype=np.int32), (make.ROWS, 1)),
    }
    batch = make.training_batch(rows, main=False, mtp=True)
    hf.save(tmp_path / "hf", cfg, params, router_bias_LE)
    peer = peer_of(tmp_path / "hf")
    peer._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{cfg.L}.*"]  # where it looks for the MTP layer
    layer = MtpModel.from_pretrained(peer).eval()
    layer.set_experts_implementation("eager")
    for parameter in (*peer.parameters(), *layer.parameters()):
        parameter.requires_grad_(True)

    ids = ids_of(rows)
    hidden = peer.model(ids, **where(rows)).last_hidden_state[:, :-1]
    positions = torch.from_numpy(rows["positions"].astype(np.int64))[:, :-1]
    out = peer.lm_head(layer.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:]))
    theirs = mean_loss(out, batch["mtp_targets"][:, :-1], batch["mtp_weights"][:, :-1])
    theirs.backward()
    loss, gradient = loss_and_gradient(cfg, params, router_bias_LE, batch)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    ours = named(cfg, gradient, tmp_path / "g")
    here = {n: p.grad.numpy() for n, p in peer.named_parameters()}
    there = {mtp_name(cfg, n): p.grad.numpy() for n, p in layer.layers.named_parameters()}
    compare(ours, here | there, 1e-5)


def mtp_name(cfg, name):
    """model.layers.{L}.* of a parameter of the MTP module's one layer."""
    inside = name.removeprefix("0.").removeprefix("mtp_block.")
    return f"model.layers.{cfg.L}." + ("shared_head.norm.weight" if inside == "post_norm.weight" else inside)


def mean_loss(out, ids, weights):
    chosen = torch.from_numpy(weights > 0)
    return torch.nn.functional.cross_entropy(out[chosen], torch.from_numpy(ids.astype(np.int64))[chosen])


def named(cfg, gradient, folder):
    """Our gradient under Hugging Face's names, experts of a layer joined as torch holds them."""
    hf.save(folder, cfg, gradient, jnp.zeros((cfg.router_rows, cfg.E)))
    there = st.load_file(folder / "model.safetensors")
    found = {name: z for name, z in there.items() if ".experts." not in name and "correction_bias" not in name}
    found = {name: z for name, z in found.items() if f".{cfg.L}.embed" not in name and "shared_head.head" not in name}
    for name in there:
        if not name.endswith(".experts.0.down_proj.weight"):
            continue
        stem = name.removesuffix(".0.down_proj.weight")
        gate, up, down = (
            np.stack([there[f"{stem}.{e}.{part}_proj.weight"] for e in range(cfg.E)]) for part in ("gate", "up", "down")
        )
        found |= {f"{stem}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{stem}.down_proj": down}
    return found


def compare(ours, theirs, most):
    """The relative error of every tensor is below `most`; where the gradient is truly zero, as for a router of which one
    expert is taken, its size is compared with the largest."""
    assert ours.keys() == theirs.keys()
    smallest = 1e-4 * max(np.linalg.norm(z) for z in theirs.values())
    far = {name: np.linalg.norm(ours[name] - z) / max(np.linalg.norm(z), smallest) for name, z in theirs.items()}
    worst = max(far, key=lambda name: far[name])
    print(f"largest relative error {far[worst]:.1e}, of {worst}")
    assert far[worst] < most, (worst, far[worst])


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_theirs(tmp_path):
    """Error of the logits against transformers in float32 with the same (rounded) weights, beside transformers' own.

    Rounding changes the choice of experts of some tokens, of others in each of the two: a single configuration's largest
    error is a lottery, so it is the median of each and the mean square over all that are compared.
    """
    squares = []
    for seed in range(20):
        cfg = make.configuration(seed, mtp_layers=0)
        params, router_bias_LE = make.weights(cfg, seed)
        rows = make.batch(cfg, seed)
        hf.save(tmp_path / str(seed), cfg, params, router_bias_LE, dtype="bfloat16")
        cfg16, params16, router_bias_LE = hf.load(tmp_path / str(seed), dtype="bfloat16")
        with torch.no_grad():
            exact, theirs = (
                peer_of(tmp_path / str(seed), dtype)(ids_of(rows), **where(rows)).logits.float().numpy()
                for dtype in (torch.float32, torch.bfloat16)
            )
        real = rows["segments"] > 0
        cfg16 = dataclasses.replace(cfg16, remat="none")
        ours = np.asarray(logits(cfg16, params16, router_bias_LE, **rows))
        off, own = (np.abs(z - exact)[real] / exact[real].std() for z in (ours, theirs))
        assert np.median(off) < 2 * np.median(own), seed
        squares.append((np.mean(off**2), np.mean(own**2)))
        print(
            f"{seed}: ours over theirs {np.sqrt(squares[-1][0] / squares[-1][1]):.2f}, median {np.median(off) / np.median(own):.2f}"
        )
    off, own = np.sqrt(np.mean(squares, axis=0))
    print(f"bfloat16 against float32, root mean square over 20 configurations: ours {off:.4f}, theirs {own:.4f}")
    assert off < 2 * own


@pytest.mark.parametrize(
    "dtype",
    ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), pytest.param("float16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("fused", [False, True])
def test_round_trip_of_what_transformers_wrote(dtype, fused, tmp_path):
    cfg = make.configuration(3, mtp_layers=0)
    hf.save(tmp_path / "first", cfg, *make.weights(cfg, 3), dtype=dtype)
    peer = peer_of(tmp_path / "first")
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="50KB", save_original_format=not fused)
    there = tensors(tmp_path / "theirs")
    assert any("gate_up_proj" in name for name in there) == fused
    loaded = hf.load(tmp_path / "theirs", dtype=dtype)
    hf.save(tmp_path / "ours", *loaded, shard_gb=5e-5)
    equal(tensors(tmp_path / "ours"), tensors(tmp_path / "first"))
    if not fused:
        equal(tensors(tmp_path / "ours"), there)
    rows = make.batch(cfg, 3)
    with torch.no_grad():
        one, two = (m(ids_of(rows), **where(rows)).logits for m in (peer, peer_of(tmp_path / "ours")))
    assert torch.equal(one, two)


def tensors(folder):
    return {name: z for file in sorted(folder.glob("*.safetensors")) for name, z in st.load_file(file).items()}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, z in theirs.items():
        assert ours[name].dtype == z.dtype and ours[name].tobytes() == z.tobytes(), name


@pytest.mark.parametrize(("layers", "mtp_layers"), [(3, 0), (3, 1), (MTP_LAYER, 1)])
def test_transformers_says_nothing(layers, mtp_layers, tmp_path, caplog):
    """But to list an MTP layer at a number other than those of the published models."""
    cfg = make.configuration(6, L=layers, mtp_layers=mtp_layers, D=16, M=8, F=8)
    hf.save(tmp_path / "hf", cfg, *make.weights(cfg, 6))
    told = logging.getLogger("transformers")
    told.addHandler(caplog.handler)
    try:
        peer, found = transformers.Glm4MoeForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
        if layers == MTP_LAYER:
            MtpModel.from_pretrained(peer)  # raises for a weight that it does not find
    finally:
        told.removeHandler(caplog.handler)
    listed = bool(mtp_layers) and layers != MTP_LAYER
    assert not found["missing_keys"] and not found["mismatched_keys"] and not found["error_msgs"]
    assert bool(found["unexpected_keys"]) == bool(caplog.records) == listed
    assert all(name.startswith(f"model.layers.{layers}.") for name in found["unexpected_keys"])


def test_their_tokenizer_and_template_are_ours(tmp_path):
    cfg = make.configuration(3, V=TOKENIZER.vocab_size)
    (tmp_path / "data").mkdir()
    TOKENIZER.save(tmp_path / "data" / "tokenizer.json")
    hf.save(tmp_path / "hf", cfg, *make.weights(cfg, 3), companions=tmp_path / "data")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token_id, theirs.pad_token_id) == (TOKENIZER.end, TOKENIZER.end)
    asked = [{"role": "system", "content": "Zürich"}, {"role": "user", "content": "12 <b>"}]
    for thinking in (True, False):
        switches = {"add_generation_prompt": True, "enable_thinking": thinking}
        text = theirs.apply_chat_template(asked, tools=TOOLS[:1], tokenize=False, **switches)
        assert text == render(asked, TOOLS[:1], **switches)
        assert theirs(text)["input_ids"] == render_tokens(TOKENIZER, asked, TOOLS[:1], **switches).ids


def test_float8_as_torch_multiplies_it_out(tmp_path):
    """Scales of blocks of 128 x 128 and of rows, in torch's own float8."""
    cfg = make.configuration(3, mtp_layers=0, D=150, M=140, F=131, E=4, A=2, L=2, dense_layers=1)
    params, router_bias_LE = make.weights(cfg, 3)
    hf.save(tmp_path / "hf", cfg, params, router_bias_LE)
    plain = {name: torch.from_numpy(z) for name, z in tensors(tmp_path / "hf").items()}
    for kind in ("scale_inv", "scale"):
        stored, exact = {}, {}
        for name, z in plain.items():
            if "_proj.weight" not in name:
                stored[name] = exact[name] = z
                continue
            scale = block_scale(z) if kind == "scale_inv" else z.abs().amax(1, keepdim=True) / 448
            full = spread(scale, z.shape) if kind == "scale_inv" else scale
            stored[name] = (z / full).to(torch.float8_e4m3fn)
            stored[f"{name}_{kind}"] = scale
            exact[name] = stored[name].float() * full
        from safetensors.torch import save_file

        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
        save_file(stored, folder / "model.safetensors")
        loaded = hf.load(folder, dtype="float32")
        hf.save(tmp_path / f"{kind}_out", *loaded)
        equal(tensors(tmp_path / f"{kind}_out"), {name: z.numpy() for name, z in exact.items()})


def block_scale(z, size=128):
    rows, columns = (-(-n // size) for n in z.shape)
    blocks = [[z[i * size : (i + 1) * size, j * size : (j + 1) * size] for j in range(columns)] for i in range(rows)]
    return torch.tensor([[float(block.abs().max()) / 448 for block in row] for row in blocks])


def spread(scale, shape, size=128):
    return scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[: shape[0], : shape[1]]


def test_greedy_text(tmp_path):
    cfg = make.configuration(3, mtp_layers=0)
    params, router_bias_LE = make.weights(cfg, 3)
    hf.save(tmp_path / "hf", cfg, params, router_bias_LE)
    peer = peer_of(tmp_path / "hf")
    prompts = np.random.default_rng(2).integers(0, cfg.V, (3, 9))
    theirs = peer.generate(torch.from_numpy(prompts), do_sample=False, max_new_tokens=20)[:, 9:].tolist()
    settings = engine.Sampling(temperature=0, max_new_tokens=20)
    ours = engine.generate(cfg, params, jnp.asarray(router_bias_LE), prompts.tolist(), settings=settings)
    assert [completion.ids for completion in ours] == theirs


def test_the_other_rotary_convention_is_told_apart(monkeypatch, tmp_path):
    """Pairs (2i, 2i+1), as the dense GLM-4 has it, must not pass for half-split (spec 1.3 and 16.3)."""

    def interleaved(z_BTNH, cos_BTH, sin_BTH):
        half = cos_BTH.shape[-1]
        cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
        even, odd, rest = z_BTNH[..., : 2 * half : 2], z_BTNH[..., 1 : 2 * half : 2], z_BTNH[..., 2 * half :]
        turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
        return jnp.concatenate([turned.reshape(*turned.shape[:-2], -1), rest], axis=-1)

    cfg = make.configuration(3, mtp_layers=0, H=16)
    params, router_bias_LE = make.weights(cfg, 3)
    rows = make.batch(cfg, 3)
    hf.save(tmp_path / "hf", cfg, params, router_bias_LE)
    with torch.no_grad():
        theirs_BTV = peer_of(tmp_path / "hf")(ids_of(rows), **where(rows)).logits.numpy()
    monkeypatch.setattr(attention, "rope", interleaved)
    ours_BTV = jax.jit(lambda: model.forward(cfg, params, router_bias_LE, rows["ids"])[0])()
    assert np.abs(ours_BTV - theirs_BTV)[2].max() > 0.1 * theirs_BTV.std()
