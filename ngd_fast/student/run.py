"""From a configuration to a finished run folder: load what it names, train, evaluate, write.

Called by ``ngd-fast student train`` and, for several runs, by ``suite``; makes the ``Session`` s and hands them to
``Trainer``.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ngd_fast.artifacts.files import alone_in, check_sums, read_json, require_free, write_text
from ngd_fast.artifacts.fingerprint import FINGERPRINT_NAME
from ngd_fast.config import dump_config, load_config
from ngd_fast.console import say
from ngd_fast.errors import UserError, first_line
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import Feed, make_feed
from ngd_fast.faces.pixels import source_shape
from ngd_fast.objective import choice
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student import stem
from ngd_fast.student.config import StudentConfig, differing_keys
from ngd_fast.student.distributed import Ranks, join_ranks
from ngd_fast.student.fused_teacher import FusedTeacher, prepare_live_teacher
from ngd_fast.student.inputs import Inputs, load_inputs
from ngd_fast.student.kd_teacher import (
    CachedTeacher,
    CombinedTeacher,
    Teacher,
    cached_logits,
    combine_logits,
    load_kd_teacher,
)
from ngd_fast.student.networks import build_student
from ngd_fast.student.resnet import parse_arch
from ngd_fast.student.schedule import schedule_table
from ngd_fast.student.session import CONFIG_NAME, METRICS_NAME, Session, is_finished
from ngd_fast.student.step import AUTOCAST, StudentStep
from ngd_fast.student.strided import LANES, protected
from ngd_fast.student.trainer import Trainer
from ngd_fast.student.weights import load_backbone_weights

# Students that train side by side see the same batches; only these sections may differ between them.
_OWN_SECTIONS = ("name", "model", "objective", "optimizer")


def train_student(config: StudentConfig, out: str | Path, *, resume: bool = False) -> dict | None:
    """Train one student into the run folder ``out``; see :func:`train_students`."""
    return train_students([config], [out], resume=resume)[0]


def train_students(
    configs: Sequence[StudentConfig], outs: Sequence[str | Path], *, resume: bool = False
) -> list[dict | None]:
    """Train students side by side on the same batches, each into its run folder; returns their metrics.json.

    Under torchrun the batches are shared among the ranks. ``resume`` continues from the last checkpoint where there is
    one (torchrun's restarts do so by themselves) and leaves finished runs alone. None: a run that SIGTERM stopped.

    Raises UserError for a folder that holds another run, for missing or unfit files, and for a training that diverged.
    """
    _require_alike(configs)
    config = configs[0]
    ranks, device = join_ranks(config.device)
    try:
        resume = resume or ranks.is_restart
        folders = [Path(out) for out in outs]
        if resume and all(holds_finished_run(folder, c) for folder, c in zip(folders, configs)):
            say(f"{', '.join(map(str, folders))}: already finished")
            return [read_json(folder / METRICS_NAME) for folder in folders]
        inputs = [load_inputs(config)]
        inputs += [load_inputs(c, (inputs[0].train, inputs[0].valid)) for c in configs[1:]]
        slower = dict.fromkeys(_choose_backend(c, device) for c in configs)
        for folder in folders:
            require_free(folder, resume=resume)
        for line in slower:
            if ranks.is_main and line:
                say(line)
        ranks.barrier()  # before rank 0 fills the folders that the others look into
        metrics = _train(configs, folders, inputs, ranks, device, resume)
        ranks.barrier()
        return metrics
    finally:
        ranks.close()


def holds_finished_run(folder: Path, config: StudentConfig) -> bool:
    """True for a finished run of this configuration on this data; raises UserError for one of another."""
    if not is_finished(folder):
        return False
    before = load_config(StudentConfig, folder / CONFIG_NAME)
    keys = differing_keys(before.model_dump(mode="json"), config.model_dump(mode="json"))
    recorded, wanted = read_json(folder / FINGERPRINT_NAME)["checksums"], load_inputs(config).checksums
    keys += [name for name in sorted(recorded.keys() | wanted.keys()) if recorded.get(name) != wanted.get(name)]
    if keys:
        raise UserError(f"{folder}: holds a finished run that differs in {', '.join(keys[:4])}; choose another folder")
    changed = [line for line in check_sums(folder) if not line.endswith("missing")]  # one may delete a checkpoint
    if changed:
        raise UserError(f"{folder}: holds a finished run, but not as it was written ({'; '.join(changed)})")
    return True


def _train(configs, folders, inputs: list[Inputs], ranks: Ranks, device: torch.device, resume: bool):
    config = configs[0]
    _set_determinism(config, device)
    train = inputs[0].train
    if ranks.is_main and train.true is not None:
        changed = int((train.labels != train.true[1]).sum())
        say(f"data.label_noise={config.data.label_noise:g}: {changed} of {len(train)} training faces got a wrong label")
    channels = _input_channels(configs, inputs[0].train, ranks, device)
    feeds = _make_feeds(config, inputs[0], channels, ranks, device)
    with contextlib.ExitStack() as stack:
        for feed in feeds:
            stack.callback(feed.close)
        steps_per_epoch = feeds[0].steps_per_epoch // config.train.accumulation
        if not steps_per_epoch:
            raise UserError(
                f"{config.data.train}: {len(inputs[0].train)} faces do not fill one step of "
                f"{config.train.accumulation} batches of {config.train.batch_size}; lower train.accumulation"
            )
        use_graph = _on("cuda_graph", config, device, alone=ranks.world_size == 1)
        if use_graph and any(c.optimizer.sam.alternates for c in configs):
            use_graph = False  # a wish for one was refused with the configuration
            say("no CUDA graph: optimizer.sam.every is above 1")
        # Before any folder is written, as it may be refused; and before a session takes up its random numbers again.
        teacher = _make_teacher(configs, feeds[0], folders[0].parent / "kd_cache", ranks, device)
        sessions = []
        for c, folder, own in zip(configs, folders, inputs):
            step = _make_step(c, feeds[0].faces, own.bank, schedule_table(c, steps_per_epoch), ranks, device)
            _require_sizes(c, f"model.arch {c.model.arch}", step.student, feeds[0].channels, device)
            sessions.append(Session(c, folder, step, checksums=own.checksums, ranks=ranks))
        for session in sessions:
            if ranks.is_main:
                stack.enter_context(alone_in(session.folder, resume=resume))
            if resume and session.resume() and ranks.is_main:
                say(f"{session.folder}: continues after epoch {session.progress.epoch}")
            if ranks.is_main:
                write_text(session.folder / CONFIG_NAME, dump_config(session.config))
            session.start()
        trainer = Trainer(sessions, *feeds, teacher=teacher, ranks=ranks, use_graph=use_graph)
        if not trainer.run() or not ranks.is_main:
            return [None for _ in sessions]
        dataset = Path(config.data.valid).stem
        return [s.finish(own.valid, dataset, own.files) for s, own in zip(sessions, inputs)]


def _input_channels(configs: Sequence[StudentConfig], faces: Faces, ranks: Ranks, device: torch.device) -> int:
    """1 where all students take grey faces through the fused stem, else 3.

    Raises UserError where model.stem=fused cannot be.
    """
    reason = next(filter(None, (_why_no_fused_stem(config, faces, device) for config in configs)), "")
    if reason and any(config.model.stem == "fused" for config in configs):
        raise UserError(f"model.stem=fused: {reason}")
    if ranks.is_main and device.type == "cuda":
        say(f"stem: layer by layer ({reason})" if reason else "stem: fused")
    return 3 if reason else 1


def _why_no_fused_stem(config: StudentConfig, faces: Faces, device: torch.device) -> str:
    data, shape = config.data, parse_arch(config.model.arch)
    if config.model.stem == "layers":
        return "model.stem=layers"
    if shape is None:
        return f"model.arch {config.model.arch} is none of resnet18, resnet34, resnet50"
    if config.train.sync_bn or config.train.precision == "fp32":
        return "train.sync_bn" if config.train.sync_bn else "train.precision=fp32"
    if any(isinstance(value, tuple) and len(set(value)) > 1 for value in (data.mean, data.std)):
        return "data.mean or data.std differs between the channels"
    if source_shape(faces, data.image_size, grey=data.grey)[2] > 1:
        return "the faces are in color (data.grey=true would make them grey)"
    sizes = [data.image_size, *(stage.image_size for stage in config.train.resolution or ())]
    reasons = (stem.why_not_here(device), stem.why_not_channels(shape[1]), *(stem.why_not_size(s, s) for s in sizes))
    return next(filter(None, reasons), "")


def _make_feeds(
    config: StudentConfig, inputs: Inputs, channels: int, ranks: Ranks, device: torch.device
) -> tuple[Feed, Feed]:
    data, train = config.data, config.train
    per_rank, rest = divmod(train.batch_size, ranks.world_size)
    if rest or not per_rank:
        raise UserError(f"train.batch_size {train.batch_size} cannot be shared by {ranks.world_size} ranks")
    common = {
        "kind": config.feed.kind,
        "image_size": data.image_size,
        "mean": _one_number(data.mean),
        "std": _one_number(data.std),
        "grey": data.grey,
        "skip_bad": data.skip_bad,
        "num_workers": config.feed.workers,
        "seed": config.seed,
        "device": device,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
    }
    # Under autocast the first convolution rounds its input anyway: halves halve the traffic.
    half = AUTOCAST[train.precision] if device.type == "cuda" else None
    feed = make_feed(
        inputs.train,
        train=True,
        batch_size=per_rank,
        augment=config.augment,
        dtype=half or torch.float32,
        draw_labels=data.draw_labels,
        channels=channels,
        **common,
    )
    common["kind"] = feed.kind
    return feed, make_feed(inputs.valid, train=False, batch_size=train.valid_batch_size, **common)


def _one_number(value):
    """``value`` for any number of channels, where it is the same for all three."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _make_step(
    config: StudentConfig,
    faces: Faces,
    bank: PrototypeBank | None,
    schedule: torch.Tensor,
    ranks: Ranks,
    device: torch.device,
) -> StudentStep:
    torch.manual_seed(config.seed)
    model = config.model
    student = build_student(
        model.arch,
        num_classes=len(faces.class_names),
        embedding_dim=model.embedding_dim,
        logit_scale=model.logit_scale,
        pretrained=model.pretrained,
        image_size=config.data.image_size,
    )
    if model.weights is not None:
        report = load_backbone_weights(student.backbone, model.weights)
        if ranks.is_main:
            say(f"{model.weights}: {report}")
    if ranks.is_main and device.type == "cpu" and protected(student):
        say(
            f"model.arch {model.arch}: 1x1 convolutions with a stride have fewer than {LANES} input channels; "
            "they run without oneDNN's stride, whose gradient is wrong for so few"
        )
    if config.train.sync_bn:
        if device.type != "cuda":
            raise UserError("train.sync_bn needs GPUs; on CPUs each rank keeps its own batch statistics")
        student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return StudentStep(
        student.to(device, memory_format=memory_format),
        config,
        schedule=schedule,
        class_counts=faces.class_counts,
        bank=bank,
        device=device,
        ranks=ranks,
        compiled=_on("compile", config, device),
    )


