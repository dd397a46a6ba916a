"""model.py against transformers (where installed), against numbers that transformers gave and
against a naive float64 decoder; checkpoint folders.

Tiny random checkpoints, weights large enough and norms far enough from 1 that a wrong rotation
or a dropped norm shows.
"""

import copy
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_hybrid, write_policy
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixing
import model as M

LENGTHS = [5, 1, 17, 40, 3]  # of the packed sequences: unequal, one of a single token
LONG = [5, 1, 70, 3, 131]  # the same over several chunks of the gated delta rule


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
    "qwen3_5": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "tie_word_embeddings": False,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 50000.0, "partial_rotary_factor": 0.5},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-3,  # a DeltaNet head's output near 0, normed, would magnify rounding
    },
}


def write(folder, name="qwen3", **changes):
    """A checkpoint folder of random weights, without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **HAND[name], **changes}))
    network = M.Transformer(M.read_config(folder))
    state = {
        n.replace(".decay.", "."): randomised(n, p.data) for n, p in network.named_parameters()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def randomised(name, tensor):
    if tensor.ndim == 1:  # around what a fresh module has: norms 1, or 0 where 1 is added; biases 0
        centre = 0.0 if name.endswith("bias") else tensor
        return centre + 0.3 * torch.randn_like(tensor)
    fan_in = tensor[0].numel()
    return torch.randn_like(tensor) * (1.0 if "embed" in name else 1.5 / math.sqrt(fan_in))


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
    new = "layer_types" in raw  # Qwen3.5
    theta = raw["rope_parameters"]["rope_theta"] if new else raw["rope_theta"]
    R = int(D * raw["rope_parameters"]["partial_rotary_factor"]) if new else D

    def plain_norm(x, weight):
        return weight * x / torch.sqrt((x * x).mean() + raw["rms_norm_eps"])

    def norm(x, weight):
        return plain_norm(x, 1 + weight if new else weight)

    def silu(x):
        return x * torch.sigmoid(x)

    def linear(name, x):
        return W[name + ".weight"] @ x + W.get(name + ".bias", 0.0)

    def frequency(i):
        f, scaling = theta ** (-2 * i / R), raw.get("rope_scaling")
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
        for i in range(R // 2):
            c, s = math.cos(position * frequency(i)), math.sin(position * frequency(i))
            y[i], y[i + R // 2] = x[i] * c - x[i + R // 2] * s, x[i + R // 2] * c + x[i] * s
        return y

    def heads(layer, name, x, position):
        """The heads of a projection of x; q and k normalised where the checkpoint has a norm, and
        rotated."""
        y = linear(f"{layer}.self_attn.{name}_proj", x)
        if new and name == "q":  # each head's query, then its gate
            y = torch.cat(y.split(D)[::2])
        parts = list(y.split(D))
        if name != "v":
            weight = W.get(f"{layer}.self_attn.{name}_norm.weight")
            parts = [rotated(h if weight is None else norm(h, weight), position) for h in parts]
        return parts

    def attention(layer, normed):
        q, k, v = ([heads(layer, name, x, t) for t, x in enumerate(normed)] for name in "qkv")
        for t, x in enumerate(normed):
            mixed = []
            for a in range(A):
                b = a // (A // K)  # the key/value head of query head a
                scores = torch.stack(
                    [q[t][a] @ k[u][b] / math.sqrt(D) for u in range(t + 1)]
                ).softmax(0)
                mixed.append(sum(scores[u] * v[u][b] for u in range(t + 1)))
            mixed = torch.cat(mixed)
            if new:
                gate = torch.cat(linear(f"{layer}.self_attn.q_proj", x).split(D)[1::2])
                mixed = mixed * torch.sigmoid(gate)
            yield linear(f"{layer}.self_attn.o_proj", mixed)

    def delta_net(layer, normed):
        Hk, Hv = raw["linear_num_key_heads"], raw["linear_num_value_heads"]
        dk, dv = raw["linear_key_head_dim"], raw["linear_value_head_dim"]
        taps = W[f"{layer}.conv1d.weight"][:, 0]  # [channels, taps], the last for the token itself
        S, window = [torch.zeros(dk, dv).double()] * Hv, [torch.zeros(len(taps))] * taps.shape[1]
        for x in normed:
            window = [*window[1:], linear(f"{layer}.in_proj_qkv", x)]
            y = silu(sum(taps[:, i] * past for i, past in enumerate(window)))
            q, k, v = y.split((Hk * dk, Hk * dk, Hv * dv))
            z = linear(f"{layer}.in_proj_z", x).split(dv)
            a, b = linear(f"{layer}.in_proj_a", x), linear(f"{layer}.in_proj_b", x)
            mixed = []
            for h in range(Hv):
                c = h // (Hv // Hk)  # the query/key head of value head h
                query, key = (q.split(dk)[c], k.split(dk)[c])
                query, key = (u / torch.sqrt((u * u).sum() + 1e-6) for u in (query, key))
                rate = W[f"{layer}.A_log"][h].exp()
                step = torch.log1p((a[h] + W[f"{layer}.dt_bias"][h]).exp())
                S[h] = S[h] * torch.exp(-rate * step)
                error = v.split(dv)[h] - S[h].T @ key
                S[h] = S[h] + torch.sigmoid(b[h]) * torch.outer(key, error)
                o = plain_norm(S[h].T @ query / math.sqrt(dk), W[f"{layer}.norm.weight"])
                mixed.append(o * silu(z[h]))
            yield linear(f"{layer}.out_proj", torch.cat(mixed))

    xs = [W["model.embed_tokens.weight"][t] for t in tokens]
    for n in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        normed = [norm(x, W[f"{layer}.input_layernorm.weight"]) for x in xs]
        if new and raw["layer_types"][n] == "linear_attention":
            mixed = delta_net(f"{layer}.linear_attn", normed)
        else:
            mixed = attention(layer, normed)
        for t, o in enumerate(list(mixed)):
            xs[t] = xs[t] + o
            y = norm(xs[t], W[f"{layer}.post_attention_layernorm.weight"])
            gate = linear(f"{layer}.mlp.gate_proj", y)
            up = linear(f"{layer}.mlp.up_proj", y)
            xs[t] = xs[t] + linear(f"{layer}.mlp.down_proj", silu(gate) * up)
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
    assert_near(got, torch.stack([table[t - 1, tokens[t]] for t in scored]), 3e-5)
    assert_near(entropy, -(table.exp() * table).sum(1)[scored - 1], 3e-5)
    assert network.logp(tokens, cu_seqlens, scored)[1] is None


def test_exact_kl(network):
    """Of whole distributions to those of another policy, over the vocabulary, at the places that
    logp reads; with its gradient, and none to the other policy."""
    tokens, cu_seqlens = pack(sequences(64))
    scored, other = torch.tensor([3, 1, 22, 60]), copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.0 + 0.3 * torch.randn_like(p))

    def table(model):
        return (logits(model, tokens, cu_seqlens) / 0.7).log_softmax(1)[scored - 1]

    p, q = table(network), table(other).detach()
    kl = (p.exp() * (p - q)).sum(1)
    want = parameter_gradients(network, kl.sum())
    places = tokens, cu_seqlens, scored
    logp, entropy, got = network.logp_kl(
        *places, {"it": other.states(*places), "itself": network.states(*places)}, temperature=0.7)
    assert_near(got["it"], kl, 3e-5)
    assert got["itself"].abs().max() < 1e-5 < kl.min()
    assert_near(torch.stack([logp, entropy]), torch.stack(network.logp(
        *places, temperature=0.7, entropy=True)), 1e-6)
    assert_gradients_near(parameter_gradients(network, got["it"].sum()), want, 1e-4)
    assert all(p.grad is None for p in other.parameters())


def test_cached_decoding(network):
    """Prompts shared by scattered slots, decoding, moved and reused slots: all equal to the whole
    forward pass."""
    prompts, steps, S = sequences(64, [3, 17, 1]), 16, 5
    cache = mixing.Cache(network, S, 48)
    assert all(cache.grow(s, len(p)) for s, p in zip([4, 2, 1], prompts, strict=True))
    cache.sync()
    hidden = network.prefill(*pack(prompts), cache, torch.tensor([4, 2, 1]))
    assert_near(hidden, torch.stack([network(*pack([p]))[-1] for p in prompts]))
    for source, target, length in ((4, 0, 3), (2, 3, 17)):
        assert cache.share(source, target, length)
        cache.copy([(source, target, length)])
    texts = [prompts[p] for p in (0, 2, 1, 1, 0)]  # what each slot holds

    def step(texts):
        new = torch.randint(64, (len(texts),))
        lengths = torch.tensor([len(t) for t in texts])
        assert all(cache.grow(s, len(t) + 1) for s, t in enumerate(texts))
        cache.sync()
        hidden = network.decode(new, lengths, cache)
        texts = [torch.cat((t, new[i : i + 1])) for i, t in enumerate(texts)]
        for mine, text in zip(hidden, texts, strict=True):
            assert_near(mine, network(*pack([text]))[-1])
        return texts

    for _ in range(steps):
        texts = step(texts)
    for source, target in ((4, 0), (3, 2)):  # 0 and 2 are finished: the last take their place
        cache.release(target)
        cache.move(source, target)
    texts = [texts[4], texts[1], texts[3]]
    for _ in range(2):
        texts = step(texts)
    late = torch.randint(64, (4,))  # and a new prompt takes a used slot and its pages
    cache.release(1)
    assert cache.grow(1, 4)
    cache.sync()
    network.prefill(*pack([late]), cache, torch.tensor([1]))
    step([texts[0], late, texts[2]])


@pytest.mark.parametrize("keep_attention", [False, True])
def test_recompute(network, keep_attention, monkeypatch):
    """Activation checkpointing changes what is stored, not the gradient; kept attention is not run
    again, the rest is."""
    tokens, cu_seqlens = pack(sequences(64))
    scored = torch.tensor([1, 2, 22, 40, 60])
    want = parameter_gradients(network, network.logp(tokens, cu_seqlens, scored)[0].sum())
    runs, attended, attention = [], [], mixing.attention
    monkeypatch.setattr(mixing, "attention", lambda *a: attended.append(1) or attention(*a))
    for block in network.model.layers:
        block.recompute, block.keep_attention = True, keep_attention
        block.mlp.gate_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    got = parameter_gradients(network, network.logp(tokens, cu_seqlens, scored)[0].sum())
    assert len(runs) == 2 * len(network.model.layers)  # it did run again
    if not any(network.config.linear):
        assert len(attended) == (1 if keep_attention else 2) * len(network.model.layers)
    assert_gradients_near(got, want, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_policy, write_hybrid])
@pytest.mark.parametrize("recompute, keep", [(False, False), (True, False), (True, True)])
def test_fused(tmp_path, write, recompute, keep):
    """torch.compile changes speed, not results, whatever is recomputed and however lengths vary."""
    folder = write(tmp_path / "policy")
    results = []
    for fused in (False, True):
        network = M.load(folder, dtype=torch.float32)
        for block in network.model.layers:
            block.recompute, block.keep_attention = recompute, keep
            if fused:
                block.fuse()
        logps = []
        for T in (50, 81, 33):
            tokens, cu_seqlens = torch.arange(T) % 19 + 1, torch.tensor([0, T // 3, T])
            logp, entropy = network.logp(tokens, cu_seqlens, torch.arange(1, T), entropy=True)
            (logp.sum() + entropy.sum()).backward()
            logps.append(logp.detach())
        results.append([*logps, *(p.grad for p in network.parameters() if p.grad is not None)])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()


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


@pytest.mark.parametrize("nested", [False, True], ids=["text", "with vision"])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layer_types": ["linear_attention", "full_attention_2"]}, ["full_attention_2"]),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, ["sliding"]),
        ({"layer_types": ["linear_attention"] * 3}, ["layer_types", "2 layers"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "2 layers"]),
        ({"attn_output_gate": False}, ["attn_output_gate"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["yarn"]),
        *(({key: None}, [key]) for key in HAND["qwen3_5"] if key.startswith("linear_")),
    ],
)
def test_qwen3_5_config_refused(tmp_path, changes, words, nested):
    """The same of what is special to Qwen3.5, whose text part may lie in a section of its own."""
    folder = write(tmp_path / "m", "qwen3_5")
    M.load(folder)
    if nested:
        text = {**SMALL, **HAND["qwen3_5"], **changes}
        text = {key: value for key, value in text.items() if value is not None}
        changes = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    refused(edit_config(folder, tmp_path / "bad", **changes), "config.json", *words)


def test_linear_attention_refused_elsewhere(tmp_path):
    """Only Qwen3.5 has such layers here."""
    folder = edit_config(
        write(tmp_path / "m"), tmp_path / "bad", layer_types=["linear_attention", "full_attention"]
    )
    refused(folder, "config.json", "linear_attention")


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


def test_value_head(tmp_path, network):
    """V of the state before each token, from the hidden state there: a constant at first, and the
    head is in no checkpoint."""
    rows = sequences(network.config.vocab)
    tokens, cu = pack(rows)
    scored = torch.cat([torch.arange(int(a) + 1, int(b)) for a, b in cu.unfold(0, 2, 1)])
    network.add_value_head(0.25)
    assert torch.equal(network.value(tokens, cu, scored), torch.full((len(scored),), 0.25))
    torch.nn.init.normal_(network.value_head.weight)
    value = network.value(tokens, cu, scored)
    w, b = network.value_head.weight[0], network.value_head.bias[0]
    assert_near(value, (network(tokens, cu) @ w + b)[scored - 1])
    place = len(rows[0]) - 1  # another last token of the first sequence: its own value stays
    changed = tokens.clone()
    changed[place] = (changed[place] + 1) % network.config.vocab
    assert torch.equal(network.value(changed, cu, scored), value)
    M.save(network, tmp_path / "copy")
    again = M.load(tmp_path / "copy", dtype=torch.float32)
    assert not [name for name, _ in again.named_parameters() if "value" in name]
    for file in (tmp_path / "copy").glob("*.safetensors"):
        assert not [name for name in load_file(file) if "value_head" in name]
    for file in network.source.glob("*.safetensors"):  # nor where there is no layout to follow
        file.unlink()
    M.save(network, tmp_path / "first")
    assert not [name for name in load_file(tmp_path / "first/model.safetensors") if "value" in name]


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


def test_one_shard_with_an_index(tmp_path):
    """Published so by some tools; written without its index, no reader would find the weights."""
    folder = write(tmp_path / "m")
    name = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    place = dict.fromkeys(load_file(folder / name), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    M.save(M.load(folder, dtype=torch.float32), tmp_path / "copy")
    assert sorted(f.name for f in (tmp_path / "copy").iterdir()) == [
        "config.json",
        name,
        "model.safetensors.index.json",
    ]
    assert M.fingerprint(tmp_path / "copy") == M.fingerprint(folder)


def test_a_second_head_must_be_the_first(tmp_path):
    """Tied, but with a head of its own in the file: equal is harmless, other is refused."""
    folder = write(tmp_path / "m", "qwen3", tie_word_embeddings=True)
    before = M.fingerprint(folder)

    def copy(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    edit_tensors(folder, copy)
    M.load(folder, dtype=torch.float32)
    assert M.fingerprint(folder) == before
    edit_tensors(folder, lambda state: state["lm_head.weight"][3, 2].add_(1))
    refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_a_tensor_under_two_names(tmp_path):
    folder = write(tmp_path / "m")

    def twice(state):
        state["model.language_model.norm.weight"] = state["model.norm.weight"].clone()

    edit_tensors(folder, twice)
    refused(folder, "norm.weight", "twice")


def test_rope_nested_by_layer_type(tmp_path):
    """As models with several kinds of attention write it: one rope for all is read, several are
    refused; never is theta taken from nowhere."""
    folder, rope = write(tmp_path / "m"), {"rope_type": "default", "rope_theta": 7e5}
    plain = edit_config(folder, tmp_path / "a", rope_theta=None, rope_parameters=rope)
    nested = edit_config(
        folder, tmp_path / "b", rope_theta=None, rope_parameters={"full_attention": rope}
    )
    assert M.read_config(nested) == M.read_config(plain)
    assert M.read_config(plain).rope_theta == 7e5
    several = edit_config(
        folder,
        tmp_path / "c",
        rope_parameters={"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 1e4}},
    )
    refused(several, "config.json", "rope")


@pytest.mark.parametrize(
    "key, value",
    [
        ("rms_norm_eps", "1e-6"),
        ("tie_word_embeddings", "false"),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("rope_parameters", "yarn"),
        ("text_config", [1]),
        ("hidden_size", 24.5),
        ("num_hidden_layers", True),
        ("layer_types", "full_attention"),
        ("vocab_size", -1),
        ("rope_theta", [1e4]),
    ],
)
def test_values_of_the_wrong_kind(tmp_path, key, value):
    """One line that names file and key; not a TypeError from deep inside, not another network."""
    refused(edit_config(write(tmp_path / "m"), tmp_path / "x", **{key: value}), "config.json", key)


def test_null_is_absent(tmp_path):
    """transformers writes null for what it takes by default."""
    folder, copy = write(tmp_path / "m", "llama"), tmp_path / "x"
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text())
    config |= dict.fromkeys(
        (
            "hidden_act",
            "partial_rotary_factor",
            "layer_types",
            "mlp_only",
            "full_attention_interval",
            "attn_output_gate",
            "text_config",
        )
    )
    config["rope_scaling"] |= {"partial_rotary_factor": None, "rope_theta": None}
    (copy / "config.json").write_text(json.dumps(config))
    assert M.read_config(copy) == M.read_config(folder)


@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 3, 2, 5], [5], [0, 6]])
def test_bounds_that_are_none(tmp_path, bounds):
    network = M.load(write(tmp_path / "m"), dtype=torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        network(torch.zeros(5, dtype=torch.long), torch.tensor(bounds))


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


def test_qwen3_5_config_defaults(tmp_path):
    """Keys that a Qwen3.5 may leave out: every fourth layer (or as said) has attention, and a
    quarter of its heads rotates."""
    folder = write(tmp_path / "m", "qwen3_5")
    left_out = {"layer_types": None, "num_hidden_layers": 9}
    fourth, second = [True, True, True, False] * 2 + [True], [True, False] * 4 + [True]
    cases = [
        ({}, fourth, 4),
        ({"full_attention_interval": 2}, second, 4),
        ({"rope_parameters": {"rope_theta": 1e4}}, fourth, 2),
        ({"rope_parameters": None, "partial_rotary_factor": 0.5}, fourth, 4),
    ]
    for n, (changes, linear, rotary) in enumerate(cases):
        config = M.read_config(edit_config(folder, tmp_path / str(n), **left_out, **changes))
        assert (config.linear, config.rotary) == (tuple(linear), rotary)
        assert config.delta == M.Delta(k_heads=2, v_heads=4, k_dim=6, v_dim=5, taps=4)
        assert config.zero_centred and config.gated and config.qk_norm


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


DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-3,  # as in HAND
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
    "qwen3.5": ("Qwen3_5TextConfig", {**DELTA, "tie_word_embeddings": False, **rope(1e7)}),
    "qwen3.5 tied": (
        "Qwen3_5TextConfig",
        {
            **DELTA,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 2,
            "rope_parameters": {**rope(1e4)["rope_parameters"], "partial_rotary_factor": 0.5},
        },
    ),
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


def from_config(config, kind=None):
    """A tiny random model of transformers, every 1-D parameter perturbed: norms of 1 and biases of
    0 hide mistakes. Rates of decay are lowered: by their initial values most heads would forget all
    but one token, so that no state passed from chunk to chunk and a single q . k near 0, normed,
    magnified all rounding."""
    import transformers

    if kind is None:
        make = transformers.AutoModelForCausalLM.from_config
    else:
        make = getattr(transformers, kind)._from_config
    network = make(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p) - 4.0 * name.endswith("A_log"))
    return network


def config_of(kind, **keys):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    return getattr(transformers, kind)(**keys)


@pytest.fixture(params=ARCHITECTURES)
def theirs(request):
    kind, changes = ARCHITECTURES[request.param]
    return from_config(config_of(kind, **{**COMMON, **changes}))


def with_vision(tied=False):
    """A Qwen3.5 with vision as transformers makes it: the text part in a section of its own."""
    text = {**COMMON, **DELTA, "tie_word_embeddings": tied, **rope(1e7)}
    vision = {**VISION, "out_hidden_size": text["hidden_size"]}
    config = config_of(
        "Qwen3_5Config", text_config=text, vision_config=vision, tie_word_embeddings=tied
    )
    return from_config(config, "Qwen3_5ForConditionalGeneration")


def reload(folder, kind="AutoModelForCausalLM"):
    """The folder in transformers, having loaded every tensor and wanted no other."""
    import transformers

    network, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return network


def alone(network, parts):
    """transformers' logits, each sequence by itself."""
    return torch.cat([network(part[None], use_cache=False).logits[0] for part in parts])


