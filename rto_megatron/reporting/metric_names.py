"""Every number that a training run writes to metrics.jsonl and TensorBoard, with its unit and meaning.

docs/metrics.md is this table as text. A test runs every stage and holds what it wrote against the table.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.grpo import RelativeConfig
from rto_megatron.algorithms.method import OfflineMethod, OnlineMethod
from rto_megatron.algorithms.reinforcement import ClipConfig, GroupConfig


@dataclass(frozen=True)
class StageGroup:
    """Stages that share metrics, under the words that name them in the documentation.

    Example:
        StageGroup("KTO", ("kto",))
    """

    title: str
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """One name in the log.

    Args:
        unit: of the logged number.
        stages: those that write it.
        needs: what of a recipe has to be there as well; empty: these stages always write it.

    Example:
        Metric("lr", "", "learning rate of the step", OFFLINE)
    """

    name: str
    unit: str
    meaning: str
    stages: StageGroup
    needs: str = ""


@dataclass(frozen=True)
class Theme:
    """Metrics that are read together.

    Example:
        for metric in theme.metrics: print(metric.name)
    """

    title: str
    note: str
    metrics: tuple[Metric, ...]


_OFFLINE = {name: method for name, method in ALGORITHMS.items() if isinstance(method, OfflineMethod)}
_ONLINE = {name: method for name, method in ALGORITHMS.items() if isinstance(method, OnlineMethod)}

_SCALAR = {name for name, method in _OFFLINE.items() if method.outputs == "values"}
_JUDGED = {name for name, method in _OFFLINE.items() if method.examples == "judgements"}
_PREFERENCES = [
    n for n, method in _OFFLINE.items() if method.examples != "demonstrations" and n not in _SCALAR
]


def _group(title: str, stages: Iterable[str]) -> StageGroup:
    return StageGroup(title, tuple(stages))


ALL = _group("all", ALGORITHMS)
LANGUAGE = _group("all but reward models", (n for n in ALGORITHMS if n not in _SCALAR))
OFFLINE = _group("offline", _OFFLINE)
ANSWERS = _group("preferences", _PREFERENCES)
PAIRS = _group("preferences on pairs", (n for n in _PREFERENCES if n not in _JUDGED))
REWARD = _group("reward models", sorted(_SCALAR))
TDPO = _group("TDPO", ["tdpo"])
KTO = _group("KTO", ["kto"])
ONLINE = _group("online", _ONLINE)
CRITIC = _group("with a critic", (n for n, method in _ONLINE.items() if method.has_critic))
DPO_REWARD = _group("with a DPO reward", (n for n, method in _ONLINE.items() if method.has_dpo))
CLIPPED = _group("but RLOO", (name for name, method in _ONLINE.items() if method.has_ratio))
SURROGATE = _group(
    "with a clipped surrogate", (n for n, m in _ONLINE.items() if issubclass(m.config, ClipConfig))
)
KL_IN_LOSS = _group(
    "GRPO and its kin", (n for n, m in _ONLINE.items() if issubclass(m.config, RelativeConfig))
)
GROUPED = _group("that compare groups", (n for n, m in _ONLINE.items() if issubclass(m.config, GroupConfig)))
GROUPS = (ALL, LANGUAGE, OFFLINE, ANSWERS, PAIRS, REWARD, TDPO, KTO, ONLINE, CRITIC, DPO_REWARD, CLIPPED, SURROGATE,
          KL_IN_LOSS, GROUPED)  # fmt: skip

_LISTED = "`rewards`"
_HELD_OUT = "`data.eval`"
_CLIPPED = "`optimizer.max_grad_norm`"
_EXPERTS = "`models.moe_aux_loss_coef`, and a model with experts"
POOL = "a pool of vLLM servers"


def _router(role: str, stages: StageGroup) -> tuple[Metric, ...]:
    name, when = f"router/{role}", "a model with experts"
    return (
        Metric(f"{name}_load_max", "", "load of the busiest expert of a layer", stages, when),
        Metric(f"{name}_load_min", "", "load of the idlest expert of a layer", stages, when),
        Metric(f"{name}_load/NUMBER", "", "load of one expert, counted from 000", stages, when),
        Metric(f"{name}_load_entropy", "", "entropy of the loads of a layer over that of equal ones; 1 is balance, 0 "
               "one expert for all", stages, when),
        Metric(f"{name}_idle_fraction", "fraction", "experts without a token", stages, when),
        Metric(f"{name}_entropy", "nats", "entropy of a token's distribution over experts", stages, when),
    )  # fmt: skip


# What the losses of the offline stages say; on held-out data the same under `eval/`.
LOSSES = Theme(
    "Losses of the offline stages",
    "Means over the global batch of the step. The same names with `eval/` in front are means over `data.eval`, where "
    "that is set: at every `run.eval_every`-th step and at the last one, for a reward model at every saved step too.",
    (
        Metric("loss", "nats", "what is minimised; the squared or bounded loss of IPO and KTO has no unit", OFFLINE),
        Metric("rewards/chosen", "reward", "the method's implicit reward of the better answer", ANSWERS),
        Metric("rewards/rejected", "reward", "the same of the worse answer", ANSWERS),
        Metric("rewards/margins", "reward", "chosen less rejected", ANSWERS),
        Metric("rewards/accuracies", "fraction", "pairs whose chosen answer has the larger reward", PAIRS),
        Metric("rewards/ties", "fraction", "pairs whose answers tie; all of them before the first update", PAIRS),
        Metric("logps/chosen", "nats", "the policy's log-prob of the better answer, summed over its tokens", ANSWERS),
        Metric("logps/rejected", "nats", "the same of the worse answer", ANSWERS),
        Metric("kl/chosen", "nats", "KL(reference || policy), summed over the better answer's tokens", TDPO),
        Metric("kl/rejected", "nats", "the same of the worse answer", TDPO),
        Metric("kl", "nats", "the baseline z0 that answers are judged against", KTO),
        Metric("accuracy", "fraction", "pairs whose chosen answer scores higher", REWARD),
        Metric("ties", "fraction", "pairs whose answers score alike", REWARD),
        Metric("margin", "score", "score of the chosen answer less that of the rejected one", REWARD),
        Metric("mean_reward", "score", "score of an answer, chosen or rejected", REWARD),
        Metric("mean_squared_reward", "score^2", "its square; with the mean it gives the std in config.json", REWARD),
    ),
)  # fmt: skip

THEMES = (
    LOSSES,
    Theme(
        "What was sampled",
        "Means over the responses of the step. KL is estimated on the sampled tokens, with the policy that sampled.",
        (
            Metric("objective/scores", "score", "the reward model's normalised score, or the sum of all sources in "
                   "`rewards`, before clip and penalty", ONLINE),
            Metric("objective/kl", "nats", "log(policy / reference) summed over a response", ONLINE),
            Metric("objective/entropy", "nats", "minus the log-prob of a response", ONLINE),
            Metric("objective/rlhf_reward", "reward", "score after clip and penalty, less the KL penalty", ONLINE),
            Metric("objective/kl_coef", "", "coefficient of the KL penalty in this step", ONLINE),
            Metric("rollout/response_tokens", "tokens", "length of a response", ONLINE),
            Metric("rollout/prompt_tokens", "tokens", "length of its prompt", ONLINE),
            Metric("rollout/age_steps", "steps", "by which the weights that sampled are older than the step's; at most "
                   "`rollout.ahead`", ONLINE),
            Metric("rollout/truncated_fraction", "fraction", "responses that the length limit cut", ONLINE),
            Metric("rollout/equal_reward_groups", "fraction", "prompts whose responses are paid alike", ONLINE,
                   "`algorithm.samples_per_prompt` above 1"),
            Metric("rollout/informative_fraction", "fraction", "sampled groups whose scores differ", GROUPED,
                   "`algorithm.max_sampling_rounds`"),
            Metric("rollout/sampling_rounds", "rounds", "batches of prompts that the step sampled until it was full",
                   GROUPED, "`algorithm.max_sampling_rounds`"),
            Metric("task/true_return", "return", "known reward of the synthetic task", ONLINE, "`data.true_reward`"),
        ),
    ),
    Theme(
        "Rewards, advantages and values",
        "`reward/score` and the numbers of sources (`reward/NAME/...`, NAME as in `rewards`) are means over responses, "
        "the others are means over tokens; advantages and values count the tokens that are trained on.",
        (
            Metric("reward/score", "reward", "score after clip and penalty, as it is paid on the last token", ONLINE),
            Metric("reward/score_clip_fraction", "fraction", "responses whose score was clipped", ONLINE,
                   "`algorithm.score_clip`"),
            Metric("reward/NAME/mean", "reward", "what source NAME gives a response, tokens added", ONLINE, _LISTED),
            Metric("reward/NAME/mean_square", "reward^2", "its square", ONLINE, _LISTED),
            Metric("reward/NAME/paid", "reward", "the same after normalisation, clip and weight", ONLINE, _LISTED),
            Metric("reward/kl_per_token", "reward", "the KL penalty of a token; 0 where the loss has it", ONLINE),
            Metric("reward/dpo_per_token", "reward", "the DPO reward of a token, scaled and clipped", DPO_REWARD,
                   "`algorithm.beta_dpo` above 0"),
            Metric("reward/dpo_clip_fraction", "fraction", "tokens whose DPO reward was clipped", DPO_REWARD,
                   "`algorithm.beta_dpo` above 0"),
            Metric("policy/kl_per_token", "nats", "log(policy / reference) of a token (k1); steers an adaptive "
                   "coefficient", ONLINE),
            Metric("policy/kl_k3_per_token", "nats", "the same by the estimator k3, which is never negative", ONLINE),
            Metric("advantage/mean", "reward", "return less value, before whitening", CRITIC),
            Metric("advantage/mean_square", "reward^2", "its square", CRITIC),
            Metric("value/mean", "reward", "the critic's value before the step", CRITIC),
            Metric("value/return_mean", "reward", "the return that the critic learns", CRITIC),
            Metric("value/return_mean_square", "reward^2", "its square", CRITIC),
        ),
    ),
    Theme(
        "Updates of policy and critic",
        "Sums over all optimizer steps of the rollout step, divided once.",
        (
            Metric("loss/policy_avg", "reward", "the clipped surrogate", ONLINE),
            Metric("loss/value_avg", "reward^2", "half the squared error of the returns, clipped", CRITIC),
            Metric("loss/kl_avg", "nats", "KL to the reference (k3) inside the loss, before its weight", KL_IN_LOSS),
            Metric("loss/ptx_avg", "nats", "language-model loss before its weight; absent while the critic warms up",
                   ONLINE, "`data.pretrain`"),
            Metric("policy/approxkl_avg", "nats", "half the squared log-ratio to the policy that sampled", ONLINE),
            Metric("policy/clipfrac_avg", "fraction", "tokens on which the clip of the ratio binds", CLIPPED),
            Metric("policy/dual_clipfrac_avg", "fraction", "tokens on which the bound of a negative advantage binds",
                   SURROGATE, "`algorithm.dual_clip`"),
            Metric("policy/entropy_avg", "nats", "entropy of the policy at a token", ONLINE,
                   "`algorithm.entropy_coef` above 0"),
            Metric("val/ratio", "ratio", "probability of a token against the policy that sampled it", ONLINE),
            Metric("val/clipfrac_avg", "fraction", "tokens on which the clip of the value binds", CRITIC),
        ),
    ),
    Theme(
        "Evaluations of stages that sample",
        "Means over the responses to `data.eval`, at every `run.eval_every`-th step and at the last one, of the policy "
        "as the step leaves it.",
        (
            Metric("eval/score", "score", "what the reward gives, before clip and penalty", ONLINE, _HELD_OUT),
            Metric("eval/reward/NAME/mean", "reward", "what source NAME gives a response, tokens added", ONLINE,
                   "`data.eval` and `rewards`"),
            Metric("eval/response_tokens", "tokens", "length of a response", ONLINE, _HELD_OUT),
            Metric("eval/truncated_fraction", "fraction", "responses that the length limit cut", ONLINE, _HELD_OUT),
            Metric("eval/true_return", "return", "known reward of the synthetic task", ONLINE,
                   "`data.eval` and `data.true_reward`"),
            Metric("eval/pass_at_K", "fraction", "prompts of which one of K responses passes, for the powers of two up "
                   "to `evaluate.num_samples` and that number", ONLINE, "`data.eval` and `evaluate.pass_score`"),
        ),
    ),
    Theme(
        "Optimizers",
        "Gradient norms are taken before clipping. The learning rates of a rollout step are those of its last update.",
        (
            Metric("lr", "", "learning rate", OFFLINE),
            Metric("lr/policy", "", "learning rate of the policy; absent while the critic warms up", ONLINE),
            Metric("lr/critic", "", "learning rate of the critic", CRITIC),
            Metric("policy/grad_norm", "", "gradient norm of the policy", LANGUAGE, _CLIPPED),
            Metric("critic/grad_norm", "", "gradient norm of the critic", CRITIC, "`critic_optimizer.max_grad_norm`"),
            Metric("reward/grad_norm", "", "gradient norm of the reward model", REWARD, _CLIPPED),
            Metric("loss/policy_moe_aux", "", "load-balancing loss of the policy's experts before its weight; 1 is "
                   "perfect balance", LANGUAGE, _EXPERTS),
            Metric("loss/critic_moe_aux", "", "the same of the critic's experts", CRITIC, _EXPERTS),
            Metric("loss/reward_moe_aux", "", "the same of the reward model's experts", REWARD, _EXPERTS),
            Metric("update/skipped_fraction", "fraction", "updates that were refused, as a number in them was NaN or "
                   "infinite, or no token was left to train on", ALL),
        ),
    ),
    Theme(
        "Routers of mixtures of experts",
        "Of a model that is trained: of all tokens of an optimizer step but padding, means over the layers with "
        "experts and over the optimizer steps. A load is what an expert gets, over what it would get if all got as "
        "much: 1 is balance.",
        (
            *_router("policy", LANGUAGE),
            *_router("critic", CRITIC),
            *_router("reward", REWARD),
        ),
    ),
    Theme(
        "Agreement with the pool",
        "Over the tokens that the pool sampled; with `rollout.old_logprobs: pool` over those of one response in 16.",
        (
            Metric("pool/logprob_gap_mean", "nats", "|log-prob of the pool - log-prob of the trainer|, mean; with "
                   "`rollout.ahead` what the policy learnt since then is in it", ONLINE),
            Metric("pool/logprob_gap_max", "nats", "the largest of them", ONLINE),
            Metric("pool/logprob_gap_alarm", "0 or 1", "whether the mean is above the alarm; absent where rollouts "
                   "have an age", ONLINE,
                   "`rollout.logprob_gap_alarm`"),
            Metric("pool/importance_mean", "ratio", "weight of a token's policy loss that corrects the gap", ONLINE,
                   "`algorithm.pool_importance_cap`"),
            Metric("pool/importance_capped_fraction", "fraction", "tokens whose ratio is above the cap", ONLINE,
                   "`algorithm.pool_importance_cap`"),
            Metric("pool/prefix_hit_fraction", "fraction", "prompt tokens that a server had in its cache, most often "
                   "of another response to the prompt", ONLINE, POOL),
            Metric("pool/servers", "servers", "servers that hold the pushed weights, proved", ONLINE, POOL),
        ),
    ),
    Theme(
        "Time and traffic",
        "`time/*` are means over the data-parallel replicas, `sync/*` are those of the rank that drives the push.",
        (
            Metric("time/push_s", "s", "step 1: weights to the pool, once nothing is in flight", ONLINE),
            Metric("time/sample_s", "s", "step 2: responses from the pool", ONLINE),
            Metric("time/generate_s", "s", "what the pool took for the batch of the step, whenever that was; absent "
                   "where a checkpoint held it", ONLINE),
            Metric("time/pool_wait_s", "s", "that the trainer waited for responses, before a push or a save "
                   "too", ONLINE),
            Metric("time/score_early_s", "s", "forwards of micro-batches that came while others were sampled; part "
                   "of `time/sample_s` or `time/push_s`", ONLINE),
            Metric("time/score_s", "s", "step 3: forwards of all models, of what was not scored before", ONLINE),
            Metric("time/update_s", "s", "step 5: optimizer steps", ONLINE),
            Metric("time/step_s", "s", "the whole step up to its log", ALL),
            Metric("time/samples_per_s", "responses/s", "responses of the step over its time", ONLINE),
            Metric("time/sample_tokens_per_s", "tokens/s", "tokens of responses over `time/generate_s`", ONLINE),
            Metric("time/score_tokens_per_s", "tokens/s", "tokens of prompts and responses over "
                   "`time/score_s` and `time/score_early_s`", ONLINE),
            Metric("time/update_tokens_per_s", "tokens/s", "the same, times the passes, over `time/update_s`", ONLINE),
            Metric("time/score_tokens_per_s_per_rank", "tokens/s", "`time/score_tokens_per_s` over all ranks", ONLINE),
            Metric("time/update_tokens_per_s_per_rank", "tokens/s", "`time/update_tokens_per_s` over all ranks",
                   ONLINE),
            Metric("time/rollouts_s", "s", "that the loop was held up to keep rollouts; a thread writes them", ONLINE,
                   "`run.keep_rollouts`"),
            Metric("time/model_tflops", "TFLOP/s", "forwards and backwards of all models on a rank, by their "
                   "mathematics and without padding, over `time/step_s`; what the pool computes is not in it", ALL),
            Metric("time/mfu", "fraction", "`time/model_tflops` of `run.peak_tflops`", ALL, "`run.peak_tflops`"),
            Metric("memory/budget_fill_fraction", "fraction", "tokens of the micro-batches in training, without "
                   "padding, over the `batch.tokens` that each may have", ALL, "`batch.tokens`"),
            Metric("memory/parked_gib", "GiB", "the most of a rank's models and optimizers that waited in host memory",
                   ALL, "`offload`"),
            Metric("time/offload_s", "s", "of moves between the device and host memory", ALL, "`offload`"),
            Metric("memory/peak_gib", "GiB", "the most that torch held on a GPU in the step, of the fullest rank; "
                   "without a GPU, the most that a rank ever held in host memory", ALL),
            Metric("time/slowest_rank_ratio", "ratio", "seconds that the slowest rank computed, over the median rank's",
                   ALL, "two ranks that compute a loss"),
            Metric("time/busiest_rank_ratio", "ratio", "model FLOPs of the busiest rank in the step, over the mean "
                   "rank's; replicas share a step alike where it is 1", ALL, "two ranks"),
            Metric("sync/pause_s", "s", "of a push: pausing the servers and meeting them", ONLINE, POOL),
            Metric("sync/prepare_s", "s", "of a push: sending and checking the pieces", ONLINE, POOL),
            Metric("sync/commit_s", "s", "of a push: loading them into vLLM", ONLINE, POOL),
            Metric("sync/canary_s", "s", "of a push: the canary", ONLINE, POOL),
            Metric("sync/bytes", "bytes", "of a push: weights of the policy", ONLINE, POOL),
        ),
    ),
)  # fmt: skip


def listed_name(name: str) -> str:
    """The name under which the table has a name of the log: NAME is any source of rewards, K and NUMBER a number."""
    for pattern, listed in (
        (r"^eval/pass_at_\d+$", "eval/pass_at_K"),
        (r"\breward/[^/]+/", "reward/NAME/"),
        (r"_load/\d+$", "_load/NUMBER"),
    ):
        name = re.sub(pattern, listed, name)
    return name


def metrics_of(stage: str) -> dict[str, Metric]:
    """Name in the log -> metric, of everything that a stage may write."""
    return dict(_named(stage))


def _named(stage: str) -> Iterator[tuple[str, Metric]]:
    for theme in THEMES:
        for metric in theme.metrics:
            if stage in metric.stages.stages:
                yield metric.name, metric
                if theme is LOSSES:
                    yield f"eval/{metric.name}", metric
