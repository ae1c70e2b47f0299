"""A strict stand-in for what lives in TensorRT's libraries, made from the signatures of NVIDIA's own bindings.

Enums, `Dims`, loggers and the like stay the real ones. Objects that only the libraries can make are `Fake`s: an
attribute that the class does not have, a write to a read-only property, an argument of another name, number or type
raises as the bindings would. Every call is recorded by name (a reference would keep objects alive). It says nothing of
what TensorRT's C++ side accepts.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

CONSTRUCTED = ("Builder", "Runtime", "OnnxParser")
REAL = (int, float)
NUMBERS = {"SupportsInt": int, "int": int, "SupportsFloat": REAL, "float": REAL, "bool": bool, "str": str}
CONTAINERS = {"tuple": tuple, "list": list}


class HostMemory(bytes):
    """An `IHostMemory`: a buffer with a size."""

    @property
    def nbytes(self) -> int:
        return len(self)


@dataclasses.dataclass
class Signature:
    """One overload: `name(self: T, a: int = 0) -> R`."""

    text: str

    def __post_init__(self):
        arguments, _, returned = self.text.rpartition(") -> ")
        if not arguments:
            arguments, returned = self.text.rpartition(")")[0], "None"
        self.returned = returned.strip()
        self.parameters = []
        for part in _split(arguments.partition("(")[2]):
            name, _, rest = part.partition(": ")
            kind, equals, _ = rest.partition(" = ")
            if name != "self":
                self.parameters.append((name, kind, bool(equals)))

    def refuses(self, stand_in: StandIn, arguments: tuple, keywords: dict) -> str | None:
        """Why a call does not fit, or None."""
        names = [name for name, _, _ in self.parameters]
        if len(arguments) > len(names):
            return f"{len(arguments)} positional arguments for {len(names)}"
        given = dict(zip(names, arguments, strict=False))
        for name, value in keywords.items():
            if name not in names or name in given:
                return f"no argument {name!r}" if name not in names else f"{name!r} given twice"
            given[name] = value
        for name, kind, optional in self.parameters:
            if name not in given:
                if not optional:
                    return f"no value for {name!r}"
            elif not (optional and given[name] is None) and not stand_in.fits(given[name], kind):
                return f"{name!r} is a {type(given[name]).__name__}, not a {kind}"
        return None


def _split(text: str) -> list[str]:
    """Parts between commas that no bracket or quote encloses."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{<":
            depth += 1
        elif character in ")]}>":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


