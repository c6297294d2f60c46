"""The host reads the device once a step, in `to_host`, and nowhere else in Ladon's own code.

Three nets: the Python methods that read a tensor are patched, a dispatch mode sees the operators whose result's value
or shape needs a read, and a function mode sees copies to the host (to "cpu", or into a tensor that was made there) and
copies from the host that would wait behind the target's forward. All look for the innermost frame that is Ladon's or
the model's: what the model does is its own.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ladon
from drafts import FIXED, RandomSizing
from families import FAMILIES, build, random_mtp
from ladon.constraints.state import GrammarState
from ladon.engine.sequence import Row
from ladon.sampling.sampling_params import GREEDY, TemperatureSampling
from ladon.target.prefill import PromptReader
from ladon.target.target import Target
from ladon.trees.transfer import host_values, to_host
from rope_cases import CASES, SWITCH
from toys import Residues

LADON = str(Path(ladon.__file__).parent)
READERS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
READING_OPERATORS = (
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive",
)  # fmt: skip


class Reads:
    """Counts allowed reads and remembers forbidden ones.

    `in_flight`: whether the target's forward of this step has begun and its outcome has not been read.
    """

    def __init__(self) -> None:
        self.allowed = 0
        self.in_flight = False
        self.forbidden: list[str] = []

    def note(self, what: str) -> None:
        """Remember what was done, unless the innermost frame of ours is the model's or in `ladon.trees.transfer`."""
        frame = ladon_frame()
        if frame is not None and frame.f_code not in (to_host.__code__, host_values.__code__):
            self.forbidden.append(f"{what} at {frame.f_code.co_filename}:{frame.f_lineno}")


def ladon_frame():
    """The innermost frame of Ladon or transformers if it is Ladon's, else None."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(LADON):
            return frame
        if "/transformers/" in name:
            return None
        frame = frame.f_back
    return None


class Net(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in READING_OPERATORS or by_mask:
            self._reads.note(name)
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """On a machine without an accelerator: a tensor that Ladon makes without naming a device is one of the host's."""

    FACTORIES = ("tensor", "as_tensor", "arange", "empty", "zeros", "ones", "full", "rand", "randn")

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads
        self._hosts: list[torch.Tensor] = []  # kept, so that no other tensor gets their memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "to" and "cpu" in [arg for arg in (*args[1:], *kwargs.values()) if isinstance(arg, str)]:
            self._reads.note("to cpu")
        elif name in ("copy_", "__setitem__") and self._is_host(args[0]):
            self._reads.note("copy to the host")
        elif self._reads.in_flight and (
            (name == "to" and self._is_host(args[0])) or (name in ("tensor", "as_tensor") and "device" in kwargs)
        ):
            self._reads.note("late upload")
        result = func(*args, **kwargs)
        if name in self.FACTORIES and kwargs.get("device") is None and ladon_frame() is not None:
            self._hosts.append(result)
        return result

    def _is_host(self, tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == host.untyped_storage().data_ptr() for host in self._hosts)


@pytest.fixture
def reads(monkeypatch):
    found = Reads()
    for name in READERS:
        original = getattr(torch.Tensor, name)

        def reader(tensor, *args, _original=original, _name=name, **kwargs):
            if _name == "tolist" and sys._getframe(1).f_code is to_host.__code__:
                found.allowed += 1
                found.in_flight = False
            else:
                found.note(_name)
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, reader)
    verify_rows = Target._verify_rows

    def verify_and_note(*args):
        outputs = verify_rows(*args)
        found.in_flight = True
        return outputs

    monkeypatch.setattr(Target, "_verify_rows", verify_and_note)
    return found


def make(name, monkeypatch):
    """A model by its family's name, one of the cases of rope_cases, or a family with eager attention."""
    family, _, attention = name.partition(" with ")
    if family in CASES:
        family, options = CASES[family]
        options = {**FAMILIES[family].options, **options}
        monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], options=options))
    model = build(family)
    if attention:
        model.set_attn_implementation(attention)
    return model


MODELS = ("llama", "bloom", "gpt_neo", "mistral with eager", "longrope recomputed", "longrope in a window", "indexer")


def check_one_read_per_step(
    model, tree, reads, prune="off", reads_more=False, sizing=None, constraints=None, **options
):
    """With n-grams each row's prompt is read once more, when it joins."""
    heads = options.pop("heads", {})
    if isinstance(heads, dict):  # what to make new ones of
        heads = None if options.pop("alone", False) else ladon.new_heads(model, num_heads=3, **heads)
    decoder = ladon.Decoder(model, heads, tree=tree, budget=16, prune=prune, **options)
    decoder.sizing = sizing or decoder.sizing
    prompts = [torch.arange(3, 9), torch.arange(5, 25), torch.arange(7, 8)]
    rows = [
        Row(prompt=p, max_new_tokens=n, is_stop=lambda _: False) for p, n in zip(prompts, (13, 20, 18), strict=True)
    ]
    for row, constraint in zip(rows, constraints or [None] * len(rows), strict=True):
        row.grammar = None if constraint is None else GrammarState(constraint)
    assert decoder._target.supports_trees
    run = decoder.engine().run(rows)
    reads.forbidden.clear()  # what comes before the run is no part of it
    reads.allowed, reads.in_flight = 0, False
    with Net(reads), Copies(reads):
        num_steps = sum(1 for _ in run)
    assert reads.forbidden == []
    assert num_steps > 3
    if reads_more:  # in every step but those of the root alone
        assert num_steps < reads.allowed <= num_steps + decoder.stats.forwards
    else:
        assert reads.allowed == num_steps + (len(rows) if decoder._plan.ngrams else 0)
    assert (decoder.stats.nodes_pruned > 0) == (prune != "off")
    return rows