def _make_teacher(
    configs: Sequence[StudentConfig], feed: Feed, cache: Path, ranks: Ranks, device: torch.device
) -> Teacher | None:
    """The one teacher (or its several as one) of those that have one, for the batches of the training ``feed``."""
    taught = [c for c in configs if c.objective.kd.weight > 0]
    if not taught:
        return None
    config, kd = taught[0], taught[0].objective.kd
    data = config.data
    view = {"image_size": data.image_size, "mean": data.mean, "std": data.std}
    known = {"class_names": feed.faces.class_names, **view}
    loaded = [load_kd_teacher(teacher, weights=weights, **known) for teacher, weights in kd.teachers().values()]
    loaded = [(network.to(device, memory_format=torch.channels_last), checksum) for network, checksum in loaded]
    autocast = AUTOCAST[config.train.precision]
    if not kd.cached:
        switches = {"compiled": _on("compile", config, device), "deterministic": config.train.deterministic}
        live = []
        for (key, (name, _)), (network, _) in zip(kd.teachers().items(), loaded, strict=True):
            _require_sizes(config, f"teacher {name}", network, feed.channels, device)
            live.append(prepare_live_teacher(network, device, autocast, **switches))
            if ranks.is_main and device.type == "cuda":
                how = "cuDNN's epilogues" if isinstance(live[-1].module, FusedTeacher) else "layer by layer"
                say(f"{key.replace('_', ' ')}: {how}")
        return live[0] if len(live) == 1 else CombinedTeacher(live, *kd.mixture())
    compute = lambda network, checksum: cached_logits(  # noqa: E731
        cache,
        network,
        checksum,
        feed.faces,
        device=device,
        autocast=autocast,
        workers=config.feed.workers,
        grey=data.grey,
        **view,
    )
    if ranks.is_main:
        for pair in loaded:
            compute(*pair)
    ranks.barrier()
    tables = [torch.from_numpy(compute(*pair).copy()) for pair in loaded]
    table = tables[0] if len(tables) == 1 else combine_logits(tables, *kd.mixture()).half()
    return CachedTeacher(table.to(device), config.augment, config.seed)


