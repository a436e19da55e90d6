"""The synthetic task's language and its true reward, as arrays over words; no tokenizer, no files.

Legend: C classes, W response words. The previous-word axis has W + 1 entries, the last is the start of the
response; the word axis of rewards has W + 1 entries, the last is the end of the sequence.

Words follow a second-order Markov chain that depends on the class; lengths are drawn apart. The reward is
sparse over (class, previous word, word), and centred so that under the first-order part of this source,
which ignores the word two back, a longer response is worth neither more nor less, but for the style's cost per
word: what pays is which word follows which. Stopping pays on average, and how much depends on the last word,
so a truncated response is worse than one that ends.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOPICS = ("sun", "cat", "dog", "hen")
WORDS = ("mat", "rat", "log", "hog", "run", "fun", "day", "hit")
SUBJECTS = (*WORDS, "hay", "may", "men", "ten", "bit", "sit", "fit", "fat")  # of requests
REQUESTS = (
    "write on the {topic} with {first} {second}",
    "tell me of the {topic} and {first} {second}",
    "why is the {topic} near {first} {second}",
    "sum up the {topic} for {first} {second}",
)
LOGIT_SD = 0.8
SKIP_LOGIT_SD = 1.0  # makes SFT learn to look one word back, which a reward model needs to see pairs of words
NONZERO_FRACTION = 0.35
RETURN_SD = 4.0  # of the source, after scaling: labels are then right nine times out of ten
_NUM_CALIBRATION = 4000  # responses by which that is measured
SHARED_VARIANCE = 0.75  # of each table: common to all classes; the rest is a class's own


@dataclass(frozen=True)
class Style:
    """The words that responses are made of, and how long they get.

    Example:
        Style(words=("yes", "no"), min_words=3, max_words=9, stop_probability=0.2, token_cost=0.1)
    """

    words: tuple[str, ...]
    min_words: int
    max_words: int
    stop_probability: float  # of each word from `min_words` on
    # Of each word, in units of the sd of a table entry; negative: a longer response earns more.
    token_cost: float

    @property
    def end(self) -> int:
        """Index of the end of the sequence on the word axis, and of the start on the axis of previous words."""
        return len(self.words)


SHORT = Style(WORDS, 7, 23, stop_probability=1 / 7, token_cost=0.04)  # 8 to 24 tokens, the end included
# 9 to 48. Words pay, and the data hold every length: else learners find out that reward models do not know how bad
# responses of two words are.
LONG = Style(WORDS, 8, 47, stop_probability=1 / 20, token_cost=-0.15)
STYLES = {"short": SHORT, "long": LONG}


@dataclass(frozen=True)
class Language:
    """The text source and the reward of its transitions.

    Example:
        words = language.sample(topic, rng)
    """

    style: Style
    source: NDArray[np.float64]  # [C, W + 1, W] probabilities of the next word by the one before
    skip: NDArray[np.float64]  # [W + 1, W] factor of the next word by the one two before
    reward: NDArray[np.float64]  # [C, W + 1, W + 1], scaled, without the cost
    token_cost: float  # scaled
    scale: float
    source_mean: float
    source_sd: float

    def returns(self, topic: int, words: list[int]) -> float:
        """True return of a response that ends after `words`."""
        end = self.style.end
        steps = zip([end, *words], [*words, end], strict=True)
        return float(sum(self.reward[topic, previous, word] for previous, word in steps)) - (
            self.token_cost * len(words)
        )

    def sample(self, topic: int, rng: np.random.Generator) -> list[int]:
        """Draw the words of one response."""
        style = self.style
        num_words = min(style.min_words + int(rng.geometric(style.stop_probability)) - 1, style.max_words)
        words = []
        before = previous = style.end
        for draw in rng.random(num_words):
            weights = self.source[topic, previous] * self.skip[before]
            cumulative = (weights / weights.sum()).cumsum()
            before, previous = previous, min(int(np.searchsorted(cumulative, draw)), style.end - 1)
            words.append(previous)
        return words


def draw_language(seed: int, style: Style = SHORT) -> Language:
    """Draw source and reward from `seed`; the source's returns have an sd of RETURN_SD."""
    rng = np.random.default_rng(seed)
    num_words = len(style.words)
    logits = LOGIT_SD * _mixed(rng, num_words, num_words)
    source = np.exp(logits)
    source /= source.sum(-1, keepdims=True)
    skip = np.exp(SKIP_LOGIT_SD * rng.standard_normal((num_words + 1, num_words)))
    is_nonzero = rng.random(source.shape) < NONZERO_FRACTION
    reward = np.where(is_nonzero, _mixed(rng, num_words, num_words), 0.0)
    # The mean of a row under the source is taken off its entries, so the expected reward of any word is 0.
    mass = np.maximum((source * is_nonzero).sum(-1, keepdims=True), 1e-9)
    reward = np.where(is_nonzero, reward - (source * reward).sum(-1, keepdims=True) / mass, 0.0)
    end_reward = 1.0 + _mixed(rng, num_words, 1)
    unscaled = Language(
        style, source, skip, np.concatenate([reward, end_reward], axis=-1), style.token_cost, 1.0, 0.0, 1.0
    )
    topics = rng.integers(len(TOPICS), size=_NUM_CALIBRATION)
    returns = np.array([unscaled.returns(int(topic), unscaled.sample(int(topic), rng)) for topic in topics])
    scale = RETURN_SD / float(returns.std())
    return Language(
        style=style,
        source=source,
        skip=skip,
        reward=np.round(unscaled.reward * scale, 6),
        token_cost=round(style.token_cost * scale, 6),
        scale=scale,
        source_mean=float(returns.mean()) * scale,
        source_sd=RETURN_SD,
    )


def _mixed(rng: np.random.Generator, num_words: int, num_columns: int) -> NDArray[np.float64]:
    """Standard normal [C, W + 1, num_columns], part of whose variance is shared by the classes."""
    shared = rng.standard_normal((1, num_words + 1, num_columns))
    own = rng.standard_normal((len(TOPICS), num_words + 1, num_columns))
    mixed: NDArray[np.float64] = shared * SHARED_VARIANCE**0.5 + own * (1.0 - SHARED_VARIANCE) ** 0.5
    return mixed
