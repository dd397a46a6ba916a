"""model.py - the transformer: Llama, Qwen2, Qwen3 and Qwen3.5 from a Hugging Face folder and back,
written out.

One decoder serves all four; they differ in switches read from config.json:

                 qkv bias   q/k norm   rope                      norms   layers
    Llama        no         no         plain, "llama3" scaling   w       attention
    Qwen2        yes        no         plain                     w       attention
    Qwen3        no         per head   plain                     w       attention
    Qwen3.5      no         per head   a quarter of each head    1 + w   3 gated DeltaNet, then one
                                                                         attention with a gate

    x += mix(norm(x));  x += down(silu(gate(norm(x))) * up(norm(x)))

Input is packed: `tokens` [T] of B sequences laid end to end, `cu_seqlens` [B+1] their boundaries
(cu_seqlens[0] = 0, cu_seqlens[B] = T). Every layer is causal within a sequence, positions restart
at each, nothing leaks between them. The output is the last hidden state [T, H];
logits = hidden @ model.head.T are never formed here (kernels.py turns hidden states into
log-probabilities). A cache of keys, values and DeltaNet states serves the sampler.

    model = load("Qwen/Qwen3-0.6B")           # or any folder with config.json and *.safetensors
    hidden = model(tokens, cu_seqlens)        # [T, H]
    save(model, "path/to/copy")               # loads in transformers and vLLM unchanged

Parameter names are the checkpoint's own (Qwen3.5: without "language_model.", see `own_name`); of a
Qwen3.5 with vision, the text part runs and the rest is carried along. Shapes: T tokens,
B sequences, H hidden width, V vocabulary, A query heads, K key/value heads, D head width, S slots
of the cache.
"""

import hashlib
import json
import math
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import durable
import hf
from hf import Tokenizer as Tokenizer  # part of a model, for those who import this file
from kernels import linear_kl, linear_logp
from mixing import Decode, Onward, Packed, Prefill

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
                 "Qwen3ForCausalLM": "qwen3", "Qwen3_5ForCausalLM": "qwen3_5",
                 "Qwen3_5ForConditionalGeneration": "qwen3_5"}


@dataclass(frozen=True)
class Delta:
    """The shape of a gated DeltaNet layer: heads and widths of keys and of values, taps of the
    convolution.
    """

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int

    @property
    def channels(self):
        """Of the convolution: queries, keys and values side by side."""
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim


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
    rope_scaling: tuple[float, float, float, float] | None = None
    rotary: int = 0  # dimensions of a head that rotate; 0: all
    zero_centred: bool = False  # norms multiply by 1 + w
    gated: bool = False  # attention's output is gated, by a second half of q_proj
    delta: Delta | None = None
    linear: tuple[bool, ...] = ()  # of each layer, whether it is gated DeltaNet


