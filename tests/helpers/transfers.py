"""What an accelerator would refuse, shown on a CPU: implicit reads of arrays, and constants that must be read back.

On a CPU an array's memory is the host's, so that JAX reads it without a copy and never asks `jax.transfer_guard`.
"""

import ast
import collections
import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import array, config


def check_read(value: Any) -> None:
    """Raises as an accelerator would, where the guard is on and `jax.device_get` is not what reads."""
    level = config.transfer_guard_device_to_host.value
    if level == "disallow" and not config.guard_lib.thread_local_state().explicit_device_get:
        raise RuntimeError(f"Disallowed device-to-host transfer: shape={value.shape}, dtype={value.dtype}")


@contextlib.contextmanager
def guarded_reads() -> Iterator[None]:
    """Implicit reads obey `jax.transfer_guard`: float, bool and `_value` of an array, `np.asarray` and `np.array`."""
    plain = array.ArrayImpl._value

    def value(self: Any) -> np.ndarray:
        check_read(self)
        return plain.__get__(self)

    def checked(function: Any) -> Any:
        # NumPy reads a CPU's array as a buffer, and asks neither `__array__` nor `_value`.
        def read(given: Any, *args: Any, **kwargs: Any) -> np.ndarray:
            if isinstance(given, jax.Array) and not isinstance(given, jax.core.Tracer):
                check_read(given)
            return function(given, *args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array.ArrayImpl, "_value", property(value))
        for name in ("asarray", "array"):
            patch.setattr(np, name, checked(getattr(np, name)))
        yield


def array_constants(jaxpr: Any) -> list[jax.Array]:
    """The concrete arrays among the constants of a closed jaxpr and of all jaxprs inside it."""
    closed = getattr(jaxpr, "jaxpr", None)
    constants = list(jaxpr.consts) if closed is not None else []
    for equation in (jaxpr if closed is None else closed).eqns:
        constants += [given.val for given in equation.invars if hasattr(given, "val")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                constants += array_constants(inner)
    return [value for value in constants if isinstance(value, jax.Array)]


class Jitted:
    """A function of `jax.jit`: each call is traced and searched for constants, then made under the guard."""

    def __init__(self, jitted: Any, where: str, constants: dict[str, list[jax.Array]]):
        self._jitted, self._constants = jitted, constants.setdefault(where, [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        traced = self._jitted.trace(*args, **kwargs)
        self._constants += array_constants(traced.jaxpr)
        return traced

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self.trace(*args, **kwargs).lower()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.trace(*args, **kwargs)
        with jax.transfer_guard_device_to_host("disallow"):
            return self._jitted(*args, **kwargs)


@contextlib.contextmanager
def recorded_jits() -> Iterator[dict[str, list[jax.Array]]]:
    """Gives, for each function of the package that calls `jax.jit`, the constants of what it compiles, as it is run."""
    constants: dict[str, list[jax.Array]] = {}
    plain = jax.jit

    def jit(function: Any, **options: Any) -> Any:
        caller = sys._getframe(1)
        module, name = caller.f_globals["__name__"], caller.f_code.co_name
        jitted = plain(function, **options)
        return Jitted(jitted, f"{module}.{name}", constants) if module.startswith("transformer.") else jitted

    with pytest.MonkeyPatch.context() as patch, guarded_reads():
        patch.setattr(jax, "jit", jit)
        yield constants


def jit_uses(root: pathlib.Path) -> set[str]:
    """MODULE.FUNCTION of every function of the package that names `jax.jit`, as a decorator of it or inside."""
    uses: dict[str, int] = collections.Counter()

    def visit(node: ast.AST, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = f"{module}.{child.name}" if isinstance(child, ast.FunctionDef) else where
            if isinstance(child, ast.Attribute) and ast.unparse(child) == "jax.jit":
                uses[where] += 1
            visit(child, inner)

    for path in sorted((root / "transformer").rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        visit(ast.parse(path.read_text()), module)
    return set(uses)
