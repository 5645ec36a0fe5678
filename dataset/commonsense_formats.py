"""The instruction formats of the LLM-Adapters collection, one for each commonsense task.

https://github.com/AGI-Edgerunners/LLM-Adapters
"""

from collections.abc import Sequence
from typing import NamedTuple

Row = dict[str, str]

TASKS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


class ChoiceFormat(NamedTuple):
    """How a task words a question with options."""

    lead: str
    option: str
    between_options: str = " "
    before_answer_format: str = "\n\n"


QUESTION = ChoiceFormat("Please choose the correct answer to the question: ", "answer")
CHOICE_FORMATS = {
    "piqa": ChoiceFormat("Please choose the correct solution to the question: ", "solution", between_options="\n\n"),
    "siqa": QUESTION,
    "hellaswag": ChoiceFormat("Please choose the correct ending to complete the given sentence: ", "ending"),
    "winogrande": ChoiceFormat(
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        "option",
        before_answer_format=" ",
    ),
    "arc_easy": QUESTION,
    "arc_challenge": QUESTION,
    "openbookqa": QUESTION,
}


def true_false_row(task: str, question: str, truth: bool) -> Row:
    """Build the row of a yes/no question, given without its question mark."""
    lead = "Please answer the following question with true or false, question: "
    return _row(task, f"{lead}{question}?\n\nAnswer format: true/false", "true" if truth else "false")


def choice_row(task: str, stem: str, options: Sequence[str], right: int) -> Row:
    """Build the row of a question with options, of which the one at index `right` is the answer."""
    if not 0 <= right < len(options):
        raise ValueError(f"the answer must be one of the {len(options)} options, got number {right + 1}")
    form = CHOICE_FORMATS[task]
    names = [f"{form.option}{number}" for number in range(1, len(options) + 1)]
    listed = form.between_options.join(
        f"{name.capitalize()}: {text}" for name, text in zip(names, options, strict=True)
    )
    instruction = f"{form.lead}{stem}\n\n{listed}{form.before_answer_format}Answer format: {'/'.join(names)}"
    return _row(task, instruction, names[right])


def _row(task: str, instruction: str, answer: str) -> Row:
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
        "task": task,
    }
