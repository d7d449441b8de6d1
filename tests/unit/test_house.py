"""The house rules that a reader of one file cannot see: who imports whom, what is generated, what is written
nowhere. Reads files; starts no service."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from hiprune import families
from tools import api_reference, settings_tables

ROOT = Path(__file__).resolve().parents[2]

# The arrows of CONTRIBUTING.md: a module imports from its own tier and from lower ones.
STUBS, FOUNDATION, LIBRARY, COMMANDS = range(4)
TIERS = {
    "v1": STUBS,
    **dict.fromkeys(("arrays", "auth", "config", "deadlines", "errors", "telemetry", "tensors"), FOUNDATION),
    **dict.fromkeys(
        ("checks", "cli", "commands", "demo", "load", "overlay", "reach", "sheet", "stack"), COMMANDS
    ),
}
MAX_MODULE_LINES = 450


# --- the source as data ----------------------------------------------------------------------------------


def _files() -> list[Path]:
    """Every file of the project: what .gitignore leaves, with or without git at hand."""
    rules = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text("utf-8").split())]

    def is_kept(name: str) -> bool:
        return not any(fnmatch.fnmatch(name, rule) for rule in rules)

    found: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = filter(is_kept, folders)
        found += (Path(folder) / name for name in filter(is_kept, names))
    return sorted(path for path in found if path.is_file())


@cache
def _modules() -> dict[str, Path]:
    """Our own Python by dotted name, without the generated stubs and the tests."""
    found = {}
    for base, top in ((ROOT / "src", "hiprune"), (ROOT, "services"), (ROOT, "tools")):
        for path in sorted((base / top).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            if "_pb2" not in parts[-1]:
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def _tree(name: str) -> ast.Module:
    return ast.parse(_modules()[name].read_text("utf-8"))


def _imported(node: ast.AST, importer: str) -> Iterator[tuple[str, str]]:
    """(module, name) of an import statement, the name empty where the module itself is bound."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            is_package = _modules()[importer].name == "__init__.py"
            package = importer.split(".") if is_package else importer.split(".")[:-1]
            kept = package[: len(package) - node.level + 1]
            base = ".".join((*kept, *([node.module] if node.module else [])))
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            is_module = inner in _modules() or inner.startswith("hiprune.v1.")
            yield (inner, "") if is_module else (base, alias.name)


