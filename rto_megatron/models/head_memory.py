"""What log-probs, and scores with a soft cap, take beside layers: arithmetic alone, for plans made without torch."""

CHUNK_POSITIONS = 1024  # whose logits exist at a time; a multiple of what makes a matrix product fast

PART_QUERIES = 512  # at least, whose attention scores exist at a time where they have a soft cap or a window


def capped_bytes(num_queries: int, num_keys: int, num_heads: int, number_bytes: int) -> int:
    """Peak memory of attention scores with a soft cap on one rank, while they are derived.

    Args:
        num_heads: on this rank.
        number_bytes: of a number of the model, e.

    Returns:
        bytes: of some queries' scores behind the cap, e a number, and in float32 their copy, weights and gradient.
    """
    return min(num_queries, PART_QUERIES) * num_keys * num_heads * (number_bytes + 12)


def head_bytes(
    num_positions: int, hidden_size: int, num_columns: int, number_bytes: int, is_capped: bool = False
) -> int:
    """Peak memory of log-probs and entropies with their gradients, on one tensor rank.

    Args:
        num_positions: asked for in a micro-batch, at most all of them.
        num_columns: of the vocabulary on this rank, v.
        number_bytes: of a number of the model, e.
        is_capped: whether logits have a soft cap, whose slope takes 4 more a number of a chunk.

    Returns:
        bytes: of the states asked for as they are gathered, kept and derived, 3 e h a position; of one chunk's logits
        10 a number, twice in float32 with a mask or a gradient in the model's dtype; of the projection's gradient e a
        weight, and 4 more to add it up in float32 where a model of fewer bits has several chunks.
    """
    chunk = min(num_positions, CHUNK_POSITIONS)
    is_added_up = number_bytes < 4 and num_positions > CHUNK_POSITIONS
    states = 3 * number_bytes * num_positions * hidden_size
    gradient = (number_bytes + 4 * is_added_up) * num_columns * hidden_size
    return states + (14 if is_capped else 10) * chunk * num_columns + gradient
