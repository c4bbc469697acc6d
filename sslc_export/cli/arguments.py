"""Turns a recipe's fields into argparse flags, and a command's end into an exit code."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Callable, Sequence

from pydantic import BaseModel

from sslc_common.errors import UserError
from sslc_export import __version__
from sslc_export.recipe import load_recipe

R = typing.TypeVar("R", bound=BaseModel)

_METAVARS = {
    "method": "METHOD",
    "mask_rule": "RULE",
    "exclude": "GLOB",
    "values_of": "GLOB=TYPE",
    "target": "SM",
    "batches": "N",
    "harness_tasks": "TASK",
}


def parse(kind: type[R], argv: Sequence[str] | None, description: str, examples: str) -> R:
    """Parses flags, and a `--recipe` if one is given, into a recipe.

    Raises:
        InputError: see `load_recipe`. argparse itself exits with code 2 on flags it does not know.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--recipe", metavar="FILE", help="YAML file with any of the fields below; flags win over it")
    for owner in _owners(kind):
        group = parser.add_argument_group((owner.__doc__ or "").rstrip("."))
        for name in owner.__annotations__:
            _add_flag(group, name, kind)
    flags = vars(parser.parse_args(argv))
    return load_recipe(kind, flags.pop("recipe", None), flags)


def _owners(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """The classes that contribute fields, the most particular first."""
    return [c for c in kind.__mro__ if issubclass(c, BaseModel) and c is not BaseModel and c.__annotations__]


def _add_flag(group: argparse._ArgumentGroup, name: str, kind: type[BaseModel]) -> None:
    field = kind.model_fields[name]
    annotation = field.annotation
    if isinstance(annotation, types.UnionType):  # `float | None`: None means the default
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    text = (field.description or "").replace("%", "%%")
    if isinstance(field.default, str | int | float) and annotation is not bool:
        text += f" (default: {field.default})"
    flag = "--" + name.replace("_", "-")
    if annotation is bool:
        group.add_argument(flag, action="store_true", help=text)
    elif typing.get_origin(annotation) is typing.Literal:
        group.add_argument(flag, choices=typing.get_args(annotation), help=text)
    elif typing.get_origin(annotation) is list:
        group.add_argument(flag, action="append", metavar=_METAVARS.get(name, "TEXT"), help=text)
    else:
        # Numbers stay strings here: the recipe converts them, so that a flag and a file give the same error.
        metavar = {int: "N", float: "X"}.get(annotation, "PATH") if isinstance(annotation, type) else "X"
        group.add_argument(flag, metavar=_METAVARS.get(name, metavar), help=text)


def run(command: Callable[[], int]) -> int:
    """Runs a command: a user's mistake becomes one message and its exit code, never a traceback."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was left half-written; the same command goes on where it can", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
