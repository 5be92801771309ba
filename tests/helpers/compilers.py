"""What a test asks of the machine that it runs on."""

from __future__ import annotations

import pytest


def require_cpp_compiler() -> None:
    """Skips the test where torch finds no C++ compiler; whether what it finds works is the test's own question."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("this machine has no C++ compiler")
