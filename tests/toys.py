"""Constraints in plain Python, with states that can be looked into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from families import VOCAB_SIZE

VOCAB = 97


def looking(hook):
    """A hook that changes nothing, declared as such: the self-test leaves it alone."""
    hook.only_looks = True
    return hook


def packed(tokens: set[int]) -> bytes:
    """Tokens as bits, as `ladon.constraints.state.State.allowed` gives them."""
    bits = bytearray(max(tokens, default=0) // 8 + 1)
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
    return bytes(bits)


@dataclass(frozen=True)
class Residues:
    """Allows tokens that leave certain remainders, which follow from all tokens so far.

    Attributes:
        modulus: about so many of the vocabulary's tokens go together.
        classes: how many of the remainders are allowed; 0 in dead ends.
        seed: what it starts from.
        ends: whether a text may end now and then.
    """

    modulus: int
    classes: int
    seed: int = 1
    ends: bool = True
    vocab_size: int = VOCAB

    problem = ""

    def start(self) -> Residues:
        return self

    @property
    def is_complete(self) -> bool:
        return self.ends and self.seed % 3 == 0

    def tokens(self) -> set[int]:
        kept = {(self.seed * 5 + k * 3) % self.modulus for k in range(self.classes)}
        return {token for token in range(3, self.vocab_size) if token % self.modulus in kept}

    def allowed(self) -> bytes:
        return packed(self.tokens())

    def after(self, token: int) -> Residues:
        assert token in self.tokens(), f"{token} is not allowed"
        seed = (self.seed * 31 + token + 7) % 1009
        return Residues(self.modulus, self.classes, seed, self.ends, self.vocab_size)


@dataclass(frozen=True)
class Script:
    """Allows at each place what a list says; complete at its end only."""

    script: tuple[frozenset[int], ...]
    place: int = 0

    problem = ""

    @classmethod
    def of(cls, *choices: set[int]) -> Script:
        return cls(tuple(frozenset(choice) for choice in choices))

    def start(self) -> Script:
        return self

    @property
    def is_complete(self) -> bool:
        return self.place == len(self.script)

    def allowed(self) -> bytes:
        return packed(set() if self.is_complete else set(self.script[self.place]))

    def after(self, token: int) -> Script:
        assert not self.is_complete and token in self.script[self.place], f"{token} is not allowed"
        return Script(self.script, self.place + 1)


def deep_llama(num_layers: int = 5) -> PreTrainedModel:
    """A tiny float64 Llama of several layers, no token of which ends a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


class Packed(nn.Module):
    """An output projection whose weight is packed, as quantised ones are."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self._plain = plain.in_features, plain.out_features, [plain]
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits of the projection that was packed."""
        return self._plain[0](hidden)
