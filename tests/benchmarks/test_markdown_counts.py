"""What style control counts, against golden numbers."""

from benchmarks.made_files import GOLDEN

from rto_megatron.benchmarks.markdown_counts import markdown_counts


def test_counts_equal_golden_numbers() -> None:
    golden = GOLDEN["ah_markdown_counts"]
    assert markdown_counts(golden["text"]) == {
        name: golden[name] for name in golden if name.endswith("_count")
    }
