"""Published checkpoints: the table of names both ways, files in every form, and what is refused. No torch is needed."""

import dataclasses
import errno
import json
import math
import os
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import random_models as make
from chat_material import TOKENIZER

from experiments import recipes
from glm_jax import hf, mesh, model, spec
from glm_jax.config import ConfigError, Mesh
from glm_jax.hf import config as published
from glm_jax.hf import names, safetensors
from glm_jax.hf import write as hf_write
from glm_jax.text.chat import stop_ids

CFG = make.configuration(3, mtp_layers=1, D=24, H=16, M=20, F=28, E=5, A=2, L=3, dense_layers=1)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@pytest.fixture(scope="module")
def tree():
    return make.weights(CFG, 3)


@pytest.fixture
def folder(tree, tmp_path):
    hf.save(tmp_path / "hf", CFG, *tree)
    return tmp_path / "hf"


def tensors(folder):
    """name -> array of every tensor in a folder."""
    return {
        name: np.array(one.rows(0, one.height)).reshape(one.shape) for name, one in safetensors.entries(folder).items()
    }


def put(folder, arrays, file="model.safetensors"):
    """Make these the tensors of one file."""
    with safetensors.write(folder / file, [(name, z.dtype, z.shape) for name, z in arrays.items()]) as write:
        for z in arrays.values():
            write(z)


def change(folder, **fields):
    there = json.loads((folder / "config.json").read_text())
    there = {name: value for name, value in {**there, **fields}.items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(there))


def same(one, two):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, two))


# Names


@pytest.mark.parametrize(("name", "layers", "dense"), [("glm45", 92, 3), ("air", 46, 1)])
def test_names_are_those_of_the_published_models(name, layers, dense):
    """Spec 1.4, written out, against what the declarations say; each tensor belongs to one place."""
    cfg = recipes.get(name).model
    attention = [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")] + [
        "self_attn.o_proj.weight"
    ]
    attention += [f"self_attn.{p}_norm.weight" for p in "qk"] if name == "glm45" else []
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    swiglu = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    experts = [f"mlp.experts.{e}.{w}" for e in range(cfg.E) for w in swiglu]
    moe = [
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        *experts,
        *(f"mlp.shared_experts.{w}" for w in swiglu),
    ]
    extras = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"]
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(layers + 1):
        inside = [*attention, *norms, *([f"mlp.{w}" for w in swiglu] if layer < dense else moe)]
        wanted |= {f"model.layers.{layer}.{one}" for one in inside + (extras if layer == layers else [])}
    table = names.table(cfg)
    assert table.keys() == wanted
    assert len(set(table.values())) == len(table)
    declared = names.weights(cfg)
    assert sum(math.prod(names.tensor_shape(declared[path])) for path, _ in table.values()) == sum(
        one.count for one in declared.values()
    )
    assert names.tensor_shape(declared["moe.attention.q_DNH"]) == (12_288, cfg.D)
    assert names.tensor_shape(declared["moe.attention.o_NHD"]) == (cfg.D, 12_288)
    assert names.tensor_shape(declared["embed_VD"]) == (151_552, cfg.D) == names.tensor_shape(declared["head_DV"])
    assert set(names.copies(cfg)) == {
        f"model.layers.{layers}.{one}.weight" for one in ("embed_tokens", "shared_head.head")
    }


def test_a_tensor_lies_where_the_table_says(folder, tree):
    """Each published tensor, found through the table in our arrays."""
    arrays = dict(spec.leaves(tree[0])) | {names.ROUTER_BIAS: tree[1]}
    there, declared = tensors(folder), names.weights(CFG)
    for name, (path, index) in names.table(CFG).items():
        ours = np.asarray(arrays[path])[index].reshape(names.matrix(declared[path]))
        ours = ours.T if names.transposed(declared[path]) else ours
        np.testing.assert_array_equal(there[name].reshape(ours.shape), ours, err_msg=name)


