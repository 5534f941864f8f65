"""CUDA graphs without a GPU: what a step does is recorded once, and a replay does it again without the step's code.

As on a GPU, a replay knows nothing of Python: each operation and each Triton launch is repeated with the tensors,
shapes, numbers and grid that it was recorded with. So what a step decides on the host is baked in, and if that was
wrong for a later batch its tokens are wrong. Beyond that, refused at the recording: operations for which a GPU would be
waited for, or whose results' shapes depend on numbers, and tensors made on the host. At a replay: tensors that the
graph reads and that are gone. What was allocated and not written is poisoned.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

T = TypeVar("T")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "equal", "is_nonzero")
WAITING_METHODS = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class CannotRecord(RuntimeError):
    """A GPU could not capture this."""


@dataclass(frozen=True)
class Result:
    """Stands for a tensor that an earlier operation of the tape gave."""

    operation: int
    place: int


@dataclass
class Operation:
    run: Callable[..., Any]
    args: Any
    kwargs: Any
    poisoned: bool


@dataclass
class Tape:
    """The operations of one step, in order; tensors of outside are held weakly, as a GPU holds them."""

    operations: list[Operation] = field(default_factory=list)
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Triton kernels and their grids."""
    outside: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    constants: list[Tensor] = field(default_factory=list)

    def replay(self) -> list[list[Tensor]]:
        """The results of every operation."""
        results: list[list[Tensor]] = []

        def found(reference: Any) -> Any:
            if isinstance(reference, Result):
                return results[reference.operation][reference.place]
            tensor = self.outside[reference.id]()
            assert tensor is not None, "a tensor that the graph reads is gone"
            return tensor

        for operation in self.operations:
            args, kwargs = tree_map_only((Result, Outside), found, (operation.args, operation.kwargs))
            out = operation.run(*args, **kwargs)
            if operation.poisoned:
                poison(out)
            results.append(tensors(out))
        return results


@dataclass(frozen=True)
class Outside:
    """Stands for a tensor that was there before the recording."""

    id: int


class Recorder(TorchDispatchMode):
    """Writes a tape."""

    def __init__(self) -> None:
        super().__init__()
        self.tape = Tape()
        self.known: dict[int, Result] = {}
        self.launching = False
        self.alive: list[Any] = []
        """So that no id is used twice."""
        known = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.layout == torch.strided]
        self._memory = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS and func._overloadname != "self_int":  # repeat_interleave by one number
            raise CannotRecord(f"{name} waits for the device, or has a shape that depends on numbers")
        if name == "index" and any(t.dtype == torch.bool for t in tensors(args[1])):
            raise CannotRecord("an index of booleans has a shape that depends on numbers")
        return self.record(func, args, kwargs or {}, name in ALLOCATIONS)

    def record(self, run: Callable[..., Any], args: Any, kwargs: Any, poisoned: bool = False) -> Any:
        referred = tree_map_only(Tensor, self._reference, (args, kwargs))
        out = run(*args, **kwargs)
        if poisoned:
            poison(out)
        for place, tensor in enumerate(tensors(out)):
            self.known.setdefault(id(tensor), Result(len(self.tape.operations), place))
        self.alive += [args, kwargs, out]
        self.tape.operations.append(Operation(run, referred[0], referred[1], poisoned))
        return out

    def _reference(self, tensor: Tensor) -> Result | Outside:
        if id(tensor) in self.known:
            return self.known[id(tensor)]
        constant = tensor.dim() == 0 and tensor.device.type == "cpu"  # a number, which a GPU is given as such
        if tensor.numel() and not constant and tensor.untyped_storage().data_ptr() not in self._memory:
            raise CannotRecord(f"a tensor of shape {tuple(tensor.shape)} was made on the host")
        if constant:
            self.tape.constants.append(tensor)
        self.tape.outside[id(tensor)] = weakref.ref(tensor)
        return Outside(id(tensor))


def tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def poison(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**20))


class RecordedGraphs:
    """A decode_graphs.Capture. kernels: (module, names) of Triton kernels that are launched from there."""

    def __init__(self, kernels: Sequence[tuple[ModuleType, Sequence[str]]]) -> None:
        self.kernels = kernels
        self.tapes: list[Tape] = []
        self.replays = 0

    def __call__(self, step: Callable[[], T]) -> tuple[Callable[[], object], T]:
        if not self.tapes:  # what is made in the first step is there for all
            step()
        recorder = Recorder()
        with self._launches_recorded(recorder), recorder:
            result = step()
        recorder.alive.clear()
        places = [(recorder.known[id(tensor)], tensor) for tensor in tensors(result)]
        tape = recorder.tape
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            made = tape.replay()
            for place, tensor in places:
                tensor.copy_(made[place.operation][place.place])

        return replay, result

    @contextmanager
    def _launches_recorded(self, recorder: Recorder) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module, names in self.kernels:
                for name in names:
                    patch.setattr(module, name, _Kernel(name, getattr(module, name), recorder))
            originals = {name: getattr(Tensor, name) for name in WAITING_METHODS}
            for name, original in originals.items():
                patch.setattr(Tensor, name, _refused(name, original, recorder))
            yield


@dataclass
class _Kernel:
    """Stands before a kernel of Triton."""

    name: str
    kernel: Any
    recorder: Recorder

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **constants: Any) -> None:
            self.recorder.launching = True  # the interpreter may read what it likes
            with _disable_current_modes():
                self.kernel[grid](*args, **constants)
            self.recorder.launching = False

        def launch(*args: Any, **constants: Any) -> None:
            self.recorder.tape.launches.append((self.name, grid))
            self.recorder.record(run, args, constants)

        return launch


def _refused(name: str, original: Any, recorder: Recorder) -> Any:
    def method(*args: Any, **kwargs: Any) -> Any:
        if not recorder.launching:
            raise CannotRecord(f"{name} waits for the device")
        return original(*args, **kwargs)

    return method
