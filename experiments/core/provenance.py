"""Follows the code that a measurement rests on, by its imports and names, and hashes it.

An *entry* is where to begin: `helpers/metrics.py::dice_loss`, one value of a dictionary
(`experiments/chapters/unet/trials.py::TRIALS["U-Net"]`) or a whole module (`helpers/scenes.py`).
What it mentions of this project is followed, through imports, to the end. What cannot change a
number does not count: comments, docstrings, layout, annotations, what is printed, and the text of
errors, which a measurement that ended never raised.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = ("helpers", "experiments")
WHOLE = "*"  # in place of a name: the module itself was handed on


@dataclass(frozen=True)
class Place:
    """A definition, or one value of a dictionary (`key`), in a file of the repository."""

    path: str
    name: str = WHOLE
    key: str | None = None

    @classmethod
    def of(cls, entry: str) -> Place:
        path, _, name = entry.partition("::")
        if name.endswith('"]'):
            name, _, key = name[:-2].partition('["')
            return cls(path, name, key)
        return cls(path, name or WHOLE)


@dataclass
class Module:
    """What a file defines at its top level, what it imports of ours, what it does on the way."""

    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # module, name in it
    effects: list[ast.stmt] = field(default_factory=list)


@dataclass(frozen=True)
class Use:
    """A dotted name that a definition mentions, with the key where it is looked up in."""

    names: tuple[str, ...]
    key: str | None = None


class Tree:
    """The code of a checkout, each file parsed once."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or ROOT
        self._modules: dict[str, Module] = {}
        self._closures: dict[str, dict[Place, str]] = {}
        self._cleaned: dict[Place, tuple[str, set[Place]]] = {}

    def digests(self, entries: Iterable[str]) -> dict[str, str]:
        """Return a hash for each file that the entries lead into.

        Raises `LookupError` for a definition that is not there and `FileNotFoundError` for a file.
        """
        reached: dict[Place, str] = {}
        for entry in entries:
            reached |= self._closure(entry)
        files: dict[str, list[str]] = {}
        for place, written in reached.items():
            files.setdefault(place.path, []).append(f"{place.name} {place.key} {written}")
        return {
            path: hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]
            for path, parts in sorted(files.items())
        }

    def constant(self, entry: str) -> Any:
        """Return the value of a constant that is written out."""
        place = Place.of(entry)
        (statement,) = self._statements(place)
        return ast.literal_eval(statement.value)  # type: ignore[attr-defined]

    def _closure(self, entry: str) -> dict[Place, str]:
        if entry not in self._closures:
            found: dict[Place, str] = {}
            first = Place.of(entry)
            waiting = [first]
            if first.key is not None:
                waiting = list(self._looked_up(first.path, first.name, first.key))
            while waiting:
                place = waiting.pop()
                if place not in found:
                    found[place], uses = self._read(place)
                    waiting += uses
            self._closures[entry] = found
        return self._closures[entry]

    def _read(self, place: Place) -> tuple[str, set[Place]]:
        """Return a definition as text, and what of ours it mentions."""
        if place not in self._cleaned:
            cleaned = [_Cleaner().visit(statement) for statement in self._statements(place)]
            uses: set[Place] = set()
            for statement in cleaned:
                local = _imports(statement, place.path)
                for use in _uses(statement):
                    uses.update(self._resolve(place.path, use, local))
            self._cleaned[place] = _written(cleaned), uses - {place}
        return self._cleaned[place]

    def _statements(self, place: Place) -> list[ast.AST]:
        module = self.module(place.path)
        if place.name == WHOLE:
            every = [s for statements in module.defined.values() for s in statements]
            return [_copy(s) for s in (*dict.fromkeys(every), *module.effects)]
        if place.name not in module.defined:
            raise LookupError(f"There is no {place.name} at the top level of {place.path}.")
        statements = module.defined[place.name]
        if place.key is not None:
            value = _value(statements, place.key)
            if value is not None:
                return [_copy(value)]
        return [_copy(statement) for statement in statements]

    def _resolve(
        self, path: str, use: Use, local: dict[str, tuple[str, str]] | None = None
    ) -> Iterator[Place]:
        """Yield the definitions of ours that a name in a file stands for: one, or none."""
        module = self.module(path)
        first, *rest = use.names
        if first in (local or {}):
            target, name = (local or {})[first]
        elif first in module.defined:
            yield from self._looked_up(path, first, use.key if not rest else None)
            return
        elif first in module.imported:
            target, name = module.imported[first]
        else:
            if "__getattr__" in module.defined and local is None:
                yield Place(path, "__getattr__")
            return
        inner = self._file(f"{target}.{name}" if name else target)
        if inner is not None and not (name and self._has(target, name)):
            if rest:
                yield from self._resolve(inner, Use(tuple(rest), use.key))
            else:
                yield Place(inner)
        elif (outer := self._file(target)) is not None:
            yield from self._resolve(outer, Use((name, *rest), use.key))

    def _looked_up(self, path: str, name: str, key: str | None) -> Iterator[Place]:
        """Follow `{**OTHER}` to where a key is written."""
        statements = self.module(path).defined.get(name, [])
        if key is None or _value(statements, key) is not None:
            yield Place(path, name, key)
            return
        parts = _merged(statements)
        for part in parts:
            for place in self._resolve(path, Use(part, key)):
                if place.key == key:
                    yield place
                    return
        yield Place(path, name)

    def _has(self, target: str, name: str) -> bool:
        path = self._file(target)
        return path is not None and name in self.module(path).defined

    def _file(self, dotted: str) -> str | None:
        if dotted.split(".")[0] not in OURS:
            return None
        stem = dotted.replace(".", "/")
        return next(
            (p for p in (f"{stem}.py", f"{stem}/__init__.py") if (self.root / p).is_file()), None
        )

    def module(self, path: str) -> Module:
        if path not in self._modules:
            source = (self.root / path).read_text(encoding="utf-8")
            self._modules[path] = _parsed(ast.parse(source), path)
        return self._modules[path]


