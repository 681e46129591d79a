"""Prose is plain American English, without the words and constructions of a list."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"]
FILES = [
    str(path.relative_to(ROOT))
    for path in [
        *(ROOT / page for page in PAGES),
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "ctde_jax").rglob("*.py")),
    ]
]

BRITISH_ISE = (
    "central decentral emphas final general initial materi max maxim minim normal optim organ "
    "parallel penal quant random real recogn regular serial special standard summar synchron token "
    "util vector visual"
)
"""Stems of verbs in -ize, which British English also spells -ise."""

BRITISH_OUR = "behavi col fav flav hon lab neighb"
"""Stems of words in -or, which British English spells -our."""

FORBIDDEN = {
    "say, tell": r"\b(?:say|says|said|saying|tell|tells|told|telling)\b",
    "hear, bear": r"\b(?:heard|hears?|bears?|bearing|borne)\b",
    "archaic": r"\b(?:anew|lest|likewise|whoever|whomever)\b",
    "so many": r"\bso (?:many|few|long|much)\b",
    "go on": r"\b(?:go|goes|going|went) on\b",
    "of its own": r"\bof (?:its|their|his|your|our) own\b",
    "dealt": r"\bdealt\b",
    "where for if": (
        r"\bwhere (?:there|it|that|this|they|no|none|nobody|nothing|one|some|such|not)\b"
        r"|(?:^|[;:(] )where\b"
    ),
    "-ise": rf"\b(?:{BRITISH_ISE.replace(' ', '|')})is(?:e|ed|es|er|ers|ing|ation|ations)\b",
    "-our": rf"\b(?:{BRITISH_OUR.replace(' ', '|')})ours?(?:ed|ing|ite|able|less)?\b",
    "other British spellings": (
        r"\b(?:analys(?:e|ed|ing)|artefacts?|centre[sd]?|grey|(?:label|model)l(?:ed|ing)|whilst)\b"
    ),
    "clause as subject": r"^(?:what|whatever|who|whoever)\b(?!.*\?$)",
}
"""Patterns of a sentence by the reason for which they are forbidden; `^` is its beginning."""

ALLOWED: set[str] = set()
"""Sentences in which a match is legitimate; each with its reason."""


def without_code(text: str) -> str:
    """Replaces code and addresses by an ellipsis, and keeps the line ends."""
    for code in (r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"https?://\S+"):
        text = re.sub(code, lambda match: "…" + "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return text


def blocks(path: str) -> Iterator[tuple[int, str]]:
    """Yields the prose of a file: Markdown, or docstrings, comments and other strings of Python.

    Each block has the number of its first line.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        yield 1, text
        return
    yield from strings(ast.parse(text))
    yield from comments(text)


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the strings that contain a space; f-strings with an ellipsis for each value."""
    if isinstance(tree, ast.JoinedStr):
        parts = [getattr(value, "value", "") for value in tree.values]
        yield tree.lineno, "".join(part if isinstance(part, str) else "…" for part in parts)
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str) and " " in tree.value:
        yield tree.lineno, tree.value
    for child in ast.iter_child_nodes(tree):
        # The literal parts of an f-string are in its block.
        if not (isinstance(tree, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from strings(child)


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yields the comments; those on consecutive lines are one block."""
    lines: dict[int, str] = {
        token.start[0]: token.string.lstrip("#: ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    for first in lines:
        if first - 1 not in lines:
            last = first
            while last + 1 in lines:
                last += 1
            yield first, "\n".join(lines[line] for line in range(first, last + 1))


# A sentence ends at a period, at a blank line, and before a heading, a list item, a table cell or
# an entry of `Args`, whose name is not prose.
END = re.compile(
    r"(?<=[.!?])(?:[ \t]+|(?=\n))"
    r"|\n\s*\n"
    r"|^[ \t]*(?:#+|[-*]|\d+\.)[ \t]+"
    r"|\s*\|\s*"
    r"|^[ \t]+\**\w+:(?=\s)",
    re.MULTILINE,
)


def sentences(block: str) -> Iterator[tuple[int, str]]:
    """Yields the sentences of a block, each with the number of lines before it."""
    text = without_code(block)
    first = 0
    for end in [*(match.span() for match in END.finditer(text)), (len(text), len(text))]:
        sentence = text[first : end[0]]
        if sentence.strip():
            start = end[0] - len(sentence.lstrip())
            yield text.count("\n", 0, start), " ".join(sentence.split())
        first = end[1]


def faults(path: str) -> Iterator[str]:
    for line, block in blocks(path):
        for before, sentence in sentences(block):
            for reason, pattern in FORBIDDEN.items():
                if re.search(pattern, sentence, re.IGNORECASE) and sentence not in ALLOWED:
                    yield f"{path}:{line + before}: [{reason}] {sentence}"


@pytest.mark.parametrize("path", FILES)
def test_prose_has_no_forbidden_words(path: str):
    found = list(faults(path))
    assert not found, "\n".join(found)


EXAMPLES = {
    "say, tell": "The receipt says so.",
    "hear, bear": "Rules that bear bad devices.",
    "archaic": "It is drawn anew.",
    "so many": "Blocks of so many steps.",
    "go on": "The run goes on.",
    "of its own": "A process of its own.",
    "dealt": "Examples are dealt to devices.",
    "where for if": "The mean is zero where there is no weight.",
    "-ise": "It is initialised once.",
    "-our": "Its neighbours agree.",
    "other British spellings": "The centre is shared.",
    "clause as subject": "What a device sends is counted.",
}


@pytest.mark.parametrize("reason", FORBIDDEN)
def test_pattern_finds_its_example(reason: str):
    assert re.search(FORBIDDEN[reason], EXAMPLES[reason], re.IGNORECASE)


def test_sentences_have_their_lines_and_no_code():
    page = "# Title\n\nOne `said`\nline. What is\nthis?\n\n```\ntold\n```\n- Two.\n\n| a | b |"
    assert list(sentences(page)) == [
        (0, "Title"),
        (2, "One … line."),
        (3, "What is this?"),
        (6, "…"),
        (9, "Two."),
        (11, "a"),
        (11, "b"),
    ]


def test_prose_of_python_is_in_strings_and_comments():
    code = 'x = f"one {y} two"  # three\n# four\nz = "five six"\n'
    assert list(strings(ast.parse(code))) == [(1, "one … two"), (3, "five six")]
    assert list(comments(code)) == [(1, "three\nfour")]
