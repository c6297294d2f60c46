"""How `ladon train` trains: the one home of its default values, whose docs are the command's help."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ladon.config import setting
from ladon.errors import InputError

REPORT_SHARES = (0.01, 0.1, 1.0)  # of the training, after which the held-out rows are looked at
LEARNING_RATES = {"adamw": 1e-3, "muon": 1e-2}
# What a resumed run may change: nothing of it reaches the weights.
_FREE = {"save_every", "eval_every", "log_every", "report_to", "resume", "speedup"}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How heads are trained. The field docs are the help of the command line."""

    num_heads: int = setting(4, "tokens guessed beyond the model's own next one")
    family: str = setting("shared", "head family: shared, medusa or lowrank, among others")
    family_options: tuple[tuple[str, int | str], ...] = setting((), "a setting of the family; may be repeated")
    init_heads: str | None = setting(None, "folder of heads to go on from, instead of new ones", "DIR")
    markov_rank: int = setting(
        0, "rank of a Markov correction that is trained too, 64 for small models, 256 for large ones; 0: none"
    )
    markov_successors: int = setting(
        0, "tokens that a new correction adds to the heads' own guesses after each token; 0: none"
    )
    markov_gate: bool = setting(False, "let the strength of a new correction depend on the hidden row, by a gate")
    markov_start: str = setting(
        "zero", "of a new correction: zero (it changes nothing at first) or bigrams (what pairs in the rows say)"
    )
    hidden_correction: int = setting(
        0, "inner width of a hidden correction that is trained too, about the model's hidden size; 0: none"
    )
    freeze_heads: bool = setting(False, "train the correction alone, on heads as --init-heads has them")
    labels: str = setting(
        "text",
        "what is learned: text (the tokens of the rows) or target (the model's own probabilities at their places)",
    )
    label_temperature: float = setting(
        1.0, "of the probabilities that --labels target learns; below 1 they near the model's greedy choice"
    )
    variation: float = setting(
        0.0, "share of total variation in what --labels target learns by, 0 to 1; the rest is divergence"
    )
    learn: str = setting(
        "answers", "where heads learn: answers, or all (in the prompts too, which suits --labels target)"
    )
    decay: float = setting(0.8, "head k's loss counts decay to the power of k")

    steps: int | None = setting(None, "updates; the length of the training if given, instead of --epochs")
    epochs: float = setting(1.0, "how often each row is seen")
    batch_size: int = setting(8, "packed rows per process and forward")
    accumulation: int = setting(1, "forwards per update")
    length: int = setting(1024, "tokens per packed row; longer documents are cut; at most what the model can read")
    packing: str = setting("auto", "documents share rows: on, off, or auto (if the model keeps them apart)")
    optimizer: str = setting("adamw", "adamw or muon")
    learning_rate: float | None = setting(
        None, "of the heads, at its peak; " + ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    )
    weight_decay: float = setting(0.0, "decoupled weight decay")
    schedule: str = setting("cosine", "of the learning rate after the warm-up: cosine, linear or constant")
    warmup: float = setting(0.05, "share of the updates over which the learning rate rises")
    clip: float = setting(1.0, "largest norm of the gradient; 0 does not clip")
    precision: str = setting("auto", "of the products: bf16, fp32, or auto (bf16 where the device has it)")
    chunk_rows: int = setting(
        0, "positions whose logits of all heads are in memory together; 0: as many as suit the device"
    )

    joint: str = setting("off", "train the model too (MEDUSA-2): off, full or lora")
    heads_warmup_steps: int = setting(0, "updates of the heads alone before the model joins")
    base_learning_rate: float | None = setting(None, "of the model; the heads' divided by --base-divisor if left out")
    base_divisor: float = setting(4.0, "how many times the heads' learning rate is the model's")
    base_loss: str = setting("text", "of the model: text (its cross-entropy) or distill (KL to the original model)")
    heads_weight: float = setting(0.2, "weight of the heads' loss beside the model's")
    heads_ramp: str = setting("none", "how that weight comes in: none or sine (a quarter sine over the training)")
    lora_rank: int = setting(32, "rank of the adapters")
    lora_alpha: float = setting(16.0, "scale of the adapters, times their rank")
    lora_dropout: float = setting(0.05, "dropout of the adapters")
    early_exit: int | None = setting(None, "also train an early-exit head after this layer, counted from 1", "LAYER")

    held_out: str = setting("0.02", "rows for the reports: a share of the rows, or a file")
    eval_every: int = setting(0, "updates between further reports; 0: none beside those at 1, 10 and 100 %")
    speedup: bool = setting(True, "time decode steps once, for the projected speed-up in the reports")
    save_every: int = setting(500, "updates between checkpoints")
    log_every: int = setting(20, "updates between lines about the loss")
    report_to: str = setting("none", "none, tensorboard or wandb")
    seed: int = setting(0, "decides start values and the order of the rows")
    resume: bool = setting(True, "go on from the checkpoint in OUT if there is one")

    def __post_init__(self) -> None:
        """Raise `InputError` for a value that no training can have."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; give {', '.join(allowed)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} is {value}; give {least} or more")
        for name in ("epochs", "decay", "label_temperature", "learning_rate", "base_learning_rate", "base_divisor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}; give a number above 0")
        if not self.markov_rank and (self.markov_successors or self.markov_gate or self.markov_start != "zero"):
            raise InputError(
                "markov_successors, markov_gate and markov_start are of a Markov correction; give markov_rank too"
            )
        if self.variation > 1 or (self.variation and self.labels != "target"):
            raise InputError(f"variation is {self.variation}; give 0 to 1, with labels target")
        if self.markov_rank and self.hidden_correction:
            raise InputError(
                "markov_rank and hidden_correction are both given; heads take one correction, leave one out"
            )
        if self.warmup >= 1:
            raise InputError(f"warmup is {self.warmup}; give a share of the updates, below 1")

    @property
    def heads_rate(self) -> float:
        """Peak learning rate of the heads."""
        return LEARNING_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def base_rate(self) -> float:
        """Peak learning rate of the model."""
        return self.heads_rate / self.base_divisor if self.base_learning_rate is None else self.base_learning_rate

    def binding(self) -> dict[str, Any]:
        """The settings that a resumed run must share, as JSON values."""
        values = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return values | {"family_options": dict(self.family_options)}


_CHOICES = {
    "labels": ("text", "target"),
    "learn": ("answers", "all"),
    "markov_start": ("zero", "bigrams"),
    "packing": ("auto", "on", "off"),
    "optimizer": tuple(LEARNING_RATES),
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "bf16", "fp32"),
    "joint": ("off", "full", "lora"),
    "base_loss": ("text", "distill"),
    "heads_ramp": ("none", "sine"),
    "report_to": ("none", "tensorboard", "wandb"),
}
_LEAST: dict[str, float] = {
    **dict.fromkeys(("num_heads", "steps", "batch_size", "accumulation", "save_every", "log_every", "lora_rank"), 1),
    **dict.fromkeys(("weight_decay", "warmup", "clip", "chunk_rows", "heads_warmup_steps", "heads_weight"), 0),
    **dict.fromkeys(("lora_dropout", "eval_every", "seed", "variation"), 0),
    "early_exit": 1,
    **dict.fromkeys(("markov_rank", "markov_successors", "hidden_correction"), 0),
    "length": 3,  # one token that is read, the next, and the one that head 1 guesses
}
