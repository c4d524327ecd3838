"""The process that compiles: a pickled `Job` on standard input, the pickled `Compiled` or an error's text on standard output."""

import os
import pickle
import sys
from typing import Any

from pallas_kernels.analysis.compiled import run


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # compilers print where they please: not among the answers
    try:
        answer: Any = run(pickle.load(sys.stdin.buffer))
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    with os.fdopen(answers, "wb") as stream:
        pickle.dump(answer, stream)


if __name__ == "__main__":
    main()
