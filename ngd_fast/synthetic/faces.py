"""Drawn schematic faces of the eight expressions with the votes of ten annotators: the demo's and the tests' FERPlus.

A face is a set of numbers in the manner of action units (brows, lids, mouth, nose), mixed from an expression, its
intensity and a second expression, and drawn with soft edges under a pose, features, light, occlusion and noise of its
own. The annotators see intensity and mixture: weak and mixed expressions get mixed votes, as in FER+.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import write_json
from ngd_fast.faces.classes import CLASS_MAP, CLASS_NAMES
from ngd_fast.faces.dataset import Faces

FREQUENCIES = (0.24, 0.20, 0.14, 0.13, 0.12, 0.05, 0.07, 0.05)
"""Share of each class among the drawn faces: FERPlus's imbalance in a mild form."""

ANNOTATORS = 10

_UNITS = ("brow", "tilt", "lid", "curve", "open", "width", "wrinkle", "lip", "skew")
"""brow: raised; tilt: inner ends down (> 0) or up; lid: open eyes; curve: corners of the mouth up; open, width: of the
mouth; wrinkle: of the nose; lip: upper lip raised; skew: one corner of the mouth up and its brow too."""

_EXPRESSIONS = np.array(
    [
        # brow  tilt   lid  curve  open width wrinkle lip  skew
        [0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00],  # neutral
        [0.10, -0.10, -0.25, 1.00, 0.35, 0.45, 0.10, 0.10, 0.00],  # happiness
        [1.00, -0.10, 0.90, 0.05, 1.00, -0.45, 0.00, 0.00, 0.00],  # surprise
        [0.15, -0.90, -0.40, -0.85, 0.00, -0.15, 0.00, 0.00, 0.00],  # sadness
        [-0.60, 1.00, 0.10, -0.35, 0.10, 0.05, 0.25, 0.00, 0.00],  # anger
        [-0.45, 0.45, -0.60, -0.50, 0.25, -0.05, 1.00, 1.00, 0.00],  # disgust
        [0.75, -0.75, 0.85, -0.45, 0.50, 0.40, 0.00, 0.00, 0.00],  # fear
        [0.05, 0.15, -0.20, 0.10, 0.00, 0.05, 0.00, 0.00, 1.00],  # contempt
    ],
    np.float32,
)

_CONFUSED_WITH = np.array(
    [
        # what annotators see when they do not see the expression drawn, before the neutral votes of weak expressions
        [0.60, 0.06, 0.02, 0.14, 0.08, 0.01, 0.02, 0.07],
        [0.10, 0.80, 0.04, 0.01, 0.01, 0.01, 0.01, 0.02],
        [0.05, 0.06, 0.72, 0.01, 0.02, 0.01, 0.13, 0.00],
        [0.14, 0.01, 0.01, 0.68, 0.07, 0.03, 0.05, 0.01],
        [0.10, 0.01, 0.02, 0.05, 0.68, 0.09, 0.02, 0.03],
        [0.04, 0.01, 0.01, 0.08, 0.18, 0.64, 0.02, 0.02],
        [0.03, 0.02, 0.20, 0.10, 0.03, 0.03, 0.59, 0.00],
        [0.18, 0.08, 0.01, 0.02, 0.05, 0.03, 0.00, 0.63],
    ]
)


@dataclass(frozen=True)
class Style:
    """How a dataset looks. Angles in radians, lengths in half image sides, grey values from 0 to 1."""

    intensity: tuple[float, float] = (0.5, 1.1)
    rotation: float = 0.24
    shift: float = 0.07
    scale: tuple[float, float] = (0.85, 1.15)
    yaw: float = 0.4
    light: float = 0.3
    occlusion: float = 0.25
    noise: float = 0.035
    contrast: tuple[float, float] = (0.65, 1.15)


STYLES = {
    "ferplus": Style(),
    # In the wild: turned heads, hard light, more in the way.
    "affectnet": Style((0.6, 1.1), 0.3, 0.09, (0.78, 1.05), 0.5, 0.5, 0.35, 0.025, (0.6, 1.2)),
    # Posed in a laboratory: full expressions, frontal, even light.
    "ckplus": Style((0.95, 1.2), 0.06, 0.04, (0.98, 1.08), 0.08, 0.12, 0.0, 0.02, (0.9, 1.0)),
}


