"""model.py - the transformer: Llama, Qwen2 and Qwen3 from a Hugging Face folder and back,
written out.

One decoder serves all three; they differ in three switches read from config.json:

                 qkv bias   q/k RMSNorm per head   rope
    Llama        no         no                     plain or "llama3" scaling
    Qwen2        yes        no                     plain
    Qwen3        no         yes                    plain

    x += attention(norm(x));  x += down(silu(gate(norm(x))) * up(norm(x)))

Input is packed: `tokens` [T] of B sequences laid end to end, `cu_seqlens` [B+1] their boundaries
(cu_seqlens[0] = 0, cu_seqlens[B] = T). Attention is causal within a sequence, positions restart at
each, nothing leaks between them. The output is the last hidden state [T, H];
logits = hidden @ model.head.T are never formed here (kernels.py turns hidden states into
log-probabilities). A KV cache serves the sampler.

    model = load("path/to/Qwen3-0.6B")        # any folder with config.json and *.safetensors
    hidden = model(tokens, cu_seqlens)        # [T, H]
    save(model, "path/to/copy")               # loads in transformers and vLLM unchanged

Parameter names are the checkpoint's own. Shapes: T tokens, B sequences, H hidden width,
V vocabulary, A query heads, K key/value heads, D head width, S slots of the cache.
"""

import hashlib
import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import linear_logp

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
                 "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class Config:
    """A model's shape.

    `rope_scaling` is None or the four numbers of "llama3"; nothing is derived from hidden / heads.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float = 1e-6
    tied: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    rope_theta: float = 1e4
    # rope_scaling: factor, low, high, original length
    rope_scaling: tuple[float, float, float, int] | None = None


def read_config(path):
    """config.json of a checkpoint folder -> Config.

    ValueError on anything this file does not compute.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: not a checkpoint folder (it has no config.json)")
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    names = raw.get("architectures") or ["(none)"]
    kind = ARCHITECTURES.get(names[0])
    if kind is None:
        raise ValueError(f"{file}: architecture {names[0]} is not supported; "
                         f"supported are {', '.join(ARCHITECTURES)}")

    def need(key):
        if raw.get(key) is None:
            raise ValueError(f"{file}: key {key!r} is missing")
        return raw[key]

    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or []):
        raise ValueError(f"{file}: sliding-window attention is not supported")
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{file}: rope type {rope_type!r} is not supported, "
                         "only 'default' and 'llama3'")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{file}: partial_rotary_factor is not supported for {names[0]}")
    scaling = None
    if rope_type == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [key for key in keys if key not in rope]:
            raise ValueError(f"{file}: llama3 rope scaling lacks {', '.join(missing)}")
        scaling = tuple(rope[key] for key in keys)
    heads = need("num_attention_heads")
    return Config(
        vocab=need("vocab_size"), hidden=need("hidden_size"), layers=need("num_hidden_layers"),
        heads=heads, kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or need("hidden_size") // heads,
        intermediate=need("intermediate_size"), eps=raw.get("rms_norm_eps", 1e-6),
        tied=raw.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2" or bool(raw.get("attention_bias")),
        o_bias=kind != "qwen2" and bool(raw.get("attention_bias")),
        mlp_bias=kind == "llama" and bool(raw.get("mlp_bias")), qk_norm=kind == "qwen3",
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 1e4))), rope_scaling=scaling)


