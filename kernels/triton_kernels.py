# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the divergence op. Device code only; ``triton_backend`` launches them.

Every kernel works on p = softmax(z_t) and the difference u = z_s − z_t of final logits, with ū = Σ p u, v = u − ū and
φ(x) = e^x − 1 − x:  c = log1p(Σ p φ(v)) is the forward KL itself, without cancellation, and log q − log p = v − c.
φ is a polynomial near 0, where e^x − 1 would cancel; no libdevice call is used, so that the interpreter runs all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_EXPONENT = tl.constexpr(80.0)
"""Exponents are cut here, so that divergences beyond 80 nats saturate instead of overflowing."""


@triton.jit
def phi(x):
    """e^x − 1 − x, relative error below 1e-6 for every x < 80."""
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0))
    near = 0.5 * x * x * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series)))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(tl.minimum(x, MAX_EXPONENT)) - 1.0 - x)


@triton.jit
def log1p(x):
    """log(1 + x) for x > −0.3; 2 artanh(x / (2 + x)) as a series where log would round 1 + x."""
    s = x / (2.0 + x)
    s2 = s * s
    near = 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0 + s2 * (1.0 / 9.0 + s2 / 11.0)))))
    return tl.where(tl.abs(x) < 0.5, near, tl.log(1.0 + x))


@triton.jit
def moved_mass(log_p, p, d):
    """q − p = p (e^d − 1) from log p, p and d = log q − log p."""
    return tl.where(tl.abs(d) < 0.5, p * (d + phi(d)), tl.exp(tl.minimum(log_p + d, MAX_EXPONENT)) - p)


