"""Head families and their checkpoints."""

from ladon.heads.base import Heads
from ladon.heads.conditioned import ConditionedHeads
from ladon.heads.factory import load_heads, new_heads
from ladon.heads.hydra import HydraHeads
from ladon.heads.lowrank import LowRankHeads
from ladon.heads.medusa import MedusaHeads
from ladon.heads.shared import SharedHeads

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
