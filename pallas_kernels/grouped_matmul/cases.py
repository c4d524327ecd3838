"""Named shapes: the one list that tests and benches use. Tags: `test` small enough for the suite, `bench` worth timing
on a CPU, `chip` the published models' on an accelerator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gmm:
    R: int
    D: int
    M: int
    sizes: tuple[int, ...]
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Mlp:
    X: int
    D: int
    M: int
    E: int
    A: int
    skew: float = 1.0  # more than 1: experts differ more in load
    tags: frozenset[str] = frozenset()


def uneven(rows: int, groups: int) -> tuple[int, ...]:
    """Sizes that fall evenly from about twice the mean to near nothing, and sum to `rows`."""
    weights = [2 * (groups - i) - 1 for i in range(groups)]
    sizes = [rows * weight // sum(weights) for weight in weights]
    return (sizes[0] + rows - sum(sizes), *sizes[1:])


TEST, BENCH, CHIP = frozenset({"test"}), frozenset({"bench"}), frozenset({"chip"})
HOPPER = frozenset({"hopper"})  # small enough for the simulator, widths that its kernels take

GMM = {
    "ragged": Gmm(300, 24, 16, (0, 100, 0, 1, 150, 0), TEST),  # unaligned, empty groups, a tail
    "one_group": Gmm(300, 24, 16, (0, 0, 300, 0), TEST),
    "last_group": Gmm(1001, 16, 24, (0, 0, 1000), TEST),
    "ones": Gmm(7, 16, 16, (1, 1, 1, 1, 1, 1), TEST),
    "empty": Gmm(40, 16, 16, (0, 0), TEST),
    "one_row": Gmm(1, 8, 8, (0, 1), TEST),
    "lanes": Gmm(1300, 128, 256, (0, 300, 0, 1, 700, 0), TEST),  # as "ragged", of widths that a TPU takes
    "lanes_ones": Gmm(7, 128, 128, (1, 1, 1, 1, 1, 1), TEST),
    "lanes_empty": Gmm(600, 128, 128, (0, 0), TEST),
    "lanes_one_group": Gmm(1024, 256, 128, (0, 1024, 0), TEST),
    "many_blocks": Gmm(2300, 16, 8, (1100, 37, 1163), TEST),
    "hopper_ragged": Gmm(420, 128, 256, (0, 130, 3, 0, 261, 1), HOPPER),
    "hopper_narrow": Gmm(300, 256, 128, (0, 299, 0), HOPPER),
    "small_model": Gmm(16384, 256, 192, uneven(16384, 16), BENCH),
    "tiny_model": Gmm(8192, 128, 64, uneven(8192, 16), BENCH),
    "wide_16": Gmm(4096, 1024, 1024, uneven(4096, 16), BENCH),
    "wide_64": Gmm(4096, 1024, 1024, uneven(4096, 64), BENCH),
    "glm45": Gmm(65536, 5120, 1536, uneven(65536, 20), CHIP),  # one of eight expert shards, balanced tokens
    "air": Gmm(65536, 4096, 1408, uneven(65536, 16), CHIP),
    "many_groups": Gmm(524288, 4096, 1536, uneven(524288, 128), CHIP),
}

MLP = {
    "ragged": Mlp(100, 32, 24, 6, 3, tags=TEST),
    "skewed": Mlp(700, 16, 8, 4, 2, skew=4.0, tags=TEST),
    "lanes": Mlp(200, 256, 128, 6, 3, skew=3.0, tags=TEST),
    "few_tokens": Mlp(8, 32, 24, 16, 4, tags=TEST),
    "one_token": Mlp(1, 16, 16, 4, 4, tags=TEST),
    "small_model": Mlp(4096, 256, 192, 16, 4, tags=BENCH),
    "tiny_model": Mlp(4096, 128, 64, 16, 4, tags=BENCH),
    "small_decode": Mlp(8, 256, 192, 16, 4, tags=BENCH),
    "glm45": Mlp(4096, 5120, 1536, 20, 8, tags=CHIP),  # one of eight expert shards, as many rows as all its tokens make
    "air": Mlp(4096, 4096, 1408, 16, 8, tags=CHIP),
}
