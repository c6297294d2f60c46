"""What every family of heads has: sizes, a model it is bound to, and a way to disk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ladon.errors import HeadsError
from ladon.heads.calibration import Calibration
from ladon.heads.checkpoint import FORMAT, WEIGHTS_FILE, write_pair
from ladon.heads.copies import Placement, shared_copy
from ladon.heads.correction import MARKOV_GATE, HiddenCorrection, MarkovCorrection
from ladon.heads.fingerprint import Fingerprint, check_same_base, fingerprint
from ladon.heads.formats.files import CONFIG_FILE
from ladon.heads.model_parts import OutputProjection, input_embedding_module, output_projection
from ladon.util.devices import device_of, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self


class Heads(nn.Module, ABC):
    """K extra decoding heads on a frozen target.

    Head k (counted from 1) reads the target's hidden state of token t, after the final norm, and guesses token
    t + k + 1; the target's own output projection says token t + 1 (MEDUSA, arXiv 2401.10774). Heads are meant to run
    on one hidden row per sequence, in the target's dtype and on its device: `bind` puts them there.

    Attributes:
        family: name of the family, as `new_heads` takes it.
        option_names: the settings that the family's constructor takes beside the sizes.
        num_heads: K.
        hidden_size: H, width of the target's hidden state.
        vocab_size: V, number of logits.
        base_name: where the target came from, if known.
        base_fingerprint: samples of the target's weights, to recognise it again; None if never bound.
        training_record: how the heads were trained, as JSON values; saved with them.
        is_conditioned: whether head k looks at the tokens between the one it reads and the one it guesses.
        correction: what the token before each guess changes about it, if that was trained; None for nothing.
        calibration: what `ladon calibrate` found for these heads on their model; None if it never ran.
        folder: the folder they were loaded from, where an early exit may lie beside them; None for new ones.
    """

    family: ClassVar[str]
    option_names: ClassVar[tuple[str, ...]]
    is_conditioned: ClassVar[bool] = False

    def __init__(self, *, num_heads: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("hidden_size", hidden_size), ("vocab_size", vocab_size)):
            check_count(name, value)
        self.num_heads = num_heads
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.base_name = ""
        self.base_fingerprint: Fingerprint | None = None
        self.training_record: dict[str, Any] = {}
        self.calibration: Calibration | None = None
        self.folder: Path | None = None
        self.correction: MarkovCorrection | HiddenCorrection | None = None
        # In tuples, so that the target's modules are no submodules: not saved, not trained, not moved with the heads.
        self._projection: tuple[nn.Module, ...] = ()
        self._embedding: tuple[nn.Module, ...] = ()
        self._placement: Placement | None = None  # of a copy: where its parameters come from

    @abstractmethod
    def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
        """Logits of every head.

        Args:
            hidden: [..., H], the target's hidden states after its final norm.
            following: [..., K] int64, the K tokens after the one each hidden state came from. Conditioned heads need
                them: head k sees the first k. Others ignore them.

        Returns:
            [..., K, D]; [..., k - 1, :] belongs to head k, the token k + 1 places after the one hidden came from.
            D is V, or the length of `token_ids`.
        """

    def draft(self, hidden: Tensor, root: Tensor) -> Tensor:
        """Logits of every head when only the next token is known: what decoding uses.

        Args:
            hidden: [B, H], the hidden row of each sequence.
            root: [B] int64, the token that follows it. Independent heads ignore it.

        Returns:
            [B, K, D], as `forward` gives them; conditioned heads follow each head's own best token.
        """
        logits: Tensor = self(hidden)
        return logits

    @property
    def reads_following(self) -> bool:
        """Whether the tokens between change what is guessed, in the heads or in their correction."""
        return self.is_conditioned or self.correction is not None

    def corrected(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Logits as `forward` gives them, with what the token before each guess changes; what training uses."""
        if isinstance(self.correction, HiddenCorrection):
            return self.project(self.correction(self.states(hidden), self.embed(following)))
        logits: Tensor = self(hidden, following)
        if self.correction is None:
            return logits
        added: Tensor = self.correction(following, self.correction.gates(hidden))
        return logits + added

    def add_correction(self, rank: int, num_successors: int = 0, gate: int = 0) -> MarkovCorrection:
        """Give heads that have none a Markov correction of this rank, with a gate if 1, its numbers not yet set.

        Raises:
            HeadsError: they have a correction, read the tokens before their guesses themselves, or have a vocabulary of
                their own; or the rank is not 1 to V, there are more successors than tokens, or `gate` is not 0 or 1.
        """
        self._check_correctable(MarkovCorrection.title)
        if not isinstance(gate, int) or gate not in (0, 1):
            raise HeadsError(f"{MARKOV_GATE} is {gate!r}; give 1 for a gate, or 0 for none")
        sizes = {"num_heads": self.num_heads, "vocab_size": self.vocab_size, "gate_size": gate * self.hidden_size}
        like = next(self.parameters())
        with like.device:
            self.correction = MarkovCorrection(rank=rank, num_successors=num_successors, **sizes)
        return self.correction.to(like)

    def add_hidden_correction(self, width: int) -> HiddenCorrection:
        """Give heads that have none a hidden correction of this inner width, its numbers not yet set.

        Raises:
            HeadsError: as for `add_correction`, or they have output projections of their own; or the width is below 1.
        """
        own = (not self.shares_projection, "have output projections of their own")
        self._check_correctable(HiddenCorrection.title, own)
        like = next(self.parameters())
        with like.device:
            self.correction = HiddenCorrection(num_heads=self.num_heads, hidden_size=self.hidden_size, width=width)
        return self.correction.to(like)

    def _check_correctable(self, title: str, *more: tuple[bool, str]) -> None:
        for stands_against, reason in (
            (self.correction is not None, "have one"),
            (self.is_conditioned, "read the tokens before their guesses themselves"),
            (self.token_ids is not None, "have a vocabulary of their own"),
            *more,
        ):
            if stands_against:
                raise HeadsError(f"these {self.family} heads take no {title}: they {reason}. Leave it out")

    @property
    def shares_projection(self) -> bool:
        """Whether all heads end in the target's own output projection, so that they have `states`."""
        return False

    def states(self, hidden: Tensor) -> Tensor:
        """What each head gives to the target's output projection, [..., H] to [..., K, H], if all share it."""
        raise HeadsError(f"{self.family} heads have output projections of their own, and no states to project alike")

    @property
    def token_ids(self) -> Tensor | None:
        """The token of each entry of the logits, [D] int64, for heads with a vocabulary of their own; None: D = V."""
        return None

    @property
    def weights_hash(self) -> str:
        """A hash of the heads' parameters as bfloat16: what a calibration names the heads by."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            stored = tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
            digest.update(stored.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def options(self) -> dict[str, int | str]:
        """The family's own settings, and the size of the correction if there is one, as `new_heads` takes them."""
        return self.own_options if self.correction is None else self.own_options | self.correction.options

    @property
    def own_options(self) -> dict[str, int | str]:
        """The family's own settings, as its constructor takes them."""
        return {name: getattr(self, name) for name in self.option_names}

    @abstractmethod
    def initialise(self, model: PreTrainedModel, seed: int) -> None:
        """Start values for training on `model`: every head begins as the target's own output projection."""

    @property
    def config(self) -> dict[str, Any]:
        """Everything `save` writes beside the weights, as JSON values."""
        return {
            **{name: getattr(self, name) for name in ("family", "num_heads", "hidden_size", "vocab_size", "options")},
            "base": {"name": self.base_name, "fingerprint": self.base_fingerprint and asdict(self.base_fingerprint)},
            "training": self.training_record,
        }

    @property
    def is_bound(self) -> bool:
        """Whether a target was given to `bind`."""
        return bool(self._projection)

    def bind(self, model: PreTrainedModel, force: bool = False) -> Self:
        """Attach to the target: check that it is the right one, go to its dtype and device, use its projection.

        Binding again to the same model is cheap and follows a change of its dtype or device. What goes to a narrower
        dtype stays as narrow; `bound` leaves these heads as they are.

        Args:
            model: the target.
            force: accept a model other than the one the heads were trained for (its sizes must still fit). The
                decoded text stays exact, fewer guesses are right.

        Returns:
            These heads.

        Raises:
            HeadsError: the sizes do not fit, or the fingerprint is another model's and `force` is False.
        """
        projection = output_projection(model)
        self.check_sizes(model)
        if self._projection[:1] != (projection.module,) and not force:
            self.check_base(model)
        self._projection = (projection.module,)
        self._embedding = (input_embedding_module(model),)
        device = _device_for(model)
        # where an offloaded module seems to be, parameters would be lost
        return self.to(dtype=model.dtype) if device.type == "meta" else self.to(device, model.dtype)

    def bound(self, model: PreTrainedModel, force: bool = False, known: Self | None = None) -> Self:
        """A copy bound to `model`, for those who run heads that others hold too; these stay as they are.

        It shares all parameters that are in the model's dtype and on its device: they cost no memory, and what training
        changes in them counts here as well. Any others are copied, and live as long as the copy.

        Args:
            model: the target.
            force: as for `bind`.
            known: a copy made before, whose parameters serve again if they are still those of these heads.

        Raises:
            HeadsError: as `bind` does.
        """
        placement = Placement(_device_for(model), model.dtype, None if known is None else known._placement)
        made = self._copy(placement)
        made._placement, placement.former = placement, None
        return made.bind(model, force)

    def _copy(self, placement: Placement) -> Self:
        """These heads with their tensors so placed."""
        return shared_copy(self, placement)

    def remember_base(self, model: PreTrainedModel) -> None:
        """Record `model` as the one these heads belong to."""
        self.base_name = str(model.config._name_or_path)
        self.base_fingerprint = fingerprint(model)

    def save(self, path: str | Path) -> None:
        """Write `heads.safetensors` and `config.json` into the folder `path`, which is made if needed.

        The calibration goes with them as `calibration.json`, unless the weights have changed since it was made.
        """
        write_pair(Path(path), WEIGHTS_FILE, self.state_dict(), CONFIG_FILE, FORMAT, self.config)
        if self.calibration is not None and self.calibration.heads == self.weights_hash:
            self.calibration.save(path)

    def project(self, hidden: Tensor) -> Tensor:
        """The target's own output projection: [..., H] to [..., V]."""
        # Two dimensions: on a strided [T, K, H] torch would copy the projection's weight once per row.
        logits: Tensor = self._of_target(self._projection, "output projection")(hidden.reshape(-1, self.hidden_size))
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's own input embedding: [...] int64 to [..., H]."""
        embedded: Tensor = self._of_target(self._embedding, "input embedding")(tokens)
        if embedded.shape[-1] != self.hidden_size:
            raise HeadsError(
                f"{self.family} heads of hidden size {self.hidden_size} cannot read the tokens before their guesses: "
                f"this model's input embedding has width {embedded.shape[-1]}. Use heads that do not read them"
            )
        return embedded

    def _of_target(self, module: tuple[nn.Module, ...], name: str) -> nn.Module:
        """A module of the target's, which heads that were never bound lack."""
        if not module:
            raise HeadsError(
                f"{self.family} heads use the {name} of their model, and have none yet. Call heads.bind(model) or "
                "load_heads(path, model)"
            )
        return module[0]

    def start_projection(self, model: PreTrainedModel, how: str = "as copies of") -> OutputProjection:
        """The target's output projection, for heads whose start values are made from its numbers.

        Raises:
            HeadsError: they cannot be read, because they are packed.
        """
        target = output_projection(model)
        if target.weight.shape != (self.vocab_size, self.hidden_size):
            raise HeadsError(
                f"{self.family} heads start {how} the output projection, but this model's is packed to "
                f"{list(target.weight.shape)} {target.weight.dtype} (quantised). Use family='shared'"
            )
        return target

    def check_sizes(self, model: PreTrainedModel) -> None:
        """Raise `HeadsError` if hidden size or vocabulary of `model` are others than these heads'."""
        projection = output_projection(model)
        if (self.hidden_size, self.vocab_size) != (projection.hidden_size, projection.vocab_size):
            raise HeadsError(
                f"heads for hidden size {self.hidden_size} and vocabulary {self.vocab_size} do not fit a model with "
                f"hidden size {projection.hidden_size} and vocabulary {projection.vocab_size}. Load the heads of this "
                "model or train new ones"
            )

    def check_base(self, model: PreTrainedModel) -> None:
        """Raise `HeadsError` if `model` is another than these heads' own; warn where that cannot be told."""
        self.check_sizes(model)
        check_same_base(self.base_name, self.base_fingerprint, model)


