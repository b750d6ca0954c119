"""What each stage takes on a machine: seconds, memory, disk. Pure arithmetic on a model's shape, one function a stage.

A product counts its operations; all else counts the bytes that it passes over, in place or into new memory, and the
small operations where there are many of them. The counts are read off the code that they stand for, which is named with
each; docs/plan.md holds them against runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tasks.activations.memory import needed_bytes
from tasks.model.family import ARCHITECTURES
from tasks.planning.machine import Machine
from tasks.planning.shape import Group, Layer, Shape
from tasks.quantizers.parallel import processes
from tasks.schemes import MIXED, SCHEMES, Scheme
from tasks.settings import BASE, BUILTIN, Settings, VariantSettings

# what solvers/awq.py tries, and on how many rows the scales
SCALE_TRIALS, CLIP_TRIALS, ROWS = 20, 12, 512
BLOCK = 64  # columns, in solvers/gptq.py
SUMMED = 384  # rows of a Gram matrix in one product, in sums.py
PART = 1 << 21  # numbers that are worked on together, in solvers/__init__.py
STREAM, FINE = 256, 8  # in quantizers/sensitivity.py: tokens of a stream, and bits from which it rounds to the nearest
STEP = 5  # calls that a decoder layer makes for a token by itself: cache, masks and the choice of the token beside it
CACHED = 32e6  # bytes of a result up to which the C library uses memory again instead of giving it back
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# of the tasks in evals/, without examples in the prompt, by the tokenizer of SmolLM2: tokens that an item's forward
# pass reads, tokens of its answers that are scored, and items that there are
ITEMS = {
    "piqa_local": (42, 31, 1500),
    "openbookqa_local": (21, 13, 500),
    "commonsenseqa_local": (24, 9, 1217),
    "boolq_local": (150, 2, 3270),
}
ASSUMED = (100, 10, 1000)  # of a task that is not listed
AS_IT_CAME = VariantSettings(scheme="none")


@dataclass(frozen=True)
class Need:
    """What a stage takes. seconds; memory: the most that its process holds, bytes, on a GPU the GPU's; disk: bytes that
    stay, each once (what is linked counts where it was written); scratch: bytes that it needs beyond them for a while.
    None: not known, and `note` says why."""

    seconds: float | None
    memory: float | None
    disk: float = 0.0
    scratch: float = 0.0
    note: str | None = None


@dataclass(frozen=True)
class PlanJob:
    """What is planned: a model under settings, on what a stage has of a machine (`Machine.share`)."""

    shape: Shape
    settings: Settings
    machine: Machine

    @property
    def tokens(self) -> int:
        """Of calibration."""
        return self.settings.calibration.samples * self.settings.calibration.sequence_length

    @property
    def model_bytes(self) -> float:
        """The baseline's weights on disk."""
        return float(BYTES[self.settings.model.dtype] * self.shape.parameters)


@dataclass
class Work:
    """Adds up the seconds of a stage."""

    machine: Machine
    seconds: float = field(default=0.0)

    def product(self, operations: float, dtype: str = "float32") -> None:
        """A large product of matrices: two operations for each pair of numbers that meet."""
        kinds = {"float32": self.machine.product_gflops, "int8": self.machine.integer_gflops}
        self.seconds += operations / kinds.get(dtype, self.machine.half_gflops) / 1e9

    def passes(self, numbers: float, fresh: float, kept: float) -> None:
        """So many times over a tensor of float32: into `fresh` new ones, `kept` times in place or only read."""
        bytes_ = 8.0 * numbers
        # new memory that comes out of a cache costs as much as two passes in place
        new = 1 / self.machine.fresh_gbs if bytes_ / 2 > CACHED else 2 / self.machine.memory_gbs
        self.seconds += bytes_ * (fresh * new + kept / self.machine.memory_gbs) / 1e9

    def calls(self, count: float) -> None:
        """Operations so small that starting them is what they cost."""
        self.seconds += count * self.machine.call_us / 1e6

    def read(self, bytes_: float) -> None:
        """From files."""
        self.seconds += bytes_ / self.machine.disk_read_gbs / 1e9

    def write(self, bytes_: float) -> None:
        """To files."""
        self.seconds += bytes_ / self.machine.disk_write_gbs / 1e9

    def hash(self, bytes_: float) -> None:
        """A checksum of files."""
        self.seconds += bytes_ / self.machine.hash_gbs / 1e9


