"""Who imports whom: no circle among modules, and no import of a room that stands above, also not inside a function."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

#: Rooms and single modules from below to above; of two that fit a module, the longer one counts. None imports what
#: stands after it.
ROOMS = (
    "_version",
    "_build_info",
    "errors",
    "console",
    "config",
    "devices",
    # what every room writes with; the rest of artifacts reads what others wrote
    "artifacts.headers",
    "artifacts.files",
    "artifacts.figure_style",
    "artifacts.fingerprint",
    "artifacts.html",
    "faces.augment",  # the views' formulas, of which the kernel is the twin
    "kernels",
    "objective",
    "eeg",
    "teacher",
    "prototypes",
    "faces",
    "synthetic",
    "flows",
    "evaluation",
    "student",
    "artifacts",
    "selfcheck",
    "configs",
    "bench",
    "cli",
    "__main__",
    # these run the command line, in processes of their own
    "bench._chaos_child",
    "bench._chaos_jobs",
    "bench.chaos",
    "bench.soak",
)
#: All that these may import of the package, besides themselves.
APART = {
    "objective": {"kernels", "_build_info"},
    "flows": {"console", "errors", "config", "devices", *(name for name in ROOMS if name.startswith("artifacts."))},
}
#: Installed as subpackages; in the repository they stand beside ngd_fast.
BESIDE = ("bench", "kernels", "configs")


def module_files(repository):
    """{name without "ngd_fast.": path} of every module; "" is the package itself."""
    found = {}
    for folder, prefix in ((repository / "ngd_fast", ()), *((repository / name, (name,)) for name in BESIDE)):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, known):
    """The modules of the package that a file names in import statements, at any depth, or to import_module."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("ngd_fast.") in known else node.module for name in names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        for name in names:
            if name.startswith("ngd_fast."):
                yield name.removeprefix("ngd_fast.")


@pytest.fixture(scope="module")
def graph(repository):
    files = module_files(repository)
    return {name: {other for other in imports(path, files) if other != name} for name, path in files.items()}


def room(module):
    fits = [name for name in ROOMS if module == name or module.startswith(name + ".")]
    return max(fits, key=len, default=None)


def test_every_module_has_a_room(graph):
    assert [name for name in graph if name and room(name) is None] == []
    assert {room(name) for name in graph if name} >= set(ROOMS) - {"_build_info"}, "a room that no longer is"


def test_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("modules import each other: " + " -> ".join(reversed(error.args[1])))


def test_no_import_upward(graph):
    place = {name: i for i, name in enumerate(ROOMS)}
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if name and room(other) and place[room(other)] > place[room(name)]
    ]
    assert upward == []


@pytest.mark.parametrize("name", APART)
def test_what_stands_apart_imports_nothing_else(graph, name):
    used = {room(other) for module, others in graph.items() if room(module) == name for other in others}
    assert used - {name, None} <= APART[name]


def test_a_circle_and_an_import_upward_are_found(graph):
    """The tests above can fail: a low room that imports a high one, inside a function too."""
    bad = {**graph, "errors": {"cli.demo"}}
    with pytest.raises(pytest.fail.Exception, match=r"errors -> .*|-> errors"):
        test_no_circle(bad)
    with pytest.raises(AssertionError, match=r"errors imports cli\.demo"):
        test_no_import_upward(bad)
