"""Named shapes: the one list that tests and benches use. Tags: `test` small enough for the suite, `bench` worth timing on a
CPU, `chip` the published models' on an accelerator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    batch: tuple[int, ...]
    P: int
    Q: int
    steps: int = 5
    tags: frozenset[str] = frozenset()


TEST, BENCH, CHIP = frozenset({"test"}), frozenset({"bench"}), frozenset({"chip"})

CASES = {
    "wide": Case((2,), 24, 40, tags=TEST),
    "tall_unaligned": Case((1, 2), 150, 37, steps=2, tags=TEST),
    "one_row": Case((), 1, 7, steps=1, tags=TEST),
    "square": Case((3,), 16, 16, tags=TEST),
    "several_tiles": Case((1,), 260, 300, steps=1, tags=TEST),
    "tiny_model": Case((16,), 128, 64, tags=BENCH),
    "small_model": Case((16,), 256, 192, tags=BENCH),
    "glm45_expert": Case((8,), 5120, 1536, tags=CHIP),
    "glm45_attention_output": Case((1,), 12288, 5120, tags=CHIP),
    "air_expert": Case((8,), 4096, 1408, tags=CHIP),
}
