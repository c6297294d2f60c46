"""MEDUSA's blocks under the names that MEDUSA, TGI, vLLM, TensorRT-LLM and Model-Optimizer give them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ladon.errors import HeadsError
from ladon.heads.checkpoint import check_token_ids
from ladon.heads.fingerprint import Fingerprint, samples_of
from ladon.heads.formats.files import Checkpoint
from ladon.heads.formats.keys import HEAD, KIND, LAYER, Layout, Parts, check_shapes, counts, some
from ladon.heads.medusa import MedusaHeads

_VLLM = r"(?:medusa_heads\.)?"


def _numbered(name: str, prefix: str, is_whole: bool) -> Layout:
    """Blocks and then the projection of each head as the members of a sequence: `{head}.{layer}`."""
    return Layout(
        name=name,
        block=rf"{prefix}{HEAD}\.{LAYER}\.linear\.{KIND}",
        projection=rf"{prefix}{HEAD}\.{LAYER}\.{KIND}",
        beside=rf"(?!{prefix}).*" if is_whole else None,
        is_whole=is_whole,
    )


VLLM = Layout(
    name="vLLM",
    block=rf"{_VLLM}blocks\.{HEAD}\.layers\.{LAYER}\.{KIND}",
    projection=rf"{_VLLM}lm_heads\.{HEAD}\.{KIND}",
    single={"shared": rf"{_VLLM}lm_head\.weight", "token_map": rf"{_VLLM}token_map"},
)
LAYOUTS = (
    _numbered("MEDUSA heads (v0.1, v2, TGI)", "", is_whole=False),
    _numbered("MEDUSA v1.0 whole model", r"medusa_head\.", is_whole=True),
    _numbered("Model-Optimizer", r"medusa_heads\.", is_whole=True),
    VLLM,
    Layout(
        name="TensorRT-LLM",
        block=rf"medusa_heads\.{HEAD}\.medusa_layers\.{LAYER}\.linear\.{KIND}",
        projection=rf"medusa_heads\.{HEAD}\.lm_head\.{KIND}",
        beside=r"(?:transformer|lm_head)\..*",
    ),
)


def build(checkpoint: Checkpoint, layout: Layout, parts: Parts, vocab_size: int | None) -> MedusaHeads:
    """The heads, on the CPU, in the file's dtype.

    Args:
        checkpoint: where the tensors are.
        layout: whose keys they have.
        parts: what the keys mean.
        vocab_size: V of the target, if it is known; else it comes from the file.

    Raises:
        HeadsError: tensors missing or of a wrong shape, or a vocabulary size that nothing tells.
    """
    num_heads, num_blocks = counts(checkpoint.name, parts.blocks)
    _find_shared(checkpoint, parts, num_heads)
    first = checkpoint.slots[parts.blocks[0, 0, "weight"]] if (0, 0, "weight") in parts.blocks else None
    hidden_size = first.shape[-1] if first is not None and first.shape else 0
    is_own = _check_projections(checkpoint, parts, num_heads, num_blocks)
    token_map = _token_map(checkpoint, parts)
    vocab_size, entries = _sizes(checkpoint, parts, is_own, token_map, vocab_size)
    square = (hidden_size, hidden_size)
    expected = {key: square[: 2 if kind == "weight" else 1] for (_, _, kind), key in parts.blocks.items()}
    for (_, _, kind), key in parts.projections.items():
        rows = checkpoint.slots[key].shape[:1]
        # vLLM keeps whole projections too, and takes the draft's rows when it loads them.
        is_whole = token_map is not None and rows == (vocab_size,)
        expected[key] = (vocab_size if is_whole else entries, hidden_size)[: 2 if kind == "weight" else 1]
    if not is_own and "shared" in parts.single:
        expected[parts.single["shared"]] = (vocab_size, hidden_size)
    if token_map is not None:
        expected[parts.single["token_map"]] = (entries,)
    check_shapes(checkpoint, expected)
    if token_map is not None:  # whole projections are cut by it
        check_token_ids(checkpoint.name, token_map, vocab_size)
    with torch.device("meta"):
        heads = MedusaHeads(
            num_heads=num_heads,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            num_blocks=num_blocks,
            projection="own" if is_own else "shared",
            draft_vocab_size=0 if token_map is None else entries,
            projection_bias=int(any(kind == "bias" for _, _, kind in parts.projections)),
        )
    heads.load_state_dict(_tensors(checkpoint, parts, heads, token_map), assign=True)
    if "shared" in parts.single and not is_own:
        copy = checkpoint.read(parts.single["shared"])
        heads.base_fingerprint = Fingerprint(projection=samples_of([copy]))
    return heads


def _token_map(checkpoint: Checkpoint, parts: Parts) -> Tensor | None:
    """The tokens of the draft's vocabulary, [D] int64; None if it is the whole one."""
    if "token_map" not in parts.single:
        return None
    tokens = checkpoint.read(parts.single["token_map"])
    if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point():
        raise HeadsError(f"{checkpoint.name}: token_map must be a list of token ids; the file is damaged")
    return tokens.long()


