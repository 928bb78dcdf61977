"""Inputs on which the Triton objective is held to the reference; shared by the tests and by their subprocess."""

import torch

from ngd_fast.objective.settings import Settings

OPTIONS = dict(
    high_valence=[1, 2], label_smoothing=0.055, kd_weight=0.3, kd_temperature=5.0, kd_mode="mse", kd_scale_by_t2=False,
    proto_weight=0.12, proto_temperature=0.9, geo_weight=0.3, var_cap=0.3, margin=1.0, var_weight=1.3,
    margin_weight=0.7,
)  # fmt: skip
TENSORS = ("features", "logits", "target", "prototypes", "prior", "labels", "teacher_logits", "class_weight")


def arguments(
    B=37, C=8, D=256, K=25, dtype=torch.float32, soft=False, prior_rows=False, seed=0, without=(), edit=None, **options
):
    """Tensors by name (None where switched off) and options; ``edit`` changes the tensors in place."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    labels = torch.randint(-1, C, (B,), generator=rng)
    target = torch.where(torch.rand(B, generator=rng) < 0.1, -100, torch.randint(0, C, (B,), generator=rng))
    tensors = dict(
        # Classes have centres of their own, so that both hinges of D-Geo are open for some and shut for others.
        features=(normal(B, D) + normal(C, D)[labels.clamp_min(0)] * torch.rand(C, 1,
        generator=rng)[labels.clamp_min(0)]).to(dtype), logits=(3 * normal(B, C)).to(dtype),
        target=normal(B, C).softmax(1) if soft else target,
        prototypes=normal(K, D),
        prior=normal(*((B, K) if prior_rows else (K,))).softmax(-1),
        labels=labels,
        teacher_logits=(3 * normal(B, C)).to(dtype),
        class_weight=torch.rand(C, generator=rng) + 0.5,
    )  # fmt: skip
    if edit:
        edit(tensors)
    tensors = {name: None if name in without else tensor for name, tensor in tensors.items()}
    return tensors, {
        **OPTIONS,
        "high_valence": [c for c in OPTIONS["high_valence"] if c < C],
        "num_classes": C,
        **options,
    }


def _set(name, rows, value):
    def edit(tensors):
        tensors[name][rows] = value

    return edit


def _one_row_class(tensors):
    tensors["labels"][:] = 1
    tensors["labels"][3] = 2


def _strided(tensors):
    tensors["features"] = tensors["features"].repeat(1, 2)[:, ::2]
    tensors["logits"] = torch.cat([tensors["logits"]] * 2, 1)[:, 3:11]
    tensors["target"] = tensors["target"].repeat_interleave(2)[::2]


def _broadcast(tensors):
    tensors["teacher_logits"] = tensors["teacher_logits"][:1].expand(37, 8)
    tensors["features"] = tensors["features"][:1].expand(37, 256)


def _extreme_logits(tensors):
    tensors["logits"][0] = torch.tensor([1e4, -1e4, 0, 0, 0, 0, 0, 0])
    tensors["logits"][1, 2] = float("-inf")
    tensors["target"][:2] = 0


def _left_out_nan(tensors):
    tensors["features"][5] = float("nan")
    tensors["labels"][5] = -1


# name: arguments. Tiles are of 16 rows while every multiprocessor can have one, then of 32 or 64.
CASES = {
    "one tile, partly filled": {},
    "one tile, full": dict(B=32),
    "a row beyond a tile": dict(B=33),
    "small tile": dict(B=7),
    "one row": dict(B=1),
    "several tiles a program": dict(B=300),
    "kl": dict(kd_mode="kl", B=40),
    "logitstd": dict(kd_mode="logitstd", kd_temperature=2.0, B=40),
    "kl, T^2, soft target, prior of each row": dict(
        kd_mode="kl", kd_scale_by_t2=True, soft=True, prior_rows=True, B=261
    ),
    "mse, T^2, soft target, no weights": dict(kd_scale_by_t2=True, soft=True, without=("class_weight",)),
    "no label smoothing, no weights": dict(label_smoothing=0.0, without=("class_weight",), B=270),
    "no teacher": dict(without=("teacher_logits",)),
    "no logits": dict(without=("logits", "target", "teacher_logits", "class_weight"), B=300),
    "Proto-KD alone": dict(without=("logits", "target", "teacher_logits", "class_weight", "labels")),
    "D-Geo alone": dict(without=("logits", "target", "teacher_logits", "class_weight", "prototypes", "prior"), B=280),
    "features without a use": dict(without=("prototypes", "prior", "labels")),
    "logits alone": dict(without=("features", "prototypes", "prior", "labels"), B=280),
    "odd sizes": dict(B=290, C=5, D=100, K=7),
    "smallest sizes": dict(B=5, C=3, D=3, K=2),
    "large sizes, several column steps": dict(B=35, C=40, D=600, K=100),
    "class 63 has the variance term": dict(B=300, C=64, D=64, K=3, high_valence=[1, 63]),
    "all rows of one class": dict(edit=_set("labels", slice(None), 1)),
    "a class of one row": dict(edit=_one_row_class, margin=2.0),
    "all rows left out of D-Geo": dict(edit=_set("labels", slice(None), -1)),
    "-100 leaves a row out of D-Geo": dict(edit=_set("labels", slice(0, 9), -100), B=300),
    "zero rows": dict(edit=_set("features", slice(2, 5), 0.0)),
    "a NaN row left out": dict(edit=_left_out_nan, without=("prototypes", "prior")),
    "strided": dict(edit=_strided),
    # Equal rows have equal class means, whose distance has no direction: D-Geo is off.
    "broadcast rows": dict(edit=_broadcast, without=("labels",)),
    "huge and -inf logits": dict(edit=_extreme_logits, label_smoothing=0.0, without=("teacher_logits",)),
    "prior with zeros": dict(edit=_set("prior", slice(0, 3), 0.0)),
    "low temperature": dict(proto_temperature=0.01),
    "bfloat16": dict(dtype=torch.bfloat16),
    "bfloat16, several tiles": dict(dtype=torch.bfloat16, B=310),
    "float16": dict(dtype=torch.float16),
    "float16, several tiles": dict(dtype=torch.float16, B=310, kd_mode="kl"),
}
# These make the total NaN.
NAN_CASES = {
    "no rows": dict(B=0),
    "all targets ignored": dict(edit=_set("target", slice(None), -100)),
    "target too large": dict(edit=_set("target", 4, 8), B=300),
    "target negative": dict(edit=_set("target", 4, -2)),
    "target far out": dict(edit=_set("target", 4, 2**40)),
    "label too large": dict(edit=_set("labels", 4, 8)),
    "label far out": dict(edit=_set("labels", 4, -(2**40)), B=300),
    "NaN feature": dict(edit=_set("features", (3, 3), float("nan")), B=300),
}


def settings(options):
    """The options as the objective takes them, without what is no setting."""
    return Settings(**{name: value for name, value in options.items() if name not in ("num_classes", "geo_weight")})


def call(objective_fwd, tensors, options, *, geo_weight=None, class_sums=None, grad_scale=1.0, want=(True, True)):
    """The low-level operator on ``arguments()``."""
    return objective_fwd(
        *(tensors[name] for name in TENSORS), geo_weight, class_sums, options["num_classes"], options["high_valence"],
        settings(options).packed, options["geo_weight"], grad_scale, *want,
    )  # fmt: skip
