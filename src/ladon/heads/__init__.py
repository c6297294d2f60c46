"""Head families and their checkpoints."""

from ladon.heads.base import ConditionedHeads, Heads
from ladon.heads.factory import load_heads, new_heads
from ladon.heads.hydra import HydraHeads
from ladon.heads.medusa import MedusaHeads
from ladon.heads.mlp import LowRankHeads, SharedHeads

__all__ = [
    "ConditionedHeads",
    "Heads",
    "HydraHeads",
    "LowRankHeads",
    "MedusaHeads",
    "SharedHeads",
    "load_heads",
    "new_heads",
]