def read_config(path):
    """config.json of a checkpoint (or only that: a shape without weights) -> Config.

    ValueError on anything this file does not compute.
    """
    file = hf.folder(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: not a checkpoint folder (it has no config.json)")
    whole = hf.read_json(file)
    names = whole.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{file}: architecture {str(name):.80} is not supported; "
                         f"supported are {', '.join(ARCHITECTURES)}")
    raw = whole.get("text_config") or whole  # with vision, the text part lies in a section

    def get(key, kind, default=None, section=raw):
        """A key's value, checked; null counts as absent, and without a default it must be there."""
        value = section.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{file}: key {key!r} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or kind in (int, float) and not 0 < value < 1e12:
            raise ValueError(f"{file}: key {key!r} must be a {kind.__name__}"
                             f"{' above 0' if kind in (int, float) else ''}, not {value!r:.80}")
        return value

    if not isinstance(raw, dict):
        raise ValueError(f"{file}: text_config must be an object, not {raw!r:.80}")
    if (activation := get("hidden_act", str, "silu")) != "silu":
        raise ValueError(f"{file}: hidden_act {activation!r} is not supported, only 'silu'")
    if not get("attn_output_gate", bool, True):
        raise ValueError(f"{file}: attn_output_gate = false is not supported")
    hybrid = kind == "qwen3_5"
    layers = get("num_hidden_layers", int)
    if layers > 10_000:
        raise ValueError(f"{file}: key 'num_hidden_layers' is {layers}, which no model has")
    every = get("full_attention_interval", int, 4) if hybrid else 1
    layer_types = get("layer_types", list, [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)])
    if get("use_sliding_window", bool, False) or "sliding_attention" in layer_types:
        raise ValueError(f"{file}: sliding-window attention is not supported")
    known = ("full_attention", "linear_attention") if hybrid else ("full_attention",)
    if len(layer_types) != layers or not all(t in known for t in layer_types):
        raise ValueError(f"{file}: layer_types must name one of {', '.join(known)} for each of "
                         f"{layers} layers, not {layer_types}")

    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling
    rope = {**get("rope_scaling", dict, {}), **get("rope_parameters", dict, {})}
    if nested := [value for value in rope.values() if isinstance(value, dict)]:
        if len(nested) < len(rope) or any(value != nested[0] for value in nested):
            raise ValueError(f"{file}: rope that differs between layers is not supported")
        rope = nested[0]
    rope = {**{key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")},
            **{key: value for key, value in rope.items() if value is not None}}
    rope_type = get("rope_type", str, get("type", str, "default", rope), rope)
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{file}: rope type {rope_type!r} is not supported, "
                         "only 'default' and 'llama3'")
    part = get("partial_rotary_factor", float, 0.25 if hybrid else 1.0, rope)
    if part != 1.0 and not hybrid:
        raise ValueError(f"{file}: partial_rotary_factor is not supported for {name}")
    scaling = None
    if rope_type == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [key for key in keys if key not in rope]:
            raise ValueError(f"{file}: llama3 rope scaling lacks {', '.join(missing)}")
        scaling = tuple(get(key, float, section=rope) for key in keys)
    delta = None
    if hybrid:
        delta = Delta(*(get(f"linear_{key}", int) for key in (
            "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim",
            "conv_kernel_dim")))

    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    kv_heads = get("num_key_value_heads", int, heads)
    if heads % kv_heads or delta and delta.v_heads % delta.k_heads:
        raise ValueError(f"{file}: num_attention_heads {heads} must be a multiple of "
                         f"num_key_value_heads {kv_heads}, and so the linear value heads")
    head_dim, bias = get("head_dim", int, hidden // heads or 1), get("attention_bias", bool, False)
    if int(head_dim * part) % 2 or max(get("vocab_size", int), hidden, head_dim) > 2**31:
        raise ValueError(f"{file}: head_dim {head_dim} (of which {part:g} rotates, in pairs), "
                         f"hidden_size {hidden} or vocab_size cannot be")
    return Config(
        vocab=get("vocab_size", int), hidden=hidden, layers=layers, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim,
        intermediate=get("intermediate_size", int), eps=get("rms_norm_eps", float, 1e-6),
        tied=get("tie_word_embeddings", bool, get("tie_word_embeddings", bool, False), whole),
        qkv_bias=kind == "qwen2" or bias, o_bias=kind != "qwen2" and bias,
        mlp_bias=kind == "llama" and get("mlp_bias", bool, False),
        qk_norm=kind in ("qwen3", "qwen3_5"), rope_theta=get("rope_theta", float, 1e4, rope),
        rope_scaling=scaling, rotary=int(head_dim * part), zero_centred=hybrid, gated=hybrid,
        delta=delta, linear=tuple(t == "linear_attention" for t in layer_types))


# ---------------------------------------------------------------- the parts, bottom up


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps) over the last dimension, in float32; 1 + w where zero-centred.
    """

    def __init__(self, width, eps, zero_centred=False):
        super().__init__()
        self.weight = nn.Parameter((torch.zeros if zero_centred else torch.ones)(width))
        self.eps, self.zero_centred = eps, zero_centred

    def forward(self, x):
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        if self.zero_centred:
            return (normed * (1 + self.weight.float())).to(x.dtype)
        return normed.to(x.dtype) * self.weight


def rope_frequencies(config):
    """Angle per position of each rotating pair of dimensions, [rotary/2] float32;
    long waves slowed by "llama3" scaling.
    """
    width = config.rotary or config.head_dim
    f = 1 / config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if config.rope_scaling is None:
        return f
    factor, low, high, original = config.rope_scaling
    turns = original * f / (2 * math.pi)  # full turns within the original context
    mix = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, divided by factor; 1: fast, kept
    return f * (mix + (1 - mix) / factor)


def rotate(x, cos, sin):
    """Rotary embedding of x [T, heads, D] by cos, sin [T, 1, R/2] float32, of the first R
    dimensions; their halves are the pairs.
    """
    a, b, rest = x.split((cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    a, b = a.float(), b.float()
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, self.gated = c.head_dim, c.gated
        self.q_proj = nn.Linear(c.hidden, (1 + c.gated) * c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=c.o_bias)
        self.qk_norm = c.qk_norm
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.eps, c.zero_centred) for _ in "qk")
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def project(self, x, cos, sin):
        q = self.q_proj(x).unflatten(-1, (-1, (1 + self.gated) * self.head_dim))
        q, *gate = q.split(self.head_dim, -1)  # [T, A, D]
        k, v = (proj(x).unflatten(-1, (-1, self.head_dim))
                for proj in (self.k_proj, self.v_proj))  # [T, K, D]
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v, *gate

    def mix(self, mix, memory, q, k, v, *gate):
        return mix.attend(q, k, v, memory), *gate

    def output(self, o, gate=None):
        return self.o_proj((o if gate is None else o * gate.sigmoid()).flatten(1))


class Decay(nn.Module):
    """g = -exp(A_log) softplus(a + dt_bias) <= 0: the log of what a head keeps of its memory.

    In float32 always: g is a rate, and rounding it to bfloat16 bends hundreds of tokens later.
    """

    def __init__(self, heads):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.ones(heads))

    def forward(self, a):
        return -self.A_log.exp() * F.softplus(a.float() + self.dt_bias)


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule (deltanet.py):
    queries, keys and values from a short convolution, the output normed per head, then gated.
    """

    def __init__(self, c):
        super().__init__()
        d = self.shape = c.delta
        self.in_proj_qkv = nn.Linear(c.hidden, d.channels, bias=False)
        self.in_proj_z = nn.Linear(c.hidden, d.v_heads * d.v_dim, bias=False)
        self.in_proj_b = nn.Linear(c.hidden, d.v_heads, bias=False)
        self.in_proj_a = nn.Linear(c.hidden, d.v_heads, bias=False)
        self.conv1d = nn.Conv1d(d.channels, d.channels, d.taps, groups=d.channels, bias=False)
        self.decay = Decay(d.v_heads)
        self.norm = RMSNorm(d.v_dim, c.eps)
        self.out_proj = nn.Linear(d.v_heads * d.v_dim, c.hidden, bias=False)

    def project(self, x, cos, sin):
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)

    def mix(self, mix, memory, qkv, z, b, a):
        d = self.shape
        qkv = F.silu(mix.convolve(qkv, self.conv1d.weight, memory))
        q, k, v = qkv.split((d.k_heads * d.k_dim, d.k_heads * d.k_dim, d.v_heads * d.v_dim), -1)
        q, k = (unit(y.unflatten(-1, (d.k_heads, d.k_dim)).float()).repeat_interleave(
            d.v_heads // d.k_heads, 1) for y in (q, k))  # [T, V, dk]
        v = v.unflatten(-1, (d.v_heads, d.v_dim))  # [T, V, dv]
        g, beta = self.decay(a), b.float().sigmoid()  # [T, V]
        return mix.recall(q * d.k_dim ** -0.5, k, v, g, beta, memory), z

    def output(self, o, z):
        gated = self.norm(o) * F.silu(z.view(o.shape).float())
        return self.out_proj(gated.flatten(1).to(z.dtype))


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); `widen` is all but the last product."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=c.mlp_bias)

    def widen(self, x):
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class Block(nn.Module):
    """x += mix(norm(x)), x += mlp(norm(x)), in three parts: `project` before tokens reach each
    other, the mixer's `mix`, `finish` after it.
    """

    # activation checkpointing: keep only the input, run again in backward; keep_attention: keep
    # what goes into attention and comes out of it, too, and run only the rest again
    recompute = keep_attention = False

    def __init__(self, c, linear=False):
        super().__init__()
        self.mixer = "linear_attn" if linear else "self_attn"
        self.input_layernorm = RMSNorm(c.hidden, c.eps, c.zero_centred)
        setattr(self, self.mixer, GatedDeltaNet(c) if linear else Attention(c))
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps, c.zero_centred)
        self.mlp = MLP(c)

    def forward(self, x, *context):
        def again(part, *inputs):
            return checkpoint(part, *inputs, use_reentrant=False)

        def once(part, *inputs):
            return part(*inputs)

        recompute = self.recompute and torch.is_grad_enabled()
        parts = recompute and self.keep_attention and self.mixer == "self_attn"
        return (again if recompute and not parts else once)(
            self._forward, again if parts else once, x, *context)

    def _forward(self, run, x, cos, sin, mix, memory):
        mixed = getattr(self, self.mixer).mix(mix, memory, *run(self.project, x, cos, sin))
        return run(self.finish, x, *mixed)

    def project(self, x, cos, sin):
        return getattr(self, self.mixer).project(self.input_layernorm(x), cos, sin)

    def finish(self, x, *mixed):
        x, wide = self.widen(x, *mixed)
        return x + self.mlp.down_proj(wide)

    def widen(self, x, *mixed):
        x = x + getattr(self, self.mixer).output(*mixed)
        return x, self.mlp.widen(self.post_attention_layernorm(x))

    def fuse(self):
        """Fuse what lies between the matrix products, by torch.compile; mixing stays as it is, and
        so does the last product, of which the backward pass needs no more than its input.
        """
        # two kinds of layers, with and without gradients, one length and any: shared by all layers
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        self.project, self.widen = torch.compile(self.project), torch.compile(self.widen)


