"""Make docs/api.md from the docstrings of every name in docs/api_names.txt.

    python scripts/make_api_docs.py            writes it
    python scripts/make_api_docs.py --check    says whether it is up to date

A name that cannot be imported, or that has no docstring, is an error: the list is what the project promises. Signatures are taken from
the source, so that the page is the same whichever Python and torch it is made with.
"""

from __future__ import annotations

import argparse
import ast
import enum
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ROOT / "docs" / "api_names.txt"
PAGE = ROOT / "docs" / "api.md"

# Not a module: variables, each with a function of its name in `magi_attention.env`.
ENVIRONMENT = "environment"

_INTRODUCTION = """\
# The public API

Made by `make docs` from the docstrings of the names in `docs/api_names.txt`; edit those.

Tokens are packed: there is no batch axis. `q` is `[num_tokens_q, num_heads_q, head_dim]`, `k` and `v` are
`[num_tokens_k, num_heads_kv, head_dim]`, where `v` may have a head_dim of its own.
"""

_WIDEST_SIGNATURE = 100
_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields", "Note", "Example")


class MissingNameError(Exception):
    """A promised name that is not there, or says nothing of itself."""


@dataclass(frozen=True)
class Entry:
    """A name, and the members of it that are promised."""

    name: str
    members: tuple[str, ...] = ()


def read_names(text: str) -> dict[str, list[Entry]]:
    """Entries by module, of a text as docs/api_names.txt."""
    modules: dict[str, list[Entry]] = {}
    entries: list[Entry] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            entries = modules.setdefault(line.strip("[]"), [])
        else:
            name, _, members = line.partition(":")
            entries.append(Entry(name.strip(), tuple(members.split())))
    return modules


