"""A device that is not there: tensors that say they are elsewhere while a CPU holds them, and
refuse to be mixed.

It stands in for a GPU where none is: what forgets to move a tensor to the model's device fails here
as it would there.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")  # the one device that autograd knows and no machine has to have
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
TAKES_INDICES = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; `held` is where it really is."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        shape = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **shape, device=ELSEWHERE)

    def __init__(self, held: torch.Tensor):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, _types, arguments=(), named=None):
        return run(operator, arguments, named or {})


class Factories(TorchDispatchMode):
    """While it is on, tensors made for the pretended device are Elsewhere."""

    def __torch_dispatch__(self, operator, _types, arguments=(), named=None):
        return run(operator, arguments, named or {})


class Functions(TorchFunctionMode):
    """What is lost on its way down to __torch_dispatch__: literals are made here and moved, spectra
    are made here.
    """

    def __torch_function__(self, function, _types, arguments=(), named=None):
        named = named or {}
        if function in (torch.tensor, torch.as_tensor) and named.get("device") == ELSEWHERE:
            return function(*arguments, **{**named, "device": None}).to(ELSEWHERE)
        if function is torch.stft and isinstance(arguments[0], Elsewhere):
            check(function, arguments, named)
            here = tree_map(
                lambda x: x.cpu() if isinstance(x, Elsewhere) else x, (arguments, named)
            )
            return function(*here[0], **here[1]).to(ELSEWHERE)
        return function(*arguments, **named)


class Generator(torch.Generator):
    """A generator of any device, the pretended one too."""

    def __new__(cls, device=None):
        return super().__new__(cls)


def check(operator, arguments, named) -> list[Elsewhere]:
    """The tensors that are elsewhere. Raises RuntimeError where they meet others, as a GPU would.

    Single numbers and indices may come from the CPU.
    """
    tensors = [x for x in tree_flatten((arguments, named))[0] if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [tuple(x.shape) for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    indexed = operator in TAKES_INDICES and isinstance(arguments[0], Elsewhere)
    if away and here and not indexed and operator not in MOVES:
        raise RuntimeError(f"{operator}: tensors on two devices, {here} on the CPU")
    return away


def run(operator, arguments, named):
    """Do on the CPU what was asked for elsewhere."""
    away, asked = check(operator, arguments, named), named.get("device")
    if asked is not None:
        away, named = torch.device(asked) == ELSEWHERE, {**named, "device": "cpu"}
    made = operator(*tree_map(held, arguments), **tree_map(held, named))
    if operator._schema.name.endswith("_"):  # in place
        return arguments[0]
    return (
        tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, made)
        if away
        else made
    )


def held(value):
    return value.held if isinstance(value, Elsewhere) else value