class Head(nn.Module):
    """An output projection [V, H] of its own. A module, so that FSDP2 gathers it when the scores
    are taken and not for the whole pass: of a vocabulary of 248 thousand it is 2.5 GB.
    """

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.vocab, c.hidden))

    def forward(self, hidden, *what):
        return read(hidden, self.weight, *what)


def read(hidden, head, targets, temperature, entropy, others):
    """What hidden states [N, H] say of the next tokens: log-probs of targets [N], the entropy [N]
    or None, and {name: KL to it [N]} for others = {name: (hidden, head)}.
    """
    logp, entropy = linear_logp(hidden, head, targets, temperature=temperature, entropy=entropy)
    return logp, entropy, {name: linear_kl(hidden, head, *other, temperature=temperature)
                           for name, other in others.items()}


class Transformer(nn.Module):
    """`model` holds embeddings, blocks and final norm under the checkpoint's own names;
    `source` is its folder.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.source = config, None
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.model.layers = nn.ModuleList(Block(config, linear) for linear in config.linear)
        self.model.norm = RMSNorm(config.hidden, config.eps, config.zero_centred)
        if not config.tied:
            self.lm_head = Head(config)

    def add_value_head(self, bias=0.0):
        """Let `value` be asked: V = w . hidden + b in float32, w = 0 and b = `bias` at first.
        `save` leaves the head out.
        """
        self.value_head = nn.Linear(
            self.config.hidden, 1, device=self.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.constant_(self.value_head.bias, bias)

    @property
    def head(self):
        """The output projection [V, H]: logits = hidden @ head.T."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    @property
    def device(self):
        return self.model.norm.weight.device

    def angles(self, positions):
        """Cosine and sine of the rotary embedding at positions [T]: [T, 1, R/2] float32."""
        angle = positions[:, None, None].float() * _frequencies(self.config, positions.device)
        return angle.cos(), angle.sin()

    def _run(self, tokens, mix, cache=None):
        """`mix` is what training, prefill and decoding differ in."""
        cos, sin = self.angles(mix.positions)
        x = self.model.embed_tokens(tokens)  # [T, H]
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, mix, cache and cache.layers[i])
        return self.model.norm(x)

    def _check(self, tokens, cu_seqlens):
        """Packed input -> (cu_seqlens int64, device, whether it is computed in 16 bits on a GPU).
        """
        cu_seqlens = torch.as_tensor(cu_seqlens)  # of a list: on the host
        bounds = cu_seqlens.tolist() if cu_seqlens.ndim == 1 else []
        if (tokens.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(tokens)
                or any(a > b for a, b in pairwise(bounds))):
            raise ValueError(
                "packed input must be tokens [T] and cu_seqlens [B+1] rising from 0 to T; "
                f"got tokens {list(tokens.shape)} and cu_seqlens {cu_seqlens.tolist()[:8]}")
        # under FSDP2's mixed precision the weight is the gathered, cast one
        weight = self.model.norm.weight
        half = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        return cu_seqlens.long(), tokens.device, half

    def forward(self, tokens, cu_seqlens):
        """tokens [T] integer, cu_seqlens [B+1] -> last hidden states [T, H];
        hidden[t] predicts tokens[t + 1]. cu_seqlens may be on the CPU, or a list: then a GPU is not
        waited for.
        """
        return self._run(tokens.long(), Packed(*self._check(tokens, cu_seqlens)))

    def logp(self, tokens, cu_seqlens, scored, *, temperature=1.0, entropy=False):
        """Log-probabilities of the tokens at places `scored` [N] of the packed input,
        each given what precedes it.

        Returns (logp [N], entropy [N] or None) float32. logp[n] comes from hidden[scored[n] - 1],
        so the first token of a sequence cannot be scored. A method of the model, so that FSDP2
        gathers a tied head around it.
        """
        return self._read(tokens, cu_seqlens, scored, temperature, entropy, {})[:2]

    def logp_kl(self, tokens, cu_seqlens, scored, others, *, temperature=1.0):
        """logp and entropy as above, and beside them {name: KL [N]}: exact, over the vocabulary, of
        this policy to others = {name: what `states` of another one gives for the same tokens}.
        """
        return self._read(tokens, cu_seqlens, scored, temperature, True, others)

    def _read(self, tokens, cu_seqlens, scored, *how):
        hidden = self.forward(tokens, cu_seqlens)[scored - 1]
        if not self.config.tied:
            return self.lm_head(hidden, tokens[scored], *how)
        return read(hidden, self.head, tokens[scored], *how)

    @torch.no_grad()
    def states(self, tokens, cu_seqlens, scored):
        """(hidden [N, H], head [V, H]): the whole distributions from which the tokens at places
        `scored` are chosen, for another policy to be compared with.
        """
        hidden = self.forward(tokens, cu_seqlens)[scored - 1]
        if isinstance(self.head, DTensor):  # FSDP2 gathers it for a forward pass of its own alone
            self.lm_head.unshard()
        return hidden, self.head.detach()

    def value(self, tokens, cu_seqlens, scored):
        """V(s) of the states in which the tokens at places `scored` [N] are chosen: [N] float32,
        from hidden[scored - 1] as in logp. Needs `add_value_head`.
        """
        hidden = self.forward(tokens, cu_seqlens)[scored - 1]
        return self.value_head(hidden.float())[:, 0].clone()  # FSDP2's hooks want no view

    # ---- with a cache, for the sampler

    @torch.no_grad()
    def prefill(self, tokens, cu_seqlens, cache, slot):
        """Run B packed prompts and write what they leave behind into slots [B] of the cache.
        Returns the hidden state of each prompt's last token, [B, H].
        """
        mix = Prefill(*self._check(tokens, cu_seqlens), cache, slot)
        return self._run(tokens.long(), mix, cache)[mix.cu_seqlens[1:] - 1]

    @torch.no_grad()
    def go_on(self, tokens, cache, slot, done):
        """The same for the next tokens [T] of one sequence, `done` of which a slot has already:
        [1, H].
        """
        half = self._check(tokens, torch.tensor([0, len(tokens)]))[2]
        mix = Onward(len(tokens), tokens.device, half, cache, slot, done)
        return self._run(tokens.long(), mix, cache)[-1:]

    @torch.no_grad()
    def decode(self, tokens, lengths, cache):
        """One more token for each of the first S slots:
        tokens [S], lengths [S] tokens already cached -> hidden [S, H].
        """
        return self._run(tokens, Decode(lengths, cache), cache)