def assert_same_function(mine, theirs, vocab):
    """Logits of packed sequences, the gradient of every parameter, and cached decoding."""
    # the output of a DeltaNet head is normed, however small: at a sequence's first token it is
    # v times a q . k which may be next to 0, and rounding is magnified, twice so in gradients
    near, gradients_near = (1e-4, 1e-3) if any(mine.config.linear) else (2e-5, 5e-5)
    parts = sequences(vocab, LONG)
    tokens, cu_seqlens = pack(parts)
    want = alone(theirs, parts)
    assert want.detach().std() > 0.3  # loud enough for mistakes to show
    assert_near(logits(mine, tokens, cu_seqlens), want, near)

    scored = torch.tensor([2, 4, 7, 22, 23, 40, 69, 70, 73, 77, 78, 80, 150, 200, 208, 209])
    assert not set(scored.tolist()) & set(cu_seqlens.tolist())  # no sequence's first
    nll = -want.log_softmax(1)[scored - 1, tokens[scored]].mean()
    ours = -mine.logp(tokens, cu_seqlens, scored)[0].mean()
    assert_near(ours, nll)
    theirs.zero_grad()
    nll.backward()
    gradients = {
        M.own_name(name): p.grad for name, p in theirs.named_parameters() if "visual." not in name
    }
    assert_gradients_near(parameter_gradients(mine, ours), gradients, gradients_near)
    # the last three sequences: their prompts in the cache, then token by token
    parts, starts, want = parts[2:], [66, 1, 127], want.detach().split(LONG)[2:]
    cache, slot = mixing.Cache(mine, 3, 144), torch.tensor([2, 0, 1])
    prompts = [part[:n] for part, n in zip(parts, starts, strict=True)]
    assert all(cache.grow(s, 144) for s in range(3))
    cache.sync()
    hidden = mine.prefill(*pack(prompts), cache, slot)
    for i in range(3):
        got = hidden @ mine.head.T if i == 0 else (hidden @ mine.head.T)[slot]
        for row, n, logit in zip(got, starts, want, strict=True):
            if n + i <= len(logit):
                assert_near(row, logit[n + i - 1], near)
        places = [min(n + i, len(p) - 1) for p, n in zip(parts, starts, strict=True)]
        new = torch.stack([part[t] for part, t in zip(parts, places, strict=True)])
        order = slot.argsort()
        lengths = torch.tensor(starts)[order] + i
        hidden = mine.decode(new[order], lengths, cache)