def draw_faces(
    expressions: np.ndarray, seed: int, *, style: str = "ferplus", size: int = 48, identities: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one face for each class index in ``expressions`` (int [N]).

    Returns images uint8 [N, size, size] and label_dist float32 [N, 8]: the votes of ten annotators, single votes
    dropped as FER+ does, over their sum. The annotators' label may differ from the expression that was drawn.
    ``identities`` (int [N]) gives equal heads to equal numbers. Same arguments, same faces.
    """
    expressions = np.asarray(expressions, np.int64)
    if expressions.ndim != 1 or ((expressions < 0) | (expressions >= len(CLASS_NAMES))).any():
        raise ValueError(f"expressions: must be int [N] in [0, {len(CLASS_NAMES)})")
    if style not in STYLES:
        raise ValueError(f"style: must be one of {', '.join(STYLES)}, is {style!r}")
    look = STYLES[style]
    rng = np.random.default_rng((seed, 1))
    units, votes = _express(expressions, look, rng)
    heads = _heads(len(expressions), seed, identities)
    images = np.empty((len(expressions), size, size), np.uint8)
    # Blocks small enough for the cache; each has a generator of its own, so that memory does not grow with N.
    for start in range(0, len(expressions), 64):
        rows = slice(start, start + 64)
        block = {name: value[rows] for name, value in {**units, **heads}.items()}
        images[rows] = _draw(block, look, size, np.random.default_rng((seed, 2, start)))
    return images, votes


def make_faces(count: int, seed: int, *, style: str = "ferplus", size: int = 48, frequencies=FREQUENCIES) -> Faces:
    """``count`` drawn faces in memory, classes drawn with ``frequencies``; every class occurs when count >= 8."""
    rng = np.random.default_rng((seed, 0))
    share = np.asarray(frequencies, np.float64) / np.sum(frequencies)
    expressions = np.concatenate([np.arange(len(share)), rng.choice(len(share), max(0, count - len(share)), p=share)])
    expressions = rng.permutation(expressions[:count])
    images, label_dist = draw_faces(expressions, seed, style=style, size=size)
    names = [f"drawn{seed:03d}_{i:06d}.png" for i in range(count)]
    return Faces(images=images, label_dist=label_dist, names=names, source=f"drawn faces ({style}, seed {seed})")


def write_ferplus_like(folder: str | Path, train: int = 2400, valid: int = 600, test: int = 600, seed: int = 0) -> dict:
    """Write ferplus_{train,valid,test}.npz and class_map_ferplus.json of drawn faces; returns {split: path}."""
    folder = Path(folder)
    paths = {}
    for offset, (split, count) in enumerate({"train": train, "valid": valid, "test": test}.items()):
        paths[split] = folder / f"ferplus_{split}.npz"
        make_faces(count, seed * 3 + offset).save(paths[split])
    write_json(folder / "class_map_ferplus.json", CLASS_MAP)
    return paths


def _express(expressions: np.ndarray, look: Style, rng: np.random.Generator):
    """Action units of each face, and the annotators' votes on it."""
    count = len(expressions)
    intensity = rng.uniform(*look.intensity, count)
    second = rng.integers(0, len(CLASS_NAMES), count)
    mix = rng.beta(1, 6, count) * 0.7 * (look.intensity[0] < 0.8)
    units = _EXPRESSIONS[expressions] * (intensity * (1 - mix))[:, None] + _EXPRESSIONS[second] * mix[:, None]
    units = (units + rng.normal(0, 0.09, units.shape)).astype(np.float32)
    # Half of the happy faces laugh; a mouth of a neutral face may stand a little open.
    units[:, 4] += np.where(expressions == 1, rng.choice([-0.35, 0.3], count), 0) * intensity
    units[:, 4] = np.clip(units[:, 4], 0, None)
    units[:, 8] *= rng.choice([-1, 1], count)

    seen = _CONFUSED_WITH[expressions] * (1 - mix)[:, None] + _CONFUSED_WITH[second] * mix[:, None]
    weak = np.clip((0.8 - intensity) * 1.1, 0, 0.6)[:, None]
    seen = seen * (1 - weak)
    seen[:, 0] += weak[:, 0]
    # Sharpened: people agree more on one picture than over a class.
    seen = seen**1.35
    votes = rng.multinomial(ANNOTATORS, seen / seen.sum(axis=1, keepdims=True))
    votes[votes < 2] = 0
    empty = votes.sum(axis=1) == 0
    votes[empty, expressions[empty]] = 1
    label_dist = (votes / votes.sum(axis=1, keepdims=True)).astype(np.float32)
    return dict(zip(_UNITS, units.T)), label_dist


_HEAD_RANGES = {
    "skin": (0.38, 0.85),
    "hair": (0.05, 0.6),
    "hairline": (-0.78, -0.5),
    "jaw": (0.62, 0.78),
    "eye_gap": (0.27, 0.35),
    "eye_size": (0.85, 1.2),
    "brow_weight": (0.035, 0.075),
    "nose_length": (0.85, 1.2),
    "mouth_size": (0.24, 0.32),
    "mouth_place": (0.44, 0.53),
    "long_hair": (-1.0, 1.0),
    "glasses": (0.0, 1.0),
    "beard": (0.0, 1.0),
}


def _heads(count: int, seed: int, identities: np.ndarray | None) -> dict[str, np.ndarray]:
    """Features of the heads that no expression changes, one for each identity."""
    if identities is None:
        identities, number = np.arange(count), count
    else:
        identities = np.asarray(identities, np.int64)
        number = int(identities.max(initial=0)) + 1
    rng = np.random.default_rng((seed, 3))
    return {
        name: rng.uniform(low, high, number).astype(np.float32)[identities]
        for name, (low, high) in _HEAD_RANGES.items()
    }


def _draw(face: dict[str, np.ndarray], look: Style, size: int, rng: np.random.Generator) -> np.ndarray:
    count = len(face["skin"])
    # One number a face, broadcast over its pixels.
    col = {name: np.asarray(value, np.float32).reshape(-1, 1, 1) for name, value in face.items()}
    uniform = lambda low, high: rng.uniform(low, high, (count, 1, 1)).astype(np.float32)  # noqa: E731
    angle = rng.normal(0, look.rotation / 2, (count, 1, 1)).astype(np.float32)
    scale = uniform(*look.scale)
    grid = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1)[None]
    image_x, image_y = grid[:, None, :], grid[:, :, None]
    x = (image_x - uniform(-look.shift, look.shift)) / scale
    y = (image_y - uniform(-look.shift, look.shift)) / scale
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    soft = 2 / size / scale * 1.2
    canvas = _Canvas(uniform(0.1, 0.9) + uniform(-0.3, 0.3) * image_x + uniform(-0.3, 0.3) * image_y, soft)

    turn = uniform(-look.yaw, look.yaw)
    nod = uniform(-look.yaw, look.yaw) * 0.12
    # Features slide over the turned head, and the far half of it gets narrower.
    fx = (x - turn * 0.2) * (1 + 0.35 * turn * np.clip(x, -1, 1))
    fy = y - nod
    _draw_head(canvas, col, x, y)
    _draw_eyes(canvas, col, fx, fy)
    _draw_nose(canvas, col, fx, fy, turn)
    _draw_mouth(canvas, col, fx, fy)
    image = canvas.image
    shade = uniform(-look.light, look.light) * x + uniform(-look.light, look.light) * 0.7 * y
    image = image * (1 + shade)
    _occlude(image, image_x, image_y, look, uniform)
    contrast, middle = uniform(*look.contrast), uniform(0.4, 0.6)
    image = (image - 0.5) * contrast + middle
    image = _blur(image, uniform(0, 0.22))
    image += rng.standard_normal(image.shape, dtype=np.float32) * (look.noise * uniform(0.3, 1.5))
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