@lru_cache(maxsize=8)
def _frequencies(config, device):
    return rope_frequencies(config).to(device)


# ---------------------------------------------------------------- checkpoint folders

CARRIED = re.compile(r"(model\.)?(visual|mtp)\.")  # not run here: copied from source to checkpoint
FLOAT32 = re.compile(r"\.decay\.")  # never rounded, see Decay


def own_name(stored):
    """A checkpoint's tensor name -> the name of the parameter it fills.

    Qwen3.5 is stored as model.language_model.*, or after some tools as model.*.
    """
    name = re.sub(r"^model\.language_model\.", "model.", stored)
    return re.sub(r"\.linear_attn\.(A_log|dt_bias)$", r".linear_attn.decay.\1", name)


def load(path, *, dtype=torch.bfloat16, device="cpu", shard=None):
    """A checkpoint folder or repository id -> Transformer, weights cast to dtype on device.

    Reads config.json and model.safetensors or the shards that model.safetensors.index.json names.
    Names and shapes are checked first; then the files are mapped into memory and read tensor by
    tensor. `shard(model)` may split the still empty model over ranks (FSDP2): then a rank reads its
    own rows of each tensor and nothing else. ValueError on an unknown architecture or rope type,
    and on missing, unexpected, misshapen or non-finite tensors.
    """
    path = hf.folder(path)
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    for name, parameter in model.named_parameters():
        if FLOAT32.search(name):
            parameter.data = parameter.data.float()
    sources = _sources(path, dict(model.named_parameters()), config)
    if shard is not None:
        shard(model)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for file, names in sources.items():
        with hf.tensors(file) as tensors, torch.no_grad():
            for stored in names:
                target, rows = own_rows(parameters[own_name(stored)])
                tensor = tensors.get_slice(stored)[rows]
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{file}: tensor {stored} holds values that are not finite")
                target.copy_(tensor)
    _check_spare_head(model, path)
    model.source = path
    return model


