"""mixing.py - how tokens of a sequence reach each other: attention, convolution and the gated delta
rule, in training, in prefill and in decoding.

A layer computes queries, keys and values (model.py); what it does with them depends on where the
earlier tokens are. Three classes with the same three methods answer that:

    Packed    B whole sequences laid end to end             training, scoring
    Prefill   the same, and what they leave behind goes
              into slots of the cache                       the prompts of the sampler
    Onward    the next piece of one sequence, of which the
              cache has the beginning                       a long prompt
    Decode    one new token for each slot                   every further token

    attend(q, k, v, memory)            causal softmax attention
    convolve(x, weight, memory)        causal convolution over the last few tokens, per channel
    recall(q, k, v, g, beta, memory)   the gated delta rule (deltanet.py)

`memory` is a layer's part of the Cache, which holds keys and values in pages. Nothing crosses a
boundary between sequences: attention is cut there, convolutions see zeros, delta-rule states start
at zero. Shapes: T tokens, B sequences, A query heads, K key/value heads, D head width; C channels;
V heads of dk by dv (deltanet.py); S slots.
"""

import inspect
import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from deltanet import Chunks, gated_delta_rule, gated_delta_step

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# causal, with fewer heads of keys than of queries, said in the words of this torch's varlen_attn
CAUSAL, GROUPED = {}, False
if varlen_attn is not None:
    known = inspect.signature(varlen_attn).parameters
    CAUSAL = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    GROUPED = "enable_gqa" in known

PAGE = {"cpu": 16, "cuda": 64}  # tokens of the cache that are given out together
LONG, ROUND = 4096, 1024  # tokens: of sequences that run one by one, and what they are rounded to
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH]  # the first that can


class Packed:
    """A forward pass over B packed sequences, with what is computed once and shared by all layers.

    `positions` [T] restart at each sequence. Where no variable-length kernel serves (CPU, float32),
    attention runs on right-padded copies, in groups of sequences of similar length: `pad` [P] is
    the token in each padded place, `unpad` [T] the place of each token, `groups` the
    [count, length] of each group. Causality makes a mask unnecessary: no token ever sees the
    padding to its right.
    """

    def __init__(self, cu_seqlens, device, half):
        self.sizes = sizes = cu_seqlens.diff().tolist()  # the only look, and cu_seqlens' own device
        self.cu_seqlens = cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        lengths, starts, T = cu_seqlens.diff(), cu_seqlens[:-1], sum(sizes)
        self.segment = torch.arange(len(sizes), device=device).repeat_interleave(
            lengths, output_size=T)
        self.positions = torch.arange(T, device=device) - starts[self.segment]
        self.half = half
        if half and (varlen_attn is not None or self.few_and_long):
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

    @property
    def few_and_long(self):
        """Whether attention runs sequence by sequence: a step for long ones, many for short."""
        return len(self.positions) >= LONG * len(self.sizes)

    @cached_property
    def chunks(self):
        return Chunks(self.cu_seqlens, self.sizes)

    def attend(self, q, k, v, memory=None):
        """Causal attention: q [T, A, D], k and v [T, K, D] -> [T, A, D]."""
        return attention(q, k, v, self)

    def convolve(self, x, weight, memory=None):
        """Causal convolution of each channel: x [T, C], weight [C, 1, taps] -> [T, C]."""
        gap = weight.shape[-1] - 1  # rows of zeros before each sequence: its history
        place = torch.arange(len(x), device=x.device) + gap * self.segment
        # one gap more than sequences: an empty pack is as long as the kernel, too
        history = x.new_zeros(len(x) + gap * len(self.cu_seqlens), x.shape[1])
        history = history.index_copy(0, place + gap, x)
        return F.conv1d(history.T[None], weight, groups=len(weight))[0].T.index_select(0, place)

    def recall(self, q, k, v, g, beta, memory=None):
        """The gated delta rule: q, k [T, V, dk], v [T, V, dv], g, beta [T, V] -> [T, V, dv]."""
        return gated_delta_rule(q, k, v, g, beta, self.chunks)[0]