def _find_shared(checkpoint: Checkpoint, parts: Parts, num_heads: int) -> None:
    """Tell vLLM's one shared projection, which it calls `lm_heads.0`, from a first head's own."""
    only = parts.projections.get((0, -1, "weight"))
    says_shared = checkpoint.config.get("original_lm_head") is True
    if only is not None and len(parts.projections) == 1 and (says_shared or num_heads > 1):
        parts.single.setdefault("shared", only)
        parts.projections.clear()


def _check_projections(checkpoint: Checkpoint, parts: Parts, num_heads: int, num_blocks: int) -> bool:
    """Whether each head has a projection of its own; raises `HeadsError` if only some have."""
    shared = parts.single.get("shared")
    if shared is not None and "token_map" in parts.single:
        token_map, copy = (checkpoint.slots[key].shape for key in (parts.single["token_map"], shared))
        if copy[:1] == token_map[:1]:  # rows of the draft's tokens only: no copy of the base's whole projection
            parts.projections.update({(head, -1, "weight"): shared for head in range(num_heads)})
    for (head, layer, kind), key in parts.projections.items():
        if layer not in (-1, num_blocks):
            raise HeadsError(
                f"{checkpoint.name}: {key} would be the projection after {layer} layers, but head {head} has "
                f"{num_blocks}. The file is damaged or of another layout"
            )
        if kind == "bias" and (head, layer, "weight") not in parts.projections:
            raise HeadsError(f"{checkpoint.name}: {key} has no weight beside it; the file is incomplete")
    for kind in ("weight", "bias"):
        having = sorted(head for head, _, found in parts.projections if found == kind)
        lacking = sorted(set(range(num_heads)) - set(having))
        extra = sorted(set(having) - set(range(num_heads)))
        if extra:
            raise HeadsError(
                f"{checkpoint.name}: head {extra[0]} has a projection and no layers; the file is incomplete"
            )
        if having and lacking:
            raise HeadsError(
                f"{checkpoint.name} mixes two layouts: heads {some([str(h) for h in having])} have a projection "
                f"{kind} of their own, heads {some([str(h) for h in lacking])} have none; all must, or none"
            )
    return bool(parts.projections)


def _sizes(
    checkpoint: Checkpoint, parts: Parts, is_own: bool, token_map: Tensor | None, vocab_size: int | None
) -> tuple[int, int]:
    """V, and D, the number of entries of the logits."""
    known = vocab_size if vocab_size is not None else checkpoint.config.get("vocab_size")
    if is_own and token_map is None:
        rows = _num_rows(checkpoint, next(iter(parts.projections.values())))
        return rows, rows
    if not is_own and "shared" in parts.single:
        known = _num_rows(checkpoint, parts.single["shared"])
    if not isinstance(known, int) or known < 1:
        raise HeadsError(
            f"{checkpoint.name} does not tell the size of the vocabulary: its heads share the model's output "
            "projection. Give the model: load_heads(path, model), or --model"
        )
    return known, known if token_map is None else len(token_map)


def _num_rows(checkpoint: Checkpoint, key: str) -> int:
    shape = checkpoint.slots[key].shape
    if len(shape) != 2:
        raise HeadsError(f"{checkpoint.name}: {key} is {list(shape)}, expected a matrix; the file is damaged")
    return shape[0]


def _tensors(checkpoint: Checkpoint, parts: Parts, heads: MedusaHeads, token_map: Tensor | None) -> dict[str, Tensor]:
    """What the file holds under the names of `MedusaHeads`."""
    layers, all_heads = range(heads.num_blocks), range(heads.num_heads)

    def stacked(kind: str) -> Tensor:
        missing = [
            f"{kind} of head {h}, layer {n}" for h in all_heads for n in layers if (h, n, kind) not in parts.blocks
        ]
        if missing:
            raise HeadsError(f"{checkpoint.name} lacks the {some(missing)}; the file is incomplete")
        return torch.stack(
            [torch.stack([checkpoint.weight(parts.blocks[h, n, kind]) for h in all_heads]) for n in layers]
        )

    tensors = {"block_weight": stacked("weight")}
    if any(kind == "bias" for _, _, kind in parts.blocks):
        tensors["block_bias"] = stacked("bias")
    else:
        tensors["block_bias"] = tensors["block_weight"].new_zeros(heads.block_bias.shape)
        warnings.warn(
            f"{checkpoint.name} holds no biases of the blocks, and zeros stand for them. Converters for vLLM drop "
            "biases: if the heads were trained with them, they guess worse without, and the original file is better",
            stacklevel=2,
        )
    for name, kind in (("projection", "weight"), ("own_bias", "bias")):
        keys = {head: key for (head, _, found), key in parts.projections.items() if found == kind}
        if keys:
            read = [checkpoint.weight(keys[head]) for head in all_heads]
            if token_map is not None:
                read = [part if len(part) == len(token_map) else part[token_map] for part in read]
            tensors[name] = torch.stack(read)
    return tensors if token_map is None else {**tensors, "token_map": token_map}