# ---------------------------------------------------------------- the parts, bottom up


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps) over the last dimension, in float32."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def rope_frequencies(config):
    """Angle per position of each pair of dimensions, [D/2] float32;
    long waves slowed by "llama3" scaling.
    """
    f = config.rope_theta ** (
        -torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if config.rope_scaling is None:
        return f
    factor, low, high, original = config.rope_scaling
    turns = original * f / (2 * math.pi)  # full turns within the original context
    mix = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, divided by factor; 1: fast, kept
    return f * (mix + (1 - mix) / factor)


def rotate(x, cos, sin):
    """Rotary embedding of x [T, heads, D] by cos, sin [T, 1, D/2] float32;
    the halves of D are the pairs.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Packing:
    """How B packed sequences lie in memory, computed once a forward pass and shared by all layers.

    `positions` [T] restart at each sequence. Where no variable-length kernel serves (CPU, float32),
    attention runs on right-padded copies, in groups of sequences of similar length: `pad` [P] is
    the token in each padded place, `unpad` [T] the place of each token, `groups` the
    [count, length] of each group. Causality makes a mask unnecessary: no token ever sees the
    padding to its right.
    """

    def __init__(self, cu_seqlens, T, padded):
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1]
        self.cu_seqlens = cu_seqlens.int()
        self.positions = (torch.arange(T, device=cu_seqlens.device)
                          - starts.repeat_interleave(lengths, output_size=T))
        sizes = lengths.tolist()
        self.longest = max(sizes, default=0)
        if not padded:
            return
        by_size = {}  # lengths within a factor of two share a group
        for b, size in enumerate(sizes):
            by_size.setdefault(max(size - 1, 0).bit_length(), []).append(b)
        pads, slots, self.groups, offset = (
            [], torch.empty(T, dtype=torch.long, device=cu_seqlens.device), [], 0)
        for members in by_size.values():
            length = max(sizes[b] for b in members)
            column = torch.arange(length, device=cu_seqlens.device)
            member = torch.tensor(members, device=cu_seqlens.device)
            # the token in each padded place, [count, length]
            last = (lengths[member, None] - 1).clamp(min=0)
            token = starts[member, None] + torch.minimum(column, last)
            valid = (column < lengths[member, None]).flatten()
            slots[token.flatten()[valid]] = offset + valid.nonzero()[:, 0]
            pads.append(token.flatten())
            self.groups.append((len(members), length))
            offset += len(members) * length
        self.pad, self.unpad = torch.cat(pads), slots


def attention(q, k, v, packing):
    """Causal attention within each packed sequence: q [T, A, D], k and v [T, K, D] -> [T, A, D]."""
    if not hasattr(packing, "groups"):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # [T, A, D]
        return varlen_attn(q, k, v, packing.cu_seqlens, packing.cu_seqlens,
                           packing.longest, packing.longest, **CAUSAL)
    pieces, offset = [], 0
    q, k, v = (x.index_select(0, packing.pad) for x in (q, k, v))  # [P, heads, D]
    for count, length in packing.groups:
        rows = slice(offset, offset := offset + count * length)
        parts = (x[rows].view(count, length, *x.shape[1:]).transpose(1, 2)
                 for x in (q, k, v))  # [count, heads, length, D]
        o = F.scaled_dot_product_attention(*parts, is_causal=True,
                                           enable_gqa=q.shape[1] != k.shape[1])
        pieces.append(o.transpose(1, 2).flatten(0, 1))  # [count * length, A, D]
    return torch.cat(pieces).index_select(0, packing.unpad)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, cos, sin, attend):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # [T, A, D]; [T, K, D]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(attend(q, k, v).flatten(1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    recompute = False  # activation checkpointing: keep only the input, run again in backward

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, cos, sin, attend, use_reentrant=False)
        return self._forward(x, cos, sin, attend)

    def _forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`model` holds embeddings, blocks and final norm under the checkpoint's own names;
    `source` is its folder.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.source = config, None
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.model.norm = RMSNorm(config.hidden, config.eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    @property
    def head(self):
        """The output projection [V, H]: logits = hidden @ head.T."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    @property
    def device(self):
        return self.model.norm.weight.device

    def _run(self, tokens, positions, attend):
        """`attend(layer, q, k, v)` is what training, prefill and decoding differ in."""
        angle = positions[:, None, None].float() * _frequencies(self.config, positions.device)
        cos, sin = angle.cos(), angle.sin()  # [T, 1, D/2]
        x = self.model.embed_tokens(tokens)  # [T, H]
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, lambda q, k, v, i=i: attend(i, q, k, v))
        return self.model.norm(x)

    def _packing(self, tokens, cu_seqlens):
        if (cu_seqlens.ndim != 1 or tokens.ndim != 1 or len(cu_seqlens) < 2
                or int(cu_seqlens[-1]) != len(tokens)):
            raise ValueError(
                "packed input must be tokens [T] and cu_seqlens [B+1] ending in T; "
                f"got tokens {list(tokens.shape)} and cu_seqlens {cu_seqlens.tolist()[:8]}")
        half = (self.model.embed_tokens.weight.is_cuda
                and self._compute_dtype() in (torch.bfloat16, torch.float16))
        return Packing(cu_seqlens.long(), len(tokens), padded=not (half and varlen_attn))

    def _compute_dtype(self):
        # under FSDP2's mixed precision this is the gathered, cast weight
        return self.model.norm.weight.dtype

    def forward(self, tokens, cu_seqlens):
        """tokens [T] integer, cu_seqlens [B+1] -> last hidden states [T, H];
        hidden[t] predicts tokens[t + 1].
        """
        packing = self._packing(tokens, cu_seqlens)
        return self._run(tokens.long(), packing.positions,
                         lambda _, q, k, v: attention(q, k, v, packing))

    def logp(self, tokens, cu_seqlens, scored, *, temperature=1.0, entropy=False):
        """Log-probabilities of the tokens at places `scored` [N] of the packed input,
        each given what precedes it.

        Returns (logp [N], entropy [N] or None) float32. logp[n] comes from hidden[scored[n] - 1],
        so the first token of a sequence cannot be scored. A method of the model, so that FSDP2
        gathers the head around it.
        """
        hidden = self.forward(tokens, cu_seqlens)
        return linear_logp(hidden[scored - 1], self.head, tokens[scored],
                           temperature=temperature, entropy=entropy)

    # ---- with a KV cache, for the sampler

    @torch.no_grad()
    def prefill(self, tokens, cu_seqlens, cache, prompt, slot):
        """Run P packed prompts and write the keys and values of prompt[n] into slot[n] of the
        cache, n < N.

        Several slots may share a prompt, which is then computed once. Returns the hidden state of
        each prompt's last token, [P, H].
        """
        packing = self._packing(tokens, cu_seqlens)
        lengths = cu_seqlens.diff()[prompt]  # [N]
        place = torch.arange(int(lengths.sum()), device=tokens.device)
        n = torch.arange(len(prompt), device=tokens.device).repeat_interleave(lengths)
        position = place - (lengths.cumsum(0) - lengths)[n]
        source = cu_seqlens[prompt][n] + position  # token of the packed prompts to copy from

        def attend(layer, q, k, v):
            cache.k[layer][slot[n], :, position] = k[source]
            cache.v[layer][slot[n], :, position] = v[source]
            return attention(q, k, v, packing)

        hidden = self._run(tokens.long(), packing.positions, attend)
        return hidden[cu_seqlens[1:] - 1]

    @torch.no_grad()
    def decode(self, tokens, lengths, cache, longest):
        """One more token for each of the first S slots:
        tokens [S], lengths [S] tokens already cached -> hidden [S, H].

        `longest` is max(lengths) + 1, known on the host, so that only that much of the cache
        is read.
        """
        S, slot = len(tokens), torch.arange(len(tokens), device=tokens.device)
        unseen = torch.arange(longest, device=tokens.device) > lengths[:, None]  # [S, longest]
        bias = torch.zeros(unseen.shape, dtype=cache.k[0].dtype, device=tokens.device)
        bias.masked_fill_(unseen, float("-inf"))

        def attend(layer, q, k, v):
            cache.k[layer][slot, :, lengths], cache.v[layer][slot, :, lengths] = k, v
            keys, values = (cache.k[layer][:S, :, :longest],
                            cache.v[layer][:S, :, :longest])  # [S, K, longest, D]
            # [S, K, A/K, D]: a head's queries are rows of one product
            grouped = q.unflatten(1, (keys.shape[1], -1))
            o = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias[:, None, None])
            return o.flatten(1, 2)

        return self._run(tokens, lengths, attend)


