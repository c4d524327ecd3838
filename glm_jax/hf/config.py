"""`config.json` of a published checkpoint, in its older spelling or its newer one, to our `Model` and back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from glm_jax.config import ConfigError, DType, Model

FILE = "config.json"
MODEL_TYPE, ARCHITECTURE = "glm4_moe", "Glm4MoeForCausalLM"

NAMES = {  # field of Model: name there
    "V": "vocab_size", "D": "hidden_size", "L": "num_hidden_layers", "dense_layers": "first_k_dense_replace",
    "N": "num_attention_heads", "K": "num_key_value_heads", "F": "intermediate_size", "M": "moe_intermediate_size",
    "E": "n_routed_experts", "A": "num_experts_per_tok", "shared_experts": "n_shared_experts",
    "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps", "routed_scale": "routed_scaling_factor",
}  # fmt: skip
OPTIONAL = {  # the same, and what absence means there
    "qk_norm": ("use_qk_norm", False),
    "qkv_bias": ("attention_bias", False),
    "init_std": ("initializer_range", 0.02),
}
OTHER_SPELLING = {
    "n_routed_experts": "num_local_experts",
    "num_nextn_predict_layers": "num_mtp_layers",
    "dtype": "torch_dtype",
}
FIXED = {  # what a GLM-4.5 always has: anything else is another architecture
    "hidden_act": "silu", "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
}  # fmt: skip
THETA, FRACTION = 10_000.0, 0.5  # of RoPE, where a file names none
FP8_BLOCK = (128, 128)


@dataclass(frozen=True)
class Published:
    """What a `config.json` says: the model (with as many MTP layers as it names, None where it is silent), the dtype of
    its weights, and the block of a block-wise FP8 scale."""

    model: Model
    mtp_layers: int | None
    dtype: DType
    block: tuple[int, int]


def read(folder: Path) -> Published:
    """The configuration in `folder`; ConfigError names a field that is missing or of another architecture."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder} has no {FILE}; give the folder of a Hugging Face checkpoint")
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        there = None
    if not isinstance(there, dict):
        raise ConfigError(f"{path} is no JSON object; download it again")
    classes = there.get("architectures") or [ARCHITECTURE]
    if there.get("model_type") != MODEL_TYPE or ARCHITECTURE not in classes:
        raise ConfigError(
            f"{path}: model_type is {there.get('model_type')!r}, architectures {there.get('architectures')}; "
            f"only {MODEL_TYPE!r}, {ARCHITECTURE} (GLM-4.5, 4.6, 4.7) can be loaded"
        )
    for name, value in FIXED.items():
        if there.get(name, value) not in (value, None):
            raise ConfigError(f"{path}: {name} is {there[name]!r}, but {MODEL_TYPE} is computed with {value!r} only")
    dtype = _get(there, "dtype", "bfloat16")
    if dtype not in get_args(DType):
        raise ConfigError(f"{path}: dtype is {dtype!r}; known: {', '.join(get_args(DType))}")
    mtp_layers = _get(there, "num_nextn_predict_layers", None)
    return Published(_model(there, path, mtp_layers, dtype), mtp_layers, dtype, _block(there, path))


def _model(there: dict[str, Any], path: Path, mtp_layers: int | None, dtype: DType) -> Model:
    missing = [name for name in NAMES.values() if _get(there, name, None) is None]
    if missing:
        raise ConfigError(f"{path} does not name {', '.join(missing)}")
    fields = {field: _get(there, name, None) for field, name in NAMES.items()}
    fields |= {field: there.get(name, absent) for field, (name, absent) in OPTIONAL.items()}
    rope: dict[str, Any] = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        rope |= (said := _object(there, path, spelling))
        kind = said.get("rope_type", said.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"{path}: rope_type is {kind!r}, but {MODEL_TYPE} is published with unscaled RoPE ('default')"
            )
    fields |= {
        "mtp_layers": mtp_layers or 0,
        "rope_theta": rope.get("rope_theta", there.get("rope_theta", THETA)),
        "rope_fraction": rope.get("partial_rotary_factor", there.get("partial_rotary_factor", FRACTION)),
    }
    if there.get("head_dim"):
        fields["H"] = there["head_dim"]
    for field, value in fields.items():
        kind = Model.__annotations__[field]
        if not isinstance(value, (int, float) if kind is float else kind):
            name = NAMES.get(field) or OPTIONAL.get(field, (field,))[0]
            raise ConfigError(f"{path}: {name} is {value!r}, where {kind.__name__} is expected")
    H = fields["D"] // max(fields["N"], 1)
    try:
        return Model(**{"H": H, **fields, "rope_theta": float(fields["rope_theta"])}, dtype=dtype)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _block(there: dict[str, Any], path: Path) -> tuple[int, int]:
    """(rows, columns) of the blocks of a block-wise FP8 checkpoint."""
    match _object(there, path, "quantization_config").get("weight_block_size") or FP8_BLOCK:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case other:
            raise ConfigError(f"{path}: weight_block_size is {other!r}, where two positive numbers are expected")


def _object(there: dict[str, Any], path: Path, name: str) -> dict[str, Any]:
    """A nested object, {} where there is none."""
    value = there.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name} is {value!r}, where an object is expected")
    return value


def _get(there: dict[str, Any], name: str, absent: Any) -> Any:
    for spelling in (name, OTHER_SPELLING.get(name, name)):
        if there.get(spelling) is not None:
            return there[spelling]
    return absent


def written(cfg: Model, dtype: DType) -> dict[str, Any]:
    """`config.json` for `cfg` with weights of `dtype`, in both spellings, so that older readers find theirs."""
    rope = {"rope_theta": cfg.rope_theta, "partial_rotary_factor": cfg.rope_fraction}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: getattr(cfg, field) for field, name in NAMES.items()},
        **{name: getattr(cfg, field) for field, (name, _) in OPTIONAL.items()},
        **{name: value for name, value in FIXED.items() if name != "scoring_func"},
        "head_dim": cfg.H,
        "num_nextn_predict_layers": cfg.mtp_layers,
        **rope,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", **rope},
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
