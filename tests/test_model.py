"""model.py against transformers (where installed) and against a naive float64 decoder; checkpoint
folders.

Tiny random checkpoints, weights large enough and norms far enough from 1 that a wrong rotation
or a dropped norm shows.
"""

import json
import math
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixing
import model as M

LENGTHS = [5, 1, 17, 40, 3]  # of the packed sequences: unequal, one of a single token


@pytest.fixture(autouse=True)
def seed():
    """Fresh weights and tokens every run; the seed of a failure is in its captured output. One
    thread: tiny shapes."""
    seed, threads = random.SystemRandom().randrange(2**31), torch.get_num_threads()
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- checkpoint folders written by
# hand

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
}
HAND = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False},
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": {"rope_type": "llama3", **SCALING},
        "attention_bias": True,
        "mlp_bias": True,
    },
}


def write(folder, name="qwen3", **changes):
    """A checkpoint folder of random weights, without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **HAND[name], **changes}))
    network = M.Transformer(M.read_config(folder))
    state = {n: randomised(n, p.data) for n, p in network.named_parameters()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def randomised(name, tensor):
    if tensor.ndim == 1:
        return (0.0 if name.endswith("bias") else 1.0) + 0.3 * torch.randn_like(tensor)
    return torch.randn_like(tensor) * (1.0 if "embed" in name else 1.5 / math.sqrt(tensor.shape[1]))


def edit_config(folder, copy, **changes):
    """A copy of a checkpoint folder with keys of config.json changed, or dropped where the new
    value is None."""
    shutil.copytree(folder, copy)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (copy / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    return copy


def edit_tensors(folder, function):
    """`function` changes the folder's {name: tensor} in place."""
    state = load_file(folder / "model.safetensors")
    function(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def pack(sequences):
    """List of 1-D tensors -> tokens [T], cu_seqlens [B+1]."""
    return torch.cat(sequences), torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)


def sequences(vocab, lengths=LENGTHS):
    return [torch.randint(vocab, (n,)) for n in lengths]


def logits(network, tokens, cu_seqlens):
    return network(tokens, cu_seqlens) @ network.head.T


def assert_near(got, want, tolerance=1e-5):
    """Largest difference, relative to the largest value (but at least to 1)."""
    assert got.shape == want.shape
    error, scale = (
        (got.double() - want.double()).abs().max().item(),
        max(1.0, want.abs().max().item()),
    )
    assert error <= tolerance * scale, f"off by {error:.2e}, where the largest value is {scale:.2e}"


def parameter_gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def assert_gradients_near(got, want, tolerance=2e-5):
    assert got.keys() == want.keys()
    for name in want:
        error, scale = (
            (got[name] - want[name]).abs().max().item(),
            max(1e-3, want[name].abs().max().item()),
        )
        assert error <= tolerance * scale, (
            f"{name}: off by {error:.2e}, where the largest value is {scale:.2e}"
        )


# ---------------------------------------------------------------- the golden check: one token and
# one head at a time


