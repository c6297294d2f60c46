"""Models whose weights are packed, in whatever form, decode as `generate` does, or are refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ladon
from greedy import BATCH, MASK, plain
from ladon.errors import HeadsError, InputError, UnsupportedModelError
from ladon.heads.fingerprint import fingerprint
from ladon.heads.model_parts import input_embedding, output_projection
from ladon.target import self_test
from ladon.target.target import Target


class GptqLike(nn.Module):
    """Integers under another name, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int32).T.contiguous())
        self.register_buffer("scales", scales)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.qweight.T.to(self.scales.dtype) * self.scales)


class BitsAndBytesLike(GptqLike):
    """A `weight` of bytes in one column."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


class MethodLike(GptqLike):
    """A `weight` that is a method, as torch.ao's."""

    def weight(self) -> Tensor:
        raise NotImplementedError


class Silent(GptqLike):
    """One that says nothing about its sizes; the config does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        del self.infeatures, self.outfeatures


KINDS = [GptqLike, BitsAndBytesLike, MethodLike, Silent]


def packed(model: PreTrainedModel, kind: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    """The model with all linear layers so packed, the output projection too."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights(model: PreTrainedModel, kind: Callable[[nn.Linear], nn.Module]) -> None:
    packed(model, kind)
    projection = output_projection(model)
    assert (projection.hidden_size, projection.vocab_size) == (32, 97)
    heads = ladon.new_heads(model, num_heads=3)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    call = {"attention_mask": MASK, "max_new_tokens": 16}
    expected = plain(model, BATCH, **call)
    for decoder in (ladon.Decoder(model, heads, budget=8), ladon.Decoder(model)):
        assert torch.equal(decoder.generate(BATCH, **call), expected)
    assert fingerprint(model).projection == "" != fingerprint(model).embedding
    for family, options in (("medusa", {}), ("hydra", {}), ("lowrank", {"rank": 4})):
        with pytest.raises(HeadsError, match=r"packed to .*family='shared'"):
            ladon.new_heads(model, 2, family, **options)
    with pytest.raises(InputError, match="packed or offloaded"):
        ladon.Decoder(model, heads, prune=ladon.Pruning(layer=1, keep=4)).generate(BATCH, **call)


def test_a_packed_embedding(model: PreTrainedModel) -> None:
    class PackedEmbedding(nn.Module):
        def __init__(self, own: nn.Embedding) -> None:
            super().__init__()
            self._own = [own]

        def weight(self) -> Tensor:
            raise NotImplementedError

        def forward(self, ids: Tensor) -> Tensor:
            return self._own[0](ids)

    model.set_input_embeddings(PackedEmbedding(model.get_input_embeddings()))
    assert input_embedding(model).numel() == 0 and fingerprint(model).embedding == ""
    decoder = ladon.Decoder(model, ladon.new_heads(model, 3), budget=8)
    options = {"attention_mask": MASK, "max_new_tokens": 16}
    assert torch.equal(decoder.generate(BATCH, **options), plain(model, BATCH, **options))


def dynamic(model: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and used
        return torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)


def test_activations_that_are_rounded_together_are_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scale is the greatest number of the whole forward: a token's logits depend on what is verified with it."""
    monkeypatch.setattr(self_test, "_verdicts", {})
    assert Target(model.float()).supports_trees
    quantised = dynamic(model)
    assert output_projection(quantised).vocab_size == 97
    with pytest.raises(UnsupportedModelError, match=r"dynamically quantised layers .* Quantise weights alone"):
        ladon.Decoder(quantised)
    monkeypatch.setattr("ladon.target.support._DYNAMIC", "nothing")  # and without being told, the self-test sees it
    with pytest.raises(UnsupportedModelError, match="a token tree differs by"):
        Target(quantised).new_cache(1)


def test_torchao(model: PreTrainedModel) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    heads = ladon.new_heads(model.float(), 3)
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear)
    )
    projection = output_projection(model)
    assert (projection.hidden_size, projection.vocab_size) == (32, 97) and fingerprint(model).projection == ""
    options = {"attention_mask": MASK, "max_new_tokens": 16}
    decoder = ladon.Decoder(model, heads, budget=8)
    assert torch.equal(decoder.generate(BATCH, **options), plain(model, BATCH, **options))
    with pytest.raises(HeadsError, match="packed to"):
        ladon.new_heads(model, 2, "medusa")
