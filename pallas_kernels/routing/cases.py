"""Named shapes: the one list that tests and benches use. Tags: `test` small enough for the suite, `bench` worth timing on a
CPU, `chip` the published models' on an accelerator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    X: int
    D: int
    E: int
    A: int
    tags: frozenset[str] = frozenset()


TEST, BENCH, CHIP = frozenset({"test"}), frozenset({"bench"}), frozenset({"chip"})

CASES = {
    "unaligned": Case(43, 16, 7, 3, TEST),
    "whole_blocks": Case(64, 8, 5, 2, TEST),
    "one_token": Case(1, 8, 4, 4, TEST),
    "small_model": Case(4096, 256, 16, 4, BENCH),
    "tiny_model": Case(4096, 128, 16, 4, BENCH),
    "glm45": Case(8192, 5120, 160, 8, CHIP),
    "air": Case(8192, 4096, 128, 8, CHIP),
}
