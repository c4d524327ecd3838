"""Write a run's report.html and report.json again, from its folder alone.

python -m experiments.report --run runs/quickstart
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import cli


@dataclass(frozen=True)
class Args:
    """Options of the report."""

    run: Path
    """The run's folder: what --out of experiments.quickstart or pretrain was."""


def main(args: Args) -> None:
    from glm_jax.evals import report

    print(report.summary(report.write(args.run)))
    print(f"\n{args.run / report.HTML_FILE}")


if __name__ == "__main__":
    cli.main(main)
