"""measure.py - what the benchmarks share: a clock, the machine's ceilings, one table at the end.

Times are medians of warmed calls, between two events in the GPU's stream; without a GPU the wall
clock serves, so that the scripts can be tried. Ratios are taken to what the same run reached on
this machine: a device copy and a square bfloat16 product.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's own files

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "verl")


def parser(text, repeats, tokens=(8192, 32768)):
    """The options that all benchmarks have; a script adds its own. `tokens` None: not that one."""
    options = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if tokens:
        options.add_argument("--tokens", type=int, nargs="+", default=[*tokens])
    options.add_argument("--repeats", type=int, default=repeats, help="timed calls of each row")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--tiny", action="store_true",
                         help="small shapes, to try the script; a CPU will do")
    options.add_argument("--json", metavar="FILE", help="append a record a row to this file")
    return options


def begin(args):
    """Seed, and stop where there is nothing to measure on."""
    if not CUDA and not args.tiny:
        sys.exit("error: no CUDA GPU here; --tiny runs small shapes on a CPU, to try the script")
    torch.manual_seed(args.seed)


def mark():
    """A point in time: an event in the GPU's stream, or the clock's reading in seconds."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def median(spans):
    """Milliseconds: the median of (mark before, mark after)."""
    if not CUDA:
        return statistics.median(1e3 * (after - before) for before, after in spans)
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in spans)


def milliseconds(call, repeats, warmup=3):
    """The median time of a call."""
    for _ in range(warmup):
        call()
    spans = []
    for _ in range(repeats):
        before = mark()
        call()
        spans.append((before, mark()))
    return median(spans)


def with_extra_memory(call):
    """(the tensors a call returns, bytes it held at most beyond them and what was there before).

    None for the bytes without a GPU.
    """
    if not CUDA:
        return call(), None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tensors = call()
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in tensors)
    return tensors, torch.cuda.max_memory_allocated() - before - returned


def ceilings(tiny):
    """What this machine reaches, and which it is: for every row's record."""
    side, numbers = (256, 1 << 20) if tiny else (8192, 1 << 30)
    source = torch.randn(numbers, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(partial(target.copy_, source), 10) * 1e3
    del source, target
    a, b = torch.randn(2, side, side, device=DEVICE).to(DTYPE)
    out = torch.empty_like(a)
    product = 2 * side**3 / milliseconds(partial(torch.mm, a, b, out=out), 20) * 1e3
    del a, b, out
    free()
    return {"machine": machine(), "copy_tb_s": copy / 1e12, "product_tflop_s": product / 1e12,
            "product_side": side}


def attempt(name, call):
    """What a call returns, or None after one line that says why there is nothing."""
    try:
        return call()
    except ImportError as error:
        reason = f"not installed ({error})"
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # a peer may fail in any way; the others are measured still
        reason = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}"
    print(f"{name}: {reason}", flush=True)
    return None


def free():
    """Let go of what a finished or failed row held."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def machine():
    """The device and the versions of what ran on it, in one line."""
    name = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, wall clock"
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    return ", ".join((name, f"python {platform.python_version()}", *versions))


def number(value, form):
    return "" if value is None else format(value, form)


def finish(rows, records, limits, file):
    """Print rows ({column: text}) as a markdown table and the machine under it; append records
    ({key: value}) to a file of JSON lines.
    """
    print()
    head = [[*rows[0]], ["---"] * len(rows[0])] if rows else []
    for cells in (*head, *(row.values() for row in rows)):
        print("| " + " | ".join(cells) + " |")
    print(f"\n{limits['machine']}; device copy {limits['copy_tb_s']:.2f} TB/s, product of side "
          f"{limits['product_side']} {limits['product_tflop_s']:.1f} TFLOP/s", flush=True)
    if file:
        with open(file, "a") as out:
            out.writelines(json.dumps(record | limits) + "\n" for record in records)