def _device_for(model: PreTrainedModel) -> torch.device:
    """Where heads of a model go: to its output projection."""
    return device_of(output_projection(model).module) or input_device(model)


class ConditionedHeads(Heads):
    """Heads of which the k-th sees the k tokens before its guess: the root, and then k - 1 of the draft.

    `forward` gives the logits of all of them after the true tokens, as training needs it; `after` those of one of them
    after many partial paths at once, as a tree needs it.
    """

    is_conditioned = True

    @abstractmethod
    def after(self, hidden: Tensor, paths: Tensor) -> Tensor:
        """Logits of one head after partial paths.

        Args:
            hidden: [B, H], the hidden row of each sequence.
            paths: [B, R, k] int64, the k tokens before the guesses of head k (from 1), the root first.

        Returns:
            [B, R, D], with D as in `forward`.
        """

    def draft(self, hidden: Tensor, root: Tensor) -> Tensor:
        """Logits [B, K, D] of hidden rows [B, H] and roots [B]; each head reads the best tokens of those before it."""
        path, logits = root[:, None, None], []
        for _ in range(self.num_heads):
            logits.append(self.after(hidden, path))
            best = logits[-1].argmax(-1, keepdim=True)
            path = torch.cat([path, best if self.token_ids is None else self.token_ids[best]], dim=-1)
        return torch.cat(logits, dim=1)


def check_count(name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise HeadsError(f"{name} is {value!r}, expected an integer >= 1")


def seeded_normal(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal numbers [*shape] float32 on the CPU that depend on the seed alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * std
