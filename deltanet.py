"""deltanet.py - the gated delta rule: attention whose memory has a fixed size.

A head keeps a matrix S [dk, dv] that maps keys to values. Every token lets it fade by e^g (g <= 0)
and then corrects what it returns for the token's key, by a share beta of the error:

    S <- e^{g_t} S;   S <- S + k_t beta_t (v_t - S^T k_t)^T;   o_t = S^T q_t          (recurrent)

(Gated DeltaNet, Yang et al., arXiv 2412.06464.) That is how a sampler runs it, token by token. For
training the same map is cut into chunks of N = 64 tokens. With G the sum of g from the start of the
chunk, all rows of a chunk at once (i, j <= i its tokens):

    A_ij  = beta_i (k_i . k_j) e^{G_i - G_j}  for j < i        what token i sees of earlier ones
    U     = (I + A)^{-1} diag(beta) V                          the corrections, if S were 0
    W     = (I + A)^{-1} diag(beta e^G) K                      and how they depend on S
    X     = U - W S                                            the corrections     (chunked)
    O     = diag(e^G) Q S + tril(Q K^T e^{G_i - G_j}) X
    S     <- e^{G_N} S + (diag(e^{G_N - G}) K)^T X

Everything but X and S is independent between chunks: batched matrix products and one triangular
solve, in torch. The two recurrent lines walk from chunk to chunk: a loop in plain torch (the
reference, any device) and a Triton kernel with its own backward on a GPU. A sampler's step is one
kernel there, too. All of it is float32.

Sequences are packed: chunks start anew at every boundary, with S = 0; nothing leaks. Shapes:
T tokens of B sequences, C chunks of all of them, V heads.
"""

import torch
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the plain torch form serves
    triton = None

CHUNK = 64
TOKEN_HEADS = 1 << 19  # worked on at once, at about 11 KB each; more heads take turns