class StandIn:
    """What the code under test sees as the module `tensorrt`.

    Args:
        real: the bindings.
        classes: `trt_bindings.dump(real)`.
        script: values of properties and results of methods, `{"ICudaEngine.num_layers": 3, "Builder.reset": function}`;
            a function is called with the fake object and the arguments. Anything else returns a plausible value.
    """

    def __init__(self, real: ModuleType, classes: dict[str, dict], script: dict[str, Any]):
        self.__dict__.update(_real=real, _classes=classes, _script=script, calls=[])

    def __getattr__(self, name: str) -> Any:
        if name in CONSTRUCTED:
            return lambda *arguments, **keywords: self._construct(name, arguments, keywords)
        return getattr(self._real, name)

    def made(self, name: str) -> Fake:
        """A fake object of a class."""
        return Fake(self, name)

    def _construct(self, name: str, arguments: tuple, keywords: dict) -> Fake:
        signatures = self._classes[name]["members"]["__init__"]["signatures"]
        self.check(name, signatures, arguments, keywords)
        fake = self.made(name)
        self.calls.append(name)
        if name in self._script:
            self._script[name](fake, *arguments, **keywords)
        return fake

    def check(self, name: str, signatures: list[str], arguments: tuple, keywords: dict) -> Signature:
        """The first overload that a call fits; raises TypeError where none does."""
        overloads = [Signature(text) for text in signatures]
        reasons = [overload.refuses(self, arguments, keywords) for overload in overloads]
        if None not in reasons:
            raise TypeError(f"{name}{arguments}{keywords}: {'; '.join(filter(None, reasons))}")
        return overloads[reasons.index(None)]

    def fits(self, value: Any, kind: str) -> bool:
        """Whether pybind11 would take `value` for a parameter of a type."""
        kind = kind.rpartition(".")[2].rpartition("::")[2]
        if isinstance(value, Fake):
            return kind == "object" or kind.removeprefix("I") in {
                name.removeprefix("I") for name in (value.class_name, *self._classes[value.class_name]["bases"])
            }
        if kind == "Buffer":
            return _is_buffer(value)
        if kind in NUMBERS:
            return isinstance(value, NUMBERS[kind]) and (kind == "bool" or not isinstance(value, bool))
        if kind in CONTAINERS:
            return isinstance(value, CONTAINERS[kind])
        if kind == "Dims":
            return isinstance(value, (tuple, list, self._real.Dims)) and all(isinstance(size, int) for size in value)
        if kind == "object":
            return True
        if kind.startswith("Sequence") or kind.endswith("]"):
            return isinstance(value, (list, tuple))
        known = getattr(self._real, kind, None)
        if not inspect.isclass(known):
            raise NotImplementedError(f"a parameter of type {kind}")
        return isinstance(value, known)

    def plausible(self, kind: str) -> Any:
        """Some value of a return type."""
        kind = kind.rpartition(".")[2].rpartition("::")[2]
        if kind == "IHostMemory":
            return HostMemory(b"plan")
        if kind in self._classes and kind != "Dims":
            return self.made(kind)
        known = getattr(self._real, kind, None)
        if hasattr(known, "__members__"):
            return next(iter(known.__members__.values()))
        return {"bool": True, "int": 1, "str": "name", "float": 1.0, "None": None}.get(kind, [])


class Fake:
    """An object of the libraries: the attributes of one class of the bindings and no others."""

    def __init__(self, stand_in: StandIn, class_name: str):
        self.__dict__.update(_stand_in=stand_in, class_name=class_name, _values={}, state={})

    def _member(self, name: str) -> tuple[str, dict]:
        classes = self._stand_in._classes
        for class_name in (self.class_name, *classes[self.class_name]["bases"]):
            member = classes.get(class_name, {"members": {}})["members"].get(name)
            if member is not None:
                return f"{class_name}.{name}", member
        version = self._stand_in._real.__version__
        raise AttributeError(f"TensorRT {version}: {self.class_name} has no attribute {name!r}")

    def __getattr__(self, name: str) -> Any:
        key, member = self._member(name)
        stand_in = self._stand_in
        if "property" in member:
            if name in self._values:
                return self._values[name]
            if key in stand_in._script:
                value = stand_in._script[key]
                return value(self) if isinstance(value, Callable) else value
            return stand_in.plausible(member["signatures"][0].rpartition("->")[2].strip())

        def call(*arguments: Any, **keywords: Any) -> Any:
            overload = stand_in.check(key, member["signatures"], arguments, keywords)
            stand_in.calls.append(key)
            if key not in stand_in._script:
                return stand_in.plausible(overload.returned)
            result = stand_in._script[key]
            return result(self, *arguments, **keywords) if isinstance(result, Callable) else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # a layer is told which layer it is
            if value.__name__ not in self._stand_in._classes:
                raise TypeError(f"{value.__name__} is no class of the bindings")
            self.__dict__["class_name"] = value.__name__
            return
        key, member = self._member(name)
        if member.get("property") != "rw":
            raise AttributeError(f"{key} cannot be set")
        kind = member["signatures"][0].rpartition("->")[2].strip()
        if kind and value is not None and not self._stand_in.fits(value, kind):
            raise TypeError(f"{key} = {value!r}: not a {kind}")
        self._stand_in.calls.append(f"{key}=")
        hook = self._stand_in._script.get(f"{key}=")
        if hook is not None:
            hook(self, value)
        self._values[name] = value


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True
