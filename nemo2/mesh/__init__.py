"""Named axes, sizes, coordinates and groups of a mesh; the guard against ranks that die."""

from nemo2.mesh.groups import MeshGroups, new_group, stage_group
from nemo2.mesh.make import make_mesh
from nemo2.mesh.sizes import AXES, MeshSizes, fit_sizes, parse_sizes
from nemo2.mesh.watchdog import Patience, Watchdog

__all__ = [
    "AXES",
    "MeshGroups",
    "MeshSizes",
    "Patience",
    "Watchdog",
    "fit_sizes",
    "make_mesh",
    "new_group",
    "parse_sizes",
    "stage_group",
]