def _check_spare_head(model, path):
    """A tied checkpoint may carry its head a second time; another one would be dropped silently."""
    embedding, rows = own_rows(model.model.embed_tokens.weight)
    for file in hf.weight_files(path) if model.config.tied else ():
        with hf.tensors(file) as tensors, torch.no_grad():
            if "lm_head.weight" in tensors.keys() and not torch.equal(
                    tensors.get_slice("lm_head.weight")[rows].to(embedding), embedding):
                raise ValueError(f"{file}: lm_head.weight differs from the embedding, but "
                                 "config.json says tie_word_embeddings: one of them is wrong")


def own_rows(parameter):
    """This rank's part of a parameter: (the tensor that holds it, which rows of the whole)."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, len(parameter))
    mesh = parameter.device_mesh
    part, parts = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    size = -(-len(parameter) // parts)  # FSDP2 splits rows like torch.chunk
    local = parameter.to_local()
    low = min(part * size, len(parameter))
    return local, slice(low, low + len(local))


def _sources(path, want, config):
    """{file: [stored name, ...]} of the tensors that fill the parameters `want` {name: Parameter}.
    """
    sources, unexpected, found = {}, [], set()
    for file in hf.weight_files(path):
        with hf.tensors(file) as tensors:
            for stored in tensors.keys():
                name = own_name(stored)
                if name in found:
                    raise ValueError(f"{file}: tensor {stored} is there twice, under two names")
                if name in want:
                    shape = tensors.get_slice(stored).get_shape()
                    if not tensors.get_slice(stored).get_dtype().startswith(("F", "BF")):
                        raise ValueError(f"{file}: tensor {stored} is "
                                         f"{tensors.get_slice(stored).get_dtype()}, not floating")
                    if shape != list(want[name].shape):
                        raise ValueError(f"{file}: tensor {stored} has shape {shape}, "
                                         f"config.json asks for {list(want[name].shape)}")
                    sources.setdefault(file, []).append(stored)
                    found.add(name)
                elif not _spare(stored, config):
                    unexpected.append(stored)
    if missing := [name for name in want if name not in found]:
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first {missing[0]}")
    if unexpected:
        raise ValueError(f"{path}: {len(unexpected)} tensors have no place in this "
                         f"architecture, the first {unexpected[0]}")
    return sources


def _spare(stored, config):
    """Whether a stored tensor is no weight of its own: a tied checkpoint may still carry its head,
    old ones rope buffers; or a part of the model that is not run here.
    """
    return (stored == "lm_head.weight" and config.tied or stored.endswith("inv_freq")
            or bool(CARRIED.match(stored)))


def save(model, path):
    """Write `model` as a Hugging Face folder, laid out as the one it came from: the same files,
    tensor names and dtypes, what is not run here (vision) and the tokenizer carried along; only a
    tied head's second copy and rope buffers are left out.

    Of a sharded model every rank calls this; tensors are gathered one by one and rank 0 writes,
    holding one file's worth at a time. The folder appears whole or not at all: it is written aside,
    then renamed.
    """
    path, parameters = Path(path), dict(model.named_parameters())
    sharded = any(isinstance(p, DTensor) for p in parameters.values())
    writes = not sharded or dist.get_rank() == 0
    with durable.folder(path) if writes else nullcontext() as aside:
        _write(model, parameters, aside)


def _write(model, parameters, aside):
    """`save` into the folder `aside`; None on ranks that only take part in the gathering."""
    writes, place, size = aside is not None, {}, 0
    for file in model.source.iterdir() if writes else ():
        if (file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model")
                and ".safetensors." not in file.name):
            shutil.copyfile(file, aside / file.name)
    for file, names in _layout(model, parameters).items():
        tensors = {}
        for stored, dtype in names.items():
            if own_name(stored) in parameters:
                tensor = parameters[own_name(stored)].detach().to(dtype)
                if isinstance(tensor, DTensor):
                    tensor = tensor.full_tensor()  # a collective: all ranks walk the same way
            elif writes:
                with hf.tensors(model.source / file) as source:
                    tensor = source.get_tensor(stored)
            if writes:
                tensors[stored] = tensor.cpu().contiguous()
        if writes:
            durable.write_tensors(aside / file, tensors, {"format": "pt"})
            place |= dict.fromkeys(tensors, file)
            size += sum(t.nbytes for t in tensors.values())
    if place and set(place.values()) != {"model.safetensors"}:
        (aside / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {"total_size": size}, "weight_map": place}, indent=2) + "\n")


def _layout(model, parameters):
    """{file name: {stored name: dtype}} of the folder a model came from; of a model that came
    from no weights, one file.
    """
    if not list(model.source.glob("*.safetensors")):
        return {"model.safetensors": {name.replace(".decay.", "."): p.dtype
                                      for name, p in parameters.items()
                                      if not name.startswith("value_head.")}}
    layout = {}
    for file in hf.weight_files(model.source):
        with hf.tensors(file) as tensors:
            kept = {stored: tensors.get_slice(stored)[:0].dtype for stored in tensors.keys()
                    if own_name(stored) in parameters or CARRIED.match(stored)}
        if kept:
            layout[file.name] = kept
    return layout


def checkpoints(run):
    """[(step, folder)] of a run folder's step_000016, ... in order; half-written ones left out."""
    found = [p for p in sorted(Path(run).glob("step_*"))
             if p.name.removeprefix("step_").isdigit() and (p / "config.json").is_file()]
    return [(int(p.name.removeprefix("step_")), p) for p in found]


def fingerprint(path):
    """Sixteen hex digits of what a checkpoint computes here: its shape and its weights,
    however they are sharded and prefixed.
    """
    path = hf.folder(path)
    config = read_config(path)
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    with torch.device("meta"):
        want = dict(Transformer(config).named_parameters())
    place = {own_name(stored): (file, stored)
             for file, names in _sources(path, want, config).items() for stored in names}
    for name in sorted(place):
        file, stored = place[name]
        with hf.tensors(file) as tensors:
            tensor = tensors.get_tensor(stored)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
