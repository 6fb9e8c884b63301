"""Budgets in, plans out. Nothing here touches a weight."""

from factorformer.planning.allocate import ALLOCATIONS, TOLERANCE, AllocationName, Sizes, candidates_of
from factorformer.planning.families import Choice, choose_families
from factorformer.planning.knapsack import Option, by_loss
from factorformer.planning.plan import Cause, Entry, Plan, Unit, left_dense
from factorformer.planning.sharing import Share, expand, find_groups, stacked

__all__ = [
    "ALLOCATIONS",
    "TOLERANCE",
    "AllocationName",
    "Cause",
    "Choice",
    "Entry",
    "Option",
    "Plan",
    "Share",
    "Sizes",
    "Unit",
    "by_loss",
    "candidates_of",
    "choose_families",
    "expand",
    "find_groups",
    "left_dense",
    "stacked",
]
