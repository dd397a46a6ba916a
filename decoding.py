"""decoding.py - one more token for every sequence, as fast as a GPU reads its weights and cache.

A decode step of S sequences multiplies S rows with every weight: its time is that of reading
weights, keys and values once. What model.py writes as some fifteen operations a layer is five
products and five kernels here, and nothing in it waits for, or depends on, the host:

    add_norm        x += what the last product gave; h = norm(x) * w
    h @ [Wq Wk Wv]                                                     one product
    place           norm of each head, rotary embedding; keys and values go to their pages
    attend_pages    one new query against a sequence's pages: a key head's queries are the rows of
                    one tile, long sequences are split over programs and joined by log-sum-exp
    o @ Wo
    add_norm
    h @ [Wgate Wup]                                                    one product
    silu_mul        silu(gate) * up
    y @ Wdown

    forward(model, tokens, lengths, cache) -> hidden [S, H]            after fuse(model)
    draw(logits, uniform) -> tokens, log-probs       two kernels over [S, V]; where the distribution
                                                     is truncated, one more finds the edge, unsorted

Each rounds where model.py rounds, which is the oracle (tests/test_decoding.py runs the kernels in
Triton's interpreter). Sequence lengths are read from a tensor, so that one CUDA graph of the whole
step serves all lengths. DeltaNet layers run as model.py has them, with a kernel for the rule.
Shapes: S sequences, A query and K key heads of D, H hidden width, V vocabulary.
"""

import torch
import torch.nn.functional as F

import mixing

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: nothing here is called
    triton = None

CHUNK = 4096  # logits that a program of `draw` reads
PROGRAMS = 512  # of attention, at least: an H200 has 132 processors, each with room for some
SHARE = 8  # pages that a program walks at least, where there are enough programs
HEADS = 8  # that a program of `place` takes
EDGES = 8  # of a truncation, tried at a time


def fuse(model):
    """Lay weights that multiply the same input end to end, every parameter a view of its part."""
    for block in model.model.layers:
        mlp = block.mlp
        if hasattr(mlp, "joined"):
            continue
        mlp.joined = _join(mlp.gate_proj, mlp.up_proj)
        if block.mixer == "self_attn":
            a = block.self_attn
            a.joined = _join(a.q_proj, a.k_proj, a.v_proj)


def _join(*layers):
    """(weight, bias or None) of linear layers side by side."""
    joined = []
    for parts in ([x.weight for x in layers], [x.bias for x in layers]):
        if parts[0] is None:
            joined.append(None)
            continue
        joined.append(torch.cat([part.data for part in parts]))
        for part, view in zip(parts, joined[-1].split([len(p) for p in parts]), strict=True):
            part.data = view
    return joined


@torch.no_grad()
def forward(model, tokens, lengths, cache):
    """What model.decode computes: tokens [S], lengths [S] tokens already cached -> [S, H]."""
    mix = mixing.Decode(lengths, cache)
    cos, sin = model.angles(mix.positions)
    x, delta = model.model.embed_tokens(tokens), None
    for block, memory in zip(model.model.layers, cache.layers, strict=True):
        x, h = add_norm(x, delta, block.input_layernorm)
        mixer = getattr(block, block.mixer)
        if block.mixer == "self_attn":
            q, *gate = place(mixer, F.linear(h, *mixer.joined), cos, sin, mix, memory)
            delta = mixer.output(attend_pages(q, *memory, mix.table, lengths), *gate)
        else:
            delta = mixer.output(*mixer.mix(mix, memory, *mixer.project(h, cos, sin)))
        x, h = add_norm(x, delta, block.post_attention_layernorm)
        delta = block.mlp.down_proj(silu_mul(F.linear(h, *block.mlp.joined)))
    return add_norm(x, delta, model.model.norm)[1]


def add_norm(x, delta, norm):
    """(x + delta, its RMSNorm): x, delta [S, H]; delta None counts as 0."""
    S, H = x.shape
    total, h = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    _add_norm_kernel[(S,)](x, x if delta is None else delta, norm.weight, total, h, H, norm.eps,
                           ADD=delta is not None, CENTRED=norm.zero_centred,
                           BLOCK=triton.next_power_of_2(H), num_warps=8)
    return total, h