# Both ways


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_comes_back(dtype, tree, tmp_path):
    params = jax.tree.map(lambda z: np.asarray(z).astype(dtype), tree[0])
    hf.save(tmp_path / "hf", CFG, params, tree[1], shard_gb=2e-5)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    for asked in (dtype, jnp.dtype(dtype), None):
        cfg, again, router_bias_LE = hf.load(tmp_path / "hf", dtype=asked)
        assert cfg == dataclasses.replace(CFG, dtype=dtype, remat=cfg.remat)
        assert same(again, params) and same(router_bias_LE, tree[1])


def test_dtypes_are_cast_on_the_way(folder, tree, tmp_path):
    _, params, router_bias_LE = hf.load(folder, dtype=jnp.bfloat16)
    assert (
        same(params, jax.tree.map(lambda z: np.asarray(z).astype(jnp.bfloat16), tree[0]))
        and router_bias_LE.dtype == np.float32
    )
    hf.save(tmp_path / "half", CFG, *tree, dtype="float16")
    kinds = {name: one.code for name, one in safetensors.entries(tmp_path / "half").items()}
    assert {kind for name, kind in kinds.items() if "correction_bias" not in name} == {"F16"}
    assert {kind for name, kind in kinds.items() if "correction_bias" in name} == {"F32"}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"


def test_both_spellings_of_config_json(folder, tree):
    older = {
        "rope_parameters": "gone",
        "dtype": "gone",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.25,
        "torch_dtype": "float16",
    }
    change(folder, **older)
    cfg = published.read(folder)
    assert (cfg.model.rope_theta, cfg.model.rope_fraction, cfg.dtype) == (5e5, 0.25, "float16")
    rope = {"rope_type": "default", "rope_theta": 2e5, "partial_rotary_factor": 0.5}
    newer = {
        "rope_parameters": rope,
        "dtype": "float32",
        "rope_theta": "gone",
        "partial_rotary_factor": "gone",
        "torch_dtype": "gone",
    }
    change(folder, **newer, num_local_experts=CFG.E, n_routed_experts="gone", head_dim=CFG.H)
    cfg = published.read(folder)
    assert (cfg.model.rope_theta, cfg.model.rope_fraction, cfg.dtype, cfg.model.E) == (2e5, 0.5, "float32", CFG.E)


def test_with_and_without_the_mtp_layer(folder, tree):
    there = tensors(folder)
    put(folder, {name: z for name, z in there.items() if not name.startswith("model.layers.3.")})
    cfg, params, router_bias_LE = hf.load(folder, dtype=None)  # config.json still names one, as transformers leaves it
    assert cfg.mtp_layers == 0 and params.mtp is None and router_bias_LE.shape == (2, CFG.E)
    put(folder, {name: z for name, z in there.items() if name not in names.copies(CFG)})
    change(folder, num_nextn_predict_layers="gone")
    assert same(hf.load(folder, dtype=None)[1], tree[0])


def fused(there):
    """Experts of a layer as one tensor, gate above up."""
    out = {name: z for name, z in there.items() if ".experts." not in name}
    for layer in (1, 2, 3):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([there[f"{stem}.{e}.{p}_proj.weight"] for e in range(CFG.E)]) for p in ("gate", "up", "down")
        )
        out |= {f"{stem}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{stem}.down_proj": down}
    return out


def test_fused_experts(folder, tree):
    put(folder, fused(tensors(folder)))
    assert same(hf.load(folder, dtype=None)[1], tree[0])


