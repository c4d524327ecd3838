"""Named shapes: the one list that tests and benches use. Tags: `test` small enough for the suite, `bench` worth timing on a
CPU, `chip` the published models' on an accelerator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    X: int
    D: int
    V: int
    tags: frozenset[str] = frozenset()


TEST, BENCH, CHIP = frozenset({"test"}), frozenset({"bench"}), frozenset({"chip"})

CASES = {
    "several_chunks": Case(12, 8, 20, TEST),
    "prime": Case(7, 4, 33, TEST),
    "one_token": Case(1, 4, 5, TEST),
    "wide": Case(30, 16, 64, TEST),
    "small_model": Case(4096, 256, 4096, BENCH),
    "air": Case(16384, 4096, 151552, CHIP),
    "glm45": Case(16384, 5120, 151552, CHIP),
}
