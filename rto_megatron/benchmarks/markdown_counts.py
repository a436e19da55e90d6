"""What Arena-Hard's style control counts in an answer: headers, list items and bold parts outside of code.

Source: Arena-Hard's add_markdown_info.py; numbers agree with tests/golden/eval.json.
"""

import re

type Counts = dict[str, dict[str, int]]

_CODE = re.compile(r"```([^`]*)```")
_COUNTED = {
    "header_count": {f"h{level}": re.compile(rf"^#{{{level}}}\s", re.MULTILINE) for level in range(1, 7)},
    "list_count": {
        "ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE),
        "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE),
    },
    "bold_count": {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")},
}


def markdown_counts(answer: str) -> Counts:
    """Elements of each kind.

    As there, what is removed is the inside of each code block wherever the same text stands in the answer, and the
    fences stay.

    Returns:
        header_count by h1 to h6, list_count by ordered and unordered, bold_count by its mark.
    """
    for inside in _CODE.findall(answer):
        answer = answer.replace(inside, "")
    return {
        group: {name: len(pattern.findall(answer)) for name, pattern in patterns.items()}
        for group, patterns in _COUNTED.items()
    }
