"""PPO, RTO, what RTO is made of, a control and an oracle on a real language model; fixed before the runs.

docs/language.md says why, and what came out.
"""

from pathlib import Path

from rto_megatron.config.overrides import as_override
from rto_megatron.data.labelled_pairs import write_pairs
from rto_megatron.experiments.design import Arm, Design, Experiment
from rto_megatron.experiments.lanes import Lane
from rto_megatron.experiments.language.attribution import attribution_rows
from rto_megatron.experiments.language.prompts import write_prompts
from rto_megatron.experiments.sample_efficiency.arms import shuffle_dpo_rewards

NUM_PROMPTS = 1200, 200  # to train on, held out
LABEL_NOISE = 0.15  # of the Bradley-Terry labels, in units of the true reward
_RULES = "rto_megatron.experiments.language.rules"
# The program pays every token, in units of the start's standard deviation; the same program is measured as in all arms.
_PAID_BY_THE_PROGRAM = (
    f"rewards=[{{kind: function, name: credit, function: {_RULES}:credit, pays: tokens, weight: 4}}, "
    f"{{kind: function, name: rules, function: {_RULES}:kept, weight: 0}}]"
)

ARMS = (
    Arm("ppo", "ppo", "ppo", recipe="ppo"),
    Arm("rto", "rto", "rto", recipe="rto"),
    Arm("rs_ppo", "rs_ppo", "rto", recipe="rto"),
    Arm("shuffled_rto", "rto", "rto", recipe="rto", control=shuffle_dpo_rewards),
    Arm(
        "dense_oracle", "ppo", "ppo",
        ("models.reward=null", "models.critic=${vars.root}/reward_model", _PAID_BY_THE_PROGRAM), recipe="ppo",
    ),
)  # fmt: skip
DESIGN = Design(seeds=(0, 1, 2, 3, 4), tuning_seeds=(0,), factors=(1.0, 3.0), matched_kl=2.0)
EXPERIMENT = Experiment(
    "Rules kept by a language model", DESIGN, ARMS, Path("launchers/recipes/real_language"),
    start="start", source="rules", beside=attribution_rows,
)  # fmt: skip


def make_models(lane: Lane, folder: Path, seed: int) -> None:
    """Writes prompts and labelled pairs, trains reward model and DPO, evaluates what is no arm, unless it is there."""
    train, test = folder / "task/prompts_train.jsonl", folder / "task/prompts_test.jsonl"
    if not test.exists():
        write_prompts(folder / "task", *NUM_PROMPTS, seed)
    for part, prompts, count in (("train", train, 600), ("test", test, 60)):
        answers, pairs = folder / f"sampled_{part}", folder / f"pairs_{part}.jsonl"
        lane.sample(
            "sample", folder, as_override("run.dir", answers), as_override("vars.prompts", prompts),
            f"data.eval_samples={count}", f"run.seed={seed}",
        )  # fmt: skip
        if not pairs.exists():
            write_pairs(
                str(answers / "evaluation.jsonl"), str(prompts), pairs, "reward/rules", LABEL_NOISE, seed
            )
    for stage in ("reward_model", "dpo"):
        lane.learn(stage, folder, seed)
    lane.evaluate("start", folder, "vars.policy=${vars.model}")
    lane.evaluate("dpo", folder)
