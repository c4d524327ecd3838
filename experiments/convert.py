"""Convert a checkpoint: a published Hugging Face folder to a run's folder, or a run's (or a stage's) to Hugging Face's form.

    python -m experiments.convert --src GLM-4.5-Air --dst runs/air
    python -m experiments.convert --src runs/quickstart --dst exported --shard_gb 5

Which way is read from SRC: it has a `config.json`, or it is a folder that the scripts here wrote. Weights go through one
block at a time, so a model larger than memory converts. Interrupted, it continues with the same command; DST appears when
it is complete. Tokenizer, template and generation settings are copied along (DST/published/hf in a run's folder). What comes
of a published model is a run of one stage, for `--checkpoint` of chat and evaluate, and `--from` of sft:

    python -m experiments.sft --from runs/air --dialogues my.jsonl --out runs/air/mine
    python -m experiments.convert --src runs/air/mine --dst exported
"""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from experiments import cli
from glm_jax import config
from glm_jax.config import ConfigError, Model, Run, Stage

if TYPE_CHECKING:
    from glm_jax.hf import Checkpoint

PLAN = "conversion.json"  # what a folder under way is made of; gone when it is complete
STAGE = "published"  # name of the stage, and of its folder in the run's, that a published checkpoint becomes
BESIDE = "hf"  # folder in it of what came with the weights


@dataclass(frozen=True)
class Args:
    """Options of the conversion."""

    src: Path
    """Folder of a Hugging Face checkpoint, of a run, or of one of its stages."""
    dst: Path
    """Folder to be made."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters written; by default as they are (FP8 as config.json says)."""
    shard_gb: float = 5
    """Largest file of an exported checkpoint, in 1e9 bytes."""
    documents: Path | None = None
    """Data folder made by experiments.data: what experiments.evaluate will measure a published model on."""


def main(args: Args) -> None:
    from glm_jax.hf import config as published

    if not args.src.is_dir():
        raise ConfigError(f"--src {args.src} is no folder; give that of a run, or of a model in Hugging Face's form")
    if (args.src / published.FILE).is_file() or any(args.src.glob("*.safetensors")):
        to_run(args.src, args.dst, args.dtype, args.documents)
    else:
        to_hugging_face(args.src, args.dst, args.dtype, args.shard_gb)
    print(f"{args.dst}: done; peak resident memory {cli.peak_rss_gb():.2f} GB", flush=True)


def to_run(src: Path, dst: Path, dtype: str | None = None, documents: Path | None = None) -> None:
    """From Hugging Face's form to a run's folder of one stage, with one orbax checkpoint."""
    from glm_jax.data.heldout import read_held_out
    from glm_jax.hf import Checkpoint
    from glm_jax.hf.write import COMPANIONS, begin, check_tokenizer
    from glm_jax.train import checkpoint

    source = Checkpoint(src, dtype)
    check_tokenizer(src, source.cfg)
    if documents is not None:
        read_held_out(documents)  # raises where there are none
    sizes = {path: declared.count * source.dtypes[path].itemsize for path, declared in source.weights.items()}
    files = {file.name: file.stat().st_size for file in sorted(src.glob("*.safetensors"))}
    partial = begin(dst)
    _start(partial, {"model": config.canonical(source.cfg), "dtype": dtype, "files": files})
    stage, beside = partial / STAGE, partial / STAGE / BESIDE
    beside.mkdir(parents=True, exist_ok=True)
    _follow(_weights(source, stage), sizes)
    for name in (*COMPANIONS, "config.json"):
        if (src / name).is_file():
            shutil.copyfile(src / name, beside / name)
    if documents is not None:
        shutil.copytree(documents / "documents", beside / "documents", dirs_exist_ok=True)
        shutil.copyfile(documents / "heldout.jsonl", beside / "heldout.jsonl")
    checkpoint.save_run(stage, described(source.cfg), STAGE, beside)
    _finish(partial, dst)


def _weights(source: "Checkpoint", folder: Path) -> Iterator[int]:
    """Write every weight that is not there yet; yields bytes, those of one that is at once."""
    from jax import ShapeDtypeStruct

    from glm_jax.hf.write import block_shape, blocks
    from glm_jax.train.streamed import Writer

    writer = Writer(folder, source.cfg, source.dtypes)
    for path, declared in source.weights.items():
        shape, dtype = declared.shape, source.dtypes[path]
        if writer.done(path, shape):
            yield declared.count * dtype.itemsize
            continue
        pieces = ((part, source.read(path, part)) for part in blocks(declared, dtype.itemsize))
        like = ShapeDtypeStruct(shape, dtype)
        yield from writer.write(path, like, block_shape(declared, dtype.itemsize), pieces)


def described(cfg: Model) -> Run:
    """The run that a published checkpoint stands for: one stage, over, with the RoPE base that its model has."""
    length = 2 ** (min(cfg.max_positions, 4096).bit_length() - 1)
    stage = Stage(STAGE, tokens=length, seq_len=length, rope_theta=cfg.rope_theta, microbatch_rows=1)
    return Run(name=STAGE, model=cfg, pretrain=(stage,), midtrain=())


def to_hugging_face(src: Path, dst: Path, dtype: str | None = None, shard_gb: float = 5) -> None:
    """From the last checkpoint of a run's folder, or of a stage's, to Hugging Face's form."""
    from glm_jax.hf.write import begin, export, sizes
    from glm_jax.train import checkpoint, streamed

    folder = checkpoint.final_folder(src)
    run, stage, data = checkpoint.load_run(folder)
    cfg = config.replace(run.model, rope_theta=run.stage(stage).rope_theta)
    partial = begin(dst)
    made = {"dtype": dtype, "shard_gb": shard_gb, "step": checkpoint.committed(folder)[-1]}
    _start(partial, {"run": config.fingerprint(run), "stage": stage, **made})
    beside = folder / BESIDE if (folder / BESIDE).is_dir() else data
    arrays = streamed.arrays(folder, cfg)
    written = export(partial, cfg, arrays, shard_gb=shard_gb, dtype=dtype, companions=beside)
    _follow(written, sizes(cfg, arrays, dtype))
    _finish(partial, dst)


def _start(partial: Path, plan: dict[str, Any]) -> None:
    """Note what is made in `partial`; ConfigError where something else has been begun there."""
    if partial.exists():
        there = json.loads((partial / PLAN).read_text()) if (partial / PLAN).is_file() else None
        if there != json.loads(json.dumps(plan)):
            raise ConfigError(f"{partial} is what another conversion has left; continue that one, or delete it")
        return
    partial.mkdir(parents=True)
    (partial / PLAN).write_text(json.dumps(plan, indent=1) + "\n")


def _finish(partial: Path, dst: Path) -> None:
    partial.rename(dst)
    (dst / PLAN).unlink()


def _follow(written: Iterator[int], sizes: dict[str, int]) -> None:
    """Do the work, with a bar on a terminal."""
    largest = max(sizes, key=lambda path: sizes[path])
    print(f"{sum(sizes.values()) / 1e9:.2f} GB, the largest weight {largest} {sizes[largest] / 1e9:.2f} GB", flush=True)
    on_terminal = sys.stderr.isatty()
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=not on_terminal, smoothing=0.05) as bar:
        for count in written:
            bar.update(count)


if __name__ == "__main__":
    cli.main(main)
