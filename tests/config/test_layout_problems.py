"""Layouts of single roles that cannot work are refused, with the numbers and the nearest that does."""

from pathlib import Path

import pytest

from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import dump, load_recipe
from rto_megatron.config.plan import fewest_ranks, most_ranks, plan_stage
from rto_megatron.config.schema import Stage
from rto_megatron.errors import RecipeError

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes" / "llama3_8b"


def rto(*overrides: str) -> Stage:
    return load_recipe(RECIPES / "rto_roles.yaml", overrides)


@pytest.mark.parametrize(
    ("config", "world_size", "parts"),
    [
        (
            rto("parallel.roles.critic.tensor=3"),
            4,
            ["parallel.roles.critic.tensor x", "3 x 1 = 3 does not divide the 4 ranks", "critic.tensor to 2"],
        ),
        (
            rto("parallel.roles.reward.pipeline=8"),
            4,
            ["1 x 8 = 8", "set parallel.roles.reward.pipeline to 1"],
        ),
        (
            rto("parallel.roles.critic.context=3"),
            4,
            [
                "critic.tensor x parallel.roles.critic.context x",
                "= 1 x 3 x 1 = 3 does not divide the 4 ranks",
            ],
        ),
        (
            rto("parallel.context=2"),
            4,
            [
                "parallel.tensor x parallel.context x parallel.pipeline = 4 x 2 x 1 = 8 does not divide the 4 ranks"
            ],
        ),
        (
            rto("parallel.context_scheme=gather"),
            4,
            ["parallel.context_scheme=gather has no effect with parallel.context=1; remove it or set"],
        ),
        (rto("parallel.roles.critic.sequence=true"), 4, ["needs parallel.roles.critic.tensor > 1"]),
        (
            rto("batch.train=64", "batch.micro=32", "batch.rollout=64"),
            4,
            ["micro x the 4 data-parallel ranks of the critic = 32 x 4 = 128; set batch.train to 128"],
        ),
        (
            rto("batch.train=2", "batch.micro=1", "batch.rollout=6", "parallel.roles.critic.tensor=2"),
            4,
            ["6 responses", "the 4 data-parallel ranks of the reward; set batch.rollout to 8"],
        ),
        (
            rto("batch.train=2", "batch.rollout=8"),
            4,
            [
                "batch.train=2 is below the 4 data-parallel ranks of the critic",
                "set batch.train to 4 at least",
            ],
        ),
        (
            load_recipe(RECIPES / "grpo.yaml", ["parallel.roles.critic.tensor=2"]),
            4,
            ["parallel.roles.critic has no effect", "it has the roles reference, reward beside the policy"],
        ),
        (
            load_recipe(RECIPES / "sft.yaml", ["parallel.roles.reference.tensor=2"]),
            8,
            ["parallel.roles.reference has no effect", "it has the policy alone"],
        ),
        (
            rto("parallel.roles.dpo_reference.tensor=2"),
            4,
            ["the model of models.reference", "or set parallel.roles.reference"],
        ),
        (
            load_recipe(RECIPES / "tdpo.yaml", ["parallel.roles.reference.tensor=2"]),
            8,
            ["stage tdpo compares whole distributions", "remove it"],
        ),
        (
            rto("parallel.roles.critic.ranks=4-7"),
            4,
            ["critic.ranks=4-7 names rank 7 of a job of 4 ranks, 0 to 3; start 8 ranks"],
        ),
        (
            rto("parallel.roles.critic.ranks=4-9"),
            8,
            ["names rank 9 of a job of 8 ranks, 0 to 7; set parallel.roles.critic.ranks to 4-7"],
        ),
        (
            rto("parallel.roles.critic.ranks=0-3"),
            8,
            ["takes rank 0, which leads the job", "set parallel.roles.critic.ranks to 4-7"],
        ),
        (
            rto("parallel.roles.critic.ranks=6-7"),
            8,
            ["4 x 1 = 4 does not divide the 6 ranks of 8 that are left to the policy; start 10 ranks"],
        ),
        (
            rto("parallel.roles.critic.ranks=4-7", "parallel.roles.reward.ranks=6-7"),
            8,
            ["critic.ranks=4-7 and parallel.roles.reward.ranks=6-7 overlap"],
        ),
        (
            rto("parallel.roles.critic={tensor: 3, ranks: 4-7}"),
            8,
            ["3 x 1 = 3 does not divide the 4 ranks, all of which hold the critic", "critic.tensor to 2"],
        ),
        (
            load_recipe(RECIPES / "rto_colocated.yaml", ["parallel.roles.critic.ranks=4-7"]),
            8,
            ["critic.ranks=4-7 cannot work with rollout.colocated=true", "remove it"],
        ),
    ],
)
def test_a_layout_of_a_role_that_cannot_work_is_refused(
    config: Stage, world_size: int, parts: list[str]
) -> None:
    (problem,) = find_problems(config, world_size, {})
    for part in parts:
        assert part in problem


def test_a_role_that_does_not_exist_and_the_policy_are_no_keys() -> None:
    for role in ("policy", "criticc"):
        with pytest.raises(
            RecipeError, match="must be 'critic', 'reference', 'reward', 'dpo' or 'dpo_reference'"
        ):
            rto(f"parallel.roles.{role}.tensor=2")
    with pytest.raises(RecipeError, match=r"did you mean parallel\.roles\.critic\.tensor"):
        rto("parallel.roles.critic.tensr=2")


def test_the_fewest_ranks_hold_every_role() -> None:
    config = rto("parallel.tensor=4", "parallel.roles.critic={tensor: 3, pipeline: 2}")
    assert fewest_ranks(config.parallel) == 12
    plan = plan_stage(config, 12)
    sizes = {role: plan.layout_of(role) for role in ("policy", "critic", "reward", "reference")}
    assert {role: (one.tensor, one.pipeline, one.data) for role, one in sizes.items()} == {
        "policy": (4, 1, 3),
        "critic": (3, 2, 2),
        "reward": (1, 1, 12),
        "reference": (4, 1, 3),
    }


def test_ranks_that_are_no_ranks_are_refused_where_they_are_read() -> None:
    for ranks, said in (("7-4", "ends before it begins; write 4-7"), ("4,5", "ranks"), ("-1", "ranks")):
        with pytest.raises(RecipeError, match=said):
            rto(f"parallel.roles.critic.ranks='{ranks}'")
    assert rto("parallel.roles.critic.ranks=4").parallel.roles["critic"].own_ranks == range(4, 5)


def test_the_policy_has_the_ranks_that_no_role_has_for_itself() -> None:
    config = rto("parallel.roles.critic.ranks=4-7", "parallel.roles.reward.ranks=4-7")
    assert fewest_ranks(config.parallel) == 8
    assert [most_ranks(config.parallel, number) for number in (4, 8, 11, 12, 19)] == [8, 8, 8, 12, 16]
    assert find_problems(config, 8, {}) == []
    sets = plan_stage(config, 8).rank_sets
    assert sets == {
        (0, 1, 2, 3): ("policy", "reference", "dpo", "dpo_reference"),
        (4, 5, 6, 7): ("critic", "reward"),
    }
    # More ranks are the policy's, wherever they stand.
    plan = plan_stage(config, 12)
    assert (plan.layout.data, plan.layout_of("critic").data) == (2, 4)
    assert plan.config.parallel.ranks_of("policy", 12) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_layouts_of_roles_come_back_from_a_saved_configuration(tmp_path: Path) -> None:
    config = rto("parallel.roles.critic.pipeline=2")
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_recipe(tmp_path / "config.yaml") == config
