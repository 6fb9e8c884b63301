"""Budgets in, plans out. Nothing here touches a weight."""

from factorformer.planning.allocate import ALLOCATIONS, AllocationName, Sizes, candidates_of
from factorformer.planning.by_loss import Option, by_loss
from factorformer.planning.cost import Cost, Matrix, Role, total
from factorformer.planning.families import Choice, choose_families
from factorformer.planning.plan import Entry, Plan, Scope, Unit, left_dense
from factorformer.planning.sharing import Member, Share, expand, find_groups, stacked

__all__ = [
    "ALLOCATIONS",
    "AllocationName",
    "Choice",
    "Cost",
    "Entry",
    "Matrix",
    "Member",
    "Option",
    "Plan",
    "Role",
    "Scope",
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
    "total",
]