def render(modules: dict[str, list[Entry]]) -> str:
    """The whole page.

    Raises:
        MissingNameError: it names all that is missing, at once.
    """
    parts, missing = [_INTRODUCTION], []
    seen: dict[int, str] = {}  # by id: values may be unhashable
    for module_name, entries in modules.items():
        parts.append(f"## {'Environment' if module_name == ENVIRONMENT else f'`{module_name}`'}\n")
        again: list[str] = []
        for entry in entries:
            try:
                if module_name == ENVIRONMENT:
                    parts.append(_render_variable(entry.name))
                    continue
                value = _find(module_name, entry.name)
                if id(value) in seen:
                    again.append(f"`{entry.name}` (`{seen[id(value)]}`)")
                    continue
                seen[id(value)] = module_name
                parts.append(_render_entry(value, entry))
            except MissingNameError as error:
                missing.append(str(error))
        if again:
            parts.append(f"Exported here too: {', '.join(again)}.\n")
    if missing:
        raise MissingNameError("\n".join(missing))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _find(module_name: str, name: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise MissingNameError(f"{module_name}.{name}: {error}") from error
    if not hasattr(module, name):
        raise MissingNameError(f"{module_name}.{name}: the module has no such name")
    return getattr(module, name)


def _render_variable(name: str) -> str:
    doc = inspect.getdoc(_find("magi_attention.env", name.lower())) or ""
    if not doc.startswith(f"{name} ("):
        raise MissingNameError(f"magi_attention.env.{name.lower()}: its docstring must begin with '{name} (default):'")
    return f"- `MAGI_ATTENTION_{name}` {' '.join(doc[len(name) :].split())}"


def _render_entry(value: Any, entry: Entry) -> str:
    definition = _definition(value)
    doc = ast.get_docstring(definition)
    if not doc:
        raise MissingNameError(f"{value.__module__}.{entry.name}: it has no docstring")
    lines = [f"### `{entry.name}`\n", f"```python\n{_signature(definition)}\n```\n", _markdown(doc)]
    lines += [_render_member(value, member, doc) for member in entry.members]
    return "\n".join(lines)


def _render_member(owner: Any, name: str, owner_doc: str) -> str:
    """A method or property with its docstring; nothing for what the class's docstring or the language explains."""
    where = f"{owner.__module__}.{owner.__qualname__}.{name}"
    is_field = name in getattr(owner, "__dataclass_fields__", {}) or issubclass(owner, enum.Enum)
    if not hasattr(owner, name) and not is_field:
        raise MissingNameError(f"{where}: the class has no such member")
    value = inspect.getattr_static(owner, name, None)
    if name.startswith("__"):
        if value is None or value is getattr(object, name, None):
            raise MissingNameError(f"{where}: the class does not define it")
        return ""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if not inspect.isfunction(function):
        # Members of an enum stand in its definition, and their names and values say what they are.
        if not issubclass(owner, enum.Enum) and not re.search(rf"\b{name}\b", owner_doc):
            raise MissingNameError(f"{where}: the docstring of its class does not explain it")
        return ""
    definition = _definition(function)
    doc = ast.get_docstring(definition)
    if not doc:
        raise MissingNameError(f"{where}: it has no docstring")
    assert not isinstance(definition, ast.ClassDef)
    title = name if isinstance(value, property) else _one_line(definition)
    return f"**`{owner.__name__}.{title}`**\n\n{_markdown(doc)}"


def _definition(value: Any) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef:
    """The statement that defines a function or class."""
    value = inspect.unwrap(value)
    source = inspect.getsourcefile(value)
    assert source is not None
    body: list[ast.stmt] = ast.parse(Path(source).read_text(encoding="utf-8")).body
    found: ast.stmt | None = None
    for part in value.__qualname__.split("."):
        # The last of a name: overloads and property getters come before, setters are not asked for here.
        matching = [s for s in body if isinstance(s, (ast.FunctionDef, ast.ClassDef)) and s.name == part]
        documented = [s for s in matching if ast.get_docstring(s)]
        found = (documented or matching)[-1]
        body = found.body
    assert isinstance(found, (ast.FunctionDef, ast.ClassDef))
    return found


def _signature(definition: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if not isinstance(definition, ast.ClassDef):
        line = _one_line(definition)
        if len(line) <= _WIDEST_SIGNATURE:
            return line
        arguments = "".join(f"    {argument},\n" for argument in _arguments(definition))
        return f"{definition.name}(\n{arguments}){_returned(definition)}"
    for statement in definition.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return f"class {definition.name}({', '.join(_arguments(statement))})"
    # `full = staticmethod(builders.full)` and `union = combine.union` are methods, documented as such.
    methods = (ast.Attribute, ast.Name, ast.Call)
    fields = [
        ast.unparse(s)
        for s in definition.body
        if isinstance(s, ast.AnnAssign) or (isinstance(s, ast.Assign) and not isinstance(s.value, methods))
    ]
    bases = ", ".join(ast.unparse(base) for base in definition.bases)
    header = f"class {definition.name}({bases})" if bases else f"class {definition.name}"
    # A property made by an expression (`type = ...`) is no field, and what begins with an underscore is nobody's business.
    fields = [
        field for field in fields if "property(" not in field and "_named(" not in field and not field.startswith("_")
    ]
    fields = [re.sub(r"field\(default_factory=(\w+)\)", r"\1()", field) for field in fields]
    return "\n".join([f"{header}:", *(f"    {field}" for field in fields)]) if fields else header


def _one_line(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"{definition.name}({', '.join(_arguments(definition))}){_returned(definition)}"


def _returned(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f" -> {ast.unparse(definition.returns)}" if definition.returns else ""


def _arguments(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Each argument as written, with its annotation and default; `self` and `cls` left out."""
    args = definition.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for argument, default in zip(positional, defaults, strict=True):
        if argument.arg not in ("self", "cls"):
            yield _argument(argument, default)
    if args.vararg:
        yield f"*{_argument(args.vararg, None)}"
    elif args.kwonlyargs:
        yield "*"
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _argument(argument, default)
    if args.kwarg:
        yield f"**{_argument(args.kwarg, None)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation else f"{text}={ast.unparse(default)}"


def _markdown(doc: str) -> str:
    """A docstring as markdown: sections become lists, what is indented outside them stays a drawing."""
    lines: list[str] = []
    in_section = False
    for block in re.split(r"\n\s*\n", doc):
        first, *rest = block.splitlines()
        if first.rstrip(":") in _SECTIONS and first.endswith(":") and rest:
            in_section = True
            items = textwrap.dedent("\n".join(rest)).splitlines()
            lines += [f"*{first}*\n", *_items(items), ""]
        elif in_section and first.startswith("    "):
            lines += [*_items(textwrap.dedent(block).splitlines()), ""]
        elif first.startswith("==="):
            lines += ["```text", block, "```", ""]  # a table
        else:
            in_section = False
            lines += [block, ""]
    return "\n".join(lines)


def _items(lines: list[str]) -> Iterator[str]:
    """One bullet for each line that is not indented; the indented ones continue it."""
    for line in lines:
        if line.startswith(" "):
            yield f"  {line.strip()}"
            continue
        names, colon, text = line.partition(": ")
        is_named = colon and re.fullmatch(r"[\w, *]+", names)
        yield f"- `{names}`: {text}" if is_named else f"- {line}"


def main() -> int:
    """Write or check the page; the exit status."""
    parser = argparse.ArgumentParser(description="Make docs/api.md from docstrings.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page is not up to date")
    is_check = parser.parse_args().check
    try:
        page = render(read_names(NAMES.read_text(encoding="utf-8")))
    except MissingNameError as error:
        print(f"promised in {NAMES.relative_to(ROOT)}, but:\n{error}", file=sys.stderr)
        return 1
    if is_check:
        is_stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page
        print(f"{PAGE.relative_to(ROOT)} is {'not up to date: run `make docs`' if is_stale else 'up to date'}")
        return int(is_stale)
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
