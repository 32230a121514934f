"""The memory that a run will take, from its recipe and the model's shapes, before weights are read.

A run is four stages: the checkpoint is loaded and packed, the model is trained, loaded again, and
decodes; then the answers are scored. Freed memory goes back to the system in between
(`jlora.engine.release`), so a run's peak is that of its largest stage. What is stored is counted
exactly: weights as the engine packs them, adapter, the optimiser's means, what a fused block keeps
for its backward pass. What is allocated on the way is counted by the largest arrays, times a factor
that was measured: each is a constant here, with what it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora import engine, layers
from jlora.adapters.model import add_adapter
from jlora.adapters.partial import add_biases, trained_names
from jlora.data.batches import epoch_batches
from jlora.decoding.native_decoder import PROMPT_TOKENS, SLAB
from jlora.formats.names import is_lora_name
from jlora.kernels import packed_linear
from jlora.models.hub import Outline
from jlora.runs.recipe import Recipe
from jlora.system.runtime import nn

MIB = 1 << 20
FLOAT = 4  # bytes
#: Python, Jittor, the operators, a tokenizer; the plots that a run draws.
PROCESS = 110 * MIB
#: A token of the training data: a Python integer, its place in a list, its share of the text.
BYTES_A_TOKEN = 80
#: What Jittor's allocator holds for what is in use; larger arrays do not fit the gaps of smaller.
ALLOCATOR = 1.25
#: Arrays as large as all that is trained, besides the two means: the gradients (and, of adapters,
#: small ones besides).
UPDATE_COPIES = 1
#: Arrays (targets, vocabulary) of a head that is not fused: forward and backward; forward alone.
LOGITS = 5
VALID_LOGITS = 3
#: METEOR's Java with its tables of paraphrases, beside jlora's own process.
JAVA = 640 * MIB


@dataclass(frozen=True)
class Texts:
    """What a run's data are to its memory: numbers of tokens.

    Attributes:
        inputs: input tokens of each training example.
        targets: targets of each.
        valid_targets: targets of the validation batch that has most.
        prompts: tokens of each test input; none where nothing is answered.
        stored: tokens held in memory, validation data included.
    """

    inputs: Sequence[int]
    targets: Sequence[int]
    valid_targets: int
    prompts: Sequence[int]
    stored: int


@dataclass(frozen=True)
class LargestBatch:
    """Most tokens of a batch, padding included; most of one example; most targets of a batch."""

    tokens: int
    longest: int
    targets: int


@dataclass(frozen=True)
class Estimate:
    """Bytes by stage and part.

    Attributes:
        stages: stage -> part -> bytes held at its height.
        precision: what ``auto`` comes to here.
        batch: the largest of training.
    """

    stages: dict[str, dict[str, int]]
    precision: str
    batch: LargestBatch

    def total(self, stage: str, java: bool = True) -> int:
        """Bytes of a stage; without ``java``, those of jlora's own process."""
        return sum(size for part, size in self.stages[stage].items() if java or part != "Java")

    @property
    def peak_stage(self) -> str:
        return max(self.stages, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes, programs that jlora starts included."""
        return self.total(self.peak_stage)

    @property
    def process_peak(self) -> int:
        """Bytes of jlora's own process, which environment.json records as peak_memory_bytes."""
        return max(self.total(stage, java=False) for stage in self.stages)


def estimate(recipe: Recipe, outline: Outline, texts: Texts, java: bool = False) -> Estimate:
    """The memory of a run.

    Args:
        outline: of the recipe's model; its ``model`` gets the adapter and is of no use afterwards.
        java: whether the scores need Java.

    Raises:
        UserError: the adapter does not fit the model.
    """
    model = outline.model
    precision = recipe.precision
    if precision == "auto":
        precision = engine.choose_precision()[0]
    trained = trainable(recipe, model)
    weights = weight_bytes(model, precision, trained)
    numbers = sum(size(p) for name, p in model.named_parameters() if name in trained)
    own = numbers * FLOAT  # of what is trained: beside the weights, or among them
    adapter = own if recipe.method == "lora" else 0
    batch = largest_batch(recipe, texts, padded=precision == "plain")
    kept = {"process": PROCESS, "data": texts.stored * BYTES_A_TOKEN}
    checkpoint = {"checkpoint": loading_bytes(outline.model, precision, weights)}
    held = {**kept, "weights": weights, "adapter": adapter}
    packs = precision in packed_linear.KINDS and follows()
    stages = {
        "load": {"process": PROCESS, **checkpoint},
        "train": {
            **held,
            "packed copies": trained_copies(model, trained) if packs else 0,
            "optimiser": (2 + UPDATE_COPIES) * own,
            "activations": activation_bytes(recipe, model, precision, trained, batch),
            **loss_bytes(model, precision, trained, batch.targets, texts.valid_targets),
        },
    }
    if texts.prompts:
        # The tuned weights are read beside it, and are the weights themselves if all are trained.
        stages["load again"] = {**kept, **checkpoint, "adapter": own}
        stages["decode"] = {**held, **decode_bytes(recipe, model, precision, texts)}
    if java and texts.prompts:
        stages["score"] = {**stages["decode"], "Java": JAVA}
    return Estimate(stages, precision, batch)


def size(parameter) -> int:
    """Numbers of a parameter."""
    return int(np.prod(parameter.shape))


def trainable(recipe: Recipe, model) -> set[str]:
    """Names of what the recipe trains; the model, of `outline`, gets what is new in it."""
    if recipe.method == "lora":
        return add_adapter(model, recipe.lora)[1]
    if recipe.method == "bitfit":
        add_biases(model)
    return trained_names(model, recipe.method, recipe.top_layers)


def loading_bytes(model, precision: str, weights: int) -> int:
    """A checkpoint at the height of its way from the file to ``weights`` bytes of packed ones.

    One after the other is read in float32, the head first where they are packed (`engine.prepare`).
    """
    named = {name: p for name, p in model.named_parameters() if not is_lora_name(name)}
    head, packs = model.output_embedding, precision in packed_linear.KINDS
    others = [FLOAT * size(p) for p in named.values() if not (packs and p is head)]
    first = packed_linear.packed_bytes(*head.shape, "bf16") + FLOAT * size(head) if packs else 0
    return max(first, weights + max(others))


def weight_bytes(model, precision: str, trained: set[str]) -> int:
    """The base's weights after `engine.prepare` with ``keep_weights=False``.

    Trained weights among them stay float32; LoRA's own numbers are not counted.
    """
    named = {id(p): name for name, p in model.named_parameters()}
    sizes = {i: FLOAT * size(p) for i, p in ((id(p), p) for p in model.parameters()) if i in named}
    frozen = {i for i, name in named.items() if name not in trained}
    total = sum(bytes_ for i, bytes_ in sizes.items() if not is_lora_name(named[i]))
    if precision not in packed_linear.KINDS:
        return total
    head = model.output_embedding
    done = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not is_linear(module) or id(weight) not in frozen or weight is head:
            continue
        n, k = (
            (module.out_features, module.in_features)
            if hasattr(module, "out_features")
            else (module.nf, module.nx)
        )
        if id(weight) not in done:
            done.add(id(weight))
            total += packed_linear.packed_bytes(n, k, precision)
            if not isinstance(module, layers.LoRALayer) or module.variant.is_plain:
                total -= sizes[id(weight)]
    if id(head) in frozen:
        n, k = head.shape
        total += packed_linear.packed_bytes(n, k, "bf16")
        tied = any(isinstance(m, nn.Embedding) and m.weight is head for m in model.modules())
        if not tied or packed_linear.tiles() is not None:  # oneDNN's copy has no rows to read
            total -= sizes[id(head)]
    return total


def is_linear(module) -> bool:
    """Whether the engine packs the weight of such a module."""
    return isinstance(module, (nn.Linear, layers.Conv1D, layers.Linear, layers.MergedLinear))


def largest_batch(recipe: Recipe, texts: Texts, padded: bool) -> LargestBatch:
    """The largest batch of the first epoch, or of the steps of a shorter run."""
    train = recipe.train
    lengths, targets = np.asarray(texts.inputs), np.asarray(texts.targets)
    batches = epoch_batches(
        lengths, train.batch_size, train.seed, 0, train.group_by_length, train.shuffle
    )
    if train.steps is not None:
        batches = batches[: train.steps * train.grad_accumulation]
    longest = [int(lengths[rows].max()) for rows in batches]
    tokens = [
        most * len(rows) if padded else int(lengths[rows].sum())
        for most, rows in zip(longest, batches)
    ]
    return LargestBatch(
        max(tokens), max(longest), max(int(targets[rows].sum()) for rows in batches)
    )


@dataclass(frozen=True)
class BlockShape:
    """Widths of a transformer block: residual stream, queries, keys, inside the MLP."""

    width: int
    heads: int
    head_dim: int
    key_width: int
    inner: int
    gated: bool
    layers: int
    rotary: int  # numbers of a head that are turned
    norms_after: int  # norms after attention and MLP
    normed: bool  # whether queries and keys have norms

    @classmethod
    def of(cls, model) -> BlockShape:
        config, family = model.config, getattr(model, "family", None)
        parts = None if family is None else family.parts
        keys = config.kv_heads * config.head_dim
        norms = (None,) * 4 if parts is None else parts.norms
        return cls(
            config.hidden_size, config.heads, config.head_dim, keys, config.inner, config.gated,
            config.layers, getattr(config, "rotary_size", 0),
            sum(name is not None for name in (norms[1], norms[3])),
            parts is not None and parts.qk_norms[0] is not None,
        )  # fmt: skip

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def is_fused(self) -> bool:
        """Whether `jlora.kernels.block` takes it."""
        return not any(n % 32 for n in (self.head_dim, self.rotary, self.width, self.inner))

    def saved_bytes(self, rows: int, ranks: int) -> int:
        """What a fused block keeps for its backward pass; `Saved` of block.h, but for rounding up.

        Args:
            ranks: of all low-rank branches together.
        """
        floats = self.width * (1 + self.norms_after) + self.heads + ranks
        gate = self.inner if self.gated else 0
        bf16 = 2 * self.query_width + 2 * self.key_width + self.inner + gate
        bf16 += (self.query_width + self.key_width) * self.normed  # before their norms
        return rows * (4 * floats + 2 * bf16)

    def backward_bytes(self, rows: int) -> int:
        """What a fused block needs while its backward pass runs; one block does at a time."""
        floats = 4 * self.width
        wide = self.inner * (2 if self.gated else 1)
        bf16 = 2 * self.width + 2 * self.query_width + 2 * self.key_width + wide + 2 * self.inner
        return rows * (4 * floats + 2 * bf16)

    def plain_floats(self, plain: bool) -> int:
        """Numbers a token that a block of single layers keeps, by the results of its operators."""
        attention = 3 * self.query_width + 4 * self.key_width + self.heads
        mlp = self.inner * (3 if self.gated else 2)
        if plain:  # norms, rotary embedding and activation are several operators each
            attention += 4 * (self.query_width + self.key_width)
            mlp += 4 * self.inner
        return (12 if plain else 6) * self.width + attention + mlp


def activation_bytes(
    recipe: Recipe, model, precision: str, trained: set[str], batch: LargestBatch
) -> int:
    """What is kept of the blocks between the two passes of a step, and scratch of the second."""
    shape, rows = BlockShape.of(model), batch.tokens
    through = rows * shape.width * FLOAT  # the residual stream at one place
    copied = trained_copies(model, trained)
    plain = recipe.method != "lora" or recipe.lora.lora_variant.is_plain
    fused = plain and shape.is_fused and (copied == 0 or follows())
    if precision in packed_linear.KINDS and fused:
        ranks = sum(size(p) // p.shape[1] for n, p in model.named_parameters() if "lora_A" in n)
        saved = shape.saved_bytes(rows, round(ranks / shape.layers))
        differentiated = shape.layers - blocks_below(model, trained)
        blocks = min(1, differentiated) if recipe.checkpoint_activations else differentiated
        kept = blocks * saved + differentiated * through
        return int(ALLOCATOR * kept) + shape.backward_bytes(rows) + 4 * through
    numbers = rows * shape.plain_floats(precision == "plain")
    if precision == "plain":  # scores, their softmax and its gradient, head by head
        numbers += 4 * shape.heads * rows * batch.longest
    if recipe.lora.lora_dropout:  # of each branch: what it keeps of its input, and its sum
        low = [n for n in trained if "lora_A" in n]
        numbers += rows * shape.width * 3 * len(low) // shape.layers
    return int(ALLOCATOR * numbers * FLOAT * shape.layers) + 8 * through


def follows() -> bool:
    """Whether weights that are trained have packed copies that follow them."""
    return packed_linear.tiles() is not None


def blocks_below(model, trained: set[str]) -> int:
    """Blocks under the lowest place that is trained: they have no backward pass, and keep nothing.

    The embedding lies below all of them.
    """
    numbers = []
    for name in trained:
        found = re.search(r"\.(?:h|layers)\.(\d+)\.", "." + name)
        if found:
            numbers.append(int(found[1]))
        elif "emb" in name or "wte" in name or "wpe" in name:
            return 0
    return min(numbers, default=BlockShape.of(model).layers)


def trained_copies(model, trained: set[str]) -> int:
    """Bytes of the bf16 copies that products read of linear weights that are trained."""
    named = {id(p): name for name, p in model.named_parameters()}
    weights = {
        id(module.weight): size(module.weight)
        for module in model.modules()
        if is_linear(module) and named.get(id(module.weight)) in trained
    }
    if named[id(model.output_embedding)] in trained:
        weights[id(model.output_embedding)] = size(model.output_embedding)
    return 2 * sum(weights.values())


def loss_bytes(
    model, precision: str, trained: set[str], targets: int, valid_targets: int
) -> dict[str, int]:
    """The head and the loss of a batch's targets, and of a validation's."""
    words, width = model.output_embedding.shape
    named = {id(p): name for name, p in model.named_parameters()}
    frozen = named[id(model.output_embedding)] not in trained
    states = 4 * targets * width * FLOAT
    if precision in packed_linear.KINDS and frozen and model.head_layer is None:
        return {"loss": states + loss_scratch(targets, words, model.head.cap)}
    row = words * FLOAT
    # A validation comes after the batches' memory was given back, so the larger counts.
    return {"loss": max(states + LOGITS * targets * row, VALID_LOGITS * valid_targets * row)}


def loss_scratch(targets: int, words: int, cap: float | None) -> int:
    """What target_loss.h has in memory of some rows at a time.

    Gradients of logits in bf16, and all exponentials in float32 unless the logits are capped.
    """
    if cap:
        return 2 * min(targets, 512) * min(words, 4096)
    times = -(-targets // max(64, (32 * MIB) // (FLOAT * words)))
    rows = -(-targets // max(1, times) // 32) * 32
    return rows * (FLOAT * words + 2 * min(words, 4096))


def decode_bytes(recipe: Recipe, model, precision: str, texts: Texts) -> dict[str, int]:
    """Keys and values of prompts and of what is generated, and a step's scratch."""
    shape, decode = BlockShape.of(model), recipe.decode
    together = min(decode.batch_size, len(texts.prompts))
    beams, steps = decode.num_beams, decode.max_new_tokens
    token = shape.layers * 2 * shape.key_width * (2 if precision in packed_linear.KINDS else FLOAT)
    longest = sum(sorted(texts.prompts, reverse=True)[:together])
    # Beams of a prompt have most of their past in common: of its tree one trunk, and near the
    # leaves some 6.5 tokens a beam (measured; 5.7 for lines that join by chance).
    places = together * min(beams * steps, steps + round(6.5 * (beams - 1)))
    places = -(-places // SLAB) * SLAB
    rows = max(together * beams, min(PROMPT_TOKENS, longest))
    numbers = 2 * shape.width + 3 * shape.query_width + 2 * shape.key_width + 3 * shape.inner
    scratch = rows * numbers * FLOAT
    words = model.output_embedding.shape[0]
    if precision not in packed_linear.KINDS or model.head_layer is not None:
        scratch += 2 * together * beams * words * FLOAT
    return {"keys and values": (longest + places) * token, "decoding": scratch}
