"""Shares of the tests: together all of them, none twice."""

import subprocess
import sys

import pytest


def collected(root, *options):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests/test_config.py"]
    return subprocess.run([*command, *options], cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_shares_are_all_tests_and_none_twice(root):
    whole, *shares = (
        [line for line in collected(root, *options).stdout.splitlines() if "::" in line]
        for options in ((), ("--share", "0/2"), ("--share", "1/2"))
    )
    assert sorted(shares[0] + shares[1]) == sorted(whole) and all(len(share) > 0.3 * len(whole) for share in shares)


def test_a_share_that_is_none_is_one_line(root):
    done = collected(root, "--share", "2/2")
    assert done.returncode != 0 and "--share: 2/2: the first of two shares is 0/2, the second 1/2" in done.stderr