class _Canvas:
    """A block of images [B, S, S], and painting on it with edges ``soft`` wide."""

    def __init__(self, image: np.ndarray, soft: np.ndarray):
        self.image, self.soft = image, soft

    def inside(self, distance: np.ndarray) -> np.ndarray:
        """1 where the signed distance is negative, 0 where positive, soft between."""
        return np.clip(0.5 - distance / self.soft, 0, 1)

    def paint(self, coverage: np.ndarray, grey) -> None:
        self.image += coverage * (grey - self.image)

    def stroke(self, distance: np.ndarray, width, grey, where=1.0) -> None:
        """A line of half ``width`` along ``distance`` 0."""
        self.paint(self.inside(np.abs(distance) - width) * where, grey)


def _ellipse(x, y, rx, ry):
    """Signed distance to an ellipse around 0, exact on the edge up to curvature."""
    return (np.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1) * np.minimum(rx, ry)


def _draw_head(canvas: _Canvas, f: dict, x, y) -> None:
    inside = canvas.inside
    # Neck and shoulders, hair behind the head, ears, head, hair in front.
    canvas.paint(inside(np.maximum(np.abs(x) - 0.32, -(y - 0.5))), f["skin"] * 0.82)
    canvas.paint(inside(_ellipse(x, y - 1.35, np.float32(0.95), np.float32(0.42))), 1 - f["hair"])
    long_hair = np.where(f["long_hair"] > 0.2, 1.0, 0.0).astype(np.float32)
    behind = np.maximum(_ellipse(x, y - 0.1 * long_hair, f["jaw"] + 0.16, 1.02 + 0.12 * long_hair), y - 0.8)
    canvas.paint(inside(behind) * np.maximum(long_hair, y < -0.2), f["hair"])
    canvas.paint(
        inside(_ellipse(np.abs(x) - f["jaw"] - 0.02, y + 0.05, np.float32(0.1), np.float32(0.2))), f["skin"] * 0.9
    )
    # The jaw is narrower than the brow.
    head = _ellipse(x * (1 + 0.16 * np.clip(y, 0, 1)), y - 0.04, f["jaw"], np.float32(0.94))
    rounded = 1 - 0.22 * np.clip(1 + head / 0.35, 0, 1) ** 2
    covered = inside(head)
    canvas.paint(covered, f["skin"] * rounded)
    canvas.paint(covered * inside(y - f["hairline"] - 0.12 * f["long_hair"] * x + 0.15 * x * x), f["hair"])
    beard = np.where(f["beard"] > 0.85, 0.45, 0.0).astype(np.float32)
    # Along the jaw and over the lip, free around the mouth.
    free = inside(_ellipse(x, y - 0.46, np.float32(0.34), np.float32(0.17)))
    canvas.paint(covered * inside(0.32 - y - 0.35 * x * x) * (1 - free) * beard, f["hair"])


