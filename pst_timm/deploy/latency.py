"""How fast models are beside each other, how much memory a fresh process needs for one, and the energy it takes."""
import json
import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn

from pst_timm.models import reparameterize
from pst_timm.utils.errors import PSTError
from pst_timm.utils.timing import Call, median_ratio, time_in_turn

from .runtime import open_source

__all__ = [
    'NOT_MEASURABLE', 'Form', 'Latency', 'compare_latency', 'energy', 'energy_counter', 'in_form', 'make_call',
    'peak_memory_of', 'time_models']

NOT_MEASURABLE = 'not measurable'
POWERCAP = Path('/sys/class/powercap')
STATUS = Path('/proc/self/status')
# what a fresh process imports before it counts, by the ending of what it opens
LIBRARIES = {
    '.onnx': ['onnx', 'onnxruntime'], '.xml': ['openvino'],
    '.json': ['onnx', 'onnxruntime']}  # a cascade, whose stages are files as a rule


class Form(NamedTuple):
    """The form in which torch runs a model. What is exported has the one that it was exported in."""
    reparam: bool = False
    channels_last: bool = False
    dtype: str = 'float32'
    compile: bool = False


class Latency(NamedTuple):
    """How fast a model is."""
    seconds: float
    """Of a batch, median over the rounds."""
    ratio: float
    """Times as fast as the baseline, median over the rounds."""


AS_IT_IS = Form()


def in_form(model: nn.Module, form: Form) -> nn.Module:
    """A model ready for inference in a form; the model itself may be changed."""
    model = reparameterize(model.eval(), inplace=True) if form.reparam else model.eval()
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    model = model.to(dtype=getattr(torch, form.dtype), memory_format=layout)
    return torch.compile(model) if form.compile else model


def make_call(model: Callable[[torch.Tensor], Any], input_size: Sequence[int], batch_size: int = 1) -> Call:
    """An inference of the same random images, in the type and on the device of the model's weights.

    Args:
        model: What takes a batch of images, in inference mode.
        input_size: Channels, height and width.
        batch_size: Images of the batch.
    """
    x = torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))
    weights = (p for p in model.parameters() if p.is_floating_point()) if isinstance(model, nn.Module) else iter(())
    like = next(weights, x)
    x = x.to(like.device, like.dtype)

    def call() -> None:
        with torch.inference_mode():
            model(x)
    return call


def compare_latency(
        models: Mapping[str, Callable[[torch.Tensor], Any]],
        input_size: Sequence[int],
        batch_size: int = 1,
        rounds: int = 30,
        baseline: Optional[str] = None,
        warmup: int = 3,
        tick: Callable[[], object] = lambda: None,
) -> Dict[str, Latency]:
    """How fast models are beside one of them, timed in turn, see `time_models`.

    Args:
        models: By name, in inference mode.
        input_size: Channels, height and width of the images.
        batch_size: Images of a batch.
        rounds: Timed calls of each.
        baseline: What `Latency.ratio` compares with, the first model if None.
        warmup: Rounds before the timed ones.
        tick: Called after each round, for a progress bar.

    Raises:
        ValueError: If there is nothing to time, or no such baseline.
    """
    times = time_models(models, input_size, batch_size, rounds, warmup, tick)
    baseline = next(iter(models)) if baseline is None else baseline
    if baseline not in models:
        raise ValueError(f'The baseline must be one of {", ".join(models)}, got {baseline!r}.')
    return {
        name: Latency(statistics.median(mine), median_ratio(times[baseline], mine)) for name, mine in times.items()}


def time_models(
        models: Mapping[str, Callable[[torch.Tensor], Any]],
        input_size: Sequence[int],
        batch_size: int = 1,
        rounds: int = 30,
        warmup: int = 3,
        tick: Callable[[], object] = lambda: None,
) -> Dict[str, List[float]]:
    """Time models in turn, each right after an untimed call of itself.

    The threads of some runtimes go on spinning for a while, and each model finds the caches full of the one before:
    the untimed call takes what is not the model's own.

    Args:
        models: By name, in inference mode.
        input_size: Channels, height and width of the images.
        batch_size: Images of a batch.
        rounds: Timed calls of each.
        warmup: Rounds before the timed ones.
        tick: Called after each round, for a progress bar.

    Returns:
        Seconds of every timed call, by name, in order.

    Raises:
        ValueError: If there is nothing to time.
    """
    if not models or rounds < 1:
        raise ValueError(f'There is nothing to time: {len(models)} models, {rounds} rounds.')
    calls = {name: make_call(model, input_size, batch_size) for name, model in models.items()}
    return time_in_turn(calls, rounds, warmup, tick, lead_in=1)


# memory

