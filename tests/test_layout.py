"""How the source is laid out: imports run one way, and what is private to torch or DeepSpeed is touched where it says.

The tables are data of today's layout: a module that moves, or a new use, is an edit of a table and of nothing else.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "cce_dist"

LAYERS = (
    ("kernels",),
    ("device_check", "missing"),
    ("collectives", "shard"),
    ("loss",),
    ("distillation",),
    ("config",),
    ("heads",),
    ("",),  # cce_dist itself
    ("axolotl", "compat", "fsdp", "deepspeed", "transformers", "trl", "trainer_callback"),
    ("train",),
    ("tools",),
    ("cli", "doctor", "train.__main__"),
)
"""Modules of cce_dist and, of packages, all that is in them, lowest first: each imports those of its own layer and of
the layers below it."""

REQUIRED = {"torch", "triton", "pydantic"}
"""What any module but the kernels may import, beside Python's own library."""
KERNELS_REQUIRE = {"torch", "triton"}
OPTIONAL = {
    "axolotl": ("axolotl",),
    "deepspeed": ("deepspeed", "train.engines", "train.restricted"),
    "matplotlib": ("tools.plan.plot", "tools.report"),
    "numpy": ("train.data",),
    "packaging": ("deepspeed.guard",),
    "rich": ("tools", "train"),
    "tokenizers": ("train.data",),
    "transformers": ("axolotl", "trainer_callback", "train"),
    "trl": ("trl",),
    "yaml": ("train.settings",),
}
"""Who imports a package that not everyone has."""

PRIVATE = {
    "heads.checkpoints": ("heads.checkpoints", "_C _current_graph_task_id"),
    "heads.find": ("heads.find", "_parameters"),
    "heads.hooks": (
        "heads.hooks",
        "_backward_hooks _backward_pre_hooks _forward_hooks _forward_hooks_always_called _forward_hooks_with_kwargs "
        "_forward_pre_hooks _forward_pre_hooks_with_kwargs _global_backward_hooks _global_backward_pre_hooks "
        "_global_forward_hooks _global_forward_hooks_always_called _global_forward_hooks_with_kwargs "
        "_global_forward_pre_hooks",
    ),
    "heads.lazy.pytree": ("heads.lazy.pytree", "torch.utils._pytree"),
    "deepspeed.experts": (
        "deepspeed.guard",
        "_clone_world_group _configure_distributed_model _create_expert_and_data_parallel _get_expert_parallel_group "
        "_global_grad_norm",
    ),
    "deepspeed.tensor_parallel": ("deepspeed.guard", "_deepspeed_original_loss_function"),
    "deepspeed.zero3": ("deepspeed.guard", "_coalesce_grad_reduction"),
    "fsdp.private": (
        "fsdp.private",
        "_C _current_graph_task_id _disabled_torch_function_impl _fsdp_param_group _fsdp_param_groups _get_fsdp_state "
        "_is_root _make_wrapper_subclass _module_info _modules _state_ctx",
    ),
    "trl": ("trl", "_precompute_ref_logps"),
    "device_check": ("device_check", "_assert_async"),
    "loss.graph": (
        "loss.graph",
        "_C _ForceDispatchKeyGuard _dispatch_tls_local_exclude_set _dispatch_tls_local_include_set",
    ),
    "shard.groups": ("shard.groups", "_device_types _get_backend _timeout _world"),
    "train.place": ("train.place", "_get_default_timeout"),
}
"""Names that are private to torch or a framework, by the module that uses them, each with the module whose check names
the version where one is missing."""
UNCHECKED = {
    "train.engines": "_no_split_modules",
    "train.head_memory": "torch.utils._python_dispatch torch.utils._pytree",
}
"""Those that have no such check yet. This table is to become empty, and must not grow."""
OURS = ("_cce",)
"""How names begin that cce_dist itself puts on others' objects."""
OF_PYTHON = {"_asdict", "_exit", "_field_defaults", "_fields", "_getframe", "_make", "_replace"}


class Import(NamedTuple):
    """``module``: a dotted name. ``runs``: with the module that holds it, not when a function is called."""

    module: str
    runs: bool


def modules() -> dict[str, ast.Module]:
    """The source of every module by its name within cce_dist; that of a package is its ``__init__``."""
    files = {file.relative_to(PACKAGE): file for file in PACKAGE.rglob("*.py")}  # does not follow the link to kernels
    files |= {
        Path("kernels") / file.relative_to(PACKAGE / "kernels"): file for file in (PACKAGE / "kernels").rglob("*.py")
    }
    return {
        ".".join(path.parts[:-1] if path.stem == "__init__" else path.with_suffix("").parts): ast.parse(
            file.read_text()
        )
        for path, file in sorted(files.items())
    }


MODULES = modules()


def imports(name: str) -> Iterator[Import]:
    """All imports of a module of cce_dist, those within functions too."""

    def found(node: ast.AST, runs: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, runs)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(name, node)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield Import(whole if whole.removeprefix("cce_dist.") in MODULES else source, runs)
        called = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from found(child, runs and not called and not typing)

    yield from found(MODULES[name], True)