def _draw_eyes(canvas: _Canvas, f: dict, x, y) -> None:
    dark = np.minimum(f["hair"], f["skin"] * 0.45)
    side = np.where(x < 0, -1, 1).astype(np.float32)
    # Coordinates about each eye; u grows outwards.
    u, v = np.abs(x) - f["eye_gap"], y + 0.17
    opening = np.clip(0.075 * (1 + 0.95 * f["lid"]), 0.012, 0.16) * f["eye_size"]
    eye = _ellipse(u, v, 0.145 * f["eye_size"], opening)
    canvas.paint(canvas.inside(eye), 0.92)
    iris = np.sqrt(u * u + v * v) - 0.068 * f["eye_size"]
    canvas.paint(canvas.inside(np.maximum(iris, eye)), 0.12)
    canvas.stroke(eye, 0.014, dark, where=np.where(v < 0.3 * opening, 1.0, 0.45))
    # Cheeks push the lower lid up in a smile; a wrinkled nose folds it.
    squeeze = np.clip(f["curve"] - 0.5, 0, 1) + np.clip(f["wrinkle"] - 0.3, 0, 1)
    canvas.stroke(v - 0.13 + 1.2 * u * u, 0.012, f["skin"] * 0.6, where=(np.abs(u) < 0.14) * np.minimum(squeeze, 1))

    lifted = 0.11 * f["brow"] + 0.07 * f["skew"] * side * (np.abs(f["skew"]) > 0.3)
    brow = v + 0.215 + lifted + 0.5 * f["tilt"] * u + (0.5 + 0.7 * np.clip(f["brow"], 0, 1)) * u * u - 0.02
    # Drawn together in anger, apart in surprise.
    u_brow = u + 0.05 * np.clip(f["tilt"], 0, 1)
    length = canvas.inside(np.abs(u_brow) - 0.185)
    canvas.stroke(brow, f["brow_weight"], dark, where=length)
    furrow = np.clip(f["tilt"] - 0.35, 0, 1) * 0.9
    canvas.stroke(np.abs(x) - 0.055, 0.013, f["skin"] * 0.6, where=(np.abs(y + 0.4) < 0.1) * furrow)
    worry = np.clip(f["brow"] - 0.3, 0, 1)
    for height in (-0.56, -0.64):
        line = (np.abs(x) < 0.28) * worry * 0.7
        canvas.stroke(y - height - 0.1 * x * x, 0.011, f["skin"] * 0.68, where=line)
    worn = np.where(f["glasses"] > 0.88, 0.9, 0.0).astype(np.float32)
    frame = np.minimum(np.abs(_ellipse(u, v, np.float32(0.22), np.float32(0.19))), np.abs(y + 0.2) + (np.abs(x) > 0.12))
    canvas.stroke(frame, 0.018, 0.08, where=worn)


