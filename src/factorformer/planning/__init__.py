"""Budgets in, plans out. Nothing here touches a weight."""

from factorformer.planning.allocate import ALLOCATIONS, AllocationName
from factorformer.planning.cost import Cost, Matrix, Role, total
from factorformer.planning.plan import Entry, Plan, Scope, left_dense

__all__ = ["ALLOCATIONS", "AllocationName", "Cost", "Entry", "Matrix", "Plan", "Role", "Scope", "left_dense", "total"]
