"""Pictures whose edges meet: networks with convolutions that go around in x, in y, or in both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError


@contextmanager
def seamless(*networks: nn.Module, x: bool = True, y: bool = True) -> Iterator[None]:
    """Inside, what the convolutions of these networks see beyond an edge is the opposite edge.

    For U-Nets and autoencoders of pictures; both need it, or seams stay. x, y: along the width, the height.
    Values and names of parameters are untouched, and on leaving, by an error too, the paddings are what they
    were. Not to be entered twice at once for the same network, nor while another thread uses it. Raises
    InputError for a network of other than two dimensions.
    """
    with ExitStack() as undo:
        for network in networks if x or y else ():
            for name, module in list(network.named_modules()):
                if isinstance(module, nn.Conv1d | nn.Conv3d) and max(module.kernel_size) > 1:
                    raise InputError(f"{name} is no convolution of pictures, so there are no edges to join.")
                if isinstance(module, nn.Conv2d):
                    _around(module, x, y, undo)
                elif isinstance(module, nn.ZeroPad2d):
                    _wrapped(network, name, module, x, y, undo)
        yield


def _around(conv: nn.Conv2d, x: bool, y: bool, undo: ExitStack) -> None:
    """Let the input be padded around, and the convolution itself where it is not."""
    given = conv.padding
    if isinstance(given, str) or conv.padding_mode != "zeros" or max(given) == 0:
        return
    rows, columns = given
    around = (columns if x else 0,) * 2 + (rows if y else 0,) * 2

    def pad(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.pad(inputs[0], around, mode="circular"), *inputs[1:])

    undo.callback(conv.register_forward_pre_hook(pad).remove)
    undo.callback(setattr, conv, "padding", given)
    conv.padding = (0 if y else rows, 0 if x else columns)


def _wrapped(network: nn.Module, name: str, pad: nn.ZeroPad2d, x: bool, y: bool, undo: ExitStack) -> None:
    """Put a padding that goes around in the place of one that adds zeros."""
    left, right, top, bottom = pad.padding
    parent, _, own = name.rpartition(".")
    holder = network.get_submodule(parent)
    circular = nn.CircularPad2d((left if x else 0, right if x else 0, top if y else 0, bottom if y else 0))
    zeros = nn.ZeroPad2d((0 if x else left, 0 if x else right, 0 if y else top, 0 if y else bottom))
    undo.callback(setattr, holder, own, pad)
    setattr(holder, own, nn.Sequential(circular, zeros))
