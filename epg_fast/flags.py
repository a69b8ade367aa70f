"""Flags and configuration files of a command, from dataclasses such as those of `epg_fast.config`.

A field is the flag `--name`, one of a nested dataclass `--group.name`; the text under a field is its help. A YAML file
holds the same names, nested, and its values mean what the same text means behind a flag. `config` in it names files
that come first, unless they have come already.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import os
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from epg_fast.files import flat
from epg_fast.wording import nearest

RECIPES = resources.files("epg_fast") / "configs" / "recipes"
Text = str | list[str] | None
"""What stands behind a flag; None: nothing."""


def parse(kinds: Sequence[type], argv: Sequence[str], command: str, network_only: bool = False, about: str = ""):
    """One object of each dataclass in `kinds`, from defaults, then `--config` files in order, then flags.

    network_only: of files with names that the command lacks, those of another job, only `model` is taken.
    about: what the help says of the command; that of the first dataclass where it is left out.
    Raises ValueError, with one line, for whatever is wrong; prints the help and exits where that is asked for.
    """
    if {"-h", "--help"} & set(argv):
        print(_help(kinds, command, about))
        raise SystemExit(0)
    flags = {flag.name: flag for kind in kinds for flag in _flags(kind)}
    texts: dict[str, Text] = {}
    given = list(_given(argv))
    for path, found in _files([text or "" for name, text in given if name == "config"], []):
        unknown = next((name for name in found if name not in flags), None)
        if unknown and network_only:
            found = {name: text for name, text in found.items() if name.startswith("model.")}
        elif any(name.startswith(f"{unknown}.") for name in flags):
            raise ValueError(f"config {path}: {unknown} is a group; write its fields indented under it")
        elif unknown:
            raise ValueError(f"config {path}: unknown name {unknown}{nearest(unknown, flags)}")
        texts |= found
    for name, _ in given:
        if name not in flags and name != "config":
            raise ValueError(f"unknown argument --{name}{nearest(name, flags)}")
    return [_built(kind(), texts | dict(given)) for kind in kinds]


def parse_known(kind: type, argv: Sequence[str]):
    """(object of the dataclass from the flags that it knows, the other words)."""
    names, given = {flag.name for flag in _flags(kind)}, list(_given(argv))
    rest = [f"--{name}" if text is None else f"--{name}={text}" for name, text in given if name not in names]
    return _built(kind(), dict(given)), rest


def words(config) -> list[str]:
    """The words of a command line from which `parse` makes this object: those of fields that are not as by default."""
    found = []
    for flag in _flags(type(config)):
        value = functools.reduce(getattr, flag.name.split("."), config)
        if value != flag.default:
            text = _shown(value)
            found += [f"--{flag.name}={text}"] if text.startswith("--") or not text else [f"--{flag.name}", text]
    return found


def _given(argv: Sequence[str]) -> Iterator[tuple[str, Text]]:
    """(name, text behind it or None) of each flag, `--batch-size` being `--batch_size`."""
    words = list(argv)
    while words:
        name, equals, text = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise ValueError(f"unknown argument {name!r}, want --flag value")
        if not equals and words and not words[0].startswith("--"):
            equals, text = "=", words.pop(0)
        yield name[2:].replace("-", "_"), text if equals else None


class _Flag(NamedTuple):
    name: str
    hint: Any
    default: Any
    owner: type


def _flags(kind: type, default=None, prefix: str = "") -> Iterator[_Flag]:
    default = kind() if default is None else default
    for name, hint in _hints(kind).items():
        value = getattr(default, name)
        if dataclasses.is_dataclass(hint):
            yield from _flags(hint, value, f"{prefix}{name}.")
        else:
            yield _Flag(prefix + name, hint, value, kind)


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def explained(kinds: Sequence[type]) -> Iterator[tuple[str, str, str]]:
    """(flag with what it takes, text, default as a user would write it or "") of every flag of a command."""
    yield "--config FILE", "YAML file, or name of a shipped recipe; may be repeated, later ones win, flags win", ""
    for name, hint, default, owner in (flag for kind in kinds for flag in _flags(kind)):
        yield f"--{name} {wanted(hint)}", _texts(owner)[name.rpartition(".")[2]], _shown(default)


def _help(kinds: Sequence[type], command: str, about: str) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    lines = [
        f"usage: epg-fast {command} [--config FILE_OR_RECIPE ...] [--flag value ...]",
        "",
        about or inspect.getdoc(kinds[0]),
        "",
    ]
    for flag, text, default in explained(kinds):
        text += f" (default: {default})" if default else ""
        lines += [f"  {flag}", *textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    return "\n".join(lines)


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """The text under each field."""
    texts = {}
    for base in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        body = ast.parse(inspect.getsource(base)).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[field.target.id] = inspect.cleandoc(text.value.value).replace("\n", " ").rstrip(".")
    return texts


def _shown(value) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def wanted(hint) -> str:
    """A type in a user's words: "a|b", "NUMBER or null"."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(wanted, arguments))
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(arguments)
    if typing.get_origin(hint) is tuple:
        return f"[{','.join(map(wanted, arguments))}]"
    if typing.get_origin(hint) is list:
        return f"[{wanted(arguments[0])},...]"
    return {int: "INTEGER", float: "NUMBER", bool: "true or false", str: "TEXT", type(None): "null"}[hint]


