"""The rules that hold the design up: who imports whom, and what no source file may contain."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "jamba_lm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted((ROOT / "benchmarks").rglob("*.py"))
NATIVE = sorted(
    path for path in (ROOT / "native").rglob("*") if path.suffix in {".cpp", ".h", ".inc"}
)

# From the ground up. A file may import the lines above its own; parts on one line do not know
# each other. A part is a subpackage or a top-level file.
LAYERS = [
    {"errors"},
    {"files"},
    {"config_json"},
    {"gguf_file", "tensor_file", "tensor_map"},
    {"config", "kernels", "gguf_output", "gguf_parts"},
    {"presets", "parallel_layout"},
    {"model"},
    {"step_description", "native_plan"},
    {"quantization", "step_plan"},
    {"prefill", "readable_model"},
    {"checkpoint", "text", "sampling", "drafting"},
    {"language_model", "native_model"},
    {"conversion", "adapter_merge"},
    {"continuation", "stepper"},
    {"generation"},
    {"data", "serving", "evaluation", "analysis", "recipe_sections"},
    {"corpus"},
    {"training"},
    {"finetuning"},
    {"studies"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


# Files above their part: pure arithmetic on a config, which a lower part may use.
FOUNDATIONS = {"jamba_lm.model.layout", "jamba_lm.model.parameters"}

# Packages that not everyone has, or whose ways should stay in one place.
HOME_OF = {
    "tokenizers": {"text/tokenizer_file.py", "text/tokenizer_training.py"},
    "jinja2": {"text/template_sandbox.py"},
    "safetensors": {"tensor_file.py", "tensor_map.py"},
    "gguf": {"checkpoint/gguf_blocks.py"},
    "ctypes": {
        "kernels/library.py",
        "kernels/native_layers.py",
        "kernels/native_products.py",
        "kernels/native_step.py",
        "kernels/native_structs.py",
        "training/pages.py",
    },
    "datatrove": {
        "corpus/datatrove_execution.py",
        "corpus/datatrove_filters.py",
        "corpus/datatrove_reading.py",
    },
    "fasttext": {"corpus/language.py"},
    "ftfy": {"corpus/text_repair.py"},
    "pyarrow": {"corpus/parquet.py"},
    "zstandard": {"corpus/compressed.py"},
    "typer": {"cli"},
    "rich": {"cli"},
    "click": {"cli"},
}
NOT_IMPORTED = {"transformers", "peft", "pickle", "accelerate", "pandas", "requests"}

# These answer in a fraction of a second, which torch alone would use up.
WITHOUT_TORCH = [
    "jamba_lm",
    "jamba_lm.errors",
    "jamba_lm.files",
    "jamba_lm.config",
    "jamba_lm.presets",
    "jamba_lm.parallel_layout",
    "jamba_lm.model.layout",
    "jamba_lm.model.parameters",
    "jamba_lm.analysis.memory",
    "jamba_lm.analysis.roofline",
    "jamba_lm.analysis.training_cost.plan",
    "jamba_lm.checkpoint.gguf_config",
    "jamba_lm.checkpoint.gguf_storage",
    "jamba_lm.gguf_parts",
    "jamba_lm.corpus.recipe_file",
    "jamba_lm.finetuning.recipe_file",
    "jamba_lm.cli.main",
]

# These need numpy and a tokenizer, and would wait ten times as long for torch.
WITH_ARRAYS_ONLY = [
    "jamba_lm.native_model",
    "jamba_lm.generation",
    "jamba_lm.text.tokenizer",
    "jamba_lm.cli.conversation",
]

LINE_LIMIT = 400
# Files over the limit, each with the reason. The list may shrink and not grow.
LONG_FILES: dict[str, str] = {}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported module with its line; `from jamba_lm import b` names the module b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            if node.module == "jamba_lm":
                for alias in node.names:
                    yield f"jamba_lm.{alias.name}", node.lineno
            else:
                yield str(node.module), node.lineno


every_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)
every_program = pytest.mark.parametrize("path", SOURCES + PROGRAMS, ids=name_of)


@every_source
def test_imports_point_down(path):
    here = part_of(path)
    if here == "__init__":
        return
    assert here in RANK, f"{here} has no place in LAYERS: decide who may import it"
    for module, line in imports(tree_of(path)):
        package, _, rest = module.partition(".")
        if package != "jamba_lm" or module in FOUNDATIONS | {"jamba_lm.__version__"}:
            continue
        assert rest, f"{name_of(path)}:{line} imports the package itself; name the module"
        target = rest.split(".")[0]
        assert target == here or RANK[target] < RANK[here], (
            f"{name_of(path)}:{line} imports {module}, which is not below {here}"
        )


@every_source
def test_a_package_is_imported_in_its_home_only(path):
    for module, line in imports(tree_of(path)):
        package = module.split(".")[0]
        assert package not in NOT_IMPORTED, f"{name_of(path)}:{line} imports {package}"
        homes = HOME_OF.get(package)
        if homes is not None:
            assert name_of(path) in homes or part_of(path) in homes, (
                f"{name_of(path)}:{line} imports {package}, whose home is {', '.join(homes)}"
            )


@pytest.mark.parametrize(
    ("module", "heavy"),
    [(module, {"torch", "numpy", "tokenizers", "safetensors"}) for module in WITHOUT_TORCH]
    + [(module, {"torch"}) for module in WITH_ARRAYS_ONLY],
)
def test_what_must_answer_at_once_waits_for_no_heavy_package(module, heavy):
    code = (
        f"import sys, {module}\n"
        f"heavy = {heavy} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", SOURCES + PROGRAMS + NATIVE, ids=name_of)
def test_files_stay_short_enough_to_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if name_of(path) in LONG_FILES:
        assert lines > LINE_LIMIT, f"{name_of(path)} is short again: take it off the list"
    else:
        assert lines <= LINE_LIMIT, f"{name_of(path)} has {lines} lines: what is its second reason?"


@every_program
def test_nothing_is_caught_broadly(path):
    """Allow a broad except only where what it does not expect is raised again."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            where = f"{name_of(path)}:{node.lineno}"
            assert node.type is not None, f"{where} is a bare except"
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            raised_again = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            assert raised_again or not caught & {"Exception", "BaseException"}, (
                f"{where} catches everything and goes on"
            )
        if isinstance(node, ast.Attribute):
            assert node.attr != "suppress", f"{name_of(path)}:{node.lineno} suppresses errors"


