"""A print of every named recipe: a change of a recipe or of a default shows in the diff of these files.

`GOLDEN=update python -m pytest tests/golden` rewrites them; look at the diff before committing it.
"""

import os
from pathlib import Path

import pytest

from experiments import recipes
from glm_jax import config, model, spec

FOLDER = Path(__file__).parent / "recipes"


def printed(name: str) -> str:
    run = recipes.get(name)
    head = {"fingerprint": config.fingerprint(run), "parameters": f"{spec.count(model.specs(run.model)):,}"}
    return "".join(f"{path} = {value!r}\n" for path, value in {**head, **config.flatten(run)}.items())


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_recipe(name):
    golden = FOLDER / f"{name}.txt"
    if os.environ.get("GOLDEN") == "update":
        golden.write_text(printed(name))
    assert printed(name).splitlines() == golden.read_text().splitlines(), (
        "if this is meant: GOLDEN=update make test-fast"
    )


def test_no_print_is_left_of_a_recipe_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(recipes.RECIPES)