def quantised(z, height, width):
    """(float8, scales, what both make in float32) of a tensor with a scale per block."""
    *batch, rows, columns = z.shape
    scales = np.empty((*batch, -(-rows // height), -(-columns // width)), np.float32)
    exact, low = np.empty_like(z), np.empty(z.shape, FP8)
    for index in np.ndindex(scales.shape):
        *b, i, j = index
        at = (*b, slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
        scales[index] = np.abs(z[at]).max() / 448
        low[at] = (z[at] / scales[index]).astype(FP8)
        exact[at] = low[at].astype(np.float32) * scales[index]
    return low, scales, exact


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("kind", ["blocks", "rows", "whole"])
def test_float8_is_multiplied_out(folder, kind, join):
    there = fused(tensors(folder)) if join else tensors(folder)
    stored, exact = {}, {}
    for name, z in there.items():
        stored[name] = exact[name] = z
        if z.ndim < 2 or "_proj" not in name:
            continue
        height, width = {"blocks": (16, 8), "rows": (1, z.shape[-1]), "whole": (10**9, 10**9)}[kind]
        if kind == "whole" and z.ndim == 3:
            continue
        stored[name], scales, exact[name] = quantised(z, height, width)
        stored[name + ("_scale_inv" if kind == "blocks" else "_scale")] = scales[0] if kind == "whole" else scales
    put(folder, exact)
    wanted = hf.load(folder, dtype="float32")[1]
    put(folder, stored)
    change(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})
    assert same(hf.load(folder, dtype="float32")[1], wanted)
    change(folder, dtype="bfloat16", torch_dtype="bfloat16")
    as_named = hf.load(folder, dtype=None)[1]  # float8 in the dtype that config.json names, the rest as stored
    assert as_named.moe.attention.q_DNH.dtype == jnp.bfloat16 and as_named.norm_D.dtype == jnp.float32


def test_a_mesh_gets_its_parts(folder, tree):
    there = mesh.make(Mesh(), jax.devices()[:1])
    _, params, router_bias_LE = hf.load(folder, dtype="float32", mesh=there)
    assert same(params, tree[0])
    wanted = mesh.shardings(there, model.specs(CFG))
    assert jax.tree.all(jax.tree.map(lambda z, layout: z.sharding == layout, params, wanted))
    assert router_bias_LE.sharding.mesh == there


def test_parts_of_an_array_are_read_alone(folder, tree):
    """What a device, or a block of a conversion, asks for."""
    source = hf.Checkpoint(folder)
    arrays = dict(spec.leaves(tree[0])) | {names.ROUTER_BIAS: tree[1]}
    bits = make.Bits(9)
    for path, declared in source.weights.items():
        for part in [*hf_write.blocks(declared, 4), tuple(slice(0, n) for n in declared.shape)]:
            np.testing.assert_array_equal(source.read(path, part), np.asarray(arrays[path])[part])
        for letter in "DE":
            cuts = {letter: sorted((bits.below(20), bits.below(20) + 1))}
            part = tuple(slice(*cuts[d]) if d in cuts else slice(None) for d in declared.dims)
            np.testing.assert_array_equal(source.read(path, part), np.asarray(arrays[path])[part])


def test_blocks_cover_an_array_in_the_order_of_the_file(monkeypatch):
    monkeypatch.setattr(hf_write, "BLOCK_BYTES", 300)
    for declared in names.weights(CFG).values():
        places = np.arange(declared.count).reshape([declared.shape[d] for d in names.file_order(declared)])
        places = places.transpose(np.argsort(names.file_order(declared)))
        read = [places[part].transpose(names.file_order(declared)).ravel() for part in hf_write.blocks(declared, 4)]
        np.testing.assert_array_equal(np.concatenate(read), np.arange(declared.count))
        assert max(map(len, read)) * 4 <= 300 or max(hf_write.block_shape(declared, 4)) == 1


# What is refused


def test_missing_superfluous_and_misshapen_tensors(folder):
    there = tensors(folder)
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    put(folder, {name: z for name, z in there.items() if name != gone})
    with pytest.raises(ConfigError, match=rf"lacks 1 tensors: {gone} \[20, 24\]"):
        hf.load(folder, dtype=None)
    put(folder, {**there, "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    hf.load(folder, dtype=None)  # a table that is computed
    put(folder, {**there, "model.layers.1.self_attn.q_proj.lora_A": np.ones((2, 3), np.float32)})
    with pytest.raises(ConfigError, match=r"1 tensors .* no place for: model.layers.1.self_attn.q_proj.lora_A"):
        hf.load(folder, dtype=None)
    put(folder, {**there, "lm_head.weight": there["lm_head.weight"][:-1]})
    with pytest.raises(
        ConfigError, match=rf"lm_head.weight has shape \[{CFG.V - 1}, 24\], but config.json makes it \[{CFG.V}, 24\]"
    ):
        hf.load(folder, dtype=None)
    put(folder, {**there, "lm_head.weight": there["lm_head.weight"].astype(FP8)})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors: lm_head.weight_scale"):
        hf.load(folder, dtype=None)
    put(folder, there)
    change(folder, num_nextn_predict_layers=0)
    with pytest.raises(
        ConfigError, match=r"no place for: model.layers.3.eh_proj.weight, model.layers.3.embed_tokens.weight"
    ):
        hf.load(folder, dtype=None)


@pytest.mark.parametrize("name", names.copies(CFG))
def test_a_copy_that_is_none(folder, name):
    there = tensors(folder)
    there[name] = there[name].copy()
    there[name][7, 2] += 1
    put(folder, there)
    with pytest.raises(ConfigError, match=re.escape(f"row 7 of {name} differs")):
        hf.load(folder, dtype=None)


def test_truncated_and_damaged_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated: .* ends at byte \d+ of \d+"):
        hf.load(folder, dtype=None)
    path.write_bytes(whole[:100])
    with pytest.raises(ConfigError, match="truncated: a header of"):
        hf.load(folder, dtype=None)
    described = b'{"lm_head.weight": {"dtype": "F32", "shape": [%b], "data_offsets": [%b]}}'
    for text in (
        *(b"\xff\xff", b"[1]", b'{"lm_head.weight": {"dtype": "F32"}}', b'{"lm_head.weight": 3}'),
        *(described % pair for pair in ((b'"1"', b"0, 4"), (b"-1", b"0, 4"), (b"1", b"0"), (b"1", b"-4, 0"))),
    ):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
            hf.load(folder, dtype=None)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config.json is no JSON object"):
        hf.load(folder, dtype=None)


@pytest.mark.parametrize(
    ("move", "more", "told"),
    [(-4, b"", r"begins at byte \d+, where the one before ends at \d+"), (0, b"x", r"end at byte \d+ of \d+")],
)
def test_a_file_is_filled_by_its_tensors(folder, move, more, told):
    """As the safetensors library demands: what overlaps or is left over was written by something that failed."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    described = json.loads(whole[8 : 8 + length])
    last = max(described.keys() - {"__metadata__"}, key=lambda name: described[name]["data_offsets"])
    described[last]["data_offsets"] = [place + move for place in described[last]["data_offsets"]]
    text = json.dumps(described, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(whole[:8] + text + whole[8 + length :] + more)
    with pytest.raises(ConfigError, match=f"model.safetensors is damaged: .*{told}"):
        hf.load(folder, dtype=None)


def test_an_index_that_names_what_is_not_there(tree, tmp_path):
    hf.save(tmp_path / "hf", CFG, *tree, shard_gb=2e-5)
    gone = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=f"names 1 files that are not there: {gone.name}"):
        hf.load(tmp_path / "hf", dtype=None)
    index = tmp_path / "hf" / safetensors.INDEX
    there = json.loads(index.read_text())
    there["weight_map"] = {"lm_head.weight": sorted((tmp_path / "hf").glob("*.safetensors"))[0].name}
    index.write_text(json.dumps(there))
    with pytest.raises(ConfigError, match=r"says that lm_head.weight is in .*, but that file does not hold it"):
        hf.load(tmp_path / "hf", dtype=None)
    for file in (7, "../hf/model-00001.safetensors"):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
        with pytest.raises(ConfigError, match=rf"lm_head.weight is in {file!r}, where the name of a file beside it"):
            hf.load(tmp_path / "hf", dtype=None)
    index.write_text('{"weight_map": ["model-00001-of-00002.safetensors"]}')
    with pytest.raises(ConfigError, match="has no weight_map"):
        hf.load(tmp_path / "hf", dtype=None)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama'"),
        ({"architectures": ["Glm4ForCausalLM"]}, r"architectures \['Glm4ForCausalLM'\]; only 'glm4_moe', Glm4MoeFor"),
        ({"n_group": 8}, "n_group is 8"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_size": "gone"}, "does not name hidden_size"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'"),
        ({"num_key_value_heads": 5}, "config.json: .* not a multiple of K=5"),
        ({"rms_norm_eps": math.nan}, "config.json: norm_eps=nan must be positive"),
        ({"num_attention_heads": 0, "head_dim": "gone"}, "N=0 must be at least 1"),
        ({"hidden_size": "24"}, "hidden_size is '24', where int is expected"),
        ({"use_qk_norm": 1.0}, "use_qk_norm is 1.0, where bool is expected"),
        ({"rope_parameters": [1e4]}, "rope_parameters is .* where an object is expected"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4', where float is expected"),
        ({"quantization_config": {"weight_block_size": [128]}}, "weight_block_size is .128., where two positive"),
    ],
)
def test_another_architecture_or_none(folder, fields, told):
    change(folder, **fields)
    with pytest.raises(ConfigError, match=told):
        hf.load(folder, dtype=None)


def test_a_folder_that_is_none(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"has no config.json"):
        hf.load(tmp_path, dtype=None)
    (folder / "model.safetensors").unlink()
    (folder / safetensors.INDEX).unlink()
    with pytest.raises(ConfigError, match="has neither"):
        hf.load(folder, dtype=None)


def test_a_dtype_that_no_parameter_has(folder):
    with pytest.raises(ConfigError, match="dtype=int8"):
        hf.load(folder, dtype="int8")


def test_what_cannot_be_written(tree, folder, tmp_path):
    with pytest.raises(ConfigError, match="exists and is not empty"):
        hf.save(folder, CFG, *tree)
    with pytest.raises(ConfigError, match="shard_gb=0 must be positive"):
        hf.save(tmp_path / "new", CFG, *tree, shard_gb=0)
    other = dataclasses.replace(CFG, mtp_layers=0)
    with pytest.raises(ConfigError, match=r"not those of cfg: mtp.block.*in one of them only"):
        hf.save(tmp_path / "new", other, *tree)
    wide = dataclasses.replace(CFG, V=CFG.V + 1)
    with pytest.raises(ConfigError, match=r"embed_VD has shape .* but cfg makes it"):
        hf.save(tmp_path / "new", wide, *tree)
    with pytest.raises(ConfigError, match="router_bias_LE in one of them only"):
        hf.save(tmp_path / "new", CFG, tree[0], None)
    with pytest.raises(ConfigError, match="embed_VD: dtype=int32: parameters are float32"):
        hf.save(tmp_path / "new", CFG, jax.tree.map(lambda z: np.asarray(z, np.int32), tree[0]), tree[1])
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", CFG, *tree)
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_leaves_nothing(number, tree, tmp_path, monkeypatch):
    room = [20_000]

    def write(file, block):
        room[0] -= block.nbytes
        if room[0] < 0:
            raise OSError(number, os.strerror(number))
        file.write(np.ascontiguousarray(block).view(np.uint8).data)

    monkeypatch.setattr(safetensors, "_put", write)
    with pytest.raises(OSError, match=rf"{os.strerror(number)} for its \d+ bytes .*model.safetensors'"):
        hf.save(tmp_path / "new", CFG, *tree)
    assert room[0] < 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("special", [False, True])
def test_tokenizer_files_without_the_special_tokens_or_with_too_many_ids_are_refused(special, tree, tmp_path):
    text = TOKENIZER.dumps() if special else json.dumps(json.loads(TOKENIZER.dumps()) | {"added_tokens": []})
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "tokenizer.json").write_text(text)
    told = (
        f"ids up to 336 do not fit vocab_size={CFG.V}"
        if special
        else r"has no <\|endoftext\|> .*36 special tokens are missing"
    )
    with pytest.raises(ConfigError, match=f"beside/tokenizer.json: the tokenizer.* {told}"):
        hf.save(tmp_path / "new", CFG, *tree, companions=tmp_path / "beside")
    assert not list(tmp_path.glob("new*"))


def test_a_tokenizer_of_ours_tells_where_a_turn_ends(tmp_path):
    """Beside it lies the config.json of a data folder, which says nothing about tokens."""
    cfg = dataclasses.replace(CFG, V=TOKENIZER.vocab_size)
    (tmp_path / "data").mkdir()
    TOKENIZER.save(tmp_path / "data" / "tokenizer.json")
    (tmp_path / "data" / "config.json").write_text('{"inputs": {}}')
    hf.save(tmp_path / "hf", cfg, *make.weights(cfg, 3), companions=tmp_path / "data")
    for file in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / "hf" / file).read_text())
        assert told["eos_token_id"] == list(stop_ids(TOKENIZER)) and told["pad_token_id"] == TOKENIZER.end
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == TOKENIZER.template