@pytest.mark.parametrize("tree", ["dynamic", "chain", "off", FIXED], ids=["dynamic", "chain", "off", "fixed"])
def test_one_read_per_step(tiny_llama, reads, tree):
    check_one_read_per_step(tiny_llama, tree, reads)


@pytest.mark.parametrize("tree", ["dynamic", "chain", FIXED], ids=["dynamic", "chain", "fixed"])
def test_partial_paths_read_nothing_more(tiny_llama, reads, tree):
    check_one_read_per_step(tiny_llama, tree, reads, heads={"family": "hydra"}, joint="paths")


@pytest.mark.parametrize(
    "options", [{"markov_rank": 4}, {"markov_rank": 4, "markov_gate": 1}, {"hidden_correction": 4}]
)
def test_corrections_read_nothing_more(tiny_llama, options, reads):
    check_one_read_per_step(tiny_llama, "dynamic", reads, heads=options)


@pytest.mark.parametrize("tree", ["dynamic", "off"])
def test_constraints_read_nothing_more(tiny_llama, tree, reads):
    """The drafts come to the host with the tokens, in the same transfer."""
    constraints = [Residues(7, 3, ends=False), None, Residues(5, 1, ends=False)]
    rows = check_one_read_per_step(tiny_llama, tree, reads, constraints=constraints)
    assert (rows[0].stats.drafts_checked > 0) == (tree == "dynamic")


def test_what_is_kept_and_gone_on_from_takes_no_read(tiny_llama, reads):
    """Rows whose tokens the host has learnt when they were submitted."""
    decoder, past = ladon.Decoder(tiny_llama, ladon.new_heads(tiny_llama), budget=8), []
    prompts = [torch.arange(3, 9), torch.arange(5, 25)]
    for _ in range(2):
        rows = decoder.rows(prompts, past=past, max_new_tokens=9, eos_token_id=96, return_dict_in_generate=True)
        engine = decoder.engine()
        for row in rows:
            engine.submit(row)
        reads.forbidden.clear()
        reads.allowed, reads.in_flight, num_steps = 0, False, 0
        with Net(reads), Copies(reads):
            while engine.step() is not None:
                num_steps += 1
        assert reads.forbidden == [] and reads.allowed == num_steps + len(rows)  # n-grams read each prompt
        assert num_steps > 2
        past = [row.past for row in rows]
        prompts = [torch.tensor([*kept.token_ids, 40, 41]) for kept in past]
    assert [row.stats.reused_tokens for row in rows] == [6 + 8, 20 + 8]


@pytest.mark.parametrize("options", [{"ngrams": "off"}, {"alone": True}, {"alone": True, "ngrams": "off"}], ids=str)
def test_one_read_per_step_with_n_grams_and_without(tiny_llama, reads, options):
    check_one_read_per_step(tiny_llama, "dynamic", reads, **options)


@pytest.mark.parametrize("criterion", ["evidence", "siblings", "top-k"])
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neo", "mistral with eager"])
def test_pruning_to_a_size_reads_nothing_more(name, criterion, reads, monkeypatch):
    pruning = ladon.Pruning(layer=1, keep=4, criterion=criterion)
    check_one_read_per_step(make(name, monkeypatch), "dynamic", reads, pruning)


def test_pruning_by_a_threshold_reads_once_more(tiny_llama, reads):
    pruning = ladon.Pruning(layer=1, keep="threshold", threshold=0.5)
    check_one_read_per_step(tiny_llama, "chain", reads, pruning, reads_more=True)


def test_one_read_per_step_with_sizes_that_change(tiny_llama, reads):
    """The second time, because builders make some tables once per size."""
    sizings = [RandomSizing(5), RandomSizing(5)]
    for sizing in sizings:
        reads.forbidden.clear()
        with suppress(AssertionError) if sizing is sizings[0] else nullcontext():
            check_one_read_per_step(tiny_llama, "dynamic", reads, sizing=sizing)
    assert len({record.nodes for record in sizing.records}) > 3


