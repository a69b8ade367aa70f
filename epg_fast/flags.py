"""Flags and configuration files of a command, from dataclasses such as those of `epg_fast.config`.

A field is the flag `--name`, one of a nested dataclass `--group.name`; the text under a field is its help. A YAML file
holds the same names, nested, and its values mean what the same text means behind a flag.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

RECIPES = resources.files("epg_fast") / "configs" / "recipes"
Text = str | list[str]


def parse(kinds: Sequence[type], argv: Sequence[str], command: str, summary: str = "", network_only: bool = False):
    """One object of each dataclass in `kinds`, from defaults, then `--config` files in order, then flags.

    network_only: of files with names that the command lacks, those of another job, only `model` is taken.
    Raises ValueError, with one line, for whatever is wrong.
    """
    flags = {flag.name: flag for kind in kinds for flag in _flags(kind)}
    parser = _parser(kinds, command, summary, described=bool({"-h", "--help"} & set(argv)))
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file, or name of a shipped recipe; may be repeated, later ones win, flags win over all",
    )
    given, rest = parser.parse_known_args([_underscored(word) for word in argv])
    if rest:
        raise ValueError(f"unknown argument {rest[0]}{nearest(rest[0].lstrip('-').partition('=')[0], flags)}")
    texts: dict[str, Text] = {}
    for file in vars(given).pop("config"):
        path = _recipe(file)
        found = _file_texts(path, flags)
        unknown = [name for name in found if name not in flags]
        if unknown and network_only:
            found = {name: text for name, text in found.items() if name.startswith("model.")}
        elif unknown:
            raise ValueError(f"config {path}: unknown name {unknown[0]}{nearest(unknown[0], flags)}")
        texts |= found
    texts |= vars(given)
    return [_built(kind(), texts) for kind in kinds]


def parse_known(kind: type, argv: Sequence[str]):
    """(object of the dataclass from the flags that it knows, the other words)."""
    given, rest = _parser([kind], "", "", described=False, add_help=False).parse_known_args(argv)
    return _built(kind(), vars(given)), rest


def nearest(name: str, valid) -> str:
    """ " (did you mean 'x'?)", or nothing."""
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


class _Flag(NamedTuple):
    name: str
    hint: Any
    default: Any


def _flags(kind: type, default=None, prefix: str = "") -> Iterator[_Flag]:
    default = kind() if default is None else default
    for name, hint in _hints(kind).items():
        value = getattr(default, name)
        if dataclasses.is_dataclass(hint):
            yield from _flags(hint, value, f"{prefix}{name}.")
        else:
            yield _Flag(prefix + name, hint, value)


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _parser(kinds, command: str, summary: str, described: bool, add_help: bool = True) -> _Parser:
    parser = _Parser(
        prog=f"epg-fast {command}",
        usage=f"epg-fast {command} [--config FILE_OR_RECIPE ...] [--flag value ...]",
        description=f"{summary}.",
        allow_abbrev=False,
        add_help=add_help,
    )
    groups = {"": parser}
    for kind in kinds:
        texts = _texts(kind) if described else {}
        for flag in _flags(kind):
            group = flag.name.rpartition(".")[0]
            if group not in groups:
                groups[group] = parser.add_argument_group(group, texts.get(group))
            default = "" if flag.default == "" else f" (default: {_shown(flag.default)})"
            shown = {"help": f"{texts.get(flag.name, '')}{default}".replace("%", "%%")}
            alone = {"nargs": "?", "const": "true"} if flag.hint is bool else {}
            metavar = wanted(flag.hint).replace(" or ", "|").replace(", ", "|")
            groups[group].add_argument(
                f"--{flag.name}", default=argparse.SUPPRESS, metavar=metavar, **(shown if described else {}), **alone
            )
    return parser


def _underscored(word: str) -> str:
    """`--batch-size` is `--batch_size`."""
    flag, equals, value = word.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _texts(kind: type, prefix: str = "") -> dict[str, str]:
    """The text under each field, and under those of nested dataclasses."""
    texts = {}
    for base in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        body = ast.parse(inspect.getsource(base)).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[prefix + field.target.id] = inspect.cleandoc(text.value.value).replace("\n", " ").rstrip(".")
    for name, hint in _hints(kind).items():
        if dataclasses.is_dataclass(hint):
            texts |= _texts(hint, f"{prefix}{name}.")
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
        return ", ".join(arguments)
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
            except (ValueError, KeyError):
                near = nearest(str(texts[path]), wanted(hint).split(", "))
                raise ValueError(f"{path}: got {texts[path]!r}, want {wanted(hint)}{near}") from None
            if isinstance(changes[name], str):
                changes[name] = _expanded(path, changes[name])
    return dataclasses.replace(default, **changes)


def _value(text: Text, hint):
    """What a text means as a value of this type. Raises ValueError or KeyError for one that means nothing."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text == "null":
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
    if isinstance(text, list) or (origin is typing.Literal and text not in arguments):
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


def _file_texts(path: Path, flags: dict[str, _Flag]) -> dict[str, Text]:
    """{name of a flag: its text} of a YAML file, nothing of which YAML takes for a boolean or a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            twice = next((key for i, (key, _) in enumerate(node.value) if key.value in names[:i]), None)
            if twice:
                raise yaml.MarkedYAMLError(problem=f"{twice.value} comes twice", problem_mark=twice.start_mark)
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_bytes(), Loader)  # as bytes, whose encoding YAML knows
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: not valid YAML ({error})") from None
    if not isinstance(content, dict | None):
        raise ValueError(f"config {path}: want a mapping of names to values, got {type(content).__name__}")
    groups = {name.rpartition(".")[0] for name in flags} - {""}

    def flat(mapping: dict, prefix: str = "") -> Iterator[tuple[str, Text]]:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                yield from flat(value, f"{name}.")
            elif name in groups:
                raise ValueError(f"config {path}: {name} is a group, got {value!r}; write its fields indented under it")
            elif value is None and name in flags and type(None) not in typing.get_args(flags[name].hint):
                raise ValueError(f"config {path}: {name} has no value; write one, or remove the line")
            elif isinstance(value, list):
                yield name, ["null" if part is None else str(part) for part in value]
            else:
                # as Python decodes words of the command line
                yield name, os.fsdecode(("null" if value is None else value).encode("utf-8", "surrogateescape"))

    return dict(flat(content or {}))
