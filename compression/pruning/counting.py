"""Count what a torch module computes for one example; needs torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prunecast.compression.pruning.operations import Operations, Tally, contracted

__all__ = ["count_operations", "parameter_count"]

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_PRODUCTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ("input", "other")),
    **dict.fromkeys((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), ("input", "mat2")),
    **dict.fromkeys((torch.mv, Tensor.mv), ("input", "vec")),
    **dict.fromkeys((torch.dot, Tensor.dot), ("input", "tensor")),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ("input", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ("input", "batch1", "batch2")),
}
"""Products of matrices, and their arguments, the factors last."""
_RECURRENT = {getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
_CELLS = {
    getattr(torch._VF, name) for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
}


def parameter_count(module: nn.Module) -> int:
    """How many parameters a module has; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_operations(module: nn.Module, example: tuple[Tensor, ...]) -> Operations:
    """Run a module on one example and count, whatever layers or functions it computes with.

    Weights are told by where they lie in memory, so that tied ones are one, and those that a
    function uses without a layer count, too.

    Args:
        module: in any mode; left as it was.
        example: positional inputs, the batch first; the first example alone is run.

    Raises:
        Exception: whatever the module raises on the example.
    """
    counter = _Counter(module.state_dict(keep_vars=True))
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), counter:
            module(*(x[:1] for x in example))
    finally:
        for part in training:
            part.training = True
    return counter.found()


class _Counter(TorchFunctionMode):
    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self._names: dict[tuple[int, int], str] = {}
        self._sizes: dict[str, int] = {}
        self._within: dict[int, str] = {}  # of a layer's weights that it uses a part at a time
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._names.setdefault(_place(tensor), name)
                self._within.setdefault(_place(tensor)[0], name)
                self._sizes[name] = tensor.numel()
        self._tally = Tally()

    def found(self) -> Operations:
        """What has been counted."""
        return self._tally.found(self._sizes.__getitem__)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and count it."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func is functional.linear:
            given, weight = _arguments(args, kwargs, "input", "weight")
            name = self._name(weight) or self._within.get(_place(weight)[0])
            self._tally.add(name, weight.numel() * (given.numel() // weight.shape[-1]))
            self._move(given, made)
        elif func in _CONVOLUTIONS or func in _TRANSPOSED:
            given, weight = _arguments(args, kwargs, "input", "weight")
            # a kernel is used at every place of what has its channels next to the places
            last = given if func in _TRANSPOSED else made
            width = last.shape[-(weight.dim() - 1)]
            self._add(weight, weight.numel() * (last.numel() // width))
            self._move(given, made)
        elif func in _PRODUCTS:
            first, second = _arguments(args, kwargs, *_PRODUCTS[func])[-2:]
            self._multiply(first, second, made.numel() * first.shape[-1])
            self._move(first, second, made)
        elif func is torch.einsum and len(args) >= 3 and isinstance(args[1], Tensor):
            pairs = contracted(args[0], [factor.shape for factor in args[1:3]])
            self._multiply(args[1], args[2], made.numel() * pairs)
            self._move(*args[1:3], made)
        elif func is functional.scaled_dot_product_attention:
            query, key, value = _arguments(args, kwargs, "query", "key", "value")
            pairs = query.numel() // query.shape[-1] * key.shape[-2]
            self._tally.add(None, pairs * (query.shape[-1] + value.shape[-1]))
            self._move(query, key, value, made)
        elif func is functional.multi_head_attention_forward:
            self._attend(func, args, kwargs)
            self._move(*_arguments(args, kwargs, "query", "key", "value"), made[0])
        elif func in _RECURRENT:
            self._recur(args)
            self._move(args[0], made[0])
        elif func in _CELLS:
            for weight in args[2:4]:
                self._add(weight, weight.numel())
        elif func is functional.embedding:
            self._move(made)
        return made

    def _name(self, tensor: Tensor) -> str | None:
        return self._names.get(_place(tensor))

    def _add(self, weight: Tensor, macs: int) -> None:
        self._tally.add(self._name(weight), macs)  # a constant, or computed of several, has none

    def _multiply(self, first: Tensor, second: Tensor, macs: int) -> None:
        self._add(first if self._name(first) is not None else second, macs)

    def _move(self, *tensors: Tensor) -> None:
        self._tally.move(sum(t.numel() for t in tensors if self._name(t) is None))

    def _attend(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        query, key, value = given["query"], given["key"], given["value"]
        width, rows = query.shape[-1], [t.numel() // t.shape[-1] for t in (query, key, value)]
        if given.get("use_separate_proj_weight"):
            for part, count in zip("qkv", rows, strict=True):
                weight = given[f"{part}_proj_weight"]
                self._add(weight, weight.numel() * count)
        else:
            self._add(given["in_proj_weight"], width * width * sum(rows))
        weight = given["out_proj_weight"]
        self._add(weight, weight.numel() * rows[0])
        self._tally.add(None, 2 * rows[0] * key.shape[0] * width)  # steps come first here

    def _recur(self, args: tuple[Any, ...]) -> None:
        packed = isinstance(args[3], tuple | list)  # else it is whether there are biases
        weights = args[3] if packed else args[2]
        steps = int(args[1].sum()) if packed else args[0].numel() // args[0].shape[-1]
        for weight in weights:
            if weight.dim() == 2:
                self._add(weight, weight.numel() * steps)


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor.numel()


def _arguments(args: tuple[Any, ...], kwargs: Any, *names: str) -> list[Any]:
    """The first arguments of a function, by whatever way they were given."""
    return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