@pytest.mark.parametrize("name", MODELS)
def test_one_read_per_step_of_every_kind_of_model(name, reads, monkeypatch):
    """Masks of every kind, rows that must not share a forward, and rows whose cache is computed again."""
    parts, refilled = [], []
    verify_parts, read_group = Target._verify_parts, PromptReader._read_group

    def note_parts(*args):
        parts.append(len(args[-1]))
        return verify_parts(*args)

    def note_lengths(reader, prompts, *args):
        refilled.append({len(prompt) for prompt in prompts} == {SWITCH})
        return read_group(reader, prompts, *args)

    monkeypatch.setattr(Target, "_verify_parts", note_parts)
    monkeypatch.setattr(PromptReader, "_read_group", note_lengths)
    rows = check_one_read_per_step(make(name, monkeypatch), "dynamic", reads)
    assert any(len(row.prompt) < SWITCH < len(row.prompt) + len(row.tokens) for row in rows)
    assert (max(parts, default=1) > 1) == (name in CASES)
    assert any(refilled) == (name == "longrope recomputed")


@pytest.mark.parametrize("tree", ["dynamic", "chain"])
def test_one_read_per_step_with_mtp_modules(tree, reads):
    model, heads = random_mtp("glm4_moe", 2)
    check_one_read_per_step(model, tree, reads, heads=heads)


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_drafter_of_the_users_costs_the_read_of_its_check(tiny_llama, is_checked, reads):
    """One for each draft; none if it is not checked."""

    class Repeating(ladon.Proposer):
        drafts = 0

        def propose(self, hidden, root, max_nodes):
            self.drafts += 1
            return ladon.TokenTree.chain(root, root[:, None].expand(-1, 3))

    drafter = Repeating()
    drafter.is_checked = is_checked
    decoder = ladon.Decoder(tiny_llama, proposer=drafter, budget=16)
    rows = [Row(prompt=torch.arange(3, n), max_new_tokens=n, is_stop=lambda _: False) for n in (9, 20)]
    run, num_steps = decoder.engine().run(rows), 0
    reads.forbidden.clear()
    reads.allowed, reads.in_flight = 0, False
    with Net(reads), Copies(reads):
        num_steps = sum(1 for _ in run)
    assert reads.forbidden == [] and drafter.drafts == num_steps > 3
    assert reads.allowed == num_steps + (drafter.drafts if is_checked else 0)


@pytest.mark.parametrize("name", ["llama", "longrope recomputed", "indexer", "mtp"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_that_join_and_leave_add_no_read(name, temperature, reads, monkeypatch):
    """A step in which prompts come to their end and others decode reads the device once; one without either, never.

    For n-grams it also reads the prompts that come to their end.
    """
    model, heads = random_mtp("glm4_moe", 2) if name == "mtp" else (make(name, monkeypatch), None)
    decoder = ladon.Decoder(model, heads or ladon.new_heads(model, num_heads=3), budget=16)
    decoder._target.prefill_chunk = 5
    engine, params = decoder.engine(max_rows=3), TemperatureSampling(temperature=temperature) if temperature else GREEDY
    rows = [
        Row(prompt=torch.arange(3, 3 + length), max_new_tokens=limit, is_stop=lambda _: False, sampling_params=params)
        for length, limit in ((6, 30), (1, 3), (23, 9), (2, 12), (11, 4))
    ]
    kinds = set()
    reads.forbidden.clear()
    reads.allowed, reads.in_flight = 0, False
    with Net(reads), Copies(reads):
        for number in range(100):
            if number % 3 == 0 and number < 15:
                engine.submit(rows[number // 3])
            if number == 8:
                engine.cancel(rows[2])
            before, reads.in_flight = reads.allowed, False
            step = engine.step()
            if step is None:
                break
            assert reads.allowed - before == bool(step.rows) + len(step.joined)
            kinds.add((step.tree is not None, bool(step.joined)))
    assert reads.forbidden == [] and all(row.finished for row in rows)
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def test_the_nets_catch_reads(reads):
    """A read from Ladon's code is seen by each net; otherwise the test above proves nothing."""
    source = """
def peek(t):
    t.item(), bool(t.sum()), t[t > 0], t.nonzero(), t.to("cpu"), t.to(device="cpu", dtype=torch.int64)
    host = torch.empty(4)
    host[:1].copy_(t)
    host[:1] = t

def upload(t):
    torch.tensor([1], device=t.device)
    torch.arange(3).to(t.device)
"""
    scope: dict = {"torch": torch}
    exec(compile(source, LADON + "/peek.py", "exec"), scope)
    with Net(reads), Copies(reads):
        scope["peek"](torch.ones(1))
        scope["upload"](torch.ones(1))
        assert "late upload" not in "".join(reads.forbidden)
        reads.in_flight = True
        scope["upload"](torch.ones(1))
    seen = [line.split(" at ")[0] for line in reads.forbidden]
    assert {"item", "__bool__", "index", "nonzero", "_local_scalar_dense"} <= set(seen)
    assert (seen.count("to cpu"), seen.count("copy to the host"), seen.count("late upload")) == (2, 2, 2)
