"""The layer rule of the code base, checked on its imports."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors"},
    {"failpoint", "package_files"},
    {"storage"},
    {"command_line"},
    {"rng", "averaging", "learning_rate", "compiled_constants"},
    {"flow", "vae"},
    {"kinds"},
    {"config"},
    {"models", "data", "quantize"},
    {"runtime"},
    {"train", "sample", "evaluate", "plan"},
    {"drills", "cluster", "api", "compress"},
    {"compare"},
    {"commands", "diffusers_pipeline"},
    {"cli", "__main__", "data_tools"},
]
# The composition root: the table of model kinds is below the configuration, which reads its names, and its functions
# import the networks, losses and samplers above it when they are called. The top-level imports obey the layers.
COMPOSITION_ROOT = "kinds"
# The one package file that is not empty: it passes on the names of ecar_dist/api.py when they are first used.
PYTHON_INTERFACE = "ecar_dist/__init__.py"
HOMES = {
    "deepspeed": {"ecar_dist/runtime/engine.py"},
    "torch.distributed": {"ecar_dist/runtime/start/rendezvous.py", "ecar_dist/runtime/world.py"},
    "diffusers": {"ecar_dist/diffusers_pipeline.py", "ecar_dist/vae/pretrained.py"},
    "nvidia": {"ecar_dist/data/images/dali.py"},
    "fsspec": {"ecar_dist/storage/remote.py"},
    "webdataset": {"data_tools/images/shard.py"},
}
FILES = sorted(path.relative_to(ROOT) for room in ("ecar_dist", "data_tools") for path in (ROOT / room).rglob("*.py"))


def imports(path, *, deferred=True):
    """What a file imports; without `deferred`, leaving out its functions and its TYPE_CHECKING block."""
    for node in nodes(ast.parse((ROOT / path).read_text()), deferred):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def nodes(tree, deferred):
    if deferred:
        yield from ast.walk(tree)
        return
    for node in ast.iter_child_nodes(tree):
        types_alone = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, ast.FunctionDef) and not types_alone:
            yield node
            yield from nodes(node, deferred)


def room_of(module):
    parts = module.split(".")
    return parts[0] if parts[0] == "data_tools" else parts[1] if len(parts) > 1 else None


def layer_of(room):
    return next((level for level, rooms in enumerate(LAYERS) if room in rooms), None)


def test_a_module_imports_only_lower_layers_and_its_own_room():
    assert len(FILES) > 100
    faults = [fault for path in FILES for fault in layer_faults(path)]
    assert not faults, "\n".join(faults)


def layer_faults(path):
    """What breaks the rule in one file, one line each."""
    room = room_of(".".join(path.with_suffix("").parts))
    level = layer_of(room)
    if str(path) == PYTHON_INTERFACE:
        yield from (f"{path} imports {name}" for name in imports(path) if ours(name) and not is_api(name))
        yield from (f"{path} imports {name} at its top" for name in imports(path, deferred=False) if ours(name))
        return
    if path.parts[-1] == "__init__.py":
        yield from (f"{path} imports {name}, but package files stay empty" for name in imports(path) if ours(name))
        return
    if level is None:
        yield f"{path} is in no layer"
        return
    for module in imports(path, deferred=room != COMPOSITION_ROOT):
        if not ours(module) or module == "ecar_dist":
            continue
        other = room_of(module)
        if other in (room, "__version__") or (room == "__main__" and other == "cli"):
            continue
        if layer_of(other) is None or layer_of(other) >= level:
            yield f"{path} imports {module} of the same or a higher layer"


def is_api(module):
    return module == "ecar_dist" or module.split(".")[:2] == ["ecar_dist", "api"]


def ours(module):
    return module.split(".")[0] in ("ecar_dist", "data_tools")


def test_the_composition_root_imports_neither_torch_nor_numpy_at_its_top():
    heavy = "{'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    code = f"import sys, ecar_dist.config.read, ecar_dist.kinds.table, ecar_dist.vae.table; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'pydantic'}"


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, ecar_dist; dir(ecar_dist); print({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_drills_are_imported_by_their_command_alone():
    users = {str(path) for path in FILES if any(room_of(name) == "drills" for name in imports(path))}
    assert {user for user in users if not user.startswith("ecar_dist/drills/")} == {"ecar_dist/commands/drilling.py"}


def test_no_modules_import_each_other_in_a_circle():
    names = {".".join(path.with_suffix("").parts) for path in FILES}
    graph = {name: set() for name in names}
    for path in FILES:
        found = set(imports(path, deferred=False)) & names
        graph[".".join(path.with_suffix("").parts)] |= found
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_folder_has_more_than_twelve_modules():
    folders = Counter(str(path.parent) for path in FILES if path.stem != "__init__")
    assert len(folders) > 20
    assert not {folder: count for folder, count in folders.items() if count > 12}


@pytest.mark.parametrize("library", HOMES)
def test_a_foreign_library_is_imported_in_one_place(library):
    users = {str(path) for path in FILES if any(f"{name}.".startswith(f"{library}.") for name in imports(path))}
    assert users == HOMES[library]


def test_no_drawers_and_no_long_files():
    drawers = [str(path) for path in FILES if path.stem in {"utils", "util", "misc", "common", "helpers"}]
    assert not drawers, "\n".join(drawers)
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in FILES}
    long = [f"{path} has {lines} lines" for path, lines in lengths.items() if lines > 400]
    assert not long, "\n".join(long)


def test_no_long_functions():
    functions = [
        (path, node)
        for path in FILES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(functions) > 500
    long = [f"{path}:{node.lineno} {node.name}" for path, node in functions if node.end_lineno - node.lineno >= 60]
    assert not long, "\n".join(long)


# The files that parse JSON without `storage/untrusted.py`, and why that does no harm.
OWN_JSON = {
    "ecar_dist/storage/untrusted.py": "the one door",
    "ecar_dist/runtime/watchdog/monitor.py": "standard library only; checks its reports by hand",
    "ecar_dist/vae/codec.py": "a tree that the door has parsed, or our own",
    "ecar_dist/drills/fault_proxy.py": "what the drill itself has sent",
    "ecar_dist/drills/object_store.py": "what the drill's own proxy answers",
}
PARSERS = {"json.loads", "json.load", "json.JSONDecoder", "pydantic_core.from_json"}


def test_json_is_parsed_behind_one_door():
    found = {str(path) for path in FILES if _parses_json(ast.parse((ROOT / path).read_text()))}
    assert found == set(OWN_JSON)


def _parses_json(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found = ast.unparse(node) in PARSERS or node.attr in ("validate_json", "model_validate_json")
        else:
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            found = bool(names) and node.module == "json" and bool(names & {"loads", "load", "JSONDecoder"})
        if found:
            return True
    return False
