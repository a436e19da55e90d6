"""RTO on REINFORCE++, as in the paper's appendix E: RTO's token reward, without a critic."""

from pydantic import Field

from rto_megatron.algorithms import reinforce_pp
from rto_megatron.algorithms.method import OnlineMethod


class Config(reinforce_pp.Config):
    """REINFORCE++'s keys with the weight of RTO.

    Example:
        algorithm: {beta_kl: 0.05, beta_dpo: 0.05}
    """

    beta_dpo: float = Field(
        default=0.05, ge=0, description="weight of RTO's DPO reward per token; 0: none, and no DPO model"
    )


METHOD = OnlineMethod(Config, reinforce_pp.build, has_critic=False, has_dpo=True)