@triton.jit
def tanh_and_slope(x):
    """tanh x and its derivative 1 − tanh² x, both to a relative 1e-6 for every x."""
    y = -2.0 * tl.abs(x)
    e = tl.exp(y)
    t = tl.where(y > -0.5, -(y + phi(y)), 1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def load_logits(
    x_t_row, x_s_row, bias_t, bias_s, scale_t, scale_s, cap_t, cap_s, cols, valid,
    DIFFERENCE: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr, CAP_T: tl.constexpr, CAP_S: tl.constexpr,
):  # fmt: skip
    """Final z_t (−inf where not valid), u (0 there) and the softcap's slope at z_s, from raw head products.

    Scales include 1 / temperature; with a cap they are scale / softcap, and the cap is softcap / temperature. The
    difference survives a cap by tanh a − tanh b = tanh(a − b) (1 − tanh a tanh b).
    """
    z_t = tl.load(x_t_row + cols, mask=valid, other=0.0).to(tl.float32)
    u = tl.load(x_s_row + cols, mask=valid, other=0.0).to(tl.float32)
    slope = tl.full(u.shape, 1.0, tl.float32)
    if BIAS_T:
        z_t += tl.load(bias_t + cols, mask=valid, other=0.0).to(tl.float32)
    z_t *= scale_t
    if DIFFERENCE:
        u *= scale_s
        if CAP_S:
            tanh_s, slope = tanh_and_slope(z_t + u)
            tanh_t, _ = tanh_and_slope(z_t)
            tanh_u, _ = tanh_and_slope(u)
            z_t, u = cap_s * tanh_t, cap_s * tanh_u * (1.0 - tanh_t * tanh_s)
    else:
        if BIAS_S:
            u += tl.load(bias_s + cols, mask=valid, other=0.0).to(tl.float32)
        u *= scale_s
        if CAP_S:
            tanh_s, slope = tanh_and_slope(u)
            u = cap_s * tanh_s
        if CAP_T:
            tanh_t, _ = tanh_and_slope(z_t)
            z_t = cap_t * tanh_t
        u -= z_t
    return tl.where(valid, z_t, float("-inf")), tl.where(valid, u, 0.0), slope


@triton.jit
def load_ratios(
    x_t_row, x_s_row, bias_t, bias_s, scale_t, scale_s, cap_t, cap_s, lse, shift, cols, valid,
    DIFFERENCE: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr, CAP_T: tl.constexpr, CAP_S: tl.constexpr,
):  # fmt: skip
    """p, q − p, d = log q − log p and the softcap's slope, once log Σ e^z_t and shift = ū + c are known."""
    z, u, slope = load_logits(
        x_t_row, x_s_row, bias_t, bias_s, scale_t, scale_s, cap_t, cap_s, cols, valid, DIFFERENCE, BIAS_T, BIAS_S,
        CAP_T, CAP_S,
    )  # fmt: skip
    log_p, d = z - lse, u - shift
    p = tl.exp(log_p)
    return p, moved_mass(log_p, p, d), d, slope


@triton.jit
def rows_kernel(
    x_t, x_s, out, value, rescale, bias_t, bias_s, scale_t, scale_s, cap_t, cap_s, beta, vocabulary, stride, out_stride,
    DIFFERENCE: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr, CAP_T: tl.constexpr, CAP_S: tl.constexpr,
    GRADIENT: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr,
    SUMMANDS: tl.constexpr, VALUE_OF: tl.constexpr, GRADIENT_OF: tl.constexpr,
):  # fmt: skip
    """One program per row of raw products x_t, x_s [R, V]: value [R] and, over x_s or elsewhere, its gradient [R, V].

    The gradient is dL/dz_s times the softcap's slope; the factor scale / temperature is left to the caller. With
    RESCALE the gradient row is multiplied by 1 / rescale[row] (float16 range).

    The divergence is three jitted functions of its own file (divergences/NAME_triton.py), inlined by the compiler:
    SUMMANDS(p, moved, d, beta) gives two numbers per token of the vocabulary, which are summed over it (None: no sums
    and no pass over the row); VALUE_OF(kl, first, second, beta) the value from forward KL and those sums;
    GRADIENT_OF(p, moved, d, first, second, beta) dL/dz_s. moved is q − p, d = log q − log p.
    """
    row = tl.program_id(0).to(tl.int64)
    x_t_row, x_s_row, out_row = x_t + row * stride, x_s + row * stride, out + row * out_stride
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        cols = start + lanes
        z, u, _ = load_logits(
            x_t_row, x_s_row, bias_t, bias_s, scale_t, scale_s, cap_t, cap_s, cols, cols < vocabulary,
            DIFFERENCE, BIAS_T, BIAS_S, CAP_T, CAP_S,
        )  # fmt: skip
        new_top = tl.maximum(top, z)
        decay, e = tl.exp(top - new_top), tl.exp(z - new_top)
        mass, first, top = mass * decay + e, first * decay + e * u, new_top
    row_top = tl.max(top, 0)
    weight = tl.exp(top - row_top)
    row_mass = tl.sum(mass * weight, 0)
    mean = tl.sum(first * weight, 0) / row_mass
    lse = row_top + tl.log(row_mass)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        cols = start + lanes
        valid = cols < vocabulary
        z, u, _ = load_logits(
            x_t_row, x_s_row, bias_t, bias_s, scale_t, scale_s, cap_t, cap_s, cols, valid,
            DIFFERENCE, BIAS_T, BIAS_S, CAP_T, CAP_S,
        )  # fmt: skip
        log_p, v = z - lse, u - mean
        p = tl.exp(log_p)
        far = tl.exp(tl.minimum(log_p + v, MAX_EXPONENT)) - p * (1.0 + v)
        second += tl.where(valid, tl.where(v < 0.5, p * phi(v), far), 0.0)
    c = log1p(tl.sum(second, 0))
    shift = mean + c
    first_sum = 0.0
    second_sum = 0.0
    if SUMMANDS is not None:
        first_sums = tl.zeros((BLOCK,), tl.float32)
        second_sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            cols = start + lanes
            valid = cols < vocabulary
            p, moved, d, _ = load_ratios(
                x_t_row, x_s_row, bias_t, bias_s, scale_t, scale_s, cap_t, cap_s, lse, shift, cols, valid,
                DIFFERENCE, BIAS_T, BIAS_S, CAP_T, CAP_S,
            )  # fmt: skip
            one, other = SUMMANDS(p, moved, d, beta)
            first_sums += tl.where(valid, one, 0.0)
            second_sums += tl.where(valid, other, 0.0)
        first_sum, second_sum = tl.sum(first_sums, 0), tl.sum(second_sums, 0)
    tl.store(value + row, VALUE_OF(c, first_sum, second_sum, beta))
    if GRADIENT:
        factor = 1.0
        if RESCALE:
            # Pinsker: the L1 norm of q − p is at most sqrt(2 KL); 2^10 leaves room above for the other divergences.
            size = tl.sqrt(2.0 * tl.maximum(c, 1e-14)) / 1024.0
            tl.store(rescale + row, size)
            factor = 1.0 / size
        for start in range(0, vocabulary, BLOCK):
            cols = start + lanes
            valid = cols < vocabulary
            p, moved, d, slope = load_ratios(
                x_t_row, x_s_row, bias_t, bias_s, scale_t, scale_s, cap_t, cap_s, lse, shift, cols, valid,
                DIFFERENCE, BIAS_T, BIAS_S, CAP_T, CAP_S,
            )  # fmt: skip
            g = GRADIENT_OF(p, moved, d, first_sum, second_sum, beta)
            tl.store(out_row + cols, (g * slope * factor).to(out.dtype.element_ty), mask=valid)


@triton.jit
def tile_logits(
    reference, difference, weight, bias, scale_t, scale_s, rows, cols, tokens, vocabulary, features, h_stride, w_stride,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Final z_t (−inf beyond the vocabulary) and u of one tile [ROWS, COLS]: two products that share a head tile."""
    z = tl.zeros((ROWS, COLS), tl.float32)
    u = tl.zeros((ROWS, COLS), tl.float32)
    row_ok, col_ok = (rows < tokens)[:, None], (cols < vocabulary)[None, :]
    h_offsets, w_offsets = rows.to(tl.int64)[:, None] * h_stride, cols.to(tl.int64)[None, :] * w_stride
    for start in range(0, features, DEPTH):
        k = start + tl.arange(0, DEPTH)
        k_ok = k < features
        w = tl.load(weight + w_offsets + k[:, None], mask=col_ok & k_ok[:, None], other=0.0)
        h = tl.load(reference + h_offsets + k[None, :], mask=row_ok & k_ok[None, :], other=0.0)
        z = tl.dot(h, w, z, input_precision="ieee")
        dh = tl.load(difference + h_offsets + k[None, :], mask=row_ok & k_ok[None, :], other=0.0)
        u = tl.dot(dh, w, u, input_precision="ieee")
    if BIAS:
        z += tl.load(bias + cols, mask=cols < vocabulary, other=0.0).to(tl.float32)[None, :]
    return tl.where(col_ok, z * scale_t, float("-inf")), tl.where(col_ok, u * scale_s, 0.0)


@triton.jit
def statistics_kernel(
    reference, difference, weight, bias, partial, scale_t, scale_s, tokens, vocabulary, features, h_stride, w_stride,
    per_split, BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store-free statistics of a share of the vocabulary: partial[split, 4, N] = max z, Σ e^(z−max), mean u, mean φ(v).

    Two parts with shares f_i, means m_i and second terms T_i merge to mean m = Σ f_i m_i and
    T = Σ f_i (e^δ_i T_i + φ(δ_i)) with δ_i = m_i − m; nothing cancels.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    top = tl.full((ROWS,), -1e30, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    second = tl.zeros((ROWS,), tl.float32)
    first_col = split * per_split
    for start in range(first_col, tl.minimum(first_col + per_split, vocabulary), COLS):
        cols = start + tl.arange(0, COLS)
        z, u = tile_logits(
            reference, difference, weight, bias, scale_t, scale_s, rows, cols, tokens, vocabulary, features, h_stride,
            w_stride, BIAS, ROWS, COLS, DEPTH,
        )  # fmt: skip
        tile_top = tl.max(z, 1)
        log_e = z - tile_top[:, None]
        e = tl.exp(log_e)
        tile_mass = tl.sum(e, 1)
        tile_mean = tl.sum(e * u, 1) / tile_mass
        v = u - tile_mean[:, None]
        far = tl.exp(tl.minimum(log_e + v, MAX_EXPONENT)) - e * (1.0 + v)
        tile_second = tl.sum(tl.where(v < 0.5, e * phi(v), far), 1) / tile_mass
        new_top = tl.maximum(top, tile_top)
        mass, tile_mass = mass * tl.exp(top - new_top), tile_mass * tl.exp(tile_top - new_top)
        total = mass + tile_mass
        old_share, share = mass / total, tile_mass / total
        new_mean = mean + share * (tile_mean - mean)
        old_move, move = mean - new_mean, tile_mean - new_mean
        old_second = tl.minimum(tl.exp(tl.minimum(old_move, MAX_EXPONENT)) * second, 1e36) + phi(old_move)
        new_second = tl.minimum(tl.exp(tl.minimum(move, MAX_EXPONENT)) * tile_second, 1e36) + phi(move)
        second = old_share * old_second + share * new_second
        top, mass, mean = new_top, total, new_mean
    base = partial + split.to(tl.int64) * 4 * tokens
    ok = rows < tokens
    tl.store(base + rows, top, mask=ok)
    tl.store(base + tokens + rows, mass, mask=ok)
    tl.store(base + 2 * tokens + rows, mean, mask=ok)
    tl.store(base + 3 * tokens + rows, second, mask=ok)


@triton.jit
def gradient_kernel(
    reference, difference, weight, bias, lse, shift, factor, out, scale_t, scale_s, tokens, vocabulary, features,
    h_stride, w_stride, out_stride,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[N, V] = factor · (q − p) of a tile, its logits computed again; shift = ū + c. Only this N x V is written."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    z, u = tile_logits(
        reference, difference, weight, bias, scale_t, scale_s, rows, cols, tokens, vocabulary, features, h_stride,
        w_stride, BIAS, ROWS, COLS, DEPTH,
    )  # fmt: skip
    ok = rows < tokens
    log_p = z - tl.load(lse + rows, mask=ok, other=0.0)[:, None]
    d = u - tl.load(shift + rows, mask=ok, other=0.0)[:, None]
    g = moved_mass(log_p, tl.exp(log_p), d) * tl.load(factor + rows, mask=ok, other=0.0)[:, None]
    target = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    tl.store(target, g.to(out.dtype.element_ty), mask=ok[:, None] & (cols < vocabulary)[None, :])
