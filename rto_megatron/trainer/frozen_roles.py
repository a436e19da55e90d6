"""The frozen models of a stage: two roles with the same weights are one model, with one memory and one forward."""

from rto_megatron.config.training import FrozenPrecisionConfig
from rto_megatron.engine.absent import FrozenRole, RoleModel
from rto_megatron.engine.build_roles import place_frozen
from rto_megatron.engine.same_weights import are_same
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.setup import Setup


class FrozenRoles:
    """Loads frozen models, each weights once per layout.

    Example:
        frozen = FrozenRoles(setup, config.precision)
        reference, dpo = frozen.place("reference"), frozen.place("dpo")
    """

    def __init__(self, setup: Setup, precision: FrozenPrecisionConfig) -> None:
        self._setup = setup
        self._precision = precision
        self._placed: dict[str, FrozenRole] = {}

    def place(self, name: str, is_scalar: bool = False) -> FrozenRole:
        """The model of a role, or the one placed before that is the same to the bit; all ranks must call it.

        Folders do not matter: an export and the checkpoint that it is of are the same. Weights that were drawn
        (`models.random_init`, simulations) stay apart, as they stand for others.
        """
        source, topology = self._setup.sources[name], self._setup.topology
        model = place_frozen(name, source, is_scalar, self._precision, topology.of(name))
        twins = self._placed if source.kind != "random" else {}
        for other, twin in twins.items():
            if are_same(model, twin):
                say(
                    f"{name} has the weights of {other}: one model serves as both, with one memory and one forward",
                    topology.is_lead,
                )
                model = twin
                break
        self._placed[name] = model
        return model

    def placed(self) -> dict[str, RoleModel]:
        """Role -> model, of those that were asked for."""
        return dict(self._placed)
