"""The processes that tests share: each program ends as one of its own would, and leaves the next one alone."""

import os

import pytest
from forks import forks


@pytest.fixture(scope="module")
def run():
    with forks("import json", dict(os.environ)) as run:
        yield run


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("import json; print(json.loads('2'))", (0, "2\n", "")),
        ("import sys; sys.exit()", (0, "", "")),
        ("import sys; sys.exit(3)", (3, "", "")),
        ("import sys; sys.exit('give more')", (1, "", "give more\n")),
        ("import os; os.kill(os.getpid(), 9)", (-9, "", "")),
        ("import sys; print(repr(sys.stdin.read()))", (0, "''\n", "")),
    ],
)
def test_a_program_ends_as_it_would_by_itself(run, tmp_path, program, ended):
    assert run(program, tmp_path) == ended
    assert run("import os; print(os.getcwd(), os.environ['OF'])", tmp_path, OF="one")[1] == f"{tmp_path} one\n"
