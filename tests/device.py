"""A device that has no float64, as a Mac's GPU: simulated on the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # the name of one that every build of torch knows


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the device, and holds its values on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=DEVICE)

    def __init__(self, values: torch.Tensor):
        assert values.dtype != torch.float64, "the device has no float64"
        self.values = values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("enter `WithoutFloat64` first")


class WithoutFloat64(TorchDispatchMode):
    """Inside it `to(DEVICE)` and `device=DEVICE` work. What would be float64 there fails, and so does what mixes devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        here = any(isinstance(value, OnDevice) for value in given)
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        elif here and not func.__name__.startswith(("copy_", "index")):
            elsewhere = [value for value in given if not isinstance(value, OnDevice) and value.ndim > 0]
            assert not elsewhere, f"{func} of tensors on two devices"
        result = func(*tree_map(_values_of, args), **tree_map(_values_of, kwargs))
        originals = {id(_values_of(value)): value for value in given}

        def place(value):
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in originals:  # changed in place
                return originals[id(value)]
            return OnDevice(value) if here else value

        return tree_map(place, result)


def _values_of(value):
    return value.values if isinstance(value, OnDevice) else value
