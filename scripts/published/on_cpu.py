"""Running code that was written for a GPU and for other packages than ours: imports it, and turns cuda into cpu."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from sslc_common.errors import InputError


def load(folder: Path, name: str, without: Sequence[str] = ()) -> Any:
    """Imports one module of a clone of a repository.

    Afterwards its modules are forgotten again, as the next repository may have a `utils` or a `config` of its own.

    Args:
        folder: The clone; what its modules import is looked for there first.
        name: Of the module, from the folder.
        without: Modules that stand-ins take the place of: packages that are not here, or files that want others.

    Raises:
        InputError: the clone has no such module, or the module cannot be imported.
    """
    folder = folder.resolve()
    if not (folder / f"{name.replace('.', '/')}.py").is_file():
        raise InputError(f"{folder} is not the clone that was expected", allowed=f"a folder with {name} in it")

    def of_clone() -> list[str]:
        return [module for module in sys.modules if module in without or module.partition(".")[0] in _own(folder)]

    ours = {module: sys.modules.pop(module) for module in of_clone()}  # 3BASiL has a `compress` too
    sys.modules.update({module: mock.MagicMock(name=module) for module in without})
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, PathFinder)  # before those of editable installations, ours among them
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name} of {folder} cannot be imported",
            got=str(error),
            do="Check out the commit named in docs/methods.md, or install what is missing",
        ) from error
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(PathFinder)
        for module in of_clone():
            del sys.modules[module]
        sys.modules.update(ours)


def _own(folder: Path) -> set[str]:
    """Names of the modules and packages at the top of a folder."""
    return {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, whatever asks for a GPU gets the CPU, nothing is printed and no gradients are kept."""
    with (
        _Redirected(),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.cuda.empty_cache"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        torch.no_grad(),
    ):
        yield


class _Redirected(TorchFunctionMode):
    """Hands every call of torch the CPU where it names a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(_here, args), **{key: _here(value) for key, value in (kwargs or {}).items()})


def _here(argument: Any) -> Any:
    if isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda"):
        return "cpu" if isinstance(argument, str) else torch.device("cpu")
    return argument