class Chunks:
    """How B packed sequences are cut into C chunks of at most CHUNK tokens, none over a boundary.

    `place` [T] is each token's place in the padded [C * CHUNK]; `first` [B] and `count` [B] are the
    chunks of each sequence.
    """

    def __init__(self, cu_seqlens, lengths):
        """`lengths`: those of the sequences, on the host."""
        T, device = sum(lengths), cu_seqlens.device
        self.sizes = [-(-length // CHUNK) for length in lengths]
        self.total = sum(self.sizes)
        self.count = (cu_seqlens.diff() + CHUNK - 1) // CHUNK
        self.first = self.count.cumsum(0) - self.count
        segment = torch.arange(len(lengths), device=device).repeat_interleave(
            cu_seqlens.diff(), output_size=T)
        self.place = (self.first[segment] * CHUNK
                      + torch.arange(T, device=device) - cu_seqlens[segment])


def gated_delta_rule(q, k, v, g, beta, chunks, state=None):
    """The chunked rule over packed sequences, every state starting at 0, or at `state`
    [B, V, dk, dv] where no gradient is asked for.

    q, k [T, V, dk] (normalised and scaled by the caller), v [T, V, dv], g, beta [T, V].
    Returns (o [T, V, dv], S at the end of each sequence [B, V, dk, dv]), float32.
    """
    heads = max(1, TOKEN_HEADS // max(len(q), 1))
    if state is None:
        state = q.new_zeros(len(chunks.sizes), *q.shape[1:], v.shape[-1], dtype=torch.float32)
    parts = [tuple(x[:, h:h + heads] for x in (q, k, v, g, beta, state))
             for h in range(0, q.shape[1], heads)]
    if len(parts) == 1:
        return _rule(*parts[0], chunks)
    done = [checkpoint(_rule, *part, chunks, use_reentrant=False) for part in parts]
    return torch.cat([o for o, _ in done], 1), torch.cat([state for _, state in done], 1)


def gated_delta_step(q, k, v, g, beta, state):
    """The recurrent rule for one token of each of S sequences.

    q, k [S, V, dk], v [S, V, dv], g, beta [S, V]; `state` [S, V, dk, dv] float32 is updated in
    place, crossed once by a Triton kernel on a GPU. Returns o [S, V, dv] float32.
    """
    q, k, v, g, beta = (x.float().contiguous() for x in (q, k, v, g, beta))
    step = _step_triton if triton is not None and state.is_cuda else _step
    return step(q, k, v, g, beta, state)


def _step(q, k, v, g, beta, state):
    state.mul_(g.exp()[..., None, None])
    error = beta[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])  # [S, V, dv]
    state.view(-1, *state.shape[2:]).baddbmm_(k.flatten(0, 1)[:, :, None],
                                              error.flatten(0, 1)[:, None])
    return (q[..., None, :] @ state)[..., 0, :]


def _step_triton(q, k, v, g, beta, state):
    S, V, dk, dv = state.shape
    o = torch.empty_like(v)
    _step_kernel[(S * V, triton.cdiv(dv, 32))](
        q, k, v, g, beta, state, o, dk, dv, DK=triton.next_power_of_2(dk), BLOCK=32, num_warps=4)
    return o


def _rule(q, k, v, g, beta, state, chunks):
    def cut(x):  # [T, V, ...] -> [C, V, N, ...] float32; what pads a chunk is 0 and changes nothing
        padded = torch.zeros(chunks.total * CHUNK, *x.shape[1:], device=x.device)
        padded = padded.index_copy(0, chunks.place, x.float())
        return padded.unflatten(0, (chunks.total, CHUNK)).transpose(1, 2)

    q, k, v, g, beta = (cut(x) for x in (q, k, v, g, beta))
    G = g.cumsum(-1)  # [C, V, N]
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    # masked before exp: above the diagonal G_i - G_j is positive and may overflow
    fade = (G[..., :, None] - G[..., None, :]).masked_fill(later, float("-inf")).exp()
    A = beta[..., None] * fade * (k @ k.mT)  # its diagonal is not read: unitriangular
    right = beta[..., None] * torch.cat((v, G.exp()[..., None] * k), -1)
    U, W = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True).split(
        (v.shape[-1], k.shape[-1]), dim=-1)
    K = (G[..., -1:] - G).exp()[..., None] * k
    walk = _Walk.apply if triton is not None and q.is_cuda else _walk
    X, S, final = walk(W, U, K, G[..., -1].exp(), state, chunks)
    O = (G.exp()[..., None] * q) @ S + (fade * (q @ k.mT)) @ X  # [C, V, N, dv]
    return O.transpose(1, 2).flatten(0, 1).index_select(0, chunks.place), final


# ---- from chunk to chunk: W [C, V, N, dk], U [C, V, N, dv], K [C, V, N, dk], fade [C, V],
# S at each sequence's start [B, V, dk, dv]
# -> X [C, V, N, dv], S at each chunk's start [C, V, dk, dv], S at each sequence's end


def _walk(W, U, K, fade, state, chunks):
    """The plain form: step i takes the i-th chunk of all sequences that have one."""
    order = sorted(range(len(chunks.sizes)), key=lambda b: -chunks.sizes[b])
    first = chunks.first[order]
    S = state[order]  # longest sequence first
    visited, states, corrections, ended = [first[:0]], [S[:0]], [U[:0]], []
    for i in range(max(chunks.sizes, default=0)):
        going = sum(size > i for size in chunks.sizes)
        ended.append(S[going:])
        S, c = S[:going], first[:going] + i
        X = U[c] - W[c] @ S
        visited.append(c)
        states.append(S)
        corrections.append(X)
        S = fade[c][..., None, None] * S + K[c].mT @ X
    back = torch.cat(visited).argsort()
    final = torch.cat((S, *reversed(ended)))[torch.tensor(order).argsort().to(S.device)]
    return torch.cat(corrections)[back], torch.cat(states)[back], final


class _Walk(torch.autograd.Function):
    """The same in Triton: one program a sequence, head and block of columns of S.

    Backward, with D the gradient of S after a chunk, last chunk first:
    dX += K D;  dU = dX;  dW = -dX S^T;  dK = X D^T;  d fade = <D, S>;  D <- dS + fade D - W^T dX.
    """

    @staticmethod
    def forward(ctx, W, U, K, fade, state, chunks):
        W, U, K, fade = (x.contiguous() for x in (W, U, K, fade))
        C, V, _, dk = W.shape
        X, S = torch.empty_like(U), U.new_empty(C, V, dk, U.shape[-1])
        final = state.contiguous().clone()  # where the walk starts, until it has ended
        _launch(_walk_kernel, chunks, W, K, fade, U, X, S, final)
        ctx.save_for_backward(W, K, fade, X, S)
        ctx.chunks = chunks
        return X, S, final

    @staticmethod
    def backward(ctx, dX, dS, dfinal):
        W, K, fade, X, S = ctx.saved_tensors
        dU, D = torch.empty_like(X), torch.empty_like(S)
        _launch(_walk_back_kernel, ctx.chunks, W, K, fade,
                *(x.contiguous() for x in (dX, dS, dfinal)), dU, D)
        return -dU @ S.mT, dU, X @ D.mT, (D * S).sum((-1, -2)), None, None


if triton is not None:

    @triton.jit
    def _tile(matrix, rows, columns, column0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Offsets of columns column0 ... of one [rows, columns] matrix of many, and which exist."""
        i, j = tl.arange(0, ROWS)[:, None], column0 + tl.arange(0, COLUMNS)[None, :]
        return matrix * rows * columns + i * columns + j, (i < rows) & (j < columns)

    @triton.jit
    def _step_kernel(q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, o_ptr, dk, dv,
                     DK: tl.constexpr, BLOCK: tl.constexpr):
        head, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
        i, j = tl.arange(0, DK), column + tl.arange(0, BLOCK)
        place, inside = _tile(head, dk, dv, column, DK, BLOCK)
        S = tl.load(state_ptr + place, mask=inside, other=0.0) * tl.exp(tl.load(g_ptr + head))
        q = tl.load(q_ptr + head * dk + i, mask=i < dk, other=0.0)[:, None]
        k = tl.load(k_ptr + head * dk + i, mask=i < dk, other=0.0)[:, None]
        v = tl.load(v_ptr + head * dv + j, mask=j < dv, other=0.0)
        error = tl.load(beta_ptr + head) * (v - tl.sum(k * S, 0))
        S += k * error[None, :]
        tl.store(state_ptr + place, S, mask=inside)
        tl.store(o_ptr + head * dv + j, tl.sum(q * S, 0), mask=j < dv)

    @triton.jit
    def _walk_kernel(first_ptr, count_ptr, w_ptr, k_ptr, fade_ptr, u_ptr, x_ptr, s_ptr, final_ptr,
                     V, dk, dv, N: tl.constexpr, DK: tl.constexpr, BLOCK: tl.constexpr):
        b, h, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK
        first = tl.load(first_ptr + b)
        ends, in_ends = _tile(b * V + h, dk, dv, column, DK, BLOCK)
        S = tl.load(final_ptr + ends, mask=in_ends, other=0.0)
        for i in range(tl.load(count_ptr + b)):
            c = (first + i) * V + h  # int64: offsets may pass 2^31
            keys, in_keys = _tile(c, N, dk, 0, N, DK)
            values, in_values = _tile(c, N, dv, column, N, BLOCK)
            state, in_state = _tile(c, dk, dv, column, DK, BLOCK)
            W = tl.load(w_ptr + keys, mask=in_keys, other=0.0)
            K = tl.load(k_ptr + keys, mask=in_keys, other=0.0)
            U = tl.load(u_ptr + values, mask=in_values, other=0.0)
            tl.store(s_ptr + state, S, mask=in_state)
            X = U - tl.dot(W, S, input_precision="ieee")
            tl.store(x_ptr + values, X, mask=in_values)
            S = tl.load(fade_ptr + c) * S + tl.dot(tl.trans(K), X, input_precision="ieee")
        tl.store(final_ptr + ends, S, mask=in_ends)

    @triton.jit
    def _walk_back_kernel(first_ptr, count_ptr, w_ptr, k_ptr, fade_ptr, dx_ptr, ds_ptr, dfinal_ptr,
                          du_ptr, d_ptr, V, dk, dv, N: tl.constexpr, DK: tl.constexpr,
                          BLOCK: tl.constexpr):
        b, h, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK
        last = tl.load(first_ptr + b) + tl.load(count_ptr + b) - 1
        state, in_state = _tile(b * V + h, dk, dv, column, DK, BLOCK)
        D = tl.load(dfinal_ptr + state, mask=in_state, other=0.0)
        for i in range(tl.load(count_ptr + b)):
            c = (last - i) * V + h
            keys, in_keys = _tile(c, N, dk, 0, N, DK)
            values, in_values = _tile(c, N, dv, column, N, BLOCK)
            state, in_state = _tile(c, dk, dv, column, DK, BLOCK)
            W = tl.load(w_ptr + keys, mask=in_keys, other=0.0)
            K = tl.load(k_ptr + keys, mask=in_keys, other=0.0)
            dX = tl.load(dx_ptr + values, mask=in_values, other=0.0)
            dS = tl.load(ds_ptr + state, mask=in_state, other=0.0)
            tl.store(d_ptr + state, D, mask=in_state)
            dX += tl.dot(K, D, input_precision="ieee")
            tl.store(du_ptr + values, dX, mask=in_values)
            D = dS + tl.load(fade_ptr + c) * D - tl.dot(tl.trans(W), dX, input_precision="ieee")


def _launch(kernel, chunks, W, K, fade, *tensors):
    V, dk, dv = W.shape[1], W.shape[3], tensors[0].shape[3]
    block = 16  # and 8 warps: what spills least from registers, as compiled for sm_90
    kernel[(len(chunks.sizes), V, triton.cdiv(dv, block))](
        chunks.first, chunks.count, W, K, fade, *tensors, V, dk, dv, N=CHUNK,
        DK=max(16, triton.next_power_of_2(dk)), BLOCK=block, num_warps=8)