def _parsed(tree: ast.Module, path: str) -> Module:
    module = Module(imported=_imports(tree, path, deep=False))
    for statement in tree.body:
        names = _defines(statement)
        for name in names:
            module.defined.setdefault(name, []).append(statement)
        imports = isinstance(statement, ast.Import | ast.ImportFrom)
        if not names and not imports and not _is_main(statement) and not _is_text(statement):
            module.effects.append(statement)
    return module


def _imports(tree: ast.AST, path: str, deep: bool = True) -> dict[str, tuple[str, str]]:
    """Return what names stand for that are imported from us: a module, and a name in it or ""."""
    package = path.removesuffix(".py").split("/")[:-1]
    found = {}
    nodes = ast.walk(tree) if deep else _outermost(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] in OURS:
                    whole = each.name if each.asname else each.name.split(".")[0]
                    found[each.asname or whole] = (whole, "")
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                target = ".".join([*package[: len(package) - node.level + 1], target]).strip(".")
            if target.split(".")[0] in OURS:
                for each in node.names:
                    found[each.asname or each.name] = (target, each.name)
    return found


def _outermost(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield statements that are not inside of a function or a class."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
            yield from _outermost(node)


def _defines(node: ast.AST) -> set[str]:
    """Return the names that a top-level statement binds or, as in `table[key] = 1`, changes."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Assign(targets=targets):
            return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
            return {name}
        case ast.If() | ast.For() | ast.While() | ast.With() | ast.Try() | ast.ExceptHandler():
            return {name for part in ast.iter_child_nodes(node) for name in _defines(part)}
    return set()


def _value(statements: list[ast.stmt], key: str) -> ast.expr | None:
    """Return what is written for a key in the one dictionary that is assigned here."""
    match statements:
        case [ast.Assign(value=ast.Dict() as table) | ast.AnnAssign(value=ast.Dict() as table)]:
            for name, value in zip(table.keys, table.values, strict=True):
                if isinstance(name, ast.Constant) and name.value == key:
                    return value
    return None


def _merged(statements: list[ast.stmt]) -> list[tuple[str, ...]]:
    """Return the names of the dictionaries that one is merged of, the last first: it wins."""
    match statements:
        case [ast.Assign(value=ast.Dict() as table) | ast.AnnAssign(value=ast.Dict() as table)]:
            parts = [
                _dotted(value)
                for name, value in zip(table.keys, table.values, strict=True)
                if name is None
            ]
            return [part for part in reversed(parts) if part]
    return []


def _uses(tree: ast.AST) -> Iterator[Use]:
    """Yield every dotted name that is read, once in full, with a constant key behind it."""
    match tree:
        case ast.Subscript(value=value, slice=ast.Constant(value=str() as key)) if _dotted(value):
            yield Use(_dotted(value), key)
            return
        case ast.Attribute() if _dotted(tree):
            yield Use(_dotted(tree))
            return
        case ast.Name(ctx=ast.Load()):
            yield Use((tree.id,))
            return
    for child in ast.iter_child_nodes(tree):
        yield from _uses(child)


def _dotted(node: ast.AST) -> tuple[str, ...]:
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=value, attr=name):
            return (*inner, name) if (inner := _dotted(value)) else ()
    return ()


class _Cleaner(ast.NodeTransformer):
    """Takes out what cannot change a number."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        given = node.args
        for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
            if each is not None:
                each.annotation = None
        return self._with_body(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._with_body(node)

    def _with_body(self, node: Any) -> ast.AST:
        node.body = [each for each in node.body if not _is_text(each)]
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        # A field of a dataclass is one because it is annotated.
        node.annotation = ast.Constant(ast.unparse(node.annotation))
        self.generic_visit(node)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(exc=error, cause=None)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.Assert(test=self.visit(node.test), msg=None)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        match node.value:
            case ast.Call(func=ast.Name(id="print")):
                return ast.Pass()
        self.generic_visit(node)
        return node


def _written(node: object) -> str:
    # ast.dump differs from one Python to the next in the empty fields that it writes.
    if isinstance(node, list):
        return f"[{','.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({','.join(f'{n}={_written(v)}' for n, v in fields)})"


def _copy(node: ast.AST) -> ast.AST:
    """Return a copy that may be changed."""
    made = type(node)()
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            value = [_copy(each) if isinstance(each, ast.AST) else each for each in value]
        elif isinstance(value, ast.AST):
            value = _copy(value)
        setattr(made, name, value)
    return made


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