def _own_imports(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Our own modules that these nodes import."""
    modules = {module for node in nodes for module, _ in _imported(node, name)}
    return {each for each in modules if each.split(".")[0] in ("hiprune", "services", "tools", "tests")}


def _at_import(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """Everything that runs when the module is imported: not the insides of functions and lambdas."""
    todo: list[ast.AST] = [node for node in nodes if not _is_main_guard(node)]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defaults = [each for each in (*node.args.defaults, *node.args.kw_defaults) if each]
            todo += [*node.decorator_list, *defaults]
        elif not isinstance(node, ast.Lambda):
            todo += ast.iter_child_nodes(node)


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _tier(module: str) -> int:
    return TIERS.get(module.split(".")[1], LIBRARY) if "." in module else LIBRARY


# --- the arrows ------------------------------------------------------------------------------------------


def test_services_import_the_library_and_never_each_other() -> None:
    wrong = []
    for name in _modules():
        if not name.startswith("services."):
            continue
        own = ".".join(name.split(".")[:2])
        for target in _own_imports(name, ast.walk(_tree(name))):
            is_library = target.split(".")[0] == "hiprune" and _tier(target) < COMMANDS
            if not is_library and target != own and not target.startswith(f"{own}."):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_the_library_imports_from_its_own_tier_and_lower_ones_and_no_service() -> None:
    wrong = []
    for name in _modules():
        if name.startswith("hiprune."):
            for target in _own_imports(name, ast.walk(_tree(name))):
                if not target.startswith("hiprune") or _tier(target) > _tier(name):
                    wrong.append(f"{name} imports {target}")
    assert not wrong


def test_a_tier_names_only_modules_that_exist() -> None:
    assert {f"hiprune.{name}" for name in TIERS} <= set(_modules())


def test_imports_form_no_circle() -> None:
    graph = {name: _own_imports(name, _at_import(_tree(name).body)) - {name} for name in _modules()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_nothing_uses_a_private_name_of_another_module() -> None:
    wrong = []
    for name in _modules():
        bound: dict[str, str] = {}
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                for (module, what), alias in zip(_imported(node, name), node.names, strict=True):
                    if what.startswith("_") and not what.startswith("__"):
                        wrong.append(f"{name} imports {module}.{what}")
                    if not what and module in _modules():
                        bound[alias.asname or alias.name] = module
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[:2] != "__":
                owner = bound.get(ast.unparse(node.value))
                if owner:
                    wrong.append(f"{name} uses {owner}.{node.attr}")
    assert not wrong


def test_importing_a_module_does_nothing() -> None:
    """No file is opened, no environment read, nothing printed, loaded, connected or configured."""
    functions = {"open", "print", "input", "exec", "eval"}
    methods = {
        *("open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "touch", "unlink"),
        *("exists", "is_file", "is_dir", "iterdir", "glob", "rglob", "getenv", "putenv", "basicConfig"),
        *("from_pretrained", "insecure_channel", "secure_channel", "server", "connect", "Popen", "system"),
        *("run", "check_call", "check_output", "set_num_threads", "set_default_dtype", "manual_seed"),
        *("simplefilter", "filterwarnings", "load"),
    }
    wrong = []
    for name in _modules():
        if name.endswith("__main__"):
            continue
        for node in _at_import(_tree(name).body):
            called = node.func if isinstance(node, ast.Call) else None
            if (
                (isinstance(called, ast.Name) and called.id in functions)
                or (isinstance(called, ast.Attribute) and called.attr in methods)
                or (isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ")
            ):
                wrong.append(f"{name}: {ast.unparse(node)}")
    assert not wrong


def test_a_module_says_what_it_does_in_no_more_than_a_few_pages() -> None:
    wrong = []
    for name, path in _modules().items():
        lines = path.read_text("utf-8").count("\n")
        if lines > MAX_MODULE_LINES:
            wrong.append(f"{name}: {lines} lines, expected at most {MAX_MODULE_LINES}")
        if _tree(name).body and not ast.get_docstring(_tree(name)):
            wrong.append(f"{name}: no docstring")
    assert not wrong


# --- what is generated -----------------------------------------------------------------------------------


def test_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "generate_stubs.py", tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "hiprune" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "src/hiprune/v1").glob("*_pb2*.py*")}
    assert sorted(committed) == sorted(made)
    stale = [name for name in made if made[name] != committed[name]]
    assert not stale, "make protos"


def test_settings_tables_are_what_the_settings_say() -> None:
    stale = []
    for path, settings in settings_tables.readmes():
        text = path.read_text("utf-8")
        if settings_tables.refreshed(text, settings) != text:
            stale.append(path.parent.name)
    assert not stale, "make tables"


def test_every_setting_says_what_it_means() -> None:
    silent = [
        f"{settings.service}: {name}"
        for _, settings in settings_tables.readmes()
        for name, field in settings.model_fields.items()
        if not field.description
    ]
    assert not silent


# --- the wire --------------------------------------------------------------------------------------------


def test_everything_in_the_protos_is_documented() -> None:
    silent = []
    for file in api_reference.described():
        said = {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}
        silent += [f"{file.name}: {name}" for path, name in _declared(file) if not said.get(path)]
    assert not silent


def _declared(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """The path (of field numbers, as protoc counts) and the name of everything that a file declares."""
    for i, service in enumerate(file.service):
        yield (6, i), service.name
        yield from (((6, i, 2, j), f"{service.name}.{rpc.name}") for j, rpc in enumerate(service.method))
    for i, enum in enumerate(file.enum_type):
        yield from _declared_in_enum(enum, (5, i))
    for i, message in enumerate(file.message_type):
        yield from _declared_in_message(message, (4, i))


def _declared_in_message(
    message: descriptor_pb2.DescriptorProto, path: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, message.name
    synthetic = {field.oneof_index for field in message.field if field.proto3_optional}
    for i, field in enumerate(message.field):
        yield (*path, 2, i), f"{message.name}.{field.name}"
    for i, oneof in enumerate(message.oneof_decl):
        if i not in synthetic:
            yield (*path, 8, i), f"{message.name}.{oneof.name}"
    for i, nested in enumerate(message.nested_type):
        yield from _declared_in_message(nested, (*path, 3, i))
    for i, enum in enumerate(message.enum_type):
        yield from _declared_in_enum(enum, (*path, 4, i))


def _declared_in_enum(
    enum: descriptor_pb2.EnumDescriptorProto, path: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, enum.name
    yield from (((*path, 2, i), f"{enum.name}.{value.name}") for i, value in enumerate(enum.value))


@pytest.mark.extra
def test_the_protos_pass_buf() -> None:
    buf = ROOT / "tests" / "node" / "node_modules" / ".bin" / "buf"
    lint = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stdout + lint.stderr


# --- what is written, and what is written nowhere --------------------------------------------------------


def test_no_file_names_a_developers_folder_or_a_package_registry() -> None:
    # spelled so that this file does not match itself
    folders = "|".join(("work", "root", "home", "Users"))
    hosts = "|".join(
        (
            r"pypi\.org",
            r"pythonhosted\.org",
            r"npmjs\.(?:org|com)",
            r"yarnpkg\.com",
            r"deb\.debian\.org",
            r"download\.pytorch\.org",
        )
    )
    forbidden = re.compile(rf"(?<![\w.\-/])/(?:{folders})/\w|{hosts}|--(?:extra-)?index-url|--registry\b")
    wrong = []
    for path in _files():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(ROOT)
        wrong += [f"{name}: {match.group()}" for match in forbidden.finditer(text)]
    assert not wrong


def test_the_licence_is_there_and_said() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_links_between_documents_lead_somewhere() -> None:
    pages = {path: path.read_text("utf-8") for path in _files() if path.suffix == ".md"}
    anchors = {path: {_anchor(title) for title in _headings(text)} for path, text in pages.items()}
    wrong = []
    for page, text in pages.items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"[a-z]+:", link):
                continue
            to, _, anchor = link.partition("#")
            target = (page.parent / to).resolve() if to else page
            if not target.exists() or (anchor and anchor not in anchors.get(target, ())):
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
    assert not wrong


def _headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)


def _anchor(title: str) -> str:
    """The fragment by which a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_readme_names_commands_that_exist_and_every_family() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", readme, flags=re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
    assert not [name for name in families.families() if f"`{name}`" not in readme]


def test_a_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text("utf-8")
    assert not [
        path.name for path in folder.glob("*.md") if path.name != "README.md" and path.name not in index
    ]


# --- the suite itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_a_skip_for_want_of_anything_but_a_gpu_or_docker_fails_ci(tmp_path: Path, ci: str, code: int) -> None:
    (tmp_path / "test_skips.py").write_text(
        "import pytest\n"
        "def test_asks_for_node(): pytest.skip('no node')\n"
        "@pytest.mark.gpu\n"
        "def test_asks_for_a_gpu(): pytest.skip('no gpu')\n"
        "@pytest.mark.xfail\n"
        "def test_is_known_to_fail(): assert False\n"
    )
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            f"--config-file={ROOT / 'pyproject.toml'}",
            f"--rootdir={tmp_path}",
            tmp_path,
        ],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        capture_output=True,
        check=False,
        text=True,
    )
    assert run.returncode == code, run.stdout
    assert ("test_asks_for_node: Skipped: no node" in run.stdout) is bool(ci)
    assert "test_asks_for_a_gpu:" not in run.stdout
