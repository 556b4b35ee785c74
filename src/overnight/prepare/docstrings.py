"""The embedded corpus: the documentation of the standard library, NumPy and PyTorch, as one `.jsonl` text.

Nothing here executes what it reads: sources are parsed with `ast`, never imported.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import platform
import re
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from overnight.errors import InputError
from overnight.prepare.documents import text_hash

READER_VERSION = 1
"""Part of the corpus's version: raise it whenever the embedded corpus would come out differently."""
SHORTEST = 200
"""Characters below which a piece of documentation is too short to be a document."""
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "lib2to3", "idlelib", "_vendor"}
DOCSTRING_CALLS = {"add_docstr", "add_newdoc"}
"""How torch and numpy attach documentation to functions that are written in C."""


def embedded_documents() -> list[str]:
    """Return the documentation of the standard library, numpy and torch: one document per module, class or topic.

    About 10 MB, deduplicated, in the order of package and path.
    """
    sources = [
        (root, package, path)
        for package, root in _package_roots().items()
        for path in sorted(root.rglob("*.py"))
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    ]
    # Forked: a spawned worker would import the caller's script, and with it torch, before it reads a line. The garbage
    # collector is off in the workers: syntax trees have no cycles, and it would walk all that the caller has loaded.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=fork, initializer=gc.disable) as pool:
        read = pool.map(_read_module, *zip(*sources, strict=True), chunksize=16)
        unique = {text_hash(text): text for texts in read for text in texts if len(text) >= SHORTEST}
    return list(unique.values())


def embedded_version() -> str:
    """Return what changes when the corpus may: a hash of the versions and places of what it is read from."""
    versions = [platform.python_version()] + [importlib.metadata.version(name) for name in ("numpy", "torch")]
    key = json.dumps([READER_VERSION, versions, [str(root) for root in _package_roots().values()]])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _package_roots() -> dict[str, Path]:
    roots = {"": Path(sysconfig.get_path("stdlib"))}
    for name in ("numpy", "torch"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InputError(f"`data.source` is embedded, but {name} is not installed: pip install {name}")
        roots[name] = Path(spec.origin).parent
    return roots


def _read_module(root: Path, package: str, path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():  # invalid escapes in the sources are not our reader's to report
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates that are not Python yet
        return []
    parts = [part for part in (package, *path.relative_to(root).with_suffix("").parts) if part not in ("", "__init__")]
    if parts == ["pydoc_data", "topics"]:
        return _strings_of_dict(tree)
    return _described(".".join(parts), tree) + [_attached(call) for call in _docstring_calls(tree)]


def _described(name: str, node: ast.Module | ast.ClassDef) -> list[str]:
    """The document of a module or class and those of the classes in it, docstrings below the names they explain."""
    functions = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
    pieces = [(f"{child.name}({_arguments(child)})", ast.get_docstring(child)) for child in functions]
    texts = [f"{title}\n\n{text}" for title, text in [(name, ast.get_docstring(node)), *pieces] if text]
    classes = [child for child in node.body if isinstance(child, ast.ClassDef)]
    return ["\n\n".join(texts)] + [text for child in classes for text in _described(f"{name}.{child.name}", child)]


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return ", ".join(name for name in names if name not in ("self", "cls"))


def _docstring_calls(tree: ast.Module) -> list[ast.Call]:
    calls = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in DOCSTRING_CALLS]


def _attached(call: ast.Call) -> str:
    text = "\n".join(inspect.cleandoc(text) for argument in call.args[1:] for text in _strings(argument))
    return re.sub(r"^ *\{\w+\}\n", "", text, flags=re.MULTILINE)  # parts that torch fills in from a table


def _strings_of_dict(tree: ast.Module) -> list[str]:
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    return [inspect.cleandoc(text) for node in dicts for value in node.values for text in _strings(value)]


def _strings(node: ast.AST) -> list[str]:
    constants = [child for child in ast.walk(node) if isinstance(child, ast.Constant) and isinstance(child.value, str)]
    return [str(child.value) for child in sorted(constants, key=lambda child: (child.lineno, child.col_offset))]