def estimate(stage: str, job: PlanJob) -> Need:
    """What `stage` of dvc.yaml takes, its process' start and DVC's checksums included."""
    kind, _, name = stage.partition("@")
    variant = job.settings.variants.get(name or BASE, AS_IT_CAME)
    match kind:
        case "download":
            return download(job)
        case "datasets" | "calibrate" | "report":
            return _started(job, Work(job.machine), note="its start alone")
        case "statistics":
            return statistics(job)
        case "quantize":
            return quantize(job, variant)
        case "export":
            return export(job, variant)
        case "reference" | "evaluate":
            return evaluate(job, variant)
        case "benchmark":
            return benchmark(job, variant)
        case "package":
            return package(job)
        case _:
            return Need(None, None, note="a stage that the plan does not know")


def pressed_today(shape: Shape) -> bool:
    """Whether the methods know the model's layers; where not, a plan says what they would take."""
    return shape.family in ARCHITECTURES


# -- the stages ------------------------------------------------------------------------------------------------------


def download(job: PlanJob) -> Need:
    """tasks/download.py: fetch, checksum as promised, in the manifest and in the report, and by DVC."""
    work = Work(job.machine)
    network = job.machine.network_gbs
    if network:
        work.seconds += job.model_bytes / network / 1e9
    work.hash(4 * job.model_bytes)
    note = None if network else "without the transfer; --network counts it"
    return _started(job, work, disk=job.model_bytes, note=note)


def statistics(job: PlanJob) -> Need:
    """tasks/statistics.py: every layer once over all tokens; Gram matrices, magnitudes."""
    # where bfloat16 is the faster one, the processor multiplies it natively (`fast_dtype`)
    dtype = "bfloat16" if job.machine.half_gflops > job.machine.product_gflops else "float32"
    shape, tokens, length = job.shape, job.tokens, job.settings.calibration.sequence_length
    work = Work(job.machine)
    work.hash(job.model_bytes)
    work.read(_embedding_bytes(job))
    work.passes(shape.embedding, 1, 0)
    importance = job.settings.statistics.importance
    for layer in shape.layers:
        (_collect_weighed if importance else _collect)(job, work, layer, dtype)
        for group in layer.groups:
            work.write(group.copies * 4 * group.width**2)
        # what the next layer reads is kept, for a run that is interrupted; 32 bits, or 16 and as many for the way back
        work.passes(tokens * shape.hidden, 1, 0)
        work.write(4 * tokens * shape.hidden)
    _sum_input(job, work, shape.hidden)  # of the output layer
    if importance:
        _predict(job, work, dtype)
    disk = statistics_bytes(shape)
    if importance:
        disk += sum(4 * tokens * group.copies for layer in shape.layers for group in layer.groups)
    work.hash(2 * disk)
    needed = needed_bytes(
        tokens,
        length,
        [group.width for group in shape.largest.groups for _ in range(group.copies)],
        shape.vocabulary,
        shape.largest.parameters,
        importance,
        job.machine.device,
        BYTES[dtype],
    )
    # between the layers activations are kept: one layer's, or, where there is a way back, those of all
    scratch = (2 * (len(shape.layers) + 1) if importance else 4) * tokens * shape.hidden
    return _started(job, work, memory=needed, disk=disk, scratch=scratch)


def _collect_weighed(job: PlanJob, work: Work, layer: Layer, dtype: str) -> None:
    """activations/importance.py: a layer forward; on the way back forward once more and backward, with the sums. dtype:
    of the products."""
    shape, tokens, length = job.shape, job.tokens, job.settings.calibration.sequence_length
    for _ in range(2):
        _load_layer(job, work, layer)
    # backward takes as many products as forward, for there are no weights' gradients
    for _ in range(3):
        _forward_layer(work, shape, layer, tokens, length, length, dtype)
    # but five of attention for two, and twice the passes and small operations
    work.product(6 * tokens * length * shape.attention)
    work.passes(tokens * length * shape.heads, 0, 4)
    _between_products(work, shape, layer, tokens, length)
    _sum(job, work, layer)
    for group in layer.groups:
        work.passes(tokens * group.active * group.width, 0, 1)
        # the squares of what comes back to each linear layer, a sequence at a time, and their sums
        work.passes(length * group.active * sum(group.rows), tokens / length, tokens / length)
    # activations and gradients of 16 bits
    work.read(4 * tokens * shape.hidden)


