"""Head families: their formulas, shapes, start values, and the model they are bound to."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ladon.errors import HeadsError
from ladon.heads import Heads, LowRankHeads, MedusaHeads, SharedHeads, new_heads
from ladon.heads.fingerprint import fingerprint

# What is tested for every family: a name, and how to make it for the tests' small model (hidden size 32).
FAMILIES = {
    "shared": {"family": "shared"},
    "swiglu": {"family": "shared", "activation": "swiglu"},
    "medusa": {"family": "medusa"},
    "medusa, shared": {"family": "medusa", "projection": "shared"},
    "lowrank": {"family": "lowrank", "rank": 32},
}


def make_heads(model: PreTrainedModel, num_heads: int, name: str) -> Heads:
    return new_heads(model, num_heads, **FAMILIES[name])  # type: ignore[arg-type]


def randomised(heads: Heads) -> Heads:
    """The heads with every parameter moved away from its start value."""
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return heads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 5, 32), (0, 32)])
def test_shapes(tiny_llama: PreTrainedModel, family: str, shape: tuple[int, ...]) -> None:
    heads = make_heads(tiny_llama, 3, family)
    assert heads(torch.randn(shape, dtype=torch.float64)).shape == (*shape[:-1], 3, 97)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_heads_equal_the_target(tiny_llama: PreTrainedModel, family: str) -> None:
    hidden = torch.randn(4, 32, dtype=torch.float64)
    logits = make_heads(tiny_llama, 3, family)(hidden)
    torch.testing.assert_close(logits, tiny_llama.lm_head(hidden)[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_of_a_row_does_not_depend_on_the_batch(tiny_llama: PreTrainedModel, family: str) -> None:
    heads = randomised(make_heads(tiny_llama, 4, family))
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    together = heads(hidden)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], heads(hidden[i, j]))


def test_shared_formula(tiny_llama: PreTrainedModel) -> None:
    heads = randomised(new_heads(tiny_llama, 3, "shared", expansion=2))
    assert isinstance(heads, SharedHeads)
    hidden = torch.randn(5, 32, dtype=torch.float64)
    logits = heads(hidden)
    for k in range(3):
        inner = functional.silu(hidden @ heads.up_weight[k].T + heads.up_bias[k])
        assert inner.shape == (5, 64)
        expected = tiny_llama.lm_head(hidden + inner @ heads.down_weight[k])
        torch.testing.assert_close(logits[:, k], expected)


def test_swiglu_formula(tiny_llama: PreTrainedModel) -> None:
    heads = randomised(new_heads(tiny_llama, 3, expansion=2, activation="swiglu"))
    assert isinstance(heads, SharedHeads) and heads.up_weight.shape == (3, 128, 32)
    hidden = torch.randn(5, 32, dtype=torch.float64)
    logits = heads(hidden)
    for k in range(3):
        inner = hidden @ heads.up_weight[k].T + heads.up_bias[k]
        inner = functional.silu(inner[:, :64]) * inner[:, 64:]
        torch.testing.assert_close(logits[:, k], tiny_llama.lm_head(hidden + inner @ heads.down_weight[k]))


def test_lowrank_formula_and_start(tiny_llama: PreTrainedModel) -> None:
    """It starts as the best approximation of its rank, which the singular values of the projection give."""
    heads = new_heads(tiny_llama, 2, "lowrank", rank=8)
    assert isinstance(heads, LowRankHeads)
    weight = tiny_llama.lm_head.weight
    missed = weight - heads.out_weight[1] @ heads.in_weight[1]
    torch.testing.assert_close(missed.norm() ** 2, torch.linalg.svdvals(weight)[8:].square().sum())
    randomised(heads)
    hidden = torch.randn(5, 32, dtype=torch.float64)
    logits = heads(hidden)
    for k in range(2):
        inner = functional.silu(hidden @ heads.up_weight[k].T + heads.up_bias[k])
        moved = hidden + inner @ heads.down_weight[k]
        torch.testing.assert_close(logits[:, k], moved @ heads.in_weight[k].T @ heads.out_weight[k].T)


def test_medusa_formula_with_distinct_blocks(tiny_llama: PreTrainedModel) -> None:
    heads = randomised(new_heads(tiny_llama, 3, "medusa", num_blocks=2))
    assert isinstance(heads, MedusaHeads)
    assert not torch.equal(heads.block_weight[0], heads.block_weight[1])
    hidden = torch.randn(5, 32, dtype=torch.float64)
    logits = heads(hidden)
    for k in range(3):
        x = hidden
        for block in range(2):
            x = x + functional.silu(functional.linear(x, heads.block_weight[block, k], heads.block_bias[block, k]))
        torch.testing.assert_close(logits[:, k], x @ heads.projection[k].T)


def test_each_block_learns_on_its_own(tiny_llama: PreTrainedModel) -> None:
    """MEDUSA's code repeats one block object, so its blocks could never differ."""
    heads = randomised(new_heads(tiny_llama, 2, "medusa", num_blocks=2))
    heads(torch.randn(4, 32, dtype=torch.float64)).square().sum().backward()
    gradient = heads.block_weight.grad
    assert gradient is not None and not torch.allclose(gradient[0], gradient[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_training_leaves_the_target_alone(tiny_llama: PreTrainedModel, family: str) -> None:
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    heads = make_heads(tiny_llama, 2, family)
    own = {id(p) for p in heads.parameters()}
    assert own and not own & {id(p) for p in tiny_llama.parameters()}
    torch.optim.SGD(heads.parameters(), lr=0.1).step()
    heads(torch.randn(4, 32, dtype=torch.float64)).square().sum().backward()
    torch.optim.SGD(heads.parameters(), lr=0.1).step()
    for name, value in tiny_llama.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_learns(tiny_llama: PreTrainedModel) -> None:
    """Gradients reach every parameter although the output starts at zero."""
    heads = new_heads(tiny_llama, 2)
    hidden = torch.randn(64, 32, dtype=torch.float64)
    targets = torch.randint(97, (64, 2))
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(heads(hidden).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in heads.parameters())


def test_start_values_depend_on_the_seed_alone(tiny_llama: PreTrainedModel) -> None:
    first, again, other = (new_heads(tiny_llama, 2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["up_weight"], other["up_weight"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_target(tiny_llama: PreTrainedModel, family: str, dtype: torch.dtype) -> None:
    model = tiny_llama.to(dtype)
    heads = make_heads(model, 2, family)
    logits = heads(torch.randn(2, 32, dtype=dtype))
    assert logits.dtype == dtype and logits.isfinite().all()


def test_the_projection_is_the_targets_own_and_not_saved(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, 2)
    hidden = torch.randn(1, 32, dtype=torch.float64)
    before = heads(hidden)
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(2)
    torch.testing.assert_close(heads(hidden), 2 * before)
    assert heads.state_dict().keys() == {"up_weight", "up_bias", "down_weight"}
    assert len(list(heads.modules())) == 1


def test_a_bias_of_the_projection_is_used() -> None:
    config = GPTJConfig(vocab_size=61, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(new_heads(model, 2)(hidden)[:, 1], model.lm_head(hidden))


def test_binding_follows_the_targets_dtype(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, 2)
    heads.bind(tiny_llama.float())
    assert heads(torch.randn(1, 32)).dtype == torch.float32


def test_unbound_heads_say_what_to_do() -> None:
    heads = SharedHeads(num_heads=2, hidden_size=8, vocab_size=11)
    assert not heads.is_bound
    with pytest.raises(HeadsError, match=r"heads\.bind\(model\)"):
        heads(torch.randn(1, 8))


@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(16, 97), (32, 98)])
def test_sizes_must_fit_even_when_forced(tiny_llama: PreTrainedModel, hidden_size: int, vocab_size: int) -> None:
    heads = SharedHeads(num_heads=1, hidden_size=hidden_size, vocab_size=vocab_size)
    message = f"hidden size {hidden_size} and vocabulary {vocab_size}.*hidden size 32 and vocabulary 97"
    for force in (False, True):
        with pytest.raises(HeadsError, match=message):
            heads.bind(tiny_llama, force=force)


def test_bad_requests_name_what_is_allowed(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(HeadsError, match="'eagle' is unknown; known: shared, medusa, lowrank"):
        new_heads(tiny_llama, 2, "eagle")
    with pytest.raises(HeadsError, match="no option num_blocks; they take expansion, activation"):
        new_heads(tiny_llama, 2, "shared", num_blocks=2)
    for count in (0, -1, True, 1.5):
        with pytest.raises(HeadsError, match=r"num_heads is .*, expected an integer >= 1"):
            new_heads(tiny_llama, count)  # type: ignore[arg-type]
    with pytest.raises(HeadsError, match="expansion is 0"):
        new_heads(tiny_llama, 1, expansion=0)
    with pytest.raises(HeadsError, match="activation is 'relu'; shared heads know silu, swiglu"):
        new_heads(tiny_llama, 1, activation="relu")
    with pytest.raises(HeadsError, match="rank is 33, but the hidden size is 32"):
        new_heads(tiny_llama, 1, "lowrank", rank=33)


def llama(seed: int, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def test_the_base_is_recognised_in_every_dtype() -> None:
    """Published in bfloat16, loaded as anything; published in float32, loaded as anything."""
    for published in (torch.bfloat16, torch.float32):
        for loaded in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            heads = new_heads(llama(0).to(published), 1)
            heads._projection = ()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert heads.bind(llama(0).to(published).to(loaded)).is_bound


def test_another_base_is_refused_unless_forced() -> None:
    heads = new_heads(llama(0), 1)
    with pytest.raises(HeadsError, match=r"weights differ .*embedding \d%.*force=True"):
        heads.bind(llama(1))
    assert heads.bind(llama(1), force=True)(torch.randn(1, 32)).shape == (1, 1, 97)


def test_a_base_whose_layers_alone_were_tuned_is_refused() -> None:
    heads = new_heads(llama(0), 1)
    tuned = llama(0)
    with torch.no_grad():
        for layer in tuned.model.layers:
            for parameter in layer.parameters():
                parameter.mul_(1.1)
    with pytest.raises(HeadsError, match=r"samples that agree: body \d+%"):
        heads.bind(tuned)


def test_weights_that_cannot_be_read_are_a_warning() -> None:
    heads = new_heads(llama(0), 1)
    packed = llama(0)
    packed.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False
    )
    with pytest.warns(UserWarning, match="cannot verify .*the weights of body"):
        heads.bind(packed)
    unknown = SharedHeads(num_heads=1, hidden_size=32, vocab_size=97)
    with pytest.warns(UserWarning, match="carry no fingerprint"):
        unknown.bind(llama(0))


def test_a_model_without_numbers_is_a_warning_and_keeps_the_heads() -> None:
    heads = new_heads(llama(0), 1)
    weights = heads.up_weight.detach().clone()
    with pytest.warns(UserWarning, match="embedding and projection and body"):
        heads.bind(llama(0).to("meta"))
    assert torch.equal(heads.up_weight, weights)


@pytest.mark.parametrize("tied", [True, False])
def test_fingerprint_reads_every_part(tied: bool) -> None:
    found = fingerprint(llama(0, tied))
    assert found == fingerprint(llama(0, tied)) != fingerprint(llama(1, tied))
    assert (found.embedding == found.projection) == tied
    assert found.body_matrices == 2 * 7


def test_a_model_without_projection_is_refused() -> None:
    from transformers import LlamaModel

    with pytest.raises(HeadsError, match="LlamaModel has no output projection"):
        new_heads(LlamaModel(llama(0).config), 1)


def test_packed_projections_cannot_be_copied() -> None:
    model = llama(0)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(97 * 16, 1, dtype=torch.uint8), requires_grad=False)
    for family in ("medusa", "lowrank"):
        with pytest.raises(HeadsError, match="family='shared'"):
            new_heads(model, 1, family, **({"rank": 8} if family == "lowrank" else {}))
    assert new_heads(model, 1, "shared").vocab_size == 97