def naive_logits(raw, weights, tokens):
    """Logits [T, V] of one sequence in float64, written from the formulas: loops over positions,
    heads and pairs."""
    W = {name: tensor.double() for name, tensor in weights.items()}
    D, A, K = raw["head_dim"], raw["num_attention_heads"], raw["num_key_value_heads"]

    def norm(x, weight):
        return weight * x / torch.sqrt((x * x).mean() + raw["rms_norm_eps"])

    def linear(name, x):
        return W[name + ".weight"] @ x + W.get(name + ".bias", 0.0)

    def frequency(i):
        f, scaling = raw["rope_theta"] ** (-2 * i / D), raw.get("rope_scaling")
        if not scaling:
            return f
        wavelength, original = 2 * math.pi / f, scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if wavelength < original / high:
            return f
        if wavelength > original / low:
            return f / scaling["factor"]
        s = (original / wavelength - low) / (high - low)
        return f * (s + (1 - s) / scaling["factor"])

    def rotated(x, position):
        y = x.clone()
        for i in range(D // 2):
            c, s = math.cos(position * frequency(i)), math.sin(position * frequency(i))
            y[i], y[i + D // 2] = x[i] * c - x[i + D // 2] * s, x[i + D // 2] * c + x[i] * s
        return y

    def heads(layer, name, x, position):
        """The heads of a projection of x; q and k normalised where the checkpoint has a norm, and
        rotated."""
        parts = list(linear(f"{layer}.self_attn.{name}_proj", x).split(D))
        if name != "v":
            weight = W.get(f"{layer}.self_attn.{name}_norm.weight")
            parts = [rotated(h if weight is None else norm(h, weight), position) for h in parts]
        return parts

    xs = [W["model.embed_tokens.weight"][t] for t in tokens]
    for n in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        normed = [norm(x, W[f"{layer}.input_layernorm.weight"]) for x in xs]
        q, k, v = ([heads(layer, name, x, t) for t, x in enumerate(normed)] for name in "qkv")
        for t in range(len(xs)):
            mixed = []
            for a in range(A):
                b = a // (A // K)  # the key/value head of query head a
                scores = torch.stack(
                    [q[t][a] @ k[u][b] / math.sqrt(D) for u in range(t + 1)]
                ).softmax(0)
                mixed.append(sum(scores[u] * v[u][b] for u in range(t + 1)))
            xs[t] = xs[t] + linear(f"{layer}.self_attn.o_proj", torch.cat(mixed))
            y = norm(xs[t], W[f"{layer}.post_attention_layernorm.weight"])
            gate = linear(f"{layer}.mlp.gate_proj", y)
            up = linear(f"{layer}.mlp.up_proj", y)
            xs[t] = xs[t] + linear(f"{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
    head = W.get("lm_head.weight", W["model.embed_tokens.weight"])
    return torch.stack([head @ norm(x, W["model.norm.weight"]) for x in xs])


@pytest.mark.parametrize("name", HAND)
def test_golden(tmp_path, name):
    """The decoder is not the one that the formulas describe (no transformers needed to see it)."""
    folder = write(tmp_path / "m", name)
    raw, weights = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    network = M.load(folder, dtype=torch.float32)
    parts = sequences(64, [11, 1, 4])
    got = logits(network, *pack(parts)).split([11, 1, 4])
    for part, mine in zip(parts, got, strict=True):
        assert_near(mine, naive_logits(raw, weights, part.tolist()), 2e-5)


# ---------------------------------------------------------------- packing, cache, log-probs,
# recompute


@pytest.fixture(params=HAND)
def network(request, tmp_path):
    return M.load(write(tmp_path / "m", request.param), dtype=torch.float32)


def test_packed_is_separate(network):
    """Positions restart and nothing leaks between sequences, whatever lies beside them and in
    whatever order."""
    parts = sequences(64)
    packed = network(*pack(parts)).split(LENGTHS)
    for part, mine in zip(parts, packed, strict=True):
        assert_near(mine, network(*pack([part])))
    for b in range(len(parts)):
        changed = [torch.randint(64, (len(p),)) if i == b else p for i, p in enumerate(parts)]
        for i, (x, y) in enumerate(
            zip(network(*pack(changed)).split(LENGTHS), packed, strict=True)
        ):
            assert i == b or (x - y).abs().max() < 1e-6
    backwards = network(*pack(parts[::-1])).split(LENGTHS[::-1])
    for x, y in zip(backwards[::-1], packed, strict=True):
        assert_near(x, y)


def test_causal(network):
    """A token must not see what follows it."""
    part = torch.randint(64, (20,))
    changed = part.clone()
    changed[12:] = (changed[12:] + 1) % 64
    a, b = (network(*pack([x])) for x in (part, changed))
    assert (a[:12] - b[:12]).abs().max() < 1e-6 and (a[12:] - b[12:]).abs().max() > 1e-3


def test_empty_sequences(network):
    """A sequence of length 0 inside a pack, or a pack of nothing (a rank with an empty micro-
    batch), is harmless."""
    part = torch.randint(64, (6,))
    with_empty = network(part, torch.tensor([0, 0, 4, 4, 6]))
    assert_near(with_empty, network(part, torch.tensor([0, 4, 6])))
    nothing = network(torch.empty(0, dtype=torch.long), torch.tensor([0, 0]))
    assert nothing.shape == (0, 24)
    empty = torch.empty(0, dtype=torch.long)
    network.logp(empty, torch.tensor([0, 0]), empty)[0].sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert not without, f"no gradient (FSDP would wait for it on the other ranks): {without}"
    assert all(p.grad.eq(0).all() for p in network.parameters())


def test_bad_packing(network):
    """Boundaries that do not end at the last token would silently drop or invent tokens."""
    for cu_seqlens in ([0, 3, 7], [0], [[0, 8]]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            network(torch.zeros(8, dtype=torch.long), torch.tensor(cu_seqlens))


def test_logp_alignment(network):
    """logp[n] belongs to tokens[scored[n]] and comes from the hidden state before it: the commonest
    off-by-one here."""
    tokens, cu_seqlens = pack(sequences(64))
    scored = torch.tensor([3, 1, 22, 60])
    table = (logits(network, tokens, cu_seqlens) / 0.7).log_softmax(1)
    got, entropy = network.logp(tokens, cu_seqlens, scored, temperature=0.7, entropy=True)
    assert_near(got, torch.stack([table[t - 1, tokens[t]] for t in scored]))
    assert_near(entropy, -(table.exp() * table).sum(1)[scored - 1])
    assert network.logp(tokens, cu_seqlens, scored)[1] is None


def test_cached_decoding(network):
    """Prompts shared by scattered slots, decoding, moved and reused slots: all equal to the whole
    forward pass."""
    prompts, prompt = sequences(64, [3, 7, 1]), torch.tensor([0, 0, 1, 2, 1])
    slot, steps, S = torch.tensor([4, 0, 2, 1, 3]), 6, 5
    cache = mixing.Cache(network, S, 16)
    hidden = network.prefill(*pack(prompts), cache, prompt, slot)
    assert_near(hidden, torch.stack([network(*pack([p]))[-1] for p in prompts]))
    texts = [prompts[prompt[slot.tolist().index(s)]] for s in range(S)]  # what each slot holds

    def step(texts):
        new = torch.randint(64, (len(texts),))
        lengths = torch.tensor([len(t) for t in texts])
        hidden = network.decode(new, lengths, cache, int(lengths.max()) + 1)
        texts = [torch.cat((t, new[i : i + 1])) for i, t in enumerate(texts)]
        for mine, text in zip(hidden, texts, strict=True):
            assert_near(mine, network(*pack([text]))[-1])
        return texts

    for _ in range(steps):
        texts = step(texts)
    cache.move(
        [4, 3], [0, 2], max(len(t) for t in texts)
    )  # slots 0 and 2 are finished: the last two take their place
    texts = [texts[4], texts[1], texts[3]]
    for _ in range(2):
        texts = step(texts)
    late = torch.randint(
        64, (4,)
    )  # and a new prompt takes a used slot, whose old keys lie beyond its end
    network.prefill(*pack([late]), cache, torch.tensor([0]), torch.tensor([1]))
    step([texts[0], late, texts[2]])


def test_recompute(network):
    """Activation checkpointing changes what is stored, not the gradient."""
    tokens, cu_seqlens = pack(sequences(64))
    scored = torch.tensor([1, 2, 22, 40, 60])
    want = parameter_gradients(network, network.logp(tokens, cu_seqlens, scored)[0].sum())
    runs = []
    for block in network.model.layers:
        block.recompute = True
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    got = parameter_gradients(network, network.logp(tokens, cu_seqlens, scored)[0].sum())
    assert len(runs) == 2 * len(network.model.layers)  # it did run again
    assert_gradients_near(got, want, 1e-6)


# ---------------------------------------------------------------- folders: refusals


def refused(folder, *words):
    """load must raise a ValueError that names each of `words`."""
    with pytest.raises(ValueError) as caught:
        M.load(folder, dtype=torch.float32)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["MistralForCausalLM"]}, ["config.json", "MistralForCausalLM"]),
        ({"architectures": None}, ["config.json", "architecture"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["config.json", "yarn"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["config.json", "yarn"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, ["config.json", "linear"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            ["config.json", "low_freq_factor"],
        ),
        ({"partial_rotary_factor": 0.5}, ["config.json", "partial_rotary_factor"]),
        ({"use_sliding_window": True, "sliding_window": 8}, ["config.json", "sliding"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["config.json", "sliding"]),
        ({"hidden_act": "gelu"}, ["config.json", "hidden_act", "gelu"]),
        ({"num_attention_heads": None}, ["config.json", "num_attention_heads"]),
    ],
)
def test_config_refused(tmp_path, changes, words):
    """What this file does not compute must stop at the config, by name, rather than compute
    something else."""
    refused(edit_config(write(tmp_path / "m"), tmp_path / "bad", **changes), *words)


def test_not_a_checkpoint(tmp_path):
    """A wrong path is the commonest mistake: say which folder, and what it lacks."""
    refused(tmp_path / "nowhere", "nowhere", "config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json")
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    refused(folder, str(folder), "model.safetensors")


@pytest.mark.parametrize(
    "damage", ["missing", "misshapen", "unexpected", "nan", "inf", "missing head"]
)
def test_tensors_refused(tmp_path, damage):
    """A checkpoint that does not fill the network exactly, or holds nan, must be refused by the
    tensor's name."""
    folder, name = write(tmp_path / "m", "qwen2"), "model.layers.1.self_attn.k_proj.bias"

    def edit(state):
        if damage == "missing":
            del state[name]
        elif damage == "missing head":
            del state["lm_head.weight"]
        elif damage == "misshapen":
            state[name] = state[name][:-1].clone()
        elif damage == "unexpected":
            state["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(24)
        else:
            state[name][3] = float(damage)

    edit_tensors(folder, edit)
    named = {"unexpected": "self_attn.o_proj.bias", "missing head": "lm_head.weight"}
    refused(folder, str(folder), named.get(damage, name))


def test_harmless_extras(tmp_path):
    """A tied checkpoint that still carries its head, and rope buffers of old exports, load as they
    are."""
    folder = write(tmp_path / "m")
    want = M.load(folder, dtype=torch.float32)
    edit_tensors(
        folder,
        lambda state: state.update(
            {
                "lm_head.weight": state["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    batch = pack(sequences(64))
    assert torch.equal(M.load(folder, dtype=torch.float32)(*batch), want(*batch))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(tmp_path, keep):
    """A download or copy that was cut short: the file is named."""
    folder = write(tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    refused(folder, "model.safetensors")


def shard(folder):
    """Split model.safetensors in two, with an index."""
    state = load_file(folder / "model.safetensors")
    names, where = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({n: state[n] for n in part}, folder / f"model-0000{i}-of-00002.safetensors")
        where.update(dict.fromkeys(part, f"model-0000{i}-of-00002.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    (folder / "model.safetensors").unlink()


def test_shards(tmp_path):
    """An index and its files are one checkpoint, the same one as the single file that a re-save
    makes of it."""
    folder = write(tmp_path / "m")
    want, whole, batch = (
        M.load(folder, dtype=torch.float32),
        M.fingerprint(folder),
        pack(sequences(64)),
    )
    shard(folder)
    got = M.load(folder, dtype=torch.float32)
    assert torch.equal(got(*batch), want(*batch))
    M.save(got, tmp_path / "copy")
    assert torch.equal(M.load(tmp_path / "copy", dtype=torch.float32)(*batch), want(*batch))
    assert M.fingerprint(tmp_path / "copy") == whole
    assert M.fingerprint(folder) == whole


def test_broken_shards(tmp_path):
    """A missing file or a broken index is named."""
    folder = write(tmp_path / "m")
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, str(folder), "model-00002-of-00002.safetensors")
    for broken in ("{", "{}"):
        (folder / "model.safetensors.index.json").write_text(broken)
        refused(folder, "model.safetensors.index.json")


# ---------------------------------------------------------------- folders: written back, recognised


def test_save(tmp_path, network):
    """A copy has the same bits, dtype and side files, replaces what was there, and leaves nothing
    half-written."""
    (network.source / "tokenizer.json").write_text("{}")
    (network.source / "chat_template.jinja").write_text("x")
    (network.source / "optimizer.pt").write_text("not ours to carry")
    out = tmp_path / "a" / "copy"
    out.mkdir(parents=True)
    (out / "stale").write_text("")
    M.save(network, out)
    assert sorted(f.name for f in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [f.name for f in out.parent.iterdir()] == ["copy"]
    got, want = (
        load_file(out / "model.safetensors"),
        load_file(network.source / "model.safetensors"),
    )
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert M.fingerprint(out) == M.fingerprint(network.source)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    M.save(network, out)
    got = load_file(out / "model.safetensors")
    assert all(torch.equal(got[n], 2 * want[n]) for n in want)


def test_save_bfloat16(tmp_path):
    """Every tensor keeps the dtype it was published in, whatever it was trained in."""
    folder = write(tmp_path / "m", torch_dtype="bfloat16")
    half = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    half["model.norm.weight"] = half["model.norm.weight"].float()
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    network = M.load(folder, dtype=torch.float32)
    M.save(network, tmp_path / "copy")
    got = load_file(tmp_path / "copy" / "model.safetensors")
    assert all(got[n].dtype == t.dtype and torch.equal(got[n], t) for n, t in half.items())
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses a file without it


def test_fingerprint(tmp_path):
    """One weight or one setting changed is another policy; a re-save or the config's other spelling
    is the same one."""
    folder = write(tmp_path / "m")
    first = M.fingerprint(folder)
    assert len(first) == 16 and int(first, 16) >= 0
    M.save(M.load(folder, dtype=torch.float32), tmp_path / "copy")
    M.save(M.load(tmp_path / "copy", dtype=torch.float32), tmp_path / "copy of copy")
    assert M.fingerprint(tmp_path / "copy") == M.fingerprint(tmp_path / "copy of copy") == first
    spelled = edit_config(
        folder,
        tmp_path / "spelled",
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    assert M.fingerprint(spelled) == first
    assert M.fingerprint(edit_config(folder, tmp_path / "theta", rope_theta=50001.0)) != first
    edit_tensors(folder, lambda state: state["model.norm.weight"][3].add_(1e-6))
    assert M.fingerprint(folder) != first


def test_rope_spellings(tmp_path):
    """theta and llama3 scaling in the words of transformers 4 (two ways) and 5 are one network;
    dropped, another."""
    spellings = {
        "type": {"rope_theta": 7e5, "rope_scaling": {"type": "llama3", **SCALING}},
        "rope_type": {"rope_theta": 7e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        "parameters": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7e5, **SCALING}},
        "plain": {"rope_theta": 7e5},
        "default": {"rope_scaling": {"rope_type": "llama3", **SCALING}},
    }
    folder, batch = write(tmp_path / "m", "llama"), pack(sequences(64))
    out = {
        name: M.load(
            edit_config(
                folder, tmp_path / name, **{"rope_theta": None, "rope_scaling": None, **keys}
            ),
            dtype=torch.float32,
        )(*batch)
        for name, keys in spellings.items()
    }
    assert torch.equal(out["type"], out["rope_type"]) and torch.equal(
        out["type"], out["parameters"]
    )
    for other in ("plain", "default"):
        assert (out[other] - out["type"]).abs().max() > 1e-2  # the comparison above is not vacuous


def test_config_defaults(tmp_path):
    """Keys that a config may leave out: heads without groups, the head width, an untied head, theta
    of 10,000."""
    raw = {
        k: v
        for k, v in SMALL.items()
        if k not in ("head_dim", "num_key_value_heads", "rope_theta", "rms_norm_eps")
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**raw, "architectures": ["LlamaForCausalLM"]})
    )
    assert M.read_config(tmp_path) == M.Config(
        vocab=64,
        hidden=24,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=6,
        intermediate=20,
        tied=False,
        qk_norm=False,
        rotary=6,
        linear=(False, False),
    )


# ---------------------------------------------------------------- parity with transformers

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}


def rope(theta, **scaling):
    return {
        "rope_parameters": {
            "rope_type": "llama3" if scaling else "default",
            "rope_theta": theta,
            **scaling,
        }
    }


ARCHITECTURES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False, **rope(1e4)}),
    "llama tied": ("LlamaConfig", {"head_dim": 32, "tie_word_embeddings": True, **rope(7e7)}),
    "llama3 scaling": (
        "LlamaConfig",
        {
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            **rope(5e5, **SCALING),
        },
    ),
    "llama biases": (
        "LlamaConfig",
        {"head_dim": 32, "attention_bias": True, "mlp_bias": True, **rope(1e4)},
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False, **rope(1e6)}),
    "qwen2 tied": ("Qwen2Config", {"head_dim": 32, "tie_word_embeddings": True, **rope(1e4)}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": False, **rope(5e6)}),
    "qwen3 tied": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True, **rope(1e6)}),
    "qwen3 biases": ("Qwen3Config", {"head_dim": 32, "attention_bias": True, **rope(1e6)}),
}


@pytest.fixture(params=ARCHITECTURES)
def theirs(request):
    """A tiny random model of transformers, every 1-D parameter perturbed: norms of 1 and biases of
    0 hide mistakes."""
    transformers = pytest.importorskip("transformers")
    kind, changes = ARCHITECTURES[request.param]
    config = getattr(transformers, kind)(**{**COMMON, **changes})
    network = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        .float()
        .eval()
    )
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return network


def reload(folder):
    """The folder in transformers, having loaded every tensor and wanted no other."""
    import transformers

    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return network


def test_parity(tmp_path, theirs):
    """Logits, the gradient of every parameter, shards and the way back, for each architecture."""
    theirs.save_pretrained(tmp_path / "m")
    mine = M.load(tmp_path / "m", dtype=torch.float32)
    parts = sequences(512)
    tokens, cu_seqlens = pack(parts)
    want = torch.cat(
        [theirs(part[None], use_cache=False).logits[0] for part in parts]
    )  # each sequence alone
    assert want.detach().std() > 0.3 and mine.config.tied == theirs.config.tie_word_embeddings
    assert_near(logits(mine, tokens, cu_seqlens), want)

    scored = torch.tensor(
        [2, 4, 7, 22, 23, 40, 62, 64, 65]
    )  # a masked NLL; none is the first of its sequence
    nll = -want.log_softmax(1)[scored - 1, tokens[scored]].mean()
    ours = -mine.logp(tokens, cu_seqlens, scored)[0].mean()
    assert_near(ours, nll)
    assert_gradients_near(parameter_gradients(mine, ours), parameter_gradients(theirs, nll))

    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    sharded = M.load(tmp_path / "sharded", dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(sharded.parameters(), mine.parameters(), strict=True)
    )

    M.save(sharded, tmp_path / "copy")
    again = reload(tmp_path / "copy")
    assert all(torch.equal(again.state_dict()[name], x) for name, x in theirs.state_dict().items())
    assert torch.equal(again(parts[2][None]).logits, theirs(parts[2][None]).logits)


def test_parity_of_old_configs(tmp_path, theirs):
    """config.json rewritten in the words of transformers 4 gives the same network here."""
    theirs.save_pretrained(tmp_path / "m")
    parameters = json.loads((tmp_path / "m" / "config.json").read_text()).get("rope_parameters")
    if parameters is None:
        pytest.skip("this transformers writes the old words already")
    scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
    kind = scaling.pop("rope_type")
    for key in ("type", "rope_type"):
        old = edit_config(
            tmp_path / "m",
            tmp_path / key,
            rope_parameters=None,
            rope_theta=parameters["rope_theta"],
            rope_scaling=None if kind == "default" else {key: kind, **scaling},
        )
        assert M.read_config(old) == M.read_config(tmp_path / "m")
