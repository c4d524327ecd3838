"""What the steps of data buy: `tiny`'s model on `mini`'s rows, with one step taken back at a time, and with all of them: the
documents as they were found, in no order. Each arm reads as many tokens; what is held out is the same for all."""

from typing import Any

from experiments.sweeps import Sweep
from experiments.sweeps.muon import SHORT

# Rows of 1,024 of whole repositories, so that one stage has what the report does in mid-training too.
_ROWS = {
    "pretrain.0.tokens": 245_760,
    "pretrain.0.microbatch_rows": 4,
    "pretrain.0.seq_len": 1024,
    "pretrain.0.packing": "best_fit",
    "pretrain.0.isolate": True,
    "pretrain.0.long_documents": True,
}
_WITHOUT: dict[str, dict[str, Any]] = {
    "buckets": {"data.bucket_epochs": (1.0,)},
    "duplicates removed": {"data.keep_duplicates": True, "data.semantic_kept": 1.0},
    "order of repositories": {"data.shuffle_files": True},
    "packing": {"pretrain.0.packing": "truncate", "pretrain.0.isolate": False},
}
_NO_FIM = {"pretrain.0.fim_rate": 0.0}
_MIXTURE = {"pretrain.0.mixture": {}}  # every domain as much as there is of it
_NOTHING = {name: value for change in _WITHOUT.values() for name, value in change.items()} | _NO_FIM | _MIXTURE
# A repository is read as it is: FIM shows where files stand alone.
_FILES = {"pretrain.0.long_documents": False}
_CHANGES = ({}, _NOTHING, *_WITHOUT.values(), _FILES, _FILES | _NO_FIM)

SWEEP = Sweep(
    baseline="mini",
    common=SHORT | _ROWS,
    grids=tuple({name: (value,) for name, value in change.items()} for change in _CHANGES),
)
