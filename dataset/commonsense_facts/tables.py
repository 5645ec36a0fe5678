"""Reading the fact tables, which are written as text to be easy on the eye."""

import re


def read_rows(table: str, separator: str = " | ") -> list[list[str]]:
    """Split every line of a table into its fields; an indented line goes on with the line above."""
    joined = re.sub(r"\n +", " ", table.strip())
    return [line.split(separator) for line in joined.splitlines()]


def read_groups(table: str, separator: str) -> dict[str, list[str]]:
    """Read lines of the form `key: member, member, ...`."""
    return {key: members.split(separator) for key, members in read_rows(table, ": ")}