def _draw_nose(canvas: _Canvas, f: dict, x, y, turn) -> None:
    shadow = f["skin"] * 0.62
    tip = 0.2 * f["nose_length"] - 0.045 * np.clip(f["wrinkle"], 0, 1)
    ridge = x - 0.05 * np.sign(turn) - 0.05 * (y + 0.1)
    canvas.stroke(ridge, 0.014, shadow, where=((y > -0.14) & (y < tip)) * 0.7)
    canvas.paint(
        canvas.inside(_ellipse(np.abs(x) - 0.065, y - tip, np.float32(0.035), np.float32(0.025))), shadow * 0.6
    )
    wing = _ellipse(np.abs(x) - 0.115, y - tip + 0.02, np.float32(0.035), np.float32(0.05))
    canvas.stroke(wing, 0.010, shadow, where=0.6)
    wrinkle = np.clip(f["wrinkle"] - 0.15, 0, 1)
    for height in (-0.14, -0.07, 0.0):
        canvas.stroke(y - height + 0.9 * np.abs(x), 0.014, shadow * 0.85, where=(np.abs(x) < 0.13) * wrinkle)
    # Folds from the nose to the mouth's corners: a smile, or a raised lip.
    fold = np.clip(0.75 * f["curve"], 0, 1) + np.clip(0.8 * f["lip"], 0, 1)
    along = np.abs(x) - 0.17 - 0.55 * (y - tip)
    canvas.stroke(along, 0.013, shadow, where=((y > tip) & (y < tip + 0.26)) * np.minimum(fold, 1) * 0.6)


def _draw_mouth(canvas: _Canvas, f: dict, x, y) -> None:
    half = f["mouth_size"] * (1 + 0.38 * f["width"])
    t = np.clip(x / half, -1.3, 1.3)
    # Corners move against the middle; with skew, one of them alone.
    raised = np.clip(t * np.sign(f["skew"]), 0, 1.2) ** 2 * np.abs(f["skew"])
    corner = -0.115 * f["curve"] * (t * t - 0.35) - 0.13 * raised
    line = f["mouth_place"] + corner
    gap = 0.17 * f["open"] * np.sqrt(np.clip(1 - t * t, 0, 1))
    upper = line - 0.45 * gap - 0.05 * np.clip(f["lip"], 0, 1) * (1 - 0.5 * t * t)
    lower = line + 1.0 * gap
    across = canvas.inside(np.abs(x) - half)
    lips = f["skin"] * 0.58
    thick = 0.036 * np.sqrt(np.clip(1.05 - t * t, 0, 1))
    canvas.paint(canvas.inside(np.maximum(upper - 0.7 * thick - y, y - lower - thick)) * across, lips)
    inner = canvas.inside(np.maximum(upper - y, y - lower)) * across
    canvas.paint(inner * np.clip(f["open"] * 4 + np.clip(f["lip"], 0, 1), 0, 1), 0.08)
    teeth = np.clip(f["width"] * 3 + np.clip(f["lip"], 0, 1), 0, 1) * np.clip(f["open"] * 4, 0, 1)
    canvas.paint(inner * canvas.inside(y - upper - 0.45 * (gap + 0.03)) * teeth, 0.93)
    canvas.stroke(y - line, 0.014, 0.15, where=across * np.clip(1 - f["open"] * 4, 0, 1))


def _occlude(image: np.ndarray, x, y, look: Style, uniform) -> None:
    """A hand, a strand or a letter over part of the face, in ``look.occlusion`` of the images."""
    present = uniform(0, 1) < look.occlusion
    angle, grey = uniform(0, np.pi), uniform(0.1, 0.9)
    u = (x - uniform(-0.8, 0.8)) * np.cos(angle) + (y - uniform(-0.8, 0.8)) * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    bar = (np.abs(u) < uniform(0.05, 0.16)) & (np.abs(v) < uniform(0.2, 0.8)) & present
    image += bar * (grey - image)


def _blur(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Each pixel takes ``weight`` from either neighbour, along x and then along y."""
    for axis in (1, 2):
        image = image * (1 - 2 * weight) + weight * (np.roll(image, 1, axis) + np.roll(image, -1, axis))
    return image
