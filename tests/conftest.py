"""Shared by all tests: the project on the path, Triton's interpreter where there is no GPU, no
network, a tiny policy and a tiny batch, and a way to run a command here or under torchrun."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several small processes; threads would only contend

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels.py is imported

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402

import model as models  # noqa: E402
import rollouts  # noqa: E402
import runtime  # noqa: E402
import toy  # noqa: E402

torch.set_num_threads(1)
# the same examples every time, so that a red run is the change's fault; FUZZ=n draws fresh ones
hypothesis.settings.register_profile("default", derandomize="FUZZ" not in os.environ, database=None)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--runslow"):
        skip = pytest.mark.skip(reason="takes minutes: --runslow, or make test-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


TINY = toy.Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=48)


def write_policy(folder, seed=0, noise=0.3):
    """A random policy folder with the toy's tokenizer, its weights loud enough to matter."""
    toy.write_initial_policy(folder, toy.Config(output="", seed=seed, shape=TINY))
    model = models.load(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator)
                * noise
                * parameter.std().nan_to_num(1.0)
            )
    models.save(model, folder)
    return folder


def loud(network):
    """Random weights under which every part of a layer matters."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.normal_(std=1.0 if "embed" in name else 0.8 / math.sqrt(p[0].numel()))


def write_hybrid(folder, seed=0):
    """The same with Qwen3.5's layers: three gated DeltaNet of a single head (fewer than ranks), one
    of attention; an untied head."""
    source = folder.with_name(folder.name + ".source")
    toy.write_initial_policy(source, toy.Config(output="", seed=seed, shape=TINY))
    (source / "model.safetensors").unlink()
    config = json.loads((source / "config.json").read_text()) | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    model = models.Transformer(models.read_config(source))
    model.source = source
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, p in model.named_parameters():
            loud = 1.0 if "embed" in name or p.ndim == 3 else 1.5 / p.shape[-1] ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else loud))
            if name.endswith("linear_attn.norm.weight"):
                p.add_(1.0)
    models.save(model, folder)
    return folder


def write_batch(folder, policy, *, prompts=8, n=4, seed=0, header=(), **columns):
    """Random tokens and rewards, `n` responses to each of `prompts`, as from `policy`."""
    g = torch.Generator().manual_seed(seed)
    rows = {
        "tokens": [],
        "prompt_length": [],
        "prompt": [],
        "reward": [],
        "finished": [],
        "sampler_logp": [],
    }
    for p in range(prompts):
        start = torch.randint(
            1, 23, (int(torch.randint(2, 6, (1,), generator=g)),), generator=g
        ).tolist()
        for j in range(n):
            response = torch.randint(
                1, 23, (int(torch.randint(1, 14, (1,), generator=g)),), generator=g
            ).tolist()
            rows["tokens"].append(start + response)
            rows["prompt_length"].append(len(start))
            rows["prompt"].append(p)
            rows["reward"].append(float((p + j) % 2 if j < 2 else torch.rand(1, generator=g) < 0.5))
            rows["finished"].append(j != n - 1)
            rows["sampler_logp"].append([0.0] * len(start) + [-1.0] * len(response))
    rows |= columns
    header = {
        "policy": str(policy),
        "fingerprint": models.fingerprint(policy),
        "temperature": 1.0,
        "source": "import",
        "shards": 1,
    } | dict(header)
    rollouts.write_shard(folder, 0, header, **rows)
    return folder


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="session")
def batch(tmp_path_factory, policy):
    return write_batch(tmp_path_factory.mktemp("batch") / "batch", policy)


@pytest.fixture
def run(monkeypatch):
    """run(module, "key=value", ...): the command's main() in this process, as one rank."""

    def call(module, *overrides, config=None):
        argv = [
            module.__file__,
            *(["--config", str(config)] if config else []),
            "--set",
            *map(str, overrides),
        ]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # float32, and ranks enough
        try:
            module.main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            runtime.unlock()

    return call


def exact_kl(p, q, batch):
    """KL(p || q) over the vocabulary at every response token of a batch, of two folders."""
    micro = rollouts.micro_batch(batch, range(len(batch)))
    table = []
    for folder in (p, q):
        model = models.load(folder, dtype=torch.float32)
        with torch.no_grad():
            hidden = model(micro.tokens, micro.cu_seqlens)[micro.scored - 1]
            table.append((hidden @ model.head.T).double().log_softmax(1))
    return (table[0].exp() * (table[0] - table[1])).sum(1)


def command(script, *overrides, ranks=1, config=None, env=(), **options):
    """The same as a subprocess: plain python for one rank, torchrun for several."""
    launch = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
    )
    arguments = [*(["--config", str(config)] if config else []), "--set", *map(str, overrides)]
    return subprocess.run(
        [*launch, str(ROOT / script), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **dict(env)},
        timeout=300,
        **options,
    )


def weights(folder):
    return {
        name: p.detach() for name, p in models.load(folder, dtype=torch.float32).named_parameters()
    }


def same_bits(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def movement_error(a, b, start):
    """||a - b|| over the distance moved from `start`, and at once over ||a||.

    AdamW divides by sqrt(v), so a weight whose gradient is all rounding moves by rounding; over
    the whole movement that stays small.
    """
    a, b, start = (
        torch.cat([w.flatten() for w in weights(x).values()]).double() for x in (a, b, start)
    )
    assert (a - b).norm() <= 1e-5 * a.norm()
    return float((a - b).norm() / (a - start).norm())
