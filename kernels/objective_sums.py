"""Batch statistics of the fused objective: normalised prototypes, class sums, and each class's share of D-Geo's
gradient.

Every function here is called from the kernels in ``objective_rows`` and ``objective``. Float32 inside. A program adds
its rows in a fixed order and partial sums are added in the order of the programs, so results repeat bit for bit.
"""

# ruff's SIM102 is silenced where one of two conditions is known only when the kernel runs: Triton wants them nested.

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))
# Square of the norm up to which a row counts as zero, with f = 0 and gradient 0.
ZERO = tl.constexpr(1e-24)


@triton.jit
def workspace(ws_ptr, C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PROGRAMS: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers into the one float32 buffer that the launches of a call share; ``workspace_size`` is its length.

    int32 counters [2]; float32 geo terms [3], class scales [C], weight sums [PROGRAMS], losses [4, PROGRAMS], class
    sums [C, D + 2]; class directions [C, D] and prototypes [K, D], each in float32 or as high and low halves [2, .,
    D]; partial class sums. Each starts on 16 bytes.
    """
    scale_ptr = ws_ptr + 8
    normaliser_ptr = scale_ptr + (C + 3) // 4 * 4
    loss_ptr = normaliser_ptr + PROGRAMS
    sums_ptr = loss_ptr + 4 * PROGRAMS
    direction_ptr = sums_ptr + (C * (D + 2) + 3) // 4 * 4
    bank_ptr = direction_ptr + (C * D + 3) // 4 * 4
    partial_ptr = bank_ptr + (K * D + 3) // 4 * 4
    direction_ptr = direction_ptr.to(tl.pointer_type(DTYPE))
    bank_ptr = bank_ptr.to(tl.pointer_type(DTYPE))
    return (
        ws_ptr.to(tl.pointer_type(tl.int32)),
        ws_ptr + 4,
        scale_ptr,
        normaliser_ptr,
        loss_ptr,
        sums_ptr,
        direction_ptr,
        bank_ptr,
        partial_ptr,
    )


def workspace_size(C: int, D: int, K: int, programs: int, partials: int) -> int:
    """Length of the buffer that ``workspace`` divides, with room for ``partials`` partial class sums."""
    parts = (C, 5 * programs, C * (D + 2), C * D, K * D, partials * C * (D + 2))
    return 8 + sum((part + 3) // 4 * 4 for part in parts)


@triton.jit
def split(value, DTYPE: tl.constexpr):
    """``value`` as a sum of two numbers of a half type: 16 to 22 bits for the tensor cores instead of 8 to 11."""
    high = value.to(DTYPE)
    low = (value - high.to(tl.float32)).to(DTYPE)
    return high, low


@triton.jit
def store_parts(ptr, low_ptr, value, mask, HALF: tl.constexpr):
    """Store float32, or for half types the high and the low part."""
    if HALF:
        high, low = split(value, ptr.dtype.element_ty)
        tl.store(ptr, high, mask=mask)
        tl.store(low_ptr, low, mask=mask)
    else:
        tl.store(ptr, value, mask=mask)


@triton.jit
def half_dot(a, b, sum):
    """sum + a @ b for half types, summed in float32."""
    if INTERPRETED:
        return sum + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, sum)


@triton.jit
def inverse_norm(square_sum):
    """1 / norm; 0 for zero rows, so that their direction and gradient are 0."""
    is_zero = square_sum <= ZERO
    return tl.where(is_zero, 0.0, 1.0 / tl.sqrt_rn(tl.where(is_zero, 1.0, square_sum)))


@triton.jit
def normalise_prototypes(
    p_ptr,
    p_stride,
    out_ptr,
    start,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """L2-normalise ROWS prototypes from ``start`` on to [K, D]; for half types to high and low parts [2, K, D]."""
    k = start + tl.arange(0, ROWS)
    in_bank = k < K
    square_sum = tl.zeros([ROWS], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask = in_bank[:, None] & (d < D)[None, :]
        p = tl.load(p_ptr + k[:, None] * p_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        square_sum += tl.sum(p * p, 1)
    inv = inverse_norm(square_sum)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask = in_bank[:, None] & (d < D)[None, :]
        p = tl.load(p_ptr + k[:, None] * p_stride + d[None, :], mask=mask, other=0.0).to(tl.float32) * inv[:, None]
        where = out_ptr + k[:, None] * D + d[None, :]
        store_parts(where, where + K * D, p, mask, HALF)


@triton.jit
def sum_rows(
    x_ptr, x_stride, label_ptr, target_ptr, weight_ptr, B, first, step, d0,
    C: tl.constexpr, D: tl.constexpr, DOT_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    HALF: tl.constexpr, CLASS_SUMS: tl.constexpr, NORMALISER: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum tiles ``first``, ``first + step``, ... of BLOCK_B rows.

    Returns S [DOT_C, BLOCK_D] (columns from ``d0``), n and q [DOT_C], and cross entropy's sum of target weights.
    Rows labelled outside [0, C) are not read.
    """
    c = tl.arange(0, DOT_C)
    d = d0 + tl.arange(0, BLOCK_D)
    sums = tl.zeros([DOT_C, BLOCK_D], tl.float32)
    n = tl.zeros([DOT_C], tl.float32)
    q = tl.zeros([DOT_C], tl.float32)
    weights = tl.zeros([BLOCK_B], tl.float32)
    for tile in tl.range(first, tl.cdiv(B, BLOCK_B), step, num_stages=STAGES):
        rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
        in_batch = rows < B
        if NORMALISER:
            target = tl.load(target_ptr + rows, mask=in_batch, other=-100).to(tl.int64)
            in_range = (target >= 0) & (target < C)
            if HAS_WEIGHT:
                weights += tl.load(weight_ptr + target, mask=in_range, other=0.0).to(tl.float32)
            else:
                weights += in_range.to(tl.float32)
        if CLASS_SUMS:
            label = tl.load(label_ptr + rows, mask=in_batch, other=-1).to(tl.int64)
            used = (label >= 0) & (label < C)
            base = x_ptr + rows[:, None] * x_stride
            x = tl.load(base + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
            if D <= BLOCK_D:
                x32 = x.to(tl.float32)
                square_sum = tl.sum(x32 * x32, 1)
            else:
                square_sum = tl.zeros([BLOCK_B], tl.float32)
                for e0 in range(0, D, BLOCK_D):
                    e = e0 + tl.arange(0, BLOCK_D)
                    y = tl.load(base + e[None, :], mask=used[:, None] & (e < D)[None, :], other=0.0).to(tl.float32)
                    square_sum += tl.sum(y * y, 1)
            inv = inverse_norm(square_sum)
            member = c[:, None] == label[None, :]
            scaled = tl.where(member, inv[None, :], 0.0)
            # A tile is summed from zero and added in float32: tensor cores truncate, and over many rows that would
            # drift.
            if HALF:
                high, low = split(scaled, x_ptr.dtype.element_ty)
                part = half_dot(low, x, tl.zeros_like(sums))
                if x_ptr.dtype.element_ty == tl.bfloat16:
                    rest = scaled - high.to(tl.float32) - low.to(tl.float32)
                    part = half_dot(rest.to(tl.bfloat16), x, part)
                sums += half_dot(high, x, part)
            else:
                sums += tl.dot(scaled, x, input_precision="tf32x3")
            n += tl.sum(member.to(tl.float32), 1)
            q += tl.sum(tl.where(member, (square_sum * inv * inv)[None, :], 0.0), 1)
    return sums, n, q, tl.sum(weights, 0)


@triton.jit
def store_sums(out_ptr, sums, n, q, d0, C: tl.constexpr, D: tl.constexpr, DOT_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the columns from ``d0`` of [C, D + 2] = (S | n | q)."""
    c = tl.arange(0, DOT_C)
    d = d0 + tl.arange(0, BLOCK_D)
    in_range = c < C
    tl.store(out_ptr + c[:, None] * (D + 2) + d[None, :], sums, mask=in_range[:, None] & (d < D)[None, :])
    if d0 == 0:
        tl.store(out_ptr + c * (D + 2) + D, n, mask=in_range)
        tl.store(out_ptr + c * (D + 2) + D + 1, q, mask=in_range)


@triton.jit
def class_stage(
    sums_ptr, geo_ptr, scale_ptr, direction_ptr, geo_weight, settings,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, CLASSES: tl.constexpr, BLOCK_D: tl.constexpr,
    HIGH_VALENCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """D-Geo (paper, section 4.3) from the class sums: its two terms and their weighted sum to ``geo_ptr`` [3], each
    class's gradient to the others.

    A row f of class c has the gradient scale[c] direction[c] + a multiple of f, and normalisation projects out what
    lies along f. Directions are of order 1, so that halves hold them. CLASSES classes are compared with all BLOCK_C at
    once. Comparisons let NaN through.
    """
    other = tl.arange(0, BLOCK_C)
    n_other = tl.load(sums_ptr + other * (D + 2) + D, mask=other < C, other=0.0)
    over_n_other = 1.0 / tl.where(n_other > 0, n_other, 1.0)
    var_sum = tl.zeros([CLASSES], tl.float32)
    gap_sum = tl.zeros([CLASSES], tl.float32)
    for c0 in range(0, C, CLASSES):
        c = c0 + tl.arange(0, CLASSES)
        n = tl.load(sums_ptr + c * (D + 2) + D, mask=c < C, other=0.0)
        q = tl.load(sums_ptr + c * (D + 2) + D + 1, mask=c < C, other=0.0)
        present = n > 0
        over_n = 1.0 / tl.where(present, n, 1.0)
        distance2 = tl.zeros([CLASSES, BLOCK_C], tl.float32)
        mean2 = tl.zeros([CLASSES], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            mean, difference = _class_means(sums_ptr, c, other, over_n, over_n_other, d0, C, D, BLOCK_D)
            distance2 += tl.sum(difference * difference, 2)
            mean2 += tl.sum(mean * mean, 1)
        distance = tl.sqrt_rn(distance2)
        gap = settings.margin - distance
        pair = present[:, None] & (n_other > 0)[None, :] & (c[:, None] != other[None, :])
        near = pair & ~(gap <= 0)
        gap_sum += tl.sum(tl.where(near, gap, 0.0), 1)
        excess = q * over_n - mean2 - settings.var_cap
        wide = present & (((HIGH_VALENCE >> c.to(tl.int64)) & 1) != 0) & ~(excess <= 0)
        var_sum += tl.where(wide, excess, 0.0)
        pull = tl.where(wide, 2.0 * settings.var_weight, 0.0)
        # A pair counts in both orders, hence the 2; at a distance of 0 the gradient is 0.
        apart = near & (distance != 0)
        push = tl.where(apart, -2.0 * settings.margin_weight / tl.where(apart, distance, 1.0), 0.0)
        tl.store(scale_ptr + c, geo_weight * over_n, mask=c < C)
        for d0 in range(0, D, BLOCK_D):
            mean, difference = _class_means(sums_ptr, c, other, over_n, over_n_other, d0, C, D, BLOCK_D)
            direction = tl.sum(push[:, :, None] * difference, 1) - pull[:, None] * mean
            d = d0 + tl.arange(0, BLOCK_D)
            where = direction_ptr + c[:, None] * D + d[None, :]
            store_parts(where, where + C * D, direction, (c < C)[:, None] & (d < D)[None, :], HALF)
    var = tl.sum(var_sum, 0)
    gaps = tl.sum(gap_sum, 0)
    tl.store(geo_ptr, var)
    tl.store(geo_ptr + 1, gaps)
    tl.store(geo_ptr + 2, settings.var_weight * var + settings.margin_weight * gaps)


@triton.jit
def _class_means(sums_ptr, c, other, over_n, over_n_other, d0, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = d0 + tl.arange(0, BLOCK_D)
    in_d = (d < D)[None, :]
    mean = (
        tl.load(sums_ptr + c[:, None] * (D + 2) + d[None, :], mask=(c < C)[:, None] & in_d, other=0.0) * over_n[:, None]
    )
    mean_other = tl.load(sums_ptr + other[:, None] * (D + 2) + d[None, :], mask=(other < C)[:, None] & in_d, other=0.0)
    mean_other = mean_other * over_n_other[:, None]
    return mean, mean[:, None, :] - mean_other[None, :, :]


@triton.jit(do_not_specialize=["B", "programs"])
def sums_kernel(
    x_ptr, x_stride, label_ptr, target_ptr, weight_ptr, prototype_ptr, prototype_stride, ws_ptr, B, programs,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DOT_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr, HALF: tl.constexpr, CLASS_SUMS: tl.constexpr, NORMALISER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_PROTO: tl.constexpr, STAGES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Launch 1: programs 0 to ``programs`` - 1 sum rows into partials [programs, C, D + 2], the others normalise
    prototypes.

    Grid (programs + ceil(K / 8), chunks of D). Program 0 also sets the counters of the later launches to zero.
    """
    counter_ptr, _, _, normaliser_ptr, _, _, _, bank_ptr, partial_ptr = workspace(
        ws_ptr, C, D, K, PROGRAMS, x_ptr.dtype.element_ty
    )
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    if program == 0:  # noqa: SIM102
        if chunk == 0:
            tl.store(counter_ptr + tl.arange(0, 2), tl.zeros([2], tl.int32))
    if program < programs:
        sums, n, q, weight_sum = sum_rows(
            x_ptr, x_stride, label_ptr, target_ptr, weight_ptr, B, program, programs, chunk * BLOCK_D,
            C, D, DOT_C, BLOCK_D, BLOCK_B, HALF, CLASS_SUMS, NORMALISER, HAS_WEIGHT, STAGES,
        )  # fmt: skip
        if CLASS_SUMS:
            store_sums(partial_ptr + program * (C * (D + 2)), sums, n, q, chunk * BLOCK_D, C, D, DOT_C, BLOCK_D)
        if NORMALISER:  # noqa: SIM102
            if chunk == 0:
                tl.store(normaliser_ptr + program, weight_sum)
    elif HAS_PROTO:  # noqa: SIM102
        if chunk == 0:
            normalise_prototypes(
                prototype_ptr, prototype_stride, bank_ptr, (program - programs) * 8, K, D, BLOCK_D, 8, HALF
            )


@triton.jit
def last_to_arrive(counter_ptr):
    """Whether all other programs of the launch have passed here; what they stored before is then visible.

    One integer counter: no float is ever added atomically.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit(do_not_specialize=["programs"])
def classes_kernel(
    sums_ptr, ws_ptr, geo_weight_ptr, geo_weight_value, geo_grad_scale, settings, programs,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_D: tl.constexpr, HIGH_VALENCE: tl.constexpr, REDUCE: tl.constexpr, STAGE: tl.constexpr,
    HAS_GEO_WEIGHT: tl.constexpr, COLUMNS: tl.constexpr, PARTIALS: tl.constexpr, PROGRAMS: tl.constexpr,
    HALF: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Launch 2: add the partial sums, COLUMNS columns a program; the program that ends last does the class stage.

    ``sums_ptr`` [C, D + 2] takes the sums (REDUCE) or holds those given; None: the workspace's.
    """
    counter_ptr, geo_ptr, scale_ptr, _, _, own_sums_ptr, direction_ptr, _, partial_ptr = workspace(
        ws_ptr, C, D, K, PROGRAMS, DTYPE
    )
    if sums_ptr is None:
        sums_ptr = own_sums_ptr
    if REDUCE:
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([COLUMNS], tl.float32)
        for p0 in range(0, programs, PARTIALS):
            p = p0 + tl.arange(0, PARTIALS)
            mask = (p < programs)[:, None] & (column < C * (D + 2))[None, :]
            total += tl.sum(
                tl.load(partial_ptr + p[:, None] * (C * (D + 2)) + column[None, :], mask=mask, other=0.0), 0
            )
        tl.store(sums_ptr + column, total, mask=column < C * (D + 2))
    if STAGE:  # noqa: SIM102
        if last_to_arrive(counter_ptr):
            if HAS_GEO_WEIGHT:
                geo_weight = tl.load(geo_weight_ptr).to(tl.float32)
            else:
                geo_weight = geo_weight_value
            class_stage(
                sums_ptr, geo_ptr, scale_ptr, direction_ptr, geo_weight * geo_grad_scale, settings,
                C, D, BLOCK_C, CLASSES, BLOCK_D, HIGH_VALENCE, HALF,
            )  # fmt: skip
