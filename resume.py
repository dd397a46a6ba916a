"""resume.py - what a stopped run goes on from: weights and optimiser, sharded as they are.

torch.distributed.checkpoint writes every rank's part and joins the parts again for any number of
ranks. It does so as safetensors, since the index of its usual format is a pickle, and its reader
is trusted with nothing: that the parts are whole and fit is checked before it reads (it would
leave what is missing as it is), that they hold weights and moments, afterwards.
"""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import durable
import hf
import model as models

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, float32


def save(folder, model, optimizer):
    """Write the state into a folder. Every rank calls this; OSError if the disk does not take it.
    """
    state = {}
    for name, parameter in model.named_parameters():
        state["weight." + name] = parameter.detach()
        state |= {f"{kind}.{name}": optimizer.state[parameter][kind]
                  for kind in ("step", *MOMENTS)}
    with _one_error():
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(
            str(folder), save_distributed=True))


def load(folder, model, optimizer, *, weights=True):
    """Read it into a model and an optimiser that has not stepped yet; without `weights` only the
    optimiser's part. Every rank calls this. ValueError names the file or folder that is damaged.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if weights:
            state["weight." + name] = parameter.detach()
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **{
            kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS}}
        state |= {f"{kind}.{name}": x for kind, x in optimizer.state[parameter].items()}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with hf.tensors(file):  # its header is sound
            pass
    reader = dcp.HuggingFaceStorageReader(str(folder))
    remedy = ("delete it, to start from the beginning" if weights
              else "name a run of the same model as optimizer")
    with durable.reading(folder, remedy), _one_error():
        saved = reader.read_metadata().state_dict_metadata
        for name, tensor in state.items():
            durable.require(name in saved, f"{name} is missing")
            shape, dtype = list(saved[name].size), saved[name].properties.dtype
            durable.require(shape == list(tensor.shape) and dtype == tensor.dtype,
                            f"{name} is {dtype} {shape}, not {tensor.dtype} {list(tensor.shape)}")
            rows = sum(math.prod(chunk.sizes) for chunk in saved[name].chunks)
            durable.require(rows == tensor.numel(), f"{name} is not whole: a part is missing, or "
                                                    "there is one too many")
        dcp.load(state, storage_reader=reader)
        for name, tensor in state.items():
            local = models.own_rows(tensor)[0] if tensor.ndim else tensor
            least = {"step": 1.0, "exp_avg_sq": 0.0}.get(name.partition(".")[0], -math.inf)
            durable.require(bool(local.isfinite().all()) and bool((local >= least).all()),
                            f"{name} holds what no run has")


@contextmanager
def _one_error():
    """torch gathers what went wrong on each rank; the first of it is the error."""
    try:
        yield
    except CheckpointException as failed:
        error, _ = next(iter(failed.failures.values()))
        raise (error if isinstance(error, OSError | ValueError)
               else ValueError(f"{type(error).__name__}: {error}")) from None
