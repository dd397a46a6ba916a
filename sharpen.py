"""sharpen.py - plain temperature sampling as a policy: the control that needs no training.

At temperature tau the base's next-token distribution is softmax(logits / tau). Part of what RL
gains may be no more than that: the most likely tokens made likelier. Here it becomes checkpoints,
whose accuracy and KL evaluate.py measures like any other's:

    logits / tau = (norm(h) * g / tau) @ head.T            only the last norm's weight g changes

    python sharpen.py --config configs/toy/sharpen.toml    # step_000080 is temperature 0.80
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

import durable
import model as models
import options
import runtime
from options import key


@dataclass(frozen=True)
class Config:
    policy: str = key(help="checkpoint folder")
    output: str = key(help="run folder: step_* are temperatures in percent")
    temperatures: list[float] = key([0.9, 0.8, 0.7, 0.6], "of each checkpoint, hundredths")

    def __post_init__(self):
        for tau in self.temperatures:
            options.in_range("temperatures", tau, least=0.01, most=100)
            if abs(100 * tau - round(100 * tau)) > 1e-9:
                raise ValueError(f"temperatures: {tau} is not a whole number of hundredths")


@torch.no_grad()
def sharpen(model, temperature):
    """Divide the logits of a Transformer by a temperature, in place."""
    norm = model.model.norm
    shift = 1.0 if norm.zero_centred else 0.0  # such norms multiply by 1 + w
    norm.weight.copy_((norm.weight + shift) / temperature - shift)


def main():
    cfg = options.parse(Config, __doc__)
    ranks = runtime.start()
    runtime.lock(cfg.output, ranks)
    made_of = {"policy": runtime.fingerprint(cfg.policy, ranks), "temperatures": cfg.temperatures}
    if ranks.rank:
        return
    file = Path(cfg.output) / "run.json"
    if file.exists() and durable.read_object(file, policy=str, temperatures=list) != made_of:
        raise ValueError(f"{cfg.output}: holds another policy's, or other temperatures; choose "
                         "another output or delete it")
    durable.write_text(file, json.dumps(made_of))
    for tau in cfg.temperatures:
        folder = Path(cfg.output) / f"step_{round(100 * tau):06d}"
        if not folder.exists():
            model = models.load(cfg.policy, dtype=torch.float32)
            sharpen(model, tau)
            models.save(model, folder)
        print(f"{folder}: {cfg.policy} at temperature {tau}", flush=True)


if __name__ == "__main__":
    runtime.command(main)