def test_parity(tmp_path, theirs):
    """Logits, the gradient of every parameter, shards and the way back, for each architecture."""
    theirs.save_pretrained(tmp_path / "m")
    mine = M.load(tmp_path / "m", dtype=torch.float32)
    assert mine.config.tied == theirs.config.tie_word_embeddings
    assert_same_function(mine, theirs, 512)

    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    sharded = M.load(tmp_path / "sharded", dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(sharded.parameters(), mine.parameters(), strict=True)
    )

    M.save(sharded, tmp_path / "copy")
    again, part = reload(tmp_path / "copy"), torch.randint(512, (1, 70))
    assert all(torch.equal(again.state_dict()[name], x) for name, x in theirs.state_dict().items())
    assert torch.equal(again(part).logits, theirs(part).logits)


def test_parity_of_old_configs(tmp_path, theirs):
    """config.json rewritten in the words of transformers 4 gives the same network here."""
    theirs.save_pretrained(tmp_path / "m")
    parameters = json.loads((tmp_path / "m" / "config.json").read_text()).get("rope_parameters")
    if parameters is None:
        pytest.skip("this transformers writes the old words already")
    scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
    kind, part = scaling.pop("rope_type"), scaling.pop("partial_rotary_factor", None)
    for key in ("type", "rope_type"):
        old = edit_config(
            tmp_path / "m",
            tmp_path / key,
            rope_parameters=None,
            rope_theta=parameters["rope_theta"],
            partial_rotary_factor=part,
            rope_scaling=None if kind == "default" else {key: kind, **scaling},
        )
        assert M.read_config(old) == M.read_config(tmp_path / "m")


