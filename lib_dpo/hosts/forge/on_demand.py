"""A tensor that is made anew each time that something is computed with it: it takes no memory while it waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class OnDemand(Tensor):
    """A float32 tensor on the CPU by its shape alone, and what makes it.

    Hosts keep the patches of a bake for as long as the model is loaded, but read them only while they merge. Whatever torch
    computes with this one begins with making it; what comes out are plain tensors. A wrapper subclass, see
    https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-native-api
    """

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], make: Callable[[], Tensor]) -> OnDemand:
        self: OnDemand = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32)
        self.make = make
        return self

    def __init__(self, shape: Sequence[int], make: Callable[[], Tensor]) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's stub has no name for its keyword
        return f"OnDemand({tuple(self.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results stay plain tensors

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch's own notes write it
        cls, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*map(_made, args), **{name: _made(value) for name, value in (kwargs or {}).items()})


def _made(value: Any) -> Any:
    if isinstance(value, OnDemand):
        return value.make()
    return [_made(each) for each in value] if isinstance(value, (list, tuple)) else value