class Prefill(Packed):
    """B packed prompts; what the b-th leaves behind is written into slot[b] of the cache."""

    def __init__(self, cu_seqlens, device, half, cache, slot):
        super().__init__(cu_seqlens, device, half)
        self.slot = slot
        self.page, self.row = cache.places(slot[self.segment], self.positions)

    def attend(self, q, k, v, memory):
        for cached, new in zip(memory, (k, v), strict=True):
            cached[self.page, self.row] = new
        return super().attend(q, k, v)

    def convolve(self, x, weight, memory):
        history, _ = memory  # [S, taps - 1, C]
        last = self.cu_seqlens[1:, None] + torch.arange(-history.shape[1], 0, device=x.device)
        there = (last >= self.cu_seqlens[:-1, None])[..., None]  # a short prompt: zeros before it
        history[self.slot] = torch.where(there, x[last.clamp(min=0)], 0)
        return super().convolve(x, weight)

    def recall(self, q, k, v, g, beta, memory):
        o, memory[1][self.slot] = gated_delta_rule(q, k, v, g, beta, self.chunks)
        return o


class Onward(Packed):
    """The next T tokens of one sequence, whose first `done` are in a slot of the cache already."""

    def __init__(self, T, device, half, cache, slot, done):
        super().__init__(torch.tensor([0, T]), device, half)
        self.slot, self.end = slot, done + T
        self.positions = self.positions + done
        self.page, self.row = cache.places(torch.full_like(self.positions, slot), self.positions)
        self.pages = cache.table[slot, :-(-self.end // cache.page)].long()

    def attend(self, q, k, v, memory):
        parts = [q.transpose(0, 1)[None]]  # [1, A, T, D]
        for cached, new in zip(memory, (k, v), strict=True):
            cached[self.page, self.row] = new
            whole = cached[self.pages].flatten(0, 1)[:self.end]
            parts.append(whole.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)[None])
        seen = causal_lower_right(len(q), self.end)  # the last token sees all
        return F.scaled_dot_product_attention(*parts, attn_mask=seen)[0].transpose(0, 1)

    def convolve(self, x, weight, memory):
        window = torch.cat((memory[0][self.slot], x))  # what came before, instead of zeros
        memory[0][self.slot] = window[len(x):]
        return F.conv1d(window.T[None], weight, groups=len(weight))[0].T

    def recall(self, q, k, v, g, beta, memory):
        state = memory[1][self.slot][None]
        o, memory[1][self.slot] = gated_delta_rule(q, k, v, g, beta, self.chunks, state)
        return o


class Decode:
    """One token for each of the first S slots, `lengths` [S] of whose tokens are cached already."""

    def __init__(self, lengths, cache):
        S = len(lengths)
        self.positions, self.table, self.cache = lengths, cache.table[:S], cache
        self.page, self.row = cache.places(torch.arange(S, device=lengths.device), lengths)

    def attend(self, q, k, v, memory):
        for cached, new in zip(memory, (k, v), strict=True):
            cached[self.page, self.row] = new
        return self.attend_cached(q, *memory)

    def attend_cached(self, q, keys, values):
        """q [S, A, D] over all tokens up to the new one: [S, A, D]."""
        longest = int(self.positions.max()) + 1
        pages = self.table[:, :-(-longest // self.cache.page)].flatten()

        def heads(cached):  # K x [S, n, D]: only that much of the cache is read
            rows = self.cache.gather(cached, pages).view(len(q), -1, *cached.shape[2:])
            return rows[:, :longest].unbind(2)

        unseen = torch.arange(longest, device=q.device) > self.positions[:, None]
        bias = q.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))[:, None]
        # a key head's queries are the rows of one product
        queries = (q * q.shape[-1] ** -0.5).unflatten(1, (keys.shape[2], -1)).unbind(1)
        p = [torch.baddbmm(bias, rows, k.mT).softmax(-1)
             for rows, k in zip(queries, heads(keys), strict=True)]
        return torch.cat([weights @ v for weights, v in zip(p, heads(values), strict=True)], 1)

    def convolve(self, x, weight, memory):
        history = memory[0][:len(x)]  # [S, taps - 1, C]
        window = torch.cat((history, x[:, None]), 1)
        history.copy_(window[:, 1:])
        return (window.float() * weight[:, 0].float().T).sum(1).to(x.dtype)

    def recall(self, q, k, v, g, beta, memory):
        return gated_delta_step(q, k, v, g, beta, memory[1][:len(q)])


def attention(q, k, v, packed):
    """Causal attention within each packed sequence: q [T, A, D], k and v [T, K, D] -> [T, A, D].

    In 16 bits on a GPU: long sequences one by one through cuDNN (measured on an H200, 32 heads of
    128, forward and backward: 1.7 times the rate of the flash kernel), short ones together through
    the variable-length kernel. Elsewhere: padded.
    """
    if packed.half and packed.few_and_long:
        return _one_by_one(q, k, v, packed.sizes)
    if packed.half and varlen_attn is not None:
        group, options = q.shape[1] // k.shape[1], dict(CAUSAL)
        if GROUPED:
            options["enable_gqa"] = group > 1
        else:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # [T, A, D]
        bounds, longest = packed.cu_seqlens.int(), max(packed.sizes)
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    pieces, offset = [], 0
    q, k, v = (x.index_select(0, packed.pad) for x in (q, k, v))  # [P, heads, D]
    for count, length in packed.groups:
        rows = slice(offset, offset := offset + count * length)
        parts = (x[rows].view(count, length, *x.shape[1:]).transpose(1, 2)
                 for x in (q, k, v))  # [count, heads, length, D]
        o = F.scaled_dot_product_attention(*parts, is_causal=True,
                                           enable_gqa=q.shape[1] != k.shape[1])
        pieces.append(o.transpose(1, 2).flatten(0, 1))  # [count * length, A, D]
    return torch.cat(pieces).index_select(0, packed.unpad)


def _one_by_one(q, k, v, sizes):
    """Attention of each sequence alone. cuDNN plans anew for every length, so lengths are rounded
    up; causality makes a mask unnecessary.
    """
    pieces = []
    with sdpa_kernel(BACKENDS, set_priority=True):
        for size, *parts in zip(sizes, *(x.split(sizes) for x in (q, k, v)), strict=True):
            if size % ROUND:
                parts = [F.pad(x, (0, 0, 0, 0, 0, -size % ROUND)) for x in parts]
            o = F.scaled_dot_product_attention(
                *(x.transpose(0, 1).unsqueeze(0) for x in parts), is_causal=True,
                enable_gqa=q.shape[1] != k.shape[1])
            o = o.squeeze(0).transpose(0, 1)  # views, as their gradients are
            pieces.append(o[:size] if size % ROUND else o)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


class Cache:
    """What S slots remember, a slot holding one growing sequence. `layers` has a pair a layer.

    Attention: keys and values, [pages, page, K, D]. Row s of `table` [S, n] names the pages of slot
    s, in order; so memory is taken as sequences grow, and samples of one prompt share the pages
    that it fills. Page 0 belongs to nobody: slots without a sequence point there.
    DeltaNet: the last inputs of the convolution [S, taps - 1, C] and the state [S, V, dk, dv],
    which do not grow.
    """

    def __init__(self, model, slots, max_len, pages=0):
        """`pages`: of all slots; 0: as many as sequences of max_len can ever need."""
        like, c = model.model.embed_tokens.weight, model.config
        self.page = PAGE[like.device.type]
        most = -(-max_len // self.page)
        pages = pages or slots * most
        self.linear = c.linear
        self.layers = [tuple(
            torch.zeros(*shape, dtype=dtype or like.dtype, device=like.device)
            for shape, dtype in _shapes(c, kind, slots, pages + 1, self.page)) for kind in c.linear]
        self.free = list(range(pages, 0, -1))
        self.users = [0] * (pages + 1)
        self.held = [[] for _ in range(slots)]  # pages of each slot
        self.host = np.zeros((slots, most), dtype=np.int32)
        self.table = torch.tensor(self.host, device=like.device)
        self.changed = 0  # rows of the table, from the first, that the device may not know
        self.gathered = None

    def grow(self, slot, length):
        """Take pages for `length` tokens of a slot; False, and none taken, if too few are free."""
        held = self.held[slot]
        needed = -(-length // self.page) - len(held)
        if needed > len(self.free):
            return False
        for _ in range(needed):
            self._hold(slot, self.free.pop())
        return True

    def room(self, slot):
        """Tokens for which a slot has pages."""
        return len(self.held[slot]) * self.page

    def share(self, source, target, length):
        """Give empty slot `target` the pages that the first `length` tokens of slot `source` fill,
        and one of its own for the rest, to be copied; False, and none taken, if none is free.
        """
        full, rest = divmod(length, self.page)
        if rest and not self.free:
            return False
        for page in self.held[source][:full]:
            self._hold(target, page)
        return self.grow(target, length)

    def copy(self, shared):
        """Copy what `share` has left to be copied, of [(source, target, length)], once the sources
        have it.
        """
        slots = [(source, target) for source, target, _ in shared]
        pages = [(self.held[source][length // self.page], self.held[target][length // self.page])
                 for source, target, length in shared if length % self.page]
        for pair, linear in zip(self.layers, self.linear, strict=True):
            if rows := slots if linear else pages:
                source, target = map(list, zip(*rows, strict=True))
                for x in pair:
                    x[target] = x[source]

    def release(self, slot):
        for page in self.held[slot]:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)
        self.held[slot] = []
        self.host[slot] = 0
        self.changed = max(self.changed, slot + 1)

    def move(self, source, target):
        """Let slot `target`, which is released, have the sequence of slot `source`."""
        self.held[source], self.held[target] = self.held[target], self.held[source]
        self.host[target], self.host[source] = self.host[source], 0
        self.changed = max(self.changed, source + 1, target + 1)
        for pair, linear in zip(self.layers, self.linear, strict=True):
            for x in pair if linear else ():
                x[target] = x[source]

    def sync(self):
        """Tell the device which pages slots have now."""
        if self.changed:
            self.table[:self.changed].copy_(torch.from_numpy(self.host[:self.changed]))
            self.changed = 0

    def places(self, slot, position):
        """(page, row in it) of tokens: slot, position [T] -> [T], [T]."""
        return self.table[slot, position // self.page].long(), position % self.page

    def gather(self, x, pages):
        """x[pages], in memory that the next call writes over: fresh memory costs a CPU more than
        the copy.
        """
        if self.gathered is None or len(self.gathered) < len(pages):
            self.gathered = x.new_empty(len(pages), *x.shape[1:])
        return torch.index_select(x, 0, pages, out=self.gathered[:len(pages)])

    def _hold(self, slot, page):
        self.host[slot, len(self.held[slot])] = page
        self.held[slot].append(page)
        self.users[page] += 1
        self.changed = max(self.changed, slot + 1)

    @staticmethod
    def bytes(config, slots, tokens, dtype):
        """Of so many slots with pages for so many tokens in all."""
        return sum(math.prod(shape) * (kind or dtype).itemsize for linear in config.linear
                   for shape, kind in _shapes(config, linear, slots, tokens, 1))


def _shapes(c, linear, slots, pages, page):
    """((shape, dtype or the weights'), ...) of the two tensors of a layer."""
    if linear:
        d = c.delta
        return (((slots, d.taps - 1, d.channels), None),
                ((slots, d.v_heads, d.k_dim, d.v_dim), torch.float32))
    return (((pages, page, c.kv_heads, c.head_dim), None),) * 2