def _absolute(name: str, node: ast.ImportFrom) -> str:
    if not node.level:
        assert node.module is not None
        return node.module
    is_package = any(other.startswith(f"{name}.") for other in MODULES)
    parts = ["cce_dist", *name.split(".")]
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, node.module] if node.module else base)


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or (place != "" and name.startswith(f"{place}.")) for place in places)


def layer(name: str) -> int:
    """The place of a module in `LAYERS`: that of the longest name there that it is, or is in."""
    holders = [(len(place), n) for n, places in enumerate(LAYERS) for place in places if within(name, (place,))]
    assert holders, f"{name} is in none of LAYERS"
    return max(holders)[1]


def own_imports(name: str) -> Iterator[Import]:
    """The imports of modules of cce_dist, by their names within it."""
    for module, runs in imports(name):
        if module.split(".")[0] == "cce_dist":
            yield Import(module.removeprefix("cce_dist").removeprefix("."), runs)


def private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not name.endswith("__") and not name.startswith(OURS)


def defined(tree: ast.Module) -> set[str]:
    """The names that a module gives to its own: functions, classes, variables, and attributes of ``self``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in [part for whole in targets for part in ast.walk(whole)]:
                if isinstance(target, ast.Name):
                    names.add(target.id)
                elif isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("self", "cls"):
                    names.add(target.attr)
    return names


def private_uses(name: str) -> set[str]:
    """Names that begin with an underscore and that neither the module nor one beside it in its folder defines:
    attributes, also by text, and what is imported."""
    used: set[str] = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            used |= {word.value for word in node.args[1:2] if isinstance(word, ast.Constant)}
        elif isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
            used |= {node.module, *(alias.name for alias in node.names)}
    folder = name.rpartition(".")[0]
    beside = [other for other in MODULES if folder and other.rpartition(".")[0] == folder]
    known = OF_PYTHON.union(*(defined(MODULES[other]) for other in {name, *beside}))
    return {
        word
        for word in used - known
        if not word.startswith("cce_dist") and any(private(part) for part in word.split("."))
    }


def test_every_module_is_in_one_layer_and_every_name_of_a_layer_is_one() -> None:
    places = Counter(place for layer in LAYERS for place in layer)
    assert [place for place, count in places.items() if count > 1] == []
    assert [place for place in places if place not in MODULES] == []
    for name in MODULES:
        layer(name)


def test_modules_import_those_of_their_layer_and_below() -> None:
    upwards = [
        f"{name} imports {module}"
        for name in MODULES
        for module, _ in own_imports(name)
        if module not in MODULES or layer(module) > layer(name)
    ]
    assert upwards == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {module for module, runs in own_imports(name) if runs} for name in MODULES}
    TopologicalSorter(graph).prepare()  # CycleError shows the way


def test_packages_that_not_everyone_has_are_imported_where_they_are_needed_alone() -> None:
    strays = []
    for name in MODULES:
        required = KERNELS_REQUIRE if within(name, ("kernels",)) else REQUIRED
        allowed = required | {package for package, places in OPTIONAL.items() if within(name, places)}
        packages = {module.split(".")[0] for module, _ in imports(name)} - {"cce_dist"} - sys.stdlib_module_names
        strays += [f"{name} imports {package}" for package in sorted(packages - allowed)]
    assert strays == []


def test_the_kernels_know_nothing_of_process_groups() -> None:
    sources = {name: ast.unparse(tree) for name, tree in MODULES.items() if within(name, ("kernels",))}
    assert len(sources) > 10
    assert [name for name, source in sources.items() if "torch.distributed" in source] == []


def test_what_is_private_to_others_is_used_where_the_tables_say() -> None:
    tables = [*((name, words) for name, (_, words) in PRIVATE.items()), *UNCHECKED.items()]
    listed = {f"{name}: {word}" for name, words in tables for word in words.split()}
    found = {f"{name}: {word}" for name in MODULES for word in private_uses(name)}
    assert sorted(found - listed) == []
    assert sorted(listed - found) == []


@pytest.mark.parametrize("name", PRIVATE)
def test_where_something_private_is_missing_an_error_names_the_version(name: str) -> None:
    checker, words = PRIVATE[name]
    raised = [ast.unparse(node) for node in ast.walk(MODULES[checker]) if isinstance(node, ast.Raise)]
    assert any("__version__" in error for error in raised)
    source = ast.unparse(MODULES[checker])
    assert [word for word in words.split() if word not in source] == []


def test_no_module_of_tests_has_the_name_of_another(request: pytest.FixtureRequest) -> None:
    """Helpers are imported by name, and pytest's list is read by name; a package here would hide an installed one."""
    names = Counter(file.stem for file in TESTS.rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []
    assert "__init__" not in names
    files = defaultdict(set)
    for item in request.session.items:
        if isinstance(item, pytest.Function):
            files[item.module.__name__].add(item.path)
    assert [name for name, paths in files.items() if len(paths) > 1] == []
    assert len(files) == len({path for paths in files.values() for path in paths})
