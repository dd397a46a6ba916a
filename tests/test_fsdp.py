"""A policy sharded over ranks is the policy of one process: values, gradients, the step, the folder
written; and no rank ever holds more than its share.

What runs on the ranks is the lower half of this file, started by torchrun (gloo, CPU); what it
leaves in a folder is compared here with the same computed without sharding.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402

import model as models  # noqa: E402
import runtime  # noqa: E402

MIB = 2**20
LENGTHS = [9, 2, 30, 5, 17, 4, 11, 3]  # of the packed sequences; a rank takes every second one
LR, CLIP = 1e-2, 0.5

# ---------------------------------------------------------------- checkpoints, as published

# nothing divides by two ranks, let alone four: rows of 3, 1, 61, 21 ...
QWEN3_5 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": 61,
        "hidden_size": 21,
        "intermediate_size": 19,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 7,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
ONE_HEAD = {  # A_log, dt_bias and in_proj_a have one row: the second rank has none
    **QWEN3_5,
    "tie_word_embeddings": True,
    "text_config": QWEN3_5["text_config"]
    | {"linear_num_value_heads": 1, "num_hidden_layers": 2}
    | {"layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 1},
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "tie_word_embeddings": True,
    "vocab_size": 67,
    "hidden_size": 23,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 6,
}
SHAPES = {"qwen3_5": QWEN3_5, "one_head": ONE_HEAD, "qwen3": QWEN3}
BIG = {  # 101 million weights: 202 MB in bfloat16, 404 MB in float32
    **QWEN3,
    "tie_word_embeddings": False,
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def stored_name(name, vision):
    name = name.replace(".decay.", ".")
    return re.sub(r"^model\.", "model.language_model.", name) if vision else name


def write(folder, config, *, files=3, half=None):
    """A random checkpoint in several files: as Qwen publishes it, most of it in bfloat16, norms and
    decays in float32, a part with eyes; `half`: all of it in bfloat16 (or none)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    vision = "text_config" in config
    with torch.device("meta"):
        network = models.Transformer(models.read_config(folder))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, p in network.named_parameters():
        scale = 0.3 if p.ndim == 1 else 1.0 if "embed" in name else 1.5 / math.sqrt(p[0].numel())
        tensor = torch.randn(p.shape, generator=generator) * scale
        if name.endswith("norm.weight") and not (vision and "linear_attn" not in name):
            tensor += 1
        keep = p.ndim == 1 if half is None else not half
        tensors[stored_name(name, vision)] = tensor if keep else tensor.bfloat16()
    if vision:
        for name in ("model.visual.patch_embed.proj.weight", "model.visual.blocks.0.norm.bias"):
            tensors[name] = torch.randn(4, 3, 2, generator=generator).half()
        tensors["mtp.fc.weight"] = torch.randn(5, 5, generator=generator).bfloat16()
    total, spent, parts = sum(t.nbytes for t in tensors.values()), 0, [{} for _ in range(files)]
    for name, tensor in tensors.items():
        parts[min(files * spent // total, files - 1)][name] = tensor
        spent += tensor.nbytes
    where = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{files:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where})
    )
    return folder


def layout(folder):
    """{stored name: (file, dtype, shape)} of a checkpoint, and its index's word for the files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers refuses a file without it
            for name in opened.keys():
                part = opened.get_slice(name)
                found[name] = file.name, part.get_dtype(), part.get_shape()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, *_) in found.items()}
    return found, index["metadata"]["total_size"]


def stored(folder):
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


# ---------------------------------------------------------------- one piece of work, for both


def packed(vocab, part=0, parts=1):
    """This part's sequences: tokens, cu_seqlens, scored, and a weight for each scored token."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(vocab, (n,), generator=generator) for n in LENGTHS]
    weights = [torch.randn(n - 1, generator=generator) for n in LENGTHS]
    rows, weights = rows[part::parts], weights[part::parts]
    cu = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    scored = torch.cat([torch.arange(int(a) + 1, int(b)) for a, b in cu.unfold(0, 2, 1)])
    return torch.cat(rows), cu, scored, torch.cat(weights)


def backward(model, frozen, part=0, parts=1):
    """Log-probs, entropies and exact KL of this part, and the gradient of its share of the loss:
    scaled by the number of parts, as the stages do, since FSDP2 averages. The frozen policy is the
    same, read at other tokens."""
    tokens, cu, scored, weight = packed(model.config.vocab, part, parts)
    for _ in range(2):  # once more: nothing that is gathered must have been lost
        other = frozen.states((tokens + 1) % model.config.vocab, cu, scored)
    logp, entropy, kl = model.logp_kl(tokens, cu, scored, {"other": other}, temperature=0.7)
    assert torch.equal(logp, model.logp(tokens, cu, scored, temperature=0.7)[0])
    ((weight * logp + 0.1 * entropy + 0.2 * kl["other"]).sum() / sum(LENGTHS) * parts).backward()
    assert all(p.grad is None for p in frozen.parameters())
    return logp.detach(), entropy.detach(), kl["other"].detach()


