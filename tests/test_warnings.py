"""What the tests make of warnings: this project's are errors, and so is what other packages say to their users."""

from __future__ import annotations

import warnings

import pytest


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (DeprecationWarning, "ivtp.prefill.run"),
        (DeprecationWarning, "tests.recipes.test_train"),
        (DeprecationWarning, __name__),
        (RuntimeWarning, "torch.nn.functional"),
        (FutureWarning, "transformers.cache_utils"),
    ],
)
def test_these_are_errors(kind: type[Warning], module: str) -> None:
    with pytest.raises(kind):
        warnings.warn_explicit("use something else", kind, "file.py", 1, module=module)


@pytest.mark.parametrize(
    ("kind", "module", "text"),
    [
        (DeprecationWarning, "triton.compiler.code_generator", "AnnAssign.__init__ missing 1 required argument"),
        (DeprecationWarning, "torch.jit._script", "`torch.jit.script` is not supported in Python 3.14+"),
        (DeprecationWarning, "importlib._bootstrap", "builtin type SwigPyPacked has no __module__ attribute"),
        (RuntimeWarning, "torch._dynamo.guards", "Guards may run slower on Python 3.13.0. Consider upgrading"),
    ],
)
def test_these_are_for_others_to_mend_and_not_even_shown(kind: type[Warning], module: str, text: str) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn_explicit(text, kind, "file.py", 1, module=module)
    assert shown == []
