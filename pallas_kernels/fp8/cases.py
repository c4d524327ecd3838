"""Named shapes: the one list that tests and benches use. Tags: `test` small enough for the suite, `bench` worth timing on a
CPU, `chip` the published models' on an accelerator. Without sizes it is a plain product."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    X: int
    D: int
    M: int
    sizes: tuple[int, ...] = ()
    tags: frozenset[str] = frozenset()


TEST, BENCH, CHIP = frozenset({"test"}), frozenset({"bench"}), frozenset({"chip"})

CASES = {
    "edges": Case(5, 200, 130, tags=TEST),  # blocks that the matrix ends in
    "narrow": Case(1, 24, 16, tags=TEST),
    "lanes": Case(40, 256, 384, tags=TEST),  # of widths that a TPU takes
    "lanes_odd": Case(24, 384, 384, tags=TEST),
    "groups": Case(30, 140, 24, (0, 17, 1, 0, 5), TEST),
    "groups_empty": Case(6, 16, 16, (0, 0), TEST),
    "lanes_groups": Case(300, 128, 256, (0, 130, 1, 0, 140), TEST),
    "small_decode": Case(8, 256, 768, tags=BENCH),
    "small_model": Case(4096, 256, 768, tags=BENCH),
    "small_groups": Case(4096, 256, 192, (256,) * 16, BENCH),
    "glm45_decode": Case(32, 5120, 12288, tags=CHIP),  # the dense layers' and q's width
    "glm45_groups": Case(256, 5120, 1536, (13,) * 19 + (9,), CHIP),  # one of eight expert shards, 256 tokens
    "air_groups": Case(256, 4096, 1408, (16,) * 16, CHIP),
}