def _built(default, texts: dict[str, Text], prefix: str = ""):
    """`default` with what the texts say of its fields."""
    changes = {}
    for name, hint in _hints(type(default)).items():
        path = prefix + name
        if dataclasses.is_dataclass(hint):
            changes[name] = _built(getattr(default, name), texts, f"{path}.")
        elif path in texts:
            try:
                changes[name] = _value(texts[path], hint)
            except (ValueError, KeyError, TypeError, AttributeError):
                got, near = texts[path] or "nothing", nearest(str(texts[path]), wanted(hint).split("|"))
                raise ValueError(f"{path}: got {got!r}, want {wanted(hint)}{near}") from None
            if isinstance(changes[name], str):
                changes[name] = _expanded(path, changes[name])
    try:
        return dataclasses.replace(default, **changes)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _value(text: Text, hint):
    """What a text means as a value of this type. Raises ValueError or KeyError for one that means nothing."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text in ("null", ""):
            return None
        *firsts, last = (argument for argument in arguments if argument is not type(None))
        for first in firsts:
            try:
                return _value(text, first)
            except (ValueError, KeyError):
                continue
        return _value(text, last)
    if origin in (list, tuple):
        words = _words(text)
        hints = arguments if origin is tuple else arguments * len(words)
        if len(words) != len(hints):
            raise ValueError
        return origin(map(_value, words, hints))
    if hint is bool and text is None:
        return True
    if not isinstance(text, str) or (origin is typing.Literal and text not in arguments):
        raise ValueError
    if origin is typing.Literal:
        return text
    if hint is bool:
        return {"true": True, "false": False}[text.strip().lower()]
    if hint is float:
        return float(re.sub(r"\.(?=nan$|inf$)", "", text.strip().lower()))  # YAML has .nan and .inf
    return hint(text)


def _words(text: Text) -> list[str]:
    if isinstance(text, list):
        return text
    inner = re.fullmatch(r"\s*\[(.*)\]\s*", text)
    if inner is None:
        raise ValueError
    return [word.strip() for word in inner[1].split(",")] if inner[1].strip() else []


def _expanded(name: str, text: str) -> str:
    """What a shell makes of a leading `~` or `$NAME`, but neither in a file nor, for `~`, behind `--outdir=`."""
    if text[:1] not in ("~", "$"):
        return text
    path = os.path.expanduser(os.path.expandvars(text))
    if path[:1] in ("~", "$"):
        raise ValueError(f"{name} is {text!r}: no such user or variable; write it out, or as ./{text}")
    return path


def _recipe(name: str) -> Path:
    """The YAML file, or the shipped recipe, of that name."""
    path = Path(name).expanduser()
    shipped = sorted(file.name.removesuffix(".yaml") for file in RECIPES.iterdir() if file.name.endswith(".yaml"))
    if path.is_file():
        return path
    if name in shipped:
        return RECIPES / f"{name}.yaml"
    raise ValueError(f"config {name!r}: no such file{nearest(name, shipped)}; shipped recipes: {', '.join(shipped)}")


def _files(names: Sequence[str], loaded: list[Path]) -> Iterator[tuple[Path, dict[str, Text]]]:
    """(file, its texts) in the order in which they count."""
    for name in names:
        path = _recipe(name)
        texts = _file_texts(path)
        loaded.append(path)
        first = texts.pop("config", None) or []
        first = [first] if isinstance(first, str) else map(str, first)
        yield from _files([name for name in first if _recipe(name) not in loaded], loaded)
        yield path, texts


class _Texts(yaml.BaseLoader):
    """Leaves every value as it is written, and takes no name twice."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        twice = next((key for i, (key, _) in enumerate(node.value) if key.value in names[:i]), None)
        if twice:
            raise yaml.MarkedYAMLError(problem=f"{twice.value} comes twice", problem_mark=twice.start_mark)
        return super().construct_mapping(node, deep)


def _file_texts(path: Path) -> dict[str, Text]:
    """{name: text} of a YAML file, nested names joined by dots."""
    try:
        content = yaml.load(path.read_bytes(), _Texts) or {}  # as bytes, whose encoding YAML knows
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: want a mapping of names to values, got {type(content).__name__}")
    return {name: value if isinstance(value, list) else _word(value) for name, value in flat(content).items()}


def _word(text: str) -> str:
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))  # as words of a command line are