def peak_memory_of(
        source: os.PathLike,
        batch_size: int = 1,
        img_size: Optional[int] = None,
        form: Form = AS_IT_IS,
        **kwargs: Any,
) -> Optional[int]:
    """Bytes that a fresh process needs at most to open a model and run it on a batch, twice.

    Those of Python and of the libraries, which it imports before, do not count.

    Args:
        source: What `open_source` takes, but for models that are open.
        batch_size: Images of the batch.
        img_size: Height and width, the model's own if None.
        form: How torch runs it; an exported model must have the one there is.
        kwargs: For `open_source`; plain values.

    Returns:
        The bytes, or None where the system does not tell.

    Raises:
        PSTError: If the process fails.
    """
    if not STATUS.is_file():
        return None
    asked = dict(
        source=str(source), batch_size=batch_size, img_size=img_size, form=form, kwargs=kwargs,
        threads=torch.get_num_threads())
    code = f'from {__name__} import report_memory; report_memory()'
    # the package as it is here, which may be a checkout that is not installed
    path = [str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')]
    done = subprocess.run(
        [sys.executable, '-c', code], input=json.dumps(asked), capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, path))})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
        raise PSTError(f'The memory of {source} cannot be measured: {reason}')
    return int(done.stdout.splitlines()[-1])


def report_memory() -> None:
    """What the fresh process of `peak_memory_of` does: its order as JSON on standard input, the bytes on the output."""
    order = json.load(sys.stdin)
    source, form, size = order['source'], Form(*order['form']), order['img_size']
    torch.set_num_threads(order['threads'])
    for library in LIBRARIES.get(Path(source).suffix, ()):
        with suppress(ImportError):  # opening the model will tell
            import_module(library)
    before = _status('VmRSS')
    with suppress(OSError):  # or the peak so far counts, if it was higher
        Path('/proc/self/clear_refs').write_text('5')
    model = open_source(source, **order['kwargs'])
    input_size = model.pretrained_cfg['input_size']
    if form != AS_IT_IS:
        model = in_form(model, form)
    call = make_call(model, (input_size[0], size, size) if size else input_size, order['batch_size'])
    call(), call()
    print(_status('VmHWM') - before)


def _status(key: str) -> int:
    """A number of bytes that Linux tells about this process. `getrusage` would tell the peak of the parent instead."""
    return 1024 * int(re.search(rf'^{key}:\s+(\d+) kB', STATUS.read_text(), re.MULTILINE)[1])


# energy

def energy_counter(device: Optional[torch.device] = None) -> Optional[Callable[[], float]]:
    """A real counter of the energy that a processor has taken so far, in joules; None where the machine has none.

    The counter is that of the whole package, so others' work counts too: measure on an idle machine.

    Args:
        device: A GPU, by NVML (which the package nvidia-ml-py reads); else the processor, by Linux's powercap.
    """
    return _nvml_counter(device) if device is not None and device.type == 'cuda' else _powercap_counter()


def _nvml_counter(device: torch.device) -> Optional[Callable[[], float]]:
    try:
        import pynvml
        pynvml.nvmlInit()
        uuid = f'GPU-{torch.cuda.get_device_properties(device).uuid}'
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, or a GPU that does not count: all the same to the reader
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _powercap_counter() -> Optional[Callable[[], float]]:
    try:
        # packages alone: cores, graphics and memory controllers are parts of theirs; `-mmio` counts the same once more
        packages = [
            path for path in sorted(POWERCAP.glob('intel-rapl:*')) if (path / 'name').read_text().startswith('package')]
        ranges = {path: int((path / 'max_energy_range_uj').read_text()) for path in packages}
        last = {path: int((path / 'energy_uj').read_text()) for path in packages}  # on most machines root's alone
    except (OSError, ValueError):
        return None
    if not packages:
        return None
    total = 0

    def read() -> float:
        nonlocal total
        for path in packages:
            now = int((path / 'energy_uj').read_text())
            total += (now - last[path]) % (ranges[path] + 1)  # it starts again at its end
            last[path] = now
        return total / 1e6
    return read


def energy(
        call: Call,
        images: int = 1,
        seconds: float = 2.,
        device: Optional[torch.device] = None,
) -> Optional[float]:
    """Joules of an image, from a counter of the machine; None where it has none (say `NOT_MEASURABLE`).

    What the machine takes at rest is in it. Nothing is ever computed from a rated power.

    Args:
        call: What is measured, such as what `make_call` gives.
        images: Images of a call.
        seconds: How long to run it at least; counters are read once in a millisecond.
        device: Where it runs, see `energy_counter`.
    """
    counter = energy_counter(device)
    if counter is None:
        return None
    call()
    before, start, calls = counter(), time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        call()
        calls += 1
    if device is not None and device.type == 'cuda':
        torch.cuda.synchronize(device)
    return (counter() - before) / (calls * images)
