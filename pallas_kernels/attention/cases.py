"""Named shapes: the one list that tests and benches use. Tags: `test` small enough for the suite, `bench` worth timing
on a CPU, `chip` the published models' on an accelerator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    documents: int = 1  # of equal length in a row; the keys end where the queries do
    padding: int = 0  # tokens of segment 0 at a row's end
    tags: frozenset[str] = frozenset()


TEST, BENCH, CHIP = frozenset({"test"}), frozenset({"bench"}), frozenset({"chip"})
HOPPER = frozenset({"hopper"})  # small enough for the simulator, heads as wide as its kernels take

CASES = {
    "one_block": Case(2, 40, 40, 4, 2, 16, tags=TEST),
    "blocks_packed_padded": Case(2, 700, 700, 4, 2, 8, documents=5, padding=60, tags=TEST),
    "prefill_after_cache": Case(2, 30, 300, 4, 1, 8, tags=TEST),
    "decode": Case(2, 1, 90, 8, 2, 16, tags=TEST),
    "draft": Case(3, 4, 50, 6, 6, 8, documents=2, padding=3, tags=TEST),
    "one_token_documents": Case(1, 12, 12, 2, 2, 8, documents=12, tags=TEST),
    "hopper_packed_padded": Case(1, 140, 140, 2, 1, 64, documents=2, padding=20, tags=HOPPER),
    "hopper_after_cache": Case(1, 70, 260, 1, 1, 128, tags=HOPPER),
    "small_model": Case(8, 512, 512, 8, 2, 64, tags=BENCH),
    "tiny_model": Case(16, 256, 256, 4, 2, 32, tags=BENCH),
    "packed_4k": Case(1, 4096, 4096, 8, 2, 64, documents=8, tags=BENCH),
    "small_decode": Case(8, 1, 192, 8, 2, 64, tags=BENCH),
    "glm45_8k": Case(1, 8192, 8192, 96, 8, 128, tags=CHIP),
    "glm45_packed_8k": Case(1, 8192, 8192, 96, 8, 128, documents=4, tags=CHIP),
    "glm45_128k": Case(1, 131072, 131072, 96, 8, 128, tags=CHIP),
}
