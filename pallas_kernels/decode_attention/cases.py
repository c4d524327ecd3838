"""Named shapes: the one list that tests and benches use. Tags: `test` small enough for the suite, `bench` worth timing on a
CPU, `chip` the published models' on an accelerator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    N: int
    K: int
    H: int
    Z: int  # tokens in a page
    C: int  # pages of a row
    tags: frozenset[str] = frozenset()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row: from a quarter of what its pages hold to all of it."""
        most = self.C * self.Z
        return tuple(most // 4 + (most - most // 4) * (b + 1) // self.B for b in range(self.B))


TEST, BENCH, CHIP = frozenset({"test"}), frozenset({"bench"}), frozenset({"chip"})

CASES = {
    "one_token": Case(5, 1, 6, 2, 64, Z=16, C=6, tags=TEST),
    "draft": Case(5, 3, 6, 2, 64, Z=16, C=6, tags=TEST),
    "small_model": Case(8, 1, 8, 2, 64, Z=64, C=4, tags=BENCH),
    "small_model_long": Case(4, 1, 8, 2, 64, Z=128, C=32, tags=BENCH),
    "glm45": Case(32, 1, 96, 8, 128, Z=128, C=32, tags=CHIP),
    "glm45_draft": Case(32, 4, 96, 8, 128, Z=128, C=32, tags=CHIP),
}
