"""Pictures of plans: a mask coloured by the ranks and stages that compute it, and a page on which to step through them."""

from magi_attention.viz.page import write_page
from magi_attention.viz.pieces import PlannedPieces, planned_pieces
from magi_attention.viz.plot import plot_plan
from magi_attention.viz.terminal import plan_to_string

__all__ = ["PlannedPieces", "plan_to_string", "planned_pieces", "plot_plan", "write_page"]
