"""`experiments.convert` both ways, block by block: equal, resumable, complete or absent; and its checkpoints in use."""

import errno
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models as make

from experiments import bench_convert, convert
from glm_jax import hf, spec
from glm_jax.config import ConfigError, Mesh, replace
from glm_jax.data.document import DataError
from glm_jax.hf import safetensors
from glm_jax.hf import write as hf_write
from glm_jax.train import checkpoint, state, streamed

CFG = make.configuration(3, D=24, M=20, F=28, E=5, A=2, L=3, dense_layers=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published folder: bfloat16, in several files, with a template beside."""
    folder = tmp_path_factory.mktemp("published") / "hf"
    hf.save(folder, CFG, *make.weights(CFG, 3), dtype="bfloat16", shard_gb=3e-5)
    (folder / "chat_template.jinja").write_text("[gMASK]<sop>")
    change = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [7, 8], "pad_token_id": 7}
    (folder / "config.json").write_text(json.dumps(change))
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_there_and_back(published, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hf_write, "BLOCK_BYTES", 2000)  # several blocks of every kind
    convert.main(convert.Args(published, tmp_path / "run"))
    convert.main(convert.Args(tmp_path / "run", tmp_path / "back", shard_gb=3e-5))
    assert capsys.readouterr().out.count("peak resident memory") == 2
    assert files(tmp_path / "back") == files(published)
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "[gMASK]<sop>"
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told == json.loads((published / "config.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"run", "back"}
    run, params, router_bias_LE, data = checkpoint.load_params(tmp_path / "run")
    _, wanted, bias_wanted = hf.load(published, dtype="float32")
    assert replace(run.model, dtype="float32") == hf.load(published, dtype="float32")[0]
    assert data == (tmp_path / "run" / convert.STAGE / "hf").resolve()
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, wanted))
    np.testing.assert_array_equal(router_bias_LE, bias_wanted)
    chunk = next((tmp_path / "run").rglob("params.moe.ffn.gate_EDM/[0-9]*"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    for read in (
        lambda: convert.main(convert.Args(tmp_path / "run", tmp_path / "again")),
        lambda: checkpoint.load_params(tmp_path / "run"),
    ):
        with pytest.raises(ConfigError, match=f"{chunk} holds other bytes than were written"):
            read()


def test_a_model_without_experts(tmp_path):
    """Its balance bias has no rows, and orbax saves no empty array."""
    cfg = make.configuration(1, L=2, dense_layers=2, mtp_layers=0)
    hf.save(tmp_path / "dense", cfg, *make.weights(cfg, 1))
    convert.to_run(tmp_path / "dense", tmp_path / "run")
    convert.to_hugging_face(tmp_path / "run", tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "dense")
    assert checkpoint.load_params(tmp_path / "run")[2].shape == (0, cfg.E)


def test_an_interrupted_conversion_goes_on(published, tmp_path, monkeypatch):
    convert.to_run(published, tmp_path / "whole")
    read, left = hf.Checkpoint.read, [20]

    def until(self, path, part=None):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return read(self, path, part)

    monkeypatch.setattr(hf.Checkpoint, "read", until)
    with pytest.raises(OSError, match="No space"):
        convert.to_run(published, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"run.partial is what another conversion has left"):
        convert.to_run(published, tmp_path / "run", "float32")
    shutil.rmtree(
        tmp_path / "run.partial/published/checkpoints/0/state/params.embed_VD"
    )  # killed just before it was renamed
    asked = []
    monkeypatch.setattr(hf.Checkpoint, "read", lambda *args: (asked.append(args[1]), read(*args))[1])
    convert.to_run(published, tmp_path / "run")
    everything = list(hf.Checkpoint(published).weights)
    assert everything[0] in asked and everything[-1] in asked
    assert everything[1] not in asked  # what was done is not done again
    for name in ("run", "whole"):
        convert.to_hugging_face(tmp_path / name, tmp_path / f"{name}_back", shard_gb=3e-5)
        assert files(tmp_path / f"{name}_back") == files(published)


def test_an_interrupted_export_goes_on(published, tmp_path, monkeypatch):
    convert.to_run(published, tmp_path / "run")
    put, left = safetensors._put, [40_000]

    def until(file, block):
        left[0] -= block.nbytes
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(file, block)

    monkeypatch.setattr(safetensors, "_put", until)
    with pytest.raises(OSError, match="No space"):
        convert.to_hugging_face(tmp_path / "run", tmp_path / "back", shard_gb=3e-5)
    assert not (tmp_path / "back").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "back.partial").glob("*.safetensors")}
    assert done
    monkeypatch.setattr(safetensors, "_put", put)
    convert.to_hugging_face(tmp_path / "run", tmp_path / "back", shard_gb=3e-5)
    assert files(tmp_path / "back") == files(published)
    assert all((tmp_path / "back" / path.name).stat().st_mtime_ns == then for path, then in done.items())
    assert not (tmp_path / "back" / convert.PLAN).exists()


def test_a_checkpoint_of_training_is_exported(tmp_path):
    """orbax's own folders, with an optimizer's state beside the parameters."""
    params, router_bias_LE = make.weights(CFG, 5)
    now = state.State(jnp.zeros((), jnp.int32), params, jnp.asarray(router_bias_LE), {"momentum": params})
    checkpoints = checkpoint.Checkpoints(tmp_path / "run" / convert.STAGE)
    checkpoints.save(7, now, {})
    checkpoints.close()
    run = replace(convert.described(CFG), mesh=Mesh())
    checkpoint.save_run(tmp_path / "run" / convert.STAGE, run, convert.STAGE, tmp_path / "data")
    convert.to_hugging_face(tmp_path / "run", tmp_path / "hf")
    cfg, again, bias = hf.load(tmp_path / "hf", dtype=None)
    assert cfg == replace(CFG, remat=cfg.remat)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again, params))
    np.testing.assert_array_equal(bias, router_bias_LE)


def test_arrays_of_large_chunks_are_read_once_and_held_one_at_a_time(tmp_path, monkeypatch):
    """As training writes them: several chunks, here of two kilobytes, none of them a block of ours."""
    params, router_bias_LE = make.weights(CFG, 5)
    now = state.State(jnp.zeros((), jnp.int32), params, jnp.asarray(router_bias_LE), ())
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2000)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(0, now, {})
    checkpoints.close()
    monkeypatch.setattr(streamed, "SMALL_CHUNK", 1000)
    arrays = streamed.arrays(tmp_path, CFG)
    assert streamed._chunk(arrays["moe.ffn.gate_EDM"]._store) != arrays["moe.ffn.gate_EDM"].shape
    for path, array in arrays.items():
        whole = np.asarray(dict(spec.leaves(params)).get(path, router_bias_LE))
        part = (slice(whole.shape[0] - 1, whole.shape[0]), *(slice(0, n) for n in whole.shape[1:]))
        np.testing.assert_array_equal(array[part], whole[part])
        held = math.prod(streamed._chunk(array._store)) * array.dtype.itemsize > 1000
        assert np.shares_memory(array[part], array[part]) == held  # views of what was read once


def test_what_is_refused(published, tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        convert.main(convert.Args(tmp_path / "nowhere", tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        convert.main(convert.Args(tmp_path, tmp_path / "run"))
    with pytest.raises(ConfigError, match="exists and is not empty"):
        convert.main(convert.Args(published, published))
    broken = tmp_path / "broken"
    shutil.copytree(published, broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken/tokenizer.json is no whole tokenizer.json"):
        convert.main(convert.Args(broken, tmp_path / "run"))
    (broken / "tokenizer.json").unlink()
    described = (broken / "config.json").rename(broken / "other.json")
    with pytest.raises(ConfigError, match=r"broken has no config.json"):
        convert.main(convert.Args(broken, tmp_path / "run"))
    described.rename(broken / "config.json")
    sorted(broken.glob("*.safetensors"))[0].unlink()
    with pytest.raises(ConfigError, match="not there: model-00001"):
        convert.main(convert.Args(broken, tmp_path / "run"))
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_documents_to_measure_it_on_come_along(published, tmp_path):
    (tmp_path / "data" / "documents").mkdir(parents=True)
    for name in ("heldout.jsonl", "documents/code.jsonl"):
        (tmp_path / "data" / name).write_text("")
    convert.main(convert.Args(published, tmp_path / "run", documents=tmp_path / "data"))
    data = checkpoint.load_run(tmp_path / "run" / convert.STAGE)[2]
    assert (data / "heldout.jsonl").is_file() and (data / "documents" / "code.jsonl").is_file()
    with pytest.raises(DataError, match=r"has no heldout.jsonl"):
        convert.main(convert.Args(published, tmp_path / "other", documents=tmp_path))
    assert not (tmp_path / "other.partial").exists()


@pytest.mark.slow
def test_memory_of_a_conversion_is_that_of_a_few_blocks(tmp_path):
    """A fifth of the checkpoint of `experiments.bench_convert`, made and converted in processes of their own."""
    figures = bench_convert.measure(tmp_path / "bench", experts=12)
    assert figures["identical"] and figures["checkpoint_gb"] > 1
    assert max(figures[way]["peak_gb"] for way in ("to_run", "to_hugging_face")) < 0.8
