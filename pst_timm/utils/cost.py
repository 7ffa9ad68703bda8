"""What a model costs: multiply-adds, activations, memory."""
import copy
import os
from typing import Any, Callable, Dict, Sequence, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.conv import _ConvNd
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .devices import total_memory
from .errors import PSTError
from .timing import Call

__all__ = [
    'check_image_memory', 'count_activations', 'count_gmacs', 'layer_gmacs', 'measure_activations', 'peak_memory',
    'weight_bytes',
]

LEAST_BYTES = 3 * 4 + 64 // 4 * 4  # of a pixel: the image, and the first maps of a network, in single precision


def check_image_memory(img_size: int, batch_size: int = 1) -> None:
    """Make sure, before the work, that images of a size are not far beyond this machine.

    Args:
        img_size: Height and width.
        batch_size: Images at a time.

    Raises:
        PSTError: If not even the images and the first maps of a network would fit.
    """
    least, present = batch_size * img_size ** 2 * LEAST_BYTES, total_memory(torch.device('cpu'))
    if least > present:
        images = f'{batch_size} images' if batch_size > 1 else 'An image'
        raise PSTError(
            f'{images} of {img_size} x {img_size} px would take {least / 2 ** 30:,.0f} GiB or more, and this machine '
            f'has {present / 2 ** 30:,.0f}: choose a smaller size.')


def count_gmacs(model: nn.Module, input_size: Sequence[int]) -> float:
    """Multiply-accumulates of one image (channels, height, width) in billions."""
    # on this device every operation has a count, whichever kernel would run elsewhere
    # and nothing asks for a gradient: the counter would look for one where a parameter is the input of a module
    model = copy.deepcopy(model).to('meta').eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *input_size, device='meta', dtype=next(model.parameters()).dtype))
    return counter.get_total_flops() / 2e9


def layer_gmacs(model: nn.Module, input_size: Sequence[int]) -> Dict[str, float]:
    """The part of `count_gmacs` of each convolution and linear layer, by name."""
    model = copy.deepcopy(model).to('meta').eval().requires_grad_(False)
    found: Dict[str, float] = {}

    def count(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            found[name] = found.get(name, 0.) + output.numel() * module.weight[0].numel() / 1e9
        return hook

    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        model(torch.zeros(1, *input_size, device='meta', dtype=next(model.parameters()).dtype))
    return found


def peak_memory(call: Call, device: torch.device) -> int:
    """Largest amount of memory, in bytes, that a call holds beyond what was allocated before it."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # its messages about itself, and about GPUs that are not there, are above every level that it knows
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    held = peak = 0
    # every allocation and release of the CPU allocator, kernels' own scratch space included
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class _CountActivations(TorchDispatchMode):
    """Adds up the outputs of convolutions, matrix products and attention."""
    OPS = ('convolution', 'addmm', 'mm', 'bmm', 'baddbmm', 'scaled_dot_product')

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.lstrip('_')
        if name in self.OPS or name.startswith('scaled_dot_product'):
            size = (out[0] if isinstance(out, tuple) else out).numel()
            self.total, self.largest = self.total + size, max(self.largest, size)
        return out


def count_activations(call: Call) -> int:
    """Elements that the convolutions, matrix products and attentions of a call put out."""
    return measure_activations(call)[0]


def measure_activations(call: Call) -> Tuple[int, int]:
    """The elements of `count_activations`, and how many of them the largest tensor holds."""
    with torch.no_grad(), _CountActivations() as counter:
        call()
    return counter.total, counter.largest


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights and buffers of a model, whatever else would lie beside them in a file."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())