def step(model):
    optimizer = runtime.adamw(model, LR, [0.9, 0.95], 0.01)
    norm = runtime.clip_gradients(model, CLIP)
    optimizer.step()
    return norm


def in_order(values):
    """Per-token values of each part -> those of the whole, sequence by sequence."""
    parts = len(values)
    split = [v.split([n - 1 for n in LENGTHS[i::parts]]) for i, v in enumerate(values)]
    return torch.cat([split[i % parts][i // parts] for i in range(len(LENGTHS))])


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


# ---------------------------------------------------------------- launching


def torchrun(ranks, job, folder, *, timeout=120):
    """The lower half of this file on several ranks."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        + [str(ranks), __file__, job, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
             "CUDA_VISIBLE_DEVICES": ""},
    )


def finished(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def unsharded(folder, parts, save=None):
    """What one process makes of a checkpoint: of the whole at once, or part by part as the ranks
    do it, so that nothing but the sharding is compared."""
    model, frozen = (models.load(folder, dtype=torch.float32) for _ in "ab")
    logp, entropy, kl = (
        in_order(v)
        for v in zip(*(backward(model, frozen, i, parts) for i in range(parts)), strict=True)
    )
    for p in model.parameters():
        p.grad /= parts
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = step(model)
    if save:
        models.save(model, save)
    return {"logp": logp, "entropy": entropy, "kl": kl, "gradients": gradients, "norm": norm}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of them, and {(name, parts): what one process makes of it}."""
    top, expected = tmp_path_factory.mktemp("checkpoints"), {}
    for name, shape in SHAPES.items():
        write(top / name, shape)
        expected[name, 1] = unsharded(top / name, 1)
        for parts in (2, 4):
            expected[name, parts] = unsharded(top / name, parts, top / f"{name}.stepped{parts}")
    return top, expected


@pytest.fixture(scope="module")
def two(checkpoints):
    """What two ranks left: {name}.{rank}.pt, {name}.same, {name}.out, figures of memory."""
    top, _ = checkpoints
    write(top / "big", BIG, files=4, half=True)
    finished(torchrun(2, "all", top))
    return top


@pytest.fixture(scope="module")
def four(checkpoints):
    top, _ = checkpoints
    finished(torchrun(4, "meshes", top))
    return top


def compare(top, name, mesh, parts, expected):
    """Log-probs, entropies and KL of all parts, gradients and their norm, against one process: the
    same parts tightly, the whole at once as far as float32 goes (DeltaNet's gradients cancel)."""
    got = [torch.load(top / f"{name}.{mesh}.{i}.pt") for i in range(parts)]
    name = name.removesuffix(".four")
    for want, tolerance in ((expected[name, parts], 1e-5), (expected[name, 1], 5e-4)):
        for column in ("logp", "entropy", "kl"):
            assert error(in_order([g[column] for g in got]), want[column]) < 1e-5, column
        assert all(g["norm"] == pytest.approx(want["norm"], rel=tolerance) for g in got)
        assert got[0]["gradients"].keys() == want["gradients"].keys()
        largest = max(g.norm() for g in want["gradients"].values())
        for n, g in want["gradients"].items():
            assert g.norm() > 1e-5 * largest, f"{n}: nothing to compare"
            assert error(got[0]["gradients"][n], g) < tolerance, n
    return got


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", SHAPES)
def test_two_ranks_compute_as_one(two, checkpoints, name):
    """A shard read from the wrong rows, a gradient averaged instead of summed, or a rank without
    rows would show."""
    got = compare(two, name, "flat", 2, checkpoints[1])
    rows = [g["rows"] for g in got]
    for n, gradient in checkpoints[1][name, 2]["gradients"].items():
        assert sum(r[n] for r in rows) == len(gradient)
    uneven = [n for n in rows[0] if rows[0][n] != rows[1][n]]
    assert uneven, "heads and widths were meant not to divide"
    if name == "one_head":
        empty = {n.rsplit(".", 2)[-2] for n in rows[1] if rows[1][n] == 0}
        assert {"decay", "in_proj_a", "in_proj_b"} <= empty


@pytest.mark.parametrize("mesh", ["flat", "hybrid"])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3"])
def test_four_ranks_compute_as_one(four, checkpoints, name, mesh):
    """Three heads over four ranks; and two copies over two ranks each, where a gradient that is
    not reduced over the copies would show."""
    compare(four, f"{name}.four", mesh, 4, checkpoints[1])


@pytest.mark.parametrize("name", SHAPES)
def test_untrained_folder_is_the_source(two, name):
    """File by file, name by name, dtype by dtype and bit by bit, vision and side files carried
    along; nothing half-written is left behind."""
    source, copy = two / name, two / f"{name}.same"
    assert layout(copy) == layout(source)
    dtypes = {dtype for _, dtype, _ in layout(copy)[0].values()}
    assert {"F32", "BF16"} <= dtypes
    if name != "qwen3":
        assert {n.split(".")[1] for n in layout(copy)[0]} >= {"language_model", "visual"}
    want, got = stored(source), stored(copy)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert sorted(f.name for f in copy.iterdir()) == sorted(f.name for f in source.iterdir())
    assert models.fingerprint(copy) == models.fingerprint(source)
    assert not list(two.glob("*.tmp"))


@pytest.mark.parametrize(
    "name, ranks", [*((name, 2) for name in SHAPES), ("qwen3_5", 4), ("qwen3", 4)]
)
def test_one_step_and_its_folder(two, four, name, ranks):
    """Clipped, stepped, gathered and written by several ranks (four: two copies of the weights) as
    by one process. Measured over the distance moved: AdamW turns a gradient that is all rounding
    into a step of full length, and bfloat16 rounds some weights the other way."""
    out = two / (f"{name}.out" if ranks == 2 else f"{name}.four.out")
    start, want, got = map(stored, (two / name, two / f"{name}.stepped{ranks}", out))
    assert layout(out) == layout(two / name)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        a, b, c = (
            torch.cat([t.flatten().double() for n, t in sorted(s.items()) if t.dtype == dtype])
            for s in (got, want, start)
        )
        assert (b - c).abs().mean() > LR / 4
        assert (a - b).norm() <= tolerance * (b - c).norm(), dtype
    carried = [n for n in start if models.CARRIED.match(n)]
    assert all(torch.equal(got[n], start[n]) for n in carried)
    assert bool(carried) == (name != "qwen3")


def test_decay_stays_float32(two):
    """Under the mixed precision of a GPU run everything is gathered in bfloat16 but the decay of
    DeltaNet, whose parameters, gradients and shares are float32."""
    for rank in range(2):
        got = torch.load(two / f"mixed.{rank}.pt")
        decays = {n for n in got["used"] if ".decay." in n}
        assert len(decays) == 4
        for name, dtype in got["used"].items():
            assert dtype == (torch.float32 if name in decays else torch.bfloat16), name
        assert set(got["held"].values()) == set(got["gradient"].values()) == {torch.float32}


def test_mixed_precision_is_near(two, checkpoints):
    """The same run computes the policy, to bfloat16."""
    got = in_order([torch.load(two / f"mixed.{rank}.pt")["logp"] for rank in range(2)])
    assert error(got, checkpoints[1]["qwen3_5", 1]["logp"]) < 0.05


def test_memory_of_a_rank(two):
    """A rank that read the whole checkpoint, in float32 or as stored, before it took its share, or
    a rank 0 that gathered the whole to write it, would be far over these bounds."""
    sizes = [file.stat().st_size / MIB for file in (two / "big").glob("*.safetensors")]
    whole, file = 2 * sum(sizes), max(sizes)  # float32; the largest file as stored
    share, tensor = whole / 2, 4096 * 1024 * 4 / MIB
    assert len(sizes) == 4 and sum(sizes) > 190 and file < 60
    for rank in range(2):
        m = json.loads((two / f"memory.{rank}.json").read_text())
        print(
            f"rank {rank}: share {share:.0f} MiB, largest file {file:.0f}, largest tensor "
            f"{tensor:.0f} (float32); loading {m['load']:.0f} at most, {m['held']:.0f} after; "
            f"saving {m['save']:.0f} at most, {m['kept']:.0f} after; {m['samples']} samples"
        )
        assert m["samples"] > 50
        assert 0.9 * share < m["held"] < share + 40
        assert m["load"] < share + file + 30
        assert m["load"] < whole - 60 and m["load"] < share + sum(sizes) - 60
        # gloo's buffers and what malloc keeps of many gathered tensors come to some 60
        assert m["save"] < share + (file if rank == 0 else 0) + 2 * tensor + 75
        assert m["save"] < share + sum(sizes) - 60
    want, got = stored(two / "big"), stored(two / "big.same")
    assert all(torch.equal(got[n], want[n]) for n in want) and layout(two / "big") == layout(
        two / "big.same"
    )


def damaged(folder, damage):
    """One file of a fresh checkpoint damaged, and the words that the refusal must hold."""
    write(folder, QWEN3_5)
    name = "lm_head.weight"
    file = (
        folder
        / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    tensors = load_file(file)
    if damage == "missing":
        del tensors[name]
    elif damage == "misshapen":
        tensors[name] = tensors[name][:-1].clone()
    else:  # in the last row: only rank 1 reads it
        tensors[name][-1, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return name, "not finite" if damage == "not finite" else "missing|shape"


@pytest.mark.parametrize("damage", ["missing", "misshapen", "not finite"])
def test_broken_checkpoint_stops_all_ranks(tmp_path, damage):
    """A rank that stops alone must not leave the other waiting in a collective (for a week)."""
    words = damaged(tmp_path / "broken", damage)
    result = torchrun(2, "load", tmp_path / "broken", timeout=60)
    assert result.returncode != 0 and "loaded" not in result.stdout
    refusals = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert refusals and len(set(refusals)) == 1, result.stderr
    assert all(re.search(word, refusals[0]) for word in (*words, str(tmp_path)))
    if damage == "not finite":  # one rank's, the other then loses its peer
        assert len(refusals) == 1
    assert "model.py" not in result.stderr and "runtime.py" not in result.stderr


# ---------------------------------------------------------------- what runs on the ranks


def report(top, name, mesh, ranks, model, frozen):
    """Compute, step and write; leave values and gradients for the tests above."""
    logp, entropy, kl = backward(model, frozen, ranks.rank, ranks.world)
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    rows = {n: len(p.to_local()) for n, p in model.named_parameters()}
    norm = step(model)
    models.save(model, top / f"{name}.out")
    result = {"logp": logp, "entropy": entropy, "kl": kl, "gradients": gradients, "norm": norm,
              "rows": rows}
    torch.save(result, top / f"{name}.{mesh}.{ranks.rank}.pt")


def mixed_precision(top, ranks):
    """runtime.policy as on a GPU, its weights on this CPU all the same."""
    load = models.load
    models.load = lambda *args, device, **options: load(*args, device="cpu", **options)
    try:
        model, frozen = (
            runtime.policy(top / "qwen3_5", dataclasses.replace(ranks, device=torch.device("cuda")))
            for _ in "ab"
        )
    finally:
        models.load = load
    used, names = {}, {p: n for n, p in model.named_modules()}

    def look(module, _):
        for n, p in module.named_parameters(recurse=False):
            used[f"{names[module]}.{n}"] = p.dtype

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(look)
    logp, *_ = backward(model, frozen, ranks.rank, ranks.world)
    used.pop("lm_head.weight", None)  # read by logp, not called
    torch.save(
        {
            "logp": logp,
            "used": used,
            "held": {n: p.dtype for n, p in model.named_parameters()},
            "gradient": {n: p.grad.dtype for n, p in model.named_parameters()},
        },
        top / f"mixed.{ranks.rank}.pt",
    )


def anonymous():
    """Resident memory of this process that is no file mapped in, MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


@contextlib.contextmanager
def peak():
    """[peak of anonymous memory, samples taken] while the block runs, watched by a thread."""
    found, stop = [anonymous(), 0], threading.Event()

    def watch():
        while not stop.is_set():
            found[:] = max(found[0], anonymous()), found[1] + 1
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def memory(top, ranks):
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: give back what is free already
        ctypes.CDLL(None).malloc_trim(0)
    before = anonymous()
    with peak() as load:
        model = runtime.policy(top / "big", ranks)
    held = anonymous()
    with peak() as save:
        models.save(model, top / "big.same")
        dist.barrier()
    figures = {"load": load[0] - before, "held": held - before, "save": save[0] - before}
    figures |= {"kept": anonymous() - before, "samples": min(load[1], save[1])}
    (top / f"memory.{ranks.rank}.json").write_text(json.dumps(figures))


def job_all(top):
    ranks = runtime.start()
    for name in SHAPES:
        model, frozen = (runtime.policy(top / name, ranks) for _ in "ab")
        models.save(model, top / f"{name}.same")
        report(top, name, "flat", ranks, model, frozen)
    mixed_precision(top, ranks)
    memory(top, ranks)


def job_meshes(top):
    hybrid = runtime.start(replicas=2)
    assert hybrid.mesh.mesh.tolist() == [[0, 1], [2, 3]]
    flat = dataclasses.replace(
        hybrid, mesh=init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    )
    for name in ("qwen3_5", "qwen3"):
        for mesh, ranks in (("flat", flat), ("hybrid", hybrid)):
            policies = (runtime.policy(top / name, ranks) for _ in "ab")
            report(top, f"{name}.four", mesh, ranks, *policies)


def job_load(top):
    ranks = runtime.start()
    runtime.policy(top, ranks)
    dist.barrier()
    print("loaded")


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = {"all": job_all, "meshes": job_meshes, "load": job_load}

    def main():
        jobs[sys.argv[1]](Path(sys.argv[2]))
        dist.barrier()  # all leave together

    runtime.command(main)
