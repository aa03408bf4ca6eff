"""Config files: Python that runs and whose `get_config` returns a config; and the one that a workdir keeps."""

import contextlib
import difflib
import os
import pathlib
import re
import runpy
import sys
import types
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import config_dict

from transformer.config import schema, validation
from transformer.runtime import files, object_storage
from transformer.runtime.errors import UserError, last_line_in


def saved_path(workdir: str) -> str:
    """The path of the config that a workdir keeps; empty if there is none."""
    if not workdir or object_storage.unsupported_reason(workdir):
        return ""
    path = epath.Path(workdir).expanduser() / files.CONFIG_FILE
    with files.user_error_on_oserror(f"{path}"):
        return str(path) if path.exists() else ""


def load(path: str) -> config_dict.ConfigDict:
    """What the `get_config` of a config file returns."""
    file, _, name = path.partition(":")
    names = [name] if name else []
    others = f"the configs that come with the project: {', '.join(shipped())}"
    config = call_file(f"--config={path}", _path_of(file), "get_config", *names, others=others, see="configs/demo.py")
    if not isinstance(config, (config_dict.ConfigDict, dict)):
        raise UserError(f"--config={path}: expected get_config to return a ConfigDict, got {type(config).__name__}")
    given = validation.to_sections(config)
    # Not flattened: fields that follow others, as qkv_dim follows emb_dim, must see overrides too.
    if isinstance(config, (config_dict.FrozenConfigDict, dict)):
        config = config_dict.ConfigDict(config, type_safe=False)
    config.unlock()
    for section in schema.SECTIONS:
        if section not in given:
            config[section] = config_dict.ConfigDict()
    return config


def call_file(flag: str, file: str, function: str, *arguments: Any, others: str, see: str) -> Any:
    """What a function of a Python file returns.

    Args:
      flag: names the file in errors.
      others: the files there are, for the error if there is no such file.
      see: an example, for the error if the file has no such function.

    Raises:
      UserError: no such file or function, or an error inside it.
    """
    if os.path.exists(file) and not os.path.isfile(file):
        raise UserError(f"{flag}: expected a file that ends in .py, got a folder, pipe or device")
    if not os.path.isfile(file):
        raise UserError(f"{flag}: no such file; {others}")
    try:
        with _neighbours(file):
            return runpy.run_path(file, run_name=f"{_NEIGHBOURS}.main")[function](*arguments)
    except KeyError as error:
        if error.args != (function,):
            raise UserError(_inside(flag, file, error)) from error
        raise UserError(f"{flag}: expected a function {function}, found none; see {see}") from error
    except Exception as error:  # whatever the file, which is Python, may raise
        raise UserError(_inside(flag, file, error)) from error


def shipped() -> dict[str, str]:
    """The configs that come with the project, by name: beside the package in a checkout, inside it where installed."""
    package = pathlib.Path(__file__).parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "demo.py").is_file():
            return {path.stem: str(path) for path in sorted(folder.glob("*.py"))}
    return {}


def _path_of(file: str) -> str:
    """Finds a config file; `demo` or `configs/demo.py`, where there is no such file, is the project's own."""
    name = re.fullmatch(r"(?:configs/)?(\w+)(?:\.py)?", file)
    return file if os.path.isfile(file) or not name else shipped().get(name[1], file)


_NEIGHBOURS = "_config_files"


@contextlib.contextmanager
def _neighbours(file: str) -> Iterator[None]:
    """Lets a config file say `from . import NAME` for NAME.py beside it, though it is in no package."""
    package = types.ModuleType(_NEIGHBOURS)
    package.__path__ = [os.path.dirname(os.path.abspath(file))]
    sys.modules[_NEIGHBOURS] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == _NEIGHBOURS]:
            del sys.modules[name]


def _inside(flag: str, file: str, error: Exception) -> str:
    """One line on an error inside a file that a flag names."""
    line = last_line_in(file, error)
    where = f"line {line}: " if line else ""
    unknown = re.search(r'Key "(\w+)" does not exist', str(error))
    if unknown:
        known = [name for section in schema.SECTIONS for name in (section, *schema.field_names(section))]
        close = difflib.get_close_matches(unknown[1], known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{flag}: {where}unknown field {unknown[1]!r}{hint}"
    return f"{flag}: {where}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
