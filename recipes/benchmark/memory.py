"""Measures the peak memory of a call: what is alive before it, and the most that it allocates on top."""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's library is chatty


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Returns the bytes at the highest point of ``call``, with the tensors that were alive before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _peak_on_cpu(call, device)


def _peak_on_cpu(call: Callable[[], Any], device: torch.device) -> int:
    """Adds up the profiler's record of allocations, since the CPU allocator keeps no peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    current = highest = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        current += event["args"]["Bytes"]
        highest = max(highest, current)
    return highest + alive_bytes(device)


def alive_bytes(device: torch.device) -> int:
    """Returns the bytes of all tensors that are alive now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