# ---------------------------------------------------------------- Qwen3.5 with vision


def carried(folder):
    """{name: tensor} of what is not run here."""
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    return {name: x for name, x in state.items() if "visual." in name or name.startswith("mtp.")}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_vision(tmp_path, tied, sharded):
    """Of a Qwen3.5 with vision the text part runs; vision and multi-token prediction must come out
    of a save as they went in, under both of transformers' classes."""
    theirs, folder = with_vision(tied), tmp_path / "m"
    theirs.save_pretrained(folder)
    edit_tensors(
        folder,
        lambda state: state.update(
            {
                "mtp.fc.weight": torch.randn(64, 128).bfloat16(),
                "mtp.layers.0.self_attn.q_norm.weight": torch.randn(32).bfloat16(),
            }
        ),
    )
    if sharded:
        shard(folder)
    mine = M.load(folder, dtype=torch.float32)
    assert mine.config.tied == tied
    if not sharded:
        assert_same_function(mine, theirs, 512)
    with torch.no_grad():
        for p in (*mine.parameters(), *theirs.model.language_model.parameters()):
            p.mul_(1.25)  # as if trained, exactly so
        if not tied:
            theirs.lm_head.weight.mul_(1.25)
    M.save(mine, tmp_path / "copy")
    before, after = carried(folder), carried(tmp_path / "copy")
    assert {"mtp.fc.weight", "model.visual.pos_embed.weight"} < after.keys() == before.keys()
    assert all(torch.equal(after[n], x) and after[n].dtype == x.dtype for n, x in before.items())

    parts = sequences(512, [3, 70])
    want = alone(theirs, parts)
    for kind in ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", "AutoModelForCausalLM"):
        again = reload(tmp_path / "copy", kind)
        assert_near(alone(again, parts), want, 1e-6)
        if kind == "Qwen3_5ForConditionalGeneration":
            state = again.state_dict()
            assert all(torch.equal(state[name], x) for name, x in theirs.state_dict().items())
    assert_near(logits(M.load(tmp_path / "copy", dtype=torch.float32), *pack(parts)), want, 1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_vision_resaved_as_text(tmp_path, tied):
    """AutoModelForCausalLM makes a text-only checkpoint of one with vision, under other names."""
    theirs = with_vision(tied)
    theirs.save_pretrained(tmp_path / "m")
    reload(tmp_path / "m").save_pretrained(tmp_path / "text")
    whole, text = (M.load(tmp_path / name, dtype=torch.float32) for name in ("m", "text"))
    assert whole.config == text.config and not carried(tmp_path / "text")
    b = dict(text.named_parameters())
    assert all(torch.equal(x, b[name]) for name, x in whole.named_parameters())
    M.save(text, tmp_path / "copy")
    part = torch.randint(512, (70,))
    assert_near(alone(reload(tmp_path / "copy"), [part]), alone(theirs, [part]), 1e-6)


def plain_names(state):
    """The text part under the names of old tools: model.* instead of model.language_model.*."""
    for name in list(state):
        state[name.replace("model.language_model.", "model.")] = state.pop(name)


def test_vision_plain_names(tmp_path):
    """A checkpoint with vision whose text part is stored as model.*: the same network, and saved
    under the names that it came with."""
    theirs = with_vision()
    theirs.save_pretrained(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "plain")
    edit_tensors(tmp_path / "plain", plain_names)
    a, b = (M.load(tmp_path / name, dtype=torch.float32) for name in ("m", "plain"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    M.save(b, tmp_path / "copy")
    got, want = (load_file(tmp_path / n / "model.safetensors") for n in ("copy", "plain"))
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(tmp_path, dtype):
    """Published with A_log and norms of the DeltaNet layers in float32 and the rest in bfloat16:
    every tensor keeps its dtype, and rates of decay are never rounded, whatever is computed in."""
    folder = write(tmp_path / "m", "qwen3_5")

    def publish(state):
        for name in state:
            if not name.endswith(("A_log", "linear_attn.norm.weight")):
                state[name] = state[name].bfloat16()

    edit_tensors(folder, publish)
    network = M.load(folder, dtype=dtype)
    assert {p.dtype for n, p in network.named_parameters() if ".decay." in n} == {torch.float32}
    assert {p.dtype for n, p in network.named_parameters() if ".decay." not in n} == {dtype}
    M.save(network, tmp_path / "copy")
    got, want = (load_file(f / "model.safetensors") for f in (tmp_path / "copy", folder))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        if name.endswith("linear_attn.norm.weight"):  # computed with in the dtype of the model
            tensor = tensor.to(dtype).float()
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    assert {x.dtype for x in got.values()} == {torch.float32, torch.bfloat16}


# ---------------------------------------------------------------- the shapes in configs/

SHAPES = [
    "qwen3_4b",
    "nanbeige4_3b",
    "qwen3_5_9b",
    "qwen3_5_27b",
    "nemotron_nano_4b",
    "acereason_7b",
    "justrl_1_5b",
]


def scaled(raw, tied):
    """A published config.json made tiny: the ratios of heads, of widths and of the MLP stay, and so
    does everything that is not a size."""
    text = raw = {**raw, "tie_word_embeddings": tied}
    del raw["_about"]
    if "text_config" in raw:
        text = raw["text_config"] = {**raw["text_config"], "tie_word_embeddings": tied}
    factor = text["num_key_value_heads"] // 2  # two key heads are left
    text["num_attention_heads"] //= factor
    text["num_key_value_heads"] = 2
    text["head_dim"] //= 8
    for key in ("hidden_size", "intermediate_size"):
        text[key] //= 8 * factor
    text["vocab_size"], text["num_hidden_layers"] = 151, 2
    text["max_position_embeddings"] = 256
    text["initializer_range"] = 1.2 / text["hidden_size"] ** 0.5
    if "text_config" in raw:
        text["num_hidden_layers"] = text["full_attention_interval"]
        for kind in ("key", "value"):
            text[f"linear_num_{kind}_heads"] //= 8
            text[f"linear_{kind}_head_dim"] //= 16
        raw["vision_config"] = {**VISION, "out_hidden_size": text["hidden_size"]}
    if text.get("rope_scaling"):  # the longest sequence is longer than this, so that it acts
        text["rope_scaling"] = {**text["rope_scaling"], "original_max_position_embeddings": 128}
    return raw


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SHAPES)
def test_shape(tmp_path, name, tied):
    """Each policy that configs/ names, scaled down: the config as it is published and as
    transformers writes it, logits, gradients, cached decoding and the way back."""
    transformers = pytest.importorskip("transformers")
    if not (ROOT / "configs" / name / "config.json").is_file():
        pytest.skip("its config.json is not here")
    published = json.loads((ROOT / "configs" / name / "config.json").read_text())
    raw = scaled(published, tied)
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(raw))
    kind = raw["architectures"][0]
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    theirs = from_config(transformers.AutoConfig.from_pretrained(tmp_path / "published"), kind)
    theirs.save_pretrained(tmp_path / "m")
    mine = M.load(tmp_path / "m", dtype=torch.float32)
    assert mine.config == M.read_config(tmp_path / "published") and mine.config.tied == tied

    big = M.read_config(ROOT / "configs" / name)  # what scaling down must keep
    assert big.heads * mine.config.kv_heads == mine.config.heads * big.kv_heads
    assert big.hidden * mine.config.head_dim * mine.config.heads == (
        mine.config.hidden * big.head_dim * big.heads
    )
    for key in ("eps", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "rope_theta", "gated"):
        assert getattr(big, key) == getattr(mine.config, key)
    assert big.rotary * mine.config.head_dim == mine.config.rotary * big.head_dim
    assert bool(big.rope_scaling) == bool(mine.config.rope_scaling) == (name == "nemotron_nano_4b")

    assert_same_function(mine, theirs, 151)
    M.save(mine, tmp_path / "copy")
    again, part = reload(tmp_path / "copy", kind), torch.randint(151, (1, 70))
    assert all(torch.equal(again.state_dict()[name], x) for name, x in theirs.state_dict().items())
    assert torch.equal(again(part).logits, theirs(part).logits)


# ---------------------------------------------------------------- stored numbers

GOLDEN = Path(__file__).with_name("golden_qwen3_5.safetensors")


def make_golden(file=GOLDEN):
    """How the stored checkpoint and its logits were made, with transformers 5.23 and torch 2.13:

    cd tests && python -c "import test_model; test_model.make_golden()"
    """
    torch.manual_seed(0)
    network = golden_network()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(p.bfloat16())  # stored in 16 bits, computed with in 32
    parts = sequences(96, [7, 150])
    config = network.config.to_dict() | {"architectures": ["Qwen3_5ForConditionalGeneration"]}
    state = {name: p.detach().bfloat16() for name, p in network.named_parameters()}
    with torch.no_grad():
        for i, part in enumerate(parts):
            state |= {f"tokens.{i}": part.int(), f"logits.{i}": alone(network, [part])}
    save_file(state, file, metadata={"format": "pt", "config": json.dumps(config)})


def golden_network():
    text = {
        **COMMON, **DELTA, **rope(1e7), "vocab_size": 96, "hidden_size": 32, "head_dim": 16,
        "intermediate_size": 48, "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    vision = {**VISION, "out_hidden_size": 32}
    config = config_of("Qwen3_5Config", text_config=text, vision_config=vision)
    return from_config(config, "Qwen3_5ForConditionalGeneration")


def unpack_golden(folder):
    """Write the stored checkpoint -> ([tokens], [logits])."""
    folder.mkdir()
    with safe_open(GOLDEN, "pt") as file:
        (folder / "config.json").write_text(file.metadata()["config"])
    state = load_file(GOLDEN)
    parts, want = ([state.pop(f"{key}.{i}") for i in range(2)] for key in ("tokens", "logits"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return [part.long() for part in parts], want


def test_stored_golden(tmp_path):
    """Qwen3.5 is not what transformers computed when this file was made (it is not needed now)."""
    parts, want = unpack_golden(tmp_path / "m")
    network = M.load(tmp_path / "m", dtype=torch.float32)
    assert_near(logits(network, *pack(parts)), torch.cat(want), 1e-4)
    M.save(network, tmp_path / "copy")
    assert M.fingerprint(tmp_path / "copy") == M.fingerprint(tmp_path / "m")


def test_stored_golden_is_current(tmp_path):
    """The transformers installed now agrees with the stored numbers."""
    config_of("Qwen3_5Config")
    parts, want = unpack_golden(tmp_path / "m")
    network = reload(tmp_path / "m", "Qwen3_5ForConditionalGeneration")
    assert_near(alone(network, parts), torch.cat(want), 1e-4)
