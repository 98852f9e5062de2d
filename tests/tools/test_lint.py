"""The two changes to a text and the address-space lint: what they touch, and that MLX's own Metal passes both."""

from __future__ import annotations

import pytest
from mslemu import KernelError
from mslemu.headers import KERNELS, MLX_INCLUDE
from mslemu.lint import lint
from mslemu.prepare import prepare

HEADERS = sorted((MLX_INCLUDE / KERNELS).rglob("*.h"))


@pytest.mark.parametrize(
    "before,after",
    [
        ("threadgroup float t[32];", "MSL_TGVAR threadgroup float t[32];"),
        ("threadgroup uint a, b;", "MSL_TGVAR threadgroup uint a, b;"),
        ("threadgroup vec<T, 4> t[N];", "MSL_TGVAR threadgroup vec<T, 4> t[N];"),
        ("threadgroup metal::vec<T, 4> t;", "MSL_TGVAR threadgroup metal::vec<T, 4> t;"),
        ("threadgroup float* p = t;", "threadgroup float* p = t;"),
        ("const threadgroup float& p = t[0];", "const threadgroup float& p = t[0];"),
        ("f((threadgroup float*)p);", "f((threadgroup float*)p);"),
        ("void f(threadgroup float* p, uint n);", "void f(threadgroup float* p, uint n);"),
        ("load<threadgroup float>(p);", "load<threadgroup float>(p);"),
        ("// threadgroup float t;", "// threadgroup float t;"),
        ("x = 0.5 + 1e-3 + .25 + 1. + 3;", "x = 0.5f + 1e-3f + .25f + 1.f + 3;"),
        ("x = 0.5f + 1.0h + 0x1p-3 + 0xE;", "x = 0.5f + 1.0h + 0x1p-3f + 0xE;"),
        ('#include "a1.5.h" /* 1.5 */', '#include "a1.5.h" /* 1.5 */'),
    ],
)
def test_what_is_changed(before: str, after: str) -> None:
    assert prepare(before) == after


def test_changes_keep_the_lines() -> None:
    for path in HEADERS:
        text = path.read_text(encoding="utf-8")
        assert prepare(text).count("\n") == text.count("\n")


def test_an_initialised_threadgroup_variable_is_refused() -> None:
    with pytest.raises(KernelError, match="body:2: a threadgroup variable cannot have an initialiser"):
        prepare("uint i = 0;\nthreadgroup float t = 0;", "body")


@pytest.mark.parametrize(
    "text",
    [
        "float* p = q;",
        "const float& r = a[i];",
        "uint i = 0; vec<T, 4>* p = q;",
        "for (const T* p = a; p < b; p++) { o[i] = *p; }",
        "if (i < 4) { metal::vec<T, 4>* p = q; }",
    ],
)
def test_a_pointer_without_address_space_is_found_in_a_body(text: str) -> None:
    with pytest.raises(
        KernelError, match=r"body: pointer or reference without an address space .* at line 2$"
    ):
        lint("\n" + text, "body", function_body=True)


@pytest.mark.parametrize(
    "text",
    [
        "inline float f(const float* p) { return p[0]; }",
        "template <typename T>\ninline void f(uint n, T& x) {}",
        "struct S { float m; void f(float* p) {} };",
        "inline float f() { const float* p = 0; return p[0]; }",
    ],
)
def test_a_pointer_without_address_space_is_found_in_a_header(text: str) -> None:
    with pytest.raises(KernelError, match="without an address space"):
        lint(text, "header", function_body=False)


@pytest.mark.parametrize(
    "text",
    [
        "const device float* p = q; thread float& r = t[0]; threadgroup uint* s = u; constant int& c = d;",
        "float x = a * b; x = y & z; a[i] = b[i] * c; return x * y;",
        "#define POINTER(T) T* p = q;",
        "auto p = q; // float* p;",
    ],
)
def test_qualified_pointers_products_and_macros_pass(text: str) -> None:
    lint(text, "body", function_body=True)


def test_mlx_own_kernels_pass() -> None:
    assert len(HEADERS) > 60
    for path in HEADERS:
        lint(path.read_text(encoding="utf-8"), path.name, function_body=False)
