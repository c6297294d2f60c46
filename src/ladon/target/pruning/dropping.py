"""The later layers of one forward run on some of its tokens only.

Hooks that exist only during the call (reference: the model's own code stays as it is): before the first of these layers
the tokens are chosen and the hidden states cut to them; before each of them everything else that has one entry per
token is cut too, because the model hands the whole to every layer. What the model does after its last layer may rely
on the number of tokens it was given, so the survivors are padded back to it; the output projection sees them alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional

from ladon.target.hooks import one_state


class Slots(Protocol):
    """The part of a cache's route that must know."""

    def keep_only(self, tokens: Tensor) -> None:
        """Only these tokens of the forward are written from now on."""


class Dropping:
    """Drops tokens in one forward.

    Attributes:
        kept: the tokens that went on, [B, M] int64, M < N; None before the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        projection: nn.Module,
        choose: Callable[[Tensor], Tensor],
        route: Slots,
    ) -> None:
        """Prepare a forward.

        Args:
            model: whose forward it is.
            layers: the layers that run on the kept tokens only, the model's last ones.
            projection: its output projection.
            choose: from the hidden states before these layers [B, N, H] to the tokens that go on, [B, M] in ascending
                order.
            route: of the cache, whose layers then write the kept tokens into the slots that they have.
        """
        self.kept: Tensor | None = None
        self._model, self._layers, self._projection = model, layers, projection
        self._choose, self._route = choose, route
        self._num_tokens = 0
        self._cut: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: layers share masks and rotary embeddings
        self._owner = threading.get_ident()

    @contextmanager
    def on(self) -> Iterator[None]:
        """While this lasts, forwards of the model in this thread drop tokens; enter it after other layer hooks."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(self._layers[-1].register_forward_hook(self._after_last).remove)
            stack.callback(self._projection.register_forward_pre_hook(self._before_projection).remove)
            try:
                yield
            finally:
                self._cut.clear()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._owner:
            return None
        if self.kept is None:
            hidden = one_state(self._model, args[0] if args else kwargs["hidden_states"])
            self._num_tokens = hidden.shape[1]
            self.kept = self._choose(hidden)
            self._route.keep_only(self.kept)
        return tuple(map(self._of_kept, args)), {name: self._of_kept(value) for name, value in kwargs.items()}

    def _of_kept(self, value: Any) -> Any:
        """A layer's argument for the kept tokens: by shape, since every family has names of its own."""
        if isinstance(value, Tensor):
            return self._rows_of(value)
        if type(value) in (tuple, list):
            return type(value)(map(self._of_kept, value))
        if type(value) is dict:
            return {name: self._of_kept(part) for name, part in value.items()}
        return value

    def _rows_of(self, tensor: Tensor) -> Tensor:
        """Of four dimensions [B|1, heads|1, N, slots], of fewer [B|1, N, ...]; other tensors stay as they are."""
        assert self.kept is not None
        batch_size, num_kept = self.kept.shape
        if tensor.ndim == 1 and len(tensor) == self._num_tokens and not tensor.is_floating_point():
            # Slots that count from the start: transformers 5.0 passes them, and no one reads them.
            return tensor[:num_kept]
        dim = 2 if tensor.ndim == 4 else 1
        if tensor.ndim < 2 or tensor.shape[dim] != self._num_tokens or tensor.shape[0] not in (1, batch_size):
            return tensor
        if id(tensor) not in self._cut:
            index = self.kept.to(tensor.device)
            index = index.view(batch_size, *[1] * (dim - 1), num_kept, *[1] * (tensor.ndim - dim - 1))
            whole = tensor.expand(batch_size, *tensor.shape[1:])
            shape = [*whole.shape[:dim], num_kept, *whole.shape[dim + 1 :]]
            self._cut[id(tensor)] = tensor, whole.gather(dim, index.expand(shape))
        return self._cut[id(tensor)][1]

    def _after_last(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != self._owner or self.kept is None:
            return None
        hidden, *others = output if isinstance(output, tuple) else (output,)
        whole = functional.pad(hidden, (0, 0, 0, self._num_tokens - self.kept.shape[1]))
        return (whole, *others) if isinstance(output, tuple) else whole

    def _before_projection(self, _: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if threading.get_ident() != self._owner or self.kept is None:
            return None
        return inputs[0][:, : self.kept.shape[1]], *inputs[1:]
