"""The rows of the fused objective: cross entropy, logit KD, Proto-KD and every gradient, one read of each row.

The [BLOCK_B, K] similarities live in registers only. Float32 and log domain inside.
"""

import triton
import triton.language as tl
from ngd_fast.kernels.objective_sums import half_dot, inverse_norm, last_to_arrive, split, workspace


@triton.jit
def log_softmax(z, COUNT: tl.constexpr):
    """log(COUNT * softmax(z)) and softmax(z) over axis 1; entries left out are -inf.

    With COUNT the number of entries, near-uniform distributions have logarithms near 0 and a KL of two of them keeps
    its digits.
    """
    shifted = z - tl.max(z, 1)[:, None]
    e = tl.exp(shifted)
    total = tl.sum(e, 1)
    return shifted - tl.log(total * (1.0 / COUNT))[:, None], e / total[:, None]


@triton.jit
def kl_divergence(p, log_p, log_q):
    """KL(p || q) over axis 1; an entry with p = 0 adds 0."""
    return tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_q)), 1)


@triton.jit
def cross_entropy(
    z, target_ptr, target_stride, weight_ptr, rows, in_batch, label_smoothing,
    C: tl.constexpr, BLOCK_C: tl.constexpr, SOFT_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Sum of the rows' F.cross_entropy, its gradient, and NaN if a target is out of range (else 0)."""
    c = tl.arange(0, BLOCK_C)
    in_range = (c < C)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    else:
        weight = tl.where(in_range, 1.0, 0.0)
    if SOFT_TARGET:
        where = target_ptr + rows[:, None] * target_stride + c[None, :]
        target = tl.load(where, mask=in_batch[:, None] & in_range, other=0.0).to(tl.float32)
        mass = weight * (target * (1.0 - label_smoothing) + label_smoothing / C)
        fault = tl.zeros_like(tl.sum(mass, 1))
    else:
        index = tl.load(target_ptr + rows, mask=in_batch, other=-100).to(tl.int64)
        valid = (index >= 0) & (index < C)
        mass = weight * tl.where(
            index[:, None] == c[None, :], 1.0 - label_smoothing + label_smoothing / C, label_smoothing / C
        )
        mass = tl.where(valid[:, None], mass, 0.0)
        fault = tl.where(valid | (index == -100), 0.0, float("nan"))
    mass = tl.where(in_batch[:, None] & in_range, mass, 0.0)
    log_p, p = log_softmax(z, 1)
    loss = -tl.sum(tl.where(mass == 0, 0.0, mass * log_p), 1)
    return tl.sum(loss, 0), tl.sum(mass, 1)[:, None] * p - mass, tl.sum(fault, 0)


@triton.jit
def standardise(z, mask, C: tl.constexpr):
    """Rows with mean 0 and variance 1 over their classes, 0 beyond these; and 1 / their standard deviation."""
    z = tl.where(mask, z - (tl.sum(z, 1) / C)[:, None], 0.0)
    inverse = (1.0 / tl.sqrt(tl.sum(z * z, 1) / C + 1e-5))[:, None]  # reference.STD_EPS
    return z * inverse, inverse


@triton.jit
def logit_terms(
    logit_ptr, logit_stride, target_ptr, target_stride, teacher_ptr, teacher_stride, weight_ptr, grad_ptr,
    rows, in_batch, B, normaliser, settings,
    C: tl.constexpr, BLOCK_C: tl.constexpr, HAS_CE: tl.constexpr, SOFT_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_KD: tl.constexpr, KD_MODE: tl.constexpr, T_SQUARED: tl.constexpr, WANT_GRAD: tl.constexpr,
):  # fmt: skip
    """Sums over the tile's rows of cross entropy (NaN for a bad target) and KD; stores the logits' gradient."""
    c = tl.arange(0, BLOCK_C)
    mask = in_batch[:, None] & (c < C)[None, :]
    z = tl.load(logit_ptr + rows[:, None] * logit_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.zeros_like(z)
    ce = 0.0
    kd = 0.0
    if HAS_CE:
        loss, grad_ce, fault = cross_entropy(
            tl.where((c < C)[None, :], z, float("-inf")), target_ptr, target_stride, weight_ptr, rows, in_batch,
            settings.label_smoothing, C, BLOCK_C, SOFT_TARGET, HAS_WEIGHT,
        )  # fmt: skip
        ce += loss + fault
        # The divisor is 0 where every row is ignored: the value is then NaN, the gradient 0, as autograd has it.
        grad += tl.where(grad_ce == 0, 0.0, grad_ce / normaliser)
    if HAS_KD:
        teacher = tl.load(teacher_ptr + rows[:, None] * teacher_stride + c[None, :], mask=mask, other=0.0)
        teacher = teacher.to(tl.float32)
        scale = 1.0 / B
        if T_SQUARED:
            scale *= settings.kd_temperature * settings.kd_temperature
        if KD_MODE > 0:
            if KD_MODE == 2:
                z, inverse = standardise(z, mask, C)
                teacher, _ = standardise(teacher, mask, C)
            log_q, q = log_softmax(tl.where((c < C)[None, :], z / settings.kd_temperature, float("-inf")), C)
            log_p, p = log_softmax(tl.where((c < C)[None, :], teacher / settings.kd_temperature, float("-inf")), C)
            kd += tl.sum(tl.where(in_batch, kl_divergence(p, log_p, log_q), 0.0), 0)
            slope = q - p
            if KD_MODE == 2:  # through the standard deviation; the slopes' own mean is 0
                slope = (slope - z * (tl.sum(slope * z, 1) / C)[:, None]) * inverse
            grad += slope * (settings.kd_weight * scale / settings.kd_temperature)
        else:
            difference = tl.where(mask, (z - teacher) / settings.kd_temperature, 0.0)
            kd += tl.sum(tl.sum(difference * difference, 1), 0) / C
            grad += difference * (2.0 * settings.kd_weight * scale / (C * settings.kd_temperature))
    if WANT_GRAD:
        tl.store(grad_ptr + rows[:, None] * C + c[None, :], grad.to(grad_ptr.dtype.element_ty), mask=mask)
    return ce, kd


@triton.jit
def add_similarity(sum, x, bank_ptr, d, N: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr):
    """sum [BLOCK_B, BLOCK_N] + x [BLOCK_B, BLOCK_D] times columns ``d`` of the N vectors of a bank."""
    n = tl.arange(0, BLOCK_N)
    mask = (d < D)[:, None] & (n < N)[None, :]
    where = bank_ptr + n[None, :] * D + d[:, None]
    vectors = tl.load(where, mask=mask, other=0.0)
    if HALF:
        low = tl.load(where + N * D, mask=mask, other=0.0)
        return half_dot(x, vectors, half_dot(x, low, sum))
    else:
        return sum + tl.dot(x, vectors, input_precision="tf32x3")


@triton.jit
def combine(
    coefficients, bank_ptr, d, N: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """coefficients [BLOCK_B, BLOCK_N] (EXACT: half types hold them) times columns ``d`` of the N vectors of a bank."""
    n = tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & (d < D)[None, :]
    where = bank_ptr + n[:, None] * D + d[None, :]
    vectors = tl.load(where, mask=mask, other=0.0)
    if HALF:
        high, low = split(coefficients, bank_ptr.dtype.element_ty)
        low_vectors = tl.load(where + N * D, mask=mask, other=0.0)
        sum = half_dot(high, low_vectors, tl.zeros([high.shape[0], BLOCK_D], tl.float32))
        if not EXACT:
            sum = half_dot(low, vectors, sum)
        return half_dot(high, vectors, sum)
    else:
        return tl.dot(coefficients, vectors, input_precision="tf32x3")


@triton.jit
def proto_terms(
    similarity, prior_ptr, prior_stride, rows, in_batch, temperature,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRIOR_ROWS: tl.constexpr,
):  # fmt: skip
    """KL(prior || softmax(similarity / temperature)) of each row, and its gradient by similarity / temperature."""
    k = tl.arange(0, BLOCK_K)
    if PRIOR_ROWS:
        mask = in_batch[:, None] & (k < K)[None, :]
        prior = tl.load(prior_ptr + rows[:, None] * prior_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        prior = tl.load(prior_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    log_q, q = log_softmax(tl.where((k < K)[None, :], similarity / temperature, float("-inf")), K)
    loss = kl_divergence(prior + tl.zeros_like(q), tl.log(prior * K) + tl.zeros_like(q), log_q)
    return tl.where(in_batch, loss, 0.0), tl.sum(prior, 1)[:, None] * q - prior


@triton.jit
def feature_terms(
    x_ptr, x_stride, label_ptr, bank_ptr, prior_ptr, prior_stride, scale_ptr, direction_ptr, grad_ptr,
    rows, in_batch, B, settings,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DOT_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, HALF: tl.constexpr, HAS_PROTO: tl.constexpr, PRIOR_ROWS: tl.constexpr,
    HAS_GEO: tl.constexpr, WANT_GRAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over the tile's rows of Proto-KD, NaN for labels out of range, and the features' gradient.

    A row is read in steps of BLOCK_D columns, and for the gradient once more, from the first-level cache: whole rows
    would not fit the registers together with their gradients.
    """
    proto = 0.0
    fault = 0.0
    base = x_ptr + rows[:, None] * x_stride
    if HAS_GEO:
        label = tl.load(label_ptr + rows, mask=in_batch, other=-1)
        used = (label >= 0) & (label < C)
        fault += tl.sum(tl.where(used | (label == -1) | (label == -100), 0.0, float("nan")), 0)
        if not HAS_PROTO:
            in_batch = used  # rows left out are not read; their gradient is 0
        member = (label[:, None] == tl.arange(0, DOT_C)[None, :]) & used[:, None]
    if HAS_PROTO or WANT_GRAD:
        similarity = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        class_similarity = tl.zeros([BLOCK_B, DOT_C], tl.float32)
        square_sum = tl.zeros([BLOCK_B], tl.float32)
        for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(base + d[None, :], mask=in_batch[:, None] & (d < D)[None, :], other=0.0)
            x32 = x.to(tl.float32)
            square_sum += tl.sum(x32 * x32, 1)
            if HAS_PROTO:
                similarity = add_similarity(similarity, x, bank_ptr, d, K, D, BLOCK_K, HALF)
            if HAS_GEO and WANT_GRAD:
                class_similarity = add_similarity(class_similarity, x, direction_ptr, d, C, D, DOT_C, HALF)
        inv = inverse_norm(square_sum)
        along = tl.zeros([BLOCK_B], tl.float32)
        if HAS_GEO and WANT_GRAD:
            geo_scale = tl.load(scale_ptr + label, mask=used, other=0.0)
            along += geo_scale * inv * tl.sum(tl.where(member, class_similarity, 0.0), 1)
        if HAS_PROTO:
            similarity *= inv[:, None]
            loss, slope = proto_terms(
                similarity, prior_ptr, prior_stride, rows, in_batch, settings.proto_temperature, K, BLOCK_K, PRIOR_ROWS
            )
            proto += tl.sum(loss, 0)
            proto_scale = settings.proto_weight / (settings.proto_temperature * B)
            along += proto_scale * tl.sum(slope * similarity, 1)
        if WANT_GRAD:
            for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                d = d0 + tl.arange(0, BLOCK_D)
                mask = in_batch[:, None] & (d < D)[None, :]
                grad = tl.load(base + d[None, :], mask=mask, other=0.0).to(tl.float32) * (-along * inv)[:, None]
                if HAS_GEO:
                    direction = combine(member.to(tl.float32), direction_ptr, d, C, D, DOT_C, BLOCK_D, HALF, True)
                    grad += geo_scale[:, None] * direction
                if HAS_PROTO:
                    grad += proto_scale * combine(slope, bank_ptr, d, K, D, BLOCK_K, BLOCK_D, HALF, False)
                grad *= inv[:, None]
                stored = (rows < B)[:, None] & (d < D)[None, :]
                tl.store(grad_ptr + rows[:, None] * D + d[None, :], grad.to(grad_ptr.dtype.element_ty), mask=stored)
    return proto, fault


@triton.jit
def sum_tiles(
    x_ptr, x_stride, logit_ptr, logit_stride, target_ptr, target_stride, label_ptr, teacher_ptr, teacher_stride,
    weight_ptr, bank_ptr, prior_ptr, prior_stride, scale_ptr, direction_ptr, grad_x_ptr, grad_z_ptr, B, first, step,
    normaliser, settings,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, DOT_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, HALF: tl.constexpr, HAS_CE: tl.constexpr,
    SOFT_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_KD: tl.constexpr, KD_MODE: tl.constexpr,
    T_SQUARED: tl.constexpr, HAS_PROTO: tl.constexpr, PRIOR_ROWS: tl.constexpr, HAS_GEO: tl.constexpr,
    WANT_X: tl.constexpr, WANT_Z: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The row stage over tiles ``first``, ``first + step``, ...: the sums ce, kd, proto, and NaN for a bad label."""
    ce = 0.0
    kd = 0.0
    proto = 0.0
    fault = 0.0
    for tile in tl.range(first, tl.cdiv(B, BLOCK_B), step, num_stages=1):
        rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
        in_batch = rows < B
        if HAS_CE or HAS_KD:
            tile_ce, tile_kd = logit_terms(
                logit_ptr, logit_stride, target_ptr, target_stride, teacher_ptr, teacher_stride, weight_ptr, grad_z_ptr,
                rows, in_batch, B, normaliser, settings,
                C, BLOCK_C, HAS_CE, SOFT_TARGET, HAS_WEIGHT, HAS_KD, KD_MODE, T_SQUARED, WANT_Z,
            )  # fmt: skip
            ce += tile_ce
            kd += tile_kd
        if HAS_PROTO or HAS_GEO:
            tile_proto, tile_fault = feature_terms(
                x_ptr, x_stride, label_ptr, bank_ptr, prior_ptr, prior_stride, scale_ptr, direction_ptr, grad_x_ptr,
                rows, in_batch, B, settings,
                C, D, K, DOT_C, BLOCK_K, BLOCK_D, BLOCK_B, HALF, HAS_PROTO, PRIOR_ROWS, HAS_GEO, WANT_X, STAGES,
            )  # fmt: skip
            proto += tile_proto
            fault += tile_fault
    return ce, kd, proto, fault


@triton.jit
def store_terms(
    terms_ptr, geo_ptr, geo_weight_ptr, geo_weight_value, ce, kd, proto, fault, B, normaliser, settings,
    HAS_CE: tl.constexpr, HAS_KD: tl.constexpr, T_SQUARED: tl.constexpr, HAS_PROTO: tl.constexpr, HAS_GEO: tl.constexpr,
    HAS_GEO_WEIGHT: tl.constexpr,
):  # fmt: skip
    """terms [6] = total, ce, kd, proto, geo_var, geo_margin, from sums over all rows; a mean over no rows is NaN."""
    geo_var = 0.0
    geo_margin = 0.0
    geo = 0.0
    if HAS_CE:
        ce = ce / normaliser
    if HAS_KD:
        kd = kd / (B * 1.0)
        if T_SQUARED:
            kd *= settings.kd_temperature * settings.kd_temperature
    if HAS_PROTO:
        proto = proto / (B * 1.0)
    if HAS_GEO:
        geo_var += tl.load(geo_ptr) + fault
        geo_margin += tl.load(geo_ptr + 1) + fault
        geo_weight = geo_weight_value
        if HAS_GEO_WEIGHT:
            geo_weight = tl.load(geo_weight_ptr).to(tl.float32)
        geo += geo_weight * (tl.load(geo_ptr + 2) + fault)
    tl.store(terms_ptr, ce + settings.kd_weight * kd + settings.proto_weight * proto + geo)
    tl.store(terms_ptr + 1, ce)
    tl.store(terms_ptr + 2, kd)
    tl.store(terms_ptr + 3, proto)
    tl.store(terms_ptr + 4, geo_var)
    tl.store(terms_ptr + 5, geo_margin)


@triton.jit(do_not_specialize=["B", "programs"])
def rows_kernel(
    x_ptr, x_stride, logit_ptr, logit_stride, target_ptr, target_stride, label_ptr, teacher_ptr, teacher_stride,
    weight_ptr, prior_ptr, prior_stride, geo_weight_ptr, ws_ptr, terms_ptr, grad_x_ptr, grad_z_ptr, B, programs,
    settings, geo_weight_value,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, DOT_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, HALF: tl.constexpr, HAS_CE: tl.constexpr,
    SOFT_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_KD: tl.constexpr, KD_MODE: tl.constexpr,
    T_SQUARED: tl.constexpr, HAS_PROTO: tl.constexpr, PRIOR_ROWS: tl.constexpr, HAS_GEO: tl.constexpr,
    HAS_GEO_WEIGHT: tl.constexpr, WANT_X: tl.constexpr, WANT_Z: tl.constexpr, STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Launch 3: the row stage on a persistent grid of at most PROGRAMS; the program that ends last adds the losses."""
    counter_ptr, geo_ptr, scale_ptr, normaliser_ptr, loss_ptr, _, direction_ptr, bank_ptr, _ = workspace(
        ws_ptr, C, D, K, PROGRAMS, x_ptr.dtype.element_ty
    )
    slots = tl.arange(0, PROGRAMS)
    normaliser = B * 1.0
    if HAS_CE and not SOFT_TARGET:
        normaliser = tl.sum(tl.load(normaliser_ptr + slots, mask=slots < programs, other=0.0), 0)
    ce, kd, proto, fault = sum_tiles(
        x_ptr, x_stride, logit_ptr, logit_stride, target_ptr, target_stride, label_ptr, teacher_ptr, teacher_stride,
        weight_ptr, bank_ptr, prior_ptr, prior_stride, scale_ptr, direction_ptr, grad_x_ptr, grad_z_ptr, B,
        tl.program_id(0), tl.num_programs(0), normaliser, settings,
        C, D, K, BLOCK_C, DOT_C, BLOCK_K, BLOCK_D, BLOCK_B, HALF, HAS_CE, SOFT_TARGET, HAS_WEIGHT, HAS_KD, KD_MODE,
        T_SQUARED, HAS_PROTO, PRIOR_ROWS, HAS_GEO, WANT_X, WANT_Z, STAGES,
    )  # fmt: skip
    mine = loss_ptr + tl.program_id(0)
    tl.store(mine, ce)
    tl.store(mine + PROGRAMS, kd)
    tl.store(mine + 2 * PROGRAMS, proto)
    tl.store(mine + 3 * PROGRAMS, fault)
    if last_to_arrive(counter_ptr + 1):
        mask = slots < tl.num_programs(0)
        ce = tl.sum(tl.load(loss_ptr + slots, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        kd = tl.sum(tl.load(loss_ptr + PROGRAMS + slots, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        proto = tl.sum(tl.load(loss_ptr + 2 * PROGRAMS + slots, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        fault = tl.sum(tl.load(loss_ptr + 3 * PROGRAMS + slots, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        store_terms(
            terms_ptr, geo_ptr, geo_weight_ptr, geo_weight_value, ce, kd, proto, fault, B, normaliser, settings,
            HAS_CE, HAS_KD, T_SQUARED, HAS_PROTO, HAS_GEO, HAS_GEO_WEIGHT,
        )  # fmt: skip
