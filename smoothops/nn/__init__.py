"""Modules: a soft operator in a ``Sequential``, its strength learned or annealed, sparse gates, sparse attention."""

from .attention import SparseAttention
from .gate import GateStatistics, TopKGate
from .soften import Soften
from .strength import Anneal, LearnableEps

__all__ = ["Anneal", "GateStatistics", "LearnableEps", "Soften", "SparseAttention", "TopKGate"]
