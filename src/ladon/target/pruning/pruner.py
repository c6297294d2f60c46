"""Early pruning (ProPD, arXiv 2402.13485): a tree's unlikely nodes are dropped in the middle of its verification.

After layer l an early exit judges every node given its parent (`ladon.target.pruning.node_scores`). The best M nodes of
each row go on, a set that holds each node's parent (`ladon.target.pruning.node_scores`); later layers and the output
projection run on these only (`ladon.target.pruning.dropping`). Survivors keep their slots in the cache, so an accepted
path is committed in the numbers of the whole tree, alike in all layers. The set is fixed before the target says
anything, so what is dropped costs acceptance and never changes the output: a pick equal to a dropped child's token is
simply the bonus.

M is the same for all rows. A number needs no transfer; "threshold" keeps all that passes in the row where most do, and
reads the device once more per step.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ladon.errors import InputError
from ladon.heads.early_exit import EarlyExit, new_early_exit
from ladon.heads.model_parts import decoder_layers, is_plain, output_projection
from ladon.target.pruning.dropping import Dropping, Slots
from ladon.target.pruning.node_scores import CRITERIA, EarlyView, best_nodes, is_accepted, node_scores, path_scores
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import to_host
from ladon.util.devices import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

THRESHOLD = "threshold"


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How to prune.

    Attributes:
        layer: l, the decoder layer after which nodes are judged, counted from 1, below the number of layers.
        keep: M, the nodes that go on, root included; or "threshold".
        criterion: "evidence", "siblings" or "top-k" (`ladon.target.pruning.node_scores`).
        weight: of the early logits in "evidence"; what suits depends on how well the early exit is trained.
        top_k: k of "top-k".
        threshold: the least probability of a node's whole path that "threshold" keeps, by "evidence" and "siblings";
            with "top-k" it keeps what is in the top k.
        early_exit: trained for that layer (`ladon train --early-exit`); None: the target's own final norm.
    """

    layer: int
    keep: int | str
    criterion: str = "evidence"
    weight: float = 0.3
    top_k: int = 8
    threshold: float = 0.003
    early_exit: EarlyExit | None = None

    def __post_init__(self) -> None:
        """Raise `InputError` for what is not among the choices."""
        if self.criterion not in CRITERIA:
            raise InputError(f"criterion is {self.criterion!r}; give {', '.join(map(repr, CRITERIA))}")
        for name, count in (("layer", self.layer), ("keep", self.keep), ("top_k", self.top_k)):
            is_count = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            if not is_count and not (name == "keep" and count == THRESHOLD):
                or_threshold = f' or "{THRESHOLD}"' if name == "keep" else ""
                raise InputError(f"{name} is {count!r}; give a number of 1 or more{or_threshold}")
        if not (0 < self.threshold < 1 and 0 < self.weight < math.inf):
            raise InputError(
                f"threshold is {self.threshold!r}, weight is {self.weight!r}; give a probability and a number above 0"
            )
        if self.early_exit is not None and self.early_exit.layer != self.layer:
            raise InputError(f"the early exit is for layer {self.early_exit.layer}, not {self.layer}; give that layer")


class Pruner:
    """`Pruning` made ready for one model.

    Attributes:
        options: what it was made from.
    """

    def __init__(self, model: PreTrainedModel, options: Pruning) -> None:
        """Find the places where the model is cut.

        Raises:
            HeadsError: the model has no such layer.
            UnsupportedModelError: its layers cannot be found.
            InputError: the early exit is another model's, or the criterion needs single rows of an output projection
                that is packed or elsewhere.
        """
        self.options, self._model = options, model
        layers, self._projection = list(decoder_layers(model)), output_projection(model)
        self._early_exit = self._fitting(
            len(layers), options.early_exit or new_early_exit(model, options.layer, width=1)
        )
        self._layers = layers[options.layer :]
        weight = self._projection.weight
        if options.criterion != "top-k" and (not is_plain(weight) or weight.ndim != 2 or weight.is_meta):
            raise InputError(
                f"the output projection of {type(model).__name__} is packed or offloaded, and criterion "
                f"{options.criterion!r} reads single rows of it; give criterion='top-k', or do not prune"
            )

    def _fitting(self, num_layers: int, early_exit: EarlyExit) -> EarlyExit:
        """A copy of the early exit, in the dtype of the model and on its device."""
        sizes, expected = (early_exit.num_layers, early_exit.hidden_size), (num_layers, self._projection.hidden_size)
        if sizes != expected:
            raise InputError(
                f"the early exit is for a model of {sizes[0]} layers of width {sizes[1]}, this one has {expected[0]} "
                f"of width {expected[1]}. Give the one that was trained on this model"
            )
        return deepcopy(early_exit).to(input_device(self._model), self._model.dtype)

    def during(self, tree: TokenTree, ancestors: Tensor, route: Slots) -> Dropping | None:
        """What drops nodes of this tree in its one forward; None if all of them go on anyway."""
        keep = self.options.keep
        if tree.num_nodes == 1 or (isinstance(keep, int) and keep >= tree.num_nodes):
            return None
        projection: nn.Module = self._projection.module
        choose = partial(self.choose, tree=tree, ancestors=ancestors)
        return Dropping(self._model, self._layers, projection, choose, route)

    @torch.no_grad()
    def choose(self, hidden: Tensor, tree: TokenTree, ancestors: Tensor) -> Tensor:
        """The nodes that go on, [B, M] int64 in the order of the tree.

        Args:
            hidden: the nodes' states after layer l, [B, N, H].
            tree: the whole tree, [B, N].
            ancestors: its ancestor mask, [B, N, N].
        """
        paths = self.score(hidden, tree, ancestors)
        keep = self.options.keep
        if isinstance(keep, int):
            return best_nodes(paths, keep)
        least = None if self.options.criterion == "top-k" else math.log(self.options.threshold)
        most = is_accepted(paths, least).sum(1).amax()
        return best_nodes(paths, to_host(most[None, None])[0][0])

    @torch.no_grad()
    def score(self, hidden: Tensor, tree: TokenTree, ancestors: Tensor) -> Tensor:
        """Path scores of all nodes, [B, N], by which they are kept; arguments as for `choose`."""
        options = self.options
        seen = self._early_exit(hidden.to(self._early_exit.scale.device))
        view = EarlyView(tree=tree, hidden=seen, projection=self._projection)
        scores, passed = CRITERIA[options.criterion](view, options.weight, options.top_k)
        return path_scores(node_scores(scores, tree), ancestors, passed)
