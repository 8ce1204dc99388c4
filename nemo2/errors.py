"""The errors a user can meet: one base, one subclass per concern."""


class Nemo2Error(ValueError):
    """Base of every user error: what was asked, where, the numbers, what would work."""


class MeshError(Nemo2Error):
    """Axis sizes that do not fit the world, or a mesh that nemo2 cannot use."""


class ShardingError(Nemo2Error):
    """An annotation that cannot be honoured on the mesh asked for."""


class PipelineError(Nemo2Error):
    """A model, batch or schedule that cannot be split into stages or microbatches."""


class CheckpointError(Nemo2Error):
    """A checkpoint that is missing, damaged, or does not fit the model."""