def _predict(job: PlanJob, work: Work, dtype: str) -> None:
    """activations/importance.py: all predictions, a word drawn from each, and the gradient. dtype: of the products."""
    shape, tokens = job.shape, job.tokens
    _output_layer(work, shape, tokens, dtype)
    work.product(2 * tokens * shape.embedding, dtype)
    # probabilities, their sum, a word of each
    work.passes(tokens * shape.vocabulary, 2, 4)


def _collect(job: PlanJob, work: Work, layer: Layer, dtype: str = "float32") -> None:
    """A layer once over all tokens, with the sums of what it reads (`listening`). dtype: of the layer's products."""
    tokens, length = job.tokens, job.settings.calibration.sequence_length
    _load_layer(job, work, layer)
    _forward_layer(work, job.shape, layer, tokens, length, length, dtype)
    _sum(job, work, layer)


def _sum(job: PlanJob, work: Work, layer: Layer) -> None:
    """tasks/activations/gram.py, for all distinct inputs of a layer."""
    for group in layer.groups:
        _sum_input(job, work, group.width, group.active, group.copies)


def _sum_input(job: PlanJob, work: Work, width: int, active: float = 1.0, copies: int = 1) -> None:
    """`Sums` of `copies` inputs, `active` of which read a token."""
    length = job.settings.calibration.sequence_length
    sequences = job.tokens / length
    # of the symmetric product the blocks on and above the diagonal
    upper = width * (width + min(SUMMED, width)) / 2
    work.product(2 * job.tokens * active * upper)
    # every sequence goes over the whole sum; then magnitudes, their maximum and sum
    work.passes(upper, 0, copies * sequences)
    work.passes(length * active * width, 0, 4 * sequences)


def quantize(job: PlanJob, variant: VariantSettings) -> Need:
    """tasks/quantize.py: press layer by layer (quantizers/layerwise.py), join the parts, compare with the baseline."""
    work = Work(job.machine)
    if variant.is_baseline:
        return _started(job, work)
    if variant.backend != BUILTIN:
        return Need(None, None, variant_bytes(job, variant), note=f"not estimated for the backend {variant.backend}")
    length = job.settings.calibration.sequence_length
    for index, layer in enumerate(job.shape.layers):
        _load_layer(job, work, layer)
        work.read(sum(4 * group.copies * group.width**2 for group in layer.groups))
        for group in layer.groups:
            one = Work(work.machine)
            _press(one, group, variant, job.shape)
            work.seconds += group.copies * one.seconds
        if variant.propagate:
            # quantizers/propagation.py: once to listen, once through the pressed layer
            _collect(job, work, layer)
            _load_layer(job, work, layer)
            _forward_layer(work, job.shape, layer, job.tokens, length, length)
        if variant.scheme == MIXED:
            # quantizers/sensitivity.py: a stream for each linear layer so far
            streams = sum(
                group.copies * len(group.rows) for one in job.shape.layers[: index + 1] for group in one.groups
            )
            _forward_layer(work, job.shape, layer, streams * STREAM, STREAM, STREAM / 2)
            work.write(4 * streams * STREAM * job.shape.hidden)
    disk = variant_bytes(job, variant)
    outside = BYTES[job.settings.model.dtype] * job.shape.outside
    work.read(outside)
    # as parts, then joined; the manifest, DVC's own checksum
    work.write(2 * disk)
    work.read(disk)
    work.hash(2 * disk)
    held = max(_pressing_bytes(layer, variant) for layer in job.shape.layers)
    if job.machine.device == "cpu" and not variant.propagate:
        # quantizers/parallel.py: several side by side
        layers = len(job.shape.layers)
        weights = sum(layer.weights for layer in job.shape.layers) // layers
        count = processes(job.machine.cores, layers, weights, job.machine.memory_gb * 1e9)
        if count > 1:  # beside the one that waits for them
            held = count * (held + job.machine.base_gb * 1e9)
    held = max(held, 2.0 * BYTES[job.settings.model.dtype] * job.shape.embedding)
    held = max(held, compare(job, work, variant))
    if variant.scheme == MIXED:
        held = max(held, _diverge(job, work))
    return _started(job, work, memory=held, disk=disk, scratch=disk)


