"""What torch.compile lacks, in words; and a process of its own."""

import os
import sysconfig

import pytest

from hpclab.course import compiler


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no no-such-compiler here; Debian: apt install g++" in compiler.missing()
    program = tmp_path / "mine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    headers = tmp_path / "headers"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(headers))
    assert "Python's headers" in compiler.missing()
    headers.mkdir()
    (headers / "Python.h").touch()
    assert compiler.missing() is None


def test_a_function_of_ones_own_runs_apart():
    base = 40
    found, pid = compiler.apart(lambda more: (base + more, os.getpid()), 2)
    assert found == 42 and pid != os.getpid()


def test_what_fails_apart_says_why():
    with pytest.raises(RuntimeError, match=r"In its own process, <lambda> failed: ZeroDivisionError: division by zero"):
        compiler.apart(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match=r"_exit failed: exit code 3"):
        compiler.apart(os._exit, 3)
