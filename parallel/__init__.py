"""Where tensors live: the mesh, the plan, and its application to a plain model."""

from shardwright.parallel.mesh import Mesh, TopologyError
from shardwright.parallel.plan import ParallelPlan, PlanError

__all__ = ["Mesh", "ParallelPlan", "PlanError", "TopologyError"]