@every_source
def test_only_the_command_line_prints(path):
    if part_of(path) == "cli":
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "input", "breakpoint", "eval", "exec"}, (
                f"{name_of(path)}:{node.lineno} calls {node.func.id}"
            )


def test_the_environment_is_read_in_one_function():
    readers = [
        f"{name_of(path)}:{function.name}"
        for path in SOURCES
        for function in ast.walk(tree_of(path))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and reads_environment(function)
    ]
    anywhere = [name_of(path) for path in SOURCES if reads_environment(tree_of(path))]
    assert len(readers) <= 1, readers
    assert len(anywhere) == len(readers), f"read outside a function: {anywhere}"


def reads_environment(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"})
        or (isinstance(node, ast.alias) and node.name in {"environ", "getenv"})
        for node in ast.walk(tree)
    )


MUTABLE_CALLS = {
    "list",
    "dict",
    "set",
    "defaultdict",
    "deque",
    "Counter",
    "OrderedDict",
    "bytearray",
}


@every_source
def test_modules_hold_no_state(path):
    """Allow tables that nobody writes to (upper case, annotated or not) and refuse the rest."""
    tree = tree_of(path)
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = getattr(node, "value", None)
        mutable = isinstance(
            value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp
        ) or (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id in MUTABLE_CALLS
        )
        for target in targets:
            if mutable and isinstance(target, ast.Name) and target.id != "__all__":
                bare = target.id.lstrip("_")
                assert bare == bare.upper(), (
                    f"{name_of(path)}:{node.lineno} {target.id} is mutable state"
                )
                assert not writes_to(tree, target.id), (
                    f"{name_of(path)}: {target.id} is a table, yet something writes to it"
                )
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{name_of(path)}:{node.lineno} uses `global`"


WRITERS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "clear", "remove"}


def writes_to(tree: ast.AST, name: str) -> bool:
    def is_it(value: ast.expr) -> bool:
        return isinstance(value, ast.Name) and value.id == name

    return any(
        (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store | ast.Del)
            and is_it(node.value)
        )
        or (isinstance(node, ast.Attribute) and node.attr in WRITERS and is_it(node.value))
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=name_of)
def test_a_package_file_holds_a_docstring_and_nothing_else(path):
    body = tree_of(path).body
    assert ast.get_docstring(tree_of(path)), f"{name_of(path)} says nothing"
    if path.parent != PACKAGE:
        assert len(body) == 1, f"{name_of(path)} holds code: give it a file with a name"


def test_every_folder_of_the_package_has_a_package_file():
    for folder in {path.parent for path in SOURCES}:
        assert (folder / "__init__.py").exists(), f"{folder.name} has no __init__.py"


BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}


@every_source
def test_no_file_has_a_name_that_says_nothing(path):
    words = set(path.relative_to(PACKAGE).with_suffix("").parts)
    for part in words:
        assert not BANNED_NAMES & set(part.split("_")), f"{name_of(path)}: what is it for?"


@every_source
def test_every_module_opens_with_what_it_is_for(path):
    first = (ast.get_docstring(tree_of(path)) or "").splitlines()[:1]
    assert first, f"{name_of(path)} has no docstring"
    assert first[0].endswith((".", ":", "?")), f"{name_of(path)}: {first[0]!r} is not a sentence"


def test_every_part_is_imported_by_some_test():
    """Its own suite may lie under another name, but somebody must look at it."""
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    named = {module for path in tests for module, _ in every_import(tree_of(path))}
    parts = {".".join(module.split(".")[1:2]) for module in named if module.startswith("jamba_lm.")}
    missing = {part_of(path) for path in SOURCES} - {"__init__"} - parts
    assert not missing, f"no test imports {sorted(missing)}"


def every_import(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield imports like `imports`, and for `from a import b` also `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module), node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