def _require_sizes(
    config: StudentConfig, name: str, network: torch.nn.Module, channels: int, device: torch.device
) -> None:
    """Raise UserError where ``network`` (a transformer, say) takes no images of a size in train.resolution."""
    was_training = network.training
    network.eval()
    for stage in config.train.resolution or ():
        images = torch.zeros(1, channels, stage.image_size, stage.image_size, device=device)
        try:
            with torch.no_grad():
                network(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"train.resolution: {name} takes no images of {stage.image_size} px: {reason}") from None
    network.train(was_training)


def _on(name: str, config: StudentConfig, device: torch.device, *, alone: bool = True) -> bool:
    """Is the switch train.``name`` on, for this device? Raises UserError where it is asked for and cannot be."""
    wish = getattr(config.train, name)
    if wish == "auto":
        return device.type == "cuda" and alone
    if wish and name == "cuda_graph" and (device.type != "cuda" or not alone):
        raise UserError("train.cuda_graph=true needs a GPU and a single rank; use auto")
    return wish


def _set_determinism(config: StudentConfig, device: torch.device) -> None:
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = config.train.deterministic
        torch.backends.cudnn.benchmark = not config.train.deterministic
        torch.set_float32_matmul_precision("high")


def _keys_apart(a: StudentConfig, b: StudentConfig) -> list[str]:
    """Keys whose difference keeps two students from training side by side."""
    shared = [config.model_dump(mode="json", exclude=set(_OWN_SECTIONS)) for config in (a, b)]
    # Not even what a resumed run may change: all of them train on the first one's faces, at its pace.
    keys = differing_keys(*shared, but_for=())
    teachers = [c.objective.kd for c in (a, b) if c.objective.kd.weight > 0]
    if len({(kd.teacher, kd.teacher_weights, kd.cached) for kd in teachers}) > 1:
        keys.append("objective.kd.teacher")
    elif len({kd.mixture() for kd in teachers if isinstance(kd.teacher, tuple)}) > 1:
        keys.append("how objective.kd combines its teachers (mode, combine, temperature)")
    return keys


