"""The letters: one letter, one meaning, in every file.

An array's name ends in its logical dimensions: `x_BTD` is [batch, tokens, width]. Inside
`shard_map` the suffix still names the logical dimensions, of the local shard.
"""

LETTERS: dict[str, str] = {
    "C": "microbatches of a step",
    "O": "tokens that a row has been given by sampling",
    "B": "batch: rows of tokens",
    "T": "query tokens of a row",
    "S": "key tokens: what a query may look at",
    "X": "tokens of all rows: B*T",
    "D": "width of the residual stream",
    "N": "query heads",
    "K": "key-value heads",
    "G": "query heads per key-value head: N/K",
    "H": "width of a head",
    "F": "hidden width of a dense feed-forward layer",
    "M": "hidden width of an expert (of all shared experts: M times their number)",
    "E": "routed experts",
    "A": "active experts per token",
    "R": "routed rows: X*A; fewer of those sent to other devices, where one has several of a token's experts",
    "I": "devices of the expert axis, which send rows",
    "J": "the same, which receive them",
    "Z": "rows that a device has room for, of other devices' tokens",
    "V": "vocabulary rows",
    "L": "layers of one kind, stacked",
    "P": "rows of a matrix that Muon orthogonalises",
    "Q": "columns of such a matrix",
    "U": "input width of the multi-token-prediction projection: 2D",
}


def check(dims: str) -> str:
    """Return `dims` if every letter is in the table; a ValueError names the first that is not."""
    for letter in dims:
        if letter not in LETTERS:
            raise ValueError(
                f"unknown dimension letter {letter!r} in {dims!r}; the letters are {''.join(LETTERS)} (glm_jax/dims.py)"
            )
    return dims
