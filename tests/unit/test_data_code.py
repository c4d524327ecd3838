import importlib.util
from pathlib import Path

import pytest

from glm_jax.data import code

PACKAGE = {
    "pkg/__init__.py": "from .core import run\nfrom pkg.tools import helper as help_me\n",
    "pkg/core.py": "from pkg import help_me\nfrom . import base\nimport pkg\nimport os\n",
    "pkg/tools.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .core import run\ndef helper():\n    import pkg.core\n",
    "pkg/base.py": "try:\n    from . import tools\nexcept ImportError:\n    tools = None\n",
    "pkg/README.md": "text",
}


def test_imports_resolve_reexports_and_leave_out_lazy_typing_and_own_root():
    assert code.imports(PACKAGE) == {
        "pkg/__init__.py": {"pkg/core.py", "pkg/tools.py"},
        "pkg/core.py": {"pkg/tools.py", "pkg/base.py"},
        "pkg/tools.py": set(),
        "pkg/base.py": {"pkg/tools.py"},
        "pkg/README.md": set(),
    }


@pytest.mark.parametrize("cycles", ["fewest_missing", "least_feedback"])
def test_files_follow_what_they_import(cycles):
    order = code.dependency_order(PACKAGE, cycles)
    assert [p for p in order if p.endswith(".py")] == ["pkg/tools.py", "pkg/base.py", "pkg/core.py", "pkg/__init__.py"]
    assert code.concatenate({"a.py": "1\n", "b.py": "2"}, cycles) == "# a.py\n1\n\n# b.py\n2"


def test_cycles_are_cut_at_the_fewest_missing_imports():
    files = {"m/a.py": "from m import b, c", "m/b.py": "from m import a", "m/c.py": "from m import a"}
    assert code.dependency_order(files, "fewest_missing") == ["m/b.py", "m/a.py", "m/c.py"]


def test_a_circle_is_opened_at_the_file_that_most_wait_for():
    files = {
        "m/a.py": "from m import b, c",
        "m/b.py": "from m import a",
        "m/c.py": "from m import a",
        "m/d.py": "import m.c",
    }
    assert code.dependency_order(files, "least_feedback") == ["m/a.py", "m/b.py", "m/c.py", "m/d.py"]


def _violated(package: str) -> tuple[int, int]:
    """(import edges whose importer comes first, all import edges) of an installed package."""
    root = Path(next(iter(importlib.util.find_spec(package).submodule_search_locations)))
    files = {f"{package}/{path.relative_to(root).as_posix()}": path.read_text() for path in sorted(root.rglob("*.py"))}
    place = {path: number for number, path in enumerate(code.dependency_order(files, "least_feedback"))}
    assert place.keys() == files.keys()
    edges = [(path, other) for path, needed in code.imports(files).items() for other in needed]
    return sum(place[path] < place[other] for path, other in edges), len(edges)


def test_hardly_an_import_of_a_real_package_comes_before_what_it_needs():
    violated, edges = _violated("grain")
    assert edges > 300
    assert violated <= 0.02 * edges


@pytest.mark.slow
def test_of_eight_real_packages_at_most_two_percent_of_imports_are_violated():
    packages = ("numpy", "flax", "optax", "grain", "matplotlib", "jinja2", "orbax", "tyro")
    found = [_violated(package) for package in packages]
    assert sum(violated for violated, _ in found) <= 0.02 * sum(edges for _, edges in found)


def test_modules_are_found_below_the_repository_root():
    files = {"root/src/lib/x.py": "", "root/src/lib/y.py": "import lib.x\n", "root/setup.py": "import lib\n"}
    assert code.imports(files)["root/src/lib/y.py"] == {"root/src/lib/x.py"}


def test_unparsable_files_stay_without_edges():
    assert code.dependency_order({"b.py": "def (", "a.py": "import b"}, "fewest_missing") == ["b.py", "a.py"]


@pytest.mark.parametrize("terms", [150, 700, 9000])
def test_expressions_too_deep_to_walk_are_read_or_left_without_edges(terms):
    deep = " + ".join(terms * ["a"])
    assert code.imports({"a.py": "", "b.py": f"x = {deep}\nif {deep}:\n    import a\n"})["b.py"] <= {"a.py"}


def test_fim_takes_both_orders_and_depends_on_its_keys_alone():
    orders = {tuple(token for token, _ in code.fill_in_the_middle("some text", i)) for i in range(40)}
    assert orders == {code.FIM_SUFFIX_FIRST, code.FIM_PREFIX_FIRST}
    assert code.fill_in_the_middle("some text", 3) == code.fill_in_the_middle("some text", 3)


def test_pieces_prefer_a_line_at_the_left_margin():
    text = "def f():\n    return 1\n\ndef g():\n    return 2\n"
    assert code.pieces(text, 30) == ["def f():\n    return 1\n\n", "def g():\n    return 2\n"]