def _diverge(job: PlanJob, work: Work) -> float:
    """quantizers/sensitivity.py: what all streams foretell, against the baseline's; returns the bytes that it holds."""
    shape, streams = job.shape, sum(map(_linears, job.shape.layers))
    _output_layer(work, shape, STREAM * streams, "float32")
    for _ in range(streams):
        work.passes(STREAM * shape.vocabulary, 1, 3)
    # those of the layer before and their own; of the baseline and of one stream logits and their logarithms
    words = 4 * STREAM * shape.vocabulary + shape.embedding
    return 4.0 * (2 * streams * STREAM * shape.hidden + words)


def export(job: PlanJob, variant: VariantSettings) -> Need:
    """tasks/export.py: links and checksums of what is there. A target that writes files of its own adds them here."""
    if job.settings.target != "transformers":
        return Need(None, None, note=f"not estimated for the target {job.settings.target}")
    work = Work(job.machine)
    work.hash(2 * variant_bytes(job, variant))
    return _started(job, work)


def evaluate(job: PlanJob, variant: VariantSettings) -> Need:
    """tasks/evaluate.py: items of all tasks, then the texts, beside the baseline from which divergence is taken."""
    settings, shape = job.settings.evaluation, job.shape
    dtype = settings.dtype
    own = _arithmetic(variant, dtype, job.machine)
    base = variant.is_baseline
    work = Work(job.machine)
    _load_model(job, work, variant)
    assumed = [task for task in settings.tasks if task not in ITEMS]
    for task in settings.tasks:
        reads, scored, items = ITEMS.get(task, ASSUMED)
        count = items if settings.limit is None else min(items, settings.limit)
        # an example is as long as a question
        reads *= 1 + (settings.shots or 0)
        _forward(work, shape, count * reads, settings.batch_tokens, reads, own)
        _output_layer(work, shape, count * scored, dtype)
        # a product of few rows, one for each item, first copies the weights into the order that it wants
        work.passes(count * shape.embedding, 0.5, 0)
    texts = len(settings.texts) * math.ceil(settings.text_tokens / settings.window) * settings.window
    for arithmetic in (own,) if base else (own, dtype):
        _forward(work, shape, texts, settings.window, settings.window, arithmetic)
        _output_layer(work, shape, texts, dtype)
    if not base:
        _load_model(job, work, AS_IT_CAME)
        # the divergence, a few rows at a time: _divergence in scoring/divergence.py, and two searches for the largest
        rows = 32
        for _ in range(texts // rows):
            work.passes(rows * shape.vocabulary, 5, 4)
    logits = 4.0 * settings.window * shape.vocabulary
    weights = BYTES[dtype] * shape.parameters
    models = max(_loading_bytes(job, variant, dtype), weights * (1 if base else 2))
    if not base:
        models = max(models, weights + _loading_bytes(job, AS_IT_CAME, dtype))
    held = models + (2 if base else 3) * logits
    note = f"{', '.join(assumed)}: {ASSUMED[0]} tokens an item assumed" if assumed else None
    return _started(job, work, memory=held, note=note)


def benchmark(job: PlanJob, variant: VariantSettings) -> Need:
    """tasks/benchmark.py: load; where the runtime has a kernel for the format, prompts and answers of a few tokens, by
    turns with the baseline's."""
    settings, none = job.settings.benchmark, AS_IT_CAME
    work = Work(job.machine)
    _load_model(job, work, variant)
    memory = _loading_bytes(job, variant, settings.dtype)
    arithmetic = _arithmetic(variant, settings.dtype, job.machine)
    base = variant.is_baseline
    if base or arithmetic == "int8":
        _answers(job, work, arithmetic)
    if not base and arithmetic == "int8":
        _load_model(job, work, none)
        _answers(job, work, settings.dtype)
        memory += _loading_bytes(job, none, settings.dtype)
    return _started(job, work, memory=memory)


def _answers(job: PlanJob, work: Work, arithmetic: str) -> None:
    """The prompts and answers of a benchmark, and those before it that do not count."""
    settings, shape = job.settings.benchmark, job.shape
    prompt = settings.batch_size * settings.prompt_tokens
    for _ in range(2 * settings.repeats + 1):
        _forward(work, shape, prompt, prompt, settings.prompt_tokens, arithmetic)
    width = 1 if arithmetic == "int8" else BYTES[settings.dtype]
    steps = (settings.repeats + 1) * (settings.new_tokens - 1)
    streamed = width * sum(layer.active for layer in shape.layers) + BYTES[settings.dtype] * shape.embedding
    calls = STEP * len(shape.layers) * job.machine.layer_us / 1e6
    work.seconds += steps * (streamed / job.machine.stream_gbs / 1e9 + calls)


def package(job: PlanJob) -> Need:
    """tasks/package.py: link the winner, which is not known yet: the largest counts; checksums, and try it."""
    work = Work(job.machine)
    pressed = [v for v in job.settings.variants.values() if not v.is_baseline]
    largest = max(pressed, key=lambda variant: variant_bytes(job, variant))
    work.hash(3 * variant_bytes(job, largest))
    work.seconds += job.machine.start_s  # the process that tries it
    _load_model(job, work, largest)
    return _started(job, work, memory=max(_loading_bytes(job, one, job.settings.evaluation.dtype) for one in pressed))


# -- bytes -----------------------------------------------------------------------------------------------------------


def statistics_bytes(shape: Shape) -> int:
    """data/statistics: of each distinct input a Gram matrix, the largest and the mean magnitudes, in float32."""
    widths = [shape.hidden, *(g.width for layer in shape.layers for g in layer.groups for _ in range(g.copies))]
    return sum(4 * (width**2 + 2 * width) for width in widths)


def variant_bytes(job: PlanJob, variant: VariantSettings) -> float:
    """The variant's weights on disk: pressed layers with their scales and zero points (tasks/formats/), all else in the
    model's precision, or the format's."""
    shape, own = job.shape, BYTES[job.settings.model.dtype]
    if variant.is_baseline:
        return job.model_bytes
    skipped = variant.skip_layers
    total = own * shape.outside
    for index, layer in enumerate(shape.layers):
        total += own * layer.others
        for group in layer.groups:
            for rows in group.rows:
                pressed = (
                    own * rows * group.width if index in skipped else linear_bytes(rows, group.width, variant, own)
                )
                total += group.copies * pressed
    return float(total)


def linear_bytes(rows: int, width: int, variant: VariantSettings, scale: int) -> int:
    """A pressed linear layer [rows, width]; scale: the bytes of one, where the format leaves it to the model."""
    if variant.is_baseline:
        return rows * width * scale
    if variant.scheme == MIXED:
        # what each layer gets is not known yet; all of them together get this, and where only the quality is given,
        # more than the fewest
        return round(rows * width * (variant.bits_per_weight or (variant.bits or 16) + 0.5) / 8)
    scheme = variant.precision
    if not scheme.weight_only:
        return rows * width + 4 * rows
    groups = _groups(width, scheme.group_size or width)
    if variant.format != "compressed-tensors":
        indices = 4 * width if variant.format == "gptq" else 0
        return (width + groups) * (rows * scheme.bits // 32) * 4 + groups * rows * 2 + indices
    words = rows * math.ceil(width * scheme.bits / 32) * 4
    zeros = 0 if scheme.symmetric else math.ceil(rows * scheme.bits / 32) * 4 * groups
    return words + zeros + rows * groups * (2 if variant.scale_dtype == "float16" else scale) + 16


def _groups(width: int, size: int) -> int:
    """How many groups a row has; a size that does not divide it is halved until it does (solvers/__init__.py)."""
    while width % size:
        size //= 2
    return width // size


def _embedding_bytes(job: PlanJob) -> int:
    return BYTES[job.settings.model.dtype] * job.shape.embedding


def _pressing_bytes(layer: Layer, variant: VariantSettings) -> float:
    """What pressing holds of a layer: its weights as stored, as float32 and as packed, the statistics, and what the
    solver makes of the largest group: for GPTQ rest, scales, zeros, integers and their copies."""
    weights = 7.0 * layer.parameters
    grams = sum(4.0 * group.copies * group.width**2 for group in layer.groups)
    nearest = variant.rounding == "nearest"
    factors = 0 if nearest else 4 * 3 * max(group.width for group in layer.groups) ** 2
    copies = 2 if nearest else 7
    solved = 4 * copies * max(group.weights for group in layer.groups)
    return weights + grams + factors + solved


def _loading_bytes(job: PlanJob, variant: VariantSettings, dtype: str) -> float:
    """The most that a runtime holds while it loads a model, and after: the weights as they will be computed with beside
    the file; those of AutoAWQ's and AutoGPTQ's formats twice (runtimes/dense.py)."""
    weights = BYTES[dtype] * job.shape.parameters
    stored = variant_bytes(job, variant)
    if variant.format != "compressed-tensors":
        return 2 * weights + stored
    return weights + stored


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _press(work: Work, group: Group, variant: VariantSettings, shape: Shape) -> None:
    """quantizers/solve.py, for the layers that read one input; of the scheme mixed, first a trial of each candidate."""
    sizes = [_group_size(one.group_size, group) for one in _schemes(variant)]
    fitting = [size for size in sizes if group.width % size == 0]
    if variant.scheme == MIXED:
        for one, size in zip(_schemes(variant), sizes, strict=True):
            if size in fitting:
                _round_layer(work, group, size, False, one.bits < FINE, 0)
                work.product(4 * group.weights * group.width)
    if variant.scaling == "awq":
        _scale_channels(work, group, shape)
    elif variant.scaling == "smoothquant":
        # stacked, the norms of columns, smoothed
        work.passes(group.weights, 4, 2)
        work.passes(group.width**2, 2, 0)
    size = min(fitting or sizes)
    _round_layer(work, group, size, variant.clip, variant.rounding == "gptq", variant.refine)


def _schemes(variant: VariantSettings) -> list[Scheme]:
    return [one for one in variant.precisions.values() if one] if variant.scheme == MIXED else [variant.precision]


def _group_size(size: int | None, group: Group) -> int:
    """A scale for each row is one for a group as wide as that."""
    return size or group.width


def _scale_channels(work: Work, group: Group, shape: Shape) -> None:
    """quantizers/solve.py."""
    # values that several queries read through have no channel of their own for each of them
    if group.name != "o_proj" or shape.kv == group.width:
        tried = group.weights / math.ceil(sum(group.rows) / ROWS)
        for _ in range(SCALE_TRIALS):
            # solvers/awq.py, search_scale: rounded, its change, what that does to the output
            work.product(2 * tried * group.width)
            work.passes(tried, 8, 8)
        work.passes(group.weights, 4, 2)
        work.passes(group.width**2, 2, 0)


def _round_layer(work: Work, group: Group, group_size: int, clip: bool, solve: bool, refine: int) -> None:
    """quantizers/solve.py: the limits of the groups, then the rounding, what makes it better, and packing."""
    weights, rows, width = group.weights, sum(group.rows), group.width
    part = min(weights, PART)
    parts = weights / part
    if clip:
        for _ in range(CLIP_TRIALS):
            # solvers/awq.py, search_clip: rounded, its change, blocks on the diagonal
            work.passes(part, 7 * parts, 8 * parts)
            work.product(2 * weights * group_size)
    work.passes(weights, 3, 6)  # stacked, on its grid, packed
    for _ in range(refine):
        # solvers/refine.py: the scales' equations, the errors before and after, slopes and their changes
        work.product(16 * weights * width)
        work.passes(weights, 16, 8)
        times = 2 * parts * width / group_size  # what each group's integers reach, times all others
        work.passes(part, times, times)
        work.calls(32 * width)
        work.passes(weights, 0, 8 + BLOCK)
    if not solve:
        return
    # solvers/gptq.py, _inverse_factor: a factor, the inverse from it, the inverse's factor
    work.seconds += 4 / 3 * width**3 / work.machine.factor_gflops / 1e9
    work.passes(width**2, 5, 0)
    work.passes(weights, 8, 2)  # into the order of the columns and back, with scales and zeros for every weight
    # a column: rounded, its error, and the columns of its block; then a block's errors reach the rest
    work.calls(24 * width)
    for _ in range(math.ceil(width / BLOCK)):
        work.passes(BLOCK * rows, 0, 8 + BLOCK / 2)
    work.product(weights * width)
    for block in range(width // BLOCK):
        work.passes((width - block * BLOCK) * rows, 0, 1)


def compare(job: PlanJob, work: Work, variant: VariantSettings) -> float:
    """model/layer_errors.py: a layer as it was and as it is, over two sequences; returns the bytes that it holds."""
    shape, length = job.shape, job.settings.calibration.sequence_length
    tokens = min(2, job.settings.calibration.samples) * length
    _load_model(job, work, variant)
    for layer in shape.layers:
        _load_layer(job, work, layer)
        for _ in range(2):
            _forward_layer(work, shape, layer, tokens, length, length)
    return 4.0 * (3 * shape.largest.parameters + 4 * tokens * shape.hidden)


def _linears(layer: Layer) -> int:
    return sum(group.copies * len(group.rows) for group in layer.groups)


def _load_layer(job: PlanJob, work: Work, layer: Layer) -> None:
    """From the file into float32."""
    work.read(BYTES[job.settings.model.dtype] * layer.parameters)
    work.passes(layer.parameters, 1, 0)


def _load_model(job: PlanJob, work: Work, variant: VariantSettings) -> None:
    """All of it into a runtime: read, converted; a pressed one is dequantized."""
    work.read(variant_bytes(job, variant))
    # tasks/formats/stored.py, and what compressed-tensors does in its place: 4-bit words are taken apart first
    passes = 1 if variant.is_baseline else 4 if _in_bytes(variant) else 8
    work.passes(job.shape.parameters, passes, 0)


def _forward(work: Work, shape: Shape, tokens: float, batch: float, context: float, arithmetic: str) -> None:
    """All decoder layers over `tokens` tokens, `batch` at a time, each seeing `context` others."""
    for layer in shape.layers:
        _forward_layer(work, shape, layer, tokens, batch, context, arithmetic)


def _forward_layer(
    work: Work,
    shape: Shape,
    layer: Layer,
    tokens: float,
    batch: float,
    context: float,
    arithmetic: str = "float32",
) -> None:
    work.product(2 * tokens * layer.active, arithmetic)
    # queries with keys, then with values; between the two the softmax
    work.product(4 * tokens * context * shape.attention)
    work.passes(tokens * context * shape.heads, 0, 4)
    _between_products(work, shape, layer, tokens, batch)
    if arithmetic == "int8":
        batches = math.ceil(tokens / batch)
        # what a layer reads becomes integers, what it writes becomes numbers again (runtimes/w8a8.py)
        read = sum(g.active * g.width for g in layer.groups)
        written = sum(g.active * sum(g.rows) for g in layer.groups)
        work.passes(tokens / batches * read, 2 * batches, 4 * batches)
        work.passes(tokens / batches * written, 1 * batches, 3 * batches)


def _between_products(work: Work, shape: Shape, layer: Layer, tokens: float, batch: float) -> None:
    """Norms, rotary positions, residuals; the gate; what a layer's operations take however few the tokens."""
    inner = sum(g.active * g.width for g in layer.groups if "down_proj" in g.name)
    batches = math.ceil(tokens / batch)
    work.passes(tokens / batches * (2 * shape.hidden + shape.attention), 5 * batches, 0)
    work.passes(tokens / batches * inner, 2 * batches, 0)
    work.seconds += batches * work.machine.layer_us / 1e6


def _output_layer(work: Work, shape: Shape, tokens: float, dtype: str) -> None:
    """Log-probabilities of every word for so many tokens."""
    work.product(2 * tokens * shape.embedding, dtype)
    work.passes(tokens * shape.vocabulary, 1, 4)


def _in_bytes(variant: VariantSettings) -> bool:
    """Whether weights and activations are both integers."""
    return variant.scheme in SCHEMES and not variant.precision.weight_only


def _arithmetic(variant: VariantSettings, dtype: str, machine: Machine) -> str:
    """What a variant's products are of: integers for INT8 on a CPU, elsewhere dequantized weights."""
    return "int8" if _in_bytes(variant) and machine.device == "cpu" else dtype


def _started(
    job: PlanJob,
    work: Work,
    *,
    memory: float = 0.0,
    disk: float = 0.0,
    scratch: float = 0.0,
    note: str | None = None,
) -> Need:
    """With what any process takes."""
    return Need(work.seconds + job.machine.start_s, memory + job.machine.base_gb * 1e9, disk, scratch, note)