def place(attention, qkv, cos, sin, mix, memory):
    """The heads of qkv [S, ...] normed and rotated: queries [S, A, D] are returned (and the gate,
    where there is one), keys and values go to their pages.
    """
    a, (keys, values), S = attention, memory, len(qkv)
    K, D = keys.shape[2:]
    width = (1 + a.gated) * D  # of a query head
    A = (qkv.shape[1] - 2 * K * D) // width
    q = qkv.new_empty(S, A, D)
    normed = a.qk_norm
    _place_kernel[(S, triton.cdiv(A + 2 * K, HEADS))](
        qkv, q, keys, values, mix.page, mix.row, cos, sin,
        a.q_norm.weight if normed else qkv, a.k_norm.weight if normed else qkv,
        qkv.shape[1], A, K, D, width, keys.shape[1], cos.shape[-1],
        a.q_norm.eps if normed else 0.0, NORM=normed, CENTRED=normed and a.q_norm.zero_centred,
        HEADS=HEADS, BLOCK=triton.next_power_of_2(D), num_warps=4)
    if not a.gated:
        return (q,)
    return q, qkv[:, :A * width].view(S, A, width)[..., D:]


def attend_pages(q, keys, values, table, lengths):
    """softmax(q k / sqrt(D)) v over a sequence's first lengths + 1 tokens.

    q [S, A, D]; keys, values [pages, page, K, D]; table [S, n]; lengths [S] -> [S, A, D].
    """
    (S, A, D), (_, page, K, _) = q.shape, keys.shape
    n, many = table.shape[1], S * K >= PROGRAMS
    # enough programs for few sequences; and none that walks all of a long one while others are done
    splits = max(PROGRAMS // (S * K), min(4, triton.cdiv(n, 8 * SHARE)), 1)
    splits = triton.next_power_of_2(min(splits, n, 32))
    o = torch.empty_like(q)
    parts = q.new_empty(splits, S, A, D, dtype=torch.float32) if splits > 1 else o
    lse = q.new_empty(splits, S, A, dtype=torch.float32)
    wide = triton.next_power_of_2(D)
    # heads of a page side by side: they share its rows of memory
    _attend_kernel[(K, splits, S)](
        q, keys, values, table, lengths, parts, lse, D**-0.5, S, A, K, D, n,
        GROUP=A // K, ROWS=max(16, triton.next_power_of_2(A // K)), BLOCK=max(16, wide), PAGE=page,
        SPLITS=splits, LEAST=SHARE if many else 1, num_warps=4,
        num_stages=2 if q.element_size() * wide > 512 else 5)
    if splits > 1:
        _join_kernel[(S * A,)](parts, lse, o, S * A, D, SPLITS=splits, BLOCK=wide, num_warps=1)
    return o


def silu_mul(x):
    """silu(x[:, :I]) * x[:, I:]: [S, 2 I] -> [S, I]."""
    S, I = x.shape[0], x.shape[1] // 2  # noqa: E741
    y = x.new_empty(S, I)
    _silu_mul_kernel[(S, triton.cdiv(I, 1024))](x, y, I, BLOCK=1024)
    return y


def draw(logits, uniform, *, temperature, top_p=1.0, top_k=0, min_p=0.0, penalised=None):
    """What sample.pick draws, without sorting: of equally likely tokens at the edge of a truncation
    all stay. logits [S, V] float32, uniform [S] float64 -> (tokens [S], logp [S]).
    """
    S, V = logits.shape
    scale = 1.0 / (temperature or 1.0)
    x, chunks = logits if penalised is None else penalised, triton.cdiv(V, CHUNK)
    top, total, kept = (logits.new_empty(S, chunks) for _ in range(3))
    edge = logits.new_empty(S)
    tokens, logp = uniform.new_empty(S, dtype=torch.long), logits.new_empty(S)
    wide, cut = triton.next_power_of_2(chunks), bool(top_p < 1 or top_k or min_p)
    _chunk_kernel[(S, chunks)](x, top, total, edge, V, chunks, scale, CUT=False, BLOCK=CHUNK)
    if cut and temperature:
        if top_k:  # they are few: in order, and cut by top_p at once
            first = x.topk(min(top_k, V)).values * scale
            p = torch.softmax(first, 1)
            edge = first.masked_fill(p.cumsum(1) - p >= top_p, float("inf")).amin(1)
        _edge_kernel[(S,)](x, top, total, edge, V, chunks, scale, top_p, min_p, TOP_K=top_k > 0,
                           TOP_P=top_p < 1, MIN_P=min_p > 0, CHUNKS=wide, EDGES=EDGES, BLOCK=1024,
                           num_warps=8)
        _chunk_kernel[(S, chunks)](x, top, kept, edge, V, chunks, scale, CUT=True, BLOCK=CHUNK)
    _draw_kernel[(S,)](x, top, total, kept if cut and temperature else total, edge, uniform, tokens,
                       logp, V, chunks, scale, GREEDY=temperature == 0,
                       CUT=cut and temperature > 0, CHUNKS=wide, BLOCK=CHUNK)
    if penalised is not None:  # log pi, not that of the penalised logits
        logp = torch.log_softmax(logits * scale, -1).gather(1, tokens[:, None])[:, 0]
    return tokens, logp


if triton is not None:

    @triton.jit
    def _weighed(x, rms, w, CENTRED: tl.constexpr, kind: tl.constexpr):
        """x rms w, rounded where model.RMSNorm rounds."""
        if CENTRED:
            y = (x * rms * (1.0 + w)).to(kind)
        else:
            y = ((x * rms).to(kind).to(tl.float32) * w).to(kind)
        return y

    @triton.jit
    def _add_norm_kernel(x_ptr, delta_ptr, w_ptr, total_ptr, h_ptr, H, eps, ADD: tl.constexpr,
                         CENTRED: tl.constexpr, BLOCK: tl.constexpr):
        column = tl.arange(0, BLOCK)
        place = tl.program_id(0).to(tl.int64) * H + column
        inside = column < H
        kind: tl.constexpr = h_ptr.dtype.element_ty
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            x = (x + tl.load(delta_ptr + place, mask=inside, other=0.0).to(tl.float32)).to(kind)
            tl.store(total_ptr + place, x, mask=inside)
            x = x.to(tl.float32)
        rms = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
        w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(h_ptr + place, _weighed(x, rms, w, CENTRED, kind), mask=inside)

    @triton.jit
    def _place_kernel(qkv_ptr, q_ptr, k_ptr, v_ptr, page_ptr, row_ptr, cos_ptr, sin_ptr, qw_ptr,
                      kw_ptr, WIDTH, A, K, D, width, PAGE, half, eps, NORM: tl.constexpr,
                      CENTRED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
        """A program takes HEADS heads of one sequence: first come queries, then keys, then values.
        """
        s, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)[None, :]
        j = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        kind: tl.constexpr = q_ptr.dtype.element_ty
        inside = (d < D) & (j < A + 2 * K)
        is_q, is_v = j < A, j >= A + K
        source = qkv_ptr + s * WIDTH + tl.where(is_q, j * width, A * width + (j - A) * D)
        # d and the dimension that it rotates with; beyond the first 2 * half none does
        other = tl.where(d < half, d + half, tl.where(d < 2 * half, d - half, d))
        x = tl.load(source + d, mask=inside, other=0.0)
        y = tl.load(source + other, mask=inside, other=0.0)
        if NORM:
            x32, y32 = x.to(tl.float32), y.to(tl.float32)
            rms = 1.0 / tl.sqrt(tl.sum(x32 * x32, 1) / D + eps)[:, None]
            w = tl.where(is_q, tl.load(qw_ptr + d, mask=d < D, other=0.0),
                         tl.load(kw_ptr + d, mask=d < D, other=0.0)).to(tl.float32)
            u = tl.where(is_q, tl.load(qw_ptr + other, mask=d < D, other=0.0),
                         tl.load(kw_ptr + other, mask=d < D, other=0.0)).to(tl.float32)
            x = tl.where(is_v, x, _weighed(x32, rms, w, CENTRED, kind))
            y = tl.where(is_v, y, _weighed(y32, rms, u, CENTRED, kind))
        turns = d < 2 * half
        angle = s * half + tl.where(d < half, d, d - half)
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
        x32, y32 = x.to(tl.float32), y.to(tl.float32)
        turned = (x32 * cos + tl.where(d < half, -y32, y32) * sin).to(kind)
        x = tl.where(is_v, x, turned)
        cached = (tl.load(page_ptr + s) * PAGE + tl.load(row_ptr + s)) * K
        tl.store(q_ptr + (s * A + j) * D + d, x, mask=inside & is_q)
        tl.store(k_ptr + (cached + j - A) * D + d, x, mask=inside & (j >= A) & (j < A + K))
        tl.store(v_ptr + (cached + j - A - K) * D + d, x, mask=inside & is_v)

    @triton.jit(do_not_specialize=["S", "n"])  # or it is compiled anew as a batch drains
    def _attend_kernel(q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, o_ptr, lse_ptr, scale, S, A, K,
                       D, n, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                       PAGE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
        h, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        length = tl.load(length_ptr + s) + 1
        pages = (length + PAGE - 1) // PAGE
        share = tl.maximum((pages + SPLITS - 1) // SPLITS, LEAST)
        first = split * share
        g, d, t = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, PAGE)
        lse = lse_ptr + (split * S + s) * A + h * GROUP + g
        if SPLITS > 1:
            if first >= pages:
                tl.store(lse, tl.full((ROWS,), float("-inf"), tl.float32), mask=g < GROUP)
                return
        rows = (s * A + h * GROUP + g)[:, None] * D + d[None, :]
        real = (g < GROUP)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + rows, mask=real, other=0.0)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in range(first, tl.minimum(first + share, pages)):
            page = tl.load(table_ptr + s * n + i).to(tl.int64)
            seen = i * PAGE + t < length
            at = ((page * PAGE + t) * K + h)[:, None] * D + d[None, :]
            there = seen[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + at, mask=there, other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            x = tl.where(seen[None, :], x, float("-inf"))  # a page's first token is always seen
            new_top = tl.maximum(top, tl.max(x, 1))
            old = tl.exp(top - new_top)
            e = tl.exp(x - new_top[:, None])
            v = tl.load(v_ptr + at, mask=there, other=0.0)
            total = total * old + tl.sum(e, 1)
            acc = acc * old[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee")
            top = new_top
        tl.store(o_ptr + split.to(tl.int64) * S * A * D + rows,
                 (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=real)
        if SPLITS > 1:
            tl.store(lse, top + tl.log(total), mask=g < GROUP)

    @triton.jit
    def _join_kernel(part_ptr, lse_ptr, o_ptr, HEADS, D, SPLITS: tl.constexpr,
                     BLOCK: tl.constexpr):
        """o = sum of the splits' o, each by its share of the softmax's sum. Some have none."""
        head = tl.program_id(0).to(tl.int64)
        split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
        lse = tl.load(lse_ptr + split * HEADS + head)
        share = tl.exp(lse - tl.max(lse, 0))
        share /= tl.sum(share, 0)
        part = tl.load(part_ptr + (split[:, None] * HEADS + head) * D + d[None, :],
                       mask=(lse > float("-inf"))[:, None] & (d < D)[None, :], other=0.0)
        o = tl.sum(part * share[:, None], 0)
        tl.store(o_ptr + head * D + d, o.to(o_ptr.dtype.element_ty), mask=d < D)

    @triton.jit
    def _silu_mul_kernel(x_ptr, y_ptr, I, BLOCK: tl.constexpr):  # noqa: E741
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(x_ptr + row * 2 * I + column, mask=column < I, other=0.0)
        up = tl.load(x_ptr + row * 2 * I + I + column, mask=column < I, other=0.0)
        x = gate.to(tl.float32)
        silu = (x / (1.0 + tl.exp(-x))).to(gate.dtype).to(tl.float32)
        tl.store(y_ptr + row * I + column, (silu * up.to(tl.float32)).to(gate.dtype),
                 mask=column < I)

    @triton.jit
    def _chunk_kernel(x_ptr, top_ptr, total_ptr, edge_ptr, V, chunks, scale, CUT: tl.constexpr,
                      BLOCK: tl.constexpr):
        """Of a chunk of logits: max x, and sum e^(x - max), with CUT only of what reaches the edge.
        """
        row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * V + column, mask=column < V, other=float("-inf")) * scale
        top = tl.max(x, 0)
        e = tl.exp(x - tl.where(top == float("-inf"), 0.0, top))
        if CUT:
            e = tl.where(x >= tl.load(edge_ptr + row), e, 0.0)
        tl.store(top_ptr + row * chunks + chunk, top)
        tl.store(total_ptr + row * chunks + chunk, tl.sum(e, 0))

    @triton.jit
    def _mass(x_ptr, V, scale, edges, top, EDGES: tl.constexpr, BLOCK: tl.constexpr):
        """Sum of e^(x - top) of a row's logits x >= edge, for each of EDGES edges."""
        mass = tl.zeros((EDGES, BLOCK), tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=4):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + column, mask=column < V, other=float("-inf")) * scale
            mass += tl.where(x[None, :] >= edges[:, None], tl.exp(x - top)[None, :], 0.0)
        return tl.sum(mass, 1)

    @triton.jit
    def _edge_kernel(x_ptr, top_ptr, total_ptr, edge_ptr, V, chunks, scale, top_p, min_p,
                     TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
                     CHUNKS: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr):
        """The least x that stays: what top_k has left; else, by cutting an interval into EDGES
        parts again and again, the largest edge that leaves a mass of top_p; and not further below
        the likeliest than min_p.
        """
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row * V
        c = tl.arange(0, CHUNKS)
        tops = tl.load(top_ptr + row * chunks + c, mask=c < chunks, other=float("-inf"))
        top = tl.max(tops, 0)
        edge = top - 104.0  # e^-104 is 0 in float32
        if TOP_K:
            edge = tl.load(edge_ptr + row)
        elif TOP_P:
            mass = tl.load(total_ptr + row * chunks + c, mask=c < chunks, other=0.0)
            aim = top_p * tl.sum(mass * tl.exp(tops - top), 0)
            i, part = tl.arange(0, EDGES), 104.0
            for _ in range(9):  # until the parts are as fine as float32
                part /= EDGES
                edges = edge + i * part  # the first of them leaves enough
                enough = (_mass(x_ptr, V, scale, edges, top, EDGES, BLOCK) >= aim) | (i == 0)
                edge += part * (tl.sum(enough.to(tl.int32), 0) - 1)
            at_top = _mass(x_ptr, V, scale, top + 0.0 * i, top, EDGES, BLOCK)
            edge = tl.where(tl.max(at_top, 0) >= aim, top, edge)
        if MIN_P:
            edge = tl.maximum(edge, top + tl.log(min_p))
        tl.store(edge_ptr + row, edge)

    @triton.jit
    def _draw_kernel(x_ptr, top_ptr, total_ptr, kept_ptr, edge_ptr, uniform_ptr, token_ptr,
                     logp_ptr, V, chunks, scale, GREEDY: tl.constexpr, CUT: tl.constexpr,
                     CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
        """Find the chunk in which the cumulative sum passes uniform * sum, then the token in it."""
        row = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, CHUNKS)
        tops = tl.load(top_ptr + row * chunks + c, mask=c < chunks, other=float("-inf"))
        top = tl.max(tops, 0)
        weight = tl.exp(tops - top)
        total = tl.load(total_ptr + row * chunks + c, mask=c < chunks, other=0.0) * weight
        mass = tl.load(kept_ptr + row * chunks + c, mask=c < chunks, other=0.0) * weight
        mass = mass.to(tl.float64)
        aim = tl.load(uniform_ptr + row) * tl.sum(mass, 0)
        if GREEDY:
            chunk = tl.min(tl.where(tops == top, c, CHUNKS), 0)
        else:
            chunk = tl.sum((tl.cumsum(mass, 0) <= aim).to(tl.int32), 0)
            chunk = tl.minimum(chunk, tl.max(tl.where(mass > 0, c, 0), 0))
        before = tl.sum(tl.where(c < chunk, mass, 0.0), 0)
        i = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * V + chunk * BLOCK + i, mask=chunk * BLOCK + i < V,
                    other=float("-inf")) * scale
        if GREEDY:
            place = tl.min(tl.where(x == top, i, BLOCK - 1), 0)
        else:
            e = tl.exp(x - top)
            if CUT:
                e = tl.where(x >= tl.load(edge_ptr + row), e, 0.0)
            e = e.to(tl.float64)
            place = tl.sum((before + tl.cumsum(e, 0) <= aim).to(tl.int32), 0)
            place = tl.minimum(place, tl.max(tl.where(e > 0, i, 0), 0))  # rounding at the very end
        picked = tl.sum(tl.where(i == place, x, 0.0), 0)
        tl.store(token_ptr + row, (chunk * BLOCK + place).to(tl.int64))
        tl.store(logp_ptr + row, picked - top - tl.log(tl.sum(total, 0)))