class Cache:
    """Keys and values of S slots, [layers] x [S, K, max_len, D];
    a slot holds one growing sequence.
    """

    def __init__(self, model, slots, max_len):
        c, like = model.config, model.model.embed_tokens.weight
        shape = (slots, c.kv_heads, max_len, c.head_dim)
        self.k = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(c.layers)]
        self.v = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(c.layers)]

    def move(self, source, target, length):
        """Copy the first `length` positions of slots `source` to slots `target`
        (lists of equal length).
        """
        for x in (*self.k, *self.v):
            x[target, :, :length] = x[source, :, :length]


@lru_cache(maxsize=8)
def _frequencies(config, device):
    return rope_frequencies(config).to(device)


# causal, said in the words of this torch's varlen_attn
CAUSAL = {}
if varlen_attn is not None:
    import inspect
    CAUSAL = ({"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters
              else {"window_size": (-1, 0)})


# ---------------------------------------------------------------- checkpoint folders


def load(path, *, dtype=torch.bfloat16, device="cpu"):
    """A Hugging Face checkpoint folder -> Transformer, weights cast to dtype on device.

    Reads config.json and model.safetensors or the shards that model.safetensors.index.json names.
    ValueError on an unknown architecture or rope type, and on missing, unexpected, misshapen or
    non-finite tensors.
    """
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    want = dict(model.named_parameters())
    state, unexpected = {}, []
    for file in weight_files(path):
        with _open(file) as tensors:
            for name in tensors.keys():
                if name not in want:
                    unexpected.append(name)
                    continue
                tensor = tensors.get_tensor(name)
                if tensor.shape != want[name].shape:
                    raise ValueError(f"{file}: tensor {name} has shape {list(tensor.shape)}, "
                                     f"config.json asks for {list(want[name].shape)}")
                state[name] = tensor.to(device=device, dtype=dtype)
                if not torch.isfinite(state[name]).all():
                    raise ValueError(f"{file}: tensor {name} holds values that are not finite")
    if missing := [name for name in want if name not in state]:
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first {missing[0]}")
    # a tied checkpoint may still carry its head; old ones carry rope buffers:
    # neither is a weight of its own
    unexpected = [n for n in unexpected
                  if not (n == "lm_head.weight" and config.tied) and not n.endswith("inv_freq")]
    if unexpected:
        raise ValueError(f"{path}: {len(unexpected)} tensors have no place in {config}, "
                         f"the first {unexpected[0]}")
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    model.source = Path(path)
    return model


def save(model, path, state=None):
    """Write `model` as a Hugging Face folder: its tensors under their names, config.json,
    tokenizer files carried along.

    `state` {name: full tensor} stands in for the model's own (when they are sharded). Tensors keep
    the dtype they have. The folder appears whole or not at all: it is written aside, then renamed.
    """
    from huggingface_hub import save_torch_state_dict

    path = Path(path)
    state = dict(model.named_parameters()) if state is None else state
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    aside = path.with_name(path.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_torch_state_dict(state, aside, max_shard_size="5GB")
    for file in model.source.iterdir():
        if (file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model")
                and ".safetensors." not in file.name):
            shutil.copyfile(file, aside / file.name)
    config = json.loads((aside / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    os.rename(aside, path)


def weight_files(path):
    """The safetensors files of a checkpoint folder, in order. ValueError where one is missing."""
    path = Path(path)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [path / Path(name).name for name in names]  # never out of this folder
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: not an index of weight files ({error!r})") from None
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path}: {file.name} is missing")
    return files


def stored_dtype(path):
    """The dtype that a checkpoint folder's weights are stored in."""
    with _open(weight_files(path)[0]) as tensors:
        name = next(iter(tensors.keys()))
        return tensors.get_slice(name)[:0].dtype


def checkpoints(run):
    """[(step, folder)] of a run folder's step_000016, ... in order; half-written ones left out."""
    found = [p for p in sorted(Path(run).glob("step_*"))
             if p.name.removeprefix("step_").isdigit() and (p / "config.json").is_file()]
    return [(int(p.name.removeprefix("step_")), p) for p in found]


def fingerprint(path):
    """Sixteen hex digits of what a checkpoint folder computes: its shape and its weights,
    however they are sharded.
    """
    digest = hashlib.sha256(json.dumps(vars(read_config(path)), sort_keys=True).encode())
    place = {}
    for file in weight_files(path):
        with _open(file) as tensors:
            place |= dict.fromkeys(tensors.keys(), file)
    for name in sorted(place):
        with _open(place[name]) as tensors:
            tensor = tensors.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def _open(file):
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from None


# ---------------------------------------------------------------- text in, text out


class Tokenizer:
    """tokenizer.json, chat template and stop tokens of a checkpoint folder.

    `stop` are the end-of-sequence ids of generation_config.json (else config.json);
    `template` is None for a base model without a chat template, whose prompts are plain text.
    """

    def __init__(self, path):
        from tokenizers import Tokenizer as Backend

        path = Path(path)
        try:
            self.backend = Backend.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}/tokenizer.json: cannot be read: {error}") from None
        self.settings = self._json(path / "tokenizer_config.json")
        template = path / "chat_template.jinja"
        self.template = (template.read_text() if template.is_file()
                         else self.settings.get("chat_template"))
        if isinstance(self.template, list):  # several named templates: the one called default
            self.template = next(
                (t["template"] for t in self.template if t["name"] == "default"), None)
        eos = self._json(path / "generation_config.json").get("eos_token_id")
        eos = self._json(path / "config.json").get("eos_token_id") if eos is None else eos
        self.stop = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)

    @staticmethod
    def _json(file):
        return json.loads(file.read_text()) if file.is_file() else {}

    def encode(self, text):
        """Text -> list of ids, nothing added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, *, special=False):
        """Ids -> text; special tokens left out unless asked for."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def render(self, messages, **variables):
        """A conversation -> the prompt's text,
        by the chat template in jinja2's immutable sandbox.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.template is None:
            return "".join(str(message.get("content", "")) for message in messages)

        def raise_exception(message):
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
        environment.globals["raise_exception"] = raise_exception
        specials = {key: value["content"] if isinstance(value, dict) else value
                    for key, value in self.settings.items()
                    if key.endswith("_token") and value is not None}
        try:
            return environment.from_string(self.template).render({
                "messages": messages, "tools": None, "documents": None,
                "add_generation_prompt": True, **specials, **variables})
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refused the conversation: {error}") from None