def trains_alike(a: StudentConfig, b: StudentConfig) -> bool:
    """True where two students can train side by side: same faces, views, seed, steps and teacher."""
    return not _keys_apart(a, b)


def _require_alike(configs: Sequence[StudentConfig]) -> None:
    if not configs:
        raise ValueError("configs must name at least one student")
    for config in configs[1:]:
        keys = _keys_apart(configs[0], config)
        if keys:
            raise UserError(f"{configs[0].name} and {config.name} cannot train side by side: they differ in {keys[0]}")


def _choose_backend(config: StudentConfig, device: torch.device) -> str:
    """What to say where the objective's backend is none that was named, nor the fastest; empty elsewhere.

    Raises UserError where the one named cannot train this student on this device.
    """
    objective, classes = config.objective, len(CLASS_NAMES)
    features, logits = (torch.empty(0, size, device=device) for size in (config.model.embedding_dim, classes))
    inputs = choice.Inputs(features, teacher_logits=logits if objective.kd.weight > 0 else None)
    fastest = "cpu" if device.type == "cpu" else "cuda"
    try:
        backend = choice.choose(objective.backend, inputs, classes, objective.kd.mode)
    except RuntimeError as error:
        raise UserError(f"objective.backend: {error}") from None
    if objective.backend is not None or backend == fastest:
        return ""
    return f"objective: {backend} ({fastest}: {choice.why_not(fastest, inputs, classes, objective.kd.mode)})"
